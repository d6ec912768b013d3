"""The emulator itself: what it runs equals NumPy, and what a card would not forgive is an error.

Code of the real hipcc for gfx1151 (probes.cpp). Runs where HALO_TINYGRAD names a checkout: docs/hip-proof.md.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from engine.arithmetic import fma
from tests.engine.hip import fragments, overrides
from tests.engine.hip.emulator import KernelFault, Program, launch, launch_both_ways, pack

LANE = np.arange(32)
ROW, IN_ROW = LANE // 16 * 16, LANE % 16
V = (LANE**2 % 61).astype(np.int32)


def _run(probes: Program, name: str, out: np.ndarray, *inputs: np.ndarray, n: int = 0, blocks: int = 1,
         threads: int = 32, lds: int = 0, both: bool = True) -> np.ndarray:  # fmt: skip
    pointers = [*inputs, *[None] * (3 - len(inputs))]
    run = launch_both_ways if both else launch
    argument = pack(*pointers, out, np.int32(n))
    run(probes, f"probe_{name}", (blocks, 1, 1), (threads, 1, 1), argument, [*inputs, out], lds=lds)
    return out


EXCHANGES: dict[str, Callable[[], np.ndarray]] = {
    "shuffle_xor": lambda: V + 64 * V[LANE ^ 16],
    "shuffle_down": lambda: V + 64 * V[np.where(LANE + 3 < 32, LANE + 3, LANE)],
    "row_xmask": lambda: V + V[LANE ^ 8],
    "row_ror": lambda: V + V[ROW + (IN_ROW - 3) % 16],
    "row_shl": lambda: V + np.where(IN_ROW + 4 < 16, V[np.minimum(LANE + 4, 31)], 0),
    "row_share": lambda: V + V[ROW + 3],
    "row_mirror": lambda: 64 * V[LANE ^ 15] + V[LANE ^ 7],
    "quad": lambda: V + V[LANE ^ 2],
    "dpp8": lambda: V + V[LANE // 8 * 8 + (0x53977 >> 3 * (LANE % 8) & 7)],
    "permlanex16": lambda: V + 64 * V[LANE ^ 16],
    "swizzle": lambda: V + 64 * V[LANE ^ 16],
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_exchange_between_lanes(probes: Program, name: str) -> None:
    assert (_run(probes, name, np.zeros(32, np.int32), V) == EXCHANGES[name]()).all()


def _wild(seed: int, n: int = 32 * 40) -> np.ndarray:
    """Floats of any size."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * np.exp2(rng.integers(-40, 40, n))).astype(np.float32)


def _any_bits(seed: int, n: int = 32 * 40) -> np.ndarray:
    """Any float but NaN: subnormals and infinities among them."""
    bits = np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint64).astype(np.uint32)
    return np.nan_to_num(bits.view(np.float32), nan=1.5, posinf=np.inf, neginf=-np.inf)


