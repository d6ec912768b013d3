"""The kept corpus: one zip a target in tests/fuzz/corpus; how a fuzzer's findings become it."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz.target import Target

CORPUS = Path(__file__).parent / "corpus"
LONGEST = 16 << 10  # bytes of an input that is kept
ROOMS = tuple(
    str(Path(__file__).parents[2] / room) for room in ("engine/", "checks/", "provision/", "install")
)
BUDGET = 64 << 10  # bytes of one target's zip
_SECONDS = 1.0  # no input is kept that takes longer


def read_corpus(name: str) -> list[bytes]:
    """The kept inputs of a target; none where there is no corpus."""
    path = CORPUS / f"{name}.zip"
    if not path.exists():
        return []
    with zipfile.ZipFile(path) as archive:
        return [archive.read(entry) for entry in sorted(archive.namelist())]


def write_corpus(name: str, inputs: Iterable[bytes]) -> Path:
    """Write the inputs, each under its hash; the same inputs make the same file."""
    CORPUS.mkdir(exist_ok=True)
    path = CORPUS / f"{name}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for data in sorted(set(inputs), key=lambda each: hashlib.sha256(each).hexdigest()):
            entry = zipfile.ZipInfo(hashlib.sha256(data).hexdigest()[:16], (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return path


def keep(target: Target, found: Path) -> str:
    """Keep the inputs, of `found` and of those kept, that reach a pair of lines no shorter one does."""
    inputs = {path.read_bytes() for path in found.iterdir()} if found.is_dir() else set()
    inputs |= {*read_corpus(target.name)}
    short = sorted((data for data in inputs if len(data) <= LONGEST), key=lambda data: (len(data), data))
    reached: set[tuple[str, int, int]] = set()
    kept: list[bytes] = []
    with tempfile.TemporaryDirectory(prefix="halo-keep-") as name:
        for data in short:
            start = time.process_time()
            edges = edges_of(target, data, Path(name))
            if edges - reached and time.process_time() - start < 20 * _SECONDS:
                reached |= edges
                kept.append(data)
    path = write_corpus(target.name, kept)
    return f"{len(kept)} of {len(inputs)} inputs, {len(reached)} edges, {path.stat().st_size} bytes"


def edges_of(target: Target, data: bytes, folder: Path) -> set[tuple[str, int, int]]:
    """The pairs of lines of this repository's own code that follow each other when an input is run."""
    edges: set[tuple[str, int, int]] = set()
    last: dict[int, int] = {}

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(ROOMS):
            return None
        if event == "line":
            edges.add((name, last.get(id(frame), 0), frame.f_lineno))
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
    return edges
