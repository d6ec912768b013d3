"""gfx11's v_wmma_i32_16x16x16_iu8 for wave32, as a NumPy model of where each element lies.

Sources, both AMD's: the "RDNA3.5" Instruction Set Architecture reference guide, section 7.9 (Wave Matrix
Multiply Accumulate), and "How to accelerate AI applications on RDNA 3 using WMMA" (GPUOpen), which states:

  A  lane l holds row l % 16, all 16 columns; lanes 16 to 31 repeat lanes 0 to 15
  B  lane l holds column l % 16, all 16 rows; lanes 16 to 31 repeat lanes 0 to 15
  C, D  register v of lane l is row 2 v + l // 16 of column l % 16: rows alternate between the half-waves
  int8  four registers, element k in byte k % 4 of register k // 4

gfx12 differs in all of this. Not for the kernels: they state the same map in C++; this proves it.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

LANES: Final = 32
SIDE: Final = 16
_SIGNED_A, _SIGNED_B = 1, 2


class BadFragment(ValueError):
    """Registers that the instruction does not define a result for."""


def pack_operand(rows: np.ndarray) -> np.ndarray:
    """[16, 16] int8 or uint8 -> [4, 32] registers: A by its rows, B by its columns (give B transposed)."""
    if rows.shape != (SIDE, SIDE) or rows.dtype.itemsize != 1:
        raise BadFragment(f"an operand is 16 x 16 bytes, not {rows.shape} of {rows.dtype}")
    words = np.ascontiguousarray(rows).view(
        np.uint32
    )  # [16, 4]: word v of row l holds elements 4 v to 4 v + 3
    return np.concatenate([words, words]).T.copy()


def unpack_operand(registers: np.ndarray, signed: bool) -> np.ndarray:
    """[4, 32] registers -> [16, 16] int32; both half-waves must hold the same."""
    if not (registers[:, :SIDE] == registers[:, SIDE:]).all():
        raise BadFragment("lanes 16 to 31 do not repeat lanes 0 to 15")
    kind = np.int8 if signed else np.uint8
    return np.ascontiguousarray(registers[:, :SIDE].T).view(kind).astype(np.int32)


def pack_accumulator(matrix: np.ndarray) -> np.ndarray:
    """[16, 16] int32 (row, column) -> [8, 32] registers."""
    lane = np.arange(LANES)
    return (
        np.stack([matrix[2 * v + lane // SIDE, lane % SIDE] for v in range(8)])
        .astype(np.int32)
        .view(np.uint32)
    )


def unpack_accumulator(registers: np.ndarray) -> np.ndarray:
    """[8, 32] registers -> [16, 16] int32 (row, column)."""
    matrix = np.empty((SIDE, SIDE), np.int32)
    lane = np.arange(LANES)
    for v in range(8):
        matrix[2 * v + lane // SIDE, lane % SIDE] = registers[v].view(np.int32)
    return matrix


def wmma(a: np.ndarray, b: np.ndarray, c: np.ndarray, *, signed_a: bool, signed_b: bool) -> np.ndarray:
    """The instruction: registers of A [4, 32], B [4, 32] and C [8, 32] -> D [8, 32]. Sums wrap at 32 bits."""
    rows = unpack_operand(a, signed_a)
    columns = unpack_operand(b, signed_b)
    return pack_accumulator(rows @ columns.T + unpack_accumulator(c))


def execute(inst: Any, vgpr: np.ndarray, executing: int) -> None:
    """Run a decoded instruction on a wave's registers [n, 32], in the place of tinygrad's emulator."""
    if executing != 0xFFFFFFFF:
        raise BadFragment(f"not all lanes are active: {executing:#x}")
    if inst.clmp:
        raise BadFragment("clamped sums are not in this model")
    first, second = inst.src0.offset - 256, inst.src1.offset - 256
    third = inst.src2.offset
    if third >= 256:
        c = vgpr[third - 256 : third - 248].copy()
    elif third == 128:  # the inline constant 0
        c = np.zeros((8, LANES), np.uint32)
    else:
        raise BadFragment(f"accumulator operand {inst.src2!r}")
    target = inst.vdst.offset - 256
    vgpr[target : target + 8] = wmma(
        vgpr[first : first + 4], vgpr[second : second + 4], c,
        signed_a=bool(inst.neg & _SIGNED_A), signed_b=bool(inst.neg & _SIGNED_B),
    )  # fmt: skip
