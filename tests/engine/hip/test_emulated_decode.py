"""The decode step's kernels as gfx1151 machine code, run in the emulator: the same bits as the oracle.

Runs where HALO_TINYGRAD names a checkout of tinygrad: docs/hip-proof.md.
"""

from __future__ import annotations

import numpy as np
import pytest

from engine import reference
from engine.formats import tiles
from tests.engine.hip import layouts
from tests.engine.hip.emulator import Program, launch_both_ways, pack

KERNELS = {"halo_embed", "halo_publish", "halo_norm", "halo_repack_two", "halo_repack_three"} | {
    f"halo_{packing}_{tokens}" for packing in ("two", "three") for tokens in (1, 2, 4, 8, 16)
}
EPILOGUES = ("store", "add", "gated")  # kStore, kAdd, kGated
THREADS = 256
EPS = 1e-5
SCRATCH = 256  # bytes: kScratchBytes
MANY = layouts.constant("kManyBytes")


def _rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _rows(rng: np.random.Generator, tokens: int, n: int, stride: int) -> np.ndarray:
    """Rows of floats of quite different sizes, filled up with zeros."""
    x = np.zeros((tokens, stride), np.float32)
    x[:, :n] = rng.standard_normal((tokens, n)) * np.exp2(rng.integers(-6, 12, (tokens, 1)))
    return x


