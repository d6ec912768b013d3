"""Fuzz targets of the files that hold weights: .h1b, .htok, model.halo, GGUF, safetensors, checkpoints."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

from engine.errors import HaloError
from engine.formats import prepared
from engine.formats.gguf_model import open_gguf
from engine.formats.gguf_tokenizer import gguf_vocabulary
from engine.formats.h1b import h1b_bytes, read_h1b, stream_h1b
from engine.formats.hf import INDEX, SINGLE, open_checkpoint
from engine.formats.htok import read_htok
from engine.formats.prepared import read_prepared, verify_prepared
from engine.formats.safetensors import read_safetensors
from engine.model import ModelConfig, ModelStream
from engine.tokenizer import Tokenizer
from tests.engine.prepared_files import ENTRY, PAGE, resealed, sealed
from tests.fuzz import model_seeds
from tests.fuzz.target import Target, expand, sparse_size, write_files

LARGEST = 1 << 18  # bytes to which an input is cut or filled, so that sizes do not stop every mutation
SEAL, RESEAL, REBUILD = 1, 2, 4  # flags of a prepared file's input
TEXT = " the other\n0123 <|eot_id|> \u00e9\u4e2d \U0001f642"


def consume(stream: ModelStream) -> None:
    """Read a stream to its last layer, as an import does."""
    for block in stream.embedding():
        assert block.shape[1] == stream.config.hidden_size
    for layer in stream.layers():
        assert layer.q.cols == stream.config.hidden_size
    if stream.head is not None:
        for block in stream.head():
            assert block.shape[1] == stream.config.hidden_size


def _put(data: bytes, folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def run_h1b(data: bytes, folder: Path) -> None:
    """Whole and as a stream; a header of a small model gets the size that it asks for."""
    path = _put(_fitted_h1b(data), folder, "model.h1b")
    try:
        consume(stream_h1b(path))
    finally:
        read_h1b(path)


def _fitted_h1b(data: bytes) -> bytes:
    if len(data) < 52 or not data[51] & 1:  # the highest byte of eps: one of two inputs stays as it is
        return data
    version, hidden, inter, layers, heads, kv_heads, vocab = struct.unpack_from("<7i", data, 4)
    config = ModelConfig(hidden, inter, layers, heads, kv_heads, vocab, 16, True, 1e4, 1e-5)
    try:
        config.validate()
        size = h1b_bytes(config, version)
    except (HaloError, ZeroDivisionError):
        return data
    return data[:size].ljust(size, b"\0") if size <= LARGEST else data


def run_htok(data: bytes, folder: Path) -> None:
    """The file, and then the tokenizer that it makes."""
    tokenizer = Tokenizer(read_htok(_put(data, folder, "tokenizer.htok")))
    tokenizer.decode(tokenizer.encode(TEXT))


def prepared_file(data: bytes) -> bytes:
    """The prepared file that an input stands for, with the checksums that its flags ask for."""
    flags, file = expand(data)
    if len(file) < 2 * PAGE:
        return bytes(file)
    if flags & (SEAL | RESEAL | REBUILD):
        struct.pack_into("<Q", file, 16, len(file))
    if flags & REBUILD:
        file = _rebuilt(file)
    count = min(struct.unpack_from("<I", file, 12)[0], (len(file) - PAGE) // ENTRY)
    if flags & RESEAL and struct.unpack_from("<I", file, 12)[0] == count and _small(file, count):
        for at in range(PAGE, PAGE + ENTRY * count, ENTRY):
            offset, size = struct.unpack_from("<QQ", file, at + 64)
            file[at + 80 : at + 112] = hashlib.sha256(file[offset : offset + size]).digest()
        file = resealed(file)
    return bytes(sealed(file)) if flags & (SEAL | RESEAL | REBUILD) else bytes(file)


def _small(file: bytearray, count: int) -> bool:
    entries = (struct.unpack_from("<QQ", file, PAGE + ENTRY * i + 64) for i in range(count))
    return all(offset + size <= len(file) for offset, size in entries)


def _rebuilt(file: bytearray) -> bytearray:
    """With the directory and the length that the header's shape asks for."""
    fields = prepared._HEADER.unpack_from(file)
    hidden, inter, layers, heads, kv_heads, vocab, context, tie, activation, sub, head_dim = fields[7:18]
    config = ModelConfig(
        hidden, inter, layers, heads, kv_heads, vocab, context, bool(tie), 1e4, 1e-5,
        prepared.ACTIVATIONS[activation & 1], bool(sub), head_dim,
    )  # fmt: skip
    try:
        config.validate()
    except HaloError:
        return file
    if layers > 64 or head_dim < 1:
        return file
    kind = prepared.BF16 if fields[17] & 2 else prepared.F32
    specs = list(prepared._specs(config, kind, kind))
    offset = PAGE + prepared.up(len(specs) * ENTRY, PAGE)
    entries = b""
    for spec in specs:
        entries += prepared._ENTRY.pack(
            spec.name.encode(), spec.dtype, spec.rows, spec.cols, spec.row_bytes, offset, spec.size, b"", 0
        )
        offset = prepared.up(offset + spec.size, PAGE)
        if offset > 1 << 20:
            return file
    file = file[:offset].ljust(offset, b"\0")
    struct.pack_into("<I", file, 12, len(specs))
    struct.pack_into("<Q", file, 16, len(file))
    file[PAGE : PAGE + len(entries)] = entries
    return file


