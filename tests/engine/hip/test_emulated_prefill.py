"""The prefill kernels as gfx1151 machine code, in the emulator: v_wmma products, attention.

Runs where HALO_TINYGRAD names a checkout of tinygrad: docs/hip-proof.md.
"""

from __future__ import annotations

import numpy as np
import pytest

from engine import reference
from tests.engine.hip import layouts
from tests.engine.hip.attention_cases import BLOCK, FORMS, Batch, shape_of
from tests.engine.hip.emulator import Program, launch_both_ways, pack

PREFILL = {"halo_prefill_f16"} | {
    f"halo_prefill_{form}{more}" for form in ("int8", "rotor3") for more in ("", "_256")
}
# tokens and rows of a block, waves that share the columns
SHAPES = {"middle": (128, 128, 1), "small": (64, 64, 2), "narrow": (32, 64, 4)}
KERNELS = PREFILL | {f"halo_gemm_{shape}_{digits}" for shape in SHAPES for digits in (2, 3)}
STAGES = 2
PACKINGS = {2: "two", 3: "three"}
EPILOGUES = ["store", "add", "gated"]


@pytest.mark.parametrize(("tokens", "rows", "cols"), [(5, 10, 37), (33, 66, 300), (17, 130, 650)])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("digits", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_gemm(
    engine: Program, shape: str, digits: int, epilogue: str, tokens: int, rows: int, cols: int
) -> None:
    """Tokens, rows and columns that fill no rectangle; columns of a step, of two and of three."""
    rng = np.random.default_rng([tokens, rows, cols])
    packing, silu = PACKINGS[digits], tokens % 2
    codes = rng.integers(0, 3, (rows, cols), dtype=np.uint8)
    weights = layouts.device_tiles(packing, codes)
    scales = np.exp2(rng.standard_normal(rows)).astype(np.float32)
    q = np.zeros((tokens, weights.shape[1] * layouts.COLS[packing]), np.int8)
    q[:, :cols] = rng.integers(-128, 128, (tokens, cols))
    x_scales, sums = rng.uniform(0.5, 90, tokens).astype(np.float32), q.sum(axis=1, dtype=np.int32)
    out = rng.standard_normal((tokens, rows + 6)).astype(np.float32)
    whole = q[:, :cols].astype(np.int64) @ (codes.astype(np.int64) - 1).T
    y = whole.astype(np.float32) * scales / x_scales[:, None]
    want = out.copy()
    if epilogue == "gated":
        want[:, : rows // 2] = reference.gated(y[:, 0::2], y[:, 1::2], "silu" if silu else "relu2")
    else:
        want[:, :rows] = want[:, :rows] + y if epilogue == "add" else y
    argument = pack(
        weights, scales, np.int32(rows), np.int32(weights.shape[0]), np.int32(weights.shape[1]),
        (q, x_scales, sums, np.int32(q.shape[1])), np.int32(tokens), np.int32(out.shape[1]),
        np.int32(EPILOGUES.index(epilogue)), np.int32(silu), out,
    )  # fmt: skip
    across, down, split = SHAPES[shape]
    grid = (-(-tokens // across), -(-rows // down), 1)
    lds = STAGES * 2 * split * across * layouts.COLS[packing] // 4
    for array in (weights, scales, q, x_scales, sums):
        array.flags.writeable = False
    arrays = [weights, scales, q, x_scales, sums, out]
    launch_both_ways(engine, f"halo_gemm_{shape}_{digits}", grid, (256, 1, 1), argument, arrays, lds=lds)
    assert (out == want).all()


def _tiles(batch: Batch) -> np.ndarray:
    """PrefillTile of prefill_launch.h: neighbours of one slot and block of positions, at most 64 queries."""
    found: list[list[int]] = []
    most = layouts.constant("kPrefillRows") // batch.group
    for token, (slot, position) in enumerate(zip(batch.slots, batch.positions, strict=True)):
        goes_on = found and slot == batch.slots[token - 1] and position == batch.positions[token - 1] + 1
        if not goes_on or position % BLOCK == 0 or found[-1][1] == most:
            found.append([token, 0, int(slot), int(position)])
        found[-1][1] += 1
    return np.array(found, np.int32)


def _attend(engine: Program, batch: Batch) -> np.ndarray:
    """The output rows of a batch whose keys and values are in the caches."""
    data, scales = batch.memory()
    tiles = _tiles(batch)
    units = -(-batch.width // 32) * 2
    query_bytes = 4 * units * 256
    argument = pack(
        batch.arguments(data, scales, None, None, 0), tiles, np.int32(len(tiles)), np.int32(units),
        np.int32(query_bytes),
    )  # fmt: skip
    for array in (data, scales, tiles):
        array.flags.writeable = False
    arrays = [*batch.inputs(), data, scales, tiles, batch.out, batch.status]
    if batch.form == "f16":
        rows = layouts.constant("kFloatRows")
        grid, threads = (len(tiles), batch.kv_heads, layouts.constant("kPrefillRows") // rows), 256
        name, lds = "halo_prefill_f16", 4 * rows * (BLOCK + 4 + batch.width)
    else:
        grid, threads = (len(tiles), batch.kv_heads, 1), 128
        name = f"halo_prefill_{batch.form}{'_256' if batch.width > 128 else ''}"
        lds = 4 * 64 + 2 * 4 * 2 * BLOCK + query_bytes + 2 * BLOCK * layouts.constant("kValueElements")
    launch_both_ways(engine, name, grid, (threads, 1, 1), argument, arrays, lds=lds)
    return batch.rows()


def _run(slot: int, first: int, count: int) -> list[tuple[int, int]]:
    return [(slot, first + i) for i in range(count)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        ((24, 2, 3), _run(0, 0, 5) + _run(1, 30, 3)),
        ((64, 1, 2), _run(0, 250, 12)),
        ((128, 1, 4), _run(0, 0, 18)),
        ((256, 1, 1), _run(0, 7, 2)),
        ((256, 2, 2), _run(0, 254, 4)),
        ((256, 1, 5), _run(1, 0, 3) + _run(0, 40, 2)),
    ],
    ids=["two-slots", "across-a-block", "two-tiles", "wide", "wide-across-a-block", "wide-two-slots"],
)
def test_attention_of_many_tokens(
    engine: Program, form: str, shape: tuple[int, int, int], tokens: list[tuple[int, int]]
) -> None:
    """Each token sees the cache up to itself: two slots, a block's border, two tiles, wide heads."""
    batch = Batch(form, shape_of(form, shape), tokens)
    want = batch.oracle()
    assert (_attend(engine, batch) == want).all() and batch.status[0] == 0


@pytest.mark.parametrize("form", FORMS)
def test_attention_that_is_certain(engine: Program, form: str) -> None:
    """Scores hundreds apart."""
    batch = Batch(form, shape_of(form, (32, 1, 2)), _run(0, 20, 3), large=40)
    want = batch.oracle()
    assert (_attend(engine, batch) == want).all()
