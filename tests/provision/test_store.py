"""The model store: only what has the right hashes gets a name; everything else is one clear error."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import HaloError
from engine.formats.store import is_stored, read_description, store_name, unpack


@pytest.fixture
def source(demo: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo, tmp_path / "source"))


def describe(source: Path, change: Any) -> None:
    path = source / "model.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


def test_unpacked_once_and_whole(source: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    place = unpack(source, store)
    description = read_description(source)
    assert place == store / store_name(description)
    assert {path.name for path in place.iterdir()} == {"model.h1b", "tokenizer.htok", "model.json", "NOTICE"}
    inode = place.stat().st_ino
    assert unpack(source, store).stat().st_ino == inode
    (place / "model.h1b").write_bytes(b"cut")
    assert not is_stored(store, description)
    assert is_stored(store, description) or unpack(source, store) == place
    assert is_stored(store, description)


def refuse(source: Path, store: Path) -> None:
    with pytest.raises(HaloError):
        unpack(source, store)
    assert not store.exists() or list(store.iterdir()) == []


def test_wrong_hash_leaves_nothing(source: Path, tmp_path: Path) -> None:
    data = bytearray(lzma.decompress((source / "model.h1b.xz").read_bytes()))
    data[100] ^= 1
    (source / "model.h1b.xz").write_bytes(lzma.compress(bytes(data)))
    refuse(source, tmp_path / "store")


def test_cut_short(source: Path, tmp_path: Path) -> None:
    data = (source / "model.h1b.xz").read_bytes()
    (source / "model.h1b.xz").write_bytes(data[: len(data) // 2])
    refuse(source, tmp_path / "store")


def test_missing_file(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.htok").unlink()
    refuse(source, tmp_path / "store")


def test_bomb_is_stopped_at_the_declared_size(source: Path, tmp_path: Path) -> None:
    (source / "model.h1b.xz").write_bytes(lzma.compress(bytes(64 << 20)))
    refuse(source, tmp_path / "store")


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", ".hidden", "", "a/b", "nul\0"])
def test_name_that_leaves_the_store(source: Path, tmp_path: Path, name: str) -> None:
    describe(source, lambda d: d["files"].update({name: d["files"]["model.h1b"]}))
    refuse(source, tmp_path / "store")
    assert not (tmp_path / "evil").exists()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(st.binary(max_size=200), st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["schema", "name", "files", "sha256", "bytes", "x"]), inner, max_size=4),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_any_description_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.json").write_bytes(data)
    try:
        description = read_description(tmp_path)
    except HaloError:
        return
    assert store_name(description).startswith("sha256-")
