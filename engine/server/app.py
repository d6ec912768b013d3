"""The ASGI application: routes, error forms, keys, /health; it opens no socket and loads no model."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from engine.errors import HaloError
from engine.server import openai, others
from engine.server.errors import ApiError, handle
from engine.server.keys import RequireKey
from engine.server.service import Service

ROUTES = (
    *openai.ROUTES,
    *others.ROUTES,
)


def build_app(service: Service, key_digests: list[bytes] | None = None) -> Starlette:
    """The application around a started service; `key_digests` None means no key is asked for."""
    app = Starlette(
        routes=[
            Route("/health", health, methods=["GET"]),
            *(Route(path, endpoint, methods=[method]) for path, endpoint, method in ROUTES),
        ],
        exception_handlers={
            ApiError: handle,
            HTTPException: handle,
            HaloError: handle,
            ClientDisconnect: _gone,
            Exception: handle,
        },
        middleware=[Middleware(RequireKey, digests=key_digests)] if key_digests is not None else [],
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


async def health(request: Request) -> Response:
    """GET /health: what runs here; 503 where the engine's thread has ended."""
    service: Service = request.app.state.service
    runner = service.runner
    running, waiting = runner.counts()
    body: dict[str, Any] = {
        "status": "ok" if runner.alive() else "error",
        "generation": service.home.generation,
        "backend": service.engine.facts.get("backend"),
        "backend_reason": service.engine.facts.get("backend_reason"),
        "device": service.engine.facts.get("device"),
        "isa": service.engine.facts.get("isa"),
        "threads": service.engine.facts.get("threads"),
        "model": service.model,
        "version": service.home.version,
        "context": service.engine.context,
        "running": running,
        "waiting": waiting,
    }
    status = 200 if runner.alive() else 503
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads this: the client went away."""
    return Response(status_code=400)
