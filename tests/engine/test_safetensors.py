"""The safetensors reader: what it gives is what was written, and a file that lies is one sentence."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import HaloError
from engine.formats.safetensors import MAX_HEADER, Tensor, read_safetensors


def write(path: Path, entries: dict[str, Any] | str | bytes, data: bytes = b"") -> Path:
    header = entries if isinstance(entries, bytes) else None
    header = header or (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def entry(dtype: Any = "U8", shape: Any = (4,), begin: Any = 0, end: Any = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    values = np.array([[1.5, -2.0, 0.0], [3.0, 0.25, -1.0]], np.float32)
    parts = {
        "half": ("F16", values.astype("<f2").tobytes()),
        "brain": ("BF16", (values.view(np.uint32) >> 16).astype("<u2").tobytes()),
        "bytes": ("U8", bytes(range(6))),
        "full": ("F32", values.tobytes()),
        "none": ("F32", b""),
    }
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, raw) in parts.items():
        entries[name] = entry(dtype, [2, 3] if raw else [0, 3], len(data), len(data) + len(raw))
        data += raw
    return write(tmp_path / "sound.safetensors", entries, data)


def test_each_type_is_widened_exactly(sound: Path) -> None:
    """The odd length of the U8 tensor leaves the floats after it unaligned, as the format allows."""
    tensors = read_safetensors(sound)
    for name in ("half", "brain", "full"):
        assert tensors[name].floats().tolist() == [[1.5, -2.0, 0.0], [3.0, 0.25, -1.0]]
        assert np.concatenate(list(tensors[name].blocks())).tolist() == tensors[name].floats().tolist()
    assert tensors["bytes"].codes().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["none"].floats().shape == (0, 3) and list(tensors["none"].blocks()) == []


def test_a_tensor_is_a_view_of_the_file(sound: Path) -> None:
    """A checkpoint of 5 GB must not be read into memory to look at its names."""
    raw = read_safetensors(sound)["full"].raw
    assert not raw.flags.owndata and not raw.flags.writeable


def test_blocks_are_whole_rows_and_small() -> None:
    rows, cols = 37, 1 << 20
    big = Tensor("big", "BF16", (rows, cols), np.zeros(rows * cols * 2, np.uint8))
    shapes = [block.shape for block in big.blocks()]
    assert sum(shape[0] for shape in shapes) == rows and max(shape[0] for shape in shapes) <= 4


def test_a_file_that_the_library_wrote_is_read(tmp_path: Path) -> None:
    numpy_side = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    arrays: dict[str, Any] = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(5, dtype=np.uint8),
    }
    numpy_side.save_file(arrays, tmp_path / "m.safetensors", metadata={"format": "np"})
    tensors = read_safetensors(tmp_path / "m.safetensors")
    assert np.array_equal(tensors["a"].floats(), arrays["a"])
    assert np.array_equal(tensors["b"].codes(), arrays["b"])


def test_a_type_is_not_taken_for_another(sound: Path) -> None:
    tensors = read_safetensors(sound)
    with pytest.raises(HaloError, match="not U8"):
        tensors["full"].codes()
    with pytest.raises(HaloError, match="not of floats"):
        tensors["bytes"].floats()


BAD: dict[str, tuple[Any, bytes, str]] = {
    "no JSON": ("{{", b"", "not the JSON"),
    "no UTF-8": (b"{\xff}", b"", "not the JSON"),
    "too deep": ("[" * 200_000, b"", "not the JSON"),
    "no object": ("[]", b"", "no JSON object"),
    "twice": ('{"a":1,"a":2}', b"", "not the JSON"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "entry is a number": ({"a": 1}, b"1234", "entry of a"),
    "field too many": ({"a": entry() | {"more": 1}}, b"1234", "entry of a"),
    "unknown type": ({"a": entry("I64", [1], 0, 8)}, b"12345678", "no type that halo reads"),
    "type is a list": ({"a": entry(["U8"])}, b"1234", "no type that halo reads"),
    "size not of shape": ({"a": entry(shape=[5])}, b"1234", "asks for"),
    "negative size": ({"a": entry(shape=[-2, -2])}, b"1234", "shape of a"),
    "size is true": ({"a": entry(shape=[True, 4])}, b"1234", "shape of a"),
    "size is a float": ({"a": entry(shape=[4.0])}, b"1234", "shape of a"),
    "shape is no list": ({"a": entry(shape=4)}, b"1234", "shape of a"),
    "too many dimensions": ({"a": entry(shape=[1] * 9)}, b"1234", "shape of a"),
    "size beyond 64 bits": ({"a": entry(shape=[1 << 70])}, b"1234", "shape of a"),
    "sizes that wrap around": ({"a": entry(shape=[1 << 62, 1 << 62, 0, 4], end=0)}, b"1", "belong to no"),
    "three offsets": (
        {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 4]}},
        b"1234",
        "two offsets",
    ),
    "offsets turned round": ({"a": entry(begin=4, end=0)}, b"1234", "asks for"),
    "beyond the end": ({"a": entry()}, b"123", "ends at byte 4 of 3"),
    "overlap": ({"a": entry(), "b": entry(begin=2, end=6)}, b"123456", "overlaps"),
    "hole": ({"a": entry(), "b": entry(begin=5, end=9)}, b"123456789", "hole"),
    "bytes of nobody": ({"a": entry()}, b"12345", "belong to no tensor"),
    "empty name": ({"": entry()}, b"1234", "name of a tensor"),
    "name with a control character": ({"a\x1b[2J": entry()}, b"1234", "name of a tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    entries, data, why = BAD[case]
    with pytest.raises(HaloError, match=why):
        read_safetensors(write(tmp_path / "bad.safetensors", entries, data))


@pytest.mark.parametrize("length", [0, 1, 11, MAX_HEADER + 1, 1 << 40, (1 << 64) - 1])
def test_a_header_length_is_bounded_before_it_is_read(tmp_path: Path, length: int) -> None:
    """An eight-byte lie must not become an allocation."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{" + b" " * 9)
    with pytest.raises(HaloError, match="its header would be"):
        read_safetensors(path)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_a_file_without_a_header_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(HaloError, match="its header would be"):
        read_safetensors(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A FIFO would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path / "pipe", "regular"),
        (tmp_path, "regular"),
        (tmp_path / "x", "cannot be read"),
    ):
        with pytest.raises(HaloError, match=why):
            read_safetensors(path)


def test_a_mutated_file_is_read_or_refused(sound: Path) -> None:
    """Nothing but HaloError, whatever a disk or a person did to the file."""
    original = sound.read_bytes()
    header_end = 8 + struct.unpack("<Q", original[:8])[0]
    rng = random.Random(7)
    refused = 0
    for _ in range(3000):
        data = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(header_end) if rng.random() < 0.9 else rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[place] = rng.randrange(256)
            elif kind == 1:
                data[place] = rng.choice(b'0123456789,[]{}":-')
            elif kind == 2:
                del data[place : place + rng.randint(1, 9)]
            else:
                data[place:place] = data[place : place + rng.randint(1, 9)]
        sound.write_bytes(data)
        try:
            for tensor in read_safetensors(sound).values():
                (tensor.codes if tensor.dtype == "U8" else tensor.floats)()
        except HaloError:
            refused += 1
    assert 1000 < refused <= 3000
