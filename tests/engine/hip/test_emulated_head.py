"""The output head's kernels as gfx1151 code, run in the emulator: NumPy's integers, logits and tokens.

Runs where HALO_TINYGRAD names a checkout of tinygrad: docs/hip-proof.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from engine import reference
from engine.arithmetic import dot, fma
from engine.formats import tiles
from tests.engine.hip.emulator import Program, launch_both_ways, pack

KERNELS = {f"halo_head_{kind}" for kind in ("norm", "repack", "coarse_1", "coarse_8", "coarse_16")} | {
    f"halo_head_{kind}_{weights}"
    for kind in ("exact", "near", "logits_1", "logits_4", "logits_8")
    for weights in ("bf16", "f32")
}
BLOCK = (256, 1, 1)
EPS = 1e-5
SCRATCH, WAVES, TILES = 256, 8, 64  # kHeadScratch, kHeadWaves, kHeadTiles
# HeadToken, HeadBest and HeadSearch of head_launch.h
TOKEN = np.dtype(
    [("half_step", "f4"), ("by_error", "f4"), ("by_norm", "f4"), ("high", "i4"), ("low", "i4"), ("_", "V12")]
)
BEST = np.dtype([("certain", "f4"), ("seen", "f4"), ("drawn", "f4"), ("seen_row", "i4"), ("drawn_row", "i4")])
SEARCH = np.dtype([("largest", "u8"), ("done", "i4"), ("near_done", "i4"), ("winner", "i4"), ("_", "i4")])
EXACT_SHARED = (20 * WAVES + 8 + 2 * 4 * 2048 + 4 * WAVES + 15) // 16 * 16  # HeadShared

F32 = np.float32
i32 = np.int32


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass
class Case:
    """A head and some hidden states, with what NumPy makes of them."""

    vocab: int
    hidden: int
    count: int
    bf16: bool = True

    def __post_init__(self) -> None:
        rng = np.random.default_rng((self.vocab, self.hidden, self.count))
        self.filled, self.steps = _up(self.hidden, 16), -(-self.hidden // 256)
        self.rows, self.stride = _up(self.vocab, 16), self.filled + 16
        head = rng.standard_normal((self.vocab, self.hidden)).astype(F32)
        if self.bf16:
            head = (head.view(np.uint32) & np.uint32(0xFFFF0000)).view(F32)
        wide = np.zeros((self.vocab, self.filled), F32)
        wide[:, : self.hidden] = head
        self.weights = (wide.view(np.uint32) >> 16).astype(np.uint16) if self.bf16 else wide
        self.x = np.zeros((self.count + 1, self.stride), F32)
        self.x[:, : self.hidden] = rng.standard_normal((self.count + 1, self.hidden)) * 3
        self.wanted = rng.permutation(self.count + 1)[: self.count].astype(i32)
        self.norm = np.zeros(self.filled, F32)
        self.norm[: self.hidden] = rng.uniform(0.5, 1.5, self.hidden)
        self.kept = np.zeros((self.count, self.filled), F32)
        states = self.x[self.wanted, : self.hidden]
        self.kept[:, : self.hidden] = reference.rmsnorm(states, self.norm[: self.hidden], EPS)
        self.logits = np.stack([dot(head, row) for row in self.kept[:, : self.hidden]])
        self.levels, scale, error, norm = tiles.coarse_head(head)
        self.facts = np.zeros((self.rows, 4), F32)
        self.facts[: self.vocab, :3] = np.stack([scale, error, norm], axis=1)
        self.status = np.zeros(1, np.uint32)
        self._split()

    def _split(self) -> None:
        """The normed rows in 16 bits."""
        cols = 256 * self.steps
        step = np.abs(self.kept).max(axis=1) / F32(32000)
        value = np.zeros((self.count, cols), i32)
        value[:, : self.filled] = np.rint(self.kept / step[:, None])
        high = (value + 128) >> 8
        self.parts = np.stack([high, value - 256 * high], axis=1).astype(np.int8)
        self.tokens = np.zeros(self.count, TOKEN)
        self.tokens["half_step"] = step / 2
        self.tokens["high"], self.tokens["low"] = self.parts.sum(axis=2, dtype=i32).T

    def device_tiles(self) -> np.ndarray:
        """The coarse head as it lies on the device (head_launch.h): uint32 [tile, step, piece, lane, 4]."""
        u = np.zeros((self.rows, 256 * self.steps), np.uint32)
        u[: self.vocab, : self.hidden] = self.levels
        # [tile, row, step, part, word, byte]
        parts = u.reshape(self.rows // 8, 8, self.steps, 4, 16, 4)
        held = parts[..., :12, :].copy()
        for j in range(4):
            for k in range(3):
                held[..., 3 * j + k, :] |= (parts[..., 12 + j, :] >> 2 * k & 3) << 6
        words = (held << (8 * np.arange(4, dtype=np.uint32))).sum(axis=-1, dtype=np.uint32)
        # lane = 8 part + row
        lanes = words.transpose(0, 2, 3, 1, 4).reshape(self.rows // 8, self.steps, 32, 3, 4)
        return np.ascontiguousarray(lanes.transpose(0, 1, 3, 2, 4))

    def seen(self) -> np.ndarray:
        """The coarse logits, to the last bit."""
        u = np.zeros((self.vocab, 256 * self.steps), np.int64)
        u[:, : self.hidden] = self.levels
        sums = np.einsum("tvc,rc->vtr", self.parts.astype(np.int64), 2 * u - 63)
        whole = fma(sums[0].astype(F32), np.full_like(sums[0], 256, F32), sums[1].astype(F32))
        result: np.ndarray = whole * self.tokens["half_step"][:, None] * self.facts[: self.vocab, 0]
        return result

    def norm_args(
        self, kept: np.ndarray, parts: np.ndarray | None, tokens: np.ndarray | None
    ) -> tuple[object, ...]:
        return (
            self.x, i32(self.stride), self.wanted, self.norm, i32(self.hidden), F32(EPS), i32(self.steps),
            kept, i32(self.filled), parts, tokens, self.status,
        )  # fmt: skip

    def exact_args(self, upper: np.ndarray, best: np.ndarray, noise: np.ndarray | None, search: np.ndarray,
                   ids: np.ndarray) -> tuple[object, ...]:  # fmt: skip
        rows = (self.weights, np.uint64(self.weights.strides[0]), i32(self.bf16))
        return (
            rows, self.kept, i32(self.filled), i32(self.hidden), i32(self.vocab), i32(self.rows), upper, best,
            i32(best.shape[1]), noise, search, ids, None, self.status,
        )  # fmt: skip

    def uppers(self, slack: float, noise: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Upper bounds, and what two blocks of the coarse pass could have found."""
        upper = np.full((self.count, self.rows), np.inf, F32)  # nobody reads those of rows that are not there
        upper[:, : self.vocab] = self.logits + F32(slack)
        best = np.zeros((self.count, 2), BEST)
        for t in range(self.count):
            for b, ids in enumerate(np.array_split(np.arange(self.vocab), 2)):
                look, with_noise = (
                    self.logits[t, ids],
                    upper[t, ids] + (0 if noise is None else noise[t, ids]),
                )
                rows = ids[look.argmax()], ids[with_noise.argmax()]
                best[t, b] = (look.max() - slack, look.max(), with_noise.max(), *rows)
        return upper, best


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == np.ascontiguousarray(b, a.dtype).tobytes()


