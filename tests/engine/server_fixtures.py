"""What the server's tests run against: real tokenizer, engine and HTTP server over a scripted session.

The scripted sessions stand in for the native backend alone, where a test must force a token or a delay; the
tests of the native engine use the real one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.backend import Drawn
from engine.generate import Engine
from engine.locate import Home, ModelCard
from engine.server.app import build_app
from engine.server.runner import Runner
from engine.server.serve import HaloServer, announcement, listening_sockets, serve_service
from engine.server.service import Service
from engine.server.sockets import bind
from engine.tokenizer import Tokenizer

TEXT = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text("utf-8")
EOS, EOT, FIRST_BYTE = 0, 1, 2


@dataclass(frozen=True)
class DemoVocabulary:
    """The shape of the demo model's vocabulary: two specials, 256 bytes, then merges in rank order."""

    tokens: list[bytes]
    merges: list[tuple[int, int, int]]
    bos: int = EOS
    eos: int = EOS
    special: list[int] = field(default_factory=lambda: [EOS, EOT])
    version: int = 2


def train_vocabulary(merges: int = 200, text: str = TEXT) -> DemoVocabulary:
    """A small byte-pair encoding trained on the project's own prose."""
    tokens = [b"<|endoftext|>", b"<|eot_id|>", *(bytes([b]) for b in range(256))]
    words = Counter(" " + word for word in text.split())
    pieces = {word: [FIRST_BYTE + b for b in word.encode()] for word in words}
    made: list[tuple[int, int, int]] = []
    for _ in range(merges):
        pairs: Counter[tuple[int, int]] = Counter()
        for word, count in words.items():
            for pair in zip(pieces[word], pieces[word][1:], strict=False):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if tokens[best[0]] + tokens[best[1]] in tokens:
            break
        made.append((*best, len(tokens)))
        tokens.append(tokens[best[0]] + tokens[best[1]])
        pieces = {word: _merge(ids, made[-1]) for word, ids in pieces.items()}
    return DemoVocabulary(tokens, made)


def _merge(ids: list[int], merge: tuple[int, int, int]) -> list[int]:
    out: list[int] = []
    for token in ids:
        if out and (out[-1], token) == merge[:2]:
            out[-1] = merge[2]
        else:
            out.append(token)
    return out


VOCABULARY = train_vocabulary()
TOKENIZER = Tokenizer(VOCABULARY)


def byte_tokens(data: bytes) -> list[int]:
    """One token a byte: the finest cut there is."""
    return [FIRST_BYTE + b for b in data]


class FullLogits:
    """The other calls of a session, from its `run`."""

    rows: np.ndarray
    run: Callable[..., np.ndarray]

    def run_argmax(self, *entries: Sequence[int]) -> list[int]:
        return [int(token) for token in self.run(*entries).argmax(axis=1)]

    def run_draw(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        want: Sequence[bool],
        noise: np.ndarray,
        depth: float = 0.0,
        room: int = 0,
    ) -> list[Drawn]:
        self.rows = self.run(tokens, slots, positions, want)
        drawn = []
        for row, winner in zip(self.rows, (self.rows + noise).argmax(axis=1), strict=True):
            near = np.flatnonzero(row >= min(row[winner], row.max() - depth)).astype(np.int32)
            drawn.append(Drawn(int(winner), near, row[near]) if len(near) <= room else Drawn(int(winner)))
        return drawn

    def logits_again(self, index: int) -> np.ndarray:
        return self.rows[index]


