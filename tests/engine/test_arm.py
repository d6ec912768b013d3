"""The ARM64 library on an emulated CPU gives the oracle's logits, to the last bit, on each of its paths.

Built by a cross compiler and run by qemu-user: g++-aarch64-linux-gnu and qemu-user of Debian, where they are.
HALO_TEST_SLOW=1, since building takes a minute. It says nothing of speed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backend import KV_FORMS, NativeModel
from engine.formats.prepared import prepare
from engine.model import Model
from engine.reference import Reference
from tests.engine.conftest import NATIVE, SHAPES

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in (COMPILER, EMULATOR, "cmake") if shutil.which(tool) is None]
ROOT = Path("/usr/aarch64-linux-gnu")  # Debian's ARM64 C library, and its dynamic linker
CPUS = {"max": ["neondot", "neon", "scalar"], "cortex-a72": ["neon", "scalar"]}  # without dot product
LENGTH, PREFILL = 270, 252  # beyond a block of the cache

pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(
        not os.environ.get("HALO_TEST_SLOW"), reason="builds for a minute; HALO_TEST_SLOW=1 runs it"
    ),
]


def called(*argv: object) -> str:
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Arm:
    """A folder with libhalo_cpu.so and the driver, both for ARM64."""

    folder: Path

    def call(self, cpu: str, *argv: object) -> str:
        """Run the driver on an emulated CPU. One that it lacks an instruction of ends with SIGILL."""
        loader = ["-L", ROOT, "-E", f"LD_LIBRARY_PATH={self.folder}"]
        return called(EMULATOR, "-cpu", cpu, *loader, self.folder / "arm_driver", *argv)

    def logits(
        self, out: Path, cpu: str, path: str, kv: str, threads: int, model: Path, tokens: list[int]
    ) -> Any:
        self.call(cpu, model, out, path, kv, threads, PREFILL, *tokens)
        return np.fromfile(out, dtype="<f4").reshape(len(tokens), -1)


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Arm:
    folder = tmp_path_factory.mktemp("arm")
    called(
        "cmake", "-S", NATIVE, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_SYSTEM_NAME=Linux",
        "-DHALO_HIP=OFF", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}",
    )  # fmt: skip
    called("cmake", "--build", folder)
    driver = Path(__file__).with_name("arm_driver.cpp")
    called(
        COMPILER, "-std=c++17", "-O1", "-Wall", "-I", NATIVE, driver, "-L", folder, "-lhalo_cpu", "-o",
        folder / "arm_driver",
    )  # fmt: skip
    return Arm(folder)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Model]) -> Model:
    """Heads of 64 elements, three query heads to a KV head; the other sizes fill no register."""
    SHAPES["arm"] = dict(
        hidden_size=384, intermediate_size=211, num_layers=2, num_heads=6, num_kv_heads=2, vocab_size=97
    )
    try:
        return tiny_model("arm", seed=3, max_seq_len=LENGTH)
    finally:
        del SHAPES["arm"]


@pytest.fixture(scope="module")
def prepared(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.halo"
    prepare(model, path)
    return path


@pytest.fixture(scope="module")
def tokens(model: Model) -> list[int]:
    return list(np.random.default_rng(8).integers(0, model.config.vocab_size, LENGTH).tolist())


@pytest.mark.parametrize("cpu", CPUS)
def test_the_library_finds_what_the_cpu_has(arm: Arm, cpu: str) -> None:
    """A wrong answer is an illegal instruction on a user's board, or a slow path on a fast one."""
    facts = json.loads(arm.call(cpu, "-", "-", "facts"))
    assert facts["paths"] == CPUS[cpu] and facts["isa"] == CPUS[cpu][0]


@pytest.mark.parametrize("form", KV_FORMS)
def test_every_path_gives_the_oracles_logits(
    arm: Arm, model: Model, prepared: Path, tokens: list[int], form: str, tmp_path: Path, native_library: Path
) -> None:
    """A prompt in one run, then a token at a time beyond the cache's first block; what x86 gives too."""
    oracle = Reference(model, form)
    wanted = oracle.forward(tokens, oracle.new_cache())
    with NativeModel.open(prepared, native_library) as here, here.session(kv=form) as session:
        same = session.run(tokens, [0] * LENGTH, range(LENGTH), [True] * LENGTH)
    assert np.array_equal(same, wanted), "this machine's own path"
    for cpu, paths in CPUS.items():
        for path in paths[: None if cpu == "max" else 1]:
            for threads in (1, 2):
                found = arm.logits(tmp_path / "logits", cpu, path, form, threads, prepared, tokens)
                assert np.array_equal(found, wanted), (cpu, path, threads)


def test_silu_and_no_sub_norms_too(arm: Arm, model: Model, tokens: list[int], tmp_path: Path) -> None:
    """The other graph that the engine runs: LLaMA's with ternary projections, its head its own."""
    config = replace(model.config, activation="silu", sub_norms=False, tie_embeddings=False)
    layers = [replace(layer, attn_sub_norm=None, ffn_sub_norm=None) for layer in model.layers]
    other = replace(model, config=config, layers=layers, head=np.ascontiguousarray(model.embedding[::-1]))
    prepare(other, tmp_path / "model.halo")
    oracle = Reference(other)
    wanted = oracle.forward(tokens, oracle.new_cache())
    for path in CPUS["max"]:
        found = arm.logits(tmp_path / "logits", "max", path, oracle.kv, 2, tmp_path / "model.halo", tokens)
        assert np.array_equal(found, wanted), path
