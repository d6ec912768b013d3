"""The families of ternary models: SiLU to the last bit, and their checkpoints read as they are published.

That the graphs are right is shown in test_family_oracles.py, by code that nobody here wrote (but 1bitLLM's).
"""

from __future__ import annotations

import hashlib
import json
import random
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.arithmetic import exp
from engine.errors import HaloError
from engine.formats.h1b import unpack_codes
from engine.formats.hf import HfCheckpoint, open_checkpoint
from engine.formats.importer import in_memory
from engine.model import Model, Ternary
from engine.reference import gated, silu
from tests.engine.test_hf import Tensors, brain, half, rounded, save, scale_of, wide


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


FALCON3: dict[str, Any] = {  # tiiuae/Falcon3-*-Instruct-1.58bit, made small; head_dim is not hidden / heads
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000042,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "is_bitnet_config": True,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "bitnet"},
}
LLAMA3: dict[str, Any] = FALCON3 | {  # HF1BitLLM/Llama3-8B-1.58-100B-tokens
    "head_dim": None,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "rope_interleaved": False,
    "quantization_config": {"modules_to_not_convert": None, "quant_method": "bitnet"},
}
FALCON_E: dict[str, Any] = FALCON3 | {  # tiiuae/Falcon-E-*, as onebitllms writes it of a model that is tied
    "head_dim": None,
    "tie_word_embeddings": True,
    "quantization_config": {
        "modules_to_not_convert": ["model.embed_tokens", "lm_head", "model.norm"],
        "quant_method": "bitnet",
    },
}
ONE_BIT: dict[str, Any] = {  # 1bitLLM/bitnet_b1_58-large, -3B
    key: value for key, value in FALCON3.items() if key not in ("head_dim", "quantization_config")
} | {
    "architectures": ["BitnetForCausalLM"],
    "num_key_value_heads": 3,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "weight_bits": 1,
    "input_bits": 8,
}
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}


class Truth:
    """A model of known digits for a config: half of each matrix is zero, for an exact mean of masters."""

    def __init__(self, data: dict[str, Any]) -> None:
        rng = np.random.default_rng(7)
        heads, hidden, inter = data["num_attention_heads"], data["hidden_size"], data["intermediate_size"]
        width = data.get("head_dim") or hidden // heads
        q, kv = heads * width, data["num_key_value_heads"] * width
        shapes = {"self_attn.q": (q, hidden), "self_attn.k": (kv, hidden), "self_attn.v": (kv, hidden)}
        shapes |= {"self_attn.o": (hidden, q), "mlp.gate": (inter, hidden), "mlp.up": (inter, hidden)}
        shapes |= {"mlp.down": (hidden, inter)}
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if data["architectures"] == ["BitnetForCausalLM"]:
            norms |= {"self_attn.inner_attn_ln": q, "mlp.ffn_layernorm": inter}
        self.floats = {"model.embed_tokens.weight": rounded(rng.uniform(-2, 2, (data["vocab_size"], hidden)))}
        if not data["tie_word_embeddings"]:
            self.floats["lm_head.weight"] = rounded(rng.uniform(-2, 2, (data["vocab_size"], hidden)))
        self.floats["model.norm.weight"] = rounded(rng.uniform(0.5, 1.5, hidden))
        self.digits: dict[str, np.ndarray[Any, Any]] = {}
        for layer in range(data["num_hidden_layers"]):
            for name, size in norms.items():
                self.floats[f"model.layers.{layer}.{name}.weight"] = rounded(rng.uniform(0.5, 1.5, size))
            for name, (rows, cols) in shapes.items():
                digits = np.zeros(rows * cols, np.int8)
                digits[: rows * cols // 2] = rng.choice([-1, 1], rows * cols // 2)
                name = f"model.layers.{layer}.{name}_proj"
                self.digits[name] = rng.permutation(digits).reshape(rows, cols)
        self.signs = rng

    def tensors(self, of_matrix: Callable[[str, Any], Tensors], as_type: Any = brain) -> Tensors:
        tensors = {name: as_type(values) for name, values in self.floats.items()}
        for name, digits in self.digits.items():
            tensors |= of_matrix(name, digits)
        return tensors

    def packed(self) -> Tensors:
        """As `bitlinear` has it: quarters of rows, and the inverse of the scale."""

        def matrix(name: str, digits: Any) -> Tensors:
            quarters = np.split((digits + 1).astype(np.uint8), 4)
            codes = np.zeros_like(quarters[0])
            for i, quarter in enumerate(quarters):
                codes |= quarter << (2 * i)
            scale = brain(np.array([1 / scale_of(name)]))
            return {f"{name}.weight": ("U8", codes), f"{name}.weight_scale": scale}

        return self.tensors(matrix)

    def masters(self, as_type: Any = half) -> Tensors:
        """Zeros as +-scale/4, the others as +-scale 7/4: the mean of |W| is the scale, exactly."""

        def matrix(name: str, digits: Any) -> Tensors:
            small = self.signs.choice([-0.25, 0.25], digits.shape)
            return {f"{name}.weight": as_type(np.where(digits, 1.75 * digits, small) * scale_of(name))}

        return self.tensors(matrix, as_type)

    def dequantised(self) -> Tensors:
        """As onebitllms' convert_to_bf16 leaves it: 0 and +-scale in bf16; config.json does not tell."""
        return self.tensors(lambda name, digits: {f"{name}.weight": brain(digits * scale_of(name))})


def written(directory: Path, data: dict[str, Any], tensors: Tensors) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(data))
    save(directory / "model.safetensors", tensors)
    return directory


