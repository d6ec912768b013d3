"""Prepared files: what the engine maps. Damage is found by `verify_prepared`, lies by the library."""

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

from engine.backend import NativeModel
from engine.errors import HaloError
from engine.formats import prepared
from engine.formats.prepared import PAGE, prepare, read_directory, read_prepared, verify_prepared
from engine.formats.tiles import coarse_head, head_tiles, ternary_codes, ternary_tiles
from engine.model import Model
from tests.engine.conftest import SHAPES
from tests.engine.prepared_files import ENTRY, sealed


@pytest.fixture
def halo(tmp_path: Path, tiny_model: Callable[..., Model]) -> Path:
    path = tmp_path / "model.halo"
    prepare(tiny_model("odd"), path)
    return path


def refusal(path: Path, library: Path) -> str:
    """What the library says of the file; it must not open it."""
    with pytest.raises(HaloError) as caught:
        NativeModel.open(path, library).close()
    return caught.value.message


def test_a_prepared_file_verifies_and_keeps_the_shape(halo: Path, tiny_model: Callable[..., Model]) -> None:
    config = verify_prepared(halo)
    assert (config.hidden_size, config.vocab_size, config.num_layers) == (90, 97, 2)
    _, entries = read_directory(halo)
    assert all(entry.offset % PAGE == 0 for entry in entries)
    assert halo.stat().st_size % PAGE == 0


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path, tiny_model: Callable[..., Model]) -> None:
    """An install that is run again must find nothing changed."""
    prepare(tiny_model("odd"), tmp_path / "a")
    prepare(tiny_model("odd"), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(("bf16", "dtype"), [(True, prepared.BF16), (False, prepared.F32)])
def test_the_embedding_is_halved_only_where_nothing_is_lost(
    tmp_path: Path, tiny_model: Callable[..., Model], bf16: bool, dtype: int
) -> None:
    prepare(tiny_model("plain", bf16=bf16), tmp_path / "m")
    assert read_directory(tmp_path / "m")[1][-1].dtype == dtype


@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_every_weight_lies_where_the_layout_says(rows: int, cols: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 3, (rows, cols), dtype=np.uint8)
    tiles = ternary_tiles(codes)
    assert np.array_equal(ternary_codes(tiles, rows, cols), codes)
    r, c = seed % rows, seed // 7 % cols
    chunk = tiles[r // 16, c // 96]
    vector, plane, lane = c % 96 // 12, c % 12 // 4, r % 16 * 4 + c % 4
    index = chunk[64 * (vector // 2) + lane] >> 4 * (vector % 2) & 15 | (chunk[256 + lane] >> vector & 1) << 4
    assert index // 3**plane % 3 == codes[r, c]


@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1, 1e30]))
def test_the_coarse_heads_errors_are_bounds(rows: int, cols: int, seed: int, size: float) -> None:
    """With an error said too small, the exact arg max could be thrown away."""
    rng = np.random.default_rng(seed)
    block = (rng.standard_normal((rows, cols)) ** 3 * size).astype(np.float32)
    block[rng.integers(0, rows)] = 0
    levels, scale, error, norm = coarse_head(block)
    wide = block.astype(np.float64)
    miss = wide - scale.astype(np.float64)[:, None] * (levels - 31.5)
    with np.errstate(over="ignore"):
        assert (np.linalg.norm(miss, axis=1) <= error).all() and (np.linalg.norm(wide, axis=1) <= norm).all()
    chunk, r, c = head_tiles(levels), seed % rows, seed // 7 % cols
    group, lane = c % 16 // 4, r % 16 * 4 + c % 4
    bytes_ = chunk[r // 16, c // 16]
    assert levels[r, c] == (bytes_[64 * (group // 2) + lane] >> 4 * (group % 2) & 15) << 2 | (
        bytes_[128 + lane] >> 2 * group & 3
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_prepared_can_be_read_back_to_the_last_bit(
    tmp_path: Path, tiny_model: Callable[..., Model], shape: str
) -> None:
    model = tiny_model(shape)
    prepare(model, tmp_path / "m")
    back = read_prepared(tmp_path / "m")
    assert back.config == replace(model.config, rms_norm_eps=float(np.float32(model.config.rms_norm_eps)))
    assert np.array_equal(np.concatenate(list(back.embedding())), model.embedding)
    prepare(back, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "m").read_bytes()


def test_a_stream_that_does_not_keep_its_word_is_refused(
    tmp_path: Path, tiny_model: Callable[..., Model]
) -> None:
    model = tiny_model("plain")
    for wrong in (
        replace(model, layers=model.layers[:-1]),
        replace(model, layers=model.layers * 2),
        replace(model, embedding=model.embedding[:-1]),
        replace(model, head=model.embedding),
        replace(model, layers=[replace(layer, attn_sub_norm=None) for layer in model.layers]),
        replace(model, layers=[replace(layer, q=layer.down) for layer in model.layers]),
    ):
        with pytest.raises(HaloError):
            prepare(wrong, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_any_flipped_byte_is_refused_at_open(halo: Path, native_library: Path) -> None:
    """Padding too: what is not checked could be damaged without anybody's knowing."""
    good = halo.read_bytes()
    for place in [*range(0, 128), *range(128, 8192, 61), *range(8192, len(good), 1999), len(good) - 1]:
        data = bytearray(good)
        data[place] ^= 1 << place % 8
        halo.write_bytes(data)
        refusal(halo, native_library)


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path, tiny_model: Callable[..., Model]) -> None:
    with pytest.raises(HaloError, match="cannot be written"):
        prepare(tiny_model("least"), tmp_path / "none" / "m.halo")


def test_a_full_disk_leaves_no_half_file(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    """The write is cut off by the kernel's limit on the size of a file, as a full disk would."""
    import resource
    import signal

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        with pytest.raises(HaloError, match="cannot be written"):
            prepare(tiny_model("wide"), tmp_path / "m.halo")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_each_damaged_tensor_is_named(halo: Path) -> None:
    good = halo.read_bytes()
    for entry in read_directory(halo)[1]:
        data = bytearray(good)
        data[entry.offset + entry.size // 2] ^= 1
        halo.write_bytes(data)
        with pytest.raises(HaloError, match=rf"The tensor {entry.name} .*damaged"):
            verify_prepared(halo)


@pytest.mark.parametrize("length", [0, 7, 4095, 4096, 8191, 8192, 20_000])
def test_a_cut_file_is_refused_by_both_readers(halo: Path, native_library: Path, length: int) -> None:
    halo.write_bytes(halo.read_bytes()[:length])
    with pytest.raises(HaloError):
        verify_prepared(halo)
    refusal(halo, native_library)


def test_bytes_too_many_are_refused_by_both_readers(halo: Path, native_library: Path) -> None:
    halo.write_bytes(halo.read_bytes() + b"\0" * PAGE)
    with pytest.raises(HaloError, match="bytes"):
        verify_prepared(halo)
    assert "header says" in refusal(halo, native_library)


def test_another_version_is_refused_by_both_readers(halo: Path, native_library: Path) -> None:
    data = bytearray(halo.read_bytes())
    struct.pack_into("<I", data, 8, 3)
    halo.write_bytes(sealed(data))
    with pytest.raises(HaloError, match="version 3"):
        verify_prepared(halo)
    assert "version 3" in refusal(halo, native_library)


@pytest.mark.parametrize(
    ("entry", "field", "layout", "value", "sentence"),
    [
        (-1, 48, "<I", 7, "embedding"),  # dtype
        (3, 52, "<I", 2, "layers.0.input_norm"),  # rows
        (7, 56, "<I", 91, "layers.0.q"),  # cols
        (7, 60, "<I", 16, "layers.0.q"),  # row_bytes
        (8, 72, "<Q", 2**63, "layers.0.q.scales"),  # bytes
        (7, 64, "<Q", 2**64 - PAGE, "outside"),  # offset that would wrap
        (7, 64, "<Q", 64, "outside"),  # offset that is not aligned
        (7, 64, "<Q", 0, "outside"),  # offset into the header
        (0, 0, "<8s", b"finalnor", "final_norm"),  # name
    ],
)
def test_a_directory_that_lies_is_refused(
    halo: Path, native_library: Path, entry: int, field: int, layout: str, value: object, sentence: str
) -> None:
    """Its checksums fit, so only the check of the value itself stands between it and a wild read."""
    data = bytearray(halo.read_bytes())
    entry %= len(read_directory(halo)[1])
    struct.pack_into(layout, data, PAGE + ENTRY * entry + field, value)
    halo.write_bytes(sealed(data))
    assert sentence in refusal(halo, native_library)


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path, native_library: Path) -> None:
    refusal(tmp_path, native_library)
    assert "cannot be opened" in refusal(tmp_path / "none", native_library)


def test_random_damage_never_crashes_the_library(halo: Path, native_library: Path) -> None:
    """A crash would take the server down with it. Half of the damage has checksums that fit.

    Where a file is still taken (damage that is no lie, such as an eps), it must also run, or say why not.
    """
    rng = random.Random(3)
    good = halo.read_bytes()
    count = len(read_directory(halo)[1])
    opened = 0
    for turn in range(1500):
        data = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            where = rng.choice([rng.randrange(96), PAGE + rng.randrange(count * ENTRY)])
            if rng.random() < 0.5:
                data[where] = rng.randrange(256)
            else:
                struct.pack_into(
                    "<I", data, where & ~3, rng.choice([0, 1, 2**31 - 1, 2**32 - 1, rng.getrandbits(32)])
                )
        halo.write_bytes(sealed(data) if turn % 2 else data)
        try:
            model = NativeModel.open(halo, native_library)
        except HaloError:
            continue
        opened += 1
        with model, model.session(context=2, threads=1) as session:
            try:
                session.prefill(0, [0, 1])
            except HaloError as error:
                assert "not finite" in error.message
    assert opened < 1000
