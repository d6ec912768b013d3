"""POST /v1/responses, without a store: whole, or as a stream of events in their documented order."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

import engine.server.service as shared
from engine.sequence import Prompt
from engine.server.errors import ApiError, as_api_error, decode_body
from engine.server.fields import RESPONSES, refuse
from engine.server.reading import pieces
from engine.server.responses_items import Event, Items
from engine.server.responses_schema import LOGPROBS, ResponsesRequest
from engine.server.runner import Job
from engine.server.service import (
    EventStream,
    Service,
    cancelled_on_disconnect,
    check_model,
    json_response,
    new_id,
    read_body,
    service_of,
    sse,
    submit_or_429,
)
from engine.server.turn import Ask, Names, Prepared, prepare

NAMES: Final = Names(messages="input", tools="tools", schema="text.format")


async def responses(request: Request) -> Response:
    """POST /v1/responses."""
    service = service_of(request)
    data = await read_body(request)
    body = decode_body(data, ResponsesRequest)
    check_model(service, body.model)
    refuse(RESPONSES, data)
    tools = body.all_tools()
    params = body.sampling(body.max_output_tokens, service.engine.tokenizer.size, body.wanted_logprobs())
    ask = Ask(body.turns(), params, 1, tools, body.choice(tools), body.schema())
    prepared = await prepare(service, ask, NAMES)
    answer = Answer(service, submit_or_429(request, prepared.works), prepared, body)
    if body.stream:
        return EventStream(answer.stream(), answer.job, answer.failed)
    async with cancelled_on_disconnect(answer.job, request.receive):
        async for _ in answer.events(None):
            pass
    if answer.end is None:
        raise ClientDisconnect  # cut short, so nobody is there to read it
    return json_response(answer.response())


@dataclass
class Answer:
    """One accepted request and the response as it grows."""

    service: Service
    job: Job
    prepared: Prepared
    body: ResponsesRequest

    def __post_init__(self) -> None:
        self.end: str | None = None  # why it ended
        self._error: ApiError | None = None
        self._tokens = 0
        self._number = -1
        self._head = {"id": new_id("resp_"), "object": "response", "created_at": int(time.time())}
        wants = LOGPROBS in (self.body.include or ()) or bool(self.body.top_logprobs)
        self._items = Items(self.service.engine.tokenizer, logprobs=wants)

    async def events(self, idle_seconds: float | None) -> AsyncIterator[Event | None]:
        """What happens to the items; None where nothing came for so long."""
        async for event in pieces(self.job, self.prepared.reader, idle_seconds):
            if event is None:
                yield None
                continue
            _, piece = event
            if isinstance(piece, Prompt):
                continue
            self._tokens += piece.tokens
            self.end = piece.finish_reason or self.end
            for each in self._items.add(piece):
                yield each

    async def stream(self) -> AsyncIterator[bytes]:
        """The events: created, in_progress, those of each item, completed or incomplete (or failed)."""
        yield self._sent({"type": "response.created", "response": self.response()})
        yield self._sent({"type": "response.in_progress", "response": self.response()})
        try:
            async for event in self.events(shared.PING_SECONDS):
                yield shared.PING if event is None else self._sent(event)
            if self.end is not None:
                yield self._sent({"type": f"response.{self._status()}", "response": self.response()})
        except Exception as error:  # the status is sent: the only way left to tell is an event
            yield self.failed(as_api_error(error))

    def failed(self, error: ApiError) -> bytes:
        """The event after which none follows."""
        self._error = error
        return self._sent({"type": "response.failed", "response": self.response()})

    def response(self) -> dict[str, Any]:
        """The response as it is now."""
        body, ended = self.body, self.end is not None or self._error is not None
        cut = self.end == "length"
        return self._head | {
            "status": self._status(),
            "completed_at": int(time.time()) if self._status() == "completed" else None,
            "error": self._error and {"code": "server_error", "message": self._error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "model": self.service.model,
            "output": self._items.so_far() if ended else [],
            "usage": self._usage() if ended else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "background": False,
            "store": False,
            "service_tier": "default",
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": body.format()},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "user": body.user,
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
        }

    def _status(self) -> str:
        if self._error is not None:
            return "failed"
        if self.end is None:
            return "in_progress"
        return "incomplete" if self.end == "length" else "completed"

    def _usage(self) -> dict[str, Any]:
        prompt = self.prepared.prompt_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {
                "cached_tokens": min(self.job.cached_tokens, prompt),
                "cache_write_tokens": 0,
            },
            "output_tokens": self._tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + self._tokens,
        }

    def _sent(self, event: Event) -> bytes:
        self._number += 1
        return sse(event | {"sequence_number": self._number}, event["type"])
