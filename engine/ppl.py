"""Perplexity of a token sequence under a model, window by window; neither files nor printing are here.

The protocol. The text is tokens t[0], t[1], ... with no special token among them. Windows of `window` tokens
begin at 0, stride, 2 stride, ...; the first one that reaches the text's end is the last. Each window is run
alone, from an empty KV cache: BOS and then its tokens but the last, so `window` positions give the logits of
its `window` tokens. A window scores those of its tokens that no earlier window scored; so every token is
scored exactly once, and BOS never. Without BOS the token before the window stands in BOS's place, and the
very first token of the text, which has nothing before it, is the one that is not scored.

A token's score is -log softmax(logits)[token] in nats, in float64 from the engine's float32 logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from engine.errors import EXIT_COULD_NOT_RUN, HaloError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.generate import TokenSession
    from engine.tokenizer import TextTokenizer

    Progress = Callable[[int, int], None]

LOGITS_BYTES: Final = 32 << 20  # of one request to the engine
MOST_POSITIONS: Final = 256  # of one request: the time between two looks at Ctrl-C
UNIFORM_WITHIN: Final = 0.01


@dataclass(frozen=True)
class Protocol:
    """How a text is cut: tokens a window, tokens from one window's start to the next, and BOS or None."""

    window: int
    stride: int
    bos: int | None

    def validate(self, context: int) -> None:
        """Raise HaloError unless a model with `context` positions can run it."""
        if not 1 <= self.window <= context:
            raise _refused(
                f"A window of {self.window} tokens does not fit the model's context of {context}.",
                f"halo ppl --window {context} FILE, or any number from 1 to {context}",
            )
        if not 1 <= self.stride <= self.window:
            raise _refused(
                f"A stride of {self.stride} is not between 1 and the window of {self.window} tokens.",
                f"halo ppl --window {self.window} --stride {max(1, self.window // 2)} FILE",
            )


@dataclass(frozen=True)
class Window:
    """Tokens start to end (exclusive) of the text, of which those from `first` on are scored here."""

    start: int
    first: int
    end: int


@dataclass(frozen=True)
class Scores:
    """What was measured: the nats of each window's scored tokens, and how many these are."""

    nats: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return sum(self.counts)

    @property
    def nats_per_token(self) -> float:
        """The mean over all scored tokens (not the mean of the windows' means)."""
        return math.fsum(self.nats) / self.tokens

    @property
    def perplexity(self) -> float:
        """e to the nats a token; infinite where that is no float64."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf

    @property
    def standard_error(self) -> float | None:
        """Standard error of the nats a token, None for a single window.

        Windows are the sample and may differ in length: the ratio estimator's,
        sqrt(K / (K - 1) * sum((nats_k - mean * count_k)^2)) / tokens (Cochran, Sampling Techniques, 6.3).
        """
        windows, mean = len(self.nats), self.nats_per_token
        if windows < 2:
            return None
        squares = math.fsum((n - mean * c) ** 2 for n, c in zip(self.nats, self.counts, strict=True))
        return math.sqrt(squares * windows / (windows - 1)) / self.tokens

    def bits_per_character(self, characters: int) -> float:
        """Bits a character of a scored text of so many characters."""
        return math.fsum(self.nats) / math.log(2) / characters if characters else math.inf

    def is_uniform(self, vocabulary: int) -> bool:
        """Whether the perplexity is that of guessing evenly among the whole vocabulary, within 1 %."""
        return abs(self.perplexity - vocabulary) <= UNIFORM_WITHIN * vocabulary


def plan(count: int, protocol: Protocol) -> list[Window]:
    """The windows of a text of `count` tokens. Raises HaloError for a text without a token to score."""
    unscored = 1 if protocol.bos is None else 0
    if count <= unscored:
        raise _refused(
            f"The text is too short: it has {count or 'no'} token{'' if count == 1 else 's'}, and at least "
            f"{unscored + 1} must be there.",
            "give a longer text; a few thousand words make a figure worth quoting",
        )
    windows, done, start = [], unscored, 0
    while done < count:
        end = min(start + protocol.window, count)
        if end > done:  # false only for a first window that is the unscored token alone
            windows.append(Window(start, done, end))
            done = end
        start += protocol.stride
    return windows


def surprisal(logits: NDArray[np.float32], token: int) -> float:
    """-log softmax(logits)[token] of one row of logits, in float64."""
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinite logits give NaN, which `score` refuses with a sentence
        wide -= wide.max()
        return float(np.log(np.exp(wide).sum()) - wide[token])


def positions_at_once(vocabulary: int) -> int:
    """Positions of one request to the engine, so that their logits stay within LOGITS_BYTES."""
    return max(1, min(MOST_POSITIONS, LOGITS_BYTES // (4 * vocabulary)))


def score(
    session: TokenSession,
    tokens: Sequence[int],
    protocol: Protocol,
    at_once: int,
    progress: Progress = lambda _done, _total: None,
) -> Scores:
    """Score `tokens` on slot 0 of a session, `at_once` positions a request; the figure does not depend on it.

    `progress` is told after each request how many tokens are scored and how many there are to score.
    """
    windows = plan(len(tokens), protocol)
    total = sum(window.end - window.first for window in windows)
    nats, done = [], 0
    for window in windows:
        losses: list[float] = []
        for found in _window_losses(session, tokens, window, protocol.bos, at_once):
            losses += found
            progress(done + len(losses), total)
        done += len(losses)
        nats.append(math.fsum(losses))
    return Scores(tuple(nats), tuple(window.end - window.first for window in windows))


def characters(tokenizer: TextTokenizer, tokens: Iterable[int]) -> int:
    """Characters that begin in these tokens: their bytes that do not continue a UTF-8 character."""
    return sum(byte & 0xC0 != 0x80 for token in tokens for byte in tokenizer.token_bytes(token))


def _window_losses(
    session: TokenSession, tokens: Sequence[int], window: Window, bos: int | None, at_once: int
) -> Iterable[list[float]]:
    """The nats of the window's scored tokens, a list for each request."""
    before = [bos] if bos is not None else list(tokens[max(window.start - 1, 0) : window.start])
    fed = [*before, *tokens[window.start : window.end - 1]]
    next_token = window.end - len(fed)  # what fed[0] is to predict
    for low in range(0, len(fed), at_once):
        places = range(low, min(low + at_once, len(fed)))
        want = [next_token + place >= window.first for place in places]
        rows = session.run([fed[place] for place in places], [0] * len(places), places, want)
        scored = [tokens[next_token + place] for place, wanted in zip(places, want, strict=True) if wanted]
        yield [_finite(surprisal(row, token)) for row, token in zip(rows, scored, strict=True)]


def _finite(nats: float) -> float:
    if not math.isfinite(nats):
        raise HaloError(
            "The model's logits are not finite numbers: its weights are damaged.", hint="halo doctor"
        )
    return nats


def _refused(message: str, hint: str) -> HaloError:
    return HaloError(message, hint=hint, exit_code=EXIT_COULD_NOT_RUN)
