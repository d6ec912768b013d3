"""The backend that is taken, and what is said where it cannot be. The libraries are small lying ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine import device
from engine.backend import NativeModel
from engine.bench_report import shape_of
from engine.device import ABI_VERSION, BACKENDS, choose_backend, find_library, load_library
from engine.errors import EXIT_COULD_NOT_RUN, EXIT_ERROR, HaloError
from engine.formats.prepared import prepare
from engine.roofline import decode_step
from engine.server.serve import serve_service
from engine.server.sockets import bind
from tests.engine.conftest import random_model
from tests.engine.server_fixtures import ScriptedSession, byte_tokens, make_engine, make_service, wait_until
from tests.engine.test_bench import bench

# Every function of halo.h; what it says of itself comes with -D.
SOURCE = """
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifndef ABI
#define ABI 4
#endif
#ifndef STATUS
#define STATUS 0
#endif
#ifndef SAYS
#define SAYS ""
#endif
extern "C" {
uint32_t halo_abi_version(void) { return ABI; }
const char *halo_last_error(void) { return SAYS; }
int halo_device_facts(char *buffer, size_t capacity, size_t *needed) {
  const char *facts = FACTS;
  *needed = strlen(facts) + 1;
  if (STATUS) return STATUS;
  memcpy(buffer, facts, *needed < capacity ? *needed : capacity);
  return 0;
}
int halo_model_open(const char *, void **) { return OPENS; }
int halo_model_config(void *, void *) { return 8; }
void halo_model_close(void *) {}
int halo_session_create(void *, int, int, int, const char *, const char *, void **) { return 8; }
int halo_session_facts(void *, char *, size_t, size_t *) { return 8; }
int halo_session_run() { return 8; }
int halo_session_draw() { return 8; }
int halo_session_logits() { return 8; }
int halo_session_copy() { return 8; }
void halo_session_close(void *) {}
#ifndef LACKING
int halo_ternary_sums() { return 8; }
#endif
}
"""
GPU_FACTS = {"backend": "hip", "abi": 4, "isa": "graph", "device": "a GPU", "arch": "gfx1151"}
NO_DEVICE = "there is no GPU here that the driver knows"
WRONG_CODE = "this library has code for gfx1100, and this GPU is gfx1151"
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(folder, name, **defines): libhalo_<name>.so there; each kind of library is compiled once."""
    kept = tmp_path_factory.mktemp("lies")

    def build(folder: Path, name: str, facts: dict[str, object] | None = None, **defines: object) -> Path:
        defines = {"FACTS": json.dumps(json.dumps(facts or GPU_FACTS)), "OPENS": 8, **defines}
        flags = [f"-D{key}={value}" for key, value in defines.items()]
        made = kept / f"{abs(hash(tuple(flags)))}.so"
        if not made.exists():
            (kept / "lie.cpp").write_text(SOURCE)
            command = ["c++", "-shared", "-fPIC", "-O0", *flags, str(kept / "lie.cpp"), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True)
        folder.mkdir(exist_ok=True)
        path = folder / f"libhalo_{name}.so"
        path.write_bytes(made.read_bytes())
        return path

    return build