SHAPES = [(21, 37), (70, 256), (33, 300)]


@pytest.mark.parametrize("vocab, hidden", SHAPES)
def test_repacking(engine: Program, vocab: int, hidden: int) -> None:
    case = Case(vocab, hidden, 1)
    source = np.ascontiguousarray(tiles.head_tiles(case.levels))
    want = case.device_tiles()
    out = np.zeros_like(want)
    argument = pack(source, i32(source.shape[1]), i32(case.steps), i32(case.rows // 8), out)
    blocks = -(-case.rows // 8 * case.steps * 32 // 256)
    launch_both_ways(engine, "halo_head_repack", (blocks, 1, 1), BLOCK, argument, [source, out])
    assert _same(out, want)


@pytest.mark.parametrize("vocab, hidden", SHAPES)
def test_norm(engine: Program, vocab: int, hidden: int) -> None:
    """Three rows in 16 bits, and lengths that are none too short."""
    case = Case(vocab, hidden, 3)
    kept, parts = np.zeros_like(case.kept), np.zeros_like(case.parts)
    tokens = np.zeros(3, TOKEN)
    arrays: list[np.ndarray] = [case.x, case.wanted, case.norm, kept, parts, tokens, case.status]
    argument = pack(*case.norm_args(kept, parts, tokens))
    launch_both_ways(
        engine, "halo_head_norm", (3, 1, 1), BLOCK, argument, arrays, lds=SCRATCH + 4 * case.filled
    )
    assert _same(kept, case.kept) and _same(parts, case.parts) and case.status[0] == 0
    for name in ("half_step", "high", "low"):
        assert _same(tokens[name].copy(), case.tokens[name])
    taken = 2.0 * tokens["half_step"][:, None] * (256.0 * parts[:, 0] + parts[:, 1])
    x = np.zeros(taken.shape)
    x[:, : case.filled] = kept
    assert (tokens["by_error"] >= np.linalg.norm(taken, axis=1)).all()
    chain = (case.filled / 16 + 8) * 2.0**-24 * np.linalg.norm(x, axis=1)
    assert (tokens["by_norm"] >= np.linalg.norm(x - taken, axis=1) + chain).all()
    assert (tokens["by_norm"] < 0.002 * np.linalg.norm(x, axis=1)).all()


@pytest.mark.parametrize("vocab, hidden", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 8, 11])
def test_coarse_pass(engine: Program, vocab: int, hidden: int, count: int) -> None:
    """Its integers are exact, so the row that looks best is NumPy's; and no logit is above its bound."""
    case = Case(vocab, hidden, count)
    size = 16 if count > 8 else 8 if count > 1 else 1
    case.tokens["by_error"] = np.linalg.norm(case.kept, axis=1) * 1.01
    case.tokens["by_norm"] = np.linalg.norm(case.kept, axis=1) * 0.001
    held, noise = case.device_tiles(), np.random.default_rng(8).gumbel(size=(count, vocab)).astype(F32)
    kept, upper, best = (
        np.zeros_like(case.kept),
        np.zeros((count, case.rows), F32),
        np.zeros((count, 2), BEST),
    )
    own = case.norm_args(kept, None, None)
    argument = pack(
        own,
        held,
        case.facts,
        i32(vocab),
        i32(case.rows // 8),
        i32(count),
        case.parts,
        case.tokens,
        noise,
        upper,
        best,
    )
    arrays = [case.x, case.wanted, case.norm, kept, case.status, held, case.facts, case.parts, case.tokens]
    arrays += [noise, upper, best]
    chunk = 144 if size == 1 else 160 * size + 32
    lds = SCRATCH + 32 * size + _up(20 * size * WAVES, 16) + 4 * case.steps * chunk
    lds += 64 * TILES + 4 * case.filled if size == 1 else 0
    launch_both_ways(engine, f"halo_head_coarse_{size}", (2, 1, 1), BLOCK, argument, arrays, lds=lds)
    seen = case.seen()
    assert _same(best["seen"].max(axis=1), seen.max(axis=1))
    block = best["seen"].argmax(axis=1)
    assert _same(best["seen_row"][np.arange(count), block].copy(), seen.argmax(axis=1))
    above = upper[:, :vocab]
    assert (above >= case.logits).all() and (best["certain"].max(axis=1) <= case.logits.max(axis=1)).all()
    block = best["drawn"].argmax(axis=1)
    assert _same(best["drawn_row"][np.arange(count), block].copy(), (above + noise).argmax(axis=1))
    if count == 1:
        assert _same(kept, case.kept)
    else:
        by_error, by_norm = (case.tokens[name][:, None] for name in ("by_error", "by_norm"))
        bound = fma(by_error, case.facts[None, :vocab, 1], by_norm * case.facts[:vocab, 2]) + F32(1.2e-38)
        assert _same(above.copy(), seen + bound)


@pytest.mark.parametrize("vocab, hidden", SHAPES)
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "f32"])
@pytest.mark.parametrize("noisy", [True, False], ids=["noise", "plain"])
def test_exact_pass(engine: Program, vocab: int, hidden: int, bf16: bool, noisy: bool) -> None:
    case = Case(vocab, hidden, 2, bf16)
    noise = np.random.default_rng(9).gumbel(size=(2, vocab)).astype(F32) if noisy else None
    upper, best = case.uppers(0.5 * hidden**0.5, noise)
    search, ids = np.zeros(2, SEARCH), np.zeros(2, i32)
    arrays = [case.weights, case.kept, upper, best, search, ids, case.status] + (
        [] if noise is None else [noise]
    )
    argument = pack(*case.exact_args(upper, best, noise, search, ids))
    name = f"halo_head_exact_{'bf16' if bf16 else 'f32'}"
    launch_both_ways(engine, name, (2, 2, 1), BLOCK, argument, arrays, lds=EXACT_SHARED + 4 * case.filled)
    assert _same(ids, (case.logits + (0 if noise is None else noise)).argmax(axis=1))
    assert _same(search["winner"].copy(), ids) and case.status[0] == 0
    assert not search["largest"].any() and not search["done"].any()


@pytest.mark.parametrize("vocab, hidden", SHAPES)
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "f32"])
def test_near_pass(engine: Program, vocab: int, hidden: int, bf16: bool) -> None:
    """The first token has room for all that is near, the second not."""
    case = Case(vocab, hidden, 2, bf16)
    upper, best = case.uppers(0.3 * hidden**0.5)
    order = np.argsort(-case.logits, axis=1, kind="stable")
    search, depth = np.zeros(2, SEARCH), np.zeros(1, F32)
    search["winner"] = order[0, 5], order[1, 12]
    room, found = 8, np.zeros(2, i32)
    ids, logits = np.full((2, room), -7, i32), np.zeros((2, room), F32)
    counts, some_ids = np.zeros((2, 2), i32), np.zeros((2, vocab), i32)
    some_logits = np.zeros((2, vocab), F32)
    exact = case.exact_args(upper, best, None, search, found)
    argument = pack(exact, depth, i32(room), counts, some_ids, some_logits, found, ids, logits, i32(room))
    arrays = [case.weights, case.kept, upper, best, search, case.status, depth, counts, some_ids, some_logits]
    arrays += [found, ids, logits]
    name = f"halo_head_near_{'bf16' if bf16 else 'f32'}"
    launch_both_ways(engine, name, (2, 2, 1), BLOCK, argument, arrays, lds=EXACT_SHARED + 4 * case.filled)
    assert found.tolist() == [6, -1]
    assert _same(ids[0, :6].copy(), np.sort(order[0, :6])) and (ids[0, 6:] == -7).all()
    assert _same(logits[0, :6].copy(), case.logits[0, ids[0, :6]])


@pytest.mark.parametrize("vocab, hidden", SHAPES)
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "f32"])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_all_logits(engine: Program, vocab: int, hidden: int, bf16: bool, count: int) -> None:
    case = Case(vocab, hidden, count, bf16)
    size = 8 if count > 4 else 4 if count > 1 else 1
    logits = np.zeros((count, vocab), F32)
    rows = (case.weights, np.uint64(case.weights.strides[0]), i32(bf16))
    argument = pack(
        rows, case.kept, i32(case.filled), i32(hidden), i32(vocab), i32(count), logits, case.status
    )
    arrays = [case.weights, case.kept, logits, case.status]
    name = f"halo_head_logits_{size}_{'bf16' if bf16 else 'f32'}"
    launch_both_ways(engine, name, (1, 1, 1), BLOCK, argument, arrays, lds=size * 4 * case.filled)
    assert _same(logits, case.logits) and case.status[0] == 0
