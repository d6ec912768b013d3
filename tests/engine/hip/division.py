"""v_div_scale_f32 and v_div_fmas_f32 of gfx11 in NumPy: what makes a division exact at its extremes.

The compiler makes x / y of v_div_scale (both operands), v_rcp, fused multiply-adds, v_div_fmas and
v_div_fixup. Source: AMD's "RDNA3.5" ISA reference guide, corrected where a quotient would not come out:
v_div_fmas takes back what v_div_scale did, by 2^64 or 2^-64 (the guide says 2^32; tinygrad found this on
hardware), and a denominator whose inverse is subnormal is scaled down (it says up). tinygrad's own
v_div_scale is wrong for tiny numerators. What the card does at such extremes is not proved by this.
"""

from __future__ import annotations

import numpy as np


def _exponent(x: np.ndarray) -> np.ndarray:
    """The biased exponent."""
    field: np.ndarray = (x.view(np.uint32) >> 23 & 255).astype(np.int32)
    return field


def _subnormal(x: np.ndarray) -> np.ndarray:
    """Of float64 values: what float32 has below its smallest normal number, zero left out."""
    tiny: np.ndarray = (x != 0) & (np.abs(x) < 2.0**-126)
    return tiny


def div_scale(s0: np.ndarray, s1: np.ndarray, s2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(D, VCC) for S0 (which is S1, the denominator, or S2, the numerator), float32 [32]."""
    with np.errstate(all="ignore"):
        d, n = s1.astype(np.float64), s2.astype(np.float64)
        inverse, quotient = _subnormal(1 / d), _subnormal(n / d)
        of_denominator, of_numerator = (s0.view(np.uint32) == s.view(np.uint32) for s in (s1, s2))
        up, down = np.ldexp(s0, 64), np.ldexp(s0, -64)
    nothing = np.zeros(len(s0), bool)
    cases = [
        ((n == 0) | (d == 0), np.full(len(s0), np.nan, np.float32), nothing),
        (_exponent(s2) - _exponent(s1) >= 96, np.where(of_denominator, up, s0), ~nothing),
        (_subnormal(d), up, nothing),
        (inverse & quotient, np.where(of_denominator, down, s0), ~nothing),
        (inverse, down, nothing),
        (quotient, np.where(of_numerator, up, s0), ~nothing),
        (_exponent(s2) <= 23, up, nothing),
    ]
    conditions = [case[0] for case in cases]
    scaled = np.select(conditions, [case[1] for case in cases], s0).astype(np.float32)
    return scaled, np.select(conditions, [case[2] for case in cases], nothing)


def div_fmas(s0: np.ndarray, s1: np.ndarray, s2: np.ndarray, vcc: np.ndarray) -> np.ndarray:
    """fma(S0, S1, S2), where VCC scaled back; float32 [32].

    In 64 bits of mantissa (x87's), which hold the product exactly; so it is rounded once to float32 but for
    sums of more than 64 bits, whose last are far below a quotient's.
    """
    with np.errstate(all="ignore"):
        exact = s0.astype(np.longdouble) * s1.astype(np.longdouble) + s2.astype(np.longdouble)
        back = np.where(_exponent(s2) > 127, np.longdouble(2.0**64), np.longdouble(2.0**-64))
        result: np.ndarray = np.where(vcc, exact * back, exact).astype(np.float32)
    return result
