"""GET /openapi.json: the document of every route, made of the structs that requests are decoded into.

It is made when it is first asked for. tests/engine/test_openapi.py holds it to the routes, and schemathesis
to what the server answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from engine.server import (
    answers,
    anthropic_schema,
    chat_schema,
    completions,
    predecessor,
    responses_schema,
    tokens,
)
from engine.server.anthropic_errors import KINDS
from engine.server.errors import ANTHROPIC
from engine.server.service import json_response, service_of

REF: Final = "#/components/schemas/{name}"
JSON: Final = "application/json"
STREAM: Final = "text/event-stream"
EVENT: Final = {  # of each event
    "type": "object",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}
WORDS: Final = {  # that are known, where the structs have any text so as to say better what is not
    ("ChatMessage", "role"): {"system", "developer", "user", "assistant", "tool"},
    ("ContentPart", "type"): set(chat_schema.TEXT_PARTS),
    ("ToolSpec", "type"): {"function"},
}
Method = Literal["get", "post"]
Refs = dict[type, dict[str, Any]]


@dataclass(frozen=True)
class Operation:
    """One route: what it takes and gives. `errors` are the statuses, beside 200, that it may have."""

    path: str
    summary: str
    answer: type | None
    method: Method = "get"
    body: type | None = None
    streams: bool = False
    errors: tuple[int, ...] = ()
    media: str = JSON
    anthropic: type | None = None  # the answer where the header anthropic-version is sent


def post(path: str, summary: str, body: type, answer: type, *, streams: bool = True) -> Operation:
    """A route that runs the model."""
    errors = (400, 404, 413, 429, 503)
    return Operation(path, summary, answer, "post", body, streams, errors)


def plain(path: str, summary: str, body: type, answer: type) -> Operation:
    """A route with a body that does not run the model."""
    return Operation(path, summary, answer, "post", body, errors=(400, 404, 413))


class LemonadeChatRequest(chat_schema.ChatRequest, kw_only=True):
    """POST /api/v1/chat/completions: with Lemonade's name of repetition_penalty."""

    repeat_penalty: Annotated[float, msgspec.Meta(ge=0.01, le=10)] | None = None


class LemonadeCompletionRequest(completions.CompletionRequest, kw_only=True):
    """POST /api/v1/completions."""

    repeat_penalty: Annotated[float, msgspec.Meta(ge=0.01, le=10)] | None = None


def lemonade(version: str) -> list[Operation]:
    """Lemonade's routes below /api/v1, or their aliases."""
    base = f"/api/{version}"
    return [
        Operation(f"{base}/health", "Lemonade: what is loaded", answers.LemonadeHealth, errors=(503,)),
        Operation(f"{base}/models", "Lemonade: the models", answers.LemonadeModels),
        Operation(f"{base}/models/{{id}}", "Lemonade: one model", answers.LemonadeModel, errors=(404,)),
        Operation(f"{base}/stats", "Lemonade: the last request's figures", answers.LemonadeStats),
        Operation(f"{base}/system-info", "Lemonade: the machine", answers.LemonadeSystem),
        post(f"{base}/chat/completions", "As /v1", LemonadeChatRequest, answers.ChatCompletion),
        post(f"{base}/completions", "As /v1", LemonadeCompletionRequest, answers.Completion),
    ]


OPERATIONS: Final = (
    Operation("/health", "What runs here", answers.Health, errors=(503,)),
    Operation("/metrics", "Counters and histograms for Prometheus", None, media="text/plain"),
    Operation("/openapi.json", "This document", None),
    Operation("/v1/models", "The models", answers.Models, anthropic=answers.AnthropicModels),
    Operation("/v1/models/{id}", "One model", answers.Model, errors=(404,), anthropic=answers.AnthropicModel),
    post("/v1/chat/completions", "Answer a conversation", chat_schema.ChatRequest, answers.ChatCompletion),
    post("/v1/completions", "Continue a text", completions.CompletionRequest, answers.Completion),
    post("/v1/responses", "Answer an input", responses_schema.ResponsesRequest, answers.ResponseObject),
    Operation("/v1/embeddings", "Refused: there is no embedding model", None, "post", errors=(400,)),
    post("/v1/messages", "Answer a conversation", anthropic_schema.MessagesRequest, answers.AnthropicMessage),
    plain(
        "/v1/messages/count_tokens",
        "How many tokens a prompt has",
        anthropic_schema.CountRequest,
        answers.TokenCount,
    ),
    plain("/tokenize", "A text's tokens", tokens.TokenizeRequest, answers.Tokenized),
    plain("/detokenize", "The text of tokens", tokens.DetokenizeRequest, answers.Detokenized),
    plain("/apply-template", "A conversation's prompt", tokens.TemplateRequest, answers.AppliedTemplate),
    Operation("/tokenizer_info", "The tokenizer's special tokens", answers.TokenizerInfo),
    *lemonade("v1"),
    *lemonade("v0"),
    post("/ppl", "A text's perplexity", predecessor.PplRequest, answers.Perplexity, streams=False),
    Operation("/v1/npu/status", "Which backend runs which phase", answers.NpuStatus),
)


