"""`.h1b`: what is read is what was written, and a file that lies is refused in one sentence."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import HaloError
from engine.formats.h1b import h1b_bytes, pack_codes, read_h1b, unpack_codes, write_h1b
from engine.model import Layer, Model, ModelConfig, Ternary
from tests.engine.conftest import SHAPES

BITNET_2B = ModelConfig(2560, 6912, 30, 20, 5, 128256, 4096, True, 500000.0, 1e-5)
HEADER = 52


@pytest.fixture
def written(tmp_path: Path, tiny_model: Callable[..., Model]) -> Path:
    path = tmp_path / "model.h1b"
    write_h1b(path, tiny_model("odd"))
    return path


def patched(path: Path, offset: int, raw: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(raw)] = raw
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("version", "size"), [(1, 1_840_384_044), (2, 1_840_384_052), (4, 1_736_304_692)])
def test_the_size_of_the_2b_model_is_the_one_computed_from_the_published_layout(
    version: int, size: int
) -> None:
    """A wrong layout would refuse every real file. The sizes are of an independent reading of the format."""
    assert h1b_bytes(BITNET_2B, version) == size


@pytest.mark.parametrize("version", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_round_trip_gives_the_same_bytes(
    tmp_path: Path, tiny_model: Callable[..., Model], shape: str, version: int
) -> None:
    first, second = tmp_path / "a.h1b", tmp_path / "b.h1b"
    model = tiny_model(shape)
    # Version 1 has no field for theta; its readers take this one.
    model = replace(model, config=replace(model.config, rope_theta=500000.0))
    write_h1b(first, model, version)
    write_h1b(second, read_h1b(first), version)
    assert first.read_bytes() == second.read_bytes()
    assert first.stat().st_size == h1b_bytes(model.config, version)


def test_version_one_does_not_lose_a_theta(tmp_path: Path, tiny_model: Callable[..., Model]) -> None:
    with pytest.raises(HaloError, match="cannot say rope_theta 10000"):
        write_h1b(tmp_path / "m.h1b", tiny_model("plain"), 1)
    assert list(tmp_path.iterdir()) == []


def test_every_tensor_comes_back(tmp_path: Path, tiny_model: Callable[..., Model]) -> None:
    model = tiny_model("odd", bf16=False)
    write_h1b(tmp_path / "m.h1b", model)
    back = read_h1b(tmp_path / "m.h1b")
    assert back.config == replace(model.config, rms_norm_eps=back.config.rms_norm_eps)
    assert np.float32(back.config.rms_norm_eps) == np.float32(model.config.rms_norm_eps)
    assert np.array_equal(back.embedding, model.embedding) and np.array_equal(
        back.final_norm, model.final_norm
    )
    for one, other in zip(back.layers, model.layers, strict=True):
        for name in Layer.__dataclass_fields__:
            a, b = getattr(one, name), getattr(other, name)
            if isinstance(a, Ternary):
                assert (
                    np.array_equal(a.packed, b.packed)
                    and np.array_equal(a.scales, b.scales)
                    and a.cols == b.cols
                )
            else:
                assert np.array_equal(a, b)


def test_the_first_bytes_are_the_published_header(written: Path) -> None:
    """Another reader of the format must find each field where the format has it."""
    fields = struct.unpack("<4s10i2f", written.read_bytes()[:HEADER])
    assert fields[:2] == (b"H1B\0", 2)
    assert fields[2:11] == (90, 211, 2, 5, 1, 97, 64, 1, 0)
    assert fields[11] == 10000.0


def test_weights_are_packed_four_to_a_byte_the_first_lowest() -> None:
    assert pack_codes(np.array([[0, 1, 2, 0, 2]], dtype=np.uint8)).tolist() == [[0b00_10_01_00, 0b10]]


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_packing_loses_nothing(rows: int, cols: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 3, (rows, cols), dtype=np.uint8)
    assert np.array_equal(unpack_codes(Ternary(pack_codes(codes), np.ones(rows, np.float32), cols)), codes)


def test_zero_theta_and_eps_mean_the_defaults(written: Path) -> None:
    config = read_h1b(patched(written, 44, struct.pack("<2f", 0.0, -1.0))).config
    assert (config.rope_theta, config.rms_norm_eps) == (500000.0, 1e-5)


@pytest.mark.parametrize("missing", [1, 4, 1000])
def test_a_cut_file_is_refused(written: Path, missing: int) -> None:
    written.write_bytes(written.read_bytes()[:-missing])
    with pytest.raises(HaloError, match="cut short"):
        read_h1b(written)


def test_bytes_too_many_are_refused(written: Path) -> None:
    """An untied head at the end would be silently left out of the model."""
    written.write_bytes(written.read_bytes() + b"\0")
    with pytest.raises(HaloError, match="too long"):
        read_h1b(written)


@pytest.mark.parametrize("length", [0, 3, 43, 44, 51])
def test_a_file_that_ends_in_its_header_is_refused(written: Path, length: int) -> None:
    written.write_bytes(written.read_bytes()[:length])
    with pytest.raises(HaloError):
        read_h1b(written)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(HaloError, match="cannot be read"):
        read_h1b(tmp_path / "none.h1b")


@pytest.mark.parametrize(
    ("version", "name"),
    [(3, "Sherry"), (5, "WMMA"), (0, "version 0"), (6, "version 6"), (-1, "-1")],
)
def test_other_versions_are_refused_by_name(written: Path, version: int, name: str) -> None:
    with pytest.raises(HaloError, match=name):
        read_h1b(patched(written, 4, struct.pack("<i", version)))


@pytest.mark.parametrize(
    ("flags", "name"), [(1, "Hadamard"), (4, "Bonsai Q1"), (8, "Bonsai TQ2"), (64, "unknown")]
)
def test_flags_are_refused_by_name(written: Path, flags: int, name: str) -> None:
    """A flag changes what the weights mean; reading on would give wrong text."""
    with pytest.raises(HaloError, match=name):
        read_h1b(patched(written, 40, struct.pack("<i", flags)))


@pytest.mark.parametrize("field", range(2, 10))
@pytest.mark.parametrize("value", [0, -1, -(2**31), 2**31 - 1, 2**25])
def test_impossible_sizes_are_refused_before_anything_is_allocated(
    written: Path, field: int, value: int
) -> None:
    with pytest.raises(HaloError):
        read_h1b(patched(written, 4 * field, struct.pack("<i", value)))


@pytest.mark.parametrize("offset", [44, 48])
def test_a_header_that_is_not_finite_is_refused(written: Path, offset: int) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(HaloError, match="above zero"):
            read_h1b(patched(written, offset, struct.pack("<f", value)))


def test_an_embedding_that_is_not_finite_is_refused(written: Path) -> None:
    with pytest.raises(HaloError, match=r"not finite in embedding"):
        read_h1b(patched(written, HEADER, struct.pack("<f", float("nan"))))


def test_a_scale_that_is_not_finite_is_refused_with_its_name(written: Path) -> None:
    end = written.stat().st_size
    with pytest.raises(HaloError, match=r"layers\.1\.down\.scales"):
        read_h1b(patched(written, end - 4, struct.pack("<f", float("inf"))))


def test_the_unused_code_is_refused_with_its_name(written: Path) -> None:
    model = read_h1b(written)
    hidden, vocab = model.config.hidden_size, model.config.vocab_size
    first_code = HEADER + 4 * hidden * (vocab + 1) + 4 * (8 * hidden + model.config.intermediate_size)
    with pytest.raises(HaloError, match=r"weight code 3 in layers\.0\.q"):
        read_h1b(patched(written, first_code, b"\x0c"))


def test_copies_that_disagree_are_refused(written: Path) -> None:
    """They are one norm written several times: where they differ, the layout was misread."""
    config = read_h1b(written).config
    second_copy = HEADER + 4 * config.hidden_size * (config.vocab_size + 1 + 3)
    with pytest.raises(HaloError, match="disagree"):
        read_h1b(patched(written, second_copy, struct.pack("<f", 9.0)))


def test_a_model_of_another_shape_than_it_says_is_not_written(
    tmp_path: Path, tiny_model: Callable[..., Model]
) -> None:
    model = tiny_model("plain")
    with pytest.raises(HaloError, match="final_norm"):
        write_h1b(tmp_path / "m.h1b", replace(model, final_norm=model.final_norm[:-1]))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, tiny_model: Callable[..., Model]) -> None:
    path = tmp_path / "m.h1b"
    write_h1b(path, tiny_model("least"))
    before = path.read_bytes()
    broken = replace(tiny_model("least"), embedding=np.array([["x", "y"]] * 3))
    with pytest.raises(ValueError, match="could not convert"):
        write_h1b(path, broken)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_random_damage_is_refused_or_read_but_never_anything_else(written: Path) -> None:
    """A parser must not raise anything that the command line would show as a traceback."""
    rng = random.Random(7)
    good = written.read_bytes()
    for _ in range(300):
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
