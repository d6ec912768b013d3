"""Targets of what the server reads before any API does: a connection's bytes, ids, origins, addresses."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from engine.errors import HaloError
from engine.server.access import request_id
from engine.server.asgi import Receive, Scope, Send, send_json
from engine.server.browsers import is_own_name, parse_origin
from engine.server.connection import Connection
from engine.server.front import guarded
from engine.server.sockets import parse_listen
from tests.fuzz.target import Finding, Target


class _Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.closing = b"", False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.closing = True

    abort = close

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that reads the body and says how long it was."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await send_json(send, 200, size)


@cache
def _server() -> tuple[asyncio.AbstractEventLoop, Config]:
    app: Any = guarded(_echo, origins=("http://a",))
    config = Config(app, lifespan="off", log_config=None, interface="asgi3", log_level="critical")
    config.load()
    return asyncio.new_event_loop(), config


async def _feed(data: bytes, config: Config) -> bytes:
    failed: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: failed.append(str(context)))
    wire, state = _Wire(), ServerState()
    connection = Connection(config, state, {}, loop)
    connection.connection_made(wire)
    size = 1 + (data[0] if data else 0)
    for start in range(0, len(data), size * 16):
        connection.data_received(data[start : start + size * 16])
        await asyncio.sleep(0)
    connection.connection_lost(None)
    while state.tasks:
        await asyncio.sleep(0)
    if failed:
        raise Finding(f"the event loop was told: {failed[0][:200]}")
    return wire.written


def run_connection(data: bytes, _folder: Path) -> None:
    """Bytes from a client, in pieces of which the first byte tells the size; what is answered is HTTP."""
    loop, config = _server()
    written = loop.run_until_complete(_feed(data, config))
    if written and not written.startswith(b"HTTP/1.1 "):
        raise Finding(f"the answer is no HTTP: {written[:80]!r}")


def run_words(data: bytes, _folder: Path) -> None:
    """A header's or an option's text."""
    text = data.decode("latin-1")
    scope: Scope = {"headers": [(b"x-request-id", data)]}
    if not request_id(scope).isprintable():
        raise Finding("an id that is not printable")
    read = is_own_name(text)
    for parse in (parse_listen, parse_origin):
        try:
            read = bool(parse(text)) or read
        except HaloError as error:
            refusal = error
    if not read:
        raise refusal


def _requests() -> Iterator[bytes]:
    yield b" GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"[1:]
    yield b"POST /v1 HTTP/1.1\r\nHost: 127.0.0.1:8180\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n{}"
    yield (
        b"POST /a?b HTTP/1.1\r\nhost: [::1]\r\norigin: http://a\r\ntransfer-encoding: chunked\r\n\r\n"
        b"5;x=y\r\n12345\r\n0\r\na: b\r\n\r\nGET /%c3%a9 HTTP/1.0\r\nconnection: close\r\n\r\n"
    )
    yield (
        b"OPTIONS / HTTP/1.1\r\nhost: localhost\r\norigin: http://a\r\n"
        b"access-control-request-method: POST\r\naccess-control-request-headers: x\r\n"
        b"connection: upgrade\r\nupgrade: websocket\r\n\r\n" * 2
    )


TARGETS = (
    Target(
        "connection", run_connection, _requests,
        words=(b"content-length: ", b"transfer-encoding: chunked\r\n", b"\r\n\r\n", b"host: ", b"HTTP/1.1"),
    ),
    Target(
        "server_words", run_words,
        lambda: (b"http://localhost:3000", b"[::1]:8180", b"127.0.0.1:80", b"evil.example", b"req_1"),
        words=(b"://", b"localhost", b".", b"[", b"]:"),
    ),
)  # fmt: skip
