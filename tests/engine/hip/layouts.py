"""How weights and KV caches lie in the GPU's memory, in NumPy, by the words of engine/native/hip/layout.h.

For tests: written from that header's description alone, so that the kernels' indexing is checked by a second
hand. Not the layouts of the prepared file: engine/formats/tiles.py.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.engine.hip import toolchain

TILE_ROWS = 8
COLS = {"two": 256, "three": 320}
CHUNK = {"f16": 8, "int8": 16, "rotor3": 16}
LEVELS = np.array([13, 40, 71, 114, -13, -40, -71, -114])  # of the codes 0 to 7


def steps_of(packing: str, cols: int) -> int:
    return -(-cols // COLS[packing])


def device_tiles(packing: str, codes: np.ndarray) -> np.ndarray:
    """codes uint8 [rows, cols] of 0, 1, 2 -> uint32 [tiles, steps, 32 lanes, 4 words]."""
    rows, cols = codes.shape
    tiles, steps = -(-rows // TILE_ROWS), steps_of(packing, cols)
    full = np.zeros((tiles * TILE_ROWS, steps * COLS[packing]), np.uint32)
    full[:rows] = 1  # columns are filled up with code 1, rows with code 0
    full[:rows, :cols] = codes
    # [tile, row, step, part, word, code of the byte, byte]
    each, base = (4, 4) if packing == "two" else (5, 3)
    parts = full.reshape(tiles, TILE_ROWS, steps, 4, 4, each, 4)
    powers = base ** np.arange(each, dtype=np.int64)
    if packing == "two":
        octets = (parts * powers[:, None]).sum(axis=5)
    else:
        octets = -(-(parts * powers[::-1, None]).sum(axis=5) * 256 // 243)
    words = (octets.astype(np.uint32) << 8 * np.arange(4, dtype=np.uint32)).sum(axis=5, dtype=np.uint32)
    # lane l has row l % 8 and part l // 8
    return np.ascontiguousarray(words.transpose(0, 2, 3, 1, 4)).reshape(tiles, steps, 32, 4)


def _key_places(form: str, width: int, positions: np.ndarray) -> np.ndarray:
    """Element index of [position, d] of a head's keys: [p / 32][d / chunk][p % 32][d % chunk]."""
    chunk, d, p = CHUNK[form], np.arange(width), positions[:, None]
    places: np.ndarray = ((p // 32 * (width // chunk) + d // chunk) * 32 + p % 32) * chunk + d % chunk
    return places


def _value_places(form: str, width: int, positions: np.ndarray) -> np.ndarray:
    """Element index of [position, d] of a head's values: [p / chunk][d][p % chunk]."""
    chunk, d, p = CHUNK[form], np.arange(width), positions[:, None]
    places: np.ndarray = (p // chunk * width + d) * chunk + p % chunk
    return places


def half_bytes(form: str, room: int, width: int) -> int:
    """Bytes of one head's keys; as many for its values."""
    sixteen = {"f16": 32, "int8": 16, "rotor3": 6}[form]  # bytes of 16 elements
    return room * width // 16 * sixteen


def _to_bytes(form: str, flat: np.ndarray) -> np.ndarray:
    """Elements in their order (float16, int8 or levels) -> bytes of the cache."""
    if form != "rotor3":
        return flat.astype(np.float16 if form == "f16" else np.int8).view(np.uint8)
    matches = flat.astype(np.int32).reshape(-1, 16)[..., None] == LEVELS
    codes = np.argmax(matches, axis=-1).astype(np.uint32)
    codes[flat.reshape(-1, 16) == 0] = 0  # nothing was written there
    low = ((codes & 3) << 2 * np.arange(16, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
    high = ((codes >> 2) << np.arange(16, dtype=np.uint32)).sum(axis=1).astype(np.uint16)
    return np.concatenate([low.view(np.uint8), high.view(np.uint8)])


def head_bytes(form: str, room: int, width: int, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Keys and values of one head, [positions, head_dim] of the form (rotor3: levels) -> bytes."""
    halves = []
    for rows, places in ((keys, _key_places), (values, _value_places)):
        flat = np.zeros(room * width, rows.dtype)
        wide = np.zeros((len(rows), width), rows.dtype)
        wide[:, : rows.shape[1]] = rows
        flat[places(form, width, np.arange(len(rows)))] = wide
        halves.append(_to_bytes(form, flat))
    return np.concatenate(halves)


def kv_bytes(form: str, room: int, width: int, cache: Any) -> np.ndarray:
    """One slot's oracle cache (engine/kv_forms.py) -> [layer][kv head][keys, values][half]."""
    layers, heads = cache.keys.shape[:2]
    parts = [
        head_bytes(form, room, width, cache.keys[layer, head], cache.values[layer, head])
        for layer in range(layers)
        for head in range(heads)
    ]
    return np.concatenate(parts)


def kv_scales(room: int, cache: Any) -> np.ndarray:
    """One slot's scales: [layer][kv head][keys, values][room]."""
    both = np.stack([cache.key_scales, cache.value_scales], axis=2)
    out = np.zeros((*both.shape[:3], room), np.float32)
    out[..., : both.shape[3]] = both
    return out.ravel()


def constant(name: str) -> int:
    """A whole number that the device code names: `const int NAME = VALUE;`."""
    for header in sorted((toolchain.NATIVE / "hip").glob("*.h")):
        if found := re.search(rf"const int {name} = (\d+)(?: << (\d+))?;", header.read_text()):
            return int(found[1]) << int(found[2] or 0)
    raise LookupError(f"no header in engine/native/hip has the constant {name}")
