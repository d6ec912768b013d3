"""What a person sees of an install: banner, step counter, dots, ticks. Standard library; not the log."""

from __future__ import annotations

import sys
import time
from typing import Final, TextIO

TICK: Final = "\u2713"
WARN: Final = "\u26a0"
CROSS: Final = "\u2717"
_COLOURS: Final = {TICK: "32", WARN: "33", CROSS: "31"}
_PLAIN: Final = {TICK: "ok", WARN: "warning:", CROSS: "FAILED"}


class Screen:
    """The one place that prints. On a terminal a step is a line that grows dots; elsewhere plain lines."""

    def __init__(self, stream: TextIO | None = None, *, terminal: bool | None = None) -> None:
        self.stream = stream if stream is not None else sys.stdout
        self.terminal = self.stream.isatty() if terminal is None else terminal
        encoding = (getattr(self.stream, "encoding", None) or "utf-8").lower()
        self._symbols = encoding.replace("-", "") in ("utf8", "utf16")
        self._open = False
        self._started = 0.0
        self._label = ""
        self._last_dot = 0.0

    def line(self, text: str = "") -> None:
        """One whole line; a step's open line is ended first."""
        self._break()
        self._write(text + "\n")

    def banner(self, version: str, summary: str) -> None:
        """Who is speaking, and what is about to happen."""
        self.line(f"halo {version}" + (f"  {summary}" if summary else ""))

    def begin(self, number: int, total: int, name: str) -> None:
        """A step starts."""
        self._label = f"({number}/{total}) {name}"
        self._started = self._last_dot = time.monotonic()
        self._write(f"{self._label} ..." + ("" if self.terminal else "\n"))
        self._open = self.terminal

    def tick(self) -> None:
        """A long command is still going: a dot a second."""
        now = time.monotonic()
        if self._open and now - self._last_dot >= 1.0:
            self._last_dot = now
            self._write(".")

    def end(self, symbol: str, detail: str = "") -> float:
        """A step is over: its mark, its seconds, and what it did. Returns the seconds."""
        seconds = time.monotonic() - self._started
        text = f"{self.mark(symbol)} {seconds:.1f} s" + (f"  {detail}" if detail else "")
        self._write(f" {text}\n" if self._open else f"{self._label} {text}\n")
        self._open = False
        return seconds

    def note(self, symbol: str, text: str, hint: str = "", follows: str = "") -> None:
        """A line within a step, with its hint below, and what follows from it."""
        self._break()
        self._write(f"      {self.mark(symbol)} {text}\n")
        if hint:
            self._write(f"        hint: {hint}\n")
        if follows:
            self._write(f"        so also: {follows}\n")

    def mark(self, symbol: str) -> str:
        """The symbol as this stream can show it."""
        if not self._symbols:
            return _PLAIN.get(symbol, symbol)
        return f"\033[{_COLOURS[symbol]}m{symbol}\033[0m" if self.terminal and symbol in _COLOURS else symbol

    def _break(self) -> None:
        if self._open:
            self._write("\n")
            self._open = False

    def _write(self, text: str) -> None:
        if not self._symbols:
            text = text.encode("ascii", "replace").decode()
        self.stream.write(text)
        self.stream.flush()


def print_table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A small table on stdout, columns as wide as their longest cell."""
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]
    for row in [headings, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
