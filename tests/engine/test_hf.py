"""The Hugging Face import: every form of a checkpoint gives the same model, and the wrong ones a reason."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import HaloError
from engine.formats.h1b import pack_codes, unpack_codes, write_h1b, write_h1b_stream
from engine.formats.hf import norms, open_checkpoint, projection
from engine.formats.hf_config import FAMILIES
from engine.formats.htok import LETTER_OF, read_htok
from engine.formats.importer import import_model, in_memory
from engine.formats.store import store_name, unpack
from engine.locate import read_card
from engine.model import Layer, Model, ModelConfig, ModelStream, Ternary
from engine.reference import Reference
from engine.tokenizer import LLAMA3_PATTERN, Tokenizer

CONFIG: dict[str, Any] = {
    "architectures": ["BitNetForCausalLM"],
    "model_type": "bitnet",
    "hidden_act": "relu2",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 264,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 262,
    "eos_token_id": [263, 261],
}
MODEL = ModelConfig(64, 192, 2, 4, 2, 264, 64, True, 500000.0, 1e-5)
NORMS = norms(FAMILIES["BitNetForCausalLM"], MODEL)
ONLINE = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
OFFLINE = ONLINE | {"quantization_mode": "offline"}
INVERSE = {"quant_method": "bitnet"}  # bitlinear and offline are the defaults of transformers
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("o", "n"), ("Ġ", "t")]
Tensors = dict[str, tuple[str, np.ndarray[Any, Any]]]


def brain(values: np.ndarray[Any, Any]) -> tuple[str, np.ndarray[Any, Any]]:
    return "BF16", (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype("<u2")


def wide(values: np.ndarray[Any, Any]) -> tuple[str, np.ndarray[Any, Any]]:
    return "F32", np.ascontiguousarray(values, "<f4")


def half(values: np.ndarray[Any, Any]) -> tuple[str, np.ndarray[Any, Any]]:
    return "F16", np.ascontiguousarray(values, "<f2")


def rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Cut to what bfloat16 and float16 both hold: 7 bits of mantissa, not small."""
    return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def scale_of(name: str) -> float:
    """A scale that differs from matrix to matrix and is exact in every type, as is its inverse."""
    return float(2.0 ** -(3 + sum(map(ord, name)) % 4))


