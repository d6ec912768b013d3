"""Write, check and read prepared models (`model.halo`), which the native engine loads. No exchange format.

Layout, little-endian. Page 0: the header (`_HEADER`, its CRC-32) and zeros. From byte 4096: the directory,
one 128-byte entry (`_ENTRY`) a tensor, in the order of `_specs`. Then the tensors, each on a 4 KiB boundary;
the file ends with the last of them, filled up to a whole page. `engine/native/cpu/model.cpp` checks the same
things at open. What every token reads lies first: the engine copies it into huge pages; the embedding and
the output head of full precision, of which a token reads a few rows, come last and are mapped.

Matrices are in the tiles of `engine/formats/tiles.py`. Rows of floats are filled up with zeros to 16
elements, the width of the engine's virtual lanes. `check` of an entry is the CRC-32 of the CRC-32s (u32) of
the tensor's pieces of 1 MiB, so that several threads can check one tensor; the engine does so at every open.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np

from engine.atomic import replacing
from engine.errors import HaloError
from engine.formats.h1b import pack_codes, unpack_codes
from engine.formats.tiles import (
    coarse_head,
    head_bytes,
    head_tiles,
    ternary_bytes,
    ternary_codes,
    ternary_tiles,
    up,
)
from engine.model import ACTIVATIONS, Layer, Model, ModelConfig, ModelStream, Ternary

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC: Final = b"HALOPREP"
VERSION: Final = 2
PAGE: Final = 4096
PIECE: Final = 1 << 20
F32, BF16, TERNARY, COARSE = 1, 2, 3, 4
_HEADER: Final = struct.Struct("<8sIIQQII11i2f")  # then the CRC-32 of these bytes
_ENTRY: Final = struct.Struct("<48sIIIIQQ32sI12x")
_BLOCK: Final = 2048  # rows of an embedding that are held at a time
_AGAIN: Final = "prepare the model again: halo install"


@dataclass(frozen=True)
class Entry:
    """One tensor of a prepared file: `offset`, `size`, `row_bytes` in bytes, `rows`, `cols` in elements."""

    name: str
    dtype: int
    rows: int
    cols: int
    row_bytes: int
    offset: int
    size: int
    sha256: bytes
    check: int


@dataclass(frozen=True)
class _Spec:
    """What a tensor must be. `row_bytes` is 0 for the tiled ones, whose rows do not lie on their own."""

    name: str
    dtype: int
    rows: int
    cols: int

    @property
    def row_bytes(self) -> int:
        if self.dtype in (TERNARY, COARSE):
            return 0
        return up(self.cols, 16) * (2 if self.dtype == BF16 else 4)

    @property
    def size(self) -> int:
        if self.dtype == TERNARY:
            return ternary_bytes(self.rows, self.cols)
        return head_bytes(self.rows, self.cols) if self.dtype == COARSE else self.rows * self.row_bytes


def is_bf16(values: NDArray[np.float32]) -> bool:
    """Whether every value is exactly a bfloat16, so that storing it in 16 bits loses nothing."""
    return not (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any()


def rope_tables(config: ModelConfig) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosines and sines, float32 [max_seq_len, head_dim/2], of position * theta^(-2i/head_dim).

    Made in float64 and rounded once. They travel in the prepared file, since two C libraries may round a
    cosine differently, and the same file shall give the same bytes everywhere.
    """
    half = config.head_dim // 2
    frequency = np.float64(config.rope_theta) ** (-np.arange(half, dtype=np.float64) / half)
    angle = np.arange(config.max_seq_len, dtype=np.float64)[:, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _specs(config: ModelConfig, embedding: int, head: int) -> Iterator[_Spec]:
    """Every tensor in file order; `embedding` and `head` are BF16 or F32 (head: of an untied model alone)."""
    c = config
    yield _Spec("final_norm", F32, 1, c.hidden_size)
    yield _Spec("rope_cos", F32, c.max_seq_len, c.head_dim // 2)
    yield _Spec("rope_sin", F32, c.max_seq_len, c.head_dim // 2)
    for index in range(c.num_layers):
        for norm, size in norm_sizes(c):
            yield _Spec(f"layers.{index}.{norm}", F32, 1, size)
        for part, rows, cols in c.projections():
            yield _Spec(f"layers.{index}.{part}", TERNARY, rows, cols)
            yield _Spec(f"layers.{index}.{part}.scales", F32, 1, rows)
    yield _Spec("coarse", COARSE, c.vocab_size, c.hidden_size)
    for name in ("scale", "error", "norm"):
        yield _Spec(f"coarse.{name}", F32, 1, c.vocab_size)
    yield _Spec("embedding", embedding, c.vocab_size, c.hidden_size)
    if not c.tie_embeddings:
        yield _Spec("head", head, c.vocab_size, c.hidden_size)


def norm_sizes(config: ModelConfig) -> list[tuple[str, int]]:
    """The norms of a layer, in file order, and their elements."""
    sizes = [("input_norm", config.hidden_size), ("post_attn_norm", config.hidden_size)]
    if config.sub_norms:
        sizes += [("attn_sub_norm", config.q_size), ("ffn_sub_norm", config.intermediate_size)]
    return sizes


def prepare(model: Model | ModelStream, path: Path) -> None:
    """Write `model` as a prepared file at `path`, atomically. Raises HaloError if it cannot be written.

    Of a stream no more than one layer, or one block of the embedding, is held at a time.
    """
    path = Path(path)
    stream = model.stream() if isinstance(model, Model) else model
    stream.config.validate()
    try:
        with replacing(path) as file:
            _write(file, stream)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> HaloError:
    return HaloError(
        f"The prepared model {path} cannot be written: {error.strerror}.", hint=f"df -h {path.parent}"
    )


class _Writer:
    """Puts tensors behind the directory one after the other, and says where they went."""

    def __init__(self, file: BinaryIO, config: ModelConfig, specs: list[_Spec]) -> None:
        self.file, self.config, self.specs = file, config, specs
        self.entries: list[bytes] = []
        self.offset = PAGE + up(len(specs) * _ENTRY.size, PAGE)

    def put(self, *parts: NDArray[np.generic]) -> None:
        self.stream(iter(parts))

    def stream(self, parts: Iterator[NDArray[np.generic]]) -> None:
        """The next tensor of the file, in parts. Raises HaloError unless they add up to its size."""
        spec = self.specs[len(self.entries)]
        digest, checks, rest, size = hashlib.sha256(), bytearray(), b"", 0
        self.file.seek(self.offset)
        for part in parts:
            raw = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
            self.file.write(raw)
            digest.update(raw)
            size += len(raw)
            rest, done = _check_pieces(rest, raw)
            checks += done
        if rest:
            checks += struct.pack("<I", zlib.crc32(rest))
        if size != spec.size:
            raise HaloError(
                f"The tensor {spec.name} has {size} bytes; its shape asks for {spec.size}.",
                hint="check what built the model",
            )
        self.entries.append(
            _ENTRY.pack(
                spec.name.encode(), spec.dtype, spec.rows, spec.cols, spec.row_bytes, self.offset, size,
                digest.digest(), zlib.crc32(checks),
            )
        )  # fmt: skip
        self.offset = up(self.offset + size, PAGE)

    def finish(self) -> None:
        self.file.truncate(self.offset)
        directory = b"".join(self.entries)
        header = _pack_header(self.config, len(self.entries), self.offset, zlib.crc32(directory))
        self.file.seek(0)
        self.file.write(header + struct.pack("<I", zlib.crc32(header)))
        self.file.seek(PAGE)
        self.file.write(directory)


def _check_pieces(rest: bytes, raw: memoryview) -> tuple[bytes, bytes]:
    """(what is left over, the CRC-32 of each whole piece of 1 MiB) of `rest` followed by `raw`."""
    done, start = bytearray(), 0
    if rest:
        start = min(PIECE - len(rest), len(raw))
        rest += bytes(raw[:start])
        if len(rest) < PIECE:
            return rest, b""
        done += struct.pack("<I", zlib.crc32(rest))
    while len(raw) - start >= PIECE:
        done += struct.pack("<I", zlib.crc32(raw[start : start + PIECE]))
        start += PIECE
    return bytes(raw[start:]), bytes(done)


def _write(file: BinaryIO, stream: ModelStream) -> None:
    config = stream.config
    head = stream.head or stream.embedding
    if (stream.head is None) != config.tie_embeddings:
        raise HaloError("The model says of its head what is not so.", hint="check what built the model")
    dtypes = [_dtype_of(blocks) for blocks in (stream.embedding, head)]
    writer = _Writer(file, config, list(_specs(config, *dtypes)))
    writer.put(_padded(stream.final_norm))
    for table in rope_tables(config):
        writer.put(_padded(table))
    count = 0
    for layer in stream.layers():
        count += 1
        if count <= config.num_layers:
            _write_layer(writer, layer)
    if count != config.num_layers:
        raise HaloError(
            f"The model has {count} layers and says {config.num_layers}.", hint="check what built the model"
        )
    _write_coarse(writer, head)
    for blocks, dtype in zip((stream.embedding, head), dtypes, strict=True):
        if len(writer.entries) < len(writer.specs):
            writer.stream(_stored(blocks, dtype))
    writer.finish()


def _write_layer(writer: _Writer, layer: Layer) -> None:
    for name, size in norm_sizes(writer.config):
        norm = getattr(layer, name)
        if norm is None or norm.size != size:
            raise HaloError(f"The model's {name} is missing or not {size} long.", hint="check what built it")
        writer.put(_padded(norm))
    for name, rows, cols in writer.config.projections():
        matrix: Ternary = getattr(layer, name)
        if (matrix.rows, matrix.cols, matrix.scales.shape) != (rows, cols, (rows,)):
            raise HaloError(f"The model's {name} is not {rows} x {cols}.", hint="check what built it")
        writer.put(ternary_tiles(unpack_codes(matrix)))
        writer.put(_padded(matrix.scales))


def _write_coarse(writer: _Writer, head: Callable[[], Iterator[NDArray[np.float32]]]) -> None:
    rows: list[list[NDArray[np.float32]]] = [[], [], []]

    def tiles() -> Iterator[NDArray[np.generic]]:
        for block in _blocks(head):
            levels, *numbers = coarse_head(block)
            for kept, values in zip(rows, numbers, strict=True):
                kept.append(values)
            yield head_tiles(levels)

    writer.stream(tiles())
    for values in rows:
        writer.put(_padded(np.concatenate(values)))


def _blocks(source: Callable[[], Iterator[NDArray[np.float32]]]) -> Iterator[NDArray[np.float32]]:
    """The rows of `source` in blocks of `_BLOCK`, whatever blocks they come in."""
    held: list[NDArray[np.float32]] = []
    count = 0
    for block in source():
        for start in range(0, len(block), _BLOCK):
            held.append(np.asarray(block[start : start + _BLOCK], dtype=np.float32))
            count += len(held[-1])
            if count >= _BLOCK:
                rows = np.concatenate(held)
                yield rows[:_BLOCK]
                held, count = [rows[_BLOCK:]], count - _BLOCK
    if count:
        yield np.concatenate(held)


def _dtype_of(source: Callable[[], Iterator[NDArray[np.float32]]]) -> int:
    return BF16 if all(is_bf16(block) for block in _blocks(source)) else F32


def _stored(source: Callable[[], Iterator[NDArray[np.float32]]], dtype: int) -> Iterator[NDArray[np.generic]]:
    for block in _blocks(source):
        padded = _padded(block)
        yield (padded.view("<u4") >> 16).astype("<u2") if dtype == BF16 else padded


def _padded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    values = np.atleast_2d(np.asarray(values, dtype=np.float32))
    rows, cols = values.shape
    result = np.zeros((rows, up(cols, 16)), dtype="<f4")
    result[:, :cols] = values
    return result


def _pack_header(c: ModelConfig, count: int, file_bytes: int, directory_crc: int) -> bytes:
    return _HEADER.pack(
        MAGIC, VERSION, count, file_bytes, PAGE, directory_crc, 0,
        c.hidden_size, c.intermediate_size, c.num_layers, c.num_heads, c.num_kv_heads, c.vocab_size,
        c.max_seq_len, int(c.tie_embeddings), ACTIVATIONS.index(c.activation), int(c.sub_norms), c.head_dim,
        c.rope_theta, c.rms_norm_eps,
    )  # fmt: skip


def read_directory(path: Path) -> tuple[ModelConfig, list[Entry]]:
    """Header and directory of a prepared file, checked but for the tensors' own hashes. Raises HaloError."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(PAGE)
            config, count, crc = _parse_header(path, head, size)
            directory = file.read(count * _ENTRY.size)
    except OSError as error:
        raise HaloError(
            f"The prepared model {path} cannot be read: {error.strerror}.", hint=_AGAIN
        ) from error
    if len(directory) != count * _ENTRY.size or zlib.crc32(directory) != crc:
        raise HaloError(f"The directory of the prepared model {path} is damaged.", hint=_AGAIN)
    entries = [
        Entry(fields[0].rstrip(b"\0").decode("ascii", "replace"), *fields[1:])
        for fields in _ENTRY.iter_unpack(directory)
    ]
    wide = {entry.name: entry.dtype for entry in entries if entry.dtype in (F32, BF16)}
    specs = _specs(config, wide.get("embedding", F32), wide.get("head", F32))
    for entry, spec in zip(entries, specs, strict=True):
        said = (entry.name, entry.dtype, entry.rows, entry.cols, entry.row_bytes, entry.size)
        if said != (spec.name, spec.dtype, spec.rows, spec.cols, spec.row_bytes, spec.size):
            raise HaloError(f"The tensor {spec.name} of {path} has not its shape.", hint=_AGAIN)
        if entry.offset % PAGE or entry.offset < PAGE or entry.offset + entry.size > size:
            raise HaloError(f"The tensor {entry.name} lies outside of {path}.", hint=_AGAIN)
    return config, entries


def _parse_header(path: Path, head: bytes, size: int) -> tuple[ModelConfig, int, int]:
    if len(head) < PAGE or head[:8] != MAGIC:
        raise HaloError(f"{path} is no prepared model.", hint=_AGAIN)
    fields = _HEADER.unpack_from(head)
    _, version, count, file_bytes, _, directory_crc, _ = fields[:7]
    if version != VERSION:
        raise HaloError(
            f"{path} is a prepared model of version {version}; this halo has {VERSION}.", hint=_AGAIN
        )
    (crc,) = struct.unpack_from("<I", head, _HEADER.size)
    if crc != zlib.crc32(head[: _HEADER.size]):
        raise HaloError(f"The header of the prepared model {path} is damaged.", hint=_AGAIN)
    if file_bytes != size:
        raise HaloError(
            f"The prepared model {path} has {size} bytes; its header says {file_bytes}.", hint=_AGAIN
        )
    hidden, inter, layers, heads, kv_heads, vocab, context = fields[7:14]
    tie, activation, sub_norms, head_dim, theta, eps = fields[14:]
    if not 0 <= activation < len(ACTIVATIONS):
        raise HaloError(f"{path} names an activation that halo does not have.", hint=_AGAIN)
    config = ModelConfig(
        hidden, inter, layers, heads, kv_heads, vocab, context, bool(tie), theta, eps,
        ACTIVATIONS[activation], bool(sub_norms), head_dim,
    )  # fmt: skip
    config.validate()
    if head_dim < 1 or count != sum(1 for _ in _specs(config, F32, F32)):
        raise HaloError(
            f"The prepared model {path} has {count} tensors, not what its shape asks for.", hint=_AGAIN
        )
    return config, count, directory_crc


def verify_prepared(path: Path) -> ModelConfig:
    """Check a prepared file to its last byte (header, directory, the SHA-256 of each tensor); its config."""
    config, entries = read_directory(path)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    for entry in entries:
        digest = hashlib.sha256(data[entry.offset : entry.offset + entry.size].data)
        if digest.digest() != entry.sha256:
            raise _damaged(path, entry.name)
    return config


def _damaged(path: Path, name: str) -> HaloError:
    return HaloError(f"The tensor {name} of the prepared model {path} is damaged.", hint=_AGAIN)


def read_prepared(path: Path) -> ModelStream:
    """The model that a prepared file was made of, to the last bit. Raises HaloError.

    The tensors are mapped and read as they are asked for; `verify_prepared` is what checks their hashes.
    """
    config, entries = read_directory(path)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    tensors = _Tensors(path, config, {entry.name: entry for entry in entries}, data)
    head = None if config.tie_embeddings else lambda: tensors.rows("head")
    return ModelStream(
        config, lambda: tensors.rows("embedding"), tensors.vector("final_norm"), tensors.layers, head
    )


@dataclass(frozen=True)
class _Tensors:
    path: Path
    config: ModelConfig
    entries: dict[str, Entry]
    data: NDArray[np.uint8]

    def raw(self, name: str) -> NDArray[np.uint8]:
        entry = self.entries[name]
        return self.data[entry.offset : entry.offset + entry.size]

    def vector(self, name: str) -> NDArray[np.float32]:
        return self.raw(name).view("<f4")[: self.entries[name].cols].copy()

    def rows(self, name: str) -> Iterator[NDArray[np.float32]]:
        entry, raw = self.entries[name], self.raw(name)
        for start in range(0, entry.rows, _BLOCK):
            block = raw[start * entry.row_bytes : (start + _BLOCK) * entry.row_bytes]
            if entry.dtype == BF16:
                values = (block.view("<u2").astype("<u4") << 16).view("<f4")
            else:
                values = block.view("<f4")
            yield np.ascontiguousarray(values.reshape(-1, up(entry.cols, 16))[:, : entry.cols])

    def layers(self) -> Iterator[Layer]:
        for index in range(self.config.num_layers):
            prefix = f"layers.{index}."
            norms = {name: self.vector(prefix + name) for name, _ in norm_sizes(self.config)}
            none = dict.fromkeys(("attn_sub_norm", "ffn_sub_norm"))
            parts = {
                name: self.matrix(prefix + name, rows, cols) for name, rows, cols in self.config.projections()
            }
            yield Layer(**{**none, **norms}, **parts)  # type: ignore[arg-type]

    def matrix(self, name: str, rows: int, cols: int) -> Ternary:
        try:
            codes = ternary_codes(self.raw(name), rows, cols)
        except ValueError:
            raise _damaged(self.path, name) from None
        return Ternary(pack_codes(codes), self.vector(f"{name}.scales"), cols)
