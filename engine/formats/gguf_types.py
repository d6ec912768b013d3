"""How GGUF's tensor types hold numbers: ternary blocks, floats, two block formats. Not the file around them.

Sources: ggml-common.h and ggml-quants.c of ggml-org/llama.cpp (F32 to TQ2_0); src/ggml-bitnet-mad.cpp of
microsoft/BitNet (I2_S). Values come out as float32, or as codes 0, 1, 2 with the scales beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from engine.errors import HaloError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STEP: Final = 1 << 20  # elements that are widened at a time


@dataclass(frozen=True)
class TensorType:
    """A tensor type: its number in the file, elements and bytes of a block, bytes after the last block."""

    number: int
    name: str
    block: int
    block_bytes: int
    tail: int = 0

    def size(self, elements: int) -> int:
        """Bytes of a tensor of `elements` numbers, a multiple of the block."""
        return elements // self.block * self.block_bytes + self.tail


F32: Final = TensorType(0, "F32", 1, 4)
F16: Final = TensorType(1, "F16", 1, 2)
Q8_0: Final = TensorType(8, "Q8_0", 32, 34)
Q6_K: Final = TensorType(14, "Q6_K", 256, 210)
BF16: Final = TensorType(30, "BF16", 1, 2)
TQ1_0: Final = TensorType(34, "TQ1_0", 256, 54)
TQ2_0: Final = TensorType(35, "TQ2_0", 256, 66)
# n/4 bytes, one float32 scale, 28 bytes of nothing. Its groups of 128 run over the rows' ends.
I2_S: Final = TensorType(36, "I2_S", 4, 1, 32)
TYPES: Final = {kind.number: kind for kind in (F32, F16, Q8_0, Q6_K, BF16, TQ1_0, TQ2_0, I2_S)}
FLOATS: Final = (F32, F16, BF16)

_NAMES: Final = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
    15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    37: "I8_S", 38: "TL1", 39: "TL2 or MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
    134: "IQ1_BN", 135: "IQ2_BN", 335: "IQ2_BN_R4",
}  # fmt: skip
_WHY: Final = {
    37: "it holds activations",
    38: "its layout is made for the kernels of one ARM CPU (bitnet.cpp's TL1)",
    39: "its layout is made for the kernels of one x86 CPU (bitnet.cpp's TL2), or it is MXFP4",
    41: "it has a scale for each 128 weights (PrismML's Bonsai), and the engine has one a row",
    42: "it has a scale for each 128 weights (PrismML's Bonsai), and the engine has one a row",
    134: "it is ik_llama.cpp's own",
    135: "it is ik_llama.cpp's own",
    335: "it is ik_llama.cpp's own",
}


def refused_type(path: Path, name: str, number: int) -> HaloError:
    """The error of a tensor type that is not read, by its name and with the reason."""
    kind = _NAMES.get(number, f"of type {number}")
    why = _WHY.get(number, "it is not ternary, nor read for embeddings")
    return HaloError(
        f"The tensor {name} in {path} is {kind}, which halo does not read: {why}.",
        hint="take the model's I2_S, TQ2_0, TQ1_0, F16 or BF16 file (its embedding may be Q8_0 or Q6_K)",
    )


def widened(kind: TensorType, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The numbers of whole blocks of a float type, Q8_0 or Q6_K, as float32 [elements]."""
    if kind is BF16:
        return (np.frombuffer(raw, dtype="<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind in FLOATS:
        return np.frombuffer(raw, dtype="<f4" if kind is F32 else "<f2").astype(np.float32)
    blocks = raw.reshape(-1, kind.block_bytes)
    return (_q8_0(blocks) if kind is Q8_0 else _q6_k(blocks)).reshape(-1)


def float_blocks(
    kind: TensorType, raw: NDArray[np.uint8], rows: int, cols: int
) -> Iterator[NDArray[np.float32]]:
    """A matrix as float32 [some, cols], some rows at a time."""
    row_bytes = cols // kind.block * kind.block_bytes
    step = max(1, _STEP // cols)
    for row in range(0, rows, step):
        chunk = raw[row * row_bytes : min(rows, row + step) * row_bytes]
        yield widened(kind, chunk).reshape(-1, cols)


def _halves(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float16 in the last axis's bytes, [..., 2 n] -> float32 [..., n]."""
    return np.ascontiguousarray(raw).view("<f2").astype(np.float32)


def _q8_0(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """float16 d, then 32 int8: d q, exact in float32."""
    values: NDArray[np.float32] = _halves(blocks[:, :2]) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)
    return values


def _q6_k(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, float16 d: (d s) (q - 32).

    In each half of 128, byte l of the low nibbles has the weights l and l + 64, byte l + 32 those at l + 32
    and l + 96; byte l of the high bits has the bit pairs of l, l + 32, l + 64 and l + 96.
    """
    low = blocks[:, :128].reshape(-1, 2, 2, 32)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    nibbles = np.concatenate([low & 15, low >> 4], axis=2)
    pairs = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    q = (nibbles | pairs << 4).astype(np.float32) - np.float32(32)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    steps = _halves(blocks[:, 208:]) * scales.astype(np.float32)
    values: NDArray[np.float32] = steps[:, :, None] * q.reshape(-1, 16, 16)
    return values


def tq2_0(blocks: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Blocks of 66 bytes -> (codes [blocks, 256], scales [blocks]).

    64 bytes of codes, float16 d. In each half of 128, byte m has the codes m, m + 32, m + 64, m + 96 in
    bits 0, 2, 4 and 6.
    """
    packed = blocks[:, :64].reshape(-1, 2, 1, 32)
    codes = np.concatenate([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=2)
    return codes.reshape(-1, 256), _halves(blocks[:, 64:])[:, 0]


def to_tq2_0(codes: NDArray[np.uint8], scales: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes [blocks, 256] and scales [blocks], rounded to float16 -> blocks of 66 bytes."""
    four = codes.reshape(-1, 2, 4, 32)
    packed = four[:, :, 0] | four[:, :, 1] << 2 | four[:, :, 2] << 4 | four[:, :, 3] << 6
    halves = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    return np.concatenate([packed.reshape(-1, 64), halves], axis=1)


def tq1_0(blocks: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Blocks of 54 bytes -> (codes [blocks, 256], scales [blocks]).

    32 bytes of five digits for the weights 0 to 159 (byte m: m, m + 32, ...), 16 of five for 160 to 239,
    4 of four for 240 to 255, float16 d. A byte is the fraction v / 243 in 256ths, rounded up, so that digit i
    is the whole part of 3 times the fraction that is left after i multiplications by 3.
    """
    groups = (blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)
    digits = [_digits(raw, count) for raw, count in groups]
    return np.concatenate(digits, axis=1), _halves(blocks[:, 52:])[:, 0]


def _digits(raw: NDArray[np.uint8], count: int) -> NDArray[np.uint8]:
    powers = np.array([1, 3, 9, 27, 81][:count], dtype=np.uint8)[:, None]
    left = raw[:, None, :] * powers  # modulo 256, as uint8
    digits: NDArray[np.uint8] = (left.astype(np.uint16) * 3 >> 8).astype(np.uint8)
    return digits.reshape(len(raw), -1)


def i2_s(groups: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Groups of 32 bytes -> codes [groups, 128]: weight j is in byte j mod 32, bits 6 - 2 (j div 32)."""
    codes = np.concatenate([groups >> shift & 3 for shift in (6, 4, 2, 0)], axis=1)
    return codes.reshape(-1, 128)


def to_i2_s(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes [groups, 128] -> groups of 32 bytes."""
    shifts = np.array([6, 4, 2, 0], dtype=np.uint8)[:, None]
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(codes.reshape(-1, 4, 32) << shifts, axis=1)
    return packed


def i2_s_tail(scale: np.float32) -> NDArray[np.uint8]:
    """The 32 bytes after the codes: the scale and nothing."""
    tail = np.zeros(8, dtype="<f4")
    tail[0] = scale
    return tail.view(np.uint8)