class Truth:
    """A model of known digits: half of each matrix is zero, so that masters have an exact absmean."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.floats = {"model.norm.weight": rounded(rng.uniform(0.5, 1.5, 64))}
        self.floats["model.embed_tokens.weight"] = rounded(rng.uniform(0.25, 2, (264, 64)))
        self.digits: dict[str, np.ndarray[Any, Any]] = {}
        for index in range(2):
            for _, name, size in NORMS:
                self.floats[f"model.layers.{index}.{name}.weight"] = rounded(rng.uniform(0.5, 1.5, size))
            for part, rows, cols in MODEL.projections():
                digits = np.zeros(rows * cols, np.int8)
                digits[: rows * cols // 2] = rng.choice([-1, 1], rows * cols // 2)
                self.digits[projection(index, part)] = rng.permutation(digits).reshape(rows, cols)
        self.noise = rng

    def model(self) -> Model:
        def layer(index: int) -> Layer:
            parts: dict[str, Any] = {
                field: self.floats[f"model.layers.{index}.{name}.weight"] for field, name, _ in NORMS
            }
            for part, rows, cols in MODEL.projections():
                name = projection(index, part)
                codes = (self.digits[name] + 1).astype(np.uint8)
                parts[part] = Ternary(pack_codes(codes), np.full(rows, scale_of(name), np.float32), cols)
            return Layer(**parts)

        floats = self.floats
        return Model(
            MODEL, floats["model.embed_tokens.weight"], floats["model.norm.weight"], [layer(0), layer(1)]
        )

    def masters(self, as_type: Callable[..., Any] = brain) -> Tensors:
        """Zeros as +-scale/4, the others as +-scale 7/4: the mean of |W| is the scale, exactly."""
        tensors = {name: as_type(values) for name, values in self.floats.items()}
        for name, digits in self.digits.items():
            signs = self.noise.choice([-0.25, 0.25], digits.shape)
            values = np.where(digits == 0, signs, 1.75 * digits) * scale_of(name)
            tensors[f"{name}.weight"] = as_type(values)
        return tensors

    def ternary(self) -> Tensors:
        """Dequantised weights: 0 and +-scale, as a careless converter leaves them."""
        tensors = {name: brain(values) for name, values in self.floats.items()}
        return tensors | {f"{n}.weight": brain(d * scale_of(n)) for n, d in self.digits.items()}

    def unpacked(self) -> Tensors:
        """Digits as floats beside a scale, as transformers saves an offline model."""
        tensors = {name: brain(values) for name, values in self.floats.items()}
        tensors |= {f"{n}.weight": brain(d.astype(np.float32)) for n, d in self.digits.items()}
        return tensors | {f"{n}.weight_scale": brain(np.array([scale_of(n)])) for n in self.digits}

    def packed(self, inverse: bool = False) -> Tensors:
        tensors = {name: brain(values) for name, values in self.floats.items()}
        for name, digits in self.digits.items():
            codes = (digits + 1).astype(np.uint8)
            quarters = np.split(codes, 4)
            tensors[f"{name}.weight"] = "U8", sum(q << 2 * i for i, q in enumerate(quarters)).astype(np.uint8)
            scale = scale_of(name)
            tensors[f"{name}.weight_scale"] = brain(np.array([1 / scale if inverse else scale]))
        return tensors


def save(path: Path, tensors: Tensors) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, values) in tensors.items():
        raw = values.tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def save_shards(directory: Path, tensors: Tensors) -> None:
    names = sorted(tensors)
    placed: dict[str, str] = {}
    for shard in range(3):
        file = f"model-{shard + 1:05}-of-00003.safetensors"
        save(directory / file, {name: tensors[name] for name in names[shard::3]})
        placed |= dict.fromkeys(names[shard::3], file)
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def tokenizer_json() -> dict[str, Any]:
    texts = [*(LETTER_OF[value] for value in range(256)), *(a + b for a, b in MERGES)]
    special = {261: "<|eot_id|>", 262: "<|begin_of_text|>", 263: "<|end_of_text|>"}
    split = {
        "type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False
    }  # fmt: skip
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, "special": True} | flags for i, text in special.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "byte_fallback": False, "ignore_merges": True,
            "vocab": {text: i for i, text in enumerate(texts)}, "merges": [list(pair) for pair in MERGES],
        },
    }  # fmt: skip


def checkpoint(
    directory: Path, tensors: Tensors, quantization: dict[str, Any] | None = None, **changes: Any
) -> Path:
    directory.mkdir()
    config = CONFIG | ({"quantization_config": quantization} if quantization else {}) | changes
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    save(directory / "model.safetensors", tensors)
    return directory


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth()


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


FORMS: dict[str, tuple[Callable[[Truth], Tensors], dict[str, Any] | None, str]] = {
    "bf16": (lambda t: t.masters(), ONLINE, "masters"),
    "bf16 without a quantization_config": (lambda t: t.masters(), None, "masters"),
    "f16": (lambda t: t.masters(half), ONLINE, "masters"),
    "f32": (lambda t: t.masters(wide), ONLINE, "masters"),
    "packed autobitlinear": (lambda t: t.packed(), OFFLINE, "packed"),
    "packed bitlinear": (lambda t: t.packed(inverse=True), INVERSE, "packed"),
    "ternary already": (lambda t: t.ternary(), ONLINE, "ternary already"),
    "unpacked beside a scale": (lambda t: t.unpacked(), OFFLINE, "ternary already"),
}


def model_of(source: Path) -> Model:
    return in_memory(open_checkpoint(source).stream)


def same_bytes(directory: Path, stream: ModelStream, truth: Truth) -> None:
    """Both models, written by one writer, are the same file."""
    write_h1b(directory / "ours.h1b", stream)
    write_h1b(directory / "truth.h1b", truth.model())
    assert (directory / "ours.h1b").read_bytes() == (directory / "truth.h1b").read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_model(tmp_path: Path, truth: Truth, form: str) -> None:
    """Scale direction, row quarters and double quantisation: each mistake gives fluent nonsense."""
    tensors, quantization, note = FORMS[form]
    source = checkpoint(tmp_path / "tiny", tensors(truth), quantization)
    opened = open_checkpoint(source)
    same_bytes(tmp_path, opened.stream, truth)
    assert len(opened.notes) == 1 and opened.notes[0].startswith("14 matrices") and note in opened.notes[0]


def test_shards_give_the_same_model(tmp_path: Path, truth: Truth) -> None:
    source = checkpoint(tmp_path / "tiny", truth.packed(), OFFLINE)
    (source / "model.safetensors").unlink()
    save_shards(source, truth.packed())
    same_bytes(tmp_path, open_checkpoint(source).stream, truth)


def test_the_stream_writer_is_the_writer(tmp_path: Path, tiny_model: Callable[..., Model]) -> None:
    """Two writers of one format drift apart; the odd shape has padding in each row."""
    for shape in ("plain", "odd", "least"):
        model = tiny_model(shape)
        write_h1b(tmp_path / "a.h1b", model)
        blocks = np.array_split(model.embedding, 3)
        write_h1b_stream(tmp_path / "b.h1b", model.config, blocks, model.final_norm, iter(model.layers))
        assert (tmp_path / "a.h1b").read_bytes() == (tmp_path / "b.h1b").read_bytes()
    with pytest.raises(HaloError, match="shape it says"):
        write_h1b_stream(tmp_path / "c.h1b", model.config, [], model.final_norm, model.layers)
    assert not (tmp_path / "c.h1b").exists()


def test_masters_are_rounded_half_to_even_and_scaled_by_their_mean(tmp_path: Path, truth: Truth) -> None:
    """+-half the mean goes to zero, the next float above it to one; the row scale is the mean."""
    values = np.zeros((64, 64), np.float32)
    values[:, :32] = 1.5
    values[:, 32:] = 0.5
    values[0, 0], values[0, 32], values[0, 33] = -1.5, np.nextafter(np.float32(0.5), np.float32(1)), -0.5
    tensors = truth.masters(wide) | {f"{projection(0, 'q')}.weight": wide(values)}
    q = model_of(checkpoint(tmp_path / "tiny", tensors, ONLINE)).layers[0].q
    assert q.scales.tolist() == [1.0] * 64
    assert unpack_codes(q)[0].tolist() == [0, *[2] * 31, 2, *[1] * 31]


def test_a_matrix_of_zeros_is_zeros(tmp_path: Path, truth: Truth) -> None:
    tensors = truth.masters() | {f"{projection(0, 'q')}.weight": brain(np.zeros((64, 64)))}
    q = model_of(checkpoint(tmp_path / "tiny", tensors, ONLINE)).layers[0].q
    assert (unpack_codes(q) == 1).all() and q.scales[0] == np.float32(1e-5)


def test_the_store_and_the_engine_take_what_was_imported(tmp_path: Path, truth: Truth) -> None:
    source = checkpoint(tmp_path / "tiny", truth.packed(), OFFLINE)
    report = import_model(source, tmp_path / "out")
    stored = unpack(report.directory, tmp_path / "store")
    assert stored.name == store_name(report.description)
    card = read_card(stored)
    assert (card.name, card.chat_template, card.context) == ("tiny", "bitnet", 64)
    golden = json.loads((stored / "model.json").read_text())["golden"][0]
    assert golden["prompt_ids"][0] == 262 and 1 <= len(golden["ids"]) <= 32
    assert Reference(model_of(source)).greedy(golden["prompt_ids"], len(golden["ids"])) == golden["ids"]
    sources = report.description["source"]["files"]
    assert sources["model.safetensors"]["bytes"] == (source / "model.safetensors").stat().st_size


@pytest.mark.parametrize("as_text", [True, False])
def test_the_tokenizer_comes_over(tmp_path: Path, truth: Truth, as_text: bool) -> None:
    source = checkpoint(tmp_path / "tiny", truth.packed(), OFFLINE)
    if as_text:
        pairs = [" ".join(pair) for pair in MERGES]
        edited(source / "tokenizer.json", lambda data: data["model"].update(merges=pairs))
    import_model(source, tmp_path / "out")
    vocabulary = read_htok(tmp_path / "out" / "tokenizer.htok")
    assert (vocabulary.bos, vocabulary.eos, vocabulary.special) == (262, 263, [261, 262, 263])
    tokenizer = Tokenizer(vocabulary)
    assert tokenizer.encode("on the<|eot_id|>")[:2] == [259, 258]
    assert 261 not in tokenizer.encode("<|eot_id|>")


def test_bos_and_eos_may_come_from_the_tokenizers_own_file(tmp_path: Path, truth: Truth) -> None:
    changes = {"bos_token_id": None, "eos_token_id": None}
    source = checkpoint(tmp_path / "tiny", truth.packed(), OFFLINE, **changes)
    with pytest.raises(HaloError, match=r"nothing names its bos|Nothing in .* that ends a text"):
        import_model(source, tmp_path / "out")  # the second where the library that reads others is installed
    texts: dict[str, Any] = {"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|end_of_text|>"}
    texts |= {"chat_template": "{{ messages[0].content }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(texts))
    report = import_model(source, tmp_path / "out")
    vocabulary = read_htok(tmp_path / "out" / "tokenizer.htok")
    assert (vocabulary.bos, vocabulary.eos) == (262, 263)
    assert report.description["chat_template"] == "jinja"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "TriLM": (
        {"architectures": ["LlamaForCausalLM"], "_name_or_path": "TriLM_3.9B", "quantization_config": None},
        "TriLM: it has several",
    ),
    "LLaMA with sub-norms": ({"architectures": ["LlamaForCausalLM"]}, "4 tensors are not of config.json's"),
    "1bitLLM without its sub-norms": ({"architectures": ["BitnetForCausalLM"]}, "it lacks the sub-norms"),
    "two architectures": ({"architectures": ["BitNetForCausalLM"] * 2}, "and BitNetForCausalLM"),
    "Bonsai": ({"architectures": ["Qwen3ForCausalLM"], "_name_or_path": "Ternary-Bonsai-8B"}, "Bonsai"),
    "Maple": ({"architectures": ["MapleForCausalLM"]}, "Maple"),
    "BitCPM4": ({"architectures": ["MiniCPMForCausalLM"]}, "BitCPM4"),
    "BitNet-embedding": (
        {"architectures": ["Qwen3Model"], "_name_or_path": "microsoft/BitNet-embedding-0.6B"},
        "BitNet-embedding: it has a norm before",
    ),
    "first Falcon": ({"architectures": ["FalconForCausalLM"]}, "first Falcon"),
    "other": ({"architectures": ["GPT2LMHeadModel"]}, "runs BitNetForCausalLM, .* only"),
    "none": ({"architectures": None}, "does not name"),
    "a list too deep": ({"architectures": [[["x"]]]}, "list"),
    "GELU": ({"hidden_act": "gelu"}, "activation is gelu"),
    "activation a list": ({"hidden_act": ["silu"]}, "activation is list"),
    "untied without a head": ({"tie_word_embeddings": False}, "untied and is not there"),
    "tied to a text": ({"tie_word_embeddings": "true"}, "not true or false"),
    "two bits": ({"weight_bits": 2}, "weight_bits is 2"),
    "bias": ({"attention_bias": True}, "attention_bias"),
    "RoPE scaled": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scales RoPE"),
    "RoPE scaled, new": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "scales RoPE"),
    "half of RoPE": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "scales RoPE"),
    "two thetas": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "twice"),
    "half of RoPE, beside": ({"rope_parameters": {}, "partial_rotary_factor": 0.5}, "scales RoPE"),
    "head_dim": ({"head_dim": 32}, r"q_proj.weight is \[16, 64\]; config.json asks for \[32, 64\]"),
    "head_dim odd": ({"head_dim": 15}, "must be even"),
    "head_dim none": ({"head_dim": -4}, "no size"),
    "heads uneven": ({"num_attention_heads": 5, "num_key_value_heads": 5}, "does not divide into 5"),
    "eps zero": ({"rms_norm_eps": 0}, "rms_norm_eps"),
    "size a text": ({"hidden_size": "64"}, "no whole number"),
    "method": ({"quantization_config": {"quant_method": "gptq"}}, "not of the method bitnet"),
    "class": ({"quantization_config": OFFLINE | {"linear_class": "x"}}, "direction"),
    "rms": ({"quantization_config": OFFLINE | {"use_rms_norm": True}}, "use_rms_norm.*embedding"),
    "kept": ({"quantization_config": OFFLINE | {"modules_to_not_convert": ["q_proj"]}}, "not ternary"),
    "more layers": ({"num_hidden_layers": 3}, "11 tensors are missing"),
    "fewer layers": ({"num_hidden_layers": 1}, "not of config.json's model"),
    "wider": ({"intermediate_size": 256}, "config.json asks for"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_model_is_refused_with_the_reason(tmp_path: Path, truth: Truth, case: str) -> None:
    changes, why = REFUSED[case]
    source = checkpoint(tmp_path / "tiny", truth.packed(), OFFLINE, **changes)
    with pytest.raises(HaloError, match=why):
        import_model(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


Q = projection(0, "q")


def code_three() -> np.ndarray[Any, Any]:
    """Code 3 in packed row 5, third quarter: row 2 * 16 + 5."""
    codes = np.full((16, 64), 0b01010101, np.uint8)
    codes[5, 7] |= 0b00110000
    return codes


DAMAGED: dict[str, tuple[Callable[[Tensors], Any], dict[str, Any], str]] = {
    "code 3": (lambda t: t.update({f"{Q}.weight": ("U8", code_three())}), OFFLINE, "code 3 in row 37"),
    "no scale": (lambda t: t.pop(f"{Q}.weight_scale"), OFFLINE, "no weight_scale"),
    "scale zero": (lambda t: t.update({f"{Q}.weight_scale": brain(np.zeros(1))}), INVERSE, "above zero"),
    "two scales": (
        lambda t: t.update({f"{Q}.weight_scale": brain(np.ones(2))}), OFFLINE, "one scale for a matrix"
    ),
    "head of another shape": (
        lambda t: t.update({"lm_head.weight": brain(np.ones(4))}), OFFLINE, r"lm_head.weight is \[4\]"
    ),
    "another head though tied": (
        lambda t: t.update({"lm_head.weight": brain(np.ones((264, 64)))}), OFFLINE, "is not the embedding"
    ),
    "norm before a projection": (
        lambda t: t.update({f"{Q}.norm.weight": brain(np.ones(64))}), OFFLINE, "as BitNet-embedding has"
    ),
    "bias": (lambda t: t.update({f"{Q}.bias": brain(np.ones(64))}), OFFLINE, "not of config.json's model"),
    "no sub-norm": (
        lambda t: t.pop("model.layers.0.mlp.ffn_sub_norm.weight"), OFFLINE, "lacks the sub-norms"
    ),
    "norm of bytes": (
        lambda t: t.update({"model.norm.weight": ("U8", np.ones(64, np.uint8))}), OFFLINE, "not of floats"
    ),
    "NaN": (lambda t: t.update({"model.norm.weight": brain(np.full(64, np.nan))}), OFFLINE, "not finite"),
    "masters called offline": (
        lambda t: (t.pop(f"{Q}.weight_scale"), t.update({f"{Q}.weight": brain(np.ones((64, 64)))})),
        OFFLINE, "has no weight_scale, and",
    ),
    "masters beside a scale": (
        lambda t: t.update({f"{Q}.weight": brain(np.arange(4096).reshape(64, 64))}), OFFLINE, "not ternary"
    ),
    "floats in bitlinear": (
        lambda t: t.update({f"{Q}.weight": brain(np.ones((64, 64)))}), INVERSE, "never is"
    ),
    "masters with infinity": (
        lambda t: t.update({f"{Q}.weight": brain(np.full((64, 64), np.inf))}), OFFLINE, "not finite"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(tmp_path: Path, truth: Truth, case: str) -> None:
    damage, quantization, why = DAMAGED[case]
    tensors = truth.packed(inverse=quantization is INVERSE)
    damage(tensors)
    source = checkpoint(tmp_path / "tiny", tensors, quantization)
    with pytest.raises(HaloError, match=why):
        import_model(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    "file", ["../model-00001-of-00003.safetensors", "/etc/x.safetensors", 3, "model.bin"]
)
def test_an_index_does_not_lead_out_of_its_directory(tmp_path: Path, truth: Truth, file: object) -> None:
    source = checkpoint(tmp_path / "tiny", truth.packed(), OFFLINE)
    (source / "model.safetensors").unlink()
    save_shards(source, truth.packed())
    index = source / "model.safetensors.index.json"
    edited(index, lambda data: data["weight_map"].update({"model.norm.weight": file}))
    with pytest.raises(HaloError, match="does not name the file"):
        import_model(source, tmp_path / "out")


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path, truth: Truth) -> None:
    source = checkpoint(tmp_path / "tiny", truth.packed(), OFFLINE)
    (source / "model.safetensors").unlink()
    save_shards(source, truth.packed())
    index = source / "model.safetensors.index.json"
    edited(index, lambda data: data["weight_map"].pop("model.norm.weight"))
    with pytest.raises(HaloError, match=r"holds the tensor model\.norm\.weight, against the index"):
        import_model(source, tmp_path / "out")


def test_what_exists_is_not_overwritten(tmp_path: Path, truth: Truth) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(HaloError, match="exists already"):
        import_model(checkpoint(tmp_path / "tiny", truth.packed(), OFFLINE), tmp_path / "out")


TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "Unigram": (lambda d: d["model"].update(type="Unigram"), "Unigram, not BPE"),
    "byte fallback": (lambda d: d["model"].update(byte_fallback=True), "SentencePiece"),
    "SentencePiece text": (lambda d: d["model"]["vocab"].update({"▁a": 260}), "two texts"),
    "normalizer": (lambda d: d.update(normalizer={"type": "NFC"}), "normalizer NFC"),
    "no pre-tokeniser": (lambda d: d.update(pre_tokenizer=None), "no pre-tokeniser"),
    "Metaspace": (lambda d: d.update(pre_tokenizer={"type": "Metaspace"}), "Metaspace, not Llama-3"),
    "other pattern": (
        lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\w+"}), "pattern"
    ),
    "removed matches": (
        lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "as a piece"
    ),
    "prefix space": (
        lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "adds a space"
    ),
    "ordinary added token": (lambda d: d["added_tokens"][0].update(special=False), "ordinary text"),
    "id too large": (lambda d: d["added_tokens"][0].update(id=264), "outside the model's 264"),
    "id twice": (lambda d: d["added_tokens"][0].update(id=262), "two texts"),
    "no byte": (lambda d: d["model"]["vocab"].pop("z"), "single bytes have no token"),
    "merge of nothing": (lambda d: d["model"]["merges"].append(["z", "z"]), "names a text that is no token"),
    "merge of three": (lambda d: d["model"]["merges"].append("a b c"), "no pair"),
    "ranks beside the ids": (lambda d: d["model"]["merges"].reverse(), "before one of lesser id"),
    "unreachable": (
        lambda d: (d["model"].update(ignore_merges=False), d["model"]["merges"].pop()), "do not list"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_another_tokenizer_is_not_made_a_htok(tmp_path: Path, truth: Truth, case: str) -> None:
    """Ids other than the library's give text that reads well and is wrong."""
    from engine.formats.hf_config import read_config
    from engine.formats.hf_tokenizer import read_tokenizer

    edit, why = TOKENIZERS[case]
    source = checkpoint(tmp_path / "tiny", truth.packed(), OFFLINE)
    edited(source / "tokenizer.json", edit)
    with pytest.raises(HaloError, match=why):
        read_tokenizer(source, read_config(source))


