"""Sequences that share the engine's steps: nobody gets another's tokens, starves, or leaves a slot behind."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest

from engine.choosing import AGAIN
from engine.device import DeviceLost
from engine.errors import HaloError
from engine.observer import Observer
from engine.pace import FIRST, LEAST, Pace
from engine.request import DeadlinePassed, QueueFull, Request, Work
from engine.sampling import SamplingParams
from engine.sequence import Prompt, Step
from engine.slots import Slots
from engine.speculate import AUTO, Speculation
from tests.engine.scheduler_fixtures import (
    CONTEXT,
    SlotSession,
    alone,
    make_scheduler,
    request,
    run_all,
    said,
    tokens_of,
)
from tests.engine.server_fixtures import TOKENIZER

KINDS = [
    dict(max_tokens=20),
    dict(max_tokens=20, temperature=0.9, seed=3),
    dict(max_tokens=20, temperature=0.9, top_p=0.8, seed=4),
    dict(max_tokens=20, temperature=1.2, top_k=5, min_p=0.02, seed=5),
    dict(max_tokens=20, repetition_penalty=1.3),
    dict(max_tokens=20, temperature=0.7, seed=6, presence_penalty=0.5, frequency_penalty=0.7),
    dict(max_tokens=20, logit_bias=((7, 50.0), (9, -50.0)), logprobs=2),
    dict(max_tokens=8, prompt_logprobs=2),
    dict(max_tokens=0, prompt_logprobs=0),
    dict(max_tokens=6, ignore_eos=True, logprobs=0),
]


def prompt_of(seed: int, length: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(2, TOKENIZER.size, length)]


@pytest.mark.parametrize("speculation", [AUTO, Speculation(3, adaptive=False), Speculation(0)])
@pytest.mark.parametrize("slots", [1, 3, 16])
def test_a_request_gets_the_tokens_that_it_gets_alone(slots: int, speculation: Speculation) -> None:
    rng = random.Random(slots)
    session = SlotSession(slots)
    scheduler = make_scheduler(session, speculation=speculation)
    asked = []
    for number in range(60):
        kind = rng.choice(KINDS)
        shared = prompt_of(rng.choice([1, 2]), rng.choice([3, 40, 90]))
        prompt = [*shared, *prompt_of(100 + number, rng.choice([1, 2, 30]))]
        asked.append((prompt, kind, request(prompt, client=str(number % 5), **kind)))
        scheduler.submit(asked[-1][2])
        for _ in range(rng.choice([0, 0, 1, 5])):
            scheduler.step()
    run_all(scheduler)
    for prompt, kind, one in asked:
        assert said(list(one.events)) == alone(prompt, **kind), kind
        assert one.events[-1] is None and list(one.events).count(None) == 1
    assert scheduler.slots.free() == slots


class Steady(Pace):
    """So many entries for prompts beside those that decode, whatever they take."""

    def __init__(self, room: int) -> None:
        super().__init__(AGAIN)
        self._room = room

    def room(self, decodes: int) -> int:
        return self._room if decodes else self.most


def test_a_step_takes_decodes_first_and_prompts_in_equal_shares() -> None:
    session = SlotSession(4, context=2000)
    scheduler = make_scheduler(session)
    scheduler.pace = Steady(47)
    scheduler.submit(request(prompt_of(1, 5), max_tokens=500, ignore_eos=True))
    scheduler.step()
    scheduler.submit(request(prompt_of(2, 1500), max_tokens=2))
    scheduler.submit(request(prompt_of(3, 20), max_tokens=2, ignore_eos=True))
    scheduler.step()
    # The short prompt is not behind the long one: it has run within one step.
    assert [len(kv) for kv in session.kv[:3]] == [6, 47 - 20, 20]
    scheduler.step()
    assert session.runs[-1] == 2 + 47 and len(session.kv[0]) == 7  # 2 decode now


def test_a_long_prompt_gives_the_stream_beside_it_a_token_every_step() -> None:
    session = SlotSession(2, context=3000)
    scheduler = make_scheduler(session)
    stream = request(prompt_of(1, 5), max_tokens=2000, ignore_eos=True)
    scheduler.submit(stream)
    scheduler.step()
    long = request(prompt_of(2, 2500), max_tokens=1)
    scheduler.submit(long)
    before = len(stream.events)
    steps = 0
    while not long.ended:
        scheduler.step()
        steps += 1
        assert len(stream.events) == before + steps
        assert session.runs[-1] <= AGAIN
    assert steps <= 2500 // LEAST + 1


def test_however_many_decode_a_prompt_goes_on() -> None:
    count = AGAIN + 10
    session = SlotSession(count + 1)
    scheduler = make_scheduler(session)
    for number in range(count):
        scheduler.submit(request(prompt_of(number, 2), max_tokens=100, ignore_eos=True))
    while scheduler.gauges().waiting or any(running.prefilling for running in scheduler._running):
        scheduler.step()
    scheduler.pace.record(10, 0, 1.0)
    scheduler.submit(request(prompt_of(999, 60), max_tokens=1))
    scheduler.step()
    assert count + LEAST <= session.runs[-1] < count + LEAST + 12


def test_a_step_with_prompts_takes_a_few_times_one_without() -> None:
    pace = Pace(AGAIN)
    assert pace.room(0) == AGAIN and pace.room(3) == FIRST
    for seconds in (0.024, 0.024, 5.0, 0.025):  # one was disturbed
        pace.record(1, 0, seconds)
    for _ in range(3):
        pace.record(0, 96, 0.66)
    assert pace.room(1) == 11  # 12 entries: (4 - 1) * 24 ms at 7 ms each would be 10
    for _ in range(5):
        pace.record(1, 11, 0.024 + 11 * 0.001)
    assert pace.room(1) == 71 and pace.room(2) == 70  # whole tiles of 12
    for _ in range(5):
        pace.record(1, 71, 0.025)
    assert pace.room(1) == AGAIN - 1 and [pace.room(n) for n in (198, 199)] == [6, 17]


def test_choices_of_a_request_share_the_prefill_of_their_prompt() -> None:
    session = SlotSession(4)
    scheduler = make_scheduler(session)
    prompt = prompt_of(5, 120)
    one = request(prompt, n=4, max_tokens=5, temperature=1.0, seed=8, ignore_eos=True)
    scheduler.submit(one)
    run_all(scheduler)
    assert sum(session.runs) <= 120 + 3 + 4 * 5 and session.copied == 3 * 119
    assert one.prompt_tokens == 120 and one.cached_tokens == 0
    for index in range(4):
        single = make_scheduler(SlotSession(1))
        work = Work(
            prompt, SamplingParams(max_tokens=5, temperature=1.0, seed=8, ignore_eos=True), seed_index=index
        )
        apart = Request([work])
        single.submit(apart)
        run_all(single)
        assert tokens_of(one, index) == tokens_of(apart)


def test_two_requests_with_one_system_prompt_run_it_once() -> None:
    session = SlotSession(4)
    scheduler = make_scheduler(session)
    system = prompt_of(1, 100)
    asked = [request([*system, *prompt_of(10 + i, 5)], max_tokens=3, ignore_eos=True) for i in range(4)]
    for one in asked:
        scheduler.submit(one)
    run_all(scheduler)
    assert sum(session.runs) < 100 + 4 * (5 + 3) + 4 and session.copied >= 3 * 100
    assert [one.cached_tokens for one in asked] == [0, 100, 100, 100]


def test_who_waits_for_a_shared_prompt_goes_on_alone_when_its_leader_is_gone() -> None:
    session = SlotSession(2)
    scheduler = make_scheduler(session)
    prompt = prompt_of(1, 150)
    first, second = request(prompt, max_tokens=2), request([*prompt[:149], 7], max_tokens=2)
    scheduler.submit(first)
    scheduler.submit(second)
    scheduler.step()
    first.cancel()
    run_all(scheduler)
    assert said(list(second.events)) == alone([*prompt[:149], 7], max_tokens=2)
    assert second.cached_tokens == AGAIN  # what the first one had run


def test_turns_of_a_conversation_are_not_run_again_and_others_do_not_lose_theirs() -> None:
    session = SlotSession(3)
    scheduler = make_scheduler(session)
    system = prompt_of(1, 40)
    talks = [[*system, *prompt_of(20 + i, 10)] for i in range(3)]
    for turn in range(3):
        for talk in talks:
            before = sum(session.runs)
            one = request(talk, max_tokens=8, ignore_eos=True)
            scheduler.submit(one)
            run_all(scheduler)
            if turn:
                assert one.cached_tokens >= len(talk) - 7 and sum(session.runs) - before <= 7 + 8
            talk += [*tokens_of(one), *prompt_of(50 + turn, 5)]


def test_the_slot_used_longest_ago_is_taken() -> None:
    slots = Slots(3, 50)
    prompts = [np.array(prompt_of(i, 20), np.int32) for i in range(4)]
    for prompt in prompts[:3]:
        slot = slots.choose(prompt)
        slots.take(slot)
        slots.hold(slot, 0, prompt)
        slots.give_back(slot)
    assert slots.choose(prompts[1]) == 1
    slots.take(1)
    slots.give_back(1)
    assert slots.choose(prompts[3]) == 0
    slots.take(0)
    assert slots.choose(prompts[3]) == 2 and slots.free() == 2


def test_a_slot_that_shares_little_is_copied_not_spoiled() -> None:
    slots = Slots(2, 100)
    long = np.array(prompt_of(1, 90), np.int32)
    slots.take(0)
    slots.hold(0, 0, long)
    slots.give_back(0)
    other = np.array([*long[:30], *prompt_of(2, 10)], np.int32)
    assert slots.choose(other) == 1 and slots.source(1, other) == (0, 30)
    slots.take(1)
    slots.hold(1, 0, prompt_of(3, 90))
    slots.give_back(1)
    rewound = np.array([*long[:80], *prompt_of(2, 5)], np.int32)
    assert slots.choose(rewound) == 0 and slots.source(0, rewound) == (0, 80)


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding", "leading"])
def test_a_cancelled_request_has_no_slot_after_one_step(when: str) -> None:
    session = SlotSession(2)
    scheduler = make_scheduler(session)
    one = request(prompt_of(1, 150), n=2 if when == "leading" else 1, max_tokens=100, ignore_eos=True)
    if when == "waiting":
        for i in range(2):
            scheduler.submit(request(prompt_of(2 + i, 4), max_tokens=100, ignore_eos=True))
        scheduler.step()
    scheduler.submit(one)
    for _ in range({"waiting": 1, "prefilling": 1, "decoding": 5, "leading": 1}[when]):
        scheduler.step()
    one.cancel()
    seen = len(one.events)
    assert scheduler.gauges().waiting == 0
    scheduler.step()
    busy = 2 if when == "waiting" else 0
    assert scheduler.gauges().running == busy and one.ended
    assert [event for event in list(one.events)[seen:] if event is not None] == []


def test_a_deadline_ends_what_runs_and_what_waits_within_one_step() -> None:
    scheduler = make_scheduler(SlotSession(1))
    running, waiting = request(prompt_of(1, 4), max_tokens=100, ignore_eos=True), request(prompt_of(2, 4))
    scheduler.submit(running)
    scheduler.step()
    scheduler.submit(waiting)
    running.deadline = waiting.deadline = time.monotonic() - 1.0
    scheduler.step()
    assert not scheduler.has_work() and scheduler.slots.free() == 1
    for one in (running, waiting):
        assert isinstance(one.events[-1], DeadlinePassed) and one.ended


def test_the_queue_is_bounded_and_a_cancelled_request_leaves_it_at_once() -> None:
    scheduler = make_scheduler(SlotSession(1), queue_limit=2)
    scheduler.submit(request(prompt_of(0, 4), max_tokens=50, ignore_eos=True))
    scheduler.step()
    waiting = [request(prompt_of(i, 4), max_tokens=2) for i in range(2)]
    for one in waiting:
        scheduler.submit(one)
    with pytest.raises(QueueFull):
        scheduler.submit(request(prompt_of(9, 4)))
    waiting[0].cancel()
    assert scheduler.gauges().waiting == 1
    scheduler.submit(request(prompt_of(9, 4), max_tokens=2))
    run_all(scheduler)
    assert tokens_of(waiting[1]) and not tokens_of(waiting[0])


def test_a_client_with_many_requests_does_not_keep_another_waiting() -> None:
    scheduler = make_scheduler(SlotSession(2))
    many = [request(prompt_of(i, 4), client="many", max_tokens=10, ignore_eos=True) for i in range(20)]
    for one in many:
        scheduler.submit(one)
    scheduler.step()
    few = [request(prompt_of(50 + i, 4), client="few", max_tokens=10, ignore_eos=True) for i in range(3)]
    for one in few:
        scheduler.submit(one)
    while not all(one.ended for one in few):
        scheduler.step()
    assert sum(one.ended for one in many) <= 5  # two that ran, and one beside each of the others


def test_one_sequence_that_fails_fails_alone() -> None:
    session = SlotSession(4)
    session.poison = 77
    scheduler = make_scheduler(session)
    good = [request([2 + i, 3, 4, 5], max_tokens=12, logit_bias=((77, -100.0),)) for i in range(3)]
    bad = request([5, 77, 6], max_tokens=12)
    for one in (good[0], bad, *good[1:]):
        scheduler.submit(one)
    run_all(scheduler)
    assert isinstance(bad.events[-1], HaloError) and "not finite" in str(bad.events[-1])
    for i, one in enumerate(good):
        assert said(list(one.events)) == alone([2 + i, 3, 4, 5], max_tokens=12, logit_bias=((77, -100.0),))
    again = request([5, 78, 6], max_tokens=4)
    scheduler.submit(again)
    run_all(scheduler)
    assert said(list(again.events)) == alone([5, 78, 6], max_tokens=4)


class BrokenGrammar:
    """Allows everything for some tokens, and then breaks."""

    def __init__(self, good: int) -> None:
        self.left = good

    def mask(self) -> np.ndarray:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("the grammar broke")
        return np.ones(TOKENIZER.size, np.uint8)

    def accept(self, token: int) -> None:
        pass

    def finished(self) -> bool:
        return False

    def fork(self) -> BrokenGrammar:
        return BrokenGrammar(self.left)


def test_a_grammar_that_breaks_ends_its_own_request_alone() -> None:
    scheduler = make_scheduler(SlotSession(3))
    broken = Request([Work([5, 6, 7], SamplingParams(max_tokens=30), constraint=BrokenGrammar(3))])
    fine = request([5, 6, 8], max_tokens=12)
    scheduler.submit(broken)
    scheduler.submit(fine)
    run_all(scheduler)
    assert isinstance(broken.events[-1], RuntimeError) and len(broken.events) == 4
    assert said(list(fine.events)) == alone([5, 6, 8], max_tokens=12)
    assert scheduler.slots.free() == 3


def test_a_lost_device_ends_everything_with_its_error() -> None:
    session = SlotSession(2)
    scheduler = make_scheduler(session)
    asked = [request(prompt_of(i, 4), n=2, max_tokens=50) for i in range(4)]
    for one in asked:
        scheduler.submit(one)
    scheduler.step()
    session.lost = DeviceLost("The GPU was lost.")
    with pytest.raises(DeviceLost):
        scheduler.step()
    scheduler.end_all(session.lost)
    assert all(list(one.events).count(session.lost) == 1 for one in asked)
    assert scheduler.slots.free() == 2 and not scheduler.has_work()


def test_a_prompt_that_is_only_scored_says_so_and_no_more() -> None:
    prompt = prompt_of(3, 100)
    scheduler = make_scheduler(SlotSession(1))
    one = request(prompt, max_tokens=0, prompt_logprobs=3)
    scheduler.submit(one)
    run_all(scheduler)
    first, last = said(list(one.events))
    assert isinstance(first, Prompt) and isinstance(last, Step)
    assert (last.token_id, last.text, last.finish_reason) == (-1, "", "length")
    assert first.logprobs[0] is None and len(first.logprobs) == 100 and one.completion_tokens == 0
    nothing = request(prompt, max_tokens=0)
    scheduler.submit(nothing)
    run_all(scheduler)
    assert [step.token_id for step in said(list(nothing.events)) if isinstance(step, Step)] == [-1]


class Recorder(Observer):
    """Writes down all that it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[object, ...]]] = []

    def __getattribute__(self, name: str) -> object:
        if name in ("submitted", "refused", "admitted", "first_token", "token", "finished", "step"):
            return lambda *values: self.calls.append((name, values))
        return object.__getattribute__(self, name)

    def named(self, name: str) -> list[tuple[object, ...]]:
        """The arguments of each call of this name."""
        return [values for call, values in self.calls if call == name]


