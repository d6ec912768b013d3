"""What the tests of OpenAI's API run against: scripted answers, and the bundled demo model, served."""

from __future__ import annotations

import contextlib
import time
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
from tests.engine.server_fixtures import (
    EOT,
    TOKENIZER,
    FullLogits,
    Running,
    byte_tokens,
    make_engine,
    running,
)

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


class SayingSession(FullLogits):
    """Says its script after every prompt, at any temperature, in any batch.

    What comes next is told by the tokens alone: where their end is the beginning of the script, its next
    token, so wrong drafts, reused prefixes and pieces of prompts of any size change nothing.
    """

    def __init__(self, script: Sequence[int], vocab: int = TOKENIZER.size) -> None:
        self.script, self.vocab = list(script), vocab
        self.runs, self.delay, self.fail = 0, 0.0, False
        self._known: dict[int, list[int]] = {}  # by slot: after each token, how much of the script it ends
        self._back = [0] * (len(self.script) + 1)  # Knuth, Morris and Pratt's
        for at in range(1, len(self.script)):
            self._back[at + 1] = self._next(self._back[at], self.script[at])

    def _next(self, said: int, token: int) -> int:
        while said == len(self.script) or (said and self.script[said] != token):
            said = self._back[said]
        return said + (self.script[said] == token)

    def run(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[bool]
    ) -> np.ndarray:
        self.runs += 1
        time.sleep(self.delay)
        if self.fail:
            self.fail = False
            raise RuntimeError("the backend broke")
        logits = np.full((sum(want), self.vocab), -50.0, np.float32)
        row = 0
        for token, slot, position, wanted in zip(tokens, slots, positions, want, strict=True):
            known = self._known.setdefault(int(slot), [])
            assert position <= len(known), "a position was left out"
            del known[position:]
            known.append(self._next(known[-1] if known else 0, int(token)))
            if wanted:
                said = known[-1] if known[-1] < len(self.script) else 0
                logits[row, self.script[said]] = 90.0
                row += 1
        return logits

    def copy(self, source: int, target: int, length: int) -> None:
        self._known[target] = self._known[source][:length]

    def close(self) -> None:
        pass


def client_of(url: str) -> openai.OpenAI:
    """OpenAI's own client."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


@contextlib.contextmanager
def says(text: str | bytes | Sequence[int], *, context: int = 4096) -> Iterator[Running]:
    """A server whose model answers so, whatever it is asked, one token a byte."""
    data = text.encode() if isinstance(text, str) else text
    script = [*byte_tokens(data), EOT] if isinstance(data, bytes) else list(data)
    session = SayingSession(script)
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
