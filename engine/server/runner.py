"""The one thread that owns the engine, and the jobs that the event loop hands it; HTTP is not here."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from time import monotonic
from typing import Final

from engine.device import DeviceLost
from engine.errors import HaloError
from engine.generate import Engine
from engine.observer import Gauges, Observer
from engine.request import DeadlinePassed as DeadlinePassed
from engine.request import Event, Request
from engine.request import QueueFull as QueueFull
from engine.request import Timing as Timing
from engine.request import Work as Work
from engine.scheduler import DEFAULT_QUEUE_LIMIT as DEFAULT_QUEUE_LIMIT
from engine.scheduler import Delivery, put_each
from engine.sequence import Prompt, Step

SWITCH_SECONDS: Final = 0.0005  # a thread that waits for the interpreter gets it; Python's own is 5 ms
MOST_UNREAD: Final = 256  # events of a request that lie unread before its answer waits for the reader
LOOK_SECONDS: Final = (
    0.02  # how often it is looked whether such a reader has come on, where nothing else runs
)
log = logging.getLogger("halo.server")


class Job(Request):
    """One request's work and the steps that come of it. Made and read on the event loop's thread."""

    def __init__(
        self, works: Sequence[Work], runner: Runner, client: str = "", deadline: float | None = None
    ) -> None:
        super().__init__(works, client=client, deadline=deadline)
        self.loop = asyncio.get_running_loop()
        self._runner = runner
        self._queue: asyncio.Queue[Event] = asyncio.Queue()

    async def steps(self) -> AsyncIterator[tuple[int, Step | Prompt]]:
        """(index of the choice, step) as they come; ends early when cancelled; raises the engine's error."""
        async for event in self.steps_or_pings(None):
            if event is not None:
                yield event

    async def steps_or_pings(
        self, idle_seconds: float | None
    ) -> AsyncIterator[tuple[int, Step | Prompt] | None]:
        """As `steps`, and None whenever nothing came for so long: a stream stays alive while it waits."""
        while True:
            try:
                if self._queue.empty():
                    async with asyncio.timeout(idle_seconds):
                        event = await self._queue.get()
                else:
                    event = self._queue.get_nowait()
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
        if not (self.ended or self.cancelled()):
            super().cancel()
            self._queue.put_nowait(None)
            self._runner.wake()

    def behind(self) -> bool:
        """Whether its client reads so slowly that events lie here; asked by the engine's thread."""
        return self._queue.qsize() > MOST_UNREAD

    def put(self, event: Event) -> None:
        """Take an event, on the event loop's thread."""
        self._queue.put_nowait(event)


class Runner:
    """Runs the engine's scheduler in a thread of its own."""

    def __init__(
        self, engine: Engine, queue_limit: int = DEFAULT_QUEUE_LIMIT, observer: Observer | None = None
    ) -> None:
        self.engine = engine
        self.queue_limit = queue_limit
        self.lost: HaloError | None = None  # why the engine's thread ended by itself
        self.scheduler = engine.scheduler
        self.scheduler.queue_limit = queue_limit
        self.scheduler.deliver = _deliver
        if observer is not None:
            self.scheduler.observer = observer
        self._stopping = False
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._loop, name="halo-engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread."""
        sys.setswitchinterval(SWITCH_SECONDS)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the current step; what waits or runs is dropped."""
        self._stopping = True
        self.wake()
        self._thread.join()

    def wake(self) -> None:
        """Something is to be looked at: a new job, a cancelled one, the end."""
        with self.scheduler.change:
            self.scheduler.change.notify()

    def alive(self) -> bool:
        """Whether jobs still get done."""
        return self._thread.is_alive()

    def busy_for(self) -> float:
        """Seconds since the step that runs now began; 0 where none runs."""
        began = self._step_began
        return 0.0 if began is None else monotonic() - began

    def submit(self, works: Sequence[Work], *, client: str = "", deadline: float | None = None) -> Job:
        """Queue a request; raises QueueFull, or why the engine's thread has ended. Call on the loop's thread.

        client: who asks, for fairness. deadline: the time.monotonic() at which it ends with DeadlinePassed.
        """
        job = Job(works, self, client, deadline)
        self.scheduler.submit(job)
        return job

    def gauges(self) -> Gauges:
        """How full the slots and the queue are."""
        return self.scheduler.gauges()

    def counts(self) -> tuple[int, int]:
        """(jobs that have slots, jobs waiting)."""
        return self.scheduler.running_requests(), self.gauges().waiting

    def _loop(self) -> None:
        import numpy as np

        # A warning would be written to a log that may be full, and the engine would stand still behind it.
        with np.errstate(all="ignore"):
            self._run()

    def _run(self) -> None:
        scheduler = self.scheduler
        try:
            while not self._stopping:
                with scheduler.change:
                    while not (self._stopping or scheduler.has_work()):
                        scheduler.change.wait()
                self._step_began = monotonic()
                ran = scheduler.step()
                self._step_began = None
                if not ran and scheduler.has_work():  # all that runs waits for its readers
                    with scheduler.change:
                        scheduler.change.wait(LOOK_SECONDS)
        except DeviceLost as lost:
            self.lost = lost  # whoever waits is told, and the server ends (serve.py)
        except Exception as error:
            log.exception("the scheduler failed")
            self.lost = HaloError(f"The engine's thread failed: {error!r}.", hint="the log has the reason")
        scheduler.end_all(self.lost)


def _deliver(events: list[Delivery]) -> None:
    """Hand a step's events over from the engine's thread, all at once."""
    loops: dict[asyncio.AbstractEventLoop | None, list[Delivery]] = {}
    for delivery in events:
        loops.setdefault(getattr(delivery[0], "loop", None), []).append(delivery)
    for loop, its in loops.items():
        if loop is None:
            put_each(its)
            continue
        try:
            loop.call_soon_threadsafe(put_each, its)
        except RuntimeError:  # the loop has ended: nobody is left to read
            for request, _ in its:
                Request.cancel(request)