def test_an_observer_hears_of_everything_once() -> None:
    scheduler = make_scheduler(SlotSession(2), queue_limit=3)
    recorder = scheduler.observer = Recorder()
    done = request(prompt_of(1, 120), n=2, max_tokens=6, ignore_eos=True)
    gone = request(prompt_of(2, 9), max_tokens=6)
    late = request(prompt_of(3, 9), max_tokens=6)
    late.deadline = 0.0
    for one in (done, gone, late):
        scheduler.submit(one)
    gone.cancel()
    run_all(scheduler)
    for i in range(5):
        scheduler.submit(request(prompt_of(i, 3), max_tokens=1))
    with pytest.raises(QueueFull):
        scheduler.submit(request(prompt_of(7, 3)))
    assert len(recorder.named("submitted")) == 8 and len(recorder.named("refused")) == 1
    ended = [(values[0], values[1], values[2]) for values in recorder.named("finished")]
    assert sorted(ended) == [("cancelled", 9, 0), ("deadline", 9, 0), ("length", 120, 12)]
    assert [values[1:] for values in recorder.named("admitted")] == [(120, 0)]
    assert len(recorder.named("first_token")) == 1
    assert sum(values[1] for values in recorder.named("token")) == 11  # type: ignore[misc]
    steps = recorder.named("step")
    assert sum(values[3] for values in steps) == 121 and sum(values[2] for values in steps) == 10  # type: ignore[misc]
    assert all(0 <= values[0] <= values[1] for values in steps)  # type: ignore[operator]


