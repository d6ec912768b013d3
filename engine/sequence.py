"""What one sequence gives and takes, token by token: the types; what runs them is engine/scheduler.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log probability under the model itself: temperature 1, before penalties and masks.

    `top`: the likeliest tokens, the likeliest first, as many as were asked for; the token may be among them.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """One decoded token.

    `text` is what may be shown by now: held back are half characters and what may become a stop string.
    `finish_reason` is "stop" or "length" on the last step. `is_end` marks the model's own end token, which
    makes no text and is not counted in usage. `stop_string` is the one that ended the text. Where
    max_tokens is 0 the only step has the token_id -1: none.
    """

    token_id: int
    text: str
    finish_reason: str | None = None
    is_end: bool = False
    logprob: TokenLogprob | None = None
    stop_string: str | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """Comes before the first step where `prompt_logprobs` is asked for; None for the first token."""

    logprobs: list[TokenLogprob | None]


class Constraint(Protocol):
    """What a text may be, token by token (a grammar). Used by the scheduler's thread, one a choice."""

    def mask(self) -> NDArray[Any]:
        """bool or uint8 [vocab]: the tokens that may come now, an end token where the text may end."""
        ...

    def accept(self, token: int) -> None:
        """`token`, which the mask allowed, has come."""
        ...

    def finished(self) -> bool:
        """Whether nothing but the end may follow."""
        ...

    def fork(self) -> Constraint:
        """The same state, going its own way."""
        ...
