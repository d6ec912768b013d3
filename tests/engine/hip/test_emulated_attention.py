"""Attention and the KV cache of a decode step as gfx1151 machine code, run in the emulator: the oracle's bits.

Each launch writes the tokens' keys and values and attends over the cache, in each of its forms. Runs where
HALO_TINYGRAD names a checkout of tinygrad: docs/hip-proof.md.
"""

from __future__ import annotations

import numpy as np
import pytest

from engine import kv_forms
from tests.engine.hip import layouts
from tests.engine.hip.emulator import Program, launch_both_ways, pack

KERNELS = {f"halo_{what}_{form}" for what in ("append", "attend") for form in ("f16", "int8", "rotor3")}
FORMS = ["f16", "int8", "rotor3"]
ROOM, LAYERS, LAYER = 512, 2, 1
BLOCK, MOST_GROUP, THREADS = 256, 16, 256


class _Step:
    """Tokens of different slots at their positions, with caches that hold what came before."""

    def __init__(
        self, form: str, shape: tuple[int, int, int], positions: list[int], *, large: float = 1
    ) -> None:
        self.form, (self.size, self.kv_heads, self.group) = form, shape
        self.width = -(-self.size // 16) * 16
        rng = np.random.default_rng([*shape, *positions])
        self.positions = np.array(positions, np.int32)
        self.slots = np.arange(len(positions), dtype=np.int32)[::-1].copy()
        angles = rng.uniform(-np.pi, np.pi, (ROOM, self.size // 2))
        self.cosine, self.sine = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        heads = self.kv_heads * (self.group + 2)
        self.qkv = np.zeros((len(positions), heads * self.size + 7), np.float32)
        self.qkv[:, : heads * self.size] = rng.standard_normal((len(positions), heads * self.size)) * large
        self.caches = [self._cache(rng, form, length) for length in positions]
        self.status = np.zeros(1, np.uint32)

    def _cache(self, rng: np.random.Generator, form: str, length: int) -> kv_forms.Cache:
        cache = kv_forms.new_cache((LAYERS, self.kv_heads, ROOM, self.size), form)
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
        by_slot = [self.caches[int(np.flatnonzero(self.slots == slot)[0])] for slot in range(len(self.slots))]
        data = np.concatenate([layouts.kv_bytes(self.form, ROOM, self.width, cache) for cache in by_slot])
        return data, np.concatenate([layouts.kv_scales(ROOM, cache) for cache in by_slot])

    def oracle(self) -> np.ndarray:
        """Append every token to its cache, and the output rows."""
        rows = []
        heads = self.group * self.kv_heads
        for token, position in enumerate(self.positions):
            parts = self.qkv[token, : (heads + 2 * self.kv_heads) * self.size].reshape(-1, self.size)
            k = self._turned(parts[heads : heads + self.kv_heads], int(position))
            v = parts[heads + self.kv_heads :]
            q = self._turned(parts[:heads], int(position)).reshape(1, self.kv_heads, self.group, self.size)
            at = np.array([position])
            kv_forms.append(self.caches[token], LAYER, at, k[None], v[None])
            rows.append(kv_forms.attend(self.caches[token], LAYER, at, q).ravel())
        return np.array(rows)

    def launch(self, engine: Program, kernel: str, data: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Run the kernel on the cache (changed in place); the output rows."""
        tokens, blocks = len(self.positions), int(self.positions.max()) // BLOCK + 1
        heads = self.group * self.kv_heads
        out = np.full((tokens, heads * self.size + 3), 7, np.float32)
        partial = np.full((tokens, self.kv_heads, blocks, self.group, self.width + 2), np.nan, np.float32)
        counts = np.zeros((tokens, self.kv_heads), np.int32)
        half = layouts.half_bytes(self.form, ROOM, self.width)
        sizes = (LAYERS, self.kv_heads, self.size, self.width, ROOM)
        view = (data, None if self.form == "f16" else scales, np.uint64(half), *map(np.int32, sizes))
        argument = pack(
            self.qkv, np.int32(self.qkv.shape[1]), self.slots, self.positions, np.int32(tokens), np.int32(LAYER),
            np.int32(heads), np.int32(1), view, self.cosine, self.sine, np.int32(self.size // 2),
            np.float32(1 / np.sqrt(np.float64(self.size))), out, np.int32(out.shape[1]), partial, counts,
            np.int32(blocks), self.status,
        )  # fmt: skip
        arrays = [self.qkv, self.slots, self.positions, data, scales, self.cosine, self.sine, out, partial, counts,
                  self.status]  # fmt: skip
        for array in (self.qkv, self.slots, self.positions, self.cosine, self.sine):
            array.flags.writeable = False
        grid = (tokens, self.kv_heads, 1) if "append" in kernel else (blocks, self.kv_heads, tokens)
        launch_both_ways(engine, kernel, grid, (THREADS, 1, 1), argument, arrays, lds=self._lds())
        assert not counts.any(), "the counters of blocks must be zero again for the next step"
        assert (out[:, heads * self.size :] == 7).all()
        return out[:, : heads * self.size]

    def _lds(self) -> int:
        rows, group, width = max(self.group, 2), self.group, self.width
        floats = rows * width + group * BLOCK + group * width + 4 * MOST_GROUP
        return 256 + 4 * floats + group * width + 2 * group * BLOCK


def _shape(form: str, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """rotor3 turns heads of a power of two elements."""
    return (32, *shape[1:]) if form == "rotor3" and shape[0] not in (32, 64, 128, 256) else shape


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(24, 2, 3), (64, 1, 2), (128, 2, 1)], ids=str)
def test_append(engine: Program, form: str, shape: tuple[int, int, int]) -> None:
    """Keys (turned) and values of three slots get to their places, and nothing else changes."""
    step = _Step(form, _shape(form, shape), [0, 17, 300])
    data, scales = step.memory()
    step.launch(engine, f"halo_append_{form}", data, scales)
    step.oracle()
    want, want_scales = step.memory()
    assert (data == want).all() and (scales == want_scales).all() and step.status[0] == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(24, 2, 3), (32, 1, 5), (128, 1, 4)], ids=str)
def test_attend_in_one_block(engine: Program, form: str, shape: tuple[int, int, int]) -> None:
    """Tokens at the beginning, amid a chunk and at a block's last position."""
    step = _Step(form, _shape(form, shape), [0, 37, 255])
    data, scales = step.memory()
    got = step.launch(engine, f"halo_attend_{form}", data, scales)
    assert (got == step.oracle()).all() and step.status[0] == 0
    want, want_scales = step.memory()
    assert (data == want).all() and (scales == want_scales).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "position"), [((24, 1, 2), 256), ((64, 2, 2), 300), ((32, 1, 1), 511)], ids=str
)
def test_attend_over_two_blocks(
    engine: Program, form: str, shape: tuple[int, int, int], position: int
) -> None:
    """Whichever block of threads comes last puts the parts together; a token of one block is beside it."""
    step = _Step(form, _shape(form, shape), [position, 3])
    data, scales = step.memory()
    got = step.launch(engine, f"halo_attend_{form}", data, scales)
    assert (got == step.oracle()).all() and step.status[0] == 0


@pytest.mark.parametrize("form", FORMS)
def test_attend_with_a_head_that_is_certain(engine: Program, form: str) -> None:
    """Scores hundreds apart: all weight goes to one position, the others' e^x is at its floor."""
    step = _Step(form, _shape(form, (32, 1, 2)), [40], large=60)
    data, scales = step.memory()
    got = step.launch(engine, f"halo_attend_{form}", data, scales)
    assert (got == step.oracle()).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0**41])
def test_a_value_that_attention_cannot_bear_sets_the_status(engine: Program, form: str, bad: float) -> None:
    """The step fails with HALO_NUMERIC on the host; the kernel itself goes on with a 0."""
    step = _Step(form, _shape(form, (32, 1, 2)), [5])
    step.qkv[0, 3] = bad
    data, scales = step.memory()
    got = step.launch(engine, f"halo_attend_{form}", data, scales)
    assert step.status[0] == 1 and np.isfinite(got).all()
