"""The kept corpus: one file a target in tests/fuzz/corpus; how a fuzzer's findings become it."""

from __future__ import annotations

import http.client
import lzma
import struct
import sys
import tarfile
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from types import FrameType
from typing import Any

import jinja2

from tests.fuzz.target import Target

CORPUS = Path(__file__).parent / "corpus"
LONGEST = 12 << 10  # bytes of an input that is kept
ROOT = Path(__file__).parents[2]
# Own code, and the libraries that parse for it in Python.
ROOMS = (
    *(str(ROOT / room) for room in ("engine/", "checks/", "provision/", "install")),
    *(str(Path(str(module.__file__)).parent) for module in (jinja2, tomllib)),
    *(str(module.__file__) for module in (tarfile, http.client)),
)
Edge = tuple[str, int, int, int]  # file, line before, line, bits of how often
_LENGTH = struct.Struct("<I")  # before each input
_SECONDS = 1.0  # no input is kept that takes longer


def read_corpus(name: str) -> list[bytes]:
    """The kept inputs of a target; none where there is no corpus."""
    path = CORPUS / f"{name}.xz"
    if not path.exists():
        return []
    data, at, inputs = lzma.decompress(path.read_bytes()), 0, []
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        inputs.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return inputs


def write_corpus(name: str, inputs: Collection[bytes]) -> Path:
    """Write the inputs as one compressed file; the same inputs make the same file."""
    CORPUS.mkdir(exist_ok=True)
    path = CORPUS / f"{name}.xz"
    if not inputs:
        path.unlink(missing_ok=True)
        return path
    whole = b"".join(_LENGTH.pack(len(data)) + data for data in sorted(set(inputs), key=_by_size))
    path.write_bytes(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME))
    return path


def _by_size(data: bytes) -> tuple[int, bytes]:
    return len(data), data


def keep(target: Target, found: Path) -> str:
    """Keep the inputs, of `found` and of those kept, that reach an edge no shorter one does."""
    inputs = {path.read_bytes() for path in found.iterdir()} if found.is_dir() else set()
    inputs |= {*read_corpus(target.name)}
    short = sorted((data for data in inputs if len(data) <= LONGEST), key=_by_size)
    reached: set[Edge] = set()
    kept: list[bytes] = []
    with tempfile.TemporaryDirectory(prefix="halo-keep-") as name:
        for data in short:
            start = time.process_time()
            edges = edges_of(target, data, Path(name))
            if edges - reached and time.process_time() - start < 20 * _SECONDS:
                reached |= edges
                kept.append(data)
    path = write_corpus(target.name, kept)
    size = path.stat().st_size if kept else 0
    return f"{len(kept)} of {len(inputs)} inputs, {len(reached)} edges, {size} bytes"


def edges_of(target: Target, data: bytes, folder: Path) -> set[Edge]:
    """The pairs of lines of this repository's own code that follow each other when an input is run.

    With each the number of bits of how often: once, twice, to 4, 8, 16 times.
    """
    counts: Counter[tuple[str, int, int]] = Counter()
    last: dict[int, int] = {}

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(ROOMS):
            return None
        if event == "line":
            counts[name, last.get(id(frame), 0), frame.f_lineno] += 1
            last[id(frame)] = frame.f_lineno
        elif event == "return":
            last.pop(id(frame), None)
        return trace

    place = folder / "place"
    place.mkdir(exist_ok=True)
    sys.settrace(trace)
    try:
        target(data, place)
    except Exception:  # a fault is told by the run and by the test, not here
        pass
    finally:
        sys.settrace(None)
    return {(*edge, min(count.bit_length(), 5)) for edge, count in counts.items()}
