"""Prepared files: what the engine maps. Damage is found by `verify_prepared`, lies by the library."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backend import NativeModel
from engine.errors import HaloError
from engine.formats import prepared
from engine.formats.h1b import pack_codes
from engine.formats.prepared import PAGE, prepare, read_directory, ternary_planes, verify_prepared
from engine.model import Model, Ternary

ENTRY = 128


@pytest.fixture
def halo(tmp_path: Path, tiny_model: Callable[..., Model]) -> Path:
    path = tmp_path / "model.halo"
    prepare(tiny_model("odd"), path)
    return path


def sealed(data: bytearray) -> bytearray:
    """The same bytes with checksums that fit: a file that lies, rather than one that is damaged."""
    (count,) = struct.unpack_from("<I", data, 12)
    directory = bytes(data[PAGE : PAGE + ENTRY * min(count, 4096)])
    struct.pack_into("<I", data, 32, zlib.crc32(directory))
    struct.pack_into("<I", data, 80, zlib.crc32(bytes(data[:80])))
    return data


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
    assert read_directory(tmp_path / "m")[1][0].dtype == dtype


@given(st.integers(1, 5), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_every_weight_lies_where_the_layout_says(rows: int, cols: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 3, (rows, cols), dtype=np.uint8)
    planes = ternary_planes(Ternary(pack_codes(codes), np.ones(rows, np.float32), cols))
    width = planes.shape[1]
    assert width % 16 == 0 and 4 * width - 64 < cols <= 4 * width
    j = np.arange(cols)
    assert np.array_equal(planes[:, j % width] >> (2 * (j // width)).astype(np.uint8) & 3, codes)


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
    struct.pack_into("<I", data, 8, 2)
    halo.write_bytes(sealed(data))
    with pytest.raises(HaloError, match="version 2"):
        verify_prepared(halo)
    assert "version 2" in refusal(halo, native_library)


@pytest.mark.parametrize(
    ("entry", "field", "layout", "value", "sentence"),
    [
        (0, 48, "<I", 7, "embedding"),  # dtype
        (4, 52, "<I", 2, "layers.0.input_norm"),  # rows
        (8, 56, "<I", 91, "layers.0.q"),  # cols
        (8, 60, "<I", 16, "layers.0.q"),  # row_bytes
        (9, 72, "<Q", 2**63, "layers.0.q.scales"),  # bytes
        (8, 64, "<Q", 2**64 - PAGE, "outside"),  # offset that would wrap
        (8, 64, "<Q", 64, "outside"),  # offset that is not aligned
        (8, 64, "<Q", 0, "outside"),  # offset into the header
        (1, 0, "<8s", b"finalnor", "final_norm"),  # name
    ],
)
def test_a_directory_that_lies_is_refused(
    halo: Path, native_library: Path, entry: int, field: int, layout: str, value: object, sentence: str
) -> None:
    """Its checksums fit, so only the check of the value itself stands between it and a wild read."""
    data = bytearray(halo.read_bytes())
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
            where = rng.choice([rng.randrange(84), PAGE + rng.randrange(count * ENTRY)])
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
