"""Every optimisation on against every optimisation off: 100 prompts, 128 greedy tokens each, equal by ==.

Off: one thread, one sequence, one token at a time, all logits, no speculation, the path with the least in
common. On: the best path, two threads, eight sequences in a batch, prompts in chunks, the two-stage head; and
one in ten once more with speculation. Both with the default KV cache, of which test_kv.py speaks.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.backend import NativeModel, Session
from engine.bench_synthetic import synthetic_model
from engine.formats.h1b import read_h1b
from engine.formats.prepared import prepare
from engine.formats.store import unpack
from engine.generate import Engine
from engine.locate import ModelCard
from engine.sampling import SamplingParams
from engine.speculate import Speculation

ROOT = Path(__file__).parents[2]
SLOW = "HALO_TEST_SLOW" in os.environ
PROMPTS, TOKENS = (100, 128) if SLOW else (3, 16)
BATCH = 8


def plain(model: NativeModel, path: str, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by the shortest program that there is."""
    with model.session(path=path, threads=1, context=len(prompt) + count) as session:
        fed, ids = list(prompt), []
        for position in range(len(prompt) + count - 1):
            logits = session.run([fed[position]], [0], [position], [True])
            if position >= len(prompt) - 1:
                ids.append(int(np.argmax(logits[0])))
                fed.append(ids[-1])
    return ids


def batched(session: Session, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens of several sequences at once."""
    slots = range(len(prompts))
    answers: list[list[int]] = []
    for slot, prompt in enumerate(prompts):
        want = [False] * (len(prompt) - 1) + [True]
        answers.append(session.run_argmax(prompt, [slot] * len(prompt), range(len(prompt)), want))
    while len(answers[0]) < count:
        last = [answer[-1] for answer in answers]
        at = [len(prompt) + len(answer) - 1 for prompt, answer in zip(prompts, answers, strict=True)]
        for answer, token in zip(answers, session.run_argmax(last, slots, at, [True] * len(at)), strict=True):
            answer.append(token)
    return answers


def speculating(model: NativeModel, prompts: list[list[int]], count: int) -> Iterator[list[int]]:
    """As a person would get them, but that nothing ends an answer."""
    stream = SimpleNamespace(feed=lambda _token: "", finish=lambda: "")
    tokenizer: Any = SimpleNamespace(
        size=model.config.vocab_size, stops=frozenset(), eos=-1, special={}, decode_stream=lambda: stream
    )
    context = max(map(len, prompts)) + count + 1
    session = model.session(context=context, threads=2)
    with Engine(
        session, tokenizer, ModelCard("x", "bitnet", context), None, Speculation(7, adaptive=False)
    ) as engine:
        for prompt in prompts:
            yield engine.complete(prompt, SamplingParams(max_tokens=count)).token_ids


def prompts_of(vocab: int) -> list[list[int]]:
    """Random tokens, some of them repeated, of 1 to 40."""
    chance = random.Random(17)
    made = []
    for number in range(PROMPTS):
        some = [chance.randrange(vocab) for _ in range(chance.randint(1, 20))]
        made.append(some * 2 if number % 2 else some)
    return made


def compare(model: NativeModel, path: str) -> None:
    prompts = prompts_of(model.config.vocab_size)
    expected = []
    for number, prompt in enumerate(prompts, 1):
        expected.append(plain(model, path, prompt, TOKENS))
        print(f"{path}, one by one: {number} of {len(prompts)}", file=sys.stderr)
    with model.session(slots=BATCH, context=40 + TOKENS, threads=2) as session:
        best = session.facts["isa"]
        for start in range(0, len(prompts), BATCH):
            got = batched(session, prompts[start : start + BATCH], TOKENS)
            assert got == expected[start : start + BATCH], start
    assert list(speculating(model, prompts[::10], TOKENS)) == expected[::10]
    print(f"{len(prompts)} prompts, {TOKENS} tokens: {best} in batches of {BATCH} as {path} one by one")


def test_the_demo_model_says_the_same_with_everything_off(tmp_path: Path, native_library: Path) -> None:
    unpack(ROOT / "engine" / "models" / "demo", tmp_path)
    (directory,) = tmp_path.glob("sha256-*")
    prepare(read_h1b(directory / "model.h1b"), directory / "model.halo")
    with NativeModel.open(directory / "model.halo", native_library) as model:
        compare(model, "scalar")


@pytest.mark.slow
@pytest.mark.skipif(
    not SLOW or "HALO_TEST_2B" not in os.environ,
    reason="HALO_TEST_SLOW=1 HALO_TEST_2B=1 takes half an hour and a cached model of 1.35 GB (halo bench's)",
)
def test_the_synthetic_2b_says_the_same_with_everything_off(
    native_library: Path, cpu_paths: list[str]
) -> None:
    with NativeModel.open(synthetic_model("2b4t", print), native_library) as model:
        compare(model, cpu_paths[max(0, len(cpu_paths) - 2)])  # scalar takes a second a token
