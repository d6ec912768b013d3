"""A batch of tokens for the attention kernels: queries, caches, the oracle's answer, the arguments.

For the emulated tests of decoding and of prefill. Not the caches' layout: layouts.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engine import kv_forms
from tests.engine.hip import layouts
from tests.engine.hip.emulator import Program, launch_both_ways, pack

FORMS = ["f16", "int8", "rotor3"]
ROOM, LAYERS, LAYER = 512, 2, 1
BLOCK, MOST_GROUP = 256, 16
PARTS = 4  # kQueryParts


class Batch:
    """Tokens (slot, position), in order, over caches that hold all that came before.

    shape: head size, KV heads, query heads a KV head. `large` stretches the queries, keys and values.
    """

    def __init__(
        self, form: str, shape: tuple[int, int, int], tokens: list[tuple[int, int]], *, large: float = 1
    ) -> None:
        self.form, (self.size, self.kv_heads, self.group) = form, shape
        self.width = -(-self.size // 16) * 16
        self.heads = self.group * self.kv_heads
        rng = np.random.default_rng([*shape, *(number for token in tokens for number in token)])
        self.slots = np.array([slot for slot, _ in tokens], np.int32)
        self.positions = np.array([position for _, position in tokens], np.int32)
        angles = rng.uniform(-np.pi, np.pi, (ROOM, self.size // 2))
        self.cosine, self.sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        row = (self.heads + 2 * self.kv_heads) * self.size
        self.qkv = np.zeros((len(tokens), -(-row // 4) * 4 + 8), np.float32)
        self.qkv[:, :row] = rng.standard_normal((len(tokens), row)) * large
        firsts = [min(p for s, p in tokens if s == slot) for slot in range(int(self.slots.max()) + 1)]
        self.caches = [self._cache(rng, first) for first in firsts]
        self.status = np.zeros(1, np.uint32)
        self.rope_now = np.stack([self.cosine[self.positions], self.sine[self.positions]], axis=1)
        self.out = np.full((len(tokens), self.heads * self.size + 4), 7, np.float32)

    def _cache(self, rng: np.random.Generator, length: int) -> kv_forms.Cache:
        cache = kv_forms.new_cache((LAYERS, self.kv_heads, ROOM, self.size), self.form)
        if length:
            k, v = rng.standard_normal((2, length, self.kv_heads, self.size)).astype(np.float32)
            kv_forms.append(cache, LAYER, np.arange(length), k, v)
        return cache

    def _turned(self, x: np.ndarray, position: int) -> np.ndarray:
        first, second = np.split(x, 2, axis=-1)
        cosine, sine = self.cosine[position], self.sine[position]
        return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)

    def memory(self) -> tuple[np.ndarray, np.ndarray]:
        """(bytes, scales) of all slots, as the GPU has them."""
        data = [layouts.kv_bytes(self.form, ROOM, self.width, cache) for cache in self.caches]
        return np.concatenate(data), np.concatenate([layouts.kv_scales(ROOM, cache) for cache in self.caches])

    def oracle(self) -> np.ndarray:
        """Append every token to its cache, and the output rows [tokens, heads * size]."""
        rows = []
        for token, (slot, position) in enumerate(zip(self.slots, self.positions, strict=True)):
            parts = self.qkv[token, : (self.heads + 2 * self.kv_heads) * self.size].reshape(-1, self.size)
            k = self._turned(parts[self.heads : self.heads + self.kv_heads], int(position))
            v = parts[self.heads + self.kv_heads :]
            q = self._turned(parts[: self.heads], int(position))
            at = np.array([position])
            kv_forms.append(self.caches[slot], LAYER, at, k[None], v[None])
            q = q.reshape(1, self.kv_heads, self.group, self.size)
            rows.append(kv_forms.attend(self.caches[slot], LAYER, at, q).ravel())
        return np.array(rows)

    def arguments(self, data: np.ndarray, scales: np.ndarray, partial: np.ndarray | None,
                  counts: np.ndarray | None, blocks: int) -> tuple[Any, ...]:  # fmt: skip
        """AttentionArgs of engine/native/hip/kernels.h."""
        half = layouts.half_bytes(self.form, ROOM, self.width)
        sizes = (LAYERS, self.kv_heads, self.size, self.width, ROOM)
        view = (data, None if self.form == "f16" else scales, np.uint64(half), *map(np.int32, sizes))
        numbers = (len(self.slots), LAYER, self.heads, int(partial is not None))
        return (
            self.qkv, np.int32(self.qkv.shape[1]), self.slots, self.positions, *map(np.int32, numbers), view,
            self.cosine, self.sine, self.rope_now, np.int32(self.size // 2),
            np.float32(1 / np.sqrt(np.float64(self.size))),
            self.out, np.int32(self.out.shape[1]), partial, counts, np.int32(blocks), self.status,
        )  # fmt: skip

    def inputs(self) -> list[np.ndarray]:
        """What the kernels may not write to."""
        arrays = [self.qkv, self.slots, self.positions, self.cosine, self.sine, self.rope_now]
        for array in arrays:
            array.flags.writeable = False
        return arrays

    def rows(self) -> np.ndarray:
        """The output rows, after seeing that nothing stands behind them."""
        end = self.heads * self.size
        assert (self.out[:, end:] == 7).all()
        return self.out[:, :end]

    def decode(self, engine: Program, kernel: str, data: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Run halo_attend_* or halo_append_* on the cache (changed in place); the output rows."""
        tokens, blocks = len(self.positions), int(self.positions.max()) // BLOCK + 1
        partial = np.full((tokens, self.kv_heads, blocks, self.group, self.width + 2), np.nan, np.float32)
        counts = np.zeros((tokens, self.heads), np.int32)
        argument = pack(*self.arguments(data, scales, partial, counts, blocks))
        arrays = [*self.inputs(), data, scales, self.out, partial, counts, self.status]
        grid = (
            (tokens, self.kv_heads, 1)
            if "append" in kernel
            else (blocks, self.kv_heads * min(self.group, PARTS), tokens)
        )
        threads = engine.threads(kernel)
        launch_both_ways(engine, kernel, grid, (threads, 1, 1), argument, arrays, lds=self._decode_lds())
        assert not counts.any(), "the counters of blocks must be zero again for the next step"
        return self.rows()

    def _decode_lds(self) -> int:
        group, width = self.group, self.width
        floats = (group + 2) * width + group * BLOCK + group * width + 4 * MOST_GROUP + 4 + 2 * BLOCK
        return 256 + 4 * floats + group * width + 2 * group * BLOCK + 2 * width


def shape_of(form: str, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """`shape`, but for rotor3 with heads of a power of two elements."""
    return (32, *shape[1:]) if form == "rotor3" and shape[0] not in (32, 64, 128, 256) else shape
