"""The instructions that run here and not in tinygrad's emulator, because it lacks them or has them wrong.

Each override takes a decoded instruction and gives a function of the wave; None leaves it to tinygrad.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.engine.hip import crosslane, division, fragments
from tests.engine.hip.shadow import Wave, bytes_of

Run = Callable[[Wave], None]
DPP16, DPP8 = (0xFA,), (0xE9, 0xEA)
SPARE = 255  # the register that holds a DPP operand after it was moved
CACHE_INVALIDATES = (0xE0AC0000, 0xE0B00000)  # buffer_gl0_inv, buffer_gl1_inv: there are no caches here


def _scalar(wave: Wave, operand: Any, literal: int | None) -> int:
    return int(literal or 0) if operand.offset == 255 else int(wave.sgpr[operand.offset])


def _wmma(inst: Any) -> Run:
    def run(wave: Wave) -> None:
        fragments.execute(inst, wave.vgpr, int(wave.sgpr[126]))

    return run


def _permlane(inst: Any) -> Run:
    other_row = "X16" in inst.op.name
    source, target = inst.src0.offset - 256, inst.vdst.offset - 256
    inactive_too, zero_bound = bool(inst.opsel & 1), bool(inst.opsel & 2)

    def run(wave: Wave) -> None:
        literal = getattr(inst, "literal", None)
        low, high = _scalar(wave, inst.src1, literal), _scalar(wave, inst.src2, literal)
        values, sources = wave.vgpr[source], crosslane.permlane16(low, high, other_row)
        moved, writes = crosslane.gather(
            values, sources, wave.active(), inactive_too=inactive_too, zero_bound=zero_bound
        )
        wave.vgpr[target] = np.where(writes, moved, wave.vgpr[target])

    return run


def _swizzle(inst: Any) -> Run:
    source, target = inst.addr.offset - 256, inst.vdst.offset - 256
    sources = crosslane.swizzle_sources(inst.offset0 | inst.offset1 << 8)

    def run(wave: Wave) -> None:
        active = wave.active()
        moved, _ = crosslane.gather(wave.vgpr[source], sources, active, inactive_too=False, zero_bound=True)
        wave.vgpr[target] = np.where(active, moved, wave.vgpr[target])

    return run


def _bpermute(inst: Any) -> Run:
    address, data, target = inst.addr.offset - 256, inst.data0.offset - 256, inst.vdst.offset - 256
    offset = inst.offset0 | inst.offset1 << 8

    def run(wave: Wave) -> None:
        active = wave.active()
        moved = crosslane.bpermute(wave.vgpr[address], wave.vgpr[data], offset, active)
        wave.vgpr[target] = np.where(active, moved, wave.vgpr[target])

    return run


def _operand(wave: Wave, operand: Any, literal: int | None, flip: bool, positive: bool) -> np.ndarray:
    """A float32 source of a vector instruction, with its modifiers, as [32]."""
    if operand.offset >= 256:
        bits = wave.vgpr[operand.offset - 256].copy()
    else:
        bits = np.full(crosslane.LANES, _scalar(wave, operand, literal), np.uint32)
    bits = bits & np.uint32(0x7FFFFFFF if positive else 0xFFFFFFFF) ^ np.uint32(0x80000000 if flip else 0)
    values: np.ndarray = bits.view(np.float32)
    return values


def _floats(wave: Wave, inst: Any) -> list[np.ndarray]:
    literal, absolute = getattr(inst, "literal", None), int(getattr(inst, "abs", 0) or 0)
    if inst.omod or inst.clmp:
        raise crosslane.Unsupported("an output modifier")
    sources = enumerate((inst.src0, inst.src1, inst.src2))
    return [_operand(wave, s, literal, bool(inst.neg >> i & 1), bool(absolute >> i & 1)) for i, s in sources]


def _div_scale(inst: Any) -> Run:
    target, mask = inst.vdst.offset - 256, inst.sdst.offset

    def run(wave: Wave) -> None:
        active = wave.active()
        first, second, third = _floats(wave, inst)
        scaled, flags = division.div_scale(first, second, third)
        wave.vgpr[target] = np.where(active, scaled.view(np.uint32), wave.vgpr[target])
        if mask != 124:  # the null register
            wave.sgpr[mask] = np.packbits(flags & active, bitorder="little").view(np.uint32)[0]

    return run


def _div_fmas(inst: Any) -> Run:
    target = inst.vdst.offset - 256

    def run(wave: Wave) -> None:
        vcc = int(wave.sgpr[106]) >> np.arange(crosslane.LANES) & 1 == 1
        first, second, third = _floats(wave, inst)
        result = division.div_fmas(first, second, third, vcc)
        wave.vgpr[target] = np.where(wave.active(), result.view(np.uint32), wave.vgpr[target])

    return run


def _approximation(inst: Any) -> Run:
    """v_rcp_f32 and v_sqrt_f32: the card's are right to one unit in the last place, which one is not said.

    So a wave that runs backward gets a neighbour of the right result, above it in even lanes, else below.
    v_rcp_iflag_f32 is left alone: whole numbers are divided by it, with constants that fit the card's own.
    """
    square_root, target = "SQRT" in inst.op.name, inst.vdst.offset - 256
    off = np.where(np.arange(crosslane.LANES) % 2, -1, 1)

    def run(wave: Wave) -> None:
        literal = getattr(inst, "literal", None)
        flip, positive = bool(getattr(inst, "neg", 0) or 0), bool(getattr(inst, "abs", 0) or 0)
        x = _operand(wave, inst.src0, literal, flip, positive)
        with np.errstate(all="ignore"):
            y = np.sqrt(x) if square_root else np.float32(1) / x
        exponent = y.view(np.uint32) >> 23 & 255
        between = (exponent > 1) & (exponent < 254) & wave.backward
        bits = np.where(between, y.view(np.int32) + off, y.view(np.int32)).astype(np.int32).view(np.uint32)
        wave.vgpr[target] = np.where(wave.active(), bits, wave.vgpr[target])

    return run


def _flat(inst: Any) -> Run:
    """A flat load or store of whole words: LDS where the address lies in its aperture, which is at 0 here."""
    name = inst.op.name
    words, writes = bytes_of(name) // 4, "STORE" in name
    if not re.fullmatch(r"FLAT_(LOAD|STORE)_B(32|64|96|128)", name):
        raise crosslane.Unsupported(name)
    at, data = inst.addr.offset - 256, (inst.data if writes else inst.vdst).offset - 256

    def run(wave: Wave) -> None:
        lanes = np.flatnonzero(wave.active())
        low, high = wave.vgpr[at][lanes], wave.vgpr[at + 1][lanes]
        addresses = (low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)) + np.uint64(inst.offset)
        local = high == 0
        if local.any():
            wave.lds.access(wave.index, addresses[local].astype(np.int64), 4 * words, writes, False)
        if not local.all():
            wave.arrays.check(addresses[~local], 4 * words, writes)
        base = wave.lds.memory.ctypes.data
        for lane, address, shared in zip(lanes, addresses, local, strict=True):
            memory = (ctypes.c_uint32 * words).from_address(int(address) + (base if shared else 0))
            for word in range(words):
                if writes:
                    memory[word] = int(wave.vgpr[data + word, lane])
                else:
                    wave.vgpr[data + word, lane] = memory[word]

    return run


_BY_NAME: dict[str, Callable[[Any], Run]] = {
    "V_WMMA_I32_16X16X16_IU8": _wmma,
    "V_PERMLANE16_B32_E64": _permlane,
    "V_PERMLANE16_B32": _permlane,
    "V_PERMLANEX16_B32_E64": _permlane,
    "V_PERMLANEX16_B32": _permlane,
    "DS_SWIZZLE_B32": _swizzle,
    "DS_BPERMUTE_B32": _bpermute,
    "V_DIV_SCALE_F32": _div_scale,
    "V_DIV_FMAS_F32": _div_fmas,
    **{f"V_{op}_F32_{form}": _approximation for op in ("RCP", "SQRT") for form in ("E32", "E64")},
}


def find(inst: Any, name: str) -> Run | None:
    """The override of this instruction, if it has one."""
    made = _BY_NAME.get(name)
    if name.startswith("FLAT_") and "ATOMIC" not in name:
        made = _flat
    return made(inst) if made else None


def dpp(inst: Any, raw: bytes) -> tuple[bytes, int, Callable[[Wave], int]] | None:
    """Of a vector instruction with a DPP operand: (the same instruction with v255 in its place, its
    size, what moves the operand there and returns the lanes that may execute). None of any other."""
    kind = type(inst).__name__.split("_")[0]
    at = {"VOP1": 0, "VOP2": 0, "VOPC": 0, "VOP3": 4, "VOP3P": 4, "VOP3SD": 4}.get(kind)
    if at is None:
        return None
    word = int.from_bytes(raw[at : at + 4], "little")
    form = word & 0x1FF
    if form not in DPP16 + DPP8:
        return None
    plain = raw[:at] + (word & ~0x1FF | 256 + SPARE).to_bytes(4, "little") + bytes(12 - at)
    return plain, at + 8, _mover(int.from_bytes(raw[at + 4 : at + 8], "little"), form)


def _mover(control: int, form: int) -> Callable[[Wave], int]:
    """What moves a DPP operand to v255, by the instruction's last word."""
    register = control & 0xFF
    flip = keep = 0
    if form in DPP16:
        if control >> 22 & 3:
            raise crosslane.Unsupported("DPP with a modifier of the second operand")
        sources = crosslane.dpp16_sources(control >> 8 & 0x1FF)
        inactive_too, zero_bound = bool(control >> 18 & 1), bool(control >> 19 & 1)
        flip, keep = (control >> 20 & 1) << 31, 0x7FFFFFFF if control >> 21 & 1 else 0xFFFFFFFF
        allowed = crosslane.masked(control >> 28 & 15, control >> 24 & 15)
    else:
        sources, inactive_too, zero_bound = crosslane.dpp8_sources(control >> 8), form == 0xEA, True
        keep, allowed = 0xFFFFFFFF, np.ones(crosslane.LANES, bool)

    def move(wave: Wave) -> int:
        active = wave.active()
        moved, executes = crosslane.gather(
            wave.vgpr[register], sources, active, inactive_too=inactive_too, zero_bound=zero_bound
        )
        wave.vgpr[SPARE] = moved & np.uint32(keep) ^ np.uint32(flip)
        return int(np.packbits(executes & allowed, bitorder="little").view(np.uint32)[0])

    return move
