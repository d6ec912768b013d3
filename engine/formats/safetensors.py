"""Read `.safetensors` files strictly, as views of the mapped file. Not a writer, and no model: see hf.py.

The layout (huggingface/safetensors, README): a little-endian u64 with the header's length, the header in
JSON (name -> dtype, shape, data_offsets; `__metadata__` is text), then the data, which the tensors cover
without hole or overlap. Four element types are read, those that ternary checkpoints use.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeGuard

import numpy as np

from engine.errors import HaloError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_HEADER: Final = 8 << 20  # about 80,000 tensors; the JSON parser multiplies this by a constant
MAX_DIMENSIONS: Final = 8
MAX_NAME: Final = 512
ITEM_BYTES: Final = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1}
_FIELDS: Final = {"dtype", "shape", "data_offsets"}
_FETCH: Final = "fetch the checkpoint again; its publisher's page lists the sha256 of each file"
_BLOCK: Final = 1 << 22


@dataclass(frozen=True)
class Tensor:
    """A named tensor of a mapped file: `raw` is its bytes, uint8 [prod(shape) * item size]."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]

    def codes(self) -> NDArray[np.uint8]:
        """A U8 tensor as it is, in its shape. Raises HaloError for another element type."""
        if self.dtype != "U8":
            raise HaloError(f"The tensor {self.name} is {self.dtype}, not U8.", hint=_FETCH)
        return self.raw.reshape(self.shape)

    def floats(self) -> NDArray[np.float32]:
        """The whole tensor widened to float32 (exact), in its shape. Raises HaloError for U8."""
        return _widen(self, self.raw).reshape(self.shape)

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """The tensor widened to float32, some whole rows at a time, so that memory stays small."""
        rows, cols = self.shape[0], prod(self.shape[1:])
        step = max(1, _BLOCK // max(1, cols))
        row_bytes = cols * ITEM_BYTES[self.dtype]
        for start in range(0, rows, step):
            raw = self.raw[start * row_bytes : min(rows, start + step) * row_bytes]
            yield _widen(self, raw).reshape(-1, *self.shape[1:])


def _widen(tensor: Tensor, raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    if tensor.dtype == "BF16":
        bits = np.frombuffer(raw, dtype="<u2").astype(np.uint32)
        return (bits << np.uint32(16)).view(np.float32)
    if tensor.dtype in ("F16", "F32"):
        return np.frombuffer(raw, dtype="<f2" if tensor.dtype == "F16" else "<f4").astype(np.float32)
    raise HaloError(f"The tensor {tensor.name} is {tensor.dtype}, not of floats.", hint=_FETCH)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Map a file and check its header to the last field; name -> Tensor.

    Raises HaloError for anything that is not exactly the format: a header that is too long or no JSON, a
    name given twice, an unknown element type, a size that does not follow from type and shape, an offset
    outside the data, tensors that overlap, bytes that belong to none.
    """
    path = Path(path)
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise HaloError(f"{path} is not a regular file.", hint=f"ls -l {path}")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if facts.st_size < 8 or not 2 <= length <= min(MAX_HEADER, facts.st_size - 8):
                raise _damaged(path, f"its header would be {length} bytes in a file of {facts.st_size}")
            header = file.read(length)
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise HaloError(
            f"The checkpoint {path} cannot be read: {error.strerror}.", hint=f"ls -l {path}"
        ) from error
    return _tensors(path, _parse(path, header), data[8 + length :])


def _parse(path: Path, header: bytes) -> dict[str, Any]:
    """The header's entries without the metadata, which is checked to be text and then left."""
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not the JSON of one") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is no JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its __metadata__ is not text")
    return entries


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is given twice")
    return result


def _tensors(path: Path, entries: dict[str, Any], data: NDArray[np.uint8]) -> dict[str, Tensor]:
    placed = sorted((*_placed(path, name, entry), name) for name, entry in entries.items())
    result: dict[str, Tensor] = {}
    reached = 0
    for begin, end, name in placed:
        if begin != reached:
            what = "overlaps the one before it" if begin < reached else "leaves a hole before it"
            raise _damaged(path, f"the tensor {name} {what}")
        if end > len(data):
            raise _damaged(path, f"the tensor {name} ends at byte {end} of {len(data)} bytes of data")
        entry = entries[name]
        result[name] = Tensor(name, entry["dtype"], tuple(entry["shape"]), data[begin:end])
        reached = end
    if reached != len(data):
        raise _damaged(path, f"{len(data) - reached} bytes at its end belong to no tensor")
    return result


def _placed(path: Path, name: str, entry: object) -> tuple[int, int]:
    """(begin, end) of a tensor in the data, after all that its entry alone can be wrong in."""
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise _damaged(path, "the name of a tensor is empty, too long or not printable")
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise _damaged(path, f"the entry of {name} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise HaloError(
            f"The tensor {name} in {path} is of no type that halo reads: {', '.join(ITEM_BYTES)}.",
            hint="use a checkpoint in BF16, F16, F32 or packed U8",
        )
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise _damaged(path, f"the shape of {name} is no list of at most {MAX_DIMENSIONS} sizes")
    if not _counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"the data_offsets of {name} are not two offsets")
    begin, end = offsets
    if end - begin != prod(shape) * ITEM_BYTES[dtype]:
        raise _damaged(path, f"{name} has {end - begin} bytes, which is not what {dtype} {shape} asks for")
    return begin, end


def _counts(values: object) -> TypeGuard[list[int]]:
    """Whether this is a list of whole numbers from 0 that 64 bits hold; true and false are no numbers."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _damaged(path: Path, why: str) -> HaloError:
    return HaloError(f"{path} is no sound safetensors file: {why}.", hint=_FETCH)