def run_prepared(data: bytes, folder: Path) -> None:
    """Verified to the last byte, and read as an export reads it."""
    path = _put(prepared_file(data), folder, "model.halo")
    try:
        verify_prepared(path)
    finally:
        consume(read_prepared(path))


def run_gguf(data: bytes, folder: Path) -> None:
    """The container, the model in it with and without a given activation, and its tokenizer."""
    path = _put(data, folder, "model.gguf")
    try:
        model = open_gguf(path)
    except HaloError:
        model = open_gguf(path, "relu2")
    consume(model.stream)
    assert model.form_notes()
    gguf_vocabulary(model.file, model.stream.config.vocab_size)


def run_safetensors(data: bytes, folder: Path) -> None:
    """Every tensor, widened."""
    for tensor in read_safetensors(_put(data, folder, "model.safetensors")).values():
        if tensor.dtype == "U8":
            tensor.codes()
        else:
            tensor.floats()
            if tensor.shape and 0 not in tensor.shape:
                list(tensor.blocks())


CHECKPOINT_FILES = ("config.json", INDEX, SINGLE, "a.safetensors", "b.safetensors")


def run_checkpoint(data: bytes, folder: Path) -> None:
    """A checkpoint's folder; a safetensors file of it gets the header length that it shows."""
    for name, body in write_files(data, folder, CHECKPOINT_FILES).items():
        if name.endswith(".safetensors"):
            (folder / name).write_bytes(_fitted_safetensors(body))
    checkpoint = open_checkpoint(folder)
    consume(checkpoint.stream)
    assert checkpoint.notes and checkpoint.source


def _fitted_safetensors(data: bytes) -> bytes:
    """With the length of the JSON object that stands there, and as much data as it asks for."""
    try:
        entries, end = json.JSONDecoder().raw_decode(data[8:].decode("latin-1"))
        size = max(entry["data_offsets"][1] for name, entry in entries.items() if name[:2] != "__")
        size = size if isinstance(size, int) and 0 <= size <= LARGEST else 0
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return data
    body = data[8 + end :]
    return struct.pack("<Q", end) + data[8 : 8 + end] + body[:size].ljust(size, b"\0")


def _files(*names: str) -> Iterator[bytes]:
    for name in names:
        yield from getattr(model_seeds, name)()


_JSON_WORDS = (
    b"null", b"true", b"false", b"[]", b"{}", b"-1", b"0", b"1e400", b"NaN", b"9223372036854775808",
    b'"BF16"', b'"F16"', b'"F32"', b'"U8"', b'"data_offsets"', b'"shape"', b'"__metadata__"',
    b'"quantization_config"', b'"linear_class"', b'"online"', b'"head_dim"', b'"rope_scaling"', b"\\ud800",
)  # fmt: skip
_GGUF_WORDS = tuple(
    struct.pack("<Q", len(word)) + word
    for word in (
        b"general.alignment", b"general.architecture", b"tokenizer.ggml.tokens", b"tokenizer.ggml.merges",
        b"tokenizer.ggml.pre", b"rope_freqs.weight", b"output.weight", b"split.count", b"llama", b"gpt2",
    )
) + tuple(struct.pack("<II", kind, 1) for kind in range(13))  # fmt: skip

TARGETS = [
    Target("h1b", run_h1b, lambda: _files("h1b")),
    Target("htok", run_htok, lambda: _files("htok")),
    Target("prepared", run_prepared, lambda: _files("prepared"), expanded=sparse_size),
    Target("gguf", run_gguf, lambda: _files("gguf"), words=_GGUF_WORDS),
    Target("safetensors", run_safetensors, lambda: _files("safetensors"), words=_JSON_WORDS),
    Target("checkpoint", run_checkpoint, lambda: _files("checkpoint"), words=_JSON_WORDS),
]
