"""Models and files for the tests of the formats. Files are put together here by the formats' words, byte by
byte and slowly: nothing of engine/formats is used for that, so that a mistake is not made twice."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np

from engine.formats.codes import pack_codes, unpack_codes
from engine.formats.htok import LETTER_OF, Vocabulary
from engine.model import Layer, Model, ModelConfig, ModelStream, Ternary

# Rows of whole blocks of 256, as TQ1_0 and TQ2_0 ask for.
BITNET = ModelConfig(256, 512, 2, 4, 2, 272, 64, True, 500000.0, 2.0**-16)
LLAMA = ModelConfig(256, 512, 2, 4, 2, 272, 64, False, 10000.0, 2.0**-17, "silu", False, 128)
F32, F16, Q8_0, Q6_K, BF16, TQ1_0, TQ2_0, I2_S = 0, 1, 8, 14, 30, 34, 35, 36
NAMES = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
NORMS = {
    "input_norm": "attn_norm", "post_attn_norm": "ffn_norm",
    "attn_sub_norm": "attn_sub_norm", "ffn_sub_norm": "ffn_sub_norm",
}  # fmt: skip


def random_model(config: ModelConfig = BITNET, seed: int = 0, one_scale: bool = True) -> Model:
    """Random digits; scales, norms and embedding that float16 and bfloat16 hold."""
    rng = np.random.default_rng(seed)

    def short(low: float, high: float, *shape: int) -> np.ndarray[Any, Any]:
        values = rng.uniform(low, high, shape).astype(np.float32)
        return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

    def ternary(rows: int, cols: int) -> Ternary:
        codes = np.ones(rows * cols, np.uint8)  # half of them zeros, so that masters have an exact mean
        codes[: rows * cols // 2] = rng.choice([0, 2], rows * cols // 2)
        codes = rng.permutation(codes).reshape(rows, cols)
        scales = np.repeat(short(0.02, 0.09, 1), rows) if one_scale else short(0.02, 0.09, rows)
        return Ternary(pack_codes(codes), scales, cols)

    def layer() -> Layer:
        sub = (short(0.5, 1.5, config.q_size), short(0.5, 1.5, config.intermediate_size))
        norms = short(0.5, 1.5, config.hidden_size), short(0.5, 1.5, config.hidden_size)
        matrices = [ternary(rows, cols) for _, rows, cols in config.projections()]
        return Layer(*norms, *(sub if config.sub_norms else (None, None)), *matrices)

    table = config.vocab_size, config.hidden_size
    head = None if config.tie_embeddings else short(0.1, 1, *table)
    embedding = short(0.1, 1, *table) * rng.choice([-1, 1], table).astype(np.float32)
    layers = [layer() for _ in range(config.num_layers)]
    return Model(config, embedding, short(0.5, 1.5, config.hidden_size), layers, head)


def vocabulary(size: int = 272) -> Vocabulary:
    """256 bytes, five merges, three special tokens, unused ids."""
    tokens = [bytes([value]) for value in range(256)] + [b"th", b"the", b" the", b"on", b" t"]
    merges = [(116, 104, 256), (256, 101, 257), (32, 257, 258), (111, 110, 259), (32, 116, 260)]
    tokens += [b"<|eot_id|>", b"<|begin_of_text|>", b"<|end_of_text|>"]
    return Vocabulary([*tokens, *[b""] * (size - len(tokens))], merges, 262, 263, [261, 262, 263])


def same_layers(one: Iterable[Layer], other: Iterable[Layer], scales: bool = True) -> bool:
    """Whether two models have the same norms, codes and (unless told otherwise) scales, to the bit."""
    for a, b in zip(one, other, strict=True):
        for name in Layer.__dataclass_fields__:
            x, y = getattr(a, name), getattr(b, name)
            if isinstance(x, Ternary):
                if not np.array_equal(unpack_codes(x), unpack_codes(y)):
                    return False
                if scales and not np.array_equal(x.scales, y.scales):
                    return False
            elif not (x is None and y is None) and not np.array_equal(x, y):
                return False
    return True


def same_model(model: Model, stream: ModelStream) -> bool:
    """`same_layers`, and everything else."""
    head = None if stream.head is None else np.concatenate(list(stream.head()))
    return (
        stream.config == model.config
        and np.array_equal(np.concatenate(list(stream.embedding())), model.embedding)
        and np.array_equal(stream.final_norm, model.final_norm)
        and (head is None) == (model.head is None)
        and (head is None or np.array_equal(head, model.head))
        and same_layers(stream.layers(), model.layers)
    )


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value_of(value: Any) -> bytes:
    """A metadata value with its type: bool, int (u32), float (f32), str, list of bytes or of int (i32)."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if value and isinstance(value[0], int):
        return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))


