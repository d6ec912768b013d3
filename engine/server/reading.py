"""Steps to pieces of an answer: text, calls of functions, log probabilities; in no API's own words."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from engine.sequence import Prompt, Step, TokenLogprob
from engine.server.runner import Job
from engine.server.service import cancelled_on_disconnect
from engine.tokenizer import TextTokenizer
from engine.tool_parser import CallDelta, ToolParser
from engine.tools import ToolCall


@dataclass(frozen=True)
class Piece:
    """What a step brought out: at least text, a part of a call, or the end.

    `token_ids` is all that was decoded since the last piece, an end token included, and `tokens` their number
    as usage counts, without it. `logprobs` are those of tokens whose text is out.
    """

    text: str = ""
    calls: tuple[CallDelta, ...] = ()
    token_ids: tuple[int, ...] = ()
    tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None  # stop, length or tool_calls
    stop_string: str | None = None


@dataclass
class Whole:
    """A whole choice."""

    index: int
    texts: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_string: str | None = None
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The answer without its calls."""
        return "".join(self.texts)

    def add(self, piece: Piece) -> None:
        """Take one more piece."""
        if piece.text:
            self.texts.append(piece.text)
        for call in piece.calls:
            if call.name is not None:
                self.calls.append(ToolCall(call.id or "", call.name, call.arguments))
            else:
                last = self.calls[call.index]
                self.calls[call.index] = ToolCall(last.id, last.name, last.arguments + call.arguments)
        self.token_ids += piece.token_ids
        self.tokens += piece.tokens
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.stop_string = piece.stop_string or self.stop_string


class ChoiceReader:
    """One choice's steps to pieces. `parser` finds calls; without one all is text.

    `with_end` has the end token's log probability among the others.
    """

    def __init__(
        self, tokenizer: TextTokenizer, parser: ToolParser | None = None, *, with_end: bool = False
    ) -> None:
        self._parser = parser
        self._aligned = _Aligned(tokenizer, with_end)
        self._ids: list[int] = []
        self._tokens = 0
        self._logprobs: list[TokenLogprob] = []

    def feed(self, step: Step) -> Piece | None:
        """The next piece; None while nothing may be shown."""
        if step.token_id >= 0:
            self._ids.append(step.token_id)
            self._tokens += not step.is_end
            if step.logprob is not None:
                self._logprobs += self._aligned.feed(step)
        text, calls = step.text, []
        if self._parser is not None:
            events = self._parser.feed(step.text)
            if step.finish_reason is not None:
                events += self._parser.finish()
            text = "".join(event for event in events if isinstance(event, str))
            calls = [event for event in events if isinstance(event, CallDelta)]
        if not text and not calls and step.finish_reason is None:
            return None
        return self._piece(step, text, calls)

    def _piece(self, step: Step, text: str, calls: list[CallDelta]) -> Piece:
        reason = step.finish_reason
        if reason == "stop" and self._parser is not None and self._parser.calls:
            reason = "tool_calls"
        ids, tokens, logprobs = tuple(self._ids), self._tokens, tuple(self._logprobs)
        self._ids, self._tokens, self._logprobs = [], 0, []
        return Piece(text, tuple(calls), ids, tokens, logprobs, reason, step.stop_string)


class _Aligned:
    """Which log probabilities belong to text that is out: a token does whose first byte is.

    So a token that a stop string took away is not among them.
    """

    def __init__(self, tokenizer: TextTokenizer, with_end: bool) -> None:
        self._tokenizer, self._with_end = tokenizer, with_end
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()  # where the token begins, in bytes
        self._raw = 0  # bytes of all tokens
        self._shown = 0
        self._head: bytes | None = b""  # until some text is out: white space before it may be dropped

    def feed(self, step: Step) -> list[TokenLogprob]:
        data = self._tokenizer.token_bytes(step.token_id)
        if step.logprob is not None and (self._with_end or not step.is_end):
            self._waiting.append((self._raw, step.logprob))
        self._raw += len(data)
        if self._head is not None:
            self._head += data
            if step.text:
                self._shown = max(self._head.find(step.text[0].encode()), 0)
                self._head = None
        self._shown += len(step.text.encode())
        whole = step.finish_reason is not None and step.stop_string is None
        limit = self._raw + 1 if whole else self._shown
        out = []
        while self._waiting and self._waiting[0][0] < limit:
            out.append(self._waiting.popleft()[1])
        return out


Event = tuple[int, Piece | Prompt]
Readers = Callable[[], ChoiceReader]


async def pieces(job: Job, reader: Readers, idle_seconds: float | None) -> AsyncIterator[Event | None]:
    """(index, piece) as they come, a prompt's log probabilities first; None where nothing came so long."""
    readers = {work.index: reader() for work in job.works}
    async for event in job.steps_or_pings(idle_seconds):
        if event is None:
            yield None
            continue
        index, step = event
        if isinstance(step, Prompt):
            yield index, step
        elif (piece := readers[index].feed(step)) is not None:
            yield index, piece


async def gather(job: Job, reader: Readers, receive: Receive) -> list[Whole]:
    """All choices, whole, by index; a client that goes away ends the work (ClientDisconnect)."""
    wholes = {work.index: Whole(work.index) for work in job.works}
    async with cancelled_on_disconnect(job, receive):
        async for event in pieces(job, reader, None):
            if event is None:
                continue
            index, piece = event
            if isinstance(piece, Prompt):
                wholes[index].prompt_logprobs = piece.logprobs
            else:
                wholes[index].add(piece)
    if any(whole.finish_reason is None for whole in wholes.values()):
        raise ClientDisconnect  # cut short, so nobody is there to read it
    return [wholes[index] for index in sorted(wholes)]


def likeliest(wholes: Sequence[Whole], n: int) -> list[Whole]:
    """The n of one prompt's choices with the highest mean log probability, the best first, numbered anew."""

    def mean(whole: Whole) -> float:
        scores = [each.logprob for each in whole.logprobs]
        return sum(scores) / len(scores) if scores else float("-inf")

    return sorted(wholes, key=mean, reverse=True)[:n]
