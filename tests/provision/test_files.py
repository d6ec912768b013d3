"""Atomic writes and links: a reader never sees half of anything, and a failure leaves nothing behind."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from provision.files import (
    atomic_symlink,
    atomic_write,
    copy_files,
    nearest_existing,
    remove_tree,
    source_files,
    write_secret,
)


def test_write_replaces_and_sets_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")
    atomic_write(path, "new", 0o600)
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_failed_rename_keeps_the_old_file_and_leaves_no_temporary(tmp_path: Path) -> None:
    path = tmp_path / "a-directory"
    path.mkdir()
    with pytest.raises(OSError):
        atomic_write(path, "new")
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    atomic_write(path, "old")

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_link_is_retargeted_by_a_rename(tmp_path: Path) -> None:
    link = tmp_path / "current"
    for target in ("generations/a", "generations/b"):
        atomic_symlink(link, target)
        assert str(link.readlink()) == target
    assert list(tmp_path.iterdir()) == [link]


def test_link_over_a_leftover_of_a_killed_run(tmp_path: Path) -> None:
    (tmp_path / f".current.{os.getpid()}.tmp").symlink_to("half")
    atomic_symlink(tmp_path / "current", "whole")
    assert str((tmp_path / "current").readlink()) == "whole"
    assert len(list(tmp_path.iterdir())) == 1


def test_secret_is_never_wider_and_never_overwritten(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_secret(tmp_path / "key", "secret")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write_secret(tmp_path / "key", "other")


def test_remove_tree_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("x")
    (tmp_path / "link").symlink_to("kept")
    remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "absent")
    assert (tmp_path / "kept/file").exists()
    assert not (tmp_path / "link").is_symlink()


def test_copied_source_has_no_caches(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("room/code.py", "room/__pycache__/code.pyc", "room/.hidden", "top.py", "other/not-asked.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("x")
    copy_files(source, source_files(source, ("room", "top.py", "absent")), tmp_path / "copy")
    found = {path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*.*")}
    assert found == {"room/code.py", "top.py"}


def test_nearest_existing_of_a_deep_path(tmp_path: Path) -> None:
    assert nearest_existing(tmp_path / "a/b/c") == tmp_path
