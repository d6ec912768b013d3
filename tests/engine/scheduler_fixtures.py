"""A session of many slots whose logits tell what each slot holds, and what drives a scheduler over it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine.chat import stop_ids
from engine.errors import HaloError
from engine.request import Event, Request, Work
from engine.sampling import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Prompt, Step
from engine.speculate import OFF, Speculation
from tests.engine.server_fixtures import TOKENIZER, FullLogits

CONTEXT = 160


class SlotSession(FullLogits):
    """Logits that depend on every token of the slot: a wrong key, copy or position changes the answer.

    As the native session, it refuses gaps, rewinds on failure, and lets logits be asked for again only after
    a run of at most 96 entries. `poison`: a run with this token in it fails. `lost`: every run does.
    """

    def __init__(self, slots: int, vocab: int = TOKENIZER.size, context: int = CONTEXT) -> None:
        self.vocab, self.context = vocab, context
        self.kv: list[list[int]] = [[] for _ in range(slots)]
        self.poison: int | None = None
        self.lost: Exception | None = None
        self.runs: list[int] = []  # entries of each
        self.copied = 0
        self.on_run: Callable[[], None] = lambda: None
        self._again = False

    def run(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[bool]
    ) -> np.ndarray:
        assert len(tokens) == len(slots) == len(positions) == len(want)
        self.on_run()
        self._again = False
        if self.lost is not None:
            raise self.lost
        rows = []
        self.runs.append(len(tokens))
        lowest: dict[int, int] = {}
        for token, slot, position, wanted in zip(tokens, slots, positions, want, strict=True):
            kv = self.kv[slot]
            assert 0 <= position < self.context and 0 <= token < self.vocab
            assert position <= len(kv), "a position was left out"
            assert lowest.setdefault(slot, position) <= position
            del kv[position:]
            kv.append(int(token))
            if wanted:
                rows.append(logits_after(kv, self.vocab))
        if self.poison is not None and self.poison in tokens:
            for slot, position in lowest.items():
                del self.kv[slot][position:]
            raise HaloError("The native engine refused: an activation is not finite.")
        self._again = len(tokens) <= 96
        self.rows = np.array(rows, np.float32).reshape(-1, self.vocab)
        return self.rows

    def logits_again(self, index: int) -> np.ndarray:
        assert self._again, "the run was too long, or failed"
        return self.rows[index]

    def copy(self, source: int, target: int, length: int) -> None:
        assert source != target and 0 <= length <= len(self.kv[source])
        self.kv[target] = self.kv[source][:length]
        self.copied += length

    def close(self) -> None:
        pass


def logits_after(tokens: Sequence[int], vocab: int) -> np.ndarray:
    """What a SlotSession says after these tokens; a short cycle now and then, so that drafts are right."""
    seed = zlib.crc32(np.array(tokens, np.int64).tobytes())
    if len(tokens) > 4 and len(tokens) % 3:
        seed = zlib.crc32(np.array([*tokens[-2:], len(tokens) % 3], np.int64).tobytes())
    row = np.random.Generator(np.random.SFC64(seed)).standard_normal(vocab).astype(np.float32) * 3
    row[:2] -= 6.0  # the end tokens are rare
    return row


def make_scheduler(
    session: SlotSession, slots: int | None = None, speculation: Speculation = OFF, queue_limit: int = 1000
) -> Scheduler:
    """A scheduler over all slots of the session."""
    count = len(session.kv) if slots is None else slots
    scheduler = Scheduler(session, TOKENIZER, stop_ids(TOKENIZER), session.context, count, speculation)
    scheduler.queue_limit = queue_limit
    return scheduler


def request(prompt: Sequence[int], client: str = "", n: int = 1, **params: Any) -> Request:
    """A request of n choices."""
    works = [Work(prompt, SamplingParams(**params), index=i, seed_index=i) for i in range(n)]
    return Request(works, client=client)


def run_all(scheduler: Scheduler) -> int:
    """Step until nothing is left; how many steps."""
    count = 0
    while scheduler.has_work():
        scheduler.step()
        count += 1
        assert count < 100_000
    return count


def said(events: Sequence[Event], index: int = 0) -> list[Step | Prompt]:
    """What came of one choice; raises what it ended with."""
    for event in events:
        if isinstance(event, Exception):
            raise event
    return [event[1] for event in events if isinstance(event, tuple) and event[0] == index]


def tokens_of(done: Request, index: int = 0) -> list[int]:
    """The token ids of one choice."""
    return [step.token_id for step in said(list(done.events), index) if isinstance(step, Step)]


def alone(prompt: Sequence[int], **params: Any) -> list[Step | Prompt]:
    """What the first choice of a request gives with nothing beside or before it."""
    scheduler = make_scheduler(SlotSession(1))
    one = request(prompt, **params)
    scheduler.submit(one)
    run_all(scheduler)
    return said(list(one.events))
