"""Lemonade's own endpoints below /api/v1 and /api/v0, in its shapes; what OpenAI has is answered as there."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message as AsgiMessage

from engine.router import UNCHECKED
from engine.server.errors import ApiError
from engine.server.service import Service, check_model, json_response, read_body, service_of
from engine.server.system_info import system_info

RECIPE: Final = "halo"
TYPES: Final = ("llm", "embedding", "reranking", "transcription", "image", "tts")

Endpoint = Callable[[Request], Awaitable[Response]]


async def health(request: Request) -> Response:
    """GET /api/v1/health: the one model, which is always loaded; 503 when the engine's thread has ended."""
    service = service_of(request)
    running, _ = service.runner.counts()
    alive = service.runner.alive()
    body = {
        "status": "ok" if alive else "error",
        "version": service.home.version,
        "model_loaded": service.model,
        "all_models_loaded": [_loaded(request, service, busy=bool(running))],
        "pinned_models": {kind: int(kind == "llm") for kind in TYPES},
        "max_models": {kind: int(kind == "llm") for kind in TYPES},
        "telemetry": {"enabled": False},
        "update_check_done": True,
    }
    return json_response(body, 200 if alive else 503)


async def models(request: Request) -> Response:
    """GET /api/v1/models; there is nothing that could be pulled, so show_all shows no more."""
    return json_response({"object": "list", "data": [_model(service_of(request))]})


async def model(request: Request) -> Response:
    """GET /api/v1/models/{id}."""
    service = service_of(request)
    check_model(service, request.path_params["id"])
    return json_response(_model(service))


async def stats(request: Request) -> Response:
    """GET /api/v1/stats: the last request that ended, and sums since the start."""
    service = service_of(request)
    found = service.stats.read()
    return json_response(
        {
            "time_to_first_token": found.time_to_first_token,
            "tokens_per_second": found.tokens_per_second,
            "input_tokens": found.prompt_tokens - found.cached_tokens,
            "output_tokens": found.output_tokens,
            "prompt_tokens": found.prompt_tokens,
            "cache_tokens": found.cached_tokens,
            "request_count_total": found.requests_total,
            "input_tokens_total": found.prompt_tokens_total - found.cached_tokens_total,
            "output_tokens_total": found.output_tokens_total,
            "prompt_tokens_total": found.prompt_tokens_total,
            "cache_tokens_total": found.cached_tokens_total,
            "routing_decisions_total": 0,
            "routing_switches_total": 0,
        }
    )


async def system(request: Request) -> Response:
    """GET /api/v1/system-info."""
    service = service_of(request)
    npu = await asyncio.to_thread(service.npu) if service.npu else UNCHECKED
    return json_response(await asyncio.to_thread(system_info, service, npu))


async def chat_completions(request: Request) -> Response:
    """POST /api/v1/chat/completions: OpenAI's, with Lemonade's name of one field."""
    from engine.server.openai import chat_completions as openai_chat

    return await openai_chat(await _translated(request))


async def completions(request: Request) -> Response:
    """POST /api/v1/completions: OpenAI's, with Lemonade's name of one field."""
    from engine.server.openai import completions as openai_completions

    return await openai_completions(await _translated(request))


async def _translated(request: Request) -> Request:
    """The request with `repeat_penalty` under the name that the OpenAI endpoints have for it."""
    body = await read_body(request)
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _with_body(request, body)  # its own endpoint says what is wrong with it
    if (value := fields.pop("repeat_penalty", None)) is not None:
        if "repetition_penalty" in fields:
            raise ApiError(
                400,
                "repeat_penalty and repetition_penalty are two names of one field: give one.",
                param="repeat_penalty",
                code="invalid_value",
            )
        body = msgspec.json.encode({**fields, "repetition_penalty": value})
    return _with_body(request, body)


def _with_body(request: Request, body: bytes) -> Request:
    """The same request with another body; after it, what the client does next (such as going away)."""
    left: list[AsgiMessage] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> AsgiMessage:
        return left.pop() if left else await request.receive()

    return Request(request.scope, receive)


def _loaded(request: Request, service: Service, *, busy: bool) -> dict[str, Any]:
    return {
        "model_name": service.model,
        "checkpoint": service.model,
        "last_use": time.time() if busy else service.created,
        "type": "llm",
        "device": "cpu" if service.engine.facts.get("backend") in (None, "cpu") else "gpu",
        "pinned": True,
        "is_busy": busy,
        "is_streaming": busy,
        "recipe": RECIPE,
        "recipe_options": {"ctx_size": service.engine.context},
        "pid": os.getpid(),
        "backend_url": str(request.base_url) + "v1",
    }


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.model,
        "object": "model",
        "created": service.created,
        "owned_by": "halo",
        "checkpoint": service.model,
        "recipe": RECIPE,
        "size": round(_bytes_of(service) / 1e9, 3),
        "downloaded": True,
        "suggested": True,
        "update_available": False,
        "labels": [],
        "context_length": service.engine.context,
        "max_context_window": service.engine.context,
    }


def _bytes_of(service: Service) -> int:
    try:
        return (service.home.model_dir / "model.halo").stat().st_size
    except OSError:
        return 0