@pytest.mark.parametrize("seed", range(4))
def test_conversations_that_share_diverge_rewind_and_break_off(seed: int) -> None:
    rng = random.Random(seed)
    session = SlotSession(3)
    scheduler = make_scheduler(session, speculation=AUTO)
    talks: list[list[int]] = [prompt_of(seed, 8)]
    asked: list[tuple[list[int], dict[str, object], Request]] = []
    for number in range(60):
        talk = rng.choice(talks)
        talk = talk[: rng.randint(1, len(talk))] if rng.random() < 0.4 else talk
        prompt = [*talk, *prompt_of(number, rng.randint(1, 12))][: CONTEXT - 20]
        kind = rng.choice(KINDS)
        one = request(prompt, n=rng.choice([1, 1, 3]), **kind)
        asked.append((prompt, kind, one))
        scheduler.submit(one)
        for _ in range(rng.randint(0, 8)):
            scheduler.step()
        if rng.random() < 0.25:
            rng.choice(asked)[2].cancel()
        talks.append([*prompt, *(token for token in tokens_of(one) if token >= 0)][: CONTEXT - 20])
    run_all(scheduler)
    for prompt, kind, one in asked:
        whole = alone(prompt, **kind)
        got = said(list(one.events))
        assert got == whole[: len(got)] and (one.cancelled() or len(got) == len(whole))


