"""The oracle's KV cache and attention, in each form that a cache may have. Not fast, and not meant to be.

    f32      keys and values as they are
    f16      rounded to float16, nearest even; what is beyond its range becomes its largest
    int8     x * 127 / m rounded half to even, m = max(max|x|, 1e-30) of the vector; the scale m / 127 is kept
    rotor3   "rotorquant": the vector is rotated (random signs, then the Walsh-Hadamard transform), so that
             its elements are near a Gaussian, and each becomes one of Max's eight levels for their rms
             (J. Max, Quantizing for minimum distortion, 1960); the scale of least squares is kept

A vector is one token's key or value of one KV head, after RoPE. The cache is walked in blocks of 256
positions. A block gives each query the largest score, the sum of the weights exp(score - largest), and the
sum of weight * value; blocks are merged in rising order, both sides scaled down to the larger of their
largest scores. So a block may be anybody's work, and the result is the same.

f32 and f16: the query is scaled by 1 / sqrt(head_dim) first; a score adds over the elements in rising order,
a value sum over the positions in rising order, by fused multiply-add. int8 and rotor3: the query becomes
int8 too (rotor3: after the same rotation; so a score needs no key turned back), and a score is the exact sum
times the key's scale times the query's. The weights, times their values' scales, are rounded to 15 bits of
the block's largest; their sums with the values' integers are exact. The sums of rotated values are turned
back once a query.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from engine.arithmetic import LANES, dot, exp, fma, in_lanes, tree
from engine.backend import DEFAULT_KV, check_kv_form
from engine.errors import HaloError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]

BLOCK: Final = 256
LEVELS: Final = np.array([13, 40, 71, 114], dtype=np.int32)  # Max's eight, in integers that keep their ratios
_BOUNDS: Final = tuple(np.float32(bound) for bound in (0.5006, 1.0500, 1.7480))
_MOST: Final = np.float32(2.0**40)  # of an element: no sum of the attention can overflow
_DTYPES: Final = {"f32": np.float32, "f16": np.float16, "int8": np.int8, "rotor3": np.int8}


@dataclass
class Cache:
    """Keys (after RoPE) and values so far, [layers, kv_heads, max_seq_len, head_dim] each, in `form`.

    float32 (f32), float16 (f16) or int8 (int8; rotor3, as levels); scales [layers, kv_heads, max_seq_len].
    """

    form: str
    keys: NDArray[Any]
    values: NDArray[Any]
    key_scales: F32
    value_scales: F32
    length: int = field(default=0)


def new_cache(shape: tuple[int, int, int, int], form: str = DEFAULT_KV) -> Cache:
    """An empty cache of `shape` [layers, kv_heads, max_seq_len, head_dim]. HaloError for what cannot be."""
    check_kv_form(form, shape[3])
    rows = [np.zeros(shape, dtype=_DTYPES[form]) for _ in range(2)]
    scales = [np.zeros(shape[:3], dtype=np.float32) for _ in range(2)]
    return Cache(form, rows[0], rows[1], scales[0], scales[1])


def append(cache: Cache, layer: int, positions: NDArray[np.int64], k: F32, v: F32) -> None:
    """Write keys and values, float32 [tokens, kv_heads, head_dim], of `positions` of a layer."""
    _check(k, v)
    for x, rows, scales in ((k, cache.keys, cache.key_scales), (v, cache.values, cache.value_scales)):
        vectors = x.transpose(1, 0, 2)
        if cache.form == "f32":
            rows[layer][:, positions] = vectors
        elif cache.form == "f16":
            rows[layer][:, positions] = np.clip(vectors, -65504, 65504).astype(np.float16)
        else:
            encode = to_int8 if cache.form == "int8" else to_rotor3
            rows[layer][:, positions], scales[layer][:, positions] = encode(vectors)


def attend(cache: Cache, layer: int, positions: NDArray[np.int64], q: F32) -> F32:
    """Attention of queries float32 [tokens, kv_heads, group, head_dim] over the positions up to each.

    `positions` rises by one from token to token.
    """
    _check(q)
    size, integers = q.shape[-1], cache.form in ("int8", "rotor3")
    scale = np.float32(1.0 / np.sqrt(np.float64(size)))
    query: NDArray[Any] = q * scale
    query_scales = np.zeros(q.shape[:-1], dtype=np.float32)
    if integers:
        if cache.form == "rotor3":
            q, scale = rotate(q), scale / np.float32(size)
        query, query_scales = to_int8(q)
        query_scales = query_scales * scale
    all_sums: tuple[F32, F32, F32] | None = None
    for start in range(0, int(positions[-1]) + 1, BLOCK):
        seen = positions >= start
        limits = np.minimum(positions[seen] + 1 - start, BLOCK)
        rows = slice(start, start + int(limits.max()))
        part = _block(cache, layer, rows, query[seen], query_scales[seen], limits)
        if all_sums is None:
            all_sums = part
        else:
            for whole, merged in zip(all_sums, merge(tuple(x[seen] for x in all_sums), part), strict=True):
                whole[seen] = merged
    assert all_sums is not None
    out = all_sums[2] / all_sums[1][..., None]
    return rotate_back(out) * np.float32(1 / size) if cache.form == "rotor3" else out


def _block(
    cache: Cache, layer: int, rows: slice, q: NDArray[Any], q_scales: F32, limits: NDArray[np.int64]
) -> tuple[F32, F32, F32]:
    """Largest score, sum of weights, sum of weighted values of the positions `rows`, for each query."""
    keys, values = cache.keys[layer][:, None, rows], cache.values[layer][:, None, rows]
    hidden = (np.arange(keys.shape[2]) >= limits[:, None])[:, None, None]
    if q.dtype == np.int8:
        sums = _exact(q[:, :, :, None], keys.swapaxes(-1, -2))[..., 0, :]
        scores = sums * cache.key_scales[layer][:, None, rows] * q_scales[..., None]
    else:
        scores = np.zeros((*q.shape[:3], keys.shape[2]), dtype=np.float32)
        for d in range(q.shape[3]):
            scores = fma(q[..., d, None], keys[..., d].astype(np.float32), scores)
    top = np.where(hidden, -np.inf, scores).max(axis=-1).astype(np.float32)
    weights = np.where(hidden, np.float32(0), exp(np.minimum(scores - top[..., None], np.float32(0))))
    if q.dtype == np.int8:
        return (
            top,
            _lane_sum(weights),
            _exact_values(weights, values, cache.value_scales[layer][:, None, rows]),
        )
    out = np.zeros(q.shape, dtype=np.float32)
    for j in range(keys.shape[2]):
        out = fma(weights[..., j, None], values[:, :, j].astype(np.float32), out)
    return top, _lane_sum(weights), out


def _exact_values(weights: F32, values: NDArray[np.int8], scales: F32) -> F32:
    """Sum of weight * scale * value, weight * scale rounded to 15 bits of its largest."""
    scaled = weights * scales
    most = np.maximum(scaled.max(axis=-1, keepdims=True), np.float32(1e-30))
    whole = np.rint(scaled * (np.float32(32767) / most))
    sums = _exact(whole[..., None, :], values)[..., 0, :]
    result: F32 = sums * (most / np.float32(32767))
    return result


def _exact(a: NDArray[Any], b: NDArray[Any]) -> F32:
    """The matrix product of whole numbers, exact in float64 whatever its order (below 2^31), rounded once."""
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)


def _lane_sum(weights: F32) -> F32:
    blocks = in_lanes(weights)
    lanes = np.zeros((*weights.shape[:-1], LANES), dtype=np.float32)
    for step in range(blocks.shape[-2]):
        lanes = lanes + blocks[..., step, :]
    return tree(lanes)


def merge(left: tuple[F32, ...], right: tuple[F32, ...]) -> tuple[F32, F32, F32]:
    """Two parts of a cache as one: (largest score, sum of weights, sum of weighted values) of each query."""
    top = np.maximum(left[0], right[0])
    a, b = exp(left[0] - top), exp(right[0] - top)
    total = fma(left[1], a, right[1] * b)
    return top, total, fma(left[2], a[..., None], right[2] * b[..., None])


def to_int8(x: F32) -> tuple[NDArray[np.int8], F32]:
    """The int8 form of vectors along the last axis, and their scales."""
    most = np.maximum(np.abs(x).max(axis=-1), np.float32(1e-30))
    codes = np.rint(x * (np.float32(127) / most)[..., None]).astype(np.int8)
    return codes, most / np.float32(127)


def to_rotor3(x: F32) -> tuple[NDArray[np.int8], F32]:
    """The rotor3 form of vectors along the last axis: levels (not codes), and their scales."""
    turned = rotate(x)
    rms = np.sqrt(dot(turned, turned) / np.float32(x.shape[-1]))
    size = np.abs(turned)
    code = sum((size > (bound * rms)[..., None]).astype(np.int32) for bound in _BOUNDS)
    levels = np.where(turned < 0, -LEVELS[code], LEVELS[code])
    squares = (levels * levels).sum(axis=-1).astype(np.float32)
    return levels.astype(np.int8), dot(turned, levels.astype(np.float32)) / squares


def signs(size: int) -> F32:
    """The rotation's signs: the highest bit of splitmix64's first `size` outputs from state 0."""
    mask = (1 << 64) - 1
    result = np.empty(size, dtype=np.float32)
    for i in range(size):
        z = (i + 1) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        result[i] = -1 if (z ^ z >> 31) >> 63 else 1
    return result


def _hadamard(x: F32) -> F32:
    """The Walsh-Hadamard transform along the last axis (a power of two), not normalised."""
    size, half = x.shape[-1], 1
    while half < size:
        pairs = x.reshape(*x.shape[:-1], -1, 2, half)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack([low + high, low - high], axis=-2).reshape(x.shape)
        half *= 2
    return x


def rotate(x: F32) -> F32:
    """The rotation of rotor3 along the last axis, sqrt(size) times too long."""
    return _hadamard(x * signs(x.shape[-1]))


def rotate_back(x: F32) -> F32:
    """The inverse of `rotate` but for its length: rotate_back(rotate(x)) is size * x."""
    return _hadamard(x) * signs(x.shape[-1])


def _check(*arrays: F32) -> None:
    if not all((np.abs(x) < _MOST).all() for x in arrays):  # NaN is not less
        raise HaloError(
            "A query, key or value is not finite or beyond 2^40: the model's weights are damaged.",
            hint="check the model: halo doctor",
        )
