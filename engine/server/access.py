"""A request's id and its line in the log, one JSON object; never a text of a prompt or an answer, or a key.

The lines go to stderr, where systemd's journal takes them: `journalctl -u halo-server -o cat | jq`.
"""

from __future__ import annotations

import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from engine.server.asgi import App, Headers, Message, Receive, Scope, Send, adding_headers, header, state_of

if TYPE_CHECKING:
    from engine.request import Request

_WELL_FORMED: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}")
_ANTHROPIC: Final = "/v1/messages"
_LONGEST: Final = 256  # characters of a path in the log
LINES_HELD: Final = 4096  # where nobody takes them; what is beyond is counted and dropped


def request_id(scope: Scope) -> str:
    """The client's x-request-id where it is well-formed, else a new one."""
    given = header(scope, b"x-request-id")
    return given if given is not None and _WELL_FORMED.fullmatch(given) else f"req_{os.urandom(12).hex()}"


class LineWriter:
    """Lines to a descriptor from a thread of its own: a reader that stalls must not hold the server up."""

    def __init__(self, fd: int = 2) -> None:
        self._fd = fd
        self._lines: queue.Queue[bytes | None] = queue.Queue(LINES_HELD)
        self._dropped = 0
        self._thread: threading.Thread | None = None

    def write(self, record: dict[str, Any]) -> None:
        """Queue a record; called on the event loop's thread alone."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="halo-access-log", daemon=True)
            self._thread.start()
        if self._dropped:
            record = {**record, "lines_dropped_before": self._dropped}
        try:
            self._lines.put_nowait(json.dumps(record, separators=(",", ":")).encode() + b"\n")
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def close(self, seconds: float = 2.0) -> None:
        """Write what is queued, as far as somebody takes it in time."""
        if self._thread is not None:
            try:
                self._lines.put(None, timeout=seconds)
            except queue.Full:
                return
            self._thread.join(seconds)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                os.write(self._fd, line)
            except OSError:
                continue  # nobody reads the log: no reason to stop serving


class AccessLog:
    """ASGI middleware, the outermost: gives each request its id, counts it and logs its line when it ends.

    `count` gets (method, status; 0 where there was none). Without a writer nothing is logged.
    """

    def __init__(
        self,
        app: App,
        writer: LineWriter | None = None,
        count: Callable[[str, int], None] | None = None,
    ) -> None:
        self._app, self._writer, self._count = app, writer, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        state = state_of(scope)
        state["request_id"] = name = request_id(scope)
        peer = scope.get("client")
        state["client"] = str(peer[0]) if peer else "unix"
        headers: Headers = [(b"x-request-id", name.encode())]
        if scope["path"].startswith(_ANTHROPIC):
            headers.append((b"request-id", name.encode()))
        started, status, complete = time.monotonic(), 0, False
        sending = adding_headers(send, headers)

        async def watch(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not message.get("more_body"):
                complete = True
            await sending(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            if not complete:
                raise  # else the client has its answer, and the log the reason, already
        finally:
            if self._count is not None:
                self._count(scope["method"], status)
            if self._writer is not None:
                self._writer.write(record(scope, status, complete, started))


def record(scope: Scope, status: int, complete: bool, started: float) -> dict[str, Any]:
    """The line of a request that ended now; seconds are rounded to the microsecond."""
    state = state_of(scope)
    line: dict[str, Any] = {
        "time": round(time.time(), 3),
        "id": state["request_id"],
        "client": state["client"],
        "method": scope["method"][:16],
        "path": scope["path"][:_LONGEST],
        "status": status,
        "seconds": round(time.monotonic() - started, 6),
    }
    if not complete:
        line["cut"] = True  # the client went away, or the server ended
    for job in state.get("jobs", ()):
        line |= job_facts(job)
    return line


def job_facts(job: Request) -> dict[str, Any]:
    """What a request's work took: tokens, first token, how it ended."""
    timing = job.timing
    facts: dict[str, Any] = {
        "tokens_in": job.prompt_tokens,
        "tokens_cached": job.cached_tokens,
        "tokens_out": job.completion_tokens,
        "finish": _finish(job),
    }
    if timing.admitted is not None:
        facts["queue_seconds"] = round(timing.admitted - timing.submitted, 6)
    if timing.first_token is not None:
        facts["first_token_seconds"] = round(timing.first_token - timing.submitted, 6)
    return facts


def _finish(job: Request) -> str:
    if job.left or not job.ended:
        return "cancelled" if job.cancelled() else "error"
    return "length" if job.cut else "stop"
