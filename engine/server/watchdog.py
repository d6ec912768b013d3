"""Pings to systemd's watchdog, while the event loop turns and the engine's thread moves; it mends nothing.

A native step that never returns stops the pings, and systemd kills and starts the server again after
WatchdogSec (units/templates). A thread that has ended by itself stops them too, though serve.py then ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Protocol

from engine.server.sockets import notify


class Moving(Protocol):
    """What the watchdog asks of a runner."""

    def alive(self) -> bool:
        """Whether its thread runs."""
        ...

    def busy_for(self) -> float:
        """Seconds since the step that runs now began; 0 where none runs."""
        ...


def watchdog_seconds(environ: Mapping[str, str] | None = None) -> float | None:
    """What systemd asks for, or None where it does not; source: sd_watchdog_enabled(3)."""
    env = os.environ if environ is None else environ
    text = env.get("WATCHDOG_USEC", "")
    if not (text.isascii() and text.isdigit() and len(text) <= 18) or int(text) == 0:
        return None
    if env.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(text) / 1e6


class Watchdog:
    """Called often by the event loop, pings a few times in each of systemd's intervals."""

    def __init__(self, seconds: float | None, tell: Callable[[str], None] = notify) -> None:
        self._seconds, self._tell = seconds, tell
        self._next = 0.0

    def tick(self, now: float, runner: Moving | None) -> None:
        """`runner` is None while the model is loading: then the loop alone is vouched for."""
        if self._seconds is None or now < self._next:
            return
        if runner is None or (runner.alive() and runner.busy_for() < self._seconds / 2):
            self._tell("WATCHDOG=1")
            self._next = now + self._seconds / 4
