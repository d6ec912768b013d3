"""Write and check prepared models (`model.halo`), which the native engine maps at start. No exchange format.

Layout, little-endian. Page 0: the header (`_HEADER`) and zeros. From byte 4096: the directory, one 128-byte
entry (`_ENTRY`) a tensor. Then the tensors, each on a 4 KiB boundary, in the fixed order of `_tensors`; the
file ends with the last of them, filled up to a whole page. `engine/native/cpu/model.cpp` checks the same
things at open.

A ternary row of `cols` weights is stored as B = 16 * ceil(cols / 64) bytes: weight j lies in byte j % B, bits
2 * (j / B) and up, as code 0, 1 or 2. So the bytes of one bit pair are consecutive weights, and a load of any
width, shifted and masked, is ready to be multiplied with consecutive activations: 16, 32 or 64 at a time.
Rows of floats are filled up with zeros to 16 elements, the width of the engine's virtual lanes.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np

from engine.atomic import replacing
from engine.errors import HaloError
from engine.formats.h1b import unpack_codes
from engine.model import Model, ModelConfig, Ternary

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC: Final = b"HALOPREP"
VERSION: Final = 1
PAGE: Final = 4096
F32, BF16, TERNARY = 1, 2, 3
_HEADER: Final = struct.Struct("<8sIIQQII8i2f")  # then the CRC-32 of these bytes
_ENTRY: Final = struct.Struct("<48sIIIIQQ32s16x")
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


def ternary_planes(matrix: Ternary) -> NDArray[np.uint8]:
    """The prepared form of a ternary matrix: uint8 [rows, B], see the module's first lines."""
    codes = unpack_codes(matrix)
    row_bytes = 16 * math.ceil(matrix.cols / 64)
    padded = np.zeros((codes.shape[0], 4 * row_bytes), dtype=np.uint8)
    padded[:, : matrix.cols] = codes
    planes = padded.reshape(-1, 4, row_bytes)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(planes << shifts, axis=1)
    return packed


def _padded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    rows, cols = values.shape
    result = np.zeros((rows, (cols + 15) // 16 * 16), dtype="<f4")
    result[:, :cols] = values
    return result


def _float_tensor(values: NDArray[np.float32]) -> tuple[int, NDArray[np.generic]]:
    return F32, _padded(np.atleast_2d(np.asarray(values, dtype=np.float32)))


def _embedding_tensor(values: NDArray[np.float32]) -> tuple[int, NDArray[np.generic]]:
    padded = _padded(values)
    if is_bf16(padded):
        return BF16, (padded.view("<u4") >> 16).astype("<u2")
    return F32, padded


def _tensors(model: Model) -> Iterator[tuple[str, int, int, int, NDArray[np.generic]]]:
    """(name, dtype, rows, cols, data as stored) of every tensor, in file order."""
    config = model.config
    dtype, data = _embedding_tensor(np.asarray(model.embedding))
    yield "embedding", dtype, config.vocab_size, config.hidden_size, data
    yield "final_norm", F32, 1, config.hidden_size, _float_tensor(model.final_norm)[1]
    for name, table in zip(("rope_cos", "rope_sin"), rope_tables(config), strict=True):
        yield name, F32, config.max_seq_len, config.head_dim // 2, _float_tensor(table)[1]
    for index, layer in enumerate(model.layers):
        for norm in ("input_norm", "post_attn_norm", "attn_sub_norm", "ffn_sub_norm"):
            values = getattr(layer, norm)
            yield f"layers.{index}.{norm}", F32, 1, len(values), _float_tensor(values)[1]
        for part, rows, cols in config.projections():
            matrix: Ternary = getattr(layer, part)
            yield f"layers.{index}.{part}", TERNARY, rows, cols, ternary_planes(matrix)
            yield f"layers.{index}.{part}.scales", F32, 1, rows, _float_tensor(matrix.scales)[1]


def _tensor_count(config: ModelConfig) -> int:
    return 4 + config.num_layers * (4 + 2 * 7)


def _up(value: int) -> int:
    return (value + PAGE - 1) // PAGE * PAGE


def prepare(model: Model, path: Path) -> None:
    """Write `model` as a prepared file at `path`, atomically. Raises HaloError if it cannot be written."""
    path = Path(path)
    model.config.validate()
    try:
        with replacing(path) as file:
            _write(file, model)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> HaloError:
    return HaloError(
        f"The prepared model {path} cannot be written: {error.strerror}.", hint=f"df -h {path.parent}"
    )


def _write(file: BinaryIO, model: Model) -> None:
    count = _tensor_count(model.config)
    offset = PAGE + _up(count * _ENTRY.size)
    entries = []
    for name, dtype, rows, cols, data in _tensors(model):
        raw = np.ascontiguousarray(data)
        file.seek(offset)
        file.write(raw.data)
        digest = hashlib.sha256(raw.data).digest()
        row_bytes = raw.nbytes // rows
        entries.append(_ENTRY.pack(name.encode(), dtype, rows, cols, row_bytes, offset, raw.nbytes, digest))
        offset = _up(offset + raw.nbytes)
    file.truncate(offset)
    directory = b"".join(entries)
    header = _pack_header(model.config, count, offset, zlib.crc32(directory))
    file.seek(0)
    file.write(header + struct.pack("<I", zlib.crc32(header)))
    file.seek(PAGE)
    file.write(directory)


def _pack_header(c: ModelConfig, count: int, file_bytes: int, directory_crc: int) -> bytes:
    return _HEADER.pack(
        MAGIC, VERSION, count, file_bytes, PAGE, directory_crc, 0,
        c.hidden_size, c.intermediate_size, c.num_layers, c.num_heads, c.num_kv_heads, c.vocab_size,
        c.max_seq_len, int(c.tie_embeddings), c.rope_theta, c.rms_norm_eps,
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
    entries = []
    for fields in _ENTRY.iter_unpack(directory):
        entry = Entry(fields[0].rstrip(b"\0").decode("ascii", "replace"), *fields[1:])
        if entry.offset % PAGE or entry.offset + entry.size > size:
            raise HaloError(f"The tensor {entry.name} lies outside of {path}.", hint=_AGAIN)
        entries.append(entry)
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
    hidden, inter, layers, heads, kv_heads, vocab, context, tie, theta, eps = fields[7:]
    config = ModelConfig(hidden, inter, layers, heads, kv_heads, vocab, context, bool(tie), theta, eps)
    config.validate()
    if count != _tensor_count(config):
        raise HaloError(
            f"The prepared model {path} has {count} tensors, not what its shape asks for.", hint=_AGAIN
        )
    return config, count, directory_crc


def verify_prepared(path: Path) -> ModelConfig:
    """Check a prepared file to its last byte (header, directory, the SHA-256 of each tensor); its config."""
    config, entries = read_directory(path)
    data = np.memmap(path, dtype=np.uint8, mode="r")
    for entry in entries:
        chunk = np.ascontiguousarray(data[entry.offset : entry.offset + entry.size])
        if hashlib.sha256(chunk.data).digest() != entry.sha256:
            raise HaloError(f"The tensor {entry.name} of the prepared model {path} is damaged.", hint=_AGAIN)
    return config
