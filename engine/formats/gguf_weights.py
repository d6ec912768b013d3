"""A GGUF matrix as a `Ternary`: digits as they are stored, one scale a row. Not a quantiser of any model.

A file may hold the digits (I2_S, TQ1_0, TQ2_0) or floats. Floats of one magnitude and zero are digits too,
and taken as such: absmean would shrink their scale by the share of non-zeros. Only other floats, masters,
are quantised, as `engine.formats.hf` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from engine.errors import HaloError
from engine.formats.codes import pack_codes
from engine.formats.gguf import GgufTensor
from engine.formats.gguf_types import FLOATS, I2_S, TQ1_0, TQ2_0, float_blocks, i2_s, tq1_0, tq2_0
from engine.model import Ternary

if TYPE_CHECKING:
    from numpy.typing import NDArray

LEAST_SCALE: Final = np.float32(1e-5)  # of a matrix of zeros, as the absmean formula has it
_STEP: Final = 1 << 22  # weights that are unpacked at a time
_TERNARY: Final = "take the model's own I2_S, TQ2_0 or TQ1_0 file"


@dataclass
class Forms:
    """How many matrices came in which form, for the person who reads the notes."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, form: str) -> None:
        self.counts[form] = self.counts.get(form, 0) + 1


def ternary(path: Path, tensor: GgufTensor, factor: np.float32, masters: bool) -> tuple[str, Ternary]:
    """(form, matrix) of a projection. `factor` multiplies its scales; `masters` are quantised or refused.

    Raises HaloError for an unused code, a scale that is not above zero, scales that differ within a row, and
    floats that are not ternary where the architecture is not a ternary one.
    """
    if tensor.type in FLOATS:
        return _from_floats(path, tensor, factor, masters)
    if tensor.type is I2_S:
        packed, scales = _from_i2_s(path, tensor)
    elif tensor.type in (TQ1_0, TQ2_0):
        packed, scales = _from_blocks(path, tensor)
    else:
        raise _refused(path, tensor, f"it is {tensor.type.name}, which is not ternary")
    return tensor.type.name, Ternary(packed, scales * factor, tensor.shape[1])


def _refused(path: Path, tensor: GgufTensor, why: str) -> HaloError:
    return HaloError(f"halo cannot use the tensor {tensor.name} of {path}: {why}.", hint=_TERNARY)