def model_of(opened: HfCheckpoint) -> Model:
    return in_memory(opened.stream)


FORMS: dict[str, tuple[dict[str, Any], Callable[[Truth], Tensors], str]] = {
    "Falcon3": (FALCON3, lambda t: t.packed(), "packed in U8"),
    "Llama3": (LLAMA3, lambda t: t.packed(), "packed in U8"),
    "Falcon-E": (FALCON_E, lambda t: t.packed(), "packed in U8"),
    "Falcon-E, head written out": (
        FALCON_E,
        lambda t: t.packed() | {"lm_head.weight": brain(t.floats["model.embed_tokens.weight"])},
        "packed in U8",
    ),
    "Falcon-E, bfloat16": (
        FALCON_E | {"quantization_config": None}, lambda t: t.dequantised(), "not quantised a second time"
    ),
    "Falcon-E, prequantized": (
        FALCON_E | {"quantization_config": ONLINE}, lambda t: t.masters(brain), "quantised by absmean"
    ),
    "1bitLLM, f16": (ONE_BIT, lambda t: t.masters(half), "quantised by absmean"),
    "1bitLLM, f32": (ONE_BIT, lambda t: t.masters(wide), "quantised by absmean"),
    "1bitLLM, with a buffer of RoPE": (
        ONE_BIT,
        lambda t: t.masters() | {"model.layers.0.self_attn.rotary_emb.inv_freq": wide(np.ones(8))},
        "quantised by absmean",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_family_is_read_as_its_digits_and_scales(tmp_path: Path, form: str) -> None:
    """Row quarters, code map, scale direction, double quantisation: each mistake gives fluent nonsense."""
    data, make, note = FORMS[form]
    truth = Truth(data)
    opened = open_checkpoint(written(tmp_path / "x", data, make(truth)))
    model = model_of(opened)
    assert opened.notes[0].startswith("14 matrices") and note in opened.notes[0]
    for index, layer in enumerate(model.layers):
        for part, rows, _ in model.config.projections():
            name = f"model.layers.{index}.{'self_attn' if part in 'qkvo' else 'mlp'}.{part}_proj"
            matrix: Ternary = getattr(layer, part)
            assert np.array_equal(unpack_codes(matrix).astype(int) - 1, truth.digits[name])
            assert matrix.scales.tolist() == [scale_of(name)] * rows
        prefix = f"model.layers.{index}."
        assert np.array_equal(layer.input_norm, truth.floats[f"{prefix}input_layernorm.weight"])
        assert np.array_equal(layer.post_attn_norm, truth.floats[f"{prefix}post_attention_layernorm.weight"])
        for norm, name in (
            (layer.attn_sub_norm, "self_attn.inner_attn_ln"),
            (layer.ffn_sub_norm, "mlp.ffn_layernorm"),
        ):
            want = truth.floats.get(f"{prefix}{name}.weight")
            assert norm is want is None or (norm is not None and np.array_equal(norm, want))
    assert np.array_equal(model.embedding, truth.floats["model.embed_tokens.weight"])
    head = truth.floats.get("lm_head.weight")
    assert model.head is head is None or (model.head is not None and np.array_equal(model.head, head))


def test_the_config_of_each_family_is_understood(tmp_path: Path) -> None:
    falcon3 = open_checkpoint(written(tmp_path / "a", FALCON3, Truth(FALCON3).packed())).config.model
    assert (falcon3.head_dim, falcon3.q_size, falcon3.kv_size) == (32, 96, 32)
    assert (falcon3.rope_theta, falcon3.rms_norm_eps) == (1000042.0, 1e-6)
    assert (falcon3.activation, falcon3.sub_norms, falcon3.tie_embeddings) == ("silu", False, False)
    bare = {key: ONE_BIT[key] for key in ONE_BIT if key not in ("rope_theta", "hidden_act", "weight_bits")}
    one_bit = open_checkpoint(written(tmp_path / "b", bare, Truth(ONE_BIT).masters())).config.model
    assert (one_bit.head_dim, one_bit.rope_theta, one_bit.rms_norm_eps) == (16, 10000.0, 1e-5)
    assert (one_bit.activation, one_bit.sub_norms, one_bit.tie_embeddings) == ("silu", True, True)


def test_the_hashes_are_those_of_the_files_that_were_read(tmp_path: Path) -> None:
    opened = open_checkpoint(written(tmp_path / "x", FALCON3, Truth(FALCON3).packed()))
    assert opened.source == {
        name: hashlib.sha256((tmp_path / "x" / name).read_bytes()).hexdigest()
        for name in ("config.json", "model.safetensors")
    }


def by_rows(truth: Truth) -> Tensors:
    """A scale for the upper and one for the lower half of the rows, as TriLM's tensor parallelism left it."""

    def matrix(name: str, digits: Any) -> Tensors:
        scales = np.where(np.arange(len(digits)) < len(digits) // 2, 0.5, 0.25)
        return {f"{name}.weight": half(digits * scales[:, None])}

    return truth.tensors(matrix)


PLAIN = FALCON3 | {"quantization_config": None}
REFUSED: dict[str, tuple[dict[str, Any], Callable[[Truth], Tensors], str]] = {
    "TriLM under another name": (PLAIN, by_rows, "several scales, as TriLM has"),
    "an ordinary LLaMA, or masters": (PLAIN, lambda t: t.masters(), "an ordinary LLaMA, or the masters"),
    "masters where packed is said": (FALCON3, lambda t: t.masters(), "says that it is quantised .offline."),
    "two bits": (ONE_BIT | {"weight_bits": 2}, lambda t: t.masters(), "weight_bits is 2"),
    "RoPE of Llama 3.1": (
        LLAMA3 | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, lambda t: t.packed(), "scales RoPE"
    ),
    "biases": (LLAMA3 | {"attention_bias": True}, lambda t: t.packed(), "attention_bias"),
    "a head that is missing": (
        FALCON3,
        lambda t: {k: v for k, v in t.packed().items() if k != "lm_head.weight"},
        "output head is untied and is not there",
    ),
    "a head that is packed": (
        FALCON3,
        lambda t: t.packed() | {"lm_head.weight": ("U8", np.ones((40, 48), np.uint8))},
        "not of floats",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_run_is_refused_by_name(tmp_path: Path, case: str) -> None:
    data, make, why = REFUSED[case]
    with pytest.raises(HaloError, match=why):
        model_of(open_checkpoint(written(tmp_path / "x", data, make(Truth(data)))))


def test_pickled_weights_are_not_run(tmp_path: Path) -> None:
    written(tmp_path / "x", ONE_BIT, {})
    (tmp_path / "x" / "model.safetensors").rename(tmp_path / "x" / "pytorch_model.bin")
    with pytest.raises(HaloError, match="pickles"):
        open_checkpoint(tmp_path / "x")


def test_memory_stays_within_a_few_matrices(tmp_path: Path) -> None:
    """The 3B masters are 13 GB: never more than a matrix in floats and a layer in 2 bits at a time."""
    sizes = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 12, "head_dim": None}
    data = FALCON3 | sizes | {"quantization_config": ONLINE}
    directory = written(tmp_path / "x", data, Truth(data).masters(wide))
    tracemalloc.start()
    opened = open_checkpoint(directory)
    layers = sum(1 for _ in opened.stream.layers())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert layers == 12 and peak < (directory / "model.safetensors").stat().st_size / 3


@pytest.mark.parametrize("data", [FALCON3, ONE_BIT], ids=["Falcon3", "1bitLLM"])
def test_a_mutated_config_is_read_or_refused(tmp_path: Path, data: dict[str, Any]) -> None:
    """Bad input never gives a traceback; what is read all the same is a model of the shape that it says."""
    truth = Truth(data)
    directory = written(tmp_path / "x", data, truth.masters() if data is ONE_BIT else truth.packed())
    original = (directory / "config.json").read_bytes()
    rng = random.Random(9)
    refusals = 0
    for _ in range(300):
        mutated = bytearray(original)
        for _ in range(rng.randint(1, 2)):
            place = rng.randrange(len(mutated))
            mutated[place : place + rng.randrange(4)] = rng.choice(
                (b"1", b"null", b"[", b'"', b"{}", b"-", b"e9")
            )
        (directory / "config.json").write_bytes(mutated)
        try:
            model = model_of(open_checkpoint(directory))
        except HaloError:
            refusals += 1
            continue
        c = model.config
        assert model.embedding.shape == (c.vocab_size, c.hidden_size) and len(model.layers) == c.num_layers
    assert refusals > 100
