"""Generations: nothing incomplete becomes current, and what is current or previous is never collected."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from engine.errors import HaloError
from provision import generations
from provision.journal import Journal, locked, read_journal, recover
from provision.layout import Layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    prefix = tmp_path / "halo"
    (prefix / "generations").mkdir(parents=True)
    return Layout("user", prefix, prefix / "state", tmp_path / "units", tmp_path / "bin/halo")


def make(layout: Layout, name: str, age: int = 0, *, complete: bool = True) -> Path:
    directory = layout.generation(name)
    for part in ("bin", "lib", "units", "venv/bin", "models/default"):
        (directory / part).mkdir(parents=True)
    (directory / "venv/bin/python").write_text("")
    (directory / "models/default/model.json").write_text("{}")
    (directory / "lib/libhalo_cpu.so").write_text(name)
    if complete:
        manifest = {"schema": 1, "id": name, "files": generations.hash_files(directory)}
        (directory / "manifest.json").write_text(json.dumps(manifest))
    os.utime(directory, (1000 - age, 1000 - age))
    return directory


def test_switch_and_back(layout: Layout) -> None:
    make(layout, "a")
    make(layout, "b")
    assert generations.switch(layout, "a") is None
    assert generations.switch(layout, "b") == "a"
    assert (generations.current_id(layout), generations.previous_id(layout)) == ("b", "a")
    generations.switch_back(layout, "a", None)
    assert (generations.current_id(layout), generations.previous_id(layout)) == ("a", None)
    generations.switch_back(layout, None, None)
    assert generations.current_id(layout) is None


@pytest.mark.parametrize("manifest", [None, "", "{", "[]", '{"schema": 99}'])
def test_incomplete_generation_never_becomes_current(layout: Layout, manifest: str | None) -> None:
    directory = make(layout, "half", complete=False)
    if manifest is not None:
        (directory / "manifest.json").write_text(manifest)
    with pytest.raises(HaloError, match="not complete"):
        generations.switch(layout, "half")
    assert generations.current_id(layout) is None


def test_soundness_sees_a_changed_and_a_missing_file(layout: Layout) -> None:
    directory = make(layout, "a")
    assert generations.is_sound(directory)
    library = directory / "lib/libhalo_cpu.so"
    library.write_text("other")
    assert not generations.is_sound(directory)
    library.unlink()
    assert not generations.is_sound(directory)


def test_damaged_current_is_repaired_beside_and_then_stays(layout: Layout) -> None:
    make(layout, "1-a")
    generations.switch(layout, "1-a")
    assert generations.choose_name(layout, "1-a") == "1-a"
    (layout.generation("1-a") / "lib/libhalo_cpu.so").write_text("damage")
    assert generations.choose_name(layout, "1-a") == "1-a-r1"
    make(layout, "1-a-r1")
    generations.switch(layout, "1-a-r1")
    assert generations.choose_name(layout, "1-a") == "1-a-r1"


def test_collection_keeps_current_previous_and_one_more(layout: Layout) -> None:
    for age, name in enumerate(("newest", "newer", "old", "older", "oldest")):
        make(layout, name, age)
    generations.switch(layout, "oldest")
    generations.switch(layout, "older")
    assert sorted(generations.collect(layout)) == ["newer", "old"]
    assert sorted(path.name for path in layout.generations.iterdir()) == ["newest", "older", "oldest"]


def test_identity_follows_source_and_declaration(tmp_path: Path) -> None:
    (tmp_path / "provision").mkdir()
    (tmp_path / "provision/a.py").write_text("one")
    first = generations.source_sha256(tmp_path)
    (tmp_path / "provision/__pycache__").mkdir()
    (tmp_path / "provision/__pycache__/a.pyc").write_text("cache")
    assert generations.source_sha256(tmp_path) == first
    (tmp_path / "provision/a.py").write_text("two")
    assert generations.source_sha256(tmp_path) != first
    names = {generations.generation_id("1", first, (profile,)) for profile in ("cpu", "strix-halo")}
    assert len(names) == 2


def test_recovery_clears_what_is_half_made_and_nothing_else(layout: Layout) -> None:
    make(layout, "whole")
    make(layout, "half", complete=False)
    generations.switch(layout, "whole")
    layout.store.mkdir(parents=True)
    (layout.store / ".sha256-abc.77.tmp").mkdir()
    (layout.prefix / ".current.77.tmp").symlink_to("generations/half")
    layout.unit_dir.mkdir()
    (layout.unit_dir / ".somebody-elses.tmp").write_text("")
    done = recover(layout)
    assert len(done) == 3
    assert [path.name for path in layout.generations.iterdir()] == ["whole"]
    assert (layout.unit_dir / ".somebody-elses.tmp").exists()
    assert recover(layout) == []


def test_recovery_of_nothing(tmp_path: Path) -> None:
    place = tmp_path / "never"
    assert recover(Layout("user", place, place / "state", place / "u", place / "l")) == []


def test_second_run_is_refused_with_the_holder(tmp_path: Path) -> None:
    lock = tmp_path / "state/lock"
    with locked(lock), pytest.raises(HaloError, match=f"process {os.getpid()}"), locked(lock):
        pytest.fail("two runs at once")
    with locked(tmp_path / "state/lock"):
        pass


def test_journal_has_the_intent_before_the_act(tmp_path: Path) -> None:
    journal = Journal.start(tmp_path, "install")
    with pytest.raises(ZeroDivisionError), journal.intent("engine", "divide"):
        assert read_journal(journal.path)[-1]["event"] == "intent"
        raise ZeroDivisionError
    with journal.intent("engine", "add"):
        pass
    journal.close()
    events = [(entry["what"], entry["event"]) for entry in read_journal(journal.path)]
    assert events[1:] == [("divide", "intent"), ("divide", "failed"), ("add", "intent"), ("add", "done")]


def test_journal_cut_anywhere_is_still_read(tmp_path: Path) -> None:
    journal = Journal.start(tmp_path, "install")
    for number in range(5):
        journal.record("model", f"step {number}", "done", path="\n\\\u00e9")
    journal.close()
    data = journal.path.read_bytes()
    whole = read_journal(journal.path)
    for cut in range(len(data)):
        journal.path.write_bytes(data[:cut])
        records = read_journal(journal.path)
        assert records == whole[: len(records)]
        assert len(records) >= data[:cut].count(b"\n")
