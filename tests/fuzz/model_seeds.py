"""Small sound files of every format that holds weights, for the fuzzer to begin from."""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.formats.codes import pack_codes
from engine.formats.h1b import write_h1b
from engine.formats.htok import Vocabulary, write_htok
from engine.formats.prepared import prepare
from engine.model import Layer, Model, ModelConfig, Ternary
from tests.engine import formats_fixtures as fixtures
from tests.engine.formats_fixtures import BF16, F16, F32, I2_S, Q6_K, Q8_0, TQ1_0, TQ2_0
from tests.fuzz.target import pack_files, sparse

SMALL = ModelConfig(8, 12, 1, 2, 1, 5, 6, True, 500000.0, 1e-5)
UNTIED = ModelConfig(8, 12, 2, 2, 1, 5, 6, False, 10000.0, 1e-5, "silu", False, 6)


def model_of(config: ModelConfig, seed: int = 0, bf16: bool = True) -> Model:
    """A random model of any shape."""
    rng = np.random.default_rng(seed)

    def short(*shape: int) -> np.ndarray[Any, Any]:
        values = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) if bf16 else values

    def ternary(rows: int, cols: int) -> Ternary:
        codes = rng.integers(0, 3, (rows, cols), dtype=np.uint8)
        return Ternary(pack_codes(codes), np.full(rows, 0.25, np.float32), cols)

    def layer() -> Layer:
        sub = (short(config.q_size), short(config.intermediate_size)) if config.sub_norms else (None, None)
        matrices = [ternary(rows, cols) for _, rows, cols in config.projections()]
        return Layer(short(config.hidden_size), short(config.hidden_size), *sub, *matrices)

    table = config.vocab_size, config.hidden_size
    head = None if config.tie_embeddings else short(*table)
    layers = [layer() for _ in range(config.num_layers)]
    return Model(config, short(*table), short(config.hidden_size), layers, head)


