"""Read and write the GGUF container, versions 2 and 3: metadata and tensors. Not what they mean to a model.

The layout (ggml-org/ggml, docs/gguf.md): "GGUF", version, number of tensors, number of keys, the keys with
typed values, the tensors' names, shapes, types and offsets, then the data from the next multiple of
general.alignment on. All little-endian. Shapes are written with the fastest dimension first, and held here
the other way round, as [rows, cols]. Nothing is allocated that the file's own bytes do not pay for.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np

from engine.errors import HaloError
from engine.formats.gguf_types import TYPES, TensorType, refused_type

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Value = bool | int | float | str | list[bytes] | NDArray[np.generic]

MAGIC: Final = b"GGUF"
MAX_TENSORS: Final = 1 << 16
MAX_KEYS: Final = 1 << 14
MAX_KEY: Final = 1024
MAX_NAME: Final = 64  # ggml's GGML_MAX_NAME, its final zero included
MAX_STRING: Final = 16 << 20
MAX_STRINGS: Final = 1 << 23
MAX_DIMENSIONS: Final = 4
MAX_ALIGNMENT: Final = 1 << 20
ALIGNMENT: Final = 32
_FETCH: Final = "fetch the file again; its publisher's page lists its sha256"
_STRING, _ARRAY, _BOOL = 8, 9, 7
# GGUF's value types; strings and arrays are read apart.
_NUMBERS: Final = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class GgufTensor:
    """A named tensor of a mapped file: `shape` slowest first, `raw` its bytes as stored."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file: metadata by key (a list of bytes is an array of texts) and tensors by name."""

    path: Path
    version: int
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]


def damaged(path: Path, why: str) -> HaloError:
    """The error of a file that is not what it says."""
    return HaloError(f"{path} is no sound GGUF file: {why}.", hint=_FETCH)


def read_gguf(path: Path) -> GgufFile:
    """Map a file and check everything but the tensors' values.

    Raises HaloError for another magic or version, a count or length that the file does not pay for, a key or
    name given twice, an unknown type, a shape whose size overflows, a tensor that is out of the file,
    misaligned or lies over another.
    """
    path = Path(path)
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise HaloError(f"{path} is not a regular file.", hint=f"ls -l {path}")
        if facts.st_size < 24:
            raise damaged(path, f"it has {facts.st_size} bytes, fewer than its header")
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it changed while it was opened"
        raise HaloError(f"The model {path} cannot be read: {why}.", hint=f"ls -l {path}") from error
    cursor = _Cursor(path, data)
    version, tensors, keys = _header(cursor)
    metadata = _metadata(cursor, keys)
    return GgufFile(path, version, metadata, _tensors(cursor, tensors, _alignment(path, metadata)))


class _Cursor:
    """Reads fields from the mapped file, and says so when the file ends first."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self.path, self.data, self.offset = path, data.data, 0
        self.array, self.size = data, len(data)

    def take(self, count: int, what: str) -> memoryview:
        end = self.offset + count
        if end > self.size:
            raise damaged(self.path, f"it ends inside {what}")
        chunk = self.data[self.offset : end]
        self.offset = end
        return chunk

    def u32(self, what: str) -> int:
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack(self.take(8, what))[0])

    def text(self, what: str, most: int) -> bytes:
        length = self.u64(what)
        if length > most:
            raise damaged(self.path, f"{what} would be {length} bytes long; {most} are possible")
        return bytes(self.take(length, what))

    def name(self, what: str, most: int) -> str:
        try:
            name = self.text(what, most).decode("utf-8")
        except UnicodeDecodeError:
            raise damaged(self.path, f"{what} is no text") from None
        if not name or not name.isprintable():
            raise damaged(self.path, f"{what} is empty or not printable")
        return name


def _header(cursor: _Cursor) -> tuple[int, int, int]:
    """(version, number of tensors, number of keys)."""
    if bytes(cursor.take(4, "its magic")) != MAGIC:
        raise HaloError(f"{cursor.path} is no GGUF file: its first bytes are not 'GGUF'.", hint=_FETCH)
    version = cursor.u32("its version")
    if version not in (2, 3):
        swapped = version in (2 << 24, 3 << 24)
        why = "is big-endian" if swapped else f"is of GGUF version {version}"
        raise HaloError(
            f"{cursor.path} {why}; halo reads little-endian versions 2 and 3.", hint="convert the model again"
        )
    tensors, keys = cursor.u64("its header"), cursor.u64("its header")
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise damaged(cursor.path, f"it says {tensors} tensors and {keys} keys")
    return version, tensors, keys


def _metadata(cursor: _Cursor, keys: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for index in range(keys):
        key = cursor.name(f"key {index}", MAX_KEY)
        if key in metadata:
            raise damaged(cursor.path, f"the key {key} is given twice")
        metadata[key] = _value(cursor, key, cursor.u32(key))
    return metadata


def _value(cursor: _Cursor, key: str, kind: int) -> Value:
    if kind == _STRING:
        return cursor.text(key, MAX_STRING).decode("utf-8", "replace")
    if kind == _ARRAY:
        return _array(cursor, key, cursor.u32(key), cursor.u64(key))
    if kind not in _NUMBERS:
        raise damaged(cursor.path, f"the value of {key} is of type {kind}, which does not exist")
    dtype = np.dtype(_NUMBERS[kind])
    raw = cursor.take(dtype.itemsize, key)
    if kind == _BOOL:
        return raw[0] != 0
    number: int | float = np.frombuffer(raw, dtype)[0].item()
    return number


def _array(cursor: _Cursor, key: str, kind: int, count: int) -> Value:
    if kind == _STRING:
        if count > min(MAX_STRINGS, (cursor.size - cursor.offset) // 8):
            raise damaged(cursor.path, f"{key} would have {count} texts")
        return [cursor.text(key, MAX_STRING) for _ in range(count)]
    if kind not in _NUMBERS:
        raise damaged(cursor.path, f"{key} is an array of type {kind}, which arrays do not have")
    dtype = np.dtype(_NUMBERS[kind] if kind != _BOOL else "<u1")
    if count > (cursor.size - cursor.offset) // dtype.itemsize:
        raise damaged(cursor.path, f"it ends inside {key}")
    return np.frombuffer(cursor.take(count * dtype.itemsize, key), dtype)


def _alignment(path: Path, metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment", ALIGNMENT)
    if type(value) is not int or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
        raise damaged(path, "its general.alignment is no power of two that is possible")
    return value


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GgufTensor]:
    path = cursor.path
    infos: dict[str, tuple[TensorType, tuple[int, ...], int, int]] = {}
    for index in range(count):
        name = cursor.name(f"the name of tensor {index}", MAX_NAME)
        if name in infos:
            raise damaged(path, f"the tensor {name} is given twice")
        infos[name] = _info(cursor, name, alignment)
    start = -(-cursor.offset // alignment) * alignment
    reached, before = 0, ""
    for name, (_, _, offset, size) in sorted(infos.items(), key=lambda item: item[1][2:]):
        if offset < reached:
            raise damaged(path, f"the tensor {name} lies over {before}")
        if start + offset + size > cursor.size:
            raise damaged(path, f"the tensor {name} ends at byte {start + offset + size} of {cursor.size}")
        reached, before = offset + size, name
    return {
        name: GgufTensor(name, kind, shape, cursor.array[start + offset : start + offset + size])
        for name, (kind, shape, offset, size) in infos.items()
    }


def _info(cursor: _Cursor, name: str, alignment: int) -> tuple[TensorType, tuple[int, ...], int, int]:
    """(type, shape, offset, size in bytes) of one tensor."""
    dimensions = cursor.u32(name)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise damaged(cursor.path, f"the tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.u64(name) for _ in range(dimensions))[::-1]
    number, offset = cursor.u32(name), cursor.u64(name)
    if number not in TYPES:
        raise refused_type(cursor.path, name, number)
    kind = TYPES[number]
    if not all(1 <= size < 1 << 40 for size in shape) or shape[-1] % kind.block:
        raise damaged(cursor.path, f"the tensor {name} is {list(shape)}, which {kind.name} cannot be")
    if offset % alignment:
        raise damaged(cursor.path, f"the tensor {name} is not aligned to {alignment} bytes")
    return kind, shape, offset, kind.size(prod(shape))


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is going to be written: `shape` slowest first."""

    name: str
    type: TensorType
    shape: tuple[int, ...]


