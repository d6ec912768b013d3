"""The next tokens of a mixed batch by one native call: greedy, drawn and constrained rows side by side.

A row is the place of one token in one sequence. What comes out of a row is `sampling.sample` of its logits,
whichever way it is found: the arg max where that is all, else the arg max of logit + a row of numbers (noise,
bias, penalties, the mask; docs/exact-head.md), else from all logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from engine.edits import Edits
from engine.sampling import (
    SamplingParams,
    depth_of,
    is_greedy,
    is_narrowed,
    make_noise,
    sample_with,
    settled,
)
from engine.sequence import TokenLogprob

if TYPE_CHECKING:
    from engine.backend import Drawn
    from engine.sequence import Constraint

T = TypeVar("T")
NEAR: Final = 2048  # tokens near the winner that are looked at; where more are, all are
LARGE: Final = 1 << 15  # a vocabulary whose noise is made ahead
AGAIN: Final = 96  # entries of a run after which logits may be asked for (HALO_AGAIN)


class TokenSession(Protocol):
    """What generation needs of engine.backend.Session: tokens at positions of slots in, logits out."""

    def run(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[bool]
    ) -> NDArray[np.float32]:
        """Logits f32[n_wanted, vocab]; KV entries at `positions` are overwritten, earlier ones are read."""
        ...

    def run_argmax(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[bool]
    ) -> list[int]:
        """As `run`, but the arg max of each wanted row alone, the lowest id on a tie."""
        ...

    def run_draw(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        want: Sequence[bool],
        noise: NDArray[np.float32],
        depth: float = 0.0,
        room: int = 0,
    ) -> Sequence[Drawn]:
        """As `run`, but the arg max of each wanted row + noise, and what is near it."""
        ...

    def logits_again(self, index: int) -> NDArray[np.float32]:
        """Logits of the last run's wanted row number `index`."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Slot `target` holds the first `length` tokens of `source`."""
        ...

    def close(self) -> None: ...