OPERATIONS = 10_000


def test_ten_thousand_random_operations_lose_no_slot_and_end_every_job_once() -> None:
    rng = random.Random(11)
    session = SlotSession(5, context=60)
    session.poison = 99
    scheduler = make_scheduler(session, queue_limit=7)
    live: list[Request] = []
    ended = refused = 0
    for _ in range(OPERATIONS):
        action = rng.random()
        if action < 0.35:
            prompt = prompt_of(rng.randint(0, 30), rng.randint(1, 40))
            if rng.random() < 0.9:
                prompt = [token if token != 99 else 98 for token in prompt]
            one = request(
                prompt, rng.choice("abc"), rng.choice([1, 1, 1, 2, 7]), max_tokens=rng.randint(0, 9), seed=1,
                temperature=rng.choice([0.0, 1.0]), logit_bias=((99, -100.0),) if rng.random() < 0.9 else (),
            )  # fmt: skip
            if rng.random() < 0.1:
                one.deadline = time.monotonic() + rng.choice([-1.0, 0.002])
            try:
                scheduler.submit(one)
                live.append(one)
            except QueueFull:
                refused += 1
                waiting = sum(not r.admitted and not r.cancelled() for r in live)
                assert waiting >= scheduler.queue_limit
        elif action < 0.45 and live:
            rng.choice(live).cancel()
        else:
            scheduler.step()
        ended += check(scheduler, live)
    run_all(scheduler)
    ended += check(scheduler, live)
    assert not live and scheduler.slots.free() == 5 and ended > 1000 and refused > 100


