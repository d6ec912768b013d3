"""Attention and the KV cache of a decode step as gfx1151 machine code, in the emulator: the oracle's bits.

Each launch writes the tokens' keys and values and attends over the cache, in each of its forms. Runs where
HALO_TINYGRAD names a checkout of tinygrad: docs/hip-proof.md.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.hip.attention_cases import FORMS, Batch, shape_of
from tests.engine.hip.emulator import Program

KERNELS = {f"halo_{what}_{form}" for what in ("append", "attend") for form in ("f16", "int8", "rotor3")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(24, 2, 3), (64, 1, 2), (128, 2, 1)], ids=str)
def test_append(engine: Program, form: str, shape: tuple[int, int, int]) -> None:
    """Keys (turned) and values of three slots get to their places, and nothing else changes."""
    step = Batch(form, shape_of(form, shape), [(2, 0), (0, 17), (1, 300)])
    data, scales = step.memory()
    step.decode(engine, f"halo_append_{form}", data, scales)
    step.oracle()
    want, want_scales = step.memory()
    assert (data == want).all() and (scales == want_scales).all() and step.status[0] == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(24, 2, 3), (32, 1, 5), (128, 1, 4)], ids=str)
def test_attend_in_one_block(engine: Program, form: str, shape: tuple[int, int, int]) -> None:
    """Tokens at the beginning, amid a chunk and at a block's last position."""
    step = Batch(form, shape_of(form, shape), [(2, 0), (1, 37), (0, 255)])
    data, scales = step.memory()
    got = step.decode(engine, f"halo_attend_{form}", data, scales)
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
    step = Batch(form, shape_of(form, shape), [(1, position), (0, 3)])
    data, scales = step.memory()
    got = step.decode(engine, f"halo_attend_{form}", data, scales)
    assert (got == step.oracle()).all() and step.status[0] == 0


@pytest.mark.parametrize("form", FORMS)
def test_attend_with_a_head_that_is_certain(engine: Program, form: str) -> None:
    """Scores hundreds apart: all weight goes to one position, the others' e^x is at its floor."""
    step = Batch(form, shape_of(form, (32, 1, 2)), [(0, 40)], large=60)
    data, scales = step.memory()
    got = step.decode(engine, f"halo_attend_{form}", data, scales)
    assert (got == step.oracle()).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0**41])
def test_a_value_that_attention_cannot_bear_sets_the_status(engine: Program, form: str, bad: float) -> None:
    """The step fails with HALO_NUMERIC on the host; the kernel itself goes on with a 0."""
    step = Batch(form, shape_of(form, (32, 1, 2)), [(0, 5)])
    step.qkv[0, 3] = bad
    data, scales = step.memory()
    got = step.decode(engine, f"halo_attend_{form}", data, scales)
    assert step.status[0] == 1 and np.isfinite(got).all()
