"""POST /tokenize, /detokenize, /apply-template: what the tokenizer makes of a text; nothing is generated.

The fields are those of vLLM and llama-server, for clients written for either.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from engine.chat import render
from engine.errors import HaloError
from engine.server.chat_schema import Messages, ToolSpec, tools_of, turns_of
from engine.server.errors import ApiError, decode_body
from engine.server.service import Service, check_model, json_response, read_body, service_of
from engine.server.usage import special_name, token_text

TokenIds = Annotated[list[int], Meta(max_length=1 << 20)]


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """A text as `prompt` (vLLM) or `content` (llama-server), or a conversation."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Messages | None = None
    tools: list[ToolSpec] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: TokenIds


class TemplateRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    messages: Messages
    tools: list[ToolSpec] | None = None


async def tokenize(request: Request) -> Response:
    """POST /tokenize: the ids of any text, also of one that is too long to be run."""
    service = service_of(request)
    body = decode_body(await read_body(request), TokenizeRequest)
    check_model(service, body.model)
    tokenizer = service.engine.tokenizer
    text = body.prompt if body.prompt is not None else body.content
    if text is not None:
        opening = tokenizer.opening if body.add_special_tokens is not False else []
        ids = [*opening, *await asyncio.to_thread(tokenizer.encode, text)]
    elif body.messages is not None:
        ids = await _rendered(service, body.messages, body.tools)
    else:
        raise ApiError(
            400, "A text (prompt) or messages are needed.", param="prompt", code="missing_required_parameter"
        )
    answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": service.engine.context}
    if body.return_token_strs:
        answer["token_strs"] = [token_text(tokenizer, token) for token in ids]
    return json_response(answer)


async def detokenize(request: Request) -> Response:
    """POST /detokenize: the text of ids; special ones have none."""
    service = service_of(request)
    body = decode_body(await read_body(request), DetokenizeRequest)
    check_model(service, body.model)
    try:
        text = await asyncio.to_thread(service.engine.tokenizer.decode, body.tokens)
    except HaloError as error:
        raise ApiError(400, error.message, param="tokens", code="invalid_value") from error
    return json_response({"prompt": text, "content": text})


async def apply_template(request: Request) -> Response:
    """POST /apply-template: the prompt that a conversation becomes, special tokens spelled out."""
    service = service_of(request)
    body = decode_body(await read_body(request), TemplateRequest)
    check_model(service, body.model)
    ids = await _rendered(service, body.messages, body.tools)
    tokenizer = service.engine.tokenizer
    pieces: list[str] = []
    plain: list[int] = []
    for token in ids:
        if tokenizer.is_special(token):
            pieces += [tokenizer.decode(plain), special_name(tokenizer, token)]
            plain = []
        else:
            plain.append(token)
    return json_response({"prompt": "".join([*pieces, tokenizer.decode(plain)])})


async def _rendered(service: Service, messages: Messages, specs: list[ToolSpec] | None) -> list[int]:
    turns, tools = turns_of(messages), tools_of(specs)
    engine = service.engine
    try:
        return await asyncio.to_thread(render, turns, engine.tokenizer, engine.card.chat_template, tools)
    except HaloError as error:
        raise ApiError(400, error.message, param="messages", code="invalid_value") from error
