"""The routes of the APIs beside OpenAI's; their modules are imported by the first request that needs one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

Endpoint = Callable[[Request], Awaitable[Response]]

_LEMONADE: Final = (
    ("health", "health", "GET"),
    ("models", "models", "GET"),
    ("models/{id:path}", "model", "GET"),
    ("stats", "stats", "GET"),
    ("system-info", "system", "GET"),
    ("chat/completions", "chat_completions", "POST"),
    ("completions", "completions", "POST"),
)


def later(module: str, name: str) -> Endpoint:
    """An endpoint of a module that is imported when it is first asked: a cold start waits for none."""

    async def endpoint(request: Request) -> Response:
        found: Endpoint = getattr(import_module(module), name)
        return await found(request)

    return endpoint


ROUTES: Final = (
    ("/v1/messages", later("engine.server.anthropic", "messages"), "POST"),
    ("/v1/messages/count_tokens", later("engine.server.anthropic", "count_tokens"), "POST"),
    *(
        (f"/api/{version}/{path}", later("engine.server.lemonade", name), method)
        for version in ("v1", "v0")
        for path, name, method in _LEMONADE
    ),
    ("/openapi.json", later("engine.server.openapi", "openapi"), "GET"),
    ("/tokenizer_info", later("engine.server.tokenizer_info", "tokenizer_info"), "GET"),
    ("/ppl", later("engine.server.predecessor", "ppl"), "POST"),
    ("/v1/npu/status", later("engine.server.predecessor", "npu_status"), "GET"),
)
