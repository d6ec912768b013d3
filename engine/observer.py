"""What the scheduler tells of its work, to whoever counts it; nothing is counted here."""

from __future__ import annotations

from typing import Literal, NamedTuple

Reason = Literal["stop", "length", "cancelled", "error", "deadline"]


class Gauges(NamedTuple):
    """How full the scheduler is now."""

    running: int
    waiting: int
    slots: int
    kv_used_tokens: int
    kv_total_tokens: int


class Observer:
    """What is told of the work while it is done; this one listens to nothing. Times are in seconds.

    `submitted` and `refused` are called where a request is submitted, all others by the scheduler's thread,
    which waits meanwhile: an observer counts, and does not write. A request of several choices is admitted,
    has its first token and is finished once.
    """

    def submitted(self) -> None:
        """A request was taken into the queue."""

    def refused(self) -> None:
        """The queue was full."""

    def admitted(self, waited_s: float, prompt_tokens: int, cached_tokens: int) -> None:
        """A request's first prompt begins to run; so many of its tokens are there already."""

    def first_token(self, since_submit_s: float) -> None:
        """A request's first token."""

    def token(self, since_last_s: float, n: int) -> None:
        """n more tokens of a sequence, all of one step."""

    def finished(self, reason: Reason, prompt_tokens: int, completion_tokens: int, e2e_s: float) -> None:
        """A request ended."""

    def step(self, native_s: float, wall_s: float, decode_entries: int, prefill_entries: int) -> None:
        """One step: the time in the native call, and of all of it with what was said of it."""
