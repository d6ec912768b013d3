"""What answers first: /health from the first moment on, and everything else once the application is there.

The model is checked and copied, and the web framework and NumPy are imported, while /health says `loading`;
a request that comes meanwhile waits, and nothing is ever made from bytes that were not checked. A load that
fails ends the server (serve.py). Nothing heavy is imported here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from engine.server.access import AccessLog, LineWriter
from engine.server.asgi import App, Receive, Scope, Send, send_error, send_json
from engine.server.browsers import Cors, OwnNames
from engine.server.keys import RequireKey

if TYPE_CHECKING:
    from engine.server.early import EarlyModel
    from engine.server.service import Service

Health = Callable[[], dict[str, Any]]


class Front:
    """An application that stands in for one that is not there yet. Of the event loop's thread alone."""

    def __init__(self, early: EarlyModel) -> None:
        self._early = early
        self._health: Health | None = None
        self._app: App | None = None
        self._there = asyncio.Event()
        self.failed = False

    def ready(self, app: App, health: Health) -> None:
        """The application is there: what waits goes on."""
        self._app, self._health = app, health
        self._there.set()

    def fail(self) -> None:
        """It never will be: what waits is told so."""
        self.failed = True
        self._there.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/health" and scope["method"] in ("GET", "HEAD"):
            body = self._health() if self._health else loading_health(self._early, failed=self.failed)
            await send_json(send, 200 if body["status"] == "ok" else 503, body)
            return
        await self._there.wait()
        if self._app is None:
            from engine.server.errors import ApiError

            error = ApiError(503, "The model could not be loaded; the server ends.", code="not_loaded")
            await send_error(scope, receive, send, error)
            return
        await self._app(scope, receive, send)


def guarded(
    app: App,
    *,
    digests: list[bytes] | None = None,
    origins: tuple[str, ...] = (),
    writer: LineWriter | None = None,
    count: Callable[[str, int], None] | None = None,
) -> App:
    """`app` behind what every request passes: its id and line, its origin and host, its key."""
    inner: App = app if digests is None else RequireKey(app, digests)
    inner = Cors(inner, origins)  # a refusal for want of a key can be read by an allowed page
    if digests is None:
        inner = OwnNames(inner, origins)
    return AccessLog(inner, writer, count)


def loading_health(early: EarlyModel, *, failed: bool) -> dict[str, Any]:
    """What /health says before the engine is there: the same fields, those unknown yet as null."""
    home, card = early.home, early.card
    return {
        "status": "error" if failed else "ok",
        "loading": True,
        "model_mapped": early.mapped(),
        "generation": home.generation,
        "backend": None,
        "backend_reason": None,
        "device": None,
        "isa": None,
        "threads": None,
        "model": card.name,
        "version": home.version,
        "context": card.context,
        "running": 0,
        "waiting": 0,
    }


def service_health(service: Service) -> dict[str, Any]:
    """What /health says of a service: `status` is error where the engine's thread has ended."""
    running, waiting = service.runner.counts()
    facts = service.engine.facts
    return {
        "status": "ok" if service.runner.alive() else "error",
        "loading": False,
        "model_mapped": True,
        "generation": service.home.generation,
        **{name: facts.get(name) for name in ("backend", "backend_reason", "device", "isa", "threads")},
        "model": service.model,
        "version": service.home.version,
        "context": service.engine.context,
        "running": running,
        "waiting": waiting,
    }
