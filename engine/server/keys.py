"""API keys: the file of their hashes, a new one, and the check before every request."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine.errors import EXIT_COULD_NOT_RUN, HaloError
from engine.server.asgi import App, Receive, Scope, Send, header, send_error, state_of

if TYPE_CHECKING:
    from engine.server.errors import ApiError

OPEN_PATHS: Final = frozenset({"/health"})
KEY_BYTES: Final = 32
_SHOWN: Final = 8  # hexadecimal digits of a key's digest that stand for it in logs


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
                hint=f"make a new one with: halo serve --new-key {path}",
            )
        digests.append(bytes.fromhex(word))
    if not digests:
        raise HaloError(f"{path} holds no API key.", hint=f"add one with: halo serve --new-key {path}")
    return digests


def new_key(path: Path) -> str:
    """Make a key, add its hash to the file (mode 0600 if new), and return the key; it is kept nowhere."""
    key = "halo-" + secrets.token_urlsafe(KEY_BYTES)
    line = f"{hashlib.sha256(key.encode()).hexdigest()}\n".encode()
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "r+b") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 1))
            ended = stream.read(1) in (b"", b"\n")
            stream.write(line if ended else b"\n" + line)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise HaloError(
            f"The API key cannot be added to {path}: {error.strerror}.",
            hint=f"ls -ld {path.parent}",
            exit_code=EXIT_COULD_NOT_RUN,
        ) from error
    return key


def known_digest(key: str, digests: list[bytes]) -> bytes | None:
    """A presented key's digest if it is among `digests`, in a time that does not tell which or how nearly."""
    presented = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    known = False
    for digest in digests:
        known |= hmac.compare_digest(presented, digest)
    return presented if known else None


def key_is_known(key: str, digests: list[bytes]) -> bool:
    """Whether a presented key is among the digests."""
    return known_digest(key, digests) is not None


class RequireKey:
    """ASGI middleware: `Authorization: Bearer KEY` or `x-api-key: KEY` on every path but /health.

    From then on the request's client is `key:` and the first digits of the key's digest.
    """

    def __init__(self, app: App, digests: list[bytes]) -> None:
        self._app = app
        self._digests = digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        digest = self._digest(scope)
        if digest is not None:
            state_of(scope)["client"] = f"key:{digest.hex()[:_SHOWN]}"
        elif scope["path"] not in OPEN_PATHS:
            await send_error(scope, receive, send, _unknown_key())
            return
        await self._app(scope, receive, send)

    def _digest(self, scope: Scope) -> bytes | None:
        scheme, _, bearer = (header(scope, b"authorization") or "").partition(" ")
        presented = [bearer.strip()] if scheme.lower() == "bearer" else []
        presented += [key.strip()] if (key := header(scope, b"x-api-key")) else []
        found = [known_digest(key, self._digests) for key in presented]
        return next((digest for digest in found if digest is not None), None)


def _unknown_key() -> ApiError:
    from engine.server.errors import ApiError

    return ApiError(
        401,
        "This server needs an API key: send the header `Authorization: Bearer KEY` or `x-api-key: KEY`.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