def _floats(probes: Program, name: str, *inputs: np.ndarray) -> np.ndarray:
    out = np.zeros(len(inputs[0]), np.float32)
    return _run(probes, name, out, *inputs, blocks=len(out) // 32)


def test_fused_multiply_add_rounds_once(probes: Program) -> None:
    """Sums that nearly vanish, and sums of subnormals."""
    x, y = _wild(1), _wild(2)
    near = (-(x.astype(np.float64) * y)).astype(np.float32)
    tiny = np.float32(1e-22) * _wild(3).clip(-1, 1)
    for a, b, c in (
        (x, y, near),
        (x, y, near * np.float32(1 + 2**-20)),
        (tiny, tiny, np.float32(1e-22) * tiny),
    ):
        assert (_floats(probes, "fma", a, b, c) == fma(a, b, c)).all()
    assert (_floats(probes, "multiply_add", x, y, near) == x * y + near).all()


@pytest.mark.parametrize("kind", [_wild, _any_bits])
def test_division_is_exact(probes: Program, kind: Callable[[int], np.ndarray]) -> None:
    """Also where v_rcp_f32 is off by a unit, and at quotients that are subnormal, vanish or overflow."""
    x, y = kind(4), kind(5)
    with np.errstate(all="ignore"):
        want = x / y
    got = _floats(probes, "divide", x, y)
    assert ((got == want) | (np.isnan(got) & np.isnan(want))).all()


def test_root_and_rounding_are_exact(probes: Program) -> None:
    x = np.abs(_wild(6))
    assert (_floats(probes, "root", x) == np.sqrt(x)).all()
    halves = np.array([0.5, 1.5, 2.5, -0.5, 0.49999997, 8388607.5, -8388609, 3.2], np.float32).repeat(8)
    assert (_floats(probes, "nearest", halves) == np.rint(halves)).all()


def test_dot4_takes_the_first_operand_unsigned(probes: Program) -> None:
    rng = np.random.default_rng(7)
    a, b, c = rng.integers(-(1 << 31), 1 << 31, (3, 32)).astype(np.int32)
    c //= 1 << 12
    want = (a.view(np.uint8).astype(np.int32) * b.view(np.int8)).reshape(32, 4).sum(
        axis=1, dtype=np.int32
    ) + c
    assert (_run(probes, "dot4", np.zeros(32, np.int32), a, b, c) == want).all()


def _matrices(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-128, 128, (2, 16, 16)).astype(np.int8)
    return a, b, rng.integers(-9999, 9999, (16, 16)).astype(np.int32)


def _fragments(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> list[np.ndarray]:
    """The registers of A, B and C as memory that lane l reads in one piece."""
    packed = (fragments.pack_operand(a), fragments.pack_operand(b.T.copy()), fragments.pack_accumulator(c))
    return [np.ascontiguousarray(registers.T) for registers in packed]


@pytest.mark.parametrize("tinygrads", [False, True], ids=["ours", "tinygrads"])
def test_matrix_instruction_agrees_with_the_map(
    probes: Program, monkeypatch: pytest.MonkeyPatch, tinygrads: bool
) -> None:
    """hipcc's v_wmma, run by this project's map, and by tinygrad's, which others wrote: three sums."""
    if tinygrads:
        monkeypatch.setattr(overrides, "find", lambda inst, name: None)
    code = Program(probes.code)  # decoded anew
    a, b, c = _matrices(8)
    out = np.zeros((32, 8), np.uint32)
    _run(code, "wmma", out, *_fragments(a, b, c), n=3, both=False)
    got = fragments.unpack_accumulator(np.ascontiguousarray(out.T))
    assert (got == 3 * (a.astype(np.int32) @ b.astype(np.int32)) + c).all()
    assert code.executed["V_WMMA_I32_16X16X16_IU8"] == 3


def test_barriers_and_dynamic_lds(probes: Program) -> None:
    x = np.arange(512, dtype=np.int32) ** 2 % 1009
    got = _run(probes, "tree", np.zeros(2, np.int32), x, blocks=2, threads=256, lds=1024)
    assert (got == x.reshape(2, 256).sum(axis=1)).all()


def test_whichever_block_comes_last_sees_all_of_them(probes: Program) -> None:
    x = np.arange(256, dtype=np.int32)
    out = _run(probes, "last_block", np.zeros(129, np.int32), x, blocks=4, threads=64, lds=4)
    assert out[0] == 4 and (out[65:] == 2 * x.reshape(4, 64).sum(axis=0)).all()


def test_two_waves_at_one_place_without_a_barrier_are_refused(probes: Program) -> None:
    with pytest.raises(KernelFault, match="LDS race"):
        _run(probes, "race", np.zeros(128, np.int32), np.zeros(128, np.int32), threads=128, lds=512)


def test_reading_past_an_array_is_refused(probes: Program) -> None:
    with pytest.raises(KernelFault, match="1 lanes outside every array; the first is 4 bytes past"):
        _run(probes, "past_the_end", np.zeros(32, np.int32), V)


def test_lds_past_its_end_is_refused(probes: Program) -> None:
    with pytest.raises(KernelFault, match="behind its 124 bytes"):
        _run(probes, "tree", np.zeros(1, np.int32), V, lds=124)


def test_a_read_only_array_is_not_written_to(probes: Program) -> None:
    out = np.zeros(32, np.int32)
    out.flags.writeable = False
    with pytest.raises(KernelFault, match="read-only"):
        _run(probes, "quad", out, V)


def test_a_result_that_depends_on_the_order_of_blocks_is_refused(probes: Program) -> None:
    with pytest.raises(KernelFault, match="in reverse"):
        _run(probes, "in_order", np.zeros(1, np.int32), V, blocks=3)


def test_lds_that_nobody_wrote_is_not_zero(probes: Program) -> None:
    assert (_run(probes, "uninitialised", np.zeros(32, np.float32), lds=128) != 0).all()


def test_scratch_memory_is_refused(probes: Program) -> None:
    with pytest.raises(KernelFault, match="scratch memory"):
        _run(probes, "scratch", np.zeros(32, np.int32), np.arange(40, dtype=np.int32))


def test_a_matrix_instruction_of_half_a_wave_is_refused(probes: Program) -> None:
    with pytest.raises(KernelFault, match="not all lanes are active"):
        _run(probes, "half_a_matrix", np.zeros((32, 8), np.uint32), *_fragments(*_matrices(9)))


def test_an_argument_of_another_size_is_refused(probes: Program) -> None:
    """The struct of a test and that of the kernel have drifted apart."""
    with pytest.raises(KernelFault, match=r"takes arguments of \[40\] bytes, and was given one struct of 24"):
        launch(probes, "probe_quad", (1, 1, 1), (32, 1, 1), pack(V, V, np.int32(0)), [V])
