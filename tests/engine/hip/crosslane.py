"""gfx11's operations between the lanes of a wave, in NumPy: DPP, v_permlane16, ds_swizzle, ds_bpermute.

tinygrad's emulator lacks some of these and runs others lane by lane, so that a lane reads what another has
just written. Source: AMD's "RDNA3.5" Instruction Set Architecture reference guide, sections on DPP and on
data share instructions. `v` is a wave's registers [n, 32], `active` the lanes that execute.
"""

from __future__ import annotations

import numpy as np

LANES = 32
_LANE = np.arange(LANES)
_ROW, _IN_ROW = _LANE // 16 * 16, _LANE % 16


class Unsupported(Exception):
    """A form that this module does not know; the message names it."""


def dpp16_sources(control: int) -> np.ndarray:
    """The lane from which each lane reads under a DPP16 control; -1 where that is outside its row."""
    if control <= 0xFF:
        return _LANE // 4 * 4 + (control >> 2 * (_LANE % 4) & 3)
    kind, n = control & 0x1F0, control & 15
    if kind in (0x100, 0x110) and n:
        at = _IN_ROW + (n if kind == 0x100 else -n)
        return np.where((at >= 0) & (at < 16), _ROW + at, -1)
    if kind == 0x120 and n:
        return _ROW + (_IN_ROW - n) % 16
    if control == 0x140:
        return _ROW + 15 - _IN_ROW
    if control == 0x141:
        return _LANE // 8 * 8 + 7 - _LANE % 8
    if kind == 0x150:
        return _ROW + n
    if kind == 0x160:
        return _ROW + (_IN_ROW ^ n)
    raise Unsupported(f"DPP control {control:#x}")


def dpp8_sources(selectors: int) -> np.ndarray:
    """The lane from which each lane reads: three bits for each lane of a group of eight."""
    return _LANE // 8 * 8 + (selectors >> 3 * (_LANE % 8) & 7)


def gather(
    values: np.ndarray, sources: np.ndarray, active: np.ndarray, *, inactive_too: bool, zero_bound: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(the values moved, the lanes that execute at all). A lane whose source is outside, or does not execute,
    reads 0 with `zero_bound`, and else does not execute itself."""
    valid = (sources >= 0) & (active[np.maximum(sources, 0)] | inactive_too)
    moved = np.where(valid, values[np.maximum(sources, 0)], np.uint32(0))
    return moved, active & (valid | zero_bound)


def masked(row_mask: int, bank_mask: int) -> np.ndarray:
    """The lanes that a DPP16 instruction's row and bank masks let through."""
    rows = row_mask >> _LANE // 16 & 1
    banks = bank_mask >> _IN_ROW // 4 & 1
    through: np.ndarray = (rows & banks) == 1
    return through


def permlane16(low: int, high: int, other_row: bool) -> np.ndarray:
    """Sources of v_permlane16 (or x16, which reads the other row): four bits a lane, both rows alike."""
    selectors = low | high << 32
    chosen = np.array([selectors >> 4 * lane & 15 for lane in range(16)])
    sources: np.ndarray = (_ROW ^ (16 if other_row else 0)) + np.tile(chosen, 2)
    return sources


def swizzle_sources(offset: int) -> np.ndarray:
    """Sources of ds_swizzle_b32 in quad mode and in bit mask mode."""
    if offset >= 0xC000:
        raise Unsupported(f"ds_swizzle pattern {offset:#x}")
    if offset & 0x8000:
        return _LANE // 4 * 4 + (offset >> 2 * (_LANE % 4) & 3)
    return (_LANE & (offset & 31) | (offset >> 5 & 31)) ^ (offset >> 10 & 31)


def bpermute(addresses: np.ndarray, values: np.ndarray, offset: int, active: np.ndarray) -> np.ndarray:
    """ds_bpermute_b32: each lane reads lane (address / 4) % 32, and 0 from one that does not execute."""
    sources = (addresses.astype(np.int64) + offset) // 4 % LANES
    return np.where(active[sources], values[sources], np.uint32(0))
