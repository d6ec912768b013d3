"""How much of the waiting prompts a step takes, so that those who decode hardly notice; it runs nothing."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final

PATIENCE: Final = 4.0  # a step with prompts in it may take so many times one without
TILE: Final = 12  # entries that one unpacking of the weights serves on the CPU: steps are whole tiles
LEAST: Final = 6  # entries for prompts in every step, however many decode
FIRST: Final = 24  # ... until it is known what they cost
SAMPLES: Final = 5


class Pace:
    """Seconds of a step without prompts, and of an entry of a prompt, as measured of late.

    The median of a few, so that one slow step (another process had the CPU) changes nothing.
    """

    def __init__(self, most: int) -> None:
        self.most = most  # entries of a step where nobody decodes
        self._plain: deque[float] = deque(maxlen=SAMPLES)
        self._entry: deque[float] = deque(maxlen=SAMPLES)

    def record(self, decodes: int, prefills: int, seconds: float) -> None:
        """A step with so many entries of each kind took so long."""
        if not prefills:
            self._plain.append(seconds)
        elif not decodes:
            self._entry.append(seconds / prefills)
        elif self._plain:
            self._entry.append(max(seconds - median(self._plain), 0.1 * seconds) / prefills)

    def room(self, decodes: int) -> int:
        """Entries for prompts in the next step, beside so many that decode."""
        if not decodes:
            return self.most
        if not (self._plain and self._entry):
            return FIRST
        count = int((PATIENCE - 1.0) * median(self._plain) / median(self._entry))
        tiles = min((count + decodes) // TILE, self.most // TILE)
        return max(tiles, -(-(decodes + LEAST) // TILE)) * TILE - decodes