def write_gguf(
    file: BinaryIO,
    metadata: Mapping[str, tuple[str, object]],
    plans: Sequence[TensorPlan],
    parts: Iterator[tuple[str, NDArray[np.generic]]],
) -> None:
    """Write a version 3 file: `parts` gives (name, piece of its bytes) in the order of `plans`.

    A metadata value is (type, value); the types are "str", "strs" (an array of bytes), "i32s", "u32", "i32",
    "f32" and "bool". Raises HaloError where the pieces do not add up to what a plan asks for.
    """
    head = [MAGIC, struct.pack("<IQQ", 3, len(plans), len(metadata))]
    head += [_pack_value(key, kind, value) for key, (kind, value) in metadata.items()]
    offset = 0
    for plan in plans:
        size = plan.type.size(prod(plan.shape))
        head.append(_pack_text(plan.name.encode()) + _U32.pack(len(plan.shape)))
        head.append(struct.pack(f"<{len(plan.shape)}QIQ", *plan.shape[::-1], plan.type.number, offset))
        offset += _aligned(size)
    raw = b"".join(head)
    file.write(raw + bytes(_aligned(len(raw)) - len(raw)))
    _write_data(file, plans, parts)


def _write_data(
    file: BinaryIO, plans: Sequence[TensorPlan], parts: Iterator[tuple[str, NDArray[np.generic]]]
) -> None:
    todo = iter(plans)
    plan, left = None, 0
    for name, piece in parts:
        if left == 0:
            plan = next(todo, None)
            left = plan.type.size(prod(plan.shape)) if plan else 0
        raw = np.ascontiguousarray(piece).view(np.uint8).reshape(-1)
        if plan is None or plan.name != name or len(raw) > left:
            raise HaloError(
                f"The model does not have the shape it says, at {name}.", hint="check what built it"
            )
        file.write(raw.data)
        left -= len(raw)
        if left == 0:
            size = plan.type.size(prod(plan.shape))
            file.write(bytes(_aligned(size) - size))
    if left or next(todo, None) is not None:
        raise HaloError("The model has fewer tensors than it says.", hint="check what built it")


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pack_text(text: bytes) -> bytes:
    return _U64.pack(len(text)) + text


_SCALARS: Final = {"u32": (4, "<I"), "i32": (5, "<i"), "f32": (6, "<f"), "bool": (7, "<?")}


def _pack_value(key: str, kind: str, value: object) -> bytes:
    head = _pack_text(key.encode())
    if kind in _SCALARS:
        number, code = _SCALARS[kind]
        return head + _U32.pack(number) + struct.pack(code, value)
    if kind == "str":
        return head + _U32.pack(_STRING) + _pack_text(str(value).encode())
    assert isinstance(value, list)
    number = _STRING if kind == "strs" else _SCALARS["i32"][0]
    items = map(_pack_text, value) if kind == "strs" else (struct.pack("<i", each) for each in value)
    return head + struct.pack("<IIQ", _ARRAY, number, len(value)) + b"".join(items)
