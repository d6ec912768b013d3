"""Drafts of the next tokens out of the text so far, and how many of them to verify; no model runs here.

A draft is what followed the longest earlier occurrence of the text's end. Verifying it is one step of the
model over several positions, and what comes out is exact whatever was drafted; so the rules below decide
about speed alone. Drafts are also made in the shadow, without verification: every token of the model is
compared with what would have been drafted, which tells how often drafts are right at no cost of the model's.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from operator import mul
from typing import Final

from engine.errors import EXIT_COULD_NOT_RUN, HaloError

AUTO_LIMIT: Final = 15  # drafts of one step
MOST: Final = 31
VARIABLE: Final = "HALO_SPECULATE"

CANDIDATES: Final = 8  # earlier occurrences that are compared; more found nothing better in prose
LONGEST: Final = 16  # tokens by which matches are compared, and known apart in `Acceptance`

MARGIN: Final = 1.05  # drafts must win by so much: below it, measuring noise would decide
HOPE: Final = 0.05  # of a plain step: what one more draft is taken to cost until that is measured
SAMPLES: Final = 5
RENEW: Final = 32  # steps for which a curve is good
PROBE_FIRST: Final = 256  # steps between two looks at costs that were found too high
PROBE_LAST: Final = 4096
PROBE_HOPE: Final = 0.15  # as HOPE, for those looks: short drafts unless they are nearly certain


@dataclass(frozen=True)
class Speculation:
    """At most `limit` drafts a step (0 is off); adaptive: as many as pay, else all that are found."""

    limit: int
    adaptive: bool = True


OFF: Final = Speculation(0)
AUTO: Final = Speculation(AUTO_LIMIT)


def parse_speculation(text: str) -> Speculation:
    """`auto`, `off`, or a whole number of drafts; raises HaloError on anything else."""
    if text == "auto":
        return AUTO
    if text == "off":
        return OFF
    if text.isascii() and text.isdecimal() and len(text) < 4 and int(text) <= MOST:
        return Speculation(int(text), adaptive=False)
    raise HaloError(
        f"Speculation is told to be {text[:40]!r}; it can be auto, off, or a number from 0 to {MOST}.",
        hint=f"--speculate auto (or {VARIABLE}=auto)",
        exit_code=EXIT_COULD_NOT_RUN,
    )


def default_speculation() -> Speculation:
    """What HALO_SPECULATE says, else automatic."""
    return parse_speculation(os.environ.get(VARIABLE) or "auto")


class History:
    """The tokens so far and the longest earlier occurrence of their end, kept as LZ77 keeps its window.

    A pair of tokens points to the place after its latest occurrence, and each place to the one before it of
    the same pair. So a token costs O(1), and memory is one entry a token and one a different pair.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = list(tokens)
        self.source = 0  # the place of the draft's first token; 0: nothing matches
        self.length = 0  # tokens before it that equal the end, as far as they were compared
        self._latest: dict[int, int] = {}  # by first token of the pair << 32 | second
        self._earlier: list[int] = []  # for the place after a pair: the place after the one before
        for place, (one, other) in enumerate(pairwise(self.tokens), start=2):
            self._point(one << 32 | other, place)
        self._find()

    def append(self, token: int) -> None:
        """Take the next token; the match goes on where it was right, else it is looked for anew."""
        tokens = self.tokens
        right = self.source and tokens[self.source] == token
        tokens.append(token)
        if len(tokens) > 1:
            self._point(tokens[-2] << 32 | token, len(tokens))
        if right:
            self.source += 1
            self.length += 1
        else:
            self._find()

    def draft(self, count: int) -> list[int]:
        """What may come next, `count` tokens or none; a match that reaches the end repeats itself."""
        if not self.source:
            return []
        found = self.tokens[self.source : self.source + count]
        period = len(self.tokens) - self.source
        while len(found) < count:
            found.append(found[len(found) - period])
        return found

    def _point(self, pair: int, place: int) -> None:
        self._earlier.append(self._latest.get(pair, 0))
        self._latest[pair] = place

    def _find(self) -> None:
        tokens, earlier, end = self.tokens, self._earlier, len(self.tokens)
        self.source = self.length = 0
        place = earlier[-1] if earlier else 0
        for _ in range(CANDIDATES):
            if not place:
                return
            # Only what matches one token further than the best so far can be better.
            length = self.length
            if length < place and tokens[place - 1 - length] == tokens[end - 1 - length]:
                self._take(place)
                if self.length >= LONGEST:
                    return
            place = earlier[place - 2]

    def _take(self, place: int) -> None:
        tokens, end = self.tokens, len(self.tokens)
        most = min(place, LONGEST)
        length = 2
        while length < most and tokens[place - 1 - length] == tokens[end - 1 - length]:
            length += 1
        if length > self.length:
            self.source, self.length = place, length


