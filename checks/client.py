"""Ask the running server for its health and for the golden tokens, by HTTP. Judges nothing."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from checks.case import Decoded

MAX_ANSWER_BYTES: Final = 4 << 20
TIMEOUT_SECONDS: Final = 60.0


class AskFailed(Exception):
    """A call that gave no usable answer: `code` is the HTTP status, 0 when there was none."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other: following it would carry the key to another host."""

    def redirect_request(self, *_: object) -> None:
        return None


def base_url(listen: str) -> str:
    """The URL by which a client on this machine reaches `listen`: a wildcard is asked on loopback."""
    address, _, port = listen.rpartition(":")
    loopback = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "[::]": "[::1]", "::": "[::1]"}  # noqa: S104
    address = loopback.get(address, address)
    return f"http://{f'[{address}]' if ':' in address and not address.startswith('[') else address}:{port}"


def read_key(prefix: str) -> str:
    """The owner's API key, or "" when there is none or it may not be read."""
    try:
        return (Path(prefix) / "api-key").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def ask(
    url: str, *, key: str = "", body: Mapping[str, Any] | None = None, timeout: float
) -> Mapping[str, Any]:
    """GET, or POST of `body`, and the JSON object that came back; AskFailed for anything else.

    Neither proxies of the environment nor redirects are used: the key goes to this one server alone.
    """
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = json.dumps(body).encode() if body is not None else None
    if not url.startswith(("http://", "https://")):
        raise AskFailed(f"{url!r} is no http URL")
    try:
        request = urllib.request.Request(url, data=data, headers=headers)  # noqa: S310 - checked above
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
        with opener.open(request, timeout=timeout) as answer:
            value = json.loads(answer.read(MAX_ANSWER_BYTES))
    except urllib.error.HTTPError as error:
        detail = error.read(300).decode("utf-8", "replace").strip()
        raise AskFailed(f"HTTP {error.code} {detail}".strip(), error.code) from error
    except urllib.error.URLError as error:
        raise AskFailed(str(error.reason)) from error
    except TimeoutError as error:
        raise AskFailed(f"no answer in {timeout:.0f} s") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AskFailed(f"the answer could not be read: {error}") from error
    if not isinstance(value, dict):
        raise AskFailed("the answer is not a JSON object")
    return value


def decode_golden(
    url: str, golden: Sequence[Mapping[str, Any]], *, key: str = "", timeout: float = TIMEOUT_SECONDS
) -> Decoded:
    """Health, then the first golden prompt at temperature 0. Never raises: what failed is in the result."""
    start = time.monotonic()
    url = url.rstrip("/")
    prompt, wanted = golden_of(golden)
    try:
        health = ask(f"{url}/health", timeout=timeout)
    except AskFailed as failed:
        return Decoded(url, prompt=prompt, wanted=wanted, error=str(failed), code=failed.code)
    if not wanted:
        return Decoded(url, health, seconds=time.monotonic() - start)
    body = {"prompt": prompt, "max_tokens": len(wanted), "temperature": 0, "return_token_ids": True}
    try:
        model = health.get("model")
        named = {"model": model} if isinstance(model, str) else {}
        answer = ask(f"{url}/v1/completions", key=key, body={**named, **body}, timeout=timeout)
        ids = _token_ids(answer)
    except AskFailed as failed:
        return Decoded(url, health, prompt, wanted, error=str(failed), code=failed.code)
    return Decoded(url, health, prompt, wanted, ids, time.monotonic() - start)


def golden_of(golden: Sequence[Mapping[str, Any]]) -> tuple[str, tuple[int, ...]]:
    """The first sound golden entry as (prompt, ids); ("", ()) when there is none."""
    for each in golden:
        prompt, ids = each.get("prompt"), each.get("ids")
        if isinstance(prompt, str) and isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids):
            return prompt, tuple(ids)
    return "", ()


def _token_ids(answer: Mapping[str, Any]) -> tuple[int, ...]:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    ids = first.get("token_ids") if isinstance(first, dict) else None
    if not isinstance(ids, list) or not all(isinstance(each, int) for each in ids):
        raise AskFailed("the answer has no choices[0].token_ids")
    return tuple(ids)
