"""Which tokens the slots of a session hold, and which slot a prompt should take; it runs nothing itself."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

WORTH: Final = 16  # tokens below which nothing is copied: they cost no more to compute
TAIL: Final = 4  # tokens that nobody misses: the end of an answer may be cut into others next time
RECENT: Final = 4  # a token that was used of late is worth so many of those used longest ago


class Slots:
    """The tokens whose keys and values each slot holds, those in use and those that are kept for later.

    A slot that is given back keeps its tokens as a prefix for prompts to come, until it is the one that was
    used longest ago and another prompt needs it.
    """

    def __init__(self, count: int, context: int) -> None:
        self.count, self.context = count, context
        self.lengths = [0] * count
        self._tokens = np.zeros((count, context), np.int32)
        self._busy = [False] * count
        self._used = [0] * count  # when last, by a clock of its own
        self._clock = 0

    def free(self) -> int:
        """How many are not in use."""
        return self._busy.count(False)

    def used_tokens(self) -> int:
        """Tokens that the slots hold, those kept for later as well."""
        return sum(self.lengths)

    def choose(self, prompt: NDArray[np.int32]) -> int:
        """The free slot that a prompt should take; there must be one."""
        common = self.common(prompt)
        free = [slot for slot in range(self.count) if not self._busy[slot]]
        best = max(free, key=lambda slot: common[slot])
        oldest = min(free, key=lambda slot: (self.lengths[slot] > 0, self._used[slot]))
        # That with the longest prefix, where little of it is lost, or much less than of the oldest; else what
        # it holds stays for later, and its prefix is copied.
        lost, other = (self.lengths[slot] - common[slot] for slot in (best, oldest))
        small = lost <= TAIL or RECENT * lost <= other
        return best if common[best] == max(common) and small else oldest

    def source(self, slot: int, prompt: NDArray[np.int32]) -> tuple[int, int]:
        """(slot to copy from, tokens), where another holds more of the prompt; else (slot, its own)."""
        common = self.common(prompt)
        best = max(range(self.count), key=lambda other: common[other])
        if common[best] >= common[slot] + WORTH:
            return best, common[best]
        return slot, common[slot]

    def common(self, prompt: NDArray[np.int32]) -> list[int]:
        """How many first tokens of the prompt each slot holds; the last one has to be run for its logits."""
        most = len(prompt) - 1
        differs = self._tokens[:, :most] != prompt[:most]
        first = np.where(differs.any(axis=1), differs.argmax(axis=1), most) if most else [0] * self.count
        return [min(int(n), length) for n, length in zip(first, self.lengths, strict=True)]

    def take(self, slot: int) -> None:
        """The slot is in use now."""
        self._busy[slot] = True

    def held(self, slot: int) -> list[int]:
        """The tokens that a slot holds."""
        tokens: list[int] = self._tokens[slot, : self.lengths[slot]].tolist()
        return tokens

    def hold(self, slot: int, start: int, tokens: NDArray[np.int32] | list[int]) -> None:
        """The slot holds `tokens` from position `start` on, and nothing behind them."""
        end = start + len(tokens)
        self._tokens[slot, start:end] = tokens
        self.lengths[slot] = end

    def cut(self, slot: int, length: int) -> None:
        """What the slot holds beyond `length` is gone."""
        self.lengths[slot] = min(self.lengths[slot], length)

    def give_back(self, slot: int) -> None:
        """Not in use any more; what it holds is kept for later."""
        self._clock += 1
        self._busy[slot] = False
        self._used[slot] = self._clock
