"""POST /v1/chat/completions: the answer and its stream as OpenAI's clients accumulate it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import engine.server.service as shared
from engine.sequence import Prompt, TokenLogprob
from engine.server.chat_schema import ChatRequest, tools_of, turns_of
from engine.server.errors import as_api_error, decode_body
from engine.server.fields import CHAT, refuse
from engine.server.reading import Piece, Whole, gather, pieces
from engine.server.runner import Job
from engine.server.service import (
    EventStream,
    Service,
    check_model,
    failure,
    json_response,
    new_id,
    read_body,
    service_of,
    sse,
    submit_or_429,
)
from engine.server.turn import Ask, Prepared, prepare
from engine.server.usage import chat_logprobs, usage
from engine.tool_parser import CallDelta
from engine.tools import ToolCall


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    service = service_of(request)
    data = await read_body(request)
    body = decode_body(data, ChatRequest)
    check_model(service, body.model)
    refuse(CHAT, data)
    prepared = await prepare(service, _ask(service, body))
    answer = Answer(service, submit_or_429(request, prepared.works), prepared, body)
    if body.stream:
        return EventStream(answer.events(), answer.job)
    choices = await gather(answer.job, prepared.reader, request.receive)
    if not body.logprobs:
        return json_response(answer.whole(choices))
    return await asyncio.to_thread(lambda: json_response(answer.whole(choices)))  # long ones take a while


def _ask(service: Service, body: ChatRequest) -> Ask:
    tools = tools_of(body.tools)
    params = body.sampling(body.limit(), service.engine.tokenizer.size, body.wanted_logprobs())
    return Ask(turns_of(body.messages), params, body.n or 1, tools, body.choice(tools), body.schema())


@dataclass
class Answer:
    """One accepted request and the form in which its answer goes out."""

    service: Service
    job: Job
    prepared: Prepared
    body: ChatRequest

    def __post_init__(self) -> None:
        self._head = {"id": new_id("chatcmpl-"), "created": int(time.time())}

    def whole(self, choices: Sequence[Whole]) -> dict[str, Any]:
        """The answer in one piece."""
        tokens = sum(choice.tokens for choice in choices)
        return self._envelope("chat.completion", [self._choice(choice) for choice in choices]) | {
            "usage": usage(self.job, self.prepared.prompt_tokens, tokens)
        }

    async def events(self) -> AsyncIterator[bytes]:
        """The answer as a stream: for each choice its role, its pieces, its end; usage; [DONE]."""
        tokens = 0
        try:
            for work in self.prepared.works:
                opening = {"role": "assistant", "content": "", "refusal": None}
                yield sse(self._chunk([self._delta(work.index, opening, Piece())]))
            async for event in pieces(self.job, self.prepared.reader, shared.PING_SECONDS):
                if event is None:
                    yield shared.PING
                    continue
                index, piece = event
                if not isinstance(piece, Prompt):
                    tokens += piece.tokens
                    for chunk in self._chunks(index, piece):
                        yield sse(chunk)
            if self.body.include_usage():
                counts = usage(self.job, self.prepared.prompt_tokens, tokens)
                yield sse(self._chunk([]) | {"usage": counts})
        except Exception as error:  # the status is sent: the only way left to tell is an event
            yield failure(as_api_error(error))
        yield shared.DONE

    def _chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """A piece's chunks: text, each part of a call by itself, then the end, which has an empty delta."""
        deltas: list[dict[str, Any]] = [{"content": piece.text}] if piece.text else []
        deltas += [{"tool_calls": [_call_delta(call)]} for call in piece.calls]
        if piece.finish_reason is not None:
            deltas.append({})
        ends = [None] * (len(deltas) - 1) + [piece.finish_reason]
        rest = [piece] + [Piece()] * (len(deltas) - 1)  # ids and log probabilities go with the first
        return [
            self._chunk([self._delta(index, delta, part, end)])
            for delta, part, end in zip(deltas, rest, ends, strict=True)
        ]

    def _choice(self, whole: Whole) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": whole.text, "refusal": None}
        if whole.calls:
            message["content"] = whole.text or None
            message["tool_calls"] = [_call(call) for call in whole.calls]
        choice = {
            "index": whole.index,
            "message": message,
            "logprobs": self._logprobs(whole.logprobs),
            "finish_reason": whole.finish_reason,
        }
        return choice | ({"token_ids": whole.token_ids} if self.body.return_token_ids else {})

    def _delta(
        self, index: int, delta: dict[str, Any], piece: Piece, end: str | None = None
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(piece.logprobs) if piece.logprobs else None,
            "finish_reason": end,
        }
        return choice | ({"token_ids": piece.token_ids} if self.body.return_token_ids else {})

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return {"content": chat_logprobs(self.service.engine.tokenizer, logprobs), "refusal": None}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A stream's object; with usage asked for, every chunk but the last says null."""
        envelope = self._envelope("chat.completion.chunk", choices)
        return envelope | {"usage": None} if self.body.include_usage() else envelope

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            **self._head,
            "object": kind,
            "model": self.service.model,
            "system_fingerprint": self.service.fingerprint,
            "choices": choices,
        }


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _call_delta(call: CallDelta) -> dict[str, Any]:
    """The first of a call has its id, type and name; the others a piece of its arguments."""
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}
