"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens; what events say is elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from engine.server.anthropic_errors import anthropic_error
from engine.server.anthropic_schema import CountRequest, MessagesRequest
from engine.server.anthropic_stream import Answer, message_of, stream_of
from engine.server.anthropic_turns import conversation_of, count, prepared_of
from engine.server.errors import ApiError, decode_body
from engine.server.service import (
    EventStream,
    Service,
    cancelled_on_disconnect,
    check_model,
    json_response,
    read_body,
    service_of,
    sse,
    submit_or_429,
)

ALIAS = "claude-"  # Claude Code asks for several models by Anthropic's own names; here is one


async def messages(request: Request) -> Response:
    """POST /v1/messages, also with ?beta=true."""
    service = service_of(request)
    body = decode_body(await read_body(request), MessagesRequest)
    _check(service, body)
    prepared = await prepared_of(service, body)
    job = submit_or_429(request, prepared.works)
    answer = Answer(job, prepared, service.model, body.max_tokens)
    if body.stream:
        return EventStream(stream_of(answer), job, _failed(request))
    async with cancelled_on_disconnect(job, request.receive):
        message = await message_of(answer)
    if message is None:
        raise ClientDisconnect  # cut short, so nobody is there to read it
    return json_response(message)


async def count_tokens(request: Request) -> Response:
    """POST /v1/messages/count_tokens: of any prompt, also of one that is too long to be run."""
    service = service_of(request)
    body = decode_body(await read_body(request), CountRequest)
    _check(service, body)
    asked = conversation_of(body, service.engine.card.chat_template)
    return json_response({"input_tokens": await count(service, asked)})


def _check(service: Service, body: CountRequest) -> None:
    if not body.model.startswith(ALIAS):
        check_model(service, body.model)
    body.refuse_unsupported()


def _failed(request: Request) -> Callable[[ApiError], bytes]:
    request_id = request.scope.get("state", {}).get("request_id")

    def event(error: ApiError) -> bytes:
        return sse(anthropic_error(error, request_id), "error")

    return event
