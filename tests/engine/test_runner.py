"""The engine's thread beside an event loop: jobs are heard step by step, and nobody waits for what ended."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from engine.chat import stop_ids
from engine.device import DeviceLost
from engine.errors import HaloError
from engine.generate import Engine
from engine.locate import ModelCard
from engine.observer import Observer
from engine.request import DeadlinePassed, QueueFull, Work
from engine.sampling import SamplingParams
from engine.sequence import Step
from engine.server.runner import Job, Runner
from tests.engine.scheduler_fixtures import SlotSession, alone
from tests.engine.server_fixtures import TOKENIZER


def engine_of(session: SlotSession) -> Engine:
    card = ModelCard("halo-test", "bitnet", session.context)
    return Engine(session, TOKENIZER, card, slots=len(session.kv))


@asynccontextmanager
async def running(session: SlotSession, queue_limit: int = 32) -> AsyncIterator[Runner]:
    """A started runner; it is stopped at the end."""
    runner = Runner(engine_of(session), queue_limit)
    runner.start()
    try:
        yield runner
    finally:
        await asyncio.to_thread(runner.stop)


def work(*prompt: int, max_tokens: int = 5, **params: object) -> Work:
    return Work(prompt, SamplingParams(max_tokens=max_tokens, **params))  # type: ignore[arg-type]


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


async def collect(job: Job) -> list[Step]:
    return [step async for _, step in job.steps() if isinstance(step, Step)]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_many_jobs_at_once_each_get_their_own_steps() -> None:
    async def test() -> None:
        async with running(SlotSession(4), queue_limit=50) as runner:
            jobs = [runner.submit([work(5, 6, 7 + i)], client=str(i % 3)) for i in range(40)]
            for i, steps in enumerate(await asyncio.gather(*map(collect, jobs))):
                assert steps == alone((5, 6, 7 + i), max_tokens=5)
            for job in jobs:
                timing = job.timing
                assert None not in (timing.admitted, timing.first_token, timing.last_token)
                assert timing.submitted <= timing.admitted <= timing.first_token <= timing.last_token  # type: ignore[operator]
            assert runner.counts() == (0, 0) and runner.busy_for() < 60.0

    run(test)


def test_the_events_of_a_step_reach_the_loop_together() -> None:
    async def test() -> None:
        session = SlotSession(4)
        async with running(session) as runner:
            loop, calls = asyncio.get_running_loop(), 0
            original = loop.call_soon_threadsafe

            def counted(*arguments: object, **options: object) -> object:
                nonlocal calls
                calls += threading.current_thread().name == "halo-engine"
                return original(*arguments, **options)  # type: ignore[arg-type]

            loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
            jobs = [runner.submit([work(5, 6 + i, max_tokens=30, ignore_eos=True)]) for i in range(4)]
            await asyncio.gather(*map(collect, jobs))
            assert calls <= len(session.runs) + 4

    run(test)


def test_a_cancelled_job_stops_at_once_and_its_slot_is_free_after_a_step() -> None:
    async def test() -> None:
        session = SlotSession(1, context=5000)
        async with running(session) as runner:
            job = runner.submit([work(5, 6, max_tokens=4000, ignore_eos=True)])
            waiting = runner.submit([work(5, 7)])
            seen = 0
            async for _ in job.steps():
                seen += 1
                if seen == 3:
                    job.cancel()
                    job.cancel()
            assert seen < 4000
            assert await collect(waiting) == alone((5, 7), max_tokens=5)
            other = runner.submit([work(5, 8)])
            other.cancel()
            assert await collect(other) == []
            await until(lambda: other.ended and job.ended)
            assert runner.gauges().running == 0

    run(test)


def test_a_full_queue_refuses_and_a_cancelled_job_makes_room() -> None:
    async def test() -> None:
        session = SlotSession(1)
        gate = threading.Event()
        session.on_run = lambda: gate.wait(30) and None
        async with running(session, queue_limit=2) as runner:
            jobs = [runner.submit([work(5, 6)])]
            await until(lambda: runner.gauges().running == 1)
            jobs += [runner.submit([work(5, 7 + i)]) for i in range(2)]
            with pytest.raises(QueueFull):
                runner.submit([work(5, 9)])
            jobs[1].cancel()
            jobs.append(runner.submit([work(5, 9)]))
            gate.set()
            assert [len(steps) for steps in await asyncio.gather(*map(collect, jobs))] == [5, 0, 5, 5]

    run(test)


def test_pings_come_while_nothing_else_does() -> None:
    async def test() -> None:
        session = SlotSession(1)
        gate = threading.Event()
        session.on_run = lambda: gate.wait(30) and None
        async with running(session) as runner:
            job = runner.submit([work(5, 6)])
            got = []
            async for event in job.steps_or_pings(0.01):
                got.append(event)
                if len(got) == 3:
                    gate.set()
            assert got[:3] == [None] * 3 and [event for event in got if event][-1][1].finish_reason  # type: ignore[index, union-attr]

    run(test)


def test_a_deadline_is_an_error_of_its_own() -> None:
    async def test() -> None:
        session = SlotSession(1, context=100_000)
        async with running(session) as runner:
            late = time.monotonic() + 0.05
            job = runner.submit([work(5, 6, max_tokens=90_000, ignore_eos=True)], deadline=late)
            with pytest.raises(DeadlinePassed):
                await collect(job)
            assert await collect(runner.submit([work(5, 7)])) == alone((5, 7), max_tokens=5)

    run(test)


def test_a_lost_device_is_told_to_all_and_to_those_who_come_later() -> None:
    async def test() -> None:
        session = SlotSession(1)
        gate = threading.Event()
        session.on_run = lambda: gate.wait(30) and None
        async with running(session) as runner:
            jobs = [runner.submit([work(5, 6 + i)]) for i in range(3)]
            session.lost = DeviceLost("The GPU was lost.")
            gate.set()
            for job in jobs:
                with pytest.raises(DeviceLost):
                    await collect(job)
            await until(lambda: not runner.alive())
            assert runner.lost is session.lost
            with pytest.raises(DeviceLost):
                runner.submit([work(5, 6)])

    run(test)


def test_a_bug_in_the_engines_thread_ends_it_and_nobody_waits() -> None:
    class Broken(Observer):
        def step(self, native_s: float, wall_s: float, decode_entries: int, prefill_entries: int) -> None:
            raise ZeroDivisionError("a counter broke")

    async def test() -> None:
        async with running(SlotSession(1)) as runner:
            runner.scheduler.observer = Broken()
            jobs = [runner.submit([work(5, 6 + i)]) for i in range(3)]
            for job in jobs:
                with pytest.raises(HaloError, match="a counter broke"):
                    await collect(job)
            await until(lambda: not runner.alive())
            assert runner.lost is not None
            with pytest.raises(HaloError, match="thread failed"):
                runner.submit([work(5, 6)])

    run(test)


def test_an_engine_error_ends_its_job_and_not_the_thread() -> None:
    async def test() -> None:
        session = SlotSession(2)
        session.poison = 77
        async with running(session) as runner:
            bad, good = runner.submit([work(5, 77)]), runner.submit([work(5, 6, logit_bias=((77, -99.0),))])
            with pytest.raises(HaloError, match="not finite"):
                await collect(bad)
            assert await collect(good) == alone((5, 6), max_tokens=5, logit_bias=((77, -99.0),))
            assert runner.alive()

    run(test)


def test_a_runner_that_stops_lets_nobody_wait() -> None:
    async def test() -> None:
        session = SlotSession(1, context=5000)
        runner = Runner(engine_of(session))
        runner.start()
        jobs = [runner.submit([work(5, 6 + i, max_tokens=4000, ignore_eos=True)]) for i in range(3)]
        readers = [asyncio.create_task(collect(job)) for job in jobs]
        await until(lambda: bool(session.runs))
        await asyncio.to_thread(runner.stop)
        await asyncio.gather(*readers)
        assert all(job.ended for job in jobs) and not runner.alive()
        assert stop_ids(TOKENIZER)  # the tokens asked for were not ended by chance: ignore_eos
        with pytest.raises(HaloError, match="stopped"):
            runner.submit([work(5, 6)])

    run(test)


def test_a_loop_that_is_gone_does_not_stop_the_engine() -> None:
    session = SlotSession(1, context=5000)
    runner = Runner(engine_of(session))
    runner.start()

    async def leave() -> Job:
        job = runner.submit([work(5, 6, max_tokens=4000, ignore_eos=True)])
        await until(lambda: bool(session.runs))
        return job

    job = asyncio.run(leave())

    async def stay() -> None:
        assert await collect(runner.submit([work(5, 7)])) == alone((5, 7), max_tokens=5)

    run(stay)
    runner.stop()
    assert job.ended


def test_nothing_of_a_finished_job_is_kept() -> None:
    async def test() -> None:
        async with running(SlotSession(2)) as runner:
            job = runner.submit([work(5, 6), work(5, 7)])
            await collect(job)
            await collect(runner.submit([work(9, 9)]))
            gone = weakref.ref(job)
            del job
            await asyncio.sleep(0)
            gc.collect()
            assert gone() is None

    run(test)
