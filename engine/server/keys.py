"""API keys: the file of their hashes, and the check before every request; it makes no keys."""

from __future__ import annotations

import hashlib
import hmac
import re
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import HaloError
from engine.server.errors import ApiError, error_response

OPEN_PATHS = frozenset({"/health"})


def read_keys(path: Path) -> list[bytes]:
    """The sha256 digests in a file: one of 64 hex digits a line; blank lines and # comments are skipped."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HaloError(f"Cannot read the API keys in {path}: {error}.", hint=f"ls -l {path}") from error
    digests = []
    for number, line in enumerate(lines, 1):
        word = line.split("#", 1)[0].strip()
        if not word:
            continue
        if not re.fullmatch(r"[0-9a-fA-F]{64}", word):
            raise HaloError(
                f"Line {number} of {path} is not the sha256 of a key (64 hexadecimal digits).",
                hint="make one with: printf %s \"$KEY\" | sha256sum | cut -d' ' -f1",
            )
        digests.append(bytes.fromhex(word))
    if not digests:
        raise HaloError(
            f"{path} holds no API key.",
            hint=f"add one with: printf %s \"$KEY\" | sha256sum | cut -d' ' -f1 >> {path}",
        )
    return digests


def key_is_known(key: str, digests: list[bytes]) -> bool:
    """Whether a presented key is among the digests, in a time that does not tell which or how nearly."""
    presented = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    known = False
    for digest in digests:
        known |= hmac.compare_digest(presented, digest)
    return known


class RequireKey:
    """ASGI middleware: `Authorization: Bearer KEY` on every path but /health."""

    def __init__(self, app: ASGIApp, digests: list[bytes]) -> None:
        self._app = app
        self._digests = digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._admits(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "This server needs an API key: send the header `Authorization: Bearer KEY`.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(error, scope)(scope, receive, send)

    def _admits(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and key_is_known(key.strip(), self._digests)
