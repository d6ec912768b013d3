"""What a web page may do here: CORS, by exact origins, and no more; the keyless server's guard against pages.

A page of the internet can make a browser send requests to 127.0.0.1, and by a name of its own that it points
there (DNS rebinding) even read the answers. A server that asks for no key therefore answers only to its own
names, and to no page but its own and those of the origins that were allowed. Where keys are asked for, the
page would need one.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from engine.errors import EXIT_COULD_NOT_RUN, HaloError
from engine.server.asgi import (
    App,
    Headers,
    Receive,
    Scope,
    Send,
    adding_headers,
    header,
    send_bytes,
    send_error,
)

if TYPE_CHECKING:
    from engine.server.errors import ApiError

METHODS: Final = b"GET, POST, OPTIONS"
EXPOSED: Final = b"x-request-id, request-id, retry-after"
MAX_AGE: Final = b"600"
_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


def parse_origin(text: str) -> str:
    """An origin as browsers send it, scheme://host[:port]; raises HaloError for anything else, `*` too."""
    origin = text.strip().lower().removesuffix("/")
    if not _ORIGIN.fullmatch(origin):
        raise HaloError(
            f"{text!r} is no origin of web pages.",
            hint="write SCHEME://HOST[:PORT], as http://localhost:3000; give --cors-origin again for each.",
            exit_code=EXIT_COULD_NOT_RUN,
        )
    for scheme, port in (("http", ":80"), ("https", ":443")):
        if origin.startswith(f"{scheme}://"):
            origin = origin.removesuffix(port)  # browsers leave these out
    return origin


class Cors:
    """ASGI middleware: answers preflights of allowed origins, and lets their pages read the answers."""

    def __init__(self, app: App, origins: Sequence[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = header(scope, b"origin")
        if origin is None or origin.lower() not in self._origins:
            await self._app(scope, receive, adding_headers(send, [(b"vary", b"origin")]))
            return
        allowed: Headers = [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-expose-headers", EXPOSED),
            (b"vary", b"origin"),
        ]
        if scope["method"] == "OPTIONS" and header(scope, b"access-control-request-method"):
            await send_bytes(send, 204, b"", b"text/plain", [*allowed, *_preflight(scope)])
            return
        await self._app(scope, receive, adding_headers(send, allowed))


def _preflight(scope: Scope) -> Headers:
    answers: Headers = [(b"access-control-allow-methods", METHODS), (b"access-control-max-age", MAX_AGE)]
    if wanted := header(scope, b"access-control-request-headers"):
        answers.append((b"access-control-allow-headers", wanted.encode("latin-1")))
    if header(scope, b"access-control-request-private-network"):
        answers.append((b"access-control-allow-private-network", b"true"))
    return answers


class OwnNames:
    """ASGI middleware of a keyless server: refuses names but loopback's, and pages of other origins."""

    def __init__(self, app: App, origins: Sequence[str] = ()) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host, origin = header(scope, b"host"), header(scope, b"origin")
        problem = ""
        if host is not None and not is_own_name(host):
            problem = f"This server does not answer to the name {host[:100]!r} without API keys"
        elif origin is not None and not self._may(origin.lower(), host, scope["scheme"]):
            problem = f"Pages of the origin {origin[:100]!r} may not use this server"
        if problem:
            await send_error(scope, receive, send, _forbidden(problem))
            return
        await self._app(scope, receive, send)

    def _may(self, origin: str, host: str | None, scheme: str) -> bool:
        return origin in self._origins or (host is not None and origin == f"{scheme}://{host.lower()}")


def is_own_name(host: str) -> bool:
    """Whether a Host header names this machine's loopback: an address of it, or localhost."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _forbidden(problem: str) -> ApiError:
    from engine.server.errors import ApiError

    hint = (
        "Use 127.0.0.1 or localhost, allow the page's origin with --cors-origin, or give the server API keys."
    )
    return ApiError(403, f"{problem}. {hint}", code="forbidden")
