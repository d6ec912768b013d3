"""How a run is made: shape, lengths, shares of the texts, regularisation. Not the command line, nor the loop.

`record` is the recipe of the bundled model (docs/demo-model.md); `long` is one for a context of 4,096 tokens
that repeats the small texts less and regularises more. No model of `long` has been trained yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from engine.train.model import Shape

Shares = tuple[float, float, float]


@dataclass(frozen=True)
class Recipe:
    """One way of training. "Progress" is the part of the steps that lies behind, 0 to 1.

    `windows`: (progress from which it holds, tokens a window), rising; a step has the same number of tokens
    at each length. `shares`: (progress from which they hold, those of books, stories and talks), rising.
    `decay_until`: progress at which the weight decay ends. `dropout`: of what each block adds to the residual
    stream. `book_bos`: the part of the windows of books that begin with BOS, at a paragraph. `story_passes`:
    how many of the four passes over the pairs also hold each story. `spread`: windows lie evenly over a text
    in place of anywhere, so that no part of it is shown much more often than another.
    """

    shape: Shape = field(default_factory=Shape)
    windows: tuple[tuple[float, int], ...] = ((0.0, 1024),)
    shares: tuple[tuple[float, Shares], ...] = ((0.0, (0.88, 0.02, 0.10)), (0.35, (0.84, 0.03, 0.13)))
    decay_until: float = 0.5
    dropout: float = 0.0
    book_bos: float = 0.0
    story_passes: int = 4
    spread: bool = False

    def window(self, progress: float) -> int:
        """Tokens a window."""
        return next(length for start, length in reversed(self.windows) if progress >= start)

    def shares_at(self, progress: float) -> Shares:
        """Of books, stories and talks in a batch."""
        return next(shares for start, shares in reversed(self.shares) if progress >= start)


RECIPES: Final = {
    "record": Recipe(),
    # Pairs turned for the worse after about 40 M tokens of talks: 5 % of a run of 800 M.
    "long": Recipe(
        shape=Shape(context=4096, theta=50000.0),
        windows=((0.0, 1024), (0.8, 4096)),
        shares=((0.0, (0.946, 0.004, 0.05)),),
        decay_until=1.0,
        dropout=0.1,
        book_bos=0.25,
        story_passes=1,
        spread=True,
    ),
}
