"""The oracle: its arithmetic is what it says, and it is the published model, checked against other code."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.arithmetic import dot, exp, fma
from engine.errors import HaloError
from engine.formats.h1b import unpack_codes
from engine.model import Model, ModelConfig, Ternary
from engine.reference import Reference, quantize, rmsnorm
from tests.engine.formats_fixtures import random_model

FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


def rounded(value: Fraction) -> np.float32:
    """The nearest float32 of `value`, ties to even: the best of a first guess and its neighbours."""
    guess = np.float32(float(value))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(near, key=lambda x: (abs(Fraction(float(x)) - value), int(x.view(np.uint32)) & 1))


@given(FLOATS, FLOATS, FLOATS)
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    got = fma(np.array([a], np.float32), np.array([b], np.float32), np.array([c], np.float32))[0]
    if abs(exact) > 1e-30:
        assert got == rounded(exact)


def test_fma_rounds_once_where_two_roundings_differ() -> None:
    """Half-way between two floats, what is beyond float64 decides, and double rounding loses it."""
    a = np.array([1 + 2**-23, -(1 + 2**-23)], np.float32)
    tiny = np.float32(2**-60)
    for b, c in ((np.float32(2**-24), np.float32(1)), (tiny, np.float32(1 + 2**-23))):
        got = fma(a, np.full(2, b), np.array([c, -c], np.float32))
        want = [
            rounded(Fraction(float(x)) * Fraction(float(b)) + Fraction(float(s)))
            for x, s in zip(a, (c, -c), strict=True)
        ]
        assert got.tolist() == want
    # c = 2^24 + 2 and product = 1 + 2^-46..: exactly half-way plus a part that float64 cannot hold.
    product = (np.float32(1 + 2**-23), np.float32(1 + 2**-23))
    got = fma(*(np.array([x]) for x in product), np.array([2.0**24], np.float32))[0]
    assert got == np.float32(2**24 + 2)


def test_dot_runs_through_sixteen_lanes() -> None:
    """The order is the contract with the native code; another order would give other last bits."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50)).astype(np.float32)
    lanes = [np.float32(0)] * 16
    for i in range(50):
        lanes[i % 16] = rounded(
            Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(lanes[i % 16]))
        )
    for half in (8, 4, 2, 1):
        lanes = [np.float32(lanes[i] + lanes[i + half]) for i in range(half)]
    assert dot(a, b) == lanes[0]


def test_exp_is_good_to_two_units_in_the_last_place() -> None:
    x = np.concatenate([-np.geomspace(1e-6, 85.9, 4001), [0.0]]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(exp(x) - exact) / exact) < 2**-22
    assert exp(np.array([0.0], np.float32))[0] == 1.0
    assert 0 < exp(np.array([-1e30], np.float32))[0] < 1e-37


def test_quantise_rounds_half_to_even_and_fills_the_range() -> None:
    q, s = quantize(np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -127.0]], np.float32))
    assert s[0] == 1.0 and q[0].tolist() == [127, 0, 2, 2, 0, -127]
    q, s = quantize(np.zeros((1, 4), np.float32))
    assert s[0] == np.float32(127) / np.float32(1e-5) and not q.any()


def test_rmsnorm_survives_the_magnitudes_of_squared_relu() -> None:
    """relu(gate)^2 * up reaches 1e9 in the 2B model; its squares must not overflow."""
    x = np.full((1, 6912), 1e9, np.float32)
    assert np.allclose(rmsnorm(x, np.ones(6912, np.float32), 1e-5), 1.0, rtol=1e-6)


def weights(matrix: Ternary) -> Any:
    return (unpack_codes(matrix).astype(np.float64) - 1) * matrix.scales.astype(np.float64)[:, None]


