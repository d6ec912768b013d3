"""The layouts that the CPU kernels read: ternary tiles and the coarse head. Pure functions on arrays.

Both put 16 rows side by side: byte 4 * row + j of a 64-byte vector belongs to column 4 * g + j of a group g
of four columns, so that one instruction multiplies 16 rows with four activations, and its 32-bit lanes are
the rows' sums.

Ternary tiles: three codes (0, 1, 2) of columns 4 apart make one index c0 + 3 c1 + 9 c2 of five bits, 1.67
bits a weight. A chunk of 320 bytes holds 16 rows x 96 columns: eight index vectors, vector i covering columns
12 i to 12 i + 11 (code p of a byte is that of column 12 i + 4 p + j). Four vectors of 64 bytes hold their low
four bits (vector v: index vector 2 v in the low nibble, 2 v + 1 in the high one); the last 64 bytes hold
the fifth bits, bit i of byte l that of index vector i. Columns are filled up with weight 0.

Coarse head: a row w is held as u = 0..63 with w ~ scale * (u - 31.5). A chunk of 192 bytes holds 16 rows x 16
columns: two vectors of nibbles u >> 2 (vector v: groups 2 v and 2 v + 1), then one with u & 3 of group g in
bits 2 g. `docs/exact-head.md` tells what its error bounds are for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROWS: Final = 16
TERNARY_COLS: Final = 96
TERNARY_CHUNK: Final = 320
HEAD_COLS: Final = 16
HEAD_CHUNK: Final = 192
LEVELS: Final = 64
_CLIPS: Final = (0.95, 0.8)
_BLOCK: Final = 256  # rows that a cache holds
_ZERO: Final = 1  # the code of weight 0


def up(value: int, multiple: int) -> int:
    """`value` rounded up to a whole multiple."""
    return (value + multiple - 1) // multiple * multiple


def ternary_bytes(rows: int, cols: int) -> int:
    """Bytes of the tiles of a ternary matrix."""
    return up(rows, ROWS) // ROWS * (up(cols, TERNARY_COLS) // TERNARY_COLS) * TERNARY_CHUNK


def head_bytes(rows: int, cols: int) -> int:
    """Bytes of the coarse head."""
    return up(rows, ROWS) // ROWS * (up(cols, HEAD_COLS) // HEAD_COLS) * HEAD_CHUNK


def ternary_tiles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Tiles uint8 [row blocks, column chunks, 320] of codes uint8 [rows, cols]."""
    rows, cols = codes.shape
    padded = np.full((up(rows, ROWS), up(cols, TERNARY_COLS)), _ZERO, np.uint8)
    padded[:rows, :cols] = codes
    # [block, row, chunk, vector, plane, j] -> [block, chunk, vector, plane, row, j]
    parts = padded.reshape(-1, ROWS, padded.shape[1] // TERNARY_COLS, 8, 3, 4).transpose(0, 2, 3, 4, 1, 5)
    index = parts[:, :, :, 0] + 3 * parts[:, :, :, 1] + 9 * parts[:, :, :, 2]
    index = np.ascontiguousarray(index).reshape(*index.shape[:3], 64)
    tiles = np.empty((*index.shape[:2], TERNARY_CHUNK), np.uint8)
    low = index & 15
    tiles[..., :256] = (low[:, :, 0::2] | low[:, :, 1::2] << 4).reshape(*index.shape[:2], 256)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    tiles[..., 256:] = np.bitwise_or.reduce(index >> 4 << shifts, axis=2)
    return tiles


def ternary_codes(tiles: NDArray[np.uint8], rows: int, cols: int) -> NDArray[np.uint8]:
    """The codes [rows, cols] that `ternary_tiles` was given. ValueError for an index that no codes make."""
    tiles = tiles.reshape(up(rows, ROWS) // ROWS, -1, TERNARY_CHUNK)
    nibbles = tiles[..., :256].reshape(*tiles.shape[:2], 4, 64)
    index = np.empty((*tiles.shape[:2], 8, 64), np.uint8)
    index[:, :, 0::2], index[:, :, 1::2] = nibbles & 15, nibbles >> 4
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    index |= (tiles[:, :, None, 256:] >> shifts & 1) << 4
    if (index > 26).any():
        raise ValueError("an index is above 26")
    parts = np.stack([index % 3, index // 3 % 3, index // 9], axis=3).reshape(*index.shape[:3], 3, ROWS, 4)
    codes = parts.transpose(0, 4, 1, 2, 3, 5).reshape(tiles.shape[0] * ROWS, -1)
    return np.ascontiguousarray(codes[:rows, :cols])


def coarse_head(
    block: NDArray[np.float32],
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """(u uint8 [rows, cols], scale, error, norm), each float32 [rows], of rows of the head.

    `error` is at least |w - scale (u - 31.5)| and `norm` at least |w|, both Euclidean: sums of float32, made
    larger by more than these can have lost. Each row gets the clipping range that leaves it the least error.
    """
    parts = [_coarse(block[start : start + _BLOCK]) for start in range(0, len(block), _BLOCK)]
    levels, scales, error, norm = (np.concatenate(part) for part in zip(*parts, strict=True))
    return levels, scales, error, norm


def _coarse(block: NDArray[np.float32]) -> tuple[NDArray[np.uint8], *tuple[NDArray[np.float32], ...]]:
    peak = np.abs(block).max(axis=1)
    levels = np.zeros(block.shape, np.uint8)
    scales, best = np.zeros((2, len(block)), np.float32)
    best += np.float32(np.inf)
    for clip in _CLIPS:
        scale = peak * np.float32(clip / (LEVELS / 2))
        safe = np.where(scale > 0, scale, np.float32(1))
        u = np.clip(np.floor(block / safe[:, None]), -LEVELS / 2, LEVELS / 2 - 1)
        error = _length(block - scale[:, None] * (u + np.float32(0.5)))
        better = error < best
        levels[better] = (u[better] + LEVELS / 2).astype(np.uint8)
        scales[better], best[better] = scale[better], error[better]
    # n squares added in float32 lose at most n 2^-24 of their sum, squares below the normal numbers n 2^-126
    # in all, and each difference 2^-23 of its weight.
    n = block.shape[1]
    more, least = np.float32(1 + n * 2.0**-23), np.float32(np.sqrt(n) * 2.0**-62)
    norm = _length(block) * more + least
    return levels, scales, best * more + norm * np.float32(2.0**-21) + least, norm


def _length(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths: NDArray[np.float32] = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return lengths


def head_tiles(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The coarse head's tiles uint8 [row blocks, column chunks, 192] of levels uint8 [rows, cols]."""
    rows, cols = levels.shape
    padded = np.zeros((up(rows, ROWS), up(cols, HEAD_COLS)), np.uint8)
    padded[:rows, :cols] = levels
    groups = padded.reshape(-1, ROWS, padded.shape[1] // HEAD_COLS, 4, 4).transpose(0, 2, 3, 1, 4)
    groups = np.ascontiguousarray(groups).reshape(*groups.shape[:3], 64)
    tiles = np.empty((*groups.shape[:2], HEAD_CHUNK), np.uint8)
    high = groups >> 2
    tiles[..., :128] = (high[:, :, 0::2] | high[:, :, 1::2] << 4).reshape(*groups.shape[:2], 128)
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    tiles[..., 128:] = np.bitwise_or.reduce((groups & 3) << shifts, axis=2)
    return tiles
