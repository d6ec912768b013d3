"""The float arithmetic of the oracle: float32 operations in an order that is defined to the last bit.

A sum of products runs through 16 virtual lanes: element i goes to lane i % 16 by a fused multiply-add, in
rising i; the lanes are added as a tree, l with l+8, l+4, l+2, l+1. Not a model: that is engine/reference.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]
    F64 = NDArray[np.float64]

LANES: Final = 16
_HALF_ULP: Final = np.int64(1 << 28)
_BELOW_FLOAT: Final = np.int64((1 << 29) - 1)


def fma(a: F32 | F64, b: F32 | F64, c: F32) -> F32:
    """float32(a * b + c), rounded once; a and b hold float32 values (float64 arrays are taken as they are).

    The product of two float32 is exact in float64. Their sum with c is rounded to 53 bits, and rounding
    that again to 24 goes wrong only where it fell exactly half-way between two floats; there the lost part
    decides.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    half_way = (total.view(np.int64) & _BELOW_FLOAT) == _HALF_ULP
    if half_way.any():
        addend = np.broadcast_to(np.asarray(c, dtype=np.float64), total.shape)[half_way]
        total[half_way] = _off_half_way(
            np.broadcast_to(product, total.shape)[half_way], addend, total[half_way]
        )
    return total.astype(np.float32)


def _off_half_way(product: F64, addend: F64, total: F64) -> F64:
    """`total` moved one float64 towards what was lost in rounding product + addend (Knuth's two-sum)."""
    back = total - product
    lost = (product - (total - back)) + (addend - back)
    moved: F64 = np.where(lost == 0, total, np.nextafter(total, np.where(lost > 0, np.inf, -np.inf)))
    return moved


def tree(lanes: F32) -> F32:
    """Sum of the last axis, 16 lanes, as a tree."""
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
    return lanes[..., 0]


def in_lanes(x: NDArray[np.floating]) -> NDArray[np.floating]:
    """[..., n] -> [..., ceil(n/16), 16], filled up with zeros."""
    short = -x.shape[-1] % LANES
    if short:
        x = np.concatenate([x, np.zeros((*x.shape[:-1], short), dtype=x.dtype)], axis=-1)
    return x.reshape(*x.shape[:-1], -1, LANES)


def dot(a: F32, b: F32) -> F32:
    """Sum over the last axis of a * b in the defined order; leading axes broadcast."""
    left, right = in_lanes(a), in_lanes(b)
    shape = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    lanes = np.zeros((*shape, LANES), dtype=np.float32)
    for step in range(left.shape[-2]):
        lanes = fma(left[..., step, :], right[..., step, :], lanes)
    return tree(lanes)


def exp(x: F32) -> F32:
    """e^x for x <= 0, by the polynomial of Cephes' expf; below -86 it stays at e^-86."""
    x = np.maximum(x, np.float32(-86))
    f = np.float32
    magic = f(12582912)  # 1.5 * 2^23: adding it rounds to a whole number
    n = fma(x, np.full_like(x, f(1.44269504)), np.full_like(x, magic)) - magic
    r = fma(n, np.full_like(x, f(-0.693359375)), x)
    r = fma(n, np.full_like(x, f(2.12194440e-4)), r)
    p = np.full_like(x, f(1.9875691500e-4))
    for term in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(p, r, np.full_like(x, f(term)))
    p = fma(p, r * r, r) + f(1)
    return np.ldexp(p, n.astype(np.int32))
