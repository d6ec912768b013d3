"""What the tests of OpenAI's API run against: scripted answers, and the bundled demo model, served."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai

from engine.formats.h1b import read_h1b
from engine.formats.prepared import prepare
from engine.formats.store import seal, unpack
from engine.generate import Engine
from tests.engine.server_fixtures import EOT, Running, ScriptedSession, byte_tokens, make_engine, running

DEMO = Path(__file__).parents[2] / "engine" / "models" / "demo"
MODEL = "halo-test"
USER = [{"role": "user", "content": "Hello"}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def function(
    name: str = "get_weather", parameters: dict[str, Any] | None = CITY, **more: Any
) -> dict[str, Any]:
    """A tool in chat's form."""
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


class CertainSession(ScriptedSession):
    """One whose script comes at any temperature."""

    def run(self, *entries: Sequence[int]) -> np.ndarray:
        return super().run(*entries) * np.float32(10)


def client_of(url: str) -> openai.OpenAI:
    """OpenAI's own client."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


@contextlib.contextmanager
def says(text: str | bytes | Sequence[int], *, context: int = 4096) -> Iterator[Running]:
    """A server whose model answers so, whatever it is asked, one token a byte."""
    data = text.encode() if isinstance(text, str) else text
    script = [*byte_tokens(data), EOT] if isinstance(data, bytes) else list(data)
    session = CertainSession(script)
    with running(make_engine(session, context)) as server:
        server.session = session
        yield server


def demo_directory(folder: Path) -> Path:
    """The bundled model, unpacked and prepared."""
    directory = unpack(DEMO, folder)
    prepare(read_h1b(directory / "model.h1b"), directory / "model.halo")
    seal(directory)
    return directory


@contextlib.contextmanager
def demo_server(directory: Path, library: Path, slots: int = 4) -> Iterator[Running]:
    """The demo model behind a live server."""
    with Engine.open(directory, library, slots=slots) as engine, running(engine) as server:
        yield server


def post(url: str, path: str, body: object) -> httpx.Response:
    """A raw request."""
    return httpx.post(f"{url}{path}", json=body, timeout=120)