def accept(drafts: Sequence[int], choices: Iterable[int]) -> list[int]:
    """The model's choices (the first one is for the place of draft 0) up to the first that is no draft."""
    kept: list[int] = []
    for place, choice in enumerate(choices):
        kept.append(choice)
        if place < len(drafts) and choice != drafts[place]:
            break
    return kept


# Matches of 2, 3, 4, 5, 6-7, 8-11, 12-15 and 16 or more tokens.
_CLASS: Final = (0, 0, 0, 1, 2, 3, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 7)
_PRIOR: Final = (0.35, 0.45, 0.55, 0.65, 0.7, 0.8, 0.85, 0.9)
PRIOR_WEIGHT: Final = 4.0
FORGET: Final = 0.97  # a request's text changes its nature: the last 33 tokens of a class count most


class Acceptance:
    """How often the token after a match of some length is the model's, as counted of late.

    That of a request begins with the shares of the one before, and goes its own way.
    """

    def __init__(self, shares: Sequence[float] = _PRIOR) -> None:
        self._right = [share * PRIOR_WEIGHT for share in shares]
        self._tried = [PRIOR_WEIGHT] * len(_PRIOR)

    def shares(self) -> list[float]:
        """The share that was right, by class of match."""
        return [right / tried for right, tried in zip(self._right, self._tried, strict=True)]

    def learn(self, length: int, right: bool) -> None:
        """A token after a match of `length` tokens was, or was not, what the match said."""
        group = _CLASS[min(length, LONGEST)]
        self._right[group] = self._right[group] * FORGET + right
        self._tried[group] = self._tried[group] * FORGET + 1.0

    def next(self, length: int) -> float:
        """The chance of the first draft after a match of `length` tokens."""
        group = _CLASS[min(length, LONGEST)]
        return self._right[group] / self._tried[group]

    def ahead(self, length: int, count: int) -> list[float]:
        """The chance of each of `count` drafts, given that those before it are right: the match grows."""
        groups = [_CLASS[min(length + i, LONGEST)] for i in range(count)]
        return [self._right[group] / self._tried[group] for group in groups]


def best_count(costs: Sequence[float], chances: Sequence[float]) -> int:
    """The number of drafts that gives the most tokens a second, 0 unless that wins by MARGIN.

    costs[m] is the seconds of a step that verifies m drafts; chances[i] is the chance that draft i is right,
    given that those before it are. A step gives one token, and one more for each draft before a wrong one.
    """
    best, best_rate = 0, MARGIN / costs[0]
    expected = reach = 1.0
    for count in range(1, min(len(costs), len(chances) + 1)):
        reach *= chances[count - 1]
        expected += reach
        if expected / costs[count] > best_rate:
            best, best_rate = count, expected / costs[count]
    return best


def least_chance(costs: Sequence[float]) -> float:
    """The chance of the first draft below which none can pay, were all others certain."""
    ways = ((MARGIN * costs[m] / costs[0] - 1.0) / m for m in range(1, len(costs)))
    return min(ways, default=1.0)