def _filled(n: int) -> int:
    return -(-n // 16) * 16


def _row_bytes(n: int) -> int:
    """LDS that a row takes while it is quantised: row_bytes_of() of arithmetic.h."""
    return 64 * (-(-_filled(n) // 512) * 32 + 4)


def _norm(rng: np.random.Generator, n: int) -> np.ndarray:
    """A norm's weights, filled up with zeros like the rows that meet them."""
    norm = np.zeros(_filled(n), np.float32)
    norm[:n] = rng.standard_normal(n)
    return norm


def _padded_int8(x: np.ndarray, padded: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(q int8 [tokens, padded], scale, sum) of rows, as the oracle quantises them."""
    q, scale = reference.quantize(x)
    wide = np.zeros((len(x), padded), np.int8)
    wide[:, : x.shape[1]] = q
    return wide, scale, wide.sum(axis=1, dtype=np.int32)


@pytest.mark.parametrize("n", [37, 256, 700])
@pytest.mark.parametrize("with_norm", [True, False], ids=["norm", "plain"])
def test_norm(engine: Program, n: int, with_norm: bool) -> None:
    """RMSNorm and quantisation of three tokens; what is beyond the columns becomes 0."""
    rng, stride, padded = _rng(1, n), _filled(n) + 16, -(-n // 320) * 320
    x = _rows(rng, 3, n, stride)
    x[1, :n] = 0  # a row of zeros has the scale 127 / 1e-5
    norm = _norm(rng, n) if with_norm else None
    q = np.full((3, padded + 64), 99, np.int8)
    scale, total, status = np.zeros(3, np.float32), np.zeros(3, np.int32), np.zeros(1, np.uint32)
    argument = pack(
        x, np.int32(stride), norm, np.int32(n), np.float32(EPS), (q, scale, total, np.int32(padded + 64)),
        np.int32(padded), status,
    )  # fmt: skip
    arrays = [a for a in (x, norm, q, scale, total, status) if a is not None]
    x.flags.writeable = False
    launch_both_ways(
        engine, "halo_norm", (3, 1, 1), (THREADS, 1, 1), argument, arrays, lds=SCRATCH + _row_bytes(n)
    )
    rows = reference.rmsnorm(x[:, :n], norm[:n], EPS) if norm is not None else x[:, :n]
    want_q, want_scale, want_sum = _padded_int8(rows, padded)
    assert (q[:, :padded] == want_q).all() and (q[:, padded:] == 99).all()
    assert (scale == want_scale).all() and (total == want_sum).all() and status[0] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_norm_says_what_is_not_finite(engine: Program, bad: float) -> None:
    """A damaged model's activation sets the status word and quantises to zeros; other tokens are as ever."""
    x = _rows(_rng(2), 2, 40, 48)
    x[1, 7] = bad
    q, scale = np.full((2, 320), 9, np.int8), np.zeros(2, np.float32)
    total, status = np.zeros(2, np.int32), np.zeros(1, np.uint32)
    norm = _norm(_rng(2), 40)
    argument = pack(
        x,
        np.int32(48),
        norm,
        np.int32(40),
        np.float32(EPS),
        (q, scale, total, np.int32(320)),
        np.int32(320),
        status,
    )
    arrays = [x, norm, q, scale, total, status]
    launch_both_ways(
        engine, "halo_norm", (2, 1, 1), (THREADS, 1, 1), argument, arrays, lds=SCRATCH + _row_bytes(40)
    )
    want, _, _ = _padded_int8(reference.rmsnorm(x[:1, :40], norm[:40], EPS), 320)
    assert status[0] == 1 and not q[1].any() and (q[:1] == want).all()


@pytest.mark.parametrize("hidden", [16, 50, 300])
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "f32"])
def test_embed(engine: Program, hidden: int, bf16: bool) -> None:
    """Rows of the embedding as float32, zeros behind them; slots and positions for the others to read."""
    rng, stride = _rng(3, hidden), _filled(hidden) + 16
    table = rng.integers(0, 1 << 16, (7, hidden)).astype(np.uint16) & np.uint16(0xBFFF)
    rows = table if bf16 else rng.standard_normal((7, hidden)).astype(np.float32)
    want = (table.astype(np.uint32) << 16).view(np.float32) if bf16 else rows
    tokens, slots, positions = (np.array(v, np.int32) for v in ([6, 0, 3], [2, 1, 0], [11, 500, 0]))
    x = np.full((3, stride), 5, np.float32)
    to_slots, to_positions = np.zeros(3, np.int32), np.zeros(3, np.int32)
    cosine, sine = rng.standard_normal((2, 501, 20)).astype(np.float32)
    rope_now = np.zeros((3, 2, 20), np.float32)
    argument = pack(
        rows, np.uint64(rows.strides[0]), np.int32(bf16), np.int32(hidden), np.int32(stride),
        (tokens, slots, positions), x, to_slots, to_positions, cosine, sine, np.int32(20), rope_now,
    )  # fmt: skip
    arrays = [rows, tokens, slots, positions, x, to_slots, to_positions, cosine, sine, rope_now]
    launch_both_ways(engine, "halo_embed", (3, 1, 1), (THREADS, 1, 1), argument, arrays)
    assert (x[:, :hidden].view(np.uint32) == want[tokens].view(np.uint32)).all() and not x[:, hidden:].any()
    assert (to_slots == slots).all() and (to_positions == positions).all()
    assert (rope_now == np.stack([cosine[positions], sine[positions]], axis=1)).all()


@pytest.mark.parametrize("count", [1, 5, 16])
def test_publish(engine: Program, count: int) -> None:
    """Ids and the status go to the host's memory, and the status is cleared for the next step."""
    ids, status = np.arange(16, dtype=np.int32) * 7, np.array([1], np.uint32)
    host_ids, host_status = np.full(16, -1, np.int32), np.zeros(1, np.uint32)
    argument = pack(ids, status, np.int32(count), host_ids, host_status)
    launch_both_ways(
        engine, "halo_publish", (1, 1, 1), (32, 1, 1), argument, [ids, status, host_ids, host_status]
    )
    assert (host_ids[:count] == ids[:count]).all() and (host_ids[count:] == -1).all()
    assert host_status[0] == 1 and status[0] == 0


@pytest.mark.parametrize("packing", ["two", "three"])
@pytest.mark.parametrize(
    ("rows", "interleaved", "cols"), [((5, 3, 9), 0, 37), ((24, 8, 8), 0, 330), ((13, 13, 0), 1, 96)]
)
def test_repack(
    engine: Program, packing: str, rows: tuple[int, int, int], interleaved: int, cols: int
) -> None:
    """The prepared file's tiles of up to three matrices become the GPU's, behind one another or in turns."""
    rng = _rng(4, cols)
    codes = [rng.integers(0, 3, (n, cols), dtype=np.uint8) for n in rows]
    sources: list[np.ndarray | None] = [tiles.ternary_tiles(part) if len(part) else None for part in codes]
    whole = np.concatenate(codes)
    if interleaved:
        whole = np.stack(codes[:2], axis=1).reshape(-1, cols)
    want = layouts.device_tiles(packing, whole)
    got = np.full(want.shape, 0xEEEEEEEE, np.uint32)
    argument = pack(
        *sources, np.int32(rows[0]), np.int32(rows[1]), np.int32(interleaved), np.int32(len(whole)),
        np.int32(cols), np.int32(want.shape[0]), np.int32(want.shape[1]), got,
    )  # fmt: skip
    arrays = [*(source for source in sources if source is not None), got]
    grid = (-(-want.size // THREADS), 1, 1)
    launch_both_ways(engine, f"halo_repack_{packing}", grid, (THREADS, 1, 1), argument, arrays)
    assert (got == want).all()


class _Product:
    """A ternary product of some tokens: the arrays of a launch, and what the oracle says."""

    def __init__(
        self, packing: str, epilogue: str, shape: tuple[int, int], tokens: int, *, silu: bool
    ) -> None:
        self.rows, self.n = shape
        rng = _rng(5, *shape, tokens)
        self.codes = rng.integers(0, 3, shape, dtype=np.uint8)
        self.tiles = layouts.device_tiles(packing, self.codes)
        self.scales = np.exp2(rng.standard_normal(self.rows)).astype(np.float32)
        self.packing, self.epilogue, self.tokens, self.silu = packing, epilogue, tokens, silu
        self.x = _rows(rng, tokens, self.n, _filled(self.n))
        self.norm = _norm(rng, self.n)
        self.out = rng.standard_normal((tokens, self.rows + 5)).astype(np.float32)
        self.status = np.zeros(1, np.uint32)

    def want(self, x: np.ndarray) -> np.ndarray:
        """The output rows, for activations that went through their norm."""
        q, scale = reference.quantize(x)
        sums = (q.astype(np.int64) @ (self.codes.astype(np.int64) - 1).T).astype(np.float32)
        y = sums * self.scales / scale[:, None]
        out = self.out.copy()
        if self.epilogue == "gated":
            hidden = reference.gated(y[:, 0::2], y[:, 1::2], "silu" if self.silu else "relu2")
            out[:, : hidden.shape[1]] = hidden
        else:
            out[:, : self.rows] = out[:, : self.rows] + y if self.epilogue == "add" else y
        return out

    def launch(
        self, engine: Program, name: str, blocks: int, int8: tuple[np.ndarray, ...], room: int
    ) -> None:
        """`int8`: q, scale and sum of the tokens, or nothing: then each block makes them."""
        tile_count, steps = self.tiles.shape[:2]
        of_rows = (*int8, np.int32(int8[0].shape[1])) if int8 else (None, None, None, np.int32(0))
        argument = pack(
            self.tiles, self.scales, np.int32(self.rows), np.int32(tile_count), np.int32(steps), self.x,
            None if int8 else self.norm, np.int32(self.n), np.float32(EPS), of_rows, np.int32(self.tokens),
            np.int32(self.x.shape[1]), np.int32(self.out.shape[1]), np.int32(self.silu),
            np.int32(EPILOGUES.index(self.epilogue)), self.out, self.status,
        )  # fmt: skip
        share = -(-tile_count // blocks) + 1
        lds = room + max(1, _pieces(name)) * share * layouts.TILE_ROWS * 4
        for array in (self.tiles, self.scales, self.x, self.norm, *int8):
            array.flags.writeable = False
        arrays = [self.tiles, self.scales, self.x, self.norm, *int8, self.out, self.status]
        launch_both_ways(
            engine, name, (blocks, 1, 1), (engine.threads(name), 1, 1), argument, arrays, lds=lds
        )


def _pieces(name: str) -> int:
    return int(name.rsplit("_", 1)[1])


SHAPES = [(11, 37), (24, 300), (42, 700)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("epilogue", ["store", "add", "gated", "silu"])
@pytest.mark.parametrize("packing", ["two", "three"])
def test_product_of_one_token(engine: Program, packing: str, epilogue: str, shape: tuple[int, int]) -> None:
    """Norm, quantisation and product in one kernel, in one block and in three."""
    silu, name = epilogue == "silu", "gated" if epilogue == "silu" else epilogue
    if name == "gated":
        shape = (shape[0] // 2 * 2, shape[1])
    for blocks in (1, 3) if shape[0] > 24 else (1,):
        product = _Product(packing, name, shape, 1, silu=silu)
        want = product.want(reference.rmsnorm(product.x[:, : product.n], product.norm[: product.n], EPS))
        room = SCRATCH + _row_bytes(product.n) + product.tiles.shape[1] * layouts.COLS[packing]
        product.launch(engine, f"halo_{packing}_1", blocks, (), room)
        assert (product.out == want).all() and product.status[0] == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("packing", ["two", "three"])
def test_product_of_one_token_that_is_quantised(
    engine: Program, packing: str, shape: tuple[int, int]
) -> None:
    product = _Product(packing, "add", shape, 1, silu=False)
    x, padded = product.x[:, : product.n], product.tiles.shape[1] * layouts.COLS[packing]
    room, want = SCRATCH + _row_bytes(product.n) + padded, product.want(x)
    product.launch(engine, f"halo_{packing}_1", 2, _padded_int8(x, padded), room)
    assert (product.out == want).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [2, 3, 7, 13])
@pytest.mark.parametrize("epilogue", ["store", "add", "gated"])
@pytest.mark.parametrize("packing", ["two", "three"])
def test_product_of_several_tokens(
    engine: Program, packing: str, epilogue: str, tokens: int, shape: tuple[int, int]
) -> None:
    """Quantised rows; most kernels with fewer tokens than they have room for."""
    if epilogue == "gated":
        shape = (shape[0] // 2 * 2, shape[1])
    which = 1 << max(1, (tokens - 1).bit_length())
    product = _Product(packing, epilogue, shape, tokens, silu=False)
    x = product.x[:, : product.n]
    steps, cols = product.tiles.shape[1], layouts.COLS[packing]
    piece, want = min(MANY // (which * cols), steps), product.want(x)
    product.launch(
        engine, f"halo_{packing}_{which}", 2 if shape[0] > 16 else 1,
        _padded_int8(x, steps * cols), which * piece * cols,
    )  # fmt: skip
    assert (product.out == want).all()