def _pieces(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of pieces that are unpacked at a time."""
    step = max(1, _STEP // cols)
    return ((row, min(rows, row + step)) for row in range(0, rows, step))


def _from_i2_s(path: Path, tensor: GgufTensor) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    rows, cols = tensor.shape
    if rows * cols % 128:
        raise _refused(path, tensor, f"{rows} x {cols} weights are no whole groups of 128")
    end = rows * cols // 4
    scale = np.frombuffer(tensor.raw[end : end + 4], dtype="<f4")[0].astype(np.float32)
    # The groups run over the ends of rows, so that only whole ones can be unpacked apart.
    codes = np.empty(rows * cols, dtype=np.uint8)
    for start in range(0, end, _STEP // 4):
        stop = min(end, start + _STEP // 4)
        codes[4 * start : 4 * stop] = i2_s(tensor.raw[start:stop].reshape(-1, 32)).reshape(-1)
    matrix = codes.reshape(rows, cols)
    _check_codes(path, tensor, matrix, 0)
    if scale == 0 and (matrix == 1).all():
        scale = LEAST_SCALE
    if not (np.isfinite(scale) and scale > 0):
        raise _refused(path, tensor, f"its scale is {scale}, which must be above zero")
    return pack_codes(matrix), np.full(rows, scale, dtype=np.float32)


def _check_codes(path: Path, tensor: GgufTensor, codes: NDArray[np.uint8], first: int) -> None:
    unused = np.flatnonzero((codes == 3).any(axis=1))
    if len(unused):
        raise _refused(path, tensor, f"it has the unused weight code 3 in row {first + unused[0]}")


def _from_blocks(path: Path, tensor: GgufTensor) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    rows, cols = tensor.shape
    unpack = tq2_0 if tensor.type is TQ2_0 else tq1_0
    row_bytes = cols // 256 * tensor.type.block_bytes
    packed = np.empty((rows, cols // 4), dtype=np.uint8)
    scales = np.zeros(rows, dtype=np.float32)
    for first, last in _pieces(rows, cols):
        raw = tensor.raw[first * row_bytes : last * row_bytes].reshape(-1, tensor.type.block_bytes)
        codes, steps = unpack(raw)
        # A block whose scale is zero is of zeros whatever its codes, and has no scale to agree about.
        codes[steps == 0] = 1
        codes = codes.reshape(last - first, cols)
        _check_codes(path, tensor, codes, first)
        packed[first:last] = pack_codes(codes)
        scales[first:last] = _row_scales(path, tensor, steps.reshape(last - first, -1), first)
    return packed, _filled(scales)


def _row_scales(
    path: Path, tensor: GgufTensor, steps: NDArray[np.float32], first: int
) -> NDArray[np.float32]:
    """The one scale of each row, zero where it has none; `steps` are those of its blocks."""
    if not np.isfinite(steps).all() or (steps < 0).any():
        raise _refused(path, tensor, "a scale of it is below zero or not finite")
    largest: NDArray[np.float32] = steps.max(axis=1)
    differ = np.flatnonzero(((steps != largest[:, None]) & (steps != 0)).any(axis=1))
    if len(differ):
        row = differ[0]
        kinds = len(np.unique(steps[row][steps[row] != 0]))
        why = f"row {first + row} has {kinds} scales, one a group of weights, and the engine has one a row"
        raise _refused(path, tensor, why)
    return largest


def _filled(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of zeros get the matrix's largest scale: any would do, and so a matrix of one scale stays one."""
    largest = scales.max()
    return np.where(scales == 0, largest if largest > 0 else LEAST_SCALE, scales).astype(np.float32)


def _from_floats(path: Path, tensor: GgufTensor, factor: np.float32, masters: bool) -> tuple[str, Ternary]:
    rows, cols = tensor.shape
    peaks = np.zeros(rows, dtype=np.float32)
    digits = np.ones(rows, dtype=bool)
    total, row = 0.0, 0
    for block in float_blocks(tensor.type, tensor.raw, rows, cols):
        size = np.abs(block)
        if not np.isfinite(size).all():
            raise _refused(path, tensor, "it holds a number that is not finite")
        peak = size.max(axis=1)
        peaks[row : row + len(block)] = peak
        digits[row : row + len(block)] = ((size == peak[:, None]) | (size == 0)).all(axis=1)
        total += float(size.sum(dtype=np.float64))
        row += len(block)
    if digits.all():
        return "ternary", Ternary(_signs(tensor), _filled(peaks) * factor, cols)
    if not masters:
        raise _refused(
            path, tensor, f"its {tensor.type.name} values are more than three a row: no ternary matrix"
        )
    mean = np.maximum(np.float32(total / (rows * cols)), LEAST_SCALE)
    scales = np.full(rows, mean, dtype=np.float32)
    return "masters", Ternary(_rounded(tensor, np.float32(1) / mean), scales * factor, cols)


def _signs(tensor: GgufTensor) -> NDArray[np.uint8]:
    blocks = float_blocks(tensor.type, tensor.raw, *tensor.shape)
    return np.concatenate([pack_codes((np.sign(block) + 1).astype(np.uint8)) for block in blocks])


def _rounded(tensor: GgufTensor, s: np.float32) -> NDArray[np.uint8]:
    """q = clamp(round_half_even(W s), -1, 1), transformers' `integrations/bitnet.py`."""
    blocks = float_blocks(tensor.type, tensor.raw, *tensor.shape)
    return np.concatenate(
        [pack_codes((np.clip(np.rint(block * s), -1, 1) + 1).astype(np.uint8)) for block in blocks]
    )
