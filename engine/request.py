"""What is asked of the scheduler: a request's choices, client and deadline, and the events that answer it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic

from engine.errors import HaloError
from engine.sampling import SamplingParams
from engine.sequence import Constraint, Prompt, Step

Event = tuple[int, Step | Prompt] | Exception | None  # (index of the choice, what came), the error, the end


class QueueFull(Exception):
    """As many requests wait as may wait."""


class DeadlinePassed(HaloError):
    """The request was not done when it had to be."""


@dataclass(frozen=True)
class Work:
    """One choice to generate: `index` is its number in the answer, `seed_index` its number for its prompt.

    The constraint is forked, so that the choices of a request may be given the same one.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    index: int = 0
    seed_index: int = 0
    strip_leading: bool = False
    constraint: Constraint | None = None


@dataclass
class Timing:
    """When what happened to a request, by time.monotonic()."""

    submitted: float = field(default_factory=monotonic)
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None


class Request:
    """One or more choices that belong together, made by whoever asks and handed to the scheduler once."""

    def __init__(self, works: Sequence[Work], *, client: str = "", deadline: float | None = None) -> None:
        self.works = works
        self.client = client
        self.deadline = deadline  # of time.monotonic()
        self.timing = Timing()
        self.cached_tokens = 0  # of the prompts, that were not run again
        self.completion_tokens = 0
        self.events: deque[Event] = deque()
        self.admitted = 0  # choices that have had a slot
        self.left = len(works)  # choices that have not ended
        self.ended = False  # the scheduler has done with it
        self.cut = False  # a choice of it ended for want of room
        self._cancelled = False

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompts, those of several choices counted once."""
        return sum(len(work.prompt_ids) for work in self.works if work.seed_index == 0)

    def cancel(self) -> None:
        """Nobody wants the rest: within one step it has neither slots nor a place in the queue."""
        self._cancelled = True

    def cancelled(self) -> bool:
        """Whether nobody wants the rest."""
        return self._cancelled

    def behind(self) -> bool:
        """Whether whoever reads the events is far behind: it is then not worth while to make more."""
        return False

    def put(self, event: Event) -> None:
        """Take an event; called for each, in order, by whoever the scheduler delivers to."""
        self.events.append(event)