def check(scheduler, live: list[Request]) -> int:  # type: ignore[no-untyped-def]
    """The invariants of a scheduler; takes out of `live` what has ended, and says how many."""
    running = scheduler._running
    slots = [one.slot for one in running]
    assert len(set(slots)) == len(slots) == scheduler.slots.count - scheduler.slots.free()
    assert scheduler.gauges().waiting <= scheduler.queue_limit + scheduler.slots.count
    assert not [one for one in running if one.request not in live]
    done = [one for one in live if one.ended]
    for one in done:
        finals = [event for event in one.events if event is None or isinstance(event, Exception)]
        assert len(finals) == 1 and one.events[-1] is finals[0]
        complete = finals[0] is None and not one.cancelled()
        ends = [e[0] for e in one.events if isinstance(e, tuple) and getattr(e[1], "finish_reason", None)]
        assert not complete or sorted(ends) == list(range(len(one.works)))
        live.remove(one)
    return len(done)


def test_requests_are_submitted_and_cancelled_from_other_threads() -> None:
    session = SlotSession(3)
    scheduler = make_scheduler(session)
    made: list[Request] = []

    def client(name: str) -> None:
        rng = random.Random(name)
        for number in range(60):
            one = request(prompt_of(number, 5), client=name, max_tokens=5)
            scheduler.submit(one)
            made.append(one)
            if rng.random() < 0.4:
                one.cancel()
            scheduler.gauges()

    threads = [threading.Thread(target=client, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or scheduler.has_work():
        scheduler.step()
    assert len(made) == 240 and all(one.ended for one in made) and scheduler.slots.free() == 3
    for one in made:
        if not one.cancelled():
            assert said(list(one.events)) == alone(one.works[0].prompt_ids, max_tokens=5)
