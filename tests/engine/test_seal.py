"""A model directory in which any byte is another, or any file of another model, is refused before a token."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.backend import NativeModel
from engine.errors import HaloError
from engine.formats.prepared import prepare
from engine.formats.seal import HEAD, PREPARED, SEAL, check_open, problems, read_seal, seal, sha256_of
from engine.formats.store import is_stored, is_whole, unpack
from engine.generate import Engine
from tests.engine.test_native_serving import CONTEXT, write_model

SMALL = ("model.json", "tokenizer.htok", "chat_template.jinja", SEAL)


def make(path: Path, model, merges: int = 42) -> Path:
    write_model(path, model, merges)
    (path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (path / "NOTICE").write_text("not read at run time")
    seal(path)
    return path


@pytest.fixture(scope="module")
def tiny(tiny_model, tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("seal") / "m", tiny_model("plain", seed=3, max_seq_len=CONTEXT))


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.fixture
def refused(native_library):
    def refuse(directory: Path, words: str = "") -> None:
        with pytest.raises(HaloError, match=words) as info:
            Engine.open(directory, native_library)
        assert info.value.hint

    return refuse


def flips(path: Path, places: Iterable[int], mask: int) -> Iterator[int]:
    """Each of `places` in turn is another byte, and is right again afterwards."""
    with path.open("r+b") as stream:
        for at in places:
            old = os.pread(stream.fileno(), 1, at)
            os.pwrite(stream.fileno(), bytes([old[0] ^ mask]), at)
            yield at
            os.pwrite(stream.fileno(), old, at)


def test_a_whole_directory_opens(tiny, native_library):
    with Engine.open(tiny, native_library) as engine:
        assert engine.context == CONTEXT
    assert not list(problems(tiny))


@pytest.mark.parametrize("name", SMALL)
def test_every_byte_of_the_small_files_counts(copy, name):
    """One bit of a tokenizer or a template gives fluent text that no one asked for."""
    path = copy / name
    rng = random.Random(name)
    for at in flips(path, range(path.stat().st_size), 1 << rng.randrange(8)):
        with pytest.raises(HaloError) as info:
            check_open(copy)
        assert name in info.value.message and info.value.hint, at
    check_open(copy)


@pytest.mark.parametrize("name", [*SMALL, PREPARED])
def test_flipped_bytes_are_refused_by_the_engine_itself(copy, name, refused):
    path = copy / name
    size = path.stat().st_size
    rng = random.Random(name)
    for _ in flips(path, (0, size - 1, *(rng.randrange(size) for _ in range(12))), 1 << rng.randrange(8)):
        refused(copy, name)


@pytest.mark.parametrize("name", [*SMALL, PREPARED])
def test_cut_lengthened_and_missing_files_are_refused(copy, name, refused):
    path = copy / name
    whole = path.read_bytes()
    lengths = {0, 1, len(whole) // 2, len(whole) - 1}
    if name != PREPARED:
        lengths |= set(range(0, len(whole), max(1, len(whole) // 50)))
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        refused(copy, name)
    path.write_bytes(whole + b"\n")
    refused(copy, name)
    path.unlink()
    refused(copy, name)
    path.mkdir()
    refused(copy, name)
    path.rmdir()
    os.mkfifo(path)
    refused(copy, name)


def test_files_of_another_model_are_refused(copy, tiny_model, tmp_path, refused):
    """Of the same shape and vocabulary: each for itself is whole, together they talk nonsense."""
    other = make(tmp_path / "other", tiny_model("plain", seed=4, max_seq_len=CONTEXT))
    (other / "chat_template.jinja").write_text("{{ messages }}")
    (other / "model.json").write_text((other / "model.json").read_text().replace("tiny", "tony"))
    tokenizer = (other / "tokenizer.htok").read_bytes()
    (other / "tokenizer.htok").write_bytes(tokenizer.replace(b"e", b"a"))
    seal(other)
    for name in ("model.json", "tokenizer.htok", "chat_template.jinja", PREPARED):
        whole = (copy / name).read_bytes()
        shutil.copyfile(other / name, copy / name)
        refused(copy, name)
        (copy / name).write_bytes(whole)


def test_a_tokenizer_or_template_that_came_later_is_refused(copy, refused):
    (copy / "tokenizer.json").write_text("{}")
    refused(copy, "tokenizer.json is not listed")


def test_a_model_of_another_shape_is_refused_though_it_is_sealed(copy, tiny_model, refused):
    prepare(tiny_model("wide", max_seq_len=CONTEXT), copy / PREPARED)
    seal(copy)
    refused(copy, "515 tokens and its tokenizer 300")


def test_without_a_seal_the_way_to_one_is_said(copy, refused):
    (copy / SEAL).unlink()
    refused(copy, "no SHA256SUMS")
    with pytest.raises(HaloError) as info:
        check_open(copy)
    assert "halo model verify --seal" in info.value.hint


def test_the_seal_is_what_sha256sum_reads(tiny):
    done = subprocess.run(["sha256sum", "--check", SEAL], cwd=tiny, capture_output=True, text=True)
    assert done.returncode == 0 and "model.halo: OK" in done.stdout and "WARNING" not in done.stderr


def test_sealing_twice_gives_the_same_bytes(copy, tiny):
    seal(copy)
    assert (copy / SEAL).read_bytes() == (tiny / SEAL).read_bytes()


def test_the_store_takes_a_sealed_model_and_refuses_one_with_another_template(copy, tmp_path, native_library):
    described = json.loads((copy / "model.json").read_text())
    described["files"] = {
        name: {"sha256": sha256_of(copy / name), "bytes": (copy / name).stat().st_size}
        for name in (PREPARED, "tokenizer.htok")
    }
    (copy / "model.json").write_text(json.dumps(described))
    seal(copy)
    store = tmp_path / "store"
    stored = unpack(copy, store)
    assert is_whole(store, described)
    Engine.open(stored, native_library).close()
    (stored / "chat_template.jinja").write_text("{{ other }}")
    assert is_stored(store, described) and not is_whole(store, described)
    (copy / "chat_template.jinja").write_text("{{ other }}")
    with pytest.raises(HaloError, match="chat_template"):
        unpack(copy, store, anew=True)


def test_what_a_run_does_not_read_may_change(copy, native_library):
    (copy / "NOTICE").write_text("changed")
    (copy / "pull.json").write_text("{}")
    Engine.open(copy, native_library).close()


def test_beyond_its_first_part_model_halo_is_left_to_the_engine(copy):
    """An open must not hash gigabytes: what check_open looks at has a bound."""
    with (copy / PREPARED).open("r+b") as stream:
        stream.truncate(3 * HEAD)
    seal(copy)
    for _ in flips(copy / PREPARED, (HEAD - 1,), 1):
        with pytest.raises(HaloError, match="begin"):
            check_open(copy)
    for _ in flips(copy / PREPARED, (HEAD, 3 * HEAD - 1), 1):
        check_open(copy)
        assert dict(problems(copy)).keys() == {PREPARED}


def test_flipped_bytes_of_the_tensors_are_refused_by_the_engine_that_maps_them(tiny_model, tmp_path, refused):
    """A disk that returns one wrong bit of gigabytes: an open reads each tensor once, and checks its CRC."""
    model = make(tmp_path / "m", tiny_model("plain", seed=3, max_seq_len=16384))
    path = model / PREPARED
    rng = random.Random(1)
    size = path.stat().st_size
    assert size > HEAD + 100_000
    places = [HEAD, size - 1, *(rng.randrange(HEAD, size) for _ in range(30))]
    for at in flips(path, places, 1 << rng.randrange(8)):
        check_open(model)
        refused(model, PREPARED)
        assert at >= HEAD


@pytest.mark.slow
@pytest.mark.skipif("HALO_TEST_SLOW" not in os.environ, reason="HALO_TEST_SLOW=1 flips each of 115,000 bytes")
def test_every_byte_of_model_halo_counts_for_the_engine_that_maps_it(tiny_model, tmp_path, native_library):
    """Without the seal: what the engine itself checks leaves no byte out, fillings included."""
    path = tmp_path / PREPARED
    prepare(tiny_model("least", max_seq_len=2), path)
    rng = random.Random(2)
    for at in flips(path, range(path.stat().st_size), 1 << rng.randrange(8)):
        with pytest.raises(HaloError) as info:
            NativeModel.open(path, native_library)
        assert info.value.hint, at
    NativeModel.open(path, native_library).close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400) | st.text(max_size=200).map(str.encode), keep=st.integers(0, 600))
def test_any_seal_is_read_or_refused(copy, tiny, data, keep):
    whole = (tiny / SEAL).read_bytes()
    (copy / SEAL).write_bytes(whole[:keep] + data + whole[keep + len(data) :])
    try:
        sums, _, _ = read_seal(copy)
    except HaloError:
        return
    assert (copy / SEAL).read_bytes() == whole and PREPARED in sums