class Sampler:
    """How the tokens of one sequence are chosen; `take` tells it each one that came."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: NDArray[np.int32],
        vocab: int,
        index: int = 0,
        constraint: Constraint | None = None,
    ) -> None:
        self.params = params
        self.constraint = constraint
        self.noise = None if is_greedy(params) else make_noise(params.seed, index)
        changes = (params.logit_bias, params.presence_penalty, params.frequency_penalty)
        repeats = params.repetition_penalty != 1.0
        self.edits = Edits(params, prompt_ids, vocab) if any(changes) or repeats or constraint else None
        self.narrowed = self.noise is not None and is_narrowed(params)
        self.is_plain = self.noise is None and self.edits is None
        self._vocab = vocab
        self._made: tuple[int, NDArray[np.float32] | None] = (-1, None)  # position, and its noise
        self._ahead: tuple[int, Future[NDArray[np.float32]] | None] = (-1, None)  # ... as it is being made
        # Where the arg max of logit + row, or those near it, cannot decide.
        shifts = self.edits is not None and self.edits.shift is not None
        self.needs_all = params.logprobs is not None or repeats or (self.narrowed and shifts)
        # A row's penalties and mask depend on the tokens before it, drafts too: those are not verified then.
        self.may_draft = constraint is None and not repeats and not (self.edits and self.edits.penalises)

    def prepare(self) -> None:
        """Before the step that makes the next token: ask the constraint what may come."""
        if self.constraint is not None and self.edits is not None:
            self.edits.mask(self.constraint.mask())

    def fill(self, row: NDArray[np.float32], position: int) -> None:
        """Write what is added to the logits of the token at `position`."""
        noise = self._row(position)
        row[:] = 0.0 if noise is None else noise
        if self.edits is not None:
            row[:] = self.edits.shifted(row)

    def order(self, position: int, pool: Executor) -> None:
        """Have the noise of `position` made while the model runs."""
        if self.noise is not None and self._ahead[0] != position:
            made = pool.submit(self.noise.scaled, position, self._vocab, self.params.temperature)
            self._ahead = (position, made)

    def _row(self, position: int) -> NDArray[np.float32] | None:
        if self.noise is None:
            return None
        if self._made[0] != position:
            at, ahead = self._ahead
            if at == position and ahead is not None:
                self._made = (position, ahead.result())
            else:
                self._made = (position, self.noise.scaled(position, self._vocab, self.params.temperature))
        return self._made[1]

    def settle(self, drawn: Drawn) -> int | None:
        """The token of a draw, or None where only all logits can tell."""
        if not self.narrowed:
            return drawn.token
        ids, logits = drawn.ids, drawn.logits
        if ids is None or logits is None:
            return None
        if self.edits is not None and self.edits.allowed is not None:
            allowed = self.edits.allowed[ids]
            ids, logits = ids[allowed], logits[allowed]
        return drawn.token if settled(drawn.token, ids, logits, self.params) else None

    def sample(self, logits: NDArray[np.float32], position: int) -> int:
        """The token at `position` by its definition."""
        return sample_with(logits, self.params, self._row(position), self.edits)

    def take(self, token: int) -> None:
        """The next token of the sequence, which does not end it."""
        if self.edits is not None:
            self.edits.take(token)
        if self.constraint is not None:
            self.constraint.accept(token)


class Choices:
    """What one run gave: the token of each wanted row, and its logits, found when they are asked for."""

    def __init__(
        self,
        again: Callable[[int], NDArray[np.float32]],
        rows: Sequence[tuple[Sampler, int]],
        tokens: list[int] | None = None,
        drawn: Sequence[Drawn] | None = None,
        logits: NDArray[np.float32] | None = None,
    ) -> None:
        self._again, self._rows = again, rows
        self._tokens, self._drawn, self._logits = tokens, drawn, logits
        self._had: dict[int, NDArray[np.float32]] = {}
        self.late = 0  # draws for which all logits were needed
        self.settled = 0

    def token(self, row: int) -> int:
        """The token that comes at the place of the row."""
        if self._tokens is not None:
            return self._tokens[row]
        sampler, position = self._rows[row]
        if self._drawn is not None and not sampler.needs_all:
            token = sampler.settle(self._drawn[row])
            if token is not None:
                self.settled += sampler.narrowed
                return token
            self.late += 1
        return sampler.sample(self.logits(row), position)

    def logits(self, row: int) -> NDArray[np.float32]:
        """All logits of a row, float32 [vocab]."""
        if self._logits is not None:
            logits: NDArray[np.float32] = self._logits[row]
            return logits
        if row not in self._had:
            self._had[row] = self._again(row)
        return self._had[row]


class Chooser:
    """Runs batches; what it learns is only which way is the faster one."""

    def __init__(self, session: TokenSession, vocab: int) -> None:
        self.session = session
        self._vocab = vocab
        self._noise = np.empty((1, vocab), np.float32)
        # One thread, idle but for the noise of the next step: that of a large vocabulary takes a millisecond.
        self._pool = ThreadPoolExecutor(1, "halo-noise") if vocab >= LARGE else None
        self._unsettled = 0.0  # share of the late draws that took all logits
        self._last: Choices | None = None
        self.native_s = 0.0  # of the last run and what was asked of it since, in native calls

    def run(
        self,
        entries: tuple[Any, Any, Any, Any],
        rows: Sequence[tuple[Sampler, int]],
        *,
        all_logits: bool = False,
    ) -> Choices:
        """Run entries (tokens, slots, positions, want); rows: for each wanted one its sampler and position.

        `all_logits`: rows will be asked for theirs.
        """
        self._learn()
        self.native_s = 0.0
        if not all_logits and all(sampler.is_plain and not sampler.needs_all for sampler, _ in rows):
            return Choices(self._again, rows, tokens=self._timed(self.session.run_argmax, *entries))
        narrowed = [sampler for sampler, _ in rows if sampler.narrowed]
        if all_logits or self._whole(rows, bool(narrowed), len(entries[0])):
            self._order(rows, 0)
            return Choices(self._again, rows, logits=self._timed(self.session.run, *entries))
        if len(self._noise) < len(rows):
            self._noise = np.empty((len(rows), self._vocab), np.float32)
        noise = self._noise[: len(rows)]
        for row, (sampler, position) in zip(noise, rows, strict=True):
            sampler.fill(row, position)
        self._order(rows, 1)
        depth = max((depth_of(sampler.params) for sampler in narrowed), default=0.0)
        drawn = self._timed(self.session.run_draw, *entries, noise, depth, NEAR if narrowed else 0)
        self._last = Choices(self._again, rows, drawn=drawn)
        return self._last

    def _order(self, rows: Sequence[tuple[Sampler, int]], ahead: int) -> None:
        """Have noise made while the model runs: of each sequence's last row here, or so many further."""
        if self._pool is not None:
            for sampler, position in {id(sampler): (sampler, at) for sampler, at in rows}.values():
                sampler.order(position + ahead, self._pool)

    def _timed(self, call: Callable[..., T], *arguments: Any) -> T:  # noqa: ANN401
        began = perf_counter()
        try:
            return call(*arguments)
        finally:
            self.native_s += perf_counter() - began

    def _again(self, row: int) -> NDArray[np.float32]:
        return self._timed(self.session.logits_again, row)

    def _whole(self, rows: Sequence[tuple[Sampler, int]], narrowed: bool, entries: int) -> bool:
        """Whether all logits of all rows are had at once: one pass over the head for all of them."""
        certain = sum(sampler.needs_all for sampler, _ in rows)
        if certain > 1 or certain == len(rows) or (entries > AGAIN and (certain or narrowed)):
            return True
        if narrowed and self._unsettled > 0.5:
            self._unsettled *= 0.99  # so that what is near is tried again after some tokens
            return True
        return False

    def _learn(self) -> None:
        if self._last is not None:
            for late, count in ((1, self._last.late), (0, self._last.settled)):
                for _ in range(count):
                    self._unsettled += 0.2 * (late - self._unsettled)
            self._last = None


def token_logprob(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """The log probability of `token` and of the `top` likeliest, of the softmax of these logits."""
    best = logits.max()
    whole = float(best) + float(np.log(np.exp(logits - best).sum(dtype=np.float64)))
    likeliest: tuple[tuple[int, float], ...] = ()
    if top:
        # The largest of each 64: the last of the `top` largest of these is reached by at least `top` logits.
        tops = np.maximum.reduceat(logits, np.arange(0, len(logits), 64))
        floor = np.partition(tops, -top)[-top] if top < len(tops) else logits.min()
        near = np.flatnonzero(logits >= floor)
        order = near[np.argsort(-logits[near], kind="stable")][:top]
        likeliest = tuple((int(i), float(logits[i]) - whole) for i in order)
    return TokenLogprob(token, float(logits[token]) - whole, likeliest)
