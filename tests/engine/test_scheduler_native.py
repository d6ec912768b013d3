"""The scheduler over the native engine: a request's tokens do not know who else is there, or what was kept.

HALO_TEST_SLOW=1 runs all 200 requests; the default run a part of them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.backend import KV_FORMS, NativeModel, Session
from engine.choosing import AGAIN, Sampler
from engine.formats.h1b import read_h1b
from engine.formats.prepared import prepare
from engine.formats.store import seal, unpack
from engine.generate import Engine
from engine.model import Model
from engine.request import Request, Work
from engine.sampling import SamplingParams, make_noise, sample
from engine.scheduler import Scheduler
from engine.sequence import Step
from engine.speculate import AUTO, OFF
from tests.engine.scheduler_fixtures import run_all, said
from tests.engine.test_choosing import Fixed

SLOW = bool(os.environ.get("HALO_TEST_SLOW"))
DEMO = Path(__file__).parents[2] / "engine" / "models" / "demo"
CONTEXT = 300
TEXTS = [
    "Once upon a time there was a little girl named Lily.", "The dog ran to the park and",
    "One day, a big bear found a red ball in the forest, and he", "Tom and Sam like to play.", "x",
]  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = unpack(DEMO, tmp_path_factory.mktemp("store"))
    prepare(read_h1b(directory / "model.h1b"), directory / "model.halo")
    seal(directory)
    return directory


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model."""
    at = tmp_path_factory.mktemp("tiny") / "model.halo"
    prepare(tiny_model("wide", seed=5, max_seq_len=CONTEXT), at)
    return at


@pytest.fixture(params=KV_FORMS)
def session(request: pytest.FixtureRequest, tiny: Path, native_library: Path) -> Iterator[Session]:
    with (
        NativeModel.open(tiny, native_library) as model,
        model.session(3, CONTEXT, threads=2, kv=request.param) as session,
    ):
        yield session


class Letters:
    """A vocabulary of any size: each token is a letter."""

    def __init__(self, size: int) -> None:
        self.size = size

    def decode_stream(self) -> Letters:
        return self

    def feed(self, token: int) -> str:
        return chr(97 + token % 26)

    def finish(self) -> str:
        return ""


def scheduler_of(session: Session) -> Scheduler:
    letters = Letters(session.config.vocab_size)
    scheduler = Scheduler(session, letters, frozenset(), CONTEXT, session.slots, AUTO)  # type: ignore[arg-type]
    scheduler.queue_limit = 1000
    return scheduler


def random_params(rng: random.Random, seed: int) -> SamplingParams:
    """One of the ways to choose tokens; half are greedy or plainly drawn."""
    common = dict(max_tokens=rng.choice([1, 12, 40]), ignore_eos=rng.random() < 0.5)
    drawn = dict(temperature=rng.choice([0.5, 0.9, 1.3]), seed=seed)
    kind: dict[str, object] = rng.choice(
        [
            {}, {}, drawn, drawn, drawn | dict(top_p=0.9), drawn | dict(top_k=10, min_p=0.02),
            dict(repetition_penalty=1.2), drawn | dict(presence_penalty=0.6, frequency_penalty=0.4),
            dict(logit_bias=((30, 4.0),), logprobs=2), dict(prompt_logprobs=1),
        ]
    )  # fmt: skip
    return SamplingParams(**(common | kind))  # type: ignore[arg-type]


def test_two_hundred_requests_say_alone_what_they_say_among_sixteen(demo: Path, native_library: Path) -> None:
    rng = random.Random(20)
    with Engine.open(demo, native_library, slots=16, speculation=AUTO) as engine:
        asked = []
        for number in range(200 if SLOW else 24):
            text = " ".join(rng.choice(TEXTS) for _ in range(rng.choice([1, 1, 3, 12])))
            asked.append((engine.encode_prompt(text), random_params(rng, number)))
        order = list(range(len(asked)))
        rng.shuffle(order)
        scheduler = engine.scheduler
        scheduler.queue_limit = len(asked)
        together = {at: Request([Work(*asked[at])], client=str(at % 4)) for at in order}
        for one in together.values():
            scheduler.submit(one)
        run_all(scheduler)
    with Engine.open(demo, native_library, speculation=OFF) as engine:
        for at, (ids, params) in enumerate(asked):
            alone = Request([Work(ids, params)])
            engine.scheduler.submit(alone)
            run_all(engine.scheduler)
            assert said(list(together[at].events)) == said(list(alone.events)), (at, params)


def plainly(session: Session, work: Work) -> list[int]:
    """The tokens of a choice by the definition: all logits of every step, no drafts, nothing kept."""
    params, prompt = work.params, list(work.prompt_ids)
    vocab = session.config.vocab_size
    sampler = Sampler(params, np.array(prompt, np.int32), vocab, work.seed_index, work.constraint)
    noise = None if params.temperature == 0.0 else make_noise(params.seed, work.seed_index)
    tokens: list[int] = []
    for _ in range(params.max_tokens or 0):
        logits = session.prefill(0, [*prompt, *tokens])
        sampler.prepare()
        tokens.append(sample(logits, params, noise, len(prompt) + len(tokens), sampler.edits))
        sampler.take(tokens[-1])
    return tokens


