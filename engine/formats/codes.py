"""Ternary codes 0, 1, 2 in bytes: four in two bits each, or five in base 3. No files and no scales here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from engine.model import Ternary

if TYPE_CHECKING:
    from numpy.typing import NDArray

POWERS: Final = (1, 3, 9, 27, 81)
BASE3_BYTES: Final = 243  # bytes from here on stand for no five digits
BASE3_STEP: Final = 20  # weights that a row of .h1b version 4 is filled up to a multiple of


def pack_codes(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack codes 0, 1, 2 (uint8 [rows, cols]) four to a byte, the first in the lowest bits."""
    rows, cols = codes.shape
    padded = np.zeros((rows, (cols + 3) // 4 * 4), dtype=np.uint8)
    padded[:, :cols] = codes
    quads = padded.reshape(rows, -1, 4)
    packed: NDArray[np.uint8] = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6
    return packed


def unpack_codes(matrix: Ternary) -> NDArray[np.uint8]:
    """The codes 0, 1, 2 of a ternary matrix as uint8 [rows, cols]; weight = (code - 1) * row scale."""
    packed = np.asarray(matrix.packed)
    quads = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    return quads.reshape(packed.shape[0], -1)[:, : matrix.cols]


def base3_row_bytes(cols: int) -> int:
    """Bytes of a row of `cols` weights in base 3, filled up to whole twenties."""
    return -(-cols // BASE3_STEP) * BASE3_STEP // 5


def pack_base3(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack codes (uint8 [rows, cols]) five to a byte, d0 + 3 d1 + 9 d2 + 27 d3 + 81 d4; the filling is zeros.

    A zero weight is digit 1, so a byte of filling alone is 121, and means nothing to any activation.
    """
    rows, cols = codes.shape
    padded = np.ones((rows, 5 * base3_row_bytes(cols)), dtype=np.uint8)
    padded[:, :cols] = codes
    fives = padded.reshape(rows, -1, 5)
    # 2 * (1 + 3 + 9 + 27 + 81) = 242: uint8 holds the sum.
    packed: NDArray[np.uint8] = (fives * np.array(POWERS, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
    return packed


def unpack_base3(packed: NDArray[np.uint8], cols: int) -> NDArray[np.uint8]:
    """The codes of `pack_base3`, uint8 [rows, cols]; bytes from 243 on must have been refused before."""
    return _FIVES[packed].reshape(packed.shape[0], -1)[:, :cols]


_DIGITS: Final = [[byte // power % 3 for power in POWERS] for byte in range(BASE3_BYTES)]
_FIVES: Final = np.array(_DIGITS + [[1] * 5] * (256 - BASE3_BYTES), dtype=np.uint8)
