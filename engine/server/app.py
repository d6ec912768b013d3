"""The ASGI application: routes, error forms, /health, /metrics; it opens no socket and loads no model."""

from __future__ import annotations

import asyncio

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from engine.errors import HaloError
from engine.server import openai, others
from engine.server.asgi import App
from engine.server.errors import ApiError, handle
from engine.server.front import guarded, service_health
from engine.server.metrics import CONTENT_TYPE, Labels, Metrics, render
from engine.server.service import Service, json_response, service_of

GONE = 499  # as nginx has it: the client closed the request
ROUTES = (
    *openai.ROUTES,
    *others.ROUTES,
)


def build_app(service: Service, key_digests: list[bytes] | None = None) -> App:
    """The application behind its guards; `key_digests` None means no key is asked for."""
    return guarded(inner_app(service), digests=key_digests)


def inner_app(service: Service, metrics: Metrics | None = None) -> Starlette:
    """The routes around a started service; what every request passes before them is front.guarded."""
    app = Starlette(
        routes=[
            Route("/health", health, methods=["GET"]),
            Route("/metrics", prometheus, methods=["GET"]),
            *(Route(path, endpoint, methods=[method]) for path, endpoint, method in ROUTES),
        ],
        exception_handlers={
            ApiError: handle,
            HTTPException: handle,
            HaloError: handle,
            ClientDisconnect: _gone,
            Exception: handle,
        },
    )
    app.router.redirect_slashes = False
    app.state.service = service
    app.state.metrics = metrics or Metrics()
    return app


async def health(request: Request) -> Response:
    """GET /health: what runs here; 503 where the engine's thread has ended."""
    body = service_health(service_of(request))
    return json_response(body, 200 if body["status"] == "ok" else 503)


async def prometheus(request: Request) -> Response:
    """GET /metrics, made off the event loop."""
    service = service_of(request)
    facts = service.engine.facts
    names = ("backend", "isa", "device", "backend_reason")
    build = {"version": service.home.version, "generation": service.home.generation}
    build |= {name: str(facts.get(name) or "") for name in names}
    labels = Labels(service.model, build)
    metrics: Metrics = request.app.state.metrics
    text = await asyncio.to_thread(render, metrics, service.runner.gauges(), labels)
    return Response(text, media_type=None, headers={"content-type": CONTENT_TYPE})


async def _gone(request: Request, error: Exception) -> Response:
    """Nobody reads this but the access log: the client went away."""
    return Response(status_code=GONE)