async def openapi(request: Request) -> Response:
    """GET /openapi.json."""
    service = service_of(request)
    return json_response(await asyncio.to_thread(document, service.home.version, service.model))


@cache
def document(version: str, model: str) -> dict[str, Any]:
    """The whole document of a server that serves `model`."""
    found = {kind for each in OPERATIONS for kind in (each.body, each.answer, each.anthropic) if kind}
    kinds = sorted(found | {answers.Error, answers.AnthropicError}, key=lambda kind: kind.__qualname__)
    schemas, components = msgspec.json.schema_components(kinds, ref_template=REF)
    refs = dict(zip(kinds, schemas, strict=True))
    for kind in {each.body for each in OPERATIONS if each.body}:
        _name_model(components[kind.__name__], model, kind)
    for (component, field), values in WORDS.items():
        components[component]["properties"][field] = {"type": "string", "enum": sorted(values)}
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, refs)
    return {
        "openapi": "3.1.0",
        "info": {"title": "halo", "version": version, "description": __doc__.split("\n")[0]},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{}, {"bearer": []}, {"x-api-key": []}],
    }


def _name_model(component: dict[str, Any], model: str, kind: type) -> None:
    """Say which model there is, where a body names one: any other is refused."""
    properties = component["properties"]
    if issubclass(kind, anthropic_schema.CountRequest):
        properties["model"] = {"type": "string", "anyOf": [{"enum": [model]}, {"pattern": "^claude-"}]}
    elif "model" in properties:
        properties["model"] = {"enum": [model, None], "default": None}


def _operation(operation: Operation, refs: Refs) -> dict[str, Any]:
    found: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": f"{operation.method}{operation.path}".replace("/", "_"),
        "responses": _responses(operation, refs),
    }
    found["parameters"] = [
        {"name": name, "in": place, "required": place == "path", "schema": {"type": "string"}}
        for name, place, there in (
            ("id", "path", "{id}" in operation.path),
            ("anthropic-version", "header", operation.anthropic is not None),
        )
        if there
    ]
    if operation.body is not None:
        content = {JSON: {"schema": refs[operation.body]}}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _responses(operation: Operation, refs: Refs) -> dict[str, Any]:
    plain_text = {"type": "string" if operation.media != JSON else "object"}
    schema = refs[operation.answer] if operation.answer else plain_text
    if operation.anthropic is not None:
        schema = {"anyOf": [schema, refs[operation.anthropic]]}
    content: dict[str, Any] = {operation.media: {"schema": schema}}
    if operation.streams:
        content[STREAM] = {"schema": EVENT}
    found = {"200": {"description": "The answer", "content": content}}
    if operation.method == "post" and operation.answer is None:
        found.clear()
    return found | {str(status): _error(operation.path, status, refs) for status in _statuses(operation)}


def _statuses(operation: Operation) -> Iterable[int]:
    return sorted({*operation.errors, 401, 500})


def _error(path: str, status: int, refs: Refs) -> dict[str, Any]:
    is_anthropic = path.startswith(ANTHROPIC)
    kind = answers.AnthropicError if is_anthropic else answers.Error
    error: dict[str, Any] = {
        "description": KINDS.get(status, "api_error") if is_anthropic else HTTPStatus(status).phrase,
        "content": {JSON: {"schema": refs[kind]}},
    }
    if status == 429:
        error["headers"] = {"Retry-After": {"required": True, "schema": {"type": "string"}}}
    return error
