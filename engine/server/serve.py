"""Run the server: address policy, model, uvicorn, systemd notification, draining; no endpoint is here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from engine.errors import EXIT_ERROR
from engine.generate import Engine
from engine.locate import locate
from engine.router import NpuProbe
from engine.server.app import build_app
from engine.server.keys import read_keys
from engine.server.runner import DEFAULT_QUEUE_LIMIT, Runner
from engine.server.service import Service
from engine.server.sockets import activated_sockets, bind, describe, notify, refuse_open_address
from engine.speculate import Speculation

DRAIN_SECONDS: Final = 15  # the unit has TimeoutStopSec=20, after which systemd kills


@dataclass(frozen=True)
class ServeOptions:
    """What `halo serve` was told."""

    host: str
    port: int
    model: Path | None = None
    api_keys: Path | None = None
    threads: int | None = None
    speculation: Speculation | None = None
    queue_limit: int = DEFAULT_QUEUE_LIMIT
    npu: NpuProbe | None = None


def serve(options: ServeOptions) -> int:
    """Serve until SIGTERM (0), SIGINT (130) or the GPU is lost (1); HaloError where it refuses to start."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(levelname)s: %(message)s")
    home = locate(options.model)
    digests = read_keys(options.api_keys) if options.api_keys else None
    sockets = listening_sockets(options.host, options.port, has_keys=digests is not None)
    try:
        with Engine.open(home.model_dir, threads=options.threads, speculation=options.speculation) as engine:
            runner = Runner(engine, options.queue_limit)
            service = Service(engine, runner, home, created=int(time.time()), npu=options.npu)
            return serve_service(service, sockets, digests)
    finally:
        for sock in sockets:
            sock.close()


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
    runner = service.runner
    server = HaloServer(
        build_app(service, digests), announcement(service, sockets), lambda: runner.lost is not None
    )
    runner.start()
    try:
        asyncio.run(server.serve(sockets))
    finally:
        runner.stop()
    if runner.lost is not None:  # a new process may find the device again, or takes the CPU
        print(f"error: {runner.lost}", file=sys.stderr, flush=True)
        return EXIT_ERROR
    return 130 if server.ended_by == signal.SIGINT else 0


class HaloServer(uvicorn.Server):
    """uvicorn's server that tells systemd what it does, and ends on SIGTERM as a service should: with 0."""

    def __init__(self, app: ASGIApp, announcement: str, useless: Callable[[], bool] = lambda: False) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=DRAIN_SECONDS,
            )
        )
        self._announcement = announcement
        self._useless = useless
        self.ended_by: int | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._announcement, file=sys.stderr, flush=True)
            notify("READY=1")

    async def on_tick(self, counter: int) -> bool:
        """Asked ten times a second: whether to end, also where the engine never will answer again."""
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
            if self.should_exit:
                self.force_exit = True
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