class Textbook:
    """BitNet b1.58 and its LLaMA relatives as their authors' code has them: fake quantisation, in float64."""

    def __init__(self, model: Model) -> None:
        self.model, self.c = model, model.config

    def linear(self, x: Any, matrix: Ternary) -> Any:
        scale = 127 / np.maximum(np.abs(x).max(axis=-1, keepdims=True), 1e-5)
        return (np.round(x * scale).clip(-128, 127) / scale) @ weights(matrix).T

    def norm(self, x: Any, weight: Any) -> Any:
        if weight is None:
            return x
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.c.rms_norm_eps) * weight

    def rope(self, x: Any) -> Any:
        """As complex numbers: (x_i + i x_{i+half}) * e^(i position theta_i); x [n, heads, head_dim]."""
        half = self.c.head_dim // 2
        angle = np.outer(np.arange(len(x)), [self.c.rope_theta ** (-i / half) for i in range(half)])
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def attention(self, q: Any, k: Any, v: Any) -> Any:
        out = np.zeros_like(q)
        for head in range(self.c.num_heads):
            kv = head * self.c.num_kv_heads // self.c.num_heads
            scores = q[:, head] @ k[:, kv].T / math.sqrt(self.c.head_dim)
            scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[:, head] = p / p.sum(axis=-1, keepdims=True) @ v[:, kv]
        return out.reshape(len(q), -1)

    def logits(self, tokens: list[int]) -> Any:
        x = self.model.embedding[tokens].astype(np.float64)
        n = len(tokens)
        for layer in self.model.layers:
            h = self.norm(x, layer.input_norm)
            q, k, v = (self.linear(h, m).reshape(n, -1, self.c.head_dim) for m in (layer.q, layer.k, layer.v))
            mixed = self.attention(self.rope(q), self.rope(k), v)
            x = x + self.linear(self.norm(mixed, layer.attn_sub_norm), layer.o)
            h = self.norm(x, layer.post_attn_norm)
            gated = self.activated(self.linear(h, layer.gate)) * self.linear(h, layer.up)
            x = x + self.linear(self.norm(gated, layer.ffn_sub_norm), layer.down)
        head = self.model.embedding if self.model.head is None else self.model.head
        return self.norm(x, self.model.final_norm) @ head.T.astype(np.float64)

    def activated(self, gate: Any) -> Any:
        return gate / (1 + np.exp(-gate)) if self.c.activation == "silu" else np.maximum(gate, 0) ** 2


def agreement(ours: Any, theirs: Any) -> tuple[float, float]:
    """(median, largest) difference of the logits, in units of their standard deviation."""
    difference = np.abs(ours - theirs) / theirs.std()
    return float(np.median(difference)), float(difference.max())


# Why this much and no more. Both sides quantise the same way, and the integer part is exact, so they differ
# first by float32 rounding, about 1e-6. That moves no int8 value, except where x * s lies within about 1e-4
# of a half: there one activation flips by one step, 1/127 of the largest, and moves a sum over `cols` terms
# by about 1 / (40 sqrt(cols)) of its size: 1e-3 or so in these small models, and some flips add up over the
# layers. A wrong graph (the other RoPE pairing, SiLU, a missing sub-norm, a shifted mask) moves logits by
# their whole size.
MEDIAN, LARGEST = 5e-3, 0.15


@pytest.mark.parametrize("shape", ["plain", "odd", "wide"])
def test_the_oracle_is_the_textbook_model(tiny_model: Callable[..., Model], shape: str) -> None:
    model = tiny_model(shape)
    tokens = np.random.default_rng(5).integers(0, model.config.vocab_size, 48).tolist()
    oracle = Reference(model, "f32")
    median, largest = agreement(oracle.forward(tokens, oracle.new_cache()), Textbook(model).logits(tokens))
    assert median < MEDIAN and largest < LARGEST


RELATIVES = {
    # hidden, FFN, layers, heads, KV heads, vocabulary, context, tied, theta, eps, gate, sub-norms, head size
    "Falcon3": ModelConfig(96, 208, 2, 6, 2, 101, 64, False, 1000042.0, 1e-6, "silu", False, 32),
    "Falcon-E, odd": ModelConfig(90, 211, 2, 5, 1, 97, 64, True, 1e4, 1e-6, "silu", False),
    "1bitLLM": ModelConfig(96, 256, 2, 6, 6, 101, 64, True, 1e4, 1e-5, "silu", True),
    "BitNet, untied, narrow heads": ModelConfig(
        96, 208, 2, 4, 2, 101, 64, False, 5e5, 1e-5, "relu2", True, 10
    ),
}