def test_native_draws_with_penalties_bias_and_masks_are_the_definitions(
    tiny: Path, native_library: Path
) -> None:
    rng = random.Random(4)
    with (
        NativeModel.open(tiny, native_library) as model,
        model.session(4, CONTEXT) as session,
        model.session(1, CONTEXT) as other,
    ):
        vocab = model.config.vocab_size
        scheduler = scheduler_of(session)
        asked = []
        for number in range(24):
            params = random_params(rng, number)
            params = replace(params, max_tokens=10, ignore_eos=True)
            allowed = np.random.default_rng(number).random(vocab) < 0.1
            mask = Fixed(allowed) if number % 3 == 0 else None
            prompt = [rng.randrange(vocab) for _ in range(rng.choice([1, 5, 40]))]
            asked.append(Request([Work(prompt, params, constraint=mask)]))
            scheduler.submit(asked[-1])
        run_all(scheduler)
        for one in asked:
            steps = [step for step in said(list(one.events)) if isinstance(step, Step)]
            assert [step.token_id for step in steps] == plainly(other, one.works[0]), one.works[0].params


def test_kept_and_copied_prefixes_change_no_token(session: Session, tiny: Path, native_library: Path) -> None:
    rng = random.Random(9)
    vocab = session.config.vocab_size
    scheduler = scheduler_of(session)
    talks: list[list[int]] = [[rng.randrange(vocab) for _ in range(20)]]
    asked: list[Request] = []
    for number in range(40 if SLOW else 14):
        talk = rng.choice(talks)
        if rng.random() < 0.4:
            talk = talk[: rng.randint(1, len(talk))]
        prompt = [*talk, *(rng.randrange(vocab) for _ in range(rng.randint(1, 30)))][: CONTEXT - 50]
        params = random_params(rng, number)
        works = [Work(prompt, params, index=i, seed_index=i) for i in range(rng.choice([1, 1, 2]))]
        asked.append(Request(works))
        scheduler.submit(asked[-1])
        for _ in range(rng.randint(0, 12)):
            scheduler.step()
        if rng.random() < 0.2:
            rng.choice(asked).cancel()
        talks.append([*prompt, *(step.token_id for step in answer(asked[-1], 0))][: CONTEXT - 50])
    run_all(scheduler)
    assert sum(one.cached_tokens for one in asked) > 100
    with NativeModel.open(tiny, native_library) as model:
        for one in asked:
            for work in one.works:
                with model.session(1, CONTEXT, kv=str(session.facts["kv"])) as fresh:
                    apart = Request([work])
                    alone = scheduler_of(fresh)
                    alone.submit(apart)
                    run_all(alone)
                whole, got = answer(apart, work.index), answer(one, work.index)
                assert got == whole[: len(got)] and (one.cancelled() or len(got) == len(whole))


def answer(request: Request, index: int) -> list[Step]:
    """The steps of a choice that have a token."""
    steps = said(list(request.events), index)
    return [step for step in steps if isinstance(step, Step) and step.token_id >= 0]


def test_a_long_prompt_runs_in_steps_that_leave_room_for_a_stream(session: Session) -> None:
    scheduler = scheduler_of(session)
    stream = Request([Work([5, 6, 7], SamplingParams(max_tokens=200, ignore_eos=True))])
    scheduler.submit(stream)
    scheduler.step()
    long = Request([Work([(3 * i) % 200 for i in range(280)], SamplingParams(max_tokens=1))])
    scheduler.submit(long)
    before, steps = len(stream.events), 0
    while not long.ended:
        scheduler.step()
        steps += 1
    assert steps >= 280 // AGAIN + 1 and len(stream.events) >= before + steps


@pytest.mark.parametrize("room", [0, 300])
def test_a_draw_and_what_is_near_it_do_not_know_who_shares_the_pass(session: Session, room: int) -> None:
    if session.facts["kv"] != "int8":
        return
    rng = np.random.default_rng(6)
    noise = rng.gumbel(size=(20, session.config.vocab_size)).astype(np.float32)
    prompt = [int(token) for token in rng.integers(0, 200, 40)]
    session.prefill(0, prompt)
    want = [True] * 20
    together = session.run_draw(prompt[20:], [0] * 20, range(20, 40), want, noise, 1.5, room)
    for row, one in enumerate(together):
        position = 20 + row
        (alone,) = session.run_draw(
            prompt[position : position + 1], [0], [position], [True], noise[row : row + 1], 1.5, room
        )
        assert alone.token == one.token
        for left, right in ((alone.ids, one.ids), (alone.logits, one.logits)):
            assert (left is None and right is None) or np.array_equal(left, right)  # type: ignore[arg-type]
    assert not room or any(one.ids is not None for one in together)
