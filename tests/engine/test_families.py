"""The oracle's LLaMA graph and the families of ternary models, against code that nobody here wrote."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from engine.reference import exp, gated, silu


def test_silu_is_written_out_as_its_docstring_says() -> None:
    """The native code does these operations one by one: another order gives other last bits."""
    rng = np.random.default_rng(1)
    x = np.concatenate([rng.normal(size=500) * s for s in (1e-3, 1, 10, 100, 1e6)]).astype(np.float32)
    for value, got in zip(x, silu(x), strict=True):
        p = max(value, np.float32(0))
        n = np.float32(value - p)
        e = exp(np.array([-abs(value)], np.float32))[0]
        fused = np.float32(float(Fraction(float(n)) * Fraction(float(e)) + Fraction(float(p))))
        assert got == fused / (np.float32(1) + e) == np.float32(p + np.float32(n * e)) / np.float32(1 + e)


def test_silu_is_good_to_three_units_in_the_last_place() -> None:
    x = np.concatenate([np.geomspace(1e-30, 85, 4001), -np.geomspace(1e-30, 85, 4001)]).astype(np.float32)
    wide = x.astype(np.float64)
    exact = wide / (1 + np.exp(-wide))
    assert np.max(np.abs(silu(x) - exact) / np.abs(exact)) < 3 * 2**-23
    ends = silu(np.array([0.0, -0.0, 3e38, -1e30, -200], np.float32))
    assert ends[:3].tolist() == [0, 0, np.float32(3e38)] and not np.signbit(ends[:2]).any()
    assert (np.abs(ends[3:]) < 1e-7).all(), "where e^x stops at e^-86 the gate is shut all the same"


def test_a_gate_that_is_no_number_stays_none() -> None:
    """A damaged model must end in an error, not in a closed gate."""
    broken = np.array([np.nan, np.inf, -np.inf], np.float32)
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(gated(broken, np.ones(3, np.float32), "silu")).any()