def _written(write: Any, *args: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write(path, *args)
        return path.read_bytes()


def h1b() -> Iterator[bytes]:
    """Versions 1, 2 and 4, and the header of 3 and 5."""
    model = model_of(SMALL)
    for version in (1, 2, 4):
        good = _written(write_h1b, model, version)
        yield good
    for version in (3, 5):
        yield good[:4] + struct.pack("<I", version) + good[8:]


def htok() -> Iterator[bytes]:
    """Both versions of a small vocabulary, and one that is too small to be used."""
    for version in (1, 2):
        yield _written(write_htok, fixtures.vocabulary(264), version)
    few = Vocabulary([b"a", b"b", b"ab", b"<|e|>"], [(0, 1, 2)], 3, 3, [3])
    yield _written(write_htok, few)
    yield _written(write_htok, few, 1)


def prepared() -> Iterator[bytes]:
    """Tied and untied, with and without sub-norms, bfloat16 and float32; some with checksums made anew."""
    for flags, config, bf16 in (
        (0, SMALL, True), (2, SMALL, False), (2, UNTIED, True), (1, UNTIED, False),
        (6, replace(SMALL, num_layers=1, activation="silu"), True), (6, replace(UNTIED, num_layers=1), True),
    ):  # fmt: skip
        yield sparse(flags, _written(lambda path, m: prepare(m, path), model_of(config, bf16=bf16)))


def gguf() -> Iterator[bytes]:
    """Every tensor type, each architecture, with and without a tokenizer."""
    wide = ModelConfig(256, 2, 1, 1, 1, 3, 8, True, 10000.0, 1e-5, "relu2", True, 2)
    small = ModelConfig(16, 32, 1, 2, 1, 272, 8, True, 10000.0, 1e-5)
    tokenizer = fixtures.tokenizer_metadata(fixtures.vocabulary())
    untied = replace(small, tie_embeddings=False, activation="silu", sub_norms=False)
    for config, architecture, kind, floats, more in (
        (small, "bitnet-b1.58", I2_S, F16, tokenizer),
        (small, "bitnet", F16, BF16, tokenizer | {"bitnet.hidden_activation": "relu2"}),
        (untied, "llama", F32, F32, tokenizer),
        (untied, "llama", I2_S, F16, tokenizer | {"tokenizer.ggml.pre": "default"}),
        (wide, "bitnet-25", TQ2_0, Q8_0, {}),
        (wide, "bitnet", TQ1_0, Q6_K, {"tokenizer.ggml.model": "llama", "general.alignment": 64}),
    ):
        metadata = fixtures.metadata_of(config, architecture) | more
        alignment = int(more.get("general.alignment", 32))
        yield fixtures.container(metadata, _gguf_tensors(config, architecture, kind, floats), 3, alignment)


def _gguf_tensors(config: ModelConfig, architecture: str, kind: int, floats: int) -> dict[str, Any]:
    table = F16 if floats in (Q8_0, Q6_K) else floats
    tensors: dict[str, Any] = fixtures._tensors_of(model_of(config), F32, architecture, table)
    if table != floats:
        shape = config.vocab_size, config.hidden_size
        size = 34 if floats == Q8_0 else 210
        blocks = config.vocab_size * config.hidden_size // (32 if floats == Q8_0 else 256)
        tensors["token_embd.weight"] = shape, floats, bytes([1, 48] * (blocks * size // 2))
    for name, (shape, _, raw) in list(tensors.items()):
        fits = shape[-1] % 256 == 0 if kind in (TQ1_0, TQ2_0) else len(raw) // 4 % 128 == 0
        if name.startswith("blk") and len(shape) == 2 and kind != F32 and fits:
            codes = np.random.default_rng(1).integers(0, 3, shape, dtype=np.uint8)
            matrix = Ternary(pack_codes(codes), np.full(shape[0], 0.25, np.float32), shape[1])
            tensors[name] = fixtures.encode_matrix(kind, matrix)
    return tensors


def safetensors_of(tensors: dict[str, tuple[str, np.ndarray[Any, Any]]]) -> bytes:
    """A file of (element type, array) by name."""
    header, data = {}, b""
    for name, (dtype, values) in tensors.items():
        raw = values.tobytes()
        header[name] = {
            "dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]
        }  # fmt: skip
        data += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _float(values: np.ndarray[Any, Any], dtype: str) -> tuple[str, np.ndarray[Any, Any]]:
    if dtype == "BF16":
        return dtype, (values.astype(np.float32).view(np.uint32) >> 16).astype("<u2")
    return dtype, values.astype("<f2" if dtype == "F16" else "<f4")


def safetensors() -> Iterator[bytes]:
    """Each element type; an empty file; one with metadata."""
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors = {name: _float(values, name) for name in ("BF16", "F16", "F32")}
    yield safetensors_of(
        tensors | {"U8": ("U8", np.arange(4, dtype=np.uint8)), "e": _float(values[:0], "F32")}
    )
    yield safetensors_of({})
    text = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'
    yield struct.pack("<Q", len(text)) + text + bytes(4)


CONFIG = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 6, "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}  # fmt: skip


def _checkpoint_tensors(form: str, sub_norms: bool) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(3)
    ones = _float(np.ones(8), "F32")
    tensors = {
        "model.embed_tokens.weight": _float(rng.uniform(-1, 1, (6, 8)), "BF16"),
        "model.norm.weight": ones,
    }
    layer = "model.layers.0."
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{layer}{norm}.weight"] = ones
    if sub_norms:
        tensors |= {f"{layer}self_attn.attn_sub_norm.weight": ones, f"{layer}mlp.ffn_sub_norm.weight": ones}
    rows = {"q": 8, "k": 4, "v": 4, "o": 8, "gate": 8, "up": 8, "down": 8}
    for part, count in rows.items():
        name = f"{layer}{'self_attn' if part in 'qkvo' else 'mlp'}.{part}_proj.weight"
        if form == "masters":
            tensors[name] = _float(rng.normal(0, 1, (count, 8)), "F16")
        elif form == "ternary":
            tensors[name] = _float(rng.integers(-1, 2, (count, 8)) * 0.5, "BF16")
        else:
            codes = rng.integers(0, 3, (4, count // 4, 8), dtype=np.uint8)
            packed = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
            tensors[name] = "U8", packed.astype(np.uint8)
            tensors[f"{name}_scale"] = _float(np.array([2.0]), "BF16")
    return tensors


def checkpoint() -> Iterator[bytes]:
    """Masters, packed, ternary floats of a LLaMA; one file, and two with an index."""
    packed = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "offline"}
    bitnet = CONFIG | {"architectures": ["BitNetForCausalLM"], "tie_word_embeddings": True}
    llama = CONFIG | {"architectures": ["LlamaForCausalLM"], "head_dim": 4}
    cases: tuple[tuple[dict[str, Any], str, bool], ...] = (
        (bitnet, "masters", True),
        (bitnet | {"quantization_config": packed}, "packed", True),
        (llama | {"quantization_config": {"quant_method": "bitnet"}}, "packed", False),
        (llama, "ternary", False),
    )
    for config, form, sub_norms in cases:
        tensors = _checkpoint_tensors(form, sub_norms)
        if "tie_word_embeddings" not in config:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        said = json.dumps(config).encode()
        yield pack_files({"config.json": said, "model.safetensors": safetensors_of(tensors)})
    names = sorted(tensors)
    halves = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    placed = {name: file for file, held in halves.items() for name in held}
    shards = {file: safetensors_of({n: tensors[n] for n in held}) for file, held in halves.items()}
    index = {"model.safetensors.index.json": json.dumps({"weight_map": placed}).encode()}
    yield pack_files({"config.json": said} | index | shards)
