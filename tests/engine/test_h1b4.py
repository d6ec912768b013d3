"""`.h1b` version 4 and streams of `.h1b`: base 3 digit by digit, and what the format cannot say."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import HaloError
from engine.formats.codes import pack_base3, unpack_base3, unpack_codes
from engine.formats.h1b import h1b_bytes, read_h1b, stream_h1b, write_h1b
from engine.model import Model
from tests.engine import formats_fixtures as make
from tests.engine.conftest import SHAPES

HEADER = 52


@pytest.fixture
def written(tmp_path: Path, tiny_model: Callable[..., Model]) -> Path:
    path = tmp_path / "model.h1b"
    write_h1b(path, tiny_model("odd"), 4)
    return path


def first_matrix(model: Model) -> int:
    """The offset of layers.0.q."""
    c = model.config
    return HEADER + 4 * c.hidden_size * (c.vocab_size + 1) + 4 * (8 * c.hidden_size + c.intermediate_size)


def patched(path: Path, offset: int, raw: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(raw)] = raw
    path.write_bytes(data)
    return path


def test_digits_are_packed_lowest_first_and_the_filling_is_zero_weights() -> None:
    """byte = d0 + 3 d1 + 9 d2 + 27 d3 + 81 d4; a row fills up to twenty weights with the digit 1."""
    row = pack_base3(np.array([[0, 1, 2, 0, 2, 2, 0]], np.uint8))
    assert row.tolist() == [[0 + 3 + 18 + 0 + 162, 2 + 0 + 9 + 27 + 81, 121, 121]]


@given(st.integers(1, 9), st.integers(1, 90), st.integers(0, 2**32 - 1))
def test_base_three_loses_nothing(rows: int, cols: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 3, (rows, cols), dtype=np.uint8)
    packed = pack_base3(codes)
    assert packed.shape == (rows, (cols + 19) // 20 * 4) and packed.max() <= 242
    assert np.array_equal(unpack_base3(packed, cols), codes)


@pytest.mark.parametrize("shape", SHAPES)
def test_versions_two_and_four_hold_the_same_model(
    tmp_path: Path, tiny_model: Callable[..., Model], shape: str
) -> None:
    model = tiny_model(shape, bf16=False)
    write_h1b(tmp_path / "2.h1b", model, 2)
    write_h1b(tmp_path / "4.h1b", model, 4)
    two, four = read_h1b(tmp_path / "2.h1b"), read_h1b(tmp_path / "4.h1b")
    assert two.config == four.config and make.same_layers(two.layers, four.layers)
    assert make.same_layers(four.layers, model.layers) and np.array_equal(four.embedding, model.embedding)


def test_the_bytes_of_a_matrix_are_the_published_ones(
    written: Path, tiny_model: Callable[..., Model]
) -> None:
    """Another reader of the format must find each digit where the format has it."""
    model = tiny_model("odd")
    codes = unpack_codes(model.layers[0].q)
    raw = written.read_bytes()[first_matrix(model) :]
    row_bytes = 100 // 5  # 90 weights, filled up to 100
    for row in range(len(codes)):
        for col in range(90):
            byte = raw[row * row_bytes + col // 5]
            assert byte // 3 ** (col % 5) % 3 == codes[row, col]
        assert raw[row * row_bytes + 18 : (row + 1) * row_bytes] == b"\x79\x79"


def test_another_filling_is_read_alike(written: Path, tiny_model: Callable[..., Model]) -> None:
    """The predecessor filled up with zeros, which are weights of -1 to a reader that counts them."""
    model = tiny_model("odd")
    for row in range(90):
        patched(written, first_matrix(model) + 20 * row + 18, b"\0\0")
    assert make.same_layers(read_h1b(written).layers, model.layers)


@pytest.mark.parametrize("byte", [243, 255])
def test_a_byte_that_is_no_five_digits_is_refused_with_its_name(
    written: Path, tiny_model: Callable[..., Model], byte: int
) -> None:
    patched(written, first_matrix(tiny_model("odd")) + 7, bytes([byte]))
    with pytest.raises(HaloError, match=r"no five digits in layers\.0\.q"):
        read_h1b(written)


def test_a_file_that_calls_itself_another_version_is_refused(written: Path) -> None:
    for version in (1, 2):
        with pytest.raises(HaloError, match=r"too long|cut short"):
            read_h1b(patched(written, 4, struct.pack("<i", version)))


@pytest.mark.parametrize("version", [1, 2, 4])
def test_a_stream_is_the_file_as_often_as_it_is_read(tmp_path: Path, version: int) -> None:
    model = make.random_model()
    model = replace(model, config=replace(model.config, rms_norm_eps=1e-5))
    write_h1b(tmp_path / "m.h1b", model, version)
    stream = stream_h1b(tmp_path / "m.h1b")
    for _ in range(2):
        assert make.same_layers(stream.layers(), model.layers)
        assert np.array_equal(np.concatenate(list(stream.embedding())), model.embedding)
    one, other = stream.layers(), stream.layers()
    next(one)
    assert make.same_layers(other, model.layers), "two passes at once do not disturb each other"
    write_h1b(tmp_path / "again.h1b", stream, version)
    assert (tmp_path / "again.h1b").read_bytes() == (tmp_path / "m.h1b").read_bytes()


def test_a_stream_names_what_is_wrong_when_its_turn_comes(tmp_path: Path) -> None:
    model = make.random_model()
    write_h1b(tmp_path / "m.h1b", model)
    nan = struct.pack("<f", np.nan)
    stream = stream_h1b(patched(tmp_path / "m.h1b", (tmp_path / "m.h1b").stat().st_size - 4, nan))
    assert len(list(stream.embedding())) >= 1
    with pytest.raises(HaloError, match=r"layers\.1\.down\.scales"):
        list(stream.layers())
    with pytest.raises(HaloError, match="embedding"):
        list(stream_h1b(patched(tmp_path / "m.h1b", HEADER + 4000, nan)).embedding())


def test_an_untied_head_is_refused(written: Path) -> None:
    """The format has no place for one, so a file that says so is half a model."""
    with pytest.raises(HaloError, match="untied"):
        read_h1b(patched(written, 36, struct.pack("<i", 0)))
    with pytest.raises(HaloError, match="tie_embeddings = 7"):
        read_h1b(patched(written, 36, struct.pack("<i", 7)))


CANNOT: dict[str, tuple[dict[str, Any], str]] = {
    "SiLU": ({"activation": "silu"}, "SiLU"),
    "no sub-norms": ({"sub_norms": False}, "without sub-norms"),
    "untied": ({"tie_embeddings": False}, "head of its own"),
    "head size": ({"head_dim": 128}, "head size of 128"),
}


@pytest.mark.parametrize("version", [1, 2, 4])
@pytest.mark.parametrize("case", CANNOT)
def test_what_the_format_cannot_say_is_not_written(tmp_path: Path, case: str, version: int) -> None:
    """Its readers would run another graph without an error. GGUF can say it, and the hint says so."""
    changes, why = CANNOT[case]
    model = make.random_model(replace(make.BITNET, **changes))
    with pytest.raises(HaloError, match=why) as caught:
        write_h1b(tmp_path / "m.h1b", model, version)
    assert "GGUF" in caught.value.hint and list(tmp_path.iterdir()) == []


def test_random_damage_is_refused_or_read_but_never_anything_else(written: Path) -> None:
    rng = random.Random(5)
    good = written.read_bytes()
    for _ in range(200):
        data = bytearray(good[: rng.choice([len(good), len(good), rng.randrange(len(good))])])
        for _ in range(rng.randint(1, 4)):
            if data:
                data[rng.randrange(min(len(data), rng.choice([60, len(good)])))] = rng.randrange(256)
        written.write_bytes(data)
        try:
            model = read_h1b(written)
        except HaloError:
            continue
        assert h1b_bytes(model.config, struct.unpack_from("<i", data, 4)[0]) == len(data)