def test_an_end_that_is_ordinary_text_is_not_made_a_htok(tmp_path: Path, truth: Truth) -> None:
    from engine.formats.hf_config import read_config
    from engine.formats.hf_tokenizer import read_tokenizer

    source = checkpoint(tmp_path / "tiny", truth.packed(), OFFLINE, eos_token_id=5)
    with pytest.raises(HaloError, match="no special token"):
        read_tokenizer(source, read_config(source))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_mutated_json_is_read_or_refused(tmp_path: Path, truth: Truth, file: str) -> None:
    from engine.formats.hf_config import read_config
    from engine.formats.hf_tokenizer import read_tokenizer

    source = checkpoint(tmp_path / "tiny", truth.packed(), OFFLINE)
    config = read_config(source)
    original = (source / file).read_bytes()
    rng = random.Random(3)
    for _ in range(400):
        data = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(data))
            data[place : place + rng.randrange(3)] = rng.choice(
                (b"1", b"null", b"[", b'"', b"{}", b"-", b"e9")
            )
        (source / file).write_bytes(data)
        try:
            read_config(source) if file == "config.json" else read_tokenizer(source, config)
        except HaloError:
            continue


def test_what_transformers_saves_is_the_model_that_it_runs(tmp_path: Path) -> None:
    """BitNetForCausalLM in bf16, quantised online, through save_pretrained; its float32 logits are ours.

    The digits must be equal, and the scales to a unit or two in the last place: they differ by the order in
    which the mean is summed. The bounds on the logits and their argument are those of test_reference.py.
    The weights have the deviation that the architecture starts with (0.02); one of 0.5 makes attention so
    sharp that a single activation that rounds the other way moves what follows by more than the bound.
    """
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.engine.test_reference import LARGEST, MEDIAN, agreement, weights

    torch._dynamo.config.disable = True
    torch.manual_seed(11)
    config = transformers.BitNetConfig(
        **{key: CONFIG[key] for key in CONFIG if key not in ("architectures", "model_type", "rope_theta")},
        rope_parameters={"rope_type": "default", "rope_theta": CONFIG["rope_theta"]},
    )
    theirs = transformers.BitNetForCausalLM(config).to(torch.bfloat16).eval()
    theirs.save_pretrained(tmp_path / "tiny")
    edited(tmp_path / "tiny" / "config.json", lambda data: data.update(quantization_config=ONLINE))
    (tmp_path / "tiny" / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    model = model_of(tmp_path / "tiny")

    loaded = transformers.BitNetForCausalLM.from_pretrained(tmp_path / "tiny", dtype=torch.float32).eval()
    quantise = transformers.integrations.bitnet.WeightQuant.apply
    for index, layer in enumerate(model.layers):
        for part, _, _ in MODEL.projections():
            wanted = quantise(loaded.get_submodule(projection(index, part)).weight).detach().numpy()
            ours = weights(getattr(layer, part))
            assert np.array_equal(np.sign(ours), np.sign(wanted))
            assert np.allclose(ours, wanted, rtol=2**-22, atol=0)
    tokens = np.random.default_rng(5).integers(0, 264, 48).tolist()
    with torch.no_grad():
        logits = loaded(torch.tensor([tokens])).logits[0].numpy()
    oracle = Reference(model, "f32")
    median, largest = agreement(oracle.forward(tokens, oracle.new_cache()), logits)
    print(f"median {median:.1e}, largest {largest:.1e} of the deviation of the logits")
    assert median < MEDIAN and largest < LARGEST


@pytest.mark.parametrize("inverse", [False, True])
def test_transformers_runs_the_packed_checkpoint_as_we_do(
    tmp_path: Path, truth: Truth, inverse: bool
) -> None:
    """Both directions of weight_scale, by the library's own reading of the packed file.

    The scales are powers of two, so only sums of floats differ; the bounds are those of test_reference.py.
    The library multiplies bf16 with float32 when it is asked for float32 at load, and refuses float() itself:
    hence bf16, then what float() does.
    """
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.engine.test_reference import LARGEST, MEDIAN, agreement

    torch._dynamo.config.disable = True
    quantization = INVERSE if inverse else OFFLINE
    source = checkpoint(tmp_path / "tiny", truth.packed(inverse), quantization)
    loaded = transformers.BitNetForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    for module in torch.nn.Module.float(loaded).modules():
        if hasattr(module, "dtype") and type(module).__name__ == "BitLinear":
            module.dtype = torch.float32
    tokens = np.random.default_rng(5).integers(0, 264, 48).tolist()
    with torch.no_grad():
        logits = loaded(torch.tensor([tokens])).logits[0].numpy()
    oracle = Reference(model_of(source), "f32")
    median, largest = agreement(oracle.forward(tokens, oracle.new_cache()), logits)
    print(f"median {median:.1e}, largest {largest:.1e} of the deviation of the logits")
    assert median < MEDIAN and largest < LARGEST


def test_the_library_encodes_as_the_imported_tokenizer(tmp_path: Path, truth: Truth) -> None:
    """The ids of huggingface/tokenizers from the same tokenizer.json, on random text of several scripts."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    source = checkpoint(tmp_path / "tiny", truth.packed(), OFFLINE)
    import_model(source, tmp_path / "out")
    ours = Tokenizer.from_htok(tmp_path / "out" / "tokenizer.htok")
    theirs = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    rng = random.Random(1)
    letters = "the on  \t\n\r123'sA.,!é中文🙂ßй\u00a0\u2003"
    for _ in range(2000):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(40)))
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


def test_the_command_imports_and_says_so(
    tmp_path: Path, truth: Truth, native_library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine.generate import Engine
    from engine.sampling import SamplingParams
    from provision.cli import main

    source = checkpoint(tmp_path / "tiny", truth.ternary(), ONLINE)
    arguments = ["model", "import", str(source), str(tmp_path / "out"), "--name", "mine"]
    assert main(arguments) == 0
    assert "not quantised a second time" in capsys.readouterr().out
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    assert described["name"] == "mine"
    with Engine.open(tmp_path / "out", library=native_library) as engine:
        golden = described["golden"][0]
        params = SamplingParams(max_tokens=len(golden["ids"]), temperature=0.0)
        done = engine.complete(golden["prompt_ids"], params)
    assert done.token_ids == golden["ids"], "what was imported decodes as the oracle says"
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert main([*arguments[:-1], "../mine"]) == 1