class Costs:
    """Seconds of a step by its number of drafts: the median of the last few, and a guess where none was.

    A guess is hopeful: one more draft costs HOPE of a plain step, little enough to be tried once where drafts
    are likely, so that steps of every kernel's width are found; and none is tried that is more than twice as
    wide as the widest before. One slow step (another process had the CPU) moves no median; what looked too
    dear is tried again after a while, each time after a longer one.
    """

    def __init__(self, limit: int) -> None:
        self._samples: list[deque[float]] = [deque(maxlen=SAMPLES) for _ in range(limit + 1)]
        self._curve: list[float] = []
        self._least = 0.0
        self._steps = 0
        self._widest = 0
        self._wait = PROBE_FIRST
        self._next_probe = PROBE_FIRST

    def record(self, drafts: int, seconds: float) -> None:
        """A step that verified so many drafts took so long."""
        self._widest = max(self._widest, drafts)
        samples = self._samples[drafts]
        samples.append(seconds)
        self._steps += 1
        if len(samples) < SAMPLES or self._steps % RENEW == 0:
            medians = [sorted(some)[len(some) // 2] if some else 0.0 for some in self._samples]
            self._curve = fill_curve(medians)
            self._least = least_chance(self._curve)

    def curve(self) -> list[float]:
        """Seconds for 0, 1, ... drafts; empty before a plain step was measured."""
        return self._curve

    def hopeless(self, chance: float) -> bool:
        """Whether no drafts can pay whose first has this chance: where they do not, little is done."""
        return chance < self._least and self._steps < self._next_probe

    def count(self, chances: Sequence[float]) -> int:
        """How many drafts of these chances to verify; now and then, what would pay if it were cheap."""
        curve = self.curve()
        if not curve:
            return 0
        chances = chances[: 2 * self._widest + 1]
        count = best_count(curve, chances)
        if count or self._steps < self._next_probe:
            return count
        count = best_count([curve[0] * (1.0 + PROBE_HOPE * i) for i in range(len(curve))], chances)
        if count:
            self._wait = min(2 * self._wait, PROBE_LAST)
            self._next_probe = self._steps + self._wait
        return count


def fill_curve(measured: Sequence[float]) -> list[float]:
    """A whole rising curve from measured seconds, 0 where there are none; empty without those of no draft.

    No step takes longer than a wider one: a measurement that says so was disturbed, and is cut down.
    """
    if not measured[0]:
        return []
    curve = list(measured)
    least = float("inf")
    for count in reversed(range(len(curve))):
        if curve[count]:
            curve[count] = least = min(least, curve[count])
    hope = HOPE * curve[0]
    for count in range(1, len(curve)):
        if curve[count]:
            continue
        ceiling = next((seconds for seconds in curve[count:] if seconds), float("inf"))
        curve[count] = min(curve[count - 1] + hope, ceiling)
    return curve


@dataclass
class Tally:
    """What speculation did: steps of the model, drafts that it verified, and those that were right."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def count(self, drafted: int, accepted: int) -> None:
        """One more step."""
        self.steps += 1
        self.drafted += drafted
        self.accepted += accepted


class Experience:
    """What an engine has learned of its speed and of its drafts, over its requests of one kind."""

    def __init__(self, setting: Speculation) -> None:
        self.setting = setting
        self.acceptance = Acceptance()
        self._costs: dict[int, Costs] = {}

    def costs(self, sequences: int) -> Costs:
        """Those of steps that so many sequences share, by the drafts of all of them."""
        return self._costs.setdefault(sequences, Costs(self.setting.limit))

    def drafter(self, prompt_ids: Sequence[int]) -> Drafter:
        """A new request's drafts."""
        self.acceptance = Acceptance(self.acceptance.shares())
        return Drafter(History(prompt_ids), self.acceptance)


@dataclass
class Drafter:
    """The drafts of one sequence: its history and its acceptance."""

    history: History
    acceptance: Acceptance

    def observe(self, token: int) -> None:
        """Take the next token of the sequence, drafted or not."""
        history = self.history
        if history.source:
            self.acceptance.learn(history.length, history.tokens[history.source] == token)
        history.append(token)

    def chance(self) -> float:
        """That of the first draft; 0 where nothing matches."""
        return self.acceptance.next(self.history.length) if self.history.source else 0.0

    def reaches(self, count: int) -> Iterable[float]:
        """The chance of each of `count` drafts that it and all before it are right."""
        return accumulate(self.acceptance.ahead(self.history.length, count), mul)


def draft_together(
    drafters: Sequence[Drafter | None], rooms: Sequence[int], setting: Speculation, costs: Costs
) -> list[list[int]]:
    """The tokens that sequences verify in the step they share, at most so many each as `rooms` says.

    Of all drafts, those that are reached with the largest chance are taken, as many as pay for all.
    """
    able = [i for i, one in enumerate(drafters) if one and rooms[i] > 0 and one.history.source]
    drafts: list[list[int]] = [[] for _ in drafters]
    firsts = [one.chance() for i in able if (one := drafters[i])]
    if not firsts or (setting.adaptive and costs.hopeless(max(firsts) / len(drafters))):
        return drafts
    reaches = [
        (reach, i)
        for i in able
        if (one := drafters[i])
        for reach in one.reaches(min(rooms[i], setting.limit))
    ]
    reaches.sort(key=lambda pair: -pair[0])  # of one sequence's, a later one never comes first
    del reaches[setting.limit :]
    if setting.adaptive:
        # A draft adds its reach to the tokens of the step, one a sequence: the rule of one sequence, scaled.
        ratios = [after / before if before else 0.0 for (before, _), (after, _) in pairwise(reaches)]
        del reaches[costs.count([reaches[0][0] / len(drafters), *ratios]) :]
    for i, count in Counter(i for _, i in reaches).items():
        if one := drafters[i]:
            drafts[i] = one.history.draft(count)
    return drafts
