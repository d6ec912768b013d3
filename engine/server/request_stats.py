"""What the last request took, and sums since the start, for Lemonade's /stats; it is not /metrics."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from engine.observer import Observer, Reason


@dataclass(frozen=True)
class RequestStats:
    """Figures of the last request that ended, and totals. Seconds; None before the first."""

    time_to_first_token: float | None = None
    tokens_per_second: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    requests_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    output_tokens_total: int = 0


class StatsObserver(Observer):
    """Counts, and hands everything on to `inner`.

    Where requests run side by side, the first-token time is that of whichever had its first token last.
    """

    def __init__(self, inner: Observer | None = None) -> None:
        self._inner = inner or Observer()
        self._lock = threading.Lock()
        self._stats = RequestStats()
        self._first = self._cached = 0.0

    def read(self) -> RequestStats:
        """The figures now."""
        with self._lock:
            return self._stats

    def submitted(self) -> None:
        self._inner.submitted()

    def refused(self) -> None:
        self._inner.refused()

    def admitted(self, waited_s: float, prompt_tokens: int, cached_tokens: int) -> None:
        self._cached = cached_tokens
        with self._lock:
            total = self._stats.cached_tokens_total + cached_tokens
            self._stats = replace(self._stats, cached_tokens_total=total)
        self._inner.admitted(waited_s, prompt_tokens, cached_tokens)

    def first_token(self, since_submit_s: float) -> None:
        self._first = since_submit_s
        self._inner.first_token(since_submit_s)

    def token(self, since_last_s: float, n: int) -> None:
        self._inner.token(since_last_s, n)

    def finished(self, reason: Reason, prompt_tokens: int, completion_tokens: int, e2e_s: float) -> None:
        first = min(self._first, e2e_s)
        seconds, tokens = e2e_s - first, completion_tokens - 1
        with self._lock:
            self._stats = replace(
                self._stats,
                time_to_first_token=first if completion_tokens else None,
                tokens_per_second=tokens / seconds if tokens > 0 and seconds > 0 else None,
                prompt_tokens=prompt_tokens,
                cached_tokens=int(self._cached),
                output_tokens=completion_tokens,
                requests_total=self._stats.requests_total + 1,
                prompt_tokens_total=self._stats.prompt_tokens_total + prompt_tokens,
                output_tokens_total=self._stats.output_tokens_total + completion_tokens,
            )
        self._inner.finished(reason, prompt_tokens, completion_tokens, e2e_s)

    def step(self, native_s: float, wall_s: float, decode_entries: int, prefill_entries: int) -> None:
        self._inner.step(native_s, wall_s, decode_entries, prefill_entries)
