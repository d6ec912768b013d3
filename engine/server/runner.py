"""The one thread that owns the engine, and the FIFO of jobs before it; it knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Final

from engine.device import DeviceLost
from engine.generate import Engine, Step
from engine.sampling import SamplingParams
from engine.sequence import Constraint

DEFAULT_QUEUE_LIMIT: Final = 32
log = logging.getLogger("halo.server")


class QueueFull(Exception):
    """As many jobs wait as may wait."""


@dataclass(frozen=True)
class Work:
    """One choice to generate: `index` is its number in the answer, `seed_index` its number for its prompt."""

    prompt_ids: Sequence[int]
    params: SamplingParams
    index: int = 0
    seed_index: int = 0
    strip_leading: bool = False
    constraint: Constraint | None = None


@dataclass
class Timing:
    """When what happened to a job, by time.monotonic()."""

    submitted: float = field(default_factory=monotonic)
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None


class Job:
    """One request's work and the steps that come of it. Made and read on the event loop's thread."""

    def __init__(self, works: Sequence[Work]) -> None:
        self.works = works
        self.cached_tokens = 0  # of the prompts, that were not prefilled again
        self.timing = Timing()
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Step] | Exception | None] = asyncio.Queue()
        self._cancelled = threading.Event()

    async def steps(self) -> AsyncIterator[tuple[int, Step]]:
        """(index of the choice, step) as they come; ends early when cancelled; raises the engine's error."""
        async for event in self.steps_or_pings(None):
            if event is not None:
                yield event

    async def steps_or_pings(self, idle_seconds: float | None) -> AsyncIterator[tuple[int, Step] | None]:
        """As `steps`, and None whenever nothing came for so long: a stream stays alive while it waits."""
        while True:
            try:
                async with asyncio.timeout(idle_seconds):
                    event = await self._events.get()
            except TimeoutError:
                yield None
                continue
            if event is None:
                return
            if isinstance(event, Exception):
                raise event
            yield event

    def cancel(self) -> None:
        """Stop within one step, waiting or running."""
        self._cancelled.set()
        self._events.put_nowait(None)

    def cancelled(self) -> bool:
        """Whether nobody wants the rest."""
        return self._cancelled.is_set()

    def deliver(self, event: tuple[int, Step] | Exception | None) -> None:
        """Hand an event over from the engine's thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended: nobody is left to read
            self._cancelled.set()


class Runner:
    """Runs jobs one after the other, first come first served."""

    def __init__(self, engine: Engine, queue_limit: int = DEFAULT_QUEUE_LIMIT) -> None:
        self.engine = engine
        self.queue_limit = queue_limit
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._stopping = False
        self.lost: DeviceLost | None = None  # why the engine's thread ended by itself
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="halo-engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current step; waiting jobs are dropped."""
        with self._change:
            self._stopping = True
            for job in self._all_jobs():
                job._cancelled.set()
            self._change.notify()
        self._thread.join()

    def alive(self) -> bool:
        """Whether jobs still get done."""
        return self._thread.is_alive()

    def submit(self, works: Sequence[Work], *, client: str = "", deadline: float | None = None) -> Job:
        """Queue a request; raises QueueFull, or DeviceLost. Call on the event loop's thread."""
        job = Job(works)
        with self._change:
            if self.lost is not None:
                raise self.lost
            self._waiting = deque(j for j in self._waiting if not j.cancelled())
            if len(self._waiting) >= self.queue_limit:
                raise QueueFull
            self._waiting.append(job)
            self._change.notify()
        return job

    def counts(self) -> tuple[int, int]:
        """(jobs running, jobs waiting)."""
        with self._change:
            return int(self._running is not None), sum(not j.cancelled() for j in self._waiting)

    def _all_jobs(self) -> list[Job]:
        return [*self._waiting, *([self._running] if self._running else [])]

    def _loop(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._run(job)
                job.deliver(None)
            except DeviceLost as error:
                self._give_up(job, error)
                return
            except Exception as error:
                job.deliver(error)

    def _give_up(self, job: Job, error: DeviceLost) -> None:
        """No job can be done any more: whoever waits is told, and the server ends (serve.py)."""
        with self._change:
            self.lost = error
            jobs = [job, *self._waiting]
            self._waiting.clear()
        for each in jobs:
            each.deliver(error)

    def _next(self) -> Job | None:
        with self._change:
            self._running = None
            while not self._waiting and not self._stopping:
                self._change.wait()
            if self._stopping:
                return None
            self._running = self._waiting.popleft()
            return self._running

    def _run(self, job: Job) -> None:
        for work in job.works:
            if job.cancelled():
                return
            steps = self.engine.generate(
                work.prompt_ids,
                work.params,
                index=work.seed_index,
                strip_leading=work.strip_leading,
                cancelled=job.cancelled,
            )
            for step in steps:
                job.deliver((work.index, step))