@pytest.mark.parametrize("family", RELATIVES)
def test_the_oracle_is_the_textbook_of_each_family(family: str) -> None:
    """SiLU, no sub-norms, an own head, an own head size: each of them alone moves logits by their size."""
    model = random_model(RELATIVES[family], seed=2, one_scale=False)
    tokens = np.random.default_rng(5).integers(0, model.config.vocab_size, 48).tolist()
    oracle = Reference(model, "f32")
    median, largest = agreement(oracle.forward(tokens, oracle.new_cache()), Textbook(model).logits(tokens))
    assert median < MEDIAN and largest < LARGEST


def test_the_oracle_is_transformers_bitnet(tiny_model: Callable[..., Model]) -> None:
    """The authors' own graph in float32, with our weights; the fake quantisation is hooked in."""
    torch = pytest.importorskip(
        "torch", reason="torch is not installed: the comparison with transformers is left out"
    )
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = tiny_model("plain")
    c = model.config
    config = transformers.BitNetConfig(
        hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, vocab_size=c.vocab_size,
        max_position_embeddings=c.max_seq_len, rms_norm_eps=c.rms_norm_eps, tie_word_embeddings=True,
        hidden_act="relu2", rope_theta=c.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    )  # fmt: skip
    theirs = transformers.BitNetForCausalLM(config).float().eval()
    state = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.final_norm}
    for index, layer in enumerate(model.layers):
        name = f"model.layers.{index}"
        state[f"{name}.input_layernorm.weight"] = layer.input_norm
        state[f"{name}.post_attention_layernorm.weight"] = layer.post_attn_norm
        state[f"{name}.self_attn.attn_sub_norm.weight"] = layer.attn_sub_norm
        state[f"{name}.mlp.ffn_sub_norm.weight"] = layer.ffn_sub_norm
        for part, _, _ in c.projections():
            place = "self_attn" if part in "qkvo" else "mlp"
            state[f"{name}.{place}.{part}_proj.weight"] = weights(getattr(layer, part))
    tensors = {name: torch.tensor(np.array(value, dtype=np.float32)) for name, value in state.items()}
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()

    def fake_quantise(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        scale = 127 / inputs[0].abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
        return ((inputs[0] * scale).round().clamp(-128, 127) / scale, *inputs[1:])

    for name, module in theirs.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(fake_quantise)
    tokens = np.random.default_rng(5).integers(0, c.vocab_size, 48).tolist()
    oracle = Reference(model, "f32")
    with torch.no_grad():
        logits = theirs(torch.tensor([tokens])).logits[0].numpy()
    median, largest = agreement(oracle.forward(tokens, oracle.new_cache()), logits)
    assert median < MEDIAN and largest < LARGEST


def test_a_cache_filled_in_parts_gives_the_same_bytes(tiny_model: Callable[..., Model]) -> None:
    oracle = Reference(tiny_model("odd"))
    tokens = list(range(20))
    whole = oracle.forward(tokens, oracle.new_cache())
    cache = oracle.new_cache()
    parts = [oracle.forward(tokens[a:b], cache) for a, b in ((0, 1), (1, 8), (8, 9), (9, 20))]
    assert np.array_equal(np.concatenate(parts), whole)


def test_greedy_is_the_arg_max_of_forward(tiny_model: Callable[..., Model]) -> None:
    oracle = Reference(tiny_model("plain"))
    ids = oracle.greedy([1, 2, 3], 5)
    for count in range(5):
        logits = oracle.forward([1, 2, 3, *ids[:count]], oracle.new_cache())
        assert ids[count] == int(logits[-1].argmax())


@pytest.mark.parametrize("tokens", [[], [-1], [300], list(range(65))])
def test_tokens_that_cannot_run_are_refused(tiny_model: Callable[..., Model], tokens: list[int]) -> None:
    oracle = Reference(tiny_model("plain"))
    with pytest.raises(HaloError):
        oracle.forward(tokens, oracle.new_cache())
