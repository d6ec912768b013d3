"""What a fuzz target is, and the containers in which one input holds several files or one sparse file."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import HaloError

MAX_SPARSE = 1 << 20  # bytes of an expanded sparse file
_MARK = b"\n=== "
_RUN = re.compile(rb"\0{24,}")


class Finding(AssertionError):
    """A parser did what it must not; the message is short and the same for the same fault."""


@dataclass(frozen=True)
class Target:
    """A parser under test.

    `run(data, folder)` may write into `folder`; it must return, or raise one of `refusals`. A HaloError must
    have a hint. `seeds()` are inputs that are read whole. `expanded` is the size in bytes of what `data`
    stands for. `seconds` of CPU time are the most that one input may take.
    """

    name: str
    run: Callable[[bytes, Path], None]
    seeds: Callable[[], Iterable[bytes]]
    refusals: tuple[type[BaseException], ...] = ()
    expanded: Callable[[bytes], int] = len
    words: tuple[bytes, ...] = field(default=(), repr=False)
    seconds: float = 2.0

    def __call__(self, data: bytes, folder: Path) -> bool:
        """Run one input; whether it was read. Raises whatever a parser must not raise."""
        try:
            self.run(data, folder)
        except HaloError as error:
            if not error.message or not error.hint:
                raise Finding(f"a refusal without a hint: {error.message[:80]}") from error
            return False
        except self.refusals:
            return False
        return True


_HOSTILE = (b"", b"\0" * 64, b"\xff" * 64, b"[" * 9000, b'{"a":' * 9000, b"a = " + b"[" * 9000, b"9" * 9000)


def hostile(target: Target) -> list[bytes]:
    """Inputs that no mutation comes to soon: empty, deeply nested, long; of several files one at a time."""
    made = list(_HOSTILE)
    for seed in target.seeds():
        if seed.startswith(_MARK):
            files = [part.partition(b"\n") for part in seed.split(_MARK)[1:]]
            plain = {name.decode("latin-1"): body for name, _, body in files}
            made += [pack_files(plain | {name: each}) for name in plain for each in _HOSTILE]
            break
    return made


def pack_files(files: Mapping[str, bytes]) -> bytes:
    """Several files as one input."""
    return b"".join(_MARK + name.encode() + b"\n" + data for name, data in files.items())


def unpack_files(data: bytes, names: Iterable[str]) -> dict[str, bytes]:
    """The files of an input, of these names alone."""
    known, found = set(names), {}
    for part in data.split(_MARK)[1:]:
        name, _, body = part.partition(b"\n")
        text = name.decode("latin-1")
        if text in known:
            found[text] = body
    return found


def write_files(data: bytes, folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Lay the files of an input into `folder`, and take away those of the input before."""
    names = list(names)
    files = unpack_files(data, names)
    for name in names:
        if name in files:
            (folder / name).write_bytes(files[name])
        else:
            (folder / name).unlink(missing_ok=True)
    return files


def sparse(flags: int, data: bytes) -> bytes:
    """A file with long runs of zeros as one input: flags, size (u32), then offset (u32), length (u16), bytes.

    tests/fuzz/native/fuzz_model.cpp reads the same.
    """
    out, start = bytearray(struct.pack("<BI", flags, len(data))), 0
    gaps = [*((m.start(), m.end()) for m in _RUN.finditer(data)), (len(data), len(data))]
    for begin, end in gaps:
        for at in range(start, begin, 0xFFFF):
            piece = data[at : min(begin, at + 0xFFFF)]
            out += struct.pack("<IH", at, len(piece)) + piece
        start = end
    return bytes(out)


def expand(data: bytes) -> tuple[int, bytearray]:
    """(flags, file) of `sparse`; whatever does not fit is cut."""
    if len(data) < 5:
        return 0, bytearray(data)
    flags, size = struct.unpack_from("<BI", data)
    out, at = bytearray(min(size, MAX_SPARSE)), 5
    while at + 6 <= len(data):
        offset, length = struct.unpack_from("<IH", data, at)
        piece = data[at + 6 : at + 6 + length][: max(0, len(out) - offset)]
        out[offset : offset + len(piece)] = piece
        at += 6 + length
    return flags, out


def sparse_size(data: bytes) -> int:
    """The size of the file that a sparse input stands for."""
    return min(struct.unpack_from("<I", data, 1)[0], MAX_SPARSE) if len(data) >= 5 else len(data)
