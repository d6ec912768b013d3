"""The oracle: a whole forward pass in NumPy that defines what right means. Not fast, and not meant to be.

Two kinds of arithmetic, both defined to the last bit, so that a native backend can be compared with `==`:

Integers. A ternary projection quantises its input per token, s = 127 / max(max|x|, 1e-5), q =
round_half_even(x * s) in float32, and sums weight * q exactly; then y = float32(sum) * row_scale / s. The
sums are made here by a float32 (or float64) matrix product of small integers, which is exact in any order
while they stay below 2^24 (2^53).

Floats. engine/arithmetic.py states the order of sums, engine/kv_forms.py that of the attention and the forms
of the KV cache. All else is one float32 operation an element, as it is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from engine.arithmetic import LANES, dot, exp, fma, in_lanes, tree
from engine.backend import DEFAULT_KV
from engine.errors import HaloError
from engine.formats.h1b import unpack_codes
from engine.formats.prepared import rope_tables
from engine.kv_forms import Cache, append, attend, new_cache
from engine.model import Layer, Model, Ternary

if TYPE_CHECKING:
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]
    F64 = NDArray[np.float64]


def rmsnorm(x: F32, weight: F32, eps: float) -> F32:
    """x * (1 / sqrt(mean(x^2) + eps)) * weight over the last axis."""
    mean = dot(x, x) / np.float32(x.shape[-1])
    inverse = np.float32(1) / np.sqrt(mean + np.float32(eps))
    result: F32 = x * inverse[..., None] * weight
    return result


def quantize(x: F32) -> tuple[F32, F32]:
    """Per token int8 absmax: (q as float32 holding integers, s), with q = round_half_even(x * s)."""
    scale = np.float32(127) / np.maximum(np.abs(x).max(axis=-1), np.float32(1e-5))
    q = np.clip(np.rint(x * scale[..., None]), -128, 127)
    return q.astype(np.float32), scale.astype(np.float32)


def silu(x: F32) -> F32:
    """x / (1 + e^-x), for any finite x, without a branch and with one exponential of what is never above 0.

    The definition, one float32 operation at each sign, `exp` of engine/arithmetic.py (e is e^-86 or more):

        p = max(x, 0);  n = x - p;  e = exp(n - p);  silu(x) = (p + n * e) / (1 + e)

    One of p and n is zero, so x - p, n - p = -|x| and p + ... are exact, and a fused n * e + p gives the same
    bits. It is x / (1 + e^-x) for x >= 0 and x e^x / (1 + e^x) below; +0 for either zero. An infinite or
    undefined x stays one.
    """
    p = np.maximum(x, np.float32(0))
    n = x - p
    e = exp(n - p)
    result: F32 = (p + n * e) / (np.float32(1) + e)
    return result


def gated(gate: F32, up: F32, activation: str) -> F32:
    """The FFN's hidden values: max(gate, 0) * max(gate, 0) * up for relu2, silu(gate) * up for silu.

    Multiplied from the left, one float32 operation each.
    """
    if activation == "silu":
        return silu(gate) * up
    positive = np.maximum(gate, np.float32(0))
    result: F32 = positive * positive * up
    return result


class _Projection:
    """A ternary matrix, unpacked to floats that hold -1, 0 and 1."""

    def __init__(self, matrix: Ternary) -> None:
        exact = np.float32 if matrix.cols * 128 < 1 << 24 else np.float64
        self.weights = (unpack_codes(matrix).astype(np.int8) - 1).astype(exact)
        self.scales = np.array(matrix.scales, dtype=np.float32)

    def __call__(self, q: F32, scale: F32) -> F32:
        sums = (q.astype(self.weights.dtype) @ self.weights.T).astype(np.float32)
        result: F32 = sums * self.scales / scale[:, None]
        return result


class _Layer:
    def __init__(self, layer: Layer) -> None:
        self.norms = layer
        self.q, self.k, self.v, self.o = (_Projection(m) for m in (layer.q, layer.k, layer.v, layer.o))
        self.gate, self.up, self.down = (_Projection(m) for m in (layer.gate, layer.up, layer.down))


class Reference:
    """A model that runs in NumPy. Its results are the definition of right."""

    def __init__(self, model: Model, kv: str = DEFAULT_KV) -> None:
        """`kv`: the form of its caches, one of engine.backend.KV_FORMS."""
        self.config, self.kv = model.config, kv
        self.embedding = np.array(model.embedding, dtype=np.float32)
        head = self.embedding if model.head is None else np.array(model.head, dtype=np.float32)
        # Kept in float64 and in lanes: the head is the slowest part, and fma() starts by widening.
        self.head: NDArray[np.floating] = in_lanes(head).astype(np.float64)
        self.final_norm = np.array(model.final_norm)
        self.layers = [_Layer(layer) for layer in model.layers]
        self.cosine, self.sine = rope_tables(model.config)

    def new_cache(self) -> Cache:
        """An empty KV cache with room for max_seq_len tokens."""
        c = self.config
        return new_cache((c.num_layers, c.num_kv_heads, c.max_seq_len, c.head_dim), self.kv)

    def forward(self, tokens: Sequence[int], cache: Cache) -> F32:
        """Run `tokens` after what the cache holds, which grows; logits float32 [len(tokens), vocab]."""
        return self._logits(self._hidden(tokens, cache))

    def hidden_states(self, tokens: Sequence[int]) -> list[F32]:
        """The residual stream of `tokens` alone: the embedding, then after each layer; [len(tokens), hidden].

        Before the final norm throughout, so the last is not what transformers calls the last hidden state.
        """
        states: list[F32] = []
        self._hidden(tokens, self.new_cache(), states)
        return states

    def greedy(self, prompt_ids: Sequence[int], n: int) -> list[int]:
        """The n tokens that follow the prompt when the likeliest (the lowest id on a tie) is always taken."""
        cache, fed, result = self.new_cache(), list(prompt_ids), []
        for _ in range(n):
            logits = self._logits(self._hidden(fed, cache)[-1:])
            result.append(int(np.argmax(logits[0])))
            fed = result[-1:]
        return result

    def _logits(self, x: F32) -> F32:
        normed = in_lanes(rmsnorm(x, self.final_norm, self.config.rms_norm_eps))
        result = np.empty((len(x), self.config.vocab_size), dtype=np.float32)
        for row, blocks in enumerate(normed):
            lanes = np.zeros((self.config.vocab_size, LANES), dtype=np.float32)
            for step, block in enumerate(blocks):
                lanes = fma(self.head[:, step], block, lanes)
            result[row] = tree(lanes)
        return result

    def _hidden(self, tokens: Sequence[int], cache: Cache, states: list[F32] | None = None) -> F32:
        c = self.config
        end = cache.length + len(tokens)
        if not tokens or min(tokens) < 0 or max(tokens) >= c.vocab_size:
            raise HaloError(
                "The tokens to run are none, or outside the vocabulary.", hint="check the tokenizer"
            )
        if end > c.max_seq_len:
            raise HaloError(
                f"{end} tokens do not fit the context of {c.max_seq_len}.", hint="use a shorter prompt"
            )
        x: F32 = self.embedding[np.asarray(tokens)]
        positions = np.arange(cache.length, end)
        states = [] if states is None else states
        states.append(x)
        for index, layer in enumerate(self.layers):
            x = x + self._attention(layer, index, x, positions, cache)
            x = x + self._feed_forward(layer, x)
            states.append(x)
        cache.length = end
        return x

    def _attention(
        self, layer: _Layer, index: int, x: F32, positions: NDArray[np.int64], cache: Cache
    ) -> F32:
        c, n = self.config, len(x)
        quantized = self._quantized(x, layer.norms.input_norm)
        q = self._rotate(layer.q(*quantized).reshape(n, c.num_heads, c.head_dim), positions)
        k = self._rotate(layer.k(*quantized).reshape(n, c.num_kv_heads, c.head_dim), positions)
        v = layer.v(*quantized).reshape(k.shape)
        append(cache, index, positions, k, v)
        rows = attend(cache, index, positions, q.reshape(n, c.num_kv_heads, -1, c.head_dim))
        return layer.o(*self._quantized(rows.reshape(n, c.q_size), layer.norms.attn_sub_norm))

    def _rotate(self, x: F32, positions: NDArray[np.int64]) -> F32:
        """Rotate-half RoPE of x [n, heads, head_dim]: element i turns with element i + head_dim/2."""
        cosine, sine = self.cosine[positions][:, None], self.sine[positions][:, None]
        first, second = np.split(x, 2, axis=-1)
        return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)

    def _feed_forward(self, layer: _Layer, x: F32) -> F32:
        quantized = self._quantized(x, layer.norms.post_attn_norm)
        hidden = gated(layer.gate(*quantized), layer.up(*quantized), self.config.activation)
        return layer.down(*self._quantized(hidden, layer.norms.ffn_sub_norm))

    def _quantized(self, x: F32, norm: F32 | None) -> tuple[F32, F32]:
        """x as the int8 values of a projection, through its RMSNorm where the model has one there."""
        return quantize(x if norm is None else rmsnorm(x, norm, self.config.rms_norm_eps))
