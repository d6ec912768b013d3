"""What the scheduler costs and what a long prompt does to a stream beside it: prints, and judges nothing.

    python3 -m tests.engine.scheduler_figures LIBRARY MODEL.halo [TOKENS OF THE LONG PROMPT]

The weights may be random (halo bench keeps a file of the 2B-4T shape in its cache): speed does not know.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from engine.backend import NativeModel, Session
from engine.observer import Observer
from engine.request import Request, Work
from engine.sampling import SamplingParams
from engine.scheduler import Scheduler

CONTEXT = 1024
SLOTS = 8
KINDS: list[tuple[str, dict[str, object]]] = [
    ("greedy", {}),
    ("temperature", dict(temperature=0.8, seed=1)),
    ("top_p 0.95", dict(temperature=0.8, top_p=0.95, seed=1)),
    ("frequency penalty", dict(frequency_penalty=0.5)),
    ("repetition penalty", dict(repetition_penalty=1.1)),
    ("5 logprobs", dict(logprobs=5)),
]


class Letters:
    """A vocabulary of any size, for models without a tokenizer."""

    def __init__(self, size: int) -> None:
        self.size = size

    def decode_stream(self) -> Letters:
        return self

    def feed(self, token: int) -> str:
        return chr(97 + token % 26)

    def finish(self) -> str:
        return ""


class Steps(Observer):
    """Keeps what it is told of each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, int, int]] = []

    def step(self, native_s: float, wall_s: float, decode_entries: int, prefill_entries: int) -> None:
        self.seen.append((native_s, wall_s, decode_entries, prefill_entries))


def fresh(session: Session) -> tuple[Scheduler, Steps]:
    """A scheduler that has kept and learned nothing."""
    letters = Letters(session.config.vocab_size)
    scheduler = Scheduler(session, letters, frozenset(), CONTEXT, SLOTS)  # type: ignore[arg-type]
    steps = scheduler.observer = Steps()
    return scheduler, steps


def ask(scheduler: Scheduler, prompt: list[int], max_tokens: int, **params: object) -> Request:
    """A request that does not end before its limit."""
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)  # type: ignore[arg-type]
    request = Request([Work(prompt, sampling)])
    scheduler.submit(request)
    return request


def overhead(session: Session) -> Iterator[str]:
    """Of each kind of sampling, the time of a step that is not the native engine's."""
    for streams in (1, SLOTS):
        for name, params in KINDS:
            scheduler, steps = fresh(session)
            for number in range(streams):
                ask(scheduler, [5, 6, 7 + number], 30, **params)
            while scheduler.has_work():
                scheduler.step()
            decodes = [seen for seen in steps.seen if not seen[3]][2:]
            wall, outside = (
                median(column) for column in zip(*((w, w - n) for n, w, _, _ in decodes), strict=True)
            )
            yield (
                f"{streams} x {name:18} a step {wall * 1e3:8.2f} ms, outside the native calls "
                f"{outside * 1e6:6.0f} us = {outside / wall:.2%}"
            )


def long_prompt(session: Session, tokens: int) -> Iterator[str]:
    """The time between two tokens of a stream, with and without a long prompt beside it."""
    prompt = [int(t) for t in np.random.default_rng(1).integers(0, session.config.vocab_size, tokens)]
    scheduler, _ = fresh(session)
    alone = timed(scheduler, ask(scheduler, prompt, 1))
    scheduler, steps = fresh(session)
    ask(scheduler, [5, 6, 7], CONTEXT - 10)
    for _ in range(12):
        scheduler.step()
    plain = median(wall for _, wall, _, _ in steps.seen[2:])
    steps.seen.clear()
    beside = timed(scheduler, ask(scheduler, prompt, 1))
    walls = [wall for _, wall, _, _ in steps.seen]
    yield (
        f"a token of a stream: {plain * 1e3:.1f} ms; while a prompt of {tokens} runs: median "
        f"{median(walls) * 1e3:.1f} ms, at most {max(walls) * 1e3:.1f} ms"
    )
    yield f"the prompt: {alone:.2f} s alone, {beside:.2f} s beside the stream, in {len(walls)} steps"


def timed(scheduler: Scheduler, request: Request) -> float:
    """Seconds until the request has ended."""
    began = perf_counter()
    while not request.ended:
        scheduler.step()
    return perf_counter() - began


def throughput(session: Session) -> Iterator[str]:
    """Tokens a second of one stream, and of several at once."""
    one = 0.0
    for streams in (1, 2, 4, SLOTS):
        scheduler, steps = fresh(session)
        for number in range(streams):
            ask(scheduler, [5, 6, 7 + number], 40)
        while scheduler.has_work():
            scheduler.step()
        rate = streams / median(
            wall for _, wall, decodes, prefills in steps.seen if decodes == streams and not prefills
        )
        one = one or rate
        yield f"{streams} streams: {rate:.1f} tokens a second, {rate / one:.2f} times those of one"


def main(library: Path, model_path: Path, tokens: int) -> None:
    """Print all figures."""
    with NativeModel.open(model_path, library) as model, model.session(SLOTS, CONTEXT) as session:
        for lines in (overhead(session), throughput(session), long_prompt(session, tokens)):
            for line in lines:
                print(line, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 700)
