"""Tokens to text that may be shown: whole characters, no stop string, no beginning of one. No model runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.tokenizer import TextTokenizer


class TextStream:
    """The text of one continuation as it grows; `stop_string` is the one that ended it."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str], strip_leading: bool) -> None:
        self._decoder = tokenizer.decode_stream()
        self._stop = tuple(stop)
        self._strip = strip_leading
        self._held = ""
        self.stop_string: str | None = None

    def feed(self, token: int) -> str:
        """What may be shown now that `token` has come."""
        text = self._decoder.feed(token)
        if not (self._stop or self._strip):
            return text
        return self._release(text, at_end=False)

    def finish(self) -> str:
        """What was held back and may be shown, as nothing follows."""
        return self._release(self._decoder.finish(), at_end=True)

    def _release(self, text: str, *, at_end: bool) -> str:
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        self._held += text
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            keep, self.stop_string = min(found, key=lambda pair: pair[0])
        else:
            keep = len(self._held) - (0 if at_end else _longest_tail(self._held, self._stop))
        shown, self._held = self._held[:keep], "" if found else self._held[keep:]
        return shown


def _longest_tail(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` with which some stop string begins."""
    best = 0
    for word in stop:
        for length in range(min(len(word) - 1, len(text)), best, -1):
            if text.endswith(word[:length]):
                best = length
                break
    return best
