"""Checks each memory access of an emulated wave: arrays' bounds, read-only arrays, LDS bounds and races.

Not the emulator (emulator.py): this only looks at registers before an instruction runs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_EXEC = 126
_NOBODY, _MANY, _ATOMIC = -1, -2, -3


class Violation(Exception):
    """An access that must not be; the message says where and by which lane."""


class Arrays:
    """The memory that a kernel may touch."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        spans = sorted(
            (a.ctypes.data, a.ctypes.data + a.nbytes, a.flags.writeable) for a in arrays if a.nbytes
        )
        self.starts = np.array([span[0] for span in spans], np.uint64)
        self.ends = np.array([span[1] for span in spans], np.uint64)
        self.writable = np.array([span[2] for span in spans], bool)

    def check(self, addresses: np.ndarray, size: int, writes: bool) -> None:
        at = np.searchsorted(self.starts, addresses, side="right").astype(np.int64) - 1
        slot = np.maximum(at, 0)
        outside = (at < 0) | (addresses + np.uint64(size) > self.ends[slot])
        if outside.any():
            lane = int(np.flatnonzero(outside)[0])
            beyond = int(addresses[lane]) + size - int(self.ends[slot[lane]])
            raise Violation(
                f"{outside.sum()} lanes outside every array; the first is {beyond} bytes past the nearest end"
            )
        if writes and not self.writable[slot].all():
            raise Violation("writes to a read-only array")
        if (addresses & np.uint64(min(size, 4) - 1)).any():
            raise Violation(f"an address is not a multiple of {min(size, 4)}")


class Lds:
    """Who wrote and who read each byte of LDS since the last barrier."""

    def __init__(self, size: int, memory: np.ndarray | None = None) -> None:
        self.size = size
        self.memory = np.zeros(size, np.uint8) if memory is None else memory
        self.writer = np.full(size, _NOBODY, np.int16)
        self.reader = np.full(size, _NOBODY, np.int16)

    def barrier(self) -> None:
        self.writer[:] = _NOBODY
        self.reader[:] = _NOBODY

    def access(self, wave: int, addresses: np.ndarray, size: int, writes: bool, atomic: bool) -> None:
        # A card drops accesses behind the end of LDS without a word; here they are errors.
        if addresses.size and int(addresses.max()) + size > self.size:
            raise Violation(f"LDS address {int(addresses.max())} + {size} is behind its {self.size} bytes")
        if (addresses % min(size, 16)).any() and size in (2, 4, 8, 16):
            raise Violation(f"an LDS address is not a multiple of {size}")
        touched = (addresses[:, None] + np.arange(size)).ravel()
        allowed = (_NOBODY, _ATOMIC) if atomic else (_NOBODY, wave)
        if not np.isin(self.writer[touched], allowed).all():
            raise Violation("LDS race: another wave wrote there, and no barrier since")
        if writes and not np.isin(self.reader[touched], (_NOBODY, wave)).all():
            raise Violation("LDS race: another wave read there, and no barrier since")
        if writes:
            self.writer[touched] = _ATOMIC if atomic else wave
        else:
            seen = self.reader[touched]
            self.reader[touched] = np.where((seen == _NOBODY) | (seen == wave), wave, _MANY)


@dataclass
class Wave:
    """What a check looks at: the wave's registers, and the memories of the moment."""

    index: int
    sgpr: np.ndarray
    vgpr: np.ndarray
    arrays: Arrays = field(default_factory=lambda: Arrays([]))
    lds: Lds = field(default_factory=lambda: Lds(0))
    backward: bool = False

    def active(self) -> np.ndarray:
        lanes: np.ndarray = (int(self.sgpr[_EXEC]) >> np.arange(32)) & 1 == 1
        return lanes

    def pair(self, register: int) -> int:
        return int(self.sgpr[register]) | int(self.sgpr[register + 1]) << 32


_WIDTH = re.compile(r"_(?:[BUIF])(8|16|32|64|96|128|256|512)(?=_|$)")


def bytes_of(name: str) -> int:
    """How many bytes an access of this instruction moves a lane."""
    found = _WIDTH.findall(name)
    return int(found[-1]) // 8 if found else 4


def _global(inst: Any, name: str) -> Callable[[Wave], None]:
    size, writes = bytes_of(name), "STORE" in name or "ATOMIC" in name
    vector, scalar = inst.addr.offset - 256, inst.saddr.offset
    offset = inst.offset - (1 << 13) if inst.offset & (1 << 12) else inst.offset

    def check(wave: Wave) -> None:
        active = wave.active()
        low = wave.vgpr[vector][active].astype(np.uint64)
        if scalar < 124:
            addresses = low + np.uint64(wave.pair(scalar))
        else:
            addresses = low | wave.vgpr[vector + 1][active].astype(np.uint64) << np.uint64(32)
        if addresses.size:
            wave.arrays.check(addresses + np.uint64(offset % (1 << 64)), size, writes)

    return check


def _scalar(inst: Any, name: str) -> Callable[[Wave], None]:
    size, base, extra = bytes_of(name), inst.sbase.offset, inst.soffset.offset
    offset = inst.offset - (1 << 21) if inst.offset & (1 << 20) else inst.offset

    def check(wave: Wave) -> None:
        more = 0 if extra == 124 else int(wave.sgpr[extra])
        address = (wave.pair(base) + offset + more) % (1 << 64)
        wave.arrays.check(np.array([address], np.uint64), size, False)

    return check


def _lds(inst: Any, name: str) -> Callable[[Wave], None] | None:
    if "PERMUTE" in name or "SWIZZLE" in name:
        return None
    size, vector = bytes_of(name), inst.addr.offset - 256
    reads = name.startswith("DS_LOAD")
    writes, atomic = not reads, not reads and not name.startswith("DS_STORE_")
    if "2ADDR" in name:
        unit = size * (64 if "STRIDE64" in name else 1)
        offsets = [inst.offset0 * unit, inst.offset1 * unit]
    else:
        offsets = [inst.offset0 | inst.offset1 << 8]

    def check(wave: Wave) -> None:
        addresses = wave.vgpr[vector][wave.active()].astype(np.int64)
        for offset in offsets:
            wave.lds.access(wave.index, addresses + offset, size, writes, atomic)

    return check


def checker(inst: Any, name: str) -> Callable[[Wave], None] | None:
    """The check to make before this instruction runs; None where it touches no memory."""
    kind = type(inst).__name__
    if kind == "SMEM" and name.startswith("S_LOAD"):
        return _scalar(inst, name)
    if kind == "GLOBAL" or (kind == "FLAT" and "ATOMIC" in name):
        return _global(inst, name)
    if kind == "DS":
        return _lds(inst, name)
    if kind == "SCRATCH":

        def refuse(wave: Wave) -> None:
            raise Violation("scratch memory")

        return refuse
    return None
