"""The native library under ASan, UBSan and TSan: its own tests again, and damaged files with a leak check.

HALO_SANITIZE of engine/native/CMakeLists.txt builds it; a session's memory then comes from the heap, where
each byte beyond it is watched.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

from tests.engine.conftest import native_digest
from tests.fuzz.corpus import read_corpus
from tests.fuzz.native_build import NATIVE, seeds

ROOT = Path(__file__).parents[2]
HARNESS = ROOT / "tests" / "fuzz" / "native"
REPORT = re.compile(r"(?m)^.*(?:ERROR: \w+Sanitizer|WARNING: ThreadSanitizer|runtime error:).*$")
FAILS = "-fno-sanitize-recover=all"
MODULES = ("test_native.py", "test_native_families.py")
SLOW_MODULES = ("test_native_serving.py", "test_native_demo.py", "test_kv.py", "test_prepared.py")


def _ran(command: list[str], **environ: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environ}, check=False
    )
    said = done.stdout + done.stderr
    found = REPORT.search(said)
    where = said[found.start() : found.start() + 4000] if found else said[-4000:]
    assert done.returncode == 0 and found is None, f"{' '.join(command)}\n{where}"
    return said


def _leave_out(reason: str) -> NoReturn:
    """CI promises these tests, so there a missing tool is a failure."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def _build(request: pytest.FixtureRequest, sanitizers: str) -> Path:
    """The folder of a library that is built so; kept like the plain one."""
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        _leave_out("cmake or g++ is not installed")
    probe = ["g++", f"-fsanitize={sanitizers}", "-x", "c++", "-", "-o", "/dev/null"]
    if subprocess.run(probe, input=b"int main() {}", capture_output=True, check=False).returncode:
        _leave_out(f"g++ has not the libraries of -fsanitize={sanitizers}")
    cache = getattr(request.config, "cache", None)
    root = cache.mkdir("halo-sanitized") if cache else Path(tempfile.mkdtemp())
    folder = root / sanitizers.replace(",", "-") / native_digest()
    if not (folder / "libhalo_cpu.so").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as build:
            options = ["-DCMAKE_CXX_COMPILER=g++", f"-DHALO_SANITIZE={sanitizers}"]
            _ran(["cmake", "-S", str(NATIVE), "-B", build, "-DHALO_HIP=OFF", *options])
            _ran(["cmake", "--build", build, "-j", "2"])
            (Path(build) / "libhalo_cpu.so").replace(folder / "libhalo_cpu.so")
    return folder


@pytest.fixture(scope="session")
def sanitized(request: pytest.FixtureRequest) -> Path:
    """The folder of the library with ASan and UBSan."""
    return _build(request, "address,undefined")


@pytest.mark.parametrize(
    "module", [*MODULES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_MODULES)]
)
def test_the_native_tests_are_clean(sanitized: Path, module: str) -> None:
    """A read beyond an array gives the right tokens on one machine, and another's memory on the next."""
    pytest_of = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    _ran([*pytest_of, f"tests/engine/{module}"], **_preloaded(), HALO_TEST_BUILD=str(sanitized.parent))


def _preloaded() -> dict[str, str]:
    """For a Python that loads the library. It frees little at its end, so leaks are looked for below."""
    libraries = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    names = [_ran(["g++", f"-print-file-name={name}"]).strip() for name in libraries]
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {"LD_PRELOAD": " ".join(names), **options}


SHORT = """
import ctypes, sys
sums = ctypes.CDLL(sys.argv[1]).halo_ternary_sums
codes, x, out = map(ctypes.create_string_buffer, (320, 96, 60))
sums(None, codes, 16, 96, x, 1, out)
"""


def test_the_sanitizers_see(sanitized: Path) -> None:
    """Sixteen sums into room for fifteen: without a report here, the other tests show nothing."""
    command = [sys.executable, "-c", SHORT, str(sanitized / "libhalo_cpu.so")]
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        _ran(command, **_preloaded(), PYTHONMALLOC="malloc")  # else Python cuts small ones from its own


def _replay(folder: Path, sanitizers: str, into: Path, **options: str) -> int:
    """Run the fuzzer's harness over its seeds and the kept corpus; how many inputs there were."""
    program, inputs = into / "replay", into / "inputs"
    sources = [HARNESS / "fuzz_model.cpp", HARNESS / "replay.cpp", NATIVE / "cpu" / "checksum.cpp"]
    flags = ["-std=c++17", "-O1", "-g", f"-fsanitize={sanitizers}", FAILS]
    link = [f"-L{folder}", "-lhalo_cpu", f"-Wl,-rpath,{folder}", "-lpthread", "-o", str(program)]
    _ran(["g++", *flags, *map(str, sources), *link])
    seeds(inputs)
    for number, data in enumerate(read_corpus("native_sealed") + read_corpus("native_plain")):
        (inputs / f"kept-{number}").write_bytes(data)
    said = _ran([str(program), str(inputs)], **options)
    return int(said.split()[0])


def test_a_file_that_lies_leaks_nothing_and_is_read_within_its_bounds(
    sanitized: Path, tmp_path: Path
) -> None:
    """Each refusal on the way must give back what was taken before it: a server opens models for years."""
    options = {"ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1"}
    assert _replay(sanitized, "address,undefined", tmp_path, **options) >= 24


@pytest.mark.slow
def test_threads_do_not_race(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A race shows itself once in a million tokens, as another answer."""
    folder = _build(request, "thread")
    assert _replay(folder, "thread", tmp_path, TSAN_OPTIONS="halt_on_error=1") >= 24
