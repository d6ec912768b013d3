"""The little of ASGI that what stands before the application needs; imports nothing of a web framework.

The cold start's budget is why: the framework is imported while the first /health is answered already.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.server.errors import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


def header(scope: Scope, name: bytes) -> str | None:
    """The value of the first header `name` (lower case), as Latin-1 text; None where there is none."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value).decode("latin-1")
    return None


def state_of(scope: Scope) -> dict[str, Any]:
    """What travels with this request: request_id, client, jobs."""
    state: dict[str, Any] = scope.setdefault("state", {})
    return state


async def send_json(
    send: Send, status: int, value: object, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """A whole JSON response."""
    await send_bytes(
        send, status, json.dumps(value, ensure_ascii=False).encode(), b"application/json", headers
    )


async def send_bytes(
    send: Send, status: int, body: bytes, kind: bytes, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """A whole response."""
    sent: Headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": sent})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_error(scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
    """The error in the form of the API whose path `scope` has."""
    from engine.server.errors import error_response

    await error_response(error, scope)(scope, receive, send)


def adding_headers(send: Send, headers: Headers) -> Send:
    """`send`, with these headers added to the response."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *headers]}
        await send(message)

    return sending
