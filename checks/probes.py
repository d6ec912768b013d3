"""Probes that run something, each in its own process group with a timeout. They report; they do not judge."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from checks.case import CompileProbe, Decoded, Installed
from checks.client import golden_of
from checks.facts import Facts

COMPILE_SECONDS: Final = 120.0
ENGINE_SECONDS: Final = 120.0
MAX_OUTPUT_BYTES: Final = 64 << 10

# It needs what a real build needs: HIP's headers, the device libraries (expf), a host C++ standard library,
# and gfx11's own dot product.
KERNEL: Final = r"""
#include <hip/hip_runtime.h>
#include <cmath>
extern "C" __global__ void probe(const int* a, const int* b, float* out, int n) {
    int sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x)
        sum = __builtin_amdgcn_sudot4(true, a[i], true, b[i], sum, false);
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor(sum, step);
    if (threadIdx.x == 0) out[blockIdx.x] = expf(static_cast<float>(sum));
}
int main() { return std::isnan(0.0f) ? 1 : 0; }
"""


def run_bounded(
    argv: Sequence[str], *, timeout: float, cwd: Path, env: dict[str, str] | None = None
) -> tuple[int, str]:
    """(code, last output). -1: it ran past `timeout` and its whole group was killed; -2: it did not start.

    Output goes to a file, so that a probe that floods it cannot fill our memory, and only its end is read.
    """
    with tempfile.TemporaryFile(dir=cwd) as output:
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=cwd,
                env=env,
                start_new_session=True,
            )
        except OSError as error:
            return -2, f"{argv[0]}: {error.strerror}"
        try:
            code = process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            # The group outlives its leader when a compiler driver dies before its children.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        end = output.seek(0, os.SEEK_END)
        output.seek(max(0, end - MAX_OUTPUT_BYTES))
        return code, output.read().decode("utf-8", "replace").strip()


def compiler_command(facts: Facts, target: str = "gfx1151") -> tuple[str, ...]:
    """The compile command of the first ROCm root, or () where there is none."""
    if not facts.rocm:
        return ()
    root = facts.rocm[0]
    # A distribution's own clang finds its device libraries beside itself; one told /usr would look in vain.
    place = () if root.path == "/usr" else (f"--rocm-path={root.path}",)
    driver = (root.hipcc,) if root.hipcc else (root.clang, "-x", "hip", *place)
    return (*driver, f"--offload-arch={target}", "-O2", "-c", "probe.hip", "-o", "probe.o")


def probe_engine(installed: Installed, timeout: float = ENGINE_SECONDS) -> Decoded:
    """Decode the golden prompt in a child of the generation's own Python, where no server is expected."""
    generation = Path(installed.generation)
    prompt, wanted = golden_of(installed.golden)
    python = str(generation / "venv" / "bin" / "python")
    argv = [python, "-m", "checks.engine_probe", str(generation / "models" / "default")]
    env = {**os.environ, "HALO_GENERATION_DIR": str(generation), "PYTHONNOUSERSITE": "1"}
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="halo-probe-") as place:
        code, tail = run_bounded(argv, timeout=timeout, cwd=Path(place), env=env)
    seconds = time.monotonic() - start
    words = tail.rpartition("\n")[2]
    try:
        answer = json.loads(words)
        ids = tuple(int(each) for each in answer["ids"])
        health = {key: answer[key] for key in ("backend", "backend_reason", "device") if answer.get(key)}
    except (ValueError, KeyError, TypeError, RecursionError):
        said = "it ran past its time" if code == -1 else words[:300]
        error = f"exit {code}: {said}"
        return Decoded("engine", None, prompt, wanted, None, seconds, error, by_engine=True)
    return Decoded("engine", health, prompt, wanted, ids, seconds, by_engine=True)


def probe_compile(
    facts: Facts, target: str = "gfx1151", timeout: float = COMPILE_SECONDS
) -> CompileProbe | None:
    """Compile a small HIP kernel for `target` in a temporary directory; None where there is no compiler.

    No GPU is needed. The object is looked at for its size only; running it is another probe.
    """
    command = compiler_command(facts, target)
    if not command:
        return None
    with tempfile.TemporaryDirectory(prefix="halo-probe-") as place:
        work = Path(place)
        (work / "probe.hip").write_text(KERNEL)
        start = time.monotonic()
        env = {**os.environ, "TMPDIR": place, "LC_ALL": "C"}
        code, tail = run_bounded(command, timeout=timeout, cwd=work, env=env)
        made = work / "probe.o"
        size = made.stat().st_size if made.is_file() else 0
        return CompileProbe(command, code, "\n".join(tail.split("\n")[-12:]), time.monotonic() - start, size)
