"""A small client of the server that runs: its health, and a greedy decode. It retries no decode."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import HaloError
from provision.desired import client_address


def request(
    listen: str, method: str, path: str, body: object = None, *, key: str = "", timeout: float = 60
) -> tuple[int, Any]:
    """One HTTP exchange with JSON bodies; raises OSError or HTTPException when nobody answers properly."""
    host, port = client_address(listen)
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    try:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        response = connection.getresponse()
        data = response.read()
        try:
            return response.status, json.loads(data)
        except ValueError:
            return response.status, data.decode(errors="replace")
    finally:
        connection.close()


def health(listen: str, timeout: float = 5) -> dict[str, Any] | None:
    """What /health says, or None when there is no halo server at the address."""
    try:
        status, answer = request(listen, "GET", "/health", timeout=timeout)
    except (OSError, http.client.HTTPException):
        return None
    return answer if status == 200 and isinstance(answer, dict) and "generation" in answer else None


def wait_for_generation(
    listen: str, name: str, tick: Callable[[], None], timeout: float = 180
) -> dict[str, Any]:
    """Wait until the server that answers is generation `name`, loaded; raises HaloError when it never is."""
    deadline = time.monotonic() + timeout
    answer: dict[str, Any] | None = None
    while time.monotonic() < deadline:
        answer = health(listen, timeout=min(30.0, max(1.0, deadline - time.monotonic())))
        if answer is not None and answer.get("generation") == name and not answer.get("loading"):
            return answer
        tick()
        time.sleep(0.1)
    said = f"it is generation {answer['generation']}" if answer else "nobody answers"
    raise HaloError(f"The server at {listen} is not generation {name}: {said}.", hint="halo doctor")


def decode(listen: str, golden: dict[str, Any], key_file: Path | None) -> tuple[list[int], str]:
    """Greedy token ids and text for the golden prompt, through the endpoint that users have."""
    key = key_file.read_text().strip() if key_file is not None else ""
    body = {
        "prompt": golden["prompt"],
        "max_tokens": len(golden["ids"]),
        "temperature": 0,
        "return_token_ids": True,
    }
    try:
        status, answer = request(listen, "POST", "/v1/completions", body, key=key, timeout=120)
    except (OSError, http.client.HTTPException) as error:
        raise HaloError(f"The server at {listen} broke off a decode: {error}.", hint="halo doctor") from error
    if status != 200 or not isinstance(answer, dict):
        raise HaloError(f"The server at {listen} refused a decode ({status}): {answer}.", hint="halo doctor")
    choice = answer["choices"][0]
    return [int(token) for token in choice.get("token_ids") or []], str(choice.get("text", ""))


def check_golden(ids: list[int], golden: dict[str, Any]) -> None:
    """Raise HaloError unless `ids` are the golden ids, or all of them but the model's end token."""
    expected = golden["ids"]
    if ids == expected or (len(ids) > 0 and ids == expected[:-1] and len(expected) > 1):
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b),
        min(len(ids), len(expected)),
    )
    got, wanted = ids[at : at + 1], expected[at : at + 1]
    raise HaloError(
        f"The decode is wrong: token {at} of the golden prompt is {got}, not {wanted}.",
        hint="this build of the engine is not right on this CPU; halo doctor",
    )
