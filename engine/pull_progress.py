"""What a person sees of a pull: a bar on a terminal, a line now and then elsewhere. Always on stderr."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import IO, Any, Final

EVERY_SECONDS: Final = 10.0


class Lines:
    """For a log: the sum, a line every ten seconds, notes."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._total = 0
        self._held: dict[str, int] = {}
        self._last = time.monotonic()

    def total(self, size: int) -> None:
        """The bytes of all files."""
        self._total = size
        self.note(f"{size:,} bytes in all")

    def at(self, name: str, held: int) -> None:
        """`name` has `held` bytes by now."""
        self._held[name] = held
        if time.monotonic() - self._last >= EVERY_SECONDS:
            self._last = time.monotonic()
            done = sum(self._held.values())
            share = f" ({100 * done // self._total} %)" if self._total else ""
            self.note(f"{name}: {done:,} of {self._total:,} bytes{share}")

    def note(self, text: str) -> None:
        """A sentence."""
        print(text, file=self._stream, flush=True)


class Bar:
    """For a terminal: one bar over all files."""

    def __init__(self, progress: Any) -> None:  # noqa: ANN401  # rich.progress.Progress, imported late
        self._progress = progress
        self._task = progress.add_task("asking the hub", total=None)
        self._held: dict[str, int] = {}

    def total(self, size: int) -> None:
        """The bytes of all files."""
        self._progress.update(self._task, total=size)

    def at(self, name: str, held: int) -> None:
        """`name` has `held` bytes by now."""
        self._held[name] = held
        self._progress.update(self._task, description=name, completed=sum(self._held.values()))

    def note(self, text: str) -> None:
        """A sentence, above the bar."""
        self._progress.console.print(text, markup=False, highlight=False)


@contextlib.contextmanager
def progress_for(stream: IO[str]) -> Iterator[Lines | Bar]:
    """The progress that suits `stream`."""
    if not stream.isatty():
        yield Lines(stream)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(),
               TransferSpeedColumn(), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(file=stream)) as progress:
        yield Bar(progress)
