"""Ending signals become an exception, so that what was begun is undone. Not how a child is stopped."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


class Terminated(SystemExit):
    """SIGTERM or SIGHUP: clean up as after any failure, and exit with 128 + the signal."""


@contextlib.contextmanager
def ending_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind like an exception while the block runs."""

    def stop(number: int, _frame: FrameType | None) -> NoReturn:
        raise Terminated(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
