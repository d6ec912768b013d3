"""python -m tests.fuzz.native_build DIR [--keep WORK]: the engine under libFuzzer; seeds; its corpus."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.corpus import LONGEST, read_corpus, write_corpus
from tests.fuzz.model_targets import prepared_file
from tests.fuzz.target import sparse
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
NATIVE = ROOT / "engine" / "native"
SANITIZE = "address,undefined"


def build(folder: Path) -> Path:
    """Build with clang, whose runtime libFuzzer is in; returns the program."""
    flags = "-fsanitize=fuzzer-no-link -fno-sanitize-recover=all"
    configure = ["cmake", "-S", str(NATIVE), "-B", str(folder / "library"), "-DCMAKE_CXX_COMPILER=clang++"]
    configure += [f"-DCMAKE_CXX_FLAGS={flags}", f"-DHALO_SANITIZE={SANITIZE}", "-DHALO_HIP=OFF"]
    program = folder / "fuzz_model"
    source = Path(__file__).parent / "native" / "fuzz_model.cpp"
    link = [
        "clang++",
        "-std=c++17",
        "-O1",
        "-g",
        f"-fsanitize=fuzzer,{SANITIZE}",
        "-fno-sanitize-recover=all",
    ]
    # Not the library's own CRC: it is hidden there, and the harness needs one.
    link += [str(source), str(NATIVE / "cpu" / "checksum.cpp"), "-o", str(program)]
    link += [f"-L{folder / 'library'}", "-lhalo_cpu", f"-Wl,-rpath,{folder / 'library'}", "-lpthread"]
    for command in (configure, ["cmake", "--build", str(folder / "library"), "-j", "1"], link):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return program


def seeds(folder: Path) -> int:
    """The inputs of the Python target as this one takes them, in all forms of the KV cache; how many."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate([*TARGETS["prepared"].seeds(), *read_corpus("prepared")]):
        checksums, file = (data[:1] or b"\0")[0] & 3, prepared_file(data)
        for form in range(4) if number < 6 else (number % 4,):
            path = (0, 4, 8)[(number + form) % 3]
            made = sparse(checksums | path | (number % 2 * 16) | form * 32, file)
            (folder / hashlib.sha256(made).hexdigest()[:16]).write_bytes(made)
    return sum(1 for _ in folder.iterdir())


def keep(folder: Path, name: str, found: Path) -> str:
    """Boil a found corpus down to the kept one, by libFuzzer's own merging."""
    with tempfile.TemporaryDirectory() as place:
        old, merged = Path(place) / "old", Path(place) / "merged"
        old.mkdir()
        merged.mkdir()
        for number, data in enumerate(read_corpus(name)):
            (old / str(number)).write_bytes(data)
        environ = os.environ | ({"HALO_FUZZ_PLAIN": "1"} if name == "native_plain" else {})
        command = [
            str(folder / "fuzz_model"),
            "-merge=1",
            f"-max_len={LONGEST}",
            str(merged),
            str(old),
            str(found),
        ]
        subprocess.run(command, check=True, env=environ, capture_output=True)
        path = write_corpus(name, [each.read_bytes() for each in merged.iterdir()])
    return f"{len(read_corpus(name))} inputs, {path.stat().st_size} bytes"


def main() -> int:
    """Returns the exit code."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if sys.argv[2:3] == ["--keep"]:
        for name in ("native_sealed", "native_plain"):
            found = Path(sys.argv[3]) / "corpus" / name
            if found.is_dir():
                print(f"{name}: {keep(folder, name, found)}")
        return 0
    print(f"{build(folder)} with {seeds(folder / 'seeds')} seeds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
