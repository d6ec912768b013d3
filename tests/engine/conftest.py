"""Fixtures of the engine's tests: small random models, and the native library, built once for its sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.device import device_facts
from engine.formats.h1b import pack_codes
from engine.model import Layer, Model, ModelConfig, Ternary

NATIVE = Path(__file__).parents[2] / "engine" / "native"

# Odd on purpose: sizes that are no multiple of 16, of 64, or of 4; MHA, GQA and one KV head; a tiny
# vocabulary.
SHAPES: dict[str, dict[str, int]] = {
    "plain": dict(
        hidden_size=64, intermediate_size=192, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=300
    ),
    "odd": dict(
        hidden_size=90, intermediate_size=211, num_layers=2, num_heads=5, num_kv_heads=1, vocab_size=97
    ),
    "wide": dict(
        hidden_size=256, intermediate_size=680, num_layers=3, num_heads=2, num_kv_heads=2, vocab_size=515
    ),
    "least": dict(
        hidden_size=2, intermediate_size=1, num_layers=1, num_heads=1, num_kv_heads=1, vocab_size=3
    ),
}


def random_ternary(rng: np.random.Generator, rows: int, cols: int) -> Ternary:
    codes = rng.integers(0, 3, (rows, cols), dtype=np.uint8)
    scales = (rng.uniform(0.8, 1.2, rows) / np.sqrt(0.67 * cols)).astype(np.float32)
    return Ternary(pack_codes(codes), scales, cols)


def random_model(shape: str = "plain", seed: int = 0, bf16: bool = True, max_seq_len: int = 64) -> Model:
    rng = np.random.default_rng(seed)
    config = ModelConfig(
        **SHAPES[shape], max_seq_len=max_seq_len, tie_embeddings=True, rope_theta=10000.0, rms_norm_eps=1e-5
    )
    hidden = config.hidden_size

    def norm(n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return rng.uniform(0.5, 1.5, n).astype(np.float32)

    def layer() -> Layer:
        norms = norm(hidden), norm(hidden), norm(hidden), norm(config.intermediate_size)
        return Layer(*norms, *[random_ternary(rng, rows, cols) for _, rows, cols in config.projections()])

    embedding = rng.normal(0, 1, (config.vocab_size, hidden)).astype(np.float32)
    if bf16:
        embedding = (embedding.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return Model(config, embedding, norm(hidden), [layer() for _ in range(config.num_layers)])


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Model]:
    """A factory of random models: tiny_model(shape="plain"|"odd"|"wide"|"least", seed, bf16, max_seq_len)."""
    return random_model


def native_digest() -> str:
    """Of the native sources, names included: what is built from others is another library."""
    sources = sorted(path for path in NATIVE.rglob("*") if path.is_file())
    whole = b"".join(str(path.relative_to(NATIVE)).encode() + path.read_bytes() for path in sources)
    return hashlib.sha256(whole).hexdigest()[:16]


def built(request: pytest.FixtureRequest, target: str, *options: str) -> Path:
    """A library of this checkout, built once for its sources, kept in $HALO_TEST_BUILD or pytest's cache."""
    cache = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    root = Path(
        os.environ.get("HALO_TEST_BUILD") or (cache.mkdir("halo-native") if cache else tempfile.mkdtemp())
    )
    folder = root / native_digest()
    library = folder / f"lib{target}.so"
    if not library.exists():
        if shutil.which("cmake") is None:
            pytest.fail("cmake is not installed; python3 tests/run.py brings what the tests need")
        folder.mkdir(parents=True, exist_ok=True)
        # Built aside and moved in: another test run may be building the same sources.
        with tempfile.TemporaryDirectory(dir=folder) as build:
            configure = ["cmake", "-S", str(NATIVE), "-B", build, "-DCMAKE_BUILD_TYPE=Release", *options]
            for command in (configure, ["cmake", "--build", build, "-j", "2", "--target", target]):
                done = subprocess.run(command, capture_output=True, text=True)
                assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
            (Path(build) / library.name).replace(library)
    return library


@pytest.fixture(scope="session")
def native_library(request: pytest.FixtureRequest) -> Path:
    """libhalo_cpu.so of this checkout."""
    return built(request, "halo_cpu", "-DHALO_HIP=OFF")


@pytest.fixture(scope="session")
def sim_library(request: pytest.FixtureRequest) -> Path:
    """libhalo_sim.so of this checkout: the GPU engine, host and device code, on a simulated device."""
    return built(request, "halo_sim", "-DHALO_HIP=OFF", "-DHALO_SIM=ON")


@pytest.fixture(scope="session")
def cpu_paths(native_library: Path) -> list[str]:
    """The CPU paths that this machine can run, the best first."""
    return list(device_facts(native_library)["paths"])
