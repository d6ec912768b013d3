"""A job's steps as the events of Anthropic's stream, and as one message: the same events, put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

import engine.server.service as shared
from engine.server.reading import Piece, pieces
from engine.server.runner import Job
from engine.server.service import new_id, sse
from engine.server.turn import Prepared
from engine.tool_parser import CallDelta

Event = dict[str, Any]
PING: Final[Event] = {"type": "ping"}
WAITING: Final = b": waiting\n\n"  # a comment: no event may come before message_start


@dataclass
class Answer:
    """One accepted request, and how far its answer is."""

    job: Job
    prepared: Prepared
    model: str
    max_tokens: int
    id: str = field(default_factory=lambda: new_id("msg_"))
    output_tokens: int = 0
    open_block: str = ""  # the type of the block that is open
    blocks: int = 0  # that were opened

    def usage(self) -> dict[str, int]:
        """The prompt in disjoint parts, as Anthropic counts: what the KV cache had is not in input_tokens.

        Nothing is ever written to a cache for the caller's sake: every prompt stays where it ran.
        """
        prompt = self.prepared.prompt_tokens
        cached = min(self.job.cached_tokens, prompt)
        return {
            "input_tokens": prompt - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self.output_tokens,
        }

    def message(self) -> Event:
        """The message before its first block."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self.usage(),
        }

    def take(self, piece: Piece) -> list[Event]:
        """What one more piece says."""
        self.output_tokens += piece.tokens
        found: list[str | CallDelta] = [piece.text, *piece.calls]
        events = [event for each in found for event in self._said(each)]
        return events if piece.finish_reason is None else [*events, *self._end(piece)]

    def _said(self, found: str | CallDelta) -> list[Event]:
        """More text, or more of a call: a block is opened where another one is, or none."""
        events: list[Event] = []
        if isinstance(found, CallDelta):
            if found.id is not None:
                named = {"id": _tool_id(found.id), "name": found.name}
                events += self._open({"type": "tool_use", **named, "input": {}})
            if found.arguments:
                events.append(self._delta({"type": "input_json_delta", "partial_json": found.arguments}))
        elif found:
            events += [] if self.open_block == "text" else self._open({"type": "text", "text": ""})
            events.append(self._delta({"type": "text_delta", "text": found}))
        return events

    def _open(self, block: Event) -> list[Event]:
        events = self._close()
        self.open_block = block["type"]
        self.blocks += 1
        start = {"type": "content_block_start", "index": self.blocks - 1, "content_block": block}
        return [*events, start, *([PING] if self.blocks == 1 else [])]

    def _delta(self, delta: Event) -> Event:
        return {"type": "content_block_delta", "index": self.blocks - 1, "delta": delta}

    def _close(self) -> list[Event]:
        """The end of the open block, if one is."""
        if not self.open_block:
            return []
        self.open_block = ""
        return [{"type": "content_block_stop", "index": self.blocks - 1}]

    def _end(self, piece: Piece) -> list[Event]:
        """The last events."""
        reason, sequence = self._stop_reason(piece), piece.stop_string
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return [
            *self._close(),
            {"type": "message_delta", "delta": delta, "usage": self.usage()},
            {"type": "message_stop"},
        ]

    def _stop_reason(self, piece: Piece) -> str:
        if piece.finish_reason == "length":
            full = self.output_tokens >= self.max_tokens
            return "max_tokens" if full else "model_context_window_exceeded"
        if piece.stop_string is not None:
            return "stop_sequence"
        return "tool_use" if piece.finish_reason == "tool_calls" else "end_turn"


def _tool_id(identity: str) -> str:
    """The id of a call with Anthropic's prefix."""
    return "toolu_" + identity.rpartition("_")[2]


async def events_of(answer: Answer) -> AsyncIterator[Event | None]:
    """The events in Anthropic's order; None where nothing may be said yet and the stream must stay alive.

    message_start waits until the request has a slot: only then is it known what the KV cache had.
    """
    started = False
    async for found in pieces(answer.job, answer.prepared.reader, shared.PING_SECONDS):
        if not started and (found is not None or answer.job.timing.admitted is not None):
            started = True
            yield {"type": "message_start", "message": answer.message()}
        if found is None:
            yield PING if started else None
            continue
        if isinstance(found[1], Piece):
            for event in answer.take(found[1]):
                yield event


async def stream_of(answer: Answer) -> AsyncIterator[bytes]:
    """The events as server-sent events, each with its name."""
    async for event in events_of(answer):
        yield WAITING if event is None else sse(event, event["type"])


async def message_of(answer: Answer) -> Event | None:
    """The whole message, put together from its events; None where the job was cut short."""
    message: Event = {}
    whole = False
    async for event in events_of(answer):
        if event is None:
            continue
        whole |= event["type"] == "message_stop"
        _take(message, event)
    return message if whole else None


def _take(message: Event, event: Event) -> None:
    kind = event["type"]
    if kind == "message_start":
        message.update(event["message"])
    elif kind == "content_block_start":
        message["content"].append(dict(event["content_block"]))
    elif kind == "content_block_delta":
        block, delta = message["content"][event["index"]], event["delta"]
        if delta["type"] == "text_delta":
            block["text"] += delta["text"]
        else:
            block["partial"] = block.get("partial", "") + delta["partial_json"]
    elif kind == "content_block_stop":
        block = message["content"][event["index"]]
        if "partial" in block:
            block["input"] = _input(block.pop("partial"))
    elif kind == "message_delta":
        message.update(event["delta"], usage=event["usage"])


def _input(text: str) -> dict[str, Any]:
    """A call's arguments; of one that max_tokens cut, which is no JSON, there are none."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