@pytest.fixture
def place(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a CPU library, which HALO_LIB_DIR names."""
    for name in ("HALO_BACKEND", "HALO_GENERATION_DIR", "HALO_CPU_PATH", "HALO_GPU_PATH", "HALO_THREADS"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "lib"
    make(folder, "cpu", {"backend": "cpu", "abi": 4, "isa": "scalar", "cpus": 2})
    monkeypatch.setenv("HALO_LIB_DIR", str(folder))
    return folder


def test_without_a_gpus_library_the_cpu_decodes_and_says_so(place: Path) -> None:
    chosen = choose_backend({})
    assert (chosen.name, chosen.facts()["backend"]) == ("cpu", "cpu")
    assert chosen.facts()["backend_reason"] == "there is no libhalo_hip.so here"


def test_a_gpus_library_that_finds_its_device_is_taken(place: Path, make: Make) -> None:
    make(place, "hip")
    chosen = choose_backend({})
    assert chosen.name == "hip" and chosen.reason == ""
    assert chosen.facts()["arch"] == "gfx1151"


@pytest.mark.parametrize(
    ("defines", "reason"),
    [
        ({"STATUS": 4, "SAYS": json.dumps(NO_DEVICE)}, NO_DEVICE),
        ({"STATUS": 4, "SAYS": json.dumps(WRONG_CODE)}, WRONG_CODE),
        ({"STATUS": 9, "SAYS": json.dumps("the GPU was lost")}, "the GPU was lost"),
        ({"ABI": 2}, "speaks ABI 2"),
        ({"LACKING": 1}, "cannot be loaded"),
    ],
)
def test_a_gpus_library_of_no_use_leaves_the_cpu_and_its_reason(
    place: Path, make: Make, defines: dict[str, object], reason: str
) -> None:
    """An update of the driver must not leave a box without an answer."""
    make(place, "hip", **defines)
    chosen = choose_backend({"HALO_BACKEND": "auto"})
    assert chosen.name == "cpu" and reason in chosen.facts()["backend_reason"]


@pytest.mark.parametrize(
    ("defines", "sentence", "hint"),
    [
        (
            {"STATUS": 4, "SAYS": json.dumps(NO_DEVICE)},
            f"The native engine (hip) refused: {NO_DEVICE}.",
            "doctor",
        ),
        ({"STATUS": 4, "SAYS": json.dumps(WRONG_CODE)}, WRONG_CODE, "halo doctor"),
        ({"STATUS": 9, "SAYS": json.dumps("the GPU was lost")}, "the GPU was lost", "dmesg"),
        ({"ABI": 2}, f"speaks ABI 2, and this halo speaks {ABI_VERSION}", "halo install"),
        ({"LACKING": 1}, "halo_ternary_sums", "halo install"),
    ],
)
def test_a_backend_that_is_asked_for_and_cannot_be_had_is_an_error(
    place: Path, make: Make, defines: dict[str, object], sentence: str, hint: str
) -> None:
    make(place, "hip", **defines)
    with pytest.raises(HaloError) as caught:
        choose_backend({"HALO_BACKEND": "hip"})
    assert sentence in caught.value.message and hint in caught.value.hint
    assert caught.value.exit_code == EXIT_COULD_NOT_RUN


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "cpu"])
def test_a_missing_library_is_named(place: Path, name: str) -> None:
    with pytest.raises(HaloError) as caught:
        choose_backend({"HALO_BACKEND": name})
    assert f"libhalo_{name}.so is missing" in caught.value.message
    assert "HALO_BACKEND=cpu" in caught.value.hint and caught.value.exit_code == EXIT_COULD_NOT_RUN
    assert ("--profile strix-halo" in caught.value.hint) == (name == "hip")


@pytest.mark.parametrize("name", ["HIP", "gpu", "vulkan", "../cpu", " "])
def test_an_unknown_backend_is_refused_with_the_names_there_are(place: Path, name: str) -> None:
    with pytest.raises(HaloError) as caught:
        choose_backend({"HALO_BACKEND": name})
    assert repr(name) in caught.value.message and "auto, cpu, hip, cuda, sim" in caught.value.hint


def test_the_cpu_that_is_asked_for_is_taken_beside_a_gpu(place: Path, make: Make) -> None:
    make(place, "hip")
    chosen = choose_backend({"HALO_BACKEND": "cpu"})
    assert (chosen.name, chosen.reason) == ("cpu", "HALO_BACKEND=cpu")


def test_a_library_of_nothing_but_noise_leaves_the_cpu(place: Path) -> None:
    (place / "libhalo_hip.so").write_bytes(b"\x7fELF" + b"\0" * 200)
    chosen = choose_backend({})
    assert chosen.name == "cpu" and "cannot be loaded" in chosen.reason


def test_without_any_library_the_cpus_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HALO_GENERATION_DIR", raising=False)
    monkeypatch.setenv("HALO_LIB_DIR", str(tmp_path))
    with pytest.raises(HaloError, match=r"libhalo_cpu\.so is missing"):
        choose_backend({})
    monkeypatch.delenv("HALO_LIB_DIR")
    with pytest.raises(HaloError, match=r"libhalo_cpu\.so cannot be found") as caught:
        choose_backend({})
    assert "HALO_LIB_DIR" in caught.value.hint


def test_the_generations_library_is_found(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HALO_LIB_DIR", raising=False)
    monkeypatch.setenv("HALO_GENERATION_DIR", str(tmp_path))
    path = make(tmp_path / "lib", "hip")
    assert find_library("hip") == path and device.library_folder() == tmp_path / "lib"


@pytest.mark.parametrize(
    ("status", "says", "hint"),
    [
        (5, "the model needs 900 MB, and the GPU has 400 MB", "fewer slots"),
        (9, "the GPU was lost: a kernel did not end well", "start halo again"),
        (3, "the header's checksum is wrong", "prepare the model again"),
    ],
)
def test_what_a_gpu_says_when_a_model_is_opened_comes_with_its_own_hint(
    place: Path, make: Make, monkeypatch: pytest.MonkeyPatch, status: int, says: str, hint: str
) -> None:
    make(place, "hip", OPENS=status, SAYS=json.dumps(says))
    monkeypatch.setenv("HALO_BACKEND", "hip")
    with pytest.raises(HaloError) as caught:
        NativeModel.open(place / "model.halo")
    assert caught.value.message == f"The native engine (hip) refused: {says}." and hint in caught.value.hint


def test_a_refusal_of_the_cpus_engine_keeps_its_words(place: Path, make: Make) -> None:
    path = make(place / "other", "cpu", OPENS=4, SAYS=json.dumps("no such path"))
    library = load_library(path)
    with pytest.raises(HaloError) as caught:
        device.check(library, 4)
    assert caught.value.message == "The native engine refused: no such path."
    assert "HALO_CPU_PATH" in caught.value.hint


class LostSession(ScriptedSession):
    """A device that is lost at its first step."""

    def run(self, *arguments: Any) -> Any:
        self.gate.wait(30)
        raise device.DeviceLost("The native engine (hip) refused: the GPU was lost.", hint="start halo again")


def test_a_lost_gpu_ends_the_server_with_an_error_and_all_who_wait_are_told() -> None:
    """systemd then starts a new one, which finds the device again or takes the CPU."""
    session = LostSession(byte_tokens(b"x"))
    session.gate.clear()
    service = make_service(make_engine(session))
    sockets = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
    codes: list[int] = []
    server = threading.Thread(target=lambda: codes.append(serve_service(service, sockets, None)), daemon=True)
    server.start()
    answers: list[httpx.Response] = []
    body = {"model": "halo-test", "messages": [{"role": "user", "content": "Hello"}]}

    def ask() -> None:
        answers.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30))

    clients = [threading.Thread(target=ask) for _ in range(2)]
    for client in clients:
        client.start()
    wait_until(lambda: service.runner.counts() == (1, 1))
    session.gate.set()
    for thread in (*clients, server):
        thread.join(30)
    assert codes == [EXIT_ERROR]
    assert [answer.status_code for answer in answers] == [500, 500]
    assert all("the GPU was lost" in answer.json()["error"]["message"] for answer in answers)
    assert service.runner.lost is not None and not service.runner.alive()


# --- the GPU engine itself, on its simulated device: what a person sees of its faults


@pytest.fixture
def simulated(sim_library: Path, native_library: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the simulated GPU's library, which is asked for."""
    for name in ("HALO_SIM_FAULT", "HALO_GPU_PATH", "HALO_CPU_PATH", "HALO_KV", "HALO_GPU_PACKING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HALO_LIB_DIR", str(sim_library.parent))
    monkeypatch.setenv("HALO_BACKEND", "sim")
    return sim_library.parent


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.halo"
    prepare(random_model("plain"), path)
    return path


SHORT = """
import json, sys
from engine.backend import NativeModel
from engine.errors import HaloError
try:
    with NativeModel.open(sys.argv[1]) as model, model.session(context=32) as session:
        ids = [session.run_argmax([1, 2, 3], [0] * 3, range(3), [False, False, True])[0]]
        for at in range(3, 7):
            ids += session.run_argmax([ids[-1]], [0], [at], [True])
        print(json.dumps({"ids": ids, **model.facts, **session.facts}))
except HaloError as error:
    print(json.dumps({"error": error.message, "hint": error.hint, "kind": type(error).__name__}))
    sys.exit(error.exit_code)
"""


def decoded(prepared: Path, folder: Path, **environ: str) -> tuple[int, dict[str, Any]]:
    """A short decode in a process of its own: a simulated device stays as it was opened."""
    env = {**os.environ, "HALO_LIB_DIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[2]), **environ}
    done = subprocess.run(
        [sys.executable, "-c", SHORT, str(prepared)], env=env, capture_output=True, text=True, timeout=120
    )
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("path", ["graph", "eager"])
def test_the_gpu_engine_is_asked_as_the_cpus_is_and_says_the_same(
    simulated: Path, prepared: Path, path: str
) -> None:
    code, said = decoded(prepared, simulated, HALO_GPU_PATH=path, HALO_CPU_PATH="scalar")
    assert code == 0 and (said["backend"], said["isa"], said["device"]) == ("sim", path, "simulated")
    assert said["backend_reason"] == "HALO_BACKEND=sim" and said["threads"] == 1
    code, wanted = decoded(prepared, simulated, HALO_BACKEND="cpu")
    assert code == 0 and wanted["backend"] == "cpu" and said["ids"] == wanted["ids"]


@pytest.mark.parametrize(
    ("fault", "code", "sentence", "hint", "kind"),
    [
        ("none", EXIT_COULD_NOT_RUN, "there is no GPU here", "halo doctor", "HaloError"),
        ("code", EXIT_COULD_NOT_RUN, "this library has code for gfx1151", "halo doctor", "HaloError"),
        ("memory=1000", EXIT_ERROR, "memory", "fewer slots", "HaloError"),
        ("lost=3", EXIT_ERROR, "the GPU was lost", "start halo again", "DeviceLost"),
    ],
)
def test_each_fault_of_a_gpu_is_a_sentence_and_what_to_do(
    simulated: Path, prepared: Path, fault: str, code: int, sentence: str, hint: str, kind: str
) -> None:
    ended, said = decoded(prepared, simulated, HALO_SIM_FAULT=fault)
    assert ended == code and sentence in said["error"] and hint in said["hint"] and said["kind"] == kind
    assert (
        said["error"].startswith("The native engine (sim) refused: ") and "HALO_BACKEND=cpu" in said["hint"]
    )


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [({"HALO_GPU_PATH": "warp"}, "'warp' is no way"), ({"HALO_KV": "f32"}, "no KV cache of f32")],
)
def test_what_a_gpu_cannot_do_is_refused_with_what_it_can(
    simulated: Path, prepared: Path, environ: dict[str, str], sentence: str
) -> None:
    code, said = decoded(prepared, simulated, **environ)
    assert code == EXIT_ERROR and sentence in said["error"]


def test_the_bytes_of_the_roofline_are_those_on_the_device(simulated: Path, prepared: Path) -> None:
    """The device holds what a token reads, and all of the head in full precision and of RoPE's tables."""
    _, said = decoded(prepared, simulated)
    shape = shape_of(prepared, said)
    config, weights = shape.config, shape.bytes_a_token()
    whole_head = config.vocab_size * shape.row
    tables = 2 * 4 * config.max_seq_len * (config.head_dim // 2)
    held = weights["ternary"] + shape.head_bytes() + whole_head + tables
    assert held < said["model_bytes"] < 1.1 * held + 64 * 1024
    positions = 256  # a whole block
    assert said["kv_bytes"] == pytest.approx(config.num_layers * shape.kv_bytes() * positions)


def test_a_report_of_the_simulated_gpu_has_its_kernels(simulated: Path, tmp_path: Path) -> None:
    library = simulated / "libhalo_sim.so"
    done = bench(
        tmp_path, library, "--report", "--bandwidth", "1", "--rounds", "1", "--context", "8", "--tokens", "2"
    )
    assert done.returncode in (0, 2), done.stderr
    assert "backend sim (HALO_BACKEND=sim): simulated" in done.stdout
    assert "1.0 GB/s (stated)" in done.stdout and "| gate and up | 2 |" in done.stdout


STEPS = """
import sys
from engine.backend import NativeModel
with NativeModel.open(sys.argv[1]) as model, model.session(context=32) as session:
    token = session.run_argmax([1], [0], [0], [True])
    for at in range(int(sys.argv[2])):
        token = session.run_argmax(token, [0], [at + 1], [True])
"""


def test_a_decode_step_has_the_launches_that_the_roofline_counts(simulated: Path, prepared: Path) -> None:
    """Counted by a device that is lost after so many kernels and copies: what one more step takes."""

    def lasts(kernels: int, steps: int) -> bool:
        env = {**os.environ, "HALO_LIB_DIR": str(simulated), "PYTHONPATH": str(Path(__file__).parents[2])}
        argv = [sys.executable, "-c", STEPS, str(prepared), str(steps)]
        done = subprocess.run(
            argv,
            env={**env, "HALO_SIM_FAULT": f"lost={kernels}"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 or "DeviceLost" in done.stderr, done.stderr
        return done.returncode == 0

    least, most = 0, 4096  # kernels that one step, with what loads the model, outlasts, and does not
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (least, middle) if lasts(middle, 1) else (middle, most)
    _, said = decoded(prepared, simulated)
    launches = decode_step(shape_of(prepared, said), 2).launches
    assert lasts(most + launches, 2) and not lasts(most + launches - 1, 2)
