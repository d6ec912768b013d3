"""One HTTP connection: uvicorn's h11 protocol with limits on what a bad or slow client can hold; no endpoint.

What uvicorn leaves open is closed here: a connection that sends nothing, or a request that trickles in, ends
after REQUEST_SECONDS; a reader that takes nothing for STALL_SECONDS is cut off, with at most uvicorn's 64 KiB
held for it, which ends its generation; connections beyond MAX_CONNECTIONS are turned away with 503.
"""

from __future__ import annotations

import asyncio
import json
import resource
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

REQUEST_SECONDS: Final = 60.0
STALL_SECONDS: Final = 60.0
KEEP_ALIVE_SECONDS: Final = 75
LINGER_SECONDS: Final = 2.0  # for the rest of a body that nobody wants, so that the refusal is read
MAX_CONNECTIONS: Final = 2048
HEADER_BYTES: Final = 32 * 1024  # of one request's line and headers
_SPARE_DESCRIPTORS: Final = 64
_HEAD: Final = (
    b"HTTP/1.1 %d %s\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
)


def connection_limit() -> int:
    """MAX_CONNECTIONS, or what the limit on descriptors leaves."""
    try:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    except (OSError, ValueError):  # a sandbox may forbid to ask; the unit sets the limit high enough
        return MAX_CONNECTIONS
    if soft == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(8, min(MAX_CONNECTIONS, soft - _SPARE_DESCRIPTORS))


class Connection(H11Protocol):
    """See above. Timers are of the event loop; each ends with the connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  (as uvicorn calls it)
        super().__init__(*args, **kwargs)
        self._receiving: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > connection_limit():
            self._refuse(503, "Too many connections; try again shortly.", b"retry-after: 2\r\n")
            return
        self._receiving = self.loop.call_later(REQUEST_SECONDS, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._receiving, self._stalled):
            if timer is not None:
                timer.cancel()
        self._receiving = self._stalled = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)
            self._watch_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_after(STALL_SECONDS)  # what is still to be sent may find no reader
            return
        if self.conn.their_state is h11.SEND_BODY:
            self._abort_after(LINGER_SECONDS)
        self._watch_request()  # a next one may have begun already

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_after(LINGER_SECONDS)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_after(STALL_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None and not self.transport.is_closing():
            self._stalled.cancel()
            self._stalled = None

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what is no HTTP, in the API's form."""
        self._refuse(400, msg)

    def _watch_request(self) -> None:
        """A timer runs as long as a request has begun and is not whole."""
        state = self.conn.their_state
        begun = state is h11.SEND_BODY or (state is h11.IDLE and bool(self.conn.trailing_data[0]))
        if begun and self._receiving is None:
            self._receiving = self.loop.call_later(REQUEST_SECONDS, self._too_slow)
        elif not begun and self._receiving is not None:
            self._receiving.cancel()
            self._receiving = None

    def _too_slow(self) -> None:
        self._receiving = None
        if not self.transport.is_closing():
            self._refuse(408, "The request did not arrive in time.")

    def _refuse(self, status: int, message: str, headers: bytes = b"") -> None:
        """Answer if nothing was, and close."""
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = json.dumps(
                {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
            ).encode()
            self.transport.write(
                _HEAD % (status, STATUS_PHRASES[status], len(body)) + headers + b"\r\n" + body
            )
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # whatever the application still says goes nowhere
            self.cycle.message_event.set()
        self.transport.close()
        self._abort_after(LINGER_SECONDS)

    def _abort_after(self, seconds: float) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        self._stalled = self.loop.call_later(seconds, self.transport.abort)