class ScriptedSession(FullLogits):
    """Emits `script` after every prompt, over and over; checks that positions never leave a hole.

    What comes depends on the position alone, so wrong drafts may be verified and written over.
    """

    def __init__(self, script: Sequence[int], delay: float = 0.0, vocab: int = TOKENIZER.size) -> None:
        self.script = list(script)
        self.delay = delay
        self.vocab = vocab
        self.runs = 0
        self.prefills: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fail = False
        self.closed = False
        self._prompt_end = 0
        self._filled = 0

    def run(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[bool]
    ) -> np.ndarray:
        assert len(tokens) == len(slots) == len(positions) == len(want)
        assert list(positions) == list(range(positions[0], positions[0] + len(tokens)))
        assert positions[0] <= self._filled, "a position was left out"
        if not all(want) or not self._prompt_end < positions[0] <= self._filled:
            self.prefills.append(list(tokens))
            self._prompt_end = positions[-1]
        self._filled = positions[-1] + 1
        self.runs += 1
        if self.delay:
            time.sleep(self.delay)
        self.gate.wait(30)
        if self.fail:
            self.fail = False
            raise RuntimeError("the backend broke")
        logits = np.full((sum(want), self.vocab), -5.0, np.float32)
        wanted = [position for position, asked in zip(positions, want, strict=True) if asked]
        for row, position in zip(logits, wanted, strict=True):
            row[self.script[(position - self._prompt_end) % len(self.script)]] = 9.0
        return logits

    def close(self) -> None:
        self.closed = True


class HashSession(FullLogits):
    """Logits that depend on every token before: a wrong or stale KV entry changes the answer."""

    def __init__(self, vocab: int = TOKENIZER.size) -> None:
        self.vocab = vocab
        self.kv: list[int] = []
        self.prefilled = 0

    def run(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[bool]
    ) -> np.ndarray:
        rows = []
        self.prefilled += len(tokens)
        for token, position, wanted in zip(tokens, positions, want, strict=True):
            assert position <= len(self.kv), "a position was left out"
            del self.kv[position:]
            self.kv.append(token)
            if wanted:
                digest = hashlib.sha256(np.array(self.kv, np.int64).tobytes()).digest()
                rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
                rows.append(rng.standard_normal(self.vocab).astype(np.float32) * 3)
        return np.array(rows, np.float32).reshape(-1, self.vocab)

    def close(self) -> None:
        pass


def make_engine(
    session: ScriptedSession | HashSession, context: int = 512, template: str = "bitnet"
) -> Engine:
    """An engine over a stand-in session."""
    facts = {"backend": "cpu", "isa": "scripted", "threads": 1}
    return Engine(session, TOKENIZER, ModelCard("halo-test", template, context), facts)


def make_service(engine: Engine, queue_limit: int = 32, deadline: float | None = None) -> Service:
    """A service in no generation."""
    home = Home(generation_dir=None, model_dir=Path(), generation="test-generation", version="9.9")
    return Service(engine, Runner(engine, queue_limit), home, created=1, deadline=deadline)


@dataclass
class Running:
    """A server that answers on loopback."""

    url: str
    service: Service
    server: HaloServer


@contextlib.contextmanager
def running(
    engine: Engine,
    queue_limit: int = 32,
    key_digests: list[bytes] | None = None,
    deadline: float | None = None,
) -> Iterator[Running]:
    """Serve `engine` on a free loopback port from another thread of this process."""
    service = make_service(engine, queue_limit, deadline)
    sockets = bind("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    server = HaloServer(build_app(service, key_digests), announcement(service, sockets))
    service.runner.start()
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Running(f"http://127.0.0.1:{port}", service, server)
    finally:
        server.should_exit = True
        service.runner.stop()
        thread.join(20)


def wait_until(condition, seconds: float = 20.0) -> None:
    """Wait for a condition; the limit is there to end a broken test, not to judge speed."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def main() -> int:
    """A scripted server as a process of its own, through the real socket, signal and notify code."""
    from engine.errors import HaloError

    script = byte_tokens(b"tick ") * 20
    engine = make_engine(ScriptedSession(script, delay=float(os.environ.get("STEP_SECONDS", "0"))))
    try:
        sockets = listening_sockets(sys.argv[1], int(sys.argv[2]), has_keys=False)
        return serve_service(make_service(engine), sockets, None)
    except HaloError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
