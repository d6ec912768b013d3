"""Run the server: address policy, uvicorn, systemd notification, draining; no endpoint is here.

Until /health answers, nothing is imported that it does not need: load.py brings the rest meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engine.errors import EXIT_ERROR, HaloError
from engine.server.access import LineWriter
from engine.server.front import Front, guarded, service_health
from engine.server.keys import read_keys
from engine.server.lean import without_command_line
from engine.server.load import Load
from engine.server.metrics import Metrics
from engine.server.sockets import activated_sockets, bind, describe, notify, refuse_open_address
from engine.server.watchdog import Moving, Watchdog, watchdog_seconds

with without_command_line():
    from uvicorn.config import Config
    from uvicorn.server import Server

    from engine.server.connection import HEADER_BYTES, KEEP_ALIVE_SECONDS, Connection

if TYPE_CHECKING:
    from engine.router import NpuProbe
    from engine.server.early import EarlyModel
    from engine.server.service import Service
    from engine.speculate import Speculation

DRAIN_SECONDS: Final = 15  # the unit has TimeoutStopSec=20, after which systemd kills


@dataclass(frozen=True)
class ServeOptions:
    """What `halo serve` was told."""

    host: str
    port: int
    early: EarlyModel
    api_keys: Path | None = None
    threads: int | None = None
    speculation: Speculation | None = None
    queue_limit: int | None = None
    npu: NpuProbe | None = None
    cors_origins: tuple[str, ...] = ()
    slots: int | None = None  # sequences at once; as many as the memory has room for
    deadline: float | None = None  # seconds that a request may take, waiting included


def serve(options: ServeOptions) -> int:
    """Serve until SIGTERM (0), SIGINT (130) or the GPU is lost (1); HaloError where it refuses to start."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(levelname)s: %(message)s")
    early = options.early
    digests = read_keys(options.api_keys) if options.api_keys else None
    sockets = listening_sockets(options.host, options.port, has_keys=digests is not None)
    try:
        early.sealed()
        front, metrics, writer = Front(early), Metrics(), LineWriter()
        load = Load(options, early, metrics)
        app = guarded(
            front, digests=digests, origins=options.cors_origins, writer=writer, count=metrics.request
        )
        server = HaloServer(app, None, load.useless, lambda: load.runner)
        server.when_listening = partial(load.start, lambda: _loaded(load, front, server, sockets))
        try:
            asyncio.run(server.serve(sockets))
        finally:
            load.close()
            writer.close()
        load.raise_error()
        return _exit_code(server, load.lost())
    finally:
        for sock in sockets:
            sock.close()


def _loaded(load: Load, front: Front, server: HaloServer, sockets: list[socket.socket]) -> None:
    """The load is over: requests that waited go on, and systemd is told, or the server ends."""
    if load.app is None or load.service is None:
        front.fail()
        return
    front.ready(load.app, partial(service_health, load.service))
    server.announce(announcement(load.service, sockets))


def listening_sockets(host: str, port: int, *, has_keys: bool) -> list[socket.socket]:
    """systemd's sockets where it passed any, else our own; raises HaloError where policy forbids them."""
    sockets = activated_sockets() or bind(host, port)
    try:
        if not has_keys:
            refuse_open_address(sockets)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def serve_service(service: Service, sockets: list[socket.socket], digests: list[bytes] | None) -> int:
    """Serve an opened engine on bound sockets; the runner is started and stopped here."""
    from engine.server.app import build_app

    runner = service.runner
    server = HaloServer(
        build_app(service, digests),
        announcement(service, sockets),
        lambda: runner.lost is not None,
        lambda: runner,
    )
    runner.start()
    try:
        asyncio.run(server.serve(sockets))
    finally:
        runner.stop()
    return _exit_code(server, runner.lost)


def _exit_code(server: HaloServer, lost: HaloError | None) -> int:
    if lost is not None:  # a new process may find the device again, or takes the CPU
        print(f"error: {lost}", file=sys.stderr, flush=True)
        return EXIT_ERROR
    return 130 if server.ended_by == signal.SIGINT else 0


class HaloServer(Server):
    """uvicorn's server that tells systemd what it does, and ends on SIGTERM as a service should: with 0.

    `announcement` is what is said when it is ready; None: `announce` is called later. The loop asks `useless`
    ten times a second whether to end, and vouches to the watchdog for what `runner` gives.
    """

    def __init__(
        self,
        app: Any,  # noqa: ANN401  (an ASGI application; uvicorn's own type is of TypedDicts)
        announcement: str | None,
        useless: Callable[[], bool] = lambda: False,
        runner: Callable[[], Moving | None] = lambda: None,
    ) -> None:
        super().__init__(
            Config(
                app,
                http=Connection,
                ws="none",
                lifespan="off",
                loop="asyncio",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=HEADER_BYTES,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=DRAIN_SECONDS,
            )
        )
        self._announcement = announcement
        self._useless, self._runner = useless, runner
        self._watchdog = Watchdog(None)
        self.when_listening: Callable[[], None] = lambda: None
        self.ended_by: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.when_listening()
            if self._announcement is not None:
                self.announce(self._announcement)

    def announce(self, text: str) -> None:
        """Say what is served, and tell systemd that it is."""
        print(text, file=sys.stderr, flush=True)
        notify("READY=1")
        self._watchdog = Watchdog(watchdog_seconds())

    async def on_tick(self, counter: int) -> bool:
        """Asked ten times a second: whether to end, also where the engine never will answer again."""
        self._watchdog.tick(time.monotonic(), self._runner())
        return await super().on_tick(counter) or self._useless()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        notify("STOPPING=1")
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may take signals
            return

        # uvicorn raises the signal again when it is done, and the process would end as killed.
        def on_signal(number: int, _frame: object) -> None:
            if self.should_exit:  # asked twice: at once, whatever a native step or a client is at
                os._exit(128 + number)
            self.ended_by = number
            self.should_exit = True

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def announcement(service: Service, sockets: list[socket.socket]) -> str:
    """The line that says what is served where."""
    facts = service.engine.facts
    where = ", ".join(
        describe(sock) if sock.family == socket.AF_UNIX else f"http://{describe(sock)}" for sock in sockets
    )
    device = " ".join(str(facts[key]) for key in ("backend", "isa", "device") if facts.get(key))
    return f"halo {service.home.version} serves {service.model} on {where} ({device or 'cpu'})"
