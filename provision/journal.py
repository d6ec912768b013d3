"""The write-ahead journal, the lock, and recovery: what makes a kill at any instruction survivable."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.atomic import fsync_directory
from engine.errors import HaloError
from provision.files import remove_tree
from provision.generations import MANIFEST, current_id
from provision.layout import Layout


class Journal:
    """One run's records: intent, fsync, act, done, fsync. A dry run has none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        fsync_directory(path.parent)

    @classmethod
    def start(cls, directory: Path, verb: str) -> Journal:
        """A fresh journal for this run of `verb`."""
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        journal = cls(directory / f"{stamp}-{os.getpid()}.jsonl")
        journal.record("run", verb, "started")
        return journal

    def record(self, step: str, what: str, event: str, **details: object) -> None:
        """Append one record and make it durable before returning."""
        now = datetime.datetime.now(datetime.UTC).isoformat()
        entry = {"at": now, "step": step, "what": what, "event": event, **details}
        os.write(self._fd, (json.dumps(entry, sort_keys=True) + "\n").encode())
        os.fsync(self._fd)

    @contextlib.contextmanager
    def intent(self, step: str, what: str, **details: object) -> Iterator[None]:
        """Record the intent, let the caller act, record done or failed."""
        self.record(step, what, "intent", **details)
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):
                self.record(step, what, "failed", error=str(error)[:500])
            raise
        self.record(step, what, "done")

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records of one run; a last line cut off by a power cut is left out."""
    records = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                records.append(entry)
    return records


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the installation's lock; a second run is refused with the holder's process id."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
            raise HaloError(
                f"Another halo run (process {holder}) is changing this installation.",
                hint=f"wait for it, or look at it: ps -p {holder}",
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def recover(layout: Layout) -> list[str]:
    """Clear what a killed run left: generations without a manifest, temporary files. Returns what was done.

    `current` is never touched: it only ever points at a generation whose manifest was written before.
    """
    done = []
    live = current_id(layout)
    for directory in sorted(layout.generations.glob("*")):
        if directory.name != live and not (directory / MANIFEST).is_file():
            remove_tree(directory)
            done.append(f"removed the half-made generation {directory.name}")
    for place in (layout.prefix, layout.generations, layout.store, layout.receipts, layout.unit_dir):
        for leftover in sorted(place.glob(".*.tmp")):
            if place != layout.unit_dir or leftover.name.startswith(".halo-"):
                remove_tree(leftover)
                done.append(f"removed {leftover.name}")
    return done