def container(
    metadata: dict[str, Any],
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]],
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A GGUF file: metadata, and name -> (shape with the rows first, type, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += text(key) + value_of(value)
    data = b""
    for name, (shape, kind, raw) in tensors.items():
        data += bytes(-len(data) % alignment)
        head += text(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}QIQ", *reversed(shape), kind, len(data))
        data += raw
    return head + bytes(-len(head) % alignment) + data


def metadata_of(c: ModelConfig, architecture: str) -> dict[str, Any]:
    keys = {
        "context_length": c.max_seq_len,
        "embedding_length": c.hidden_size,
        "block_count": c.num_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": c.num_kv_heads,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.freq_base": c.rope_theta,
        "rope.dimension_count": c.head_dim,
    }
    if c.head_dim * c.num_heads != c.hidden_size:
        keys |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    return {"general.architecture": architecture} | {f"{architecture}.{k}": v for k, v in keys.items()}


def tokenizer_metadata(v: Vocabulary) -> dict[str, Any]:
    texts = [
        token
        if index in v.special
        else "".join(LETTER_OF[b] for b in token).encode() or f"[PAD{index}]".encode()
        for index, token in enumerate(v.tokens)
    ]
    kinds = [3 if i in v.special else 1 if token else 5 for i, token in enumerate(v.tokens)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [texts[a] + b" " + texts[b] for a, b, _ in v.merges],
        "tokenizer.ggml.bos_token_id": v.bos,
        "tokenizer.ggml.eos_token_id": v.eos,
    }


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def encode_i2_s(codes: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> bytes:
    flat = codes.reshape(-1).tolist()
    out = bytearray(len(flat) // 4)
    for index, code in enumerate(flat):
        group, j = divmod(index, 128)
        out[32 * group + j % 32] |= code << (6 - 2 * (j // 32))
    return bytes(out) + struct.pack("<f", scales[0]) + bytes(28)


def encode_tq2_0(codes: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> bytes:
    out = b""
    for row, scale in zip(codes.tolist(), scales.tolist(), strict=True):
        for start in range(0, len(row), 256):
            block = row[start : start + 256]
            for first in (0, 128):
                for m in range(32):
                    a, b, c, d = (block[first + m + 32 * i] for i in range(4))
                    out += bytes([a | b << 2 | c << 4 | d << 6])
            out += half(scale)
    return out


def encode_tq1_0(codes: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> bytes:
    def fraction(digits: list[int]) -> int:
        """The first digit has the weight 81; the number as 256ths of 243, rounded up."""
        value = sum(digit * 3 ** (4 - i) for i, digit in enumerate(digits))
        return -(-value * 256 // 243)

    out = b""
    for row, scale in zip(codes.tolist(), scales.tolist(), strict=True):
        for start in range(0, len(row), 256):
            block = row[start : start + 256]
            out += bytes(fraction([block[m + 32 * i] for i in range(5)]) for m in range(32))
            out += bytes(fraction([block[160 + m + 16 * i] for i in range(5)]) for m in range(16))
            out += bytes(fraction([block[240 + m + 4 * i] for i in range(4)]) for m in range(4))
            out += half(scale)
    return out


def encode_floats(kind: int, values: np.ndarray[Any, Any]) -> bytes:
    if kind == BF16:
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype("<f4" if kind == F32 else "<f2").tobytes()


ENCODE = {I2_S: encode_i2_s, TQ2_0: encode_tq2_0, TQ1_0: encode_tq1_0}


def encode_matrix(kind: int, matrix: Ternary) -> tuple[tuple[int, ...], int, bytes]:
    codes = unpack_codes(matrix)
    if kind in ENCODE:
        return codes.shape, kind, ENCODE[kind](codes, matrix.scales)
    values = (codes.astype(np.float32) - 1) * matrix.scales[:, None]
    return codes.shape, kind, encode_floats(kind, values)


def llama_rows(matrix: Ternary, heads: int) -> Ternary:
    """q or k as llama.cpp's converter writes it: rows 0, d/2, 1, d/2 + 1, ... of each head of d rows."""
    size = matrix.rows // heads
    order = [h * size + i + b * size // 2 for h in range(heads) for i in range(size // 2) for b in (0, 1)]
    return Ternary(matrix.packed[order], matrix.scales[order], matrix.cols)


_MADE: dict[tuple[int, int, str, int], tuple[Model, dict[str, Any]]] = {}


def tensors_of(
    model: Model, kind: int, architecture: str = "bitnet-b1.58", floats: int = F16
) -> dict[str, Any]:
    """name -> (shape, type, bytes) of a whole model; made once, since the encoders above are slow."""
    key = id(model), kind, "llama" if architecture == "llama" else "", floats
    if key not in _MADE:
        _MADE[key] = (
            model,
            _tensors_of(model, kind, architecture, floats),
        )  # the model lives as long as its id
    return dict(_MADE[key][1])


def _tensors_of(model: Model, kind: int, architecture: str, floats: int) -> dict[str, Any]:
    c = model.config
    tables = {"token_embd.weight": model.embedding}
    if model.head is not None:
        tables["output.weight"] = model.head
    tensors: dict[str, Any] = {
        name: (values.shape, floats, encode_floats(floats, values)) for name, values in tables.items()
    }
    tensors["output_norm.weight"] = (c.hidden_size,), F32, encode_floats(F32, model.final_norm)
    for index, layer in enumerate(model.layers):
        for norm, name in NORMS.items():
            values = getattr(layer, norm)
            if values is not None:
                tensors[f"blk.{index}.{name}.weight"] = values.shape, F32, encode_floats(F32, values)
        for part, name in NAMES.items():
            matrix = getattr(layer, part)
            if architecture == "llama" and part in "qk":
                matrix = llama_rows(matrix, c.num_heads if part == "q" else c.num_kv_heads)
            tensors[f"blk.{index}.{name}.weight"] = encode_matrix(kind, matrix)
    return tensors


def gguf_bytes(model: Model, kind: int, architecture: str = "bitnet-b1.58", **changes: Any) -> bytes:
    """A whole file of `model`; `changes` replace metadata ("." written as "__"), None takes a key out."""
    metadata = metadata_of(model.config, architecture) | tokenizer_metadata(vocabulary())
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    return container(metadata, tensors_of(model, kind, architecture))
