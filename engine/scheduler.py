"""Many sequences on the slots of one session, a mixed batch a step; it knows nothing of HTTP or asyncio.

A step is one run of the model: the next token of every sequence that decodes, with drafts where that pays,
and then as much of the waiting prompts as its budget leaves. Results do not depend on what else is in a
batch, nor on whether a prompt's beginning was computed, kept or copied (docs/engine.md); so all that is
decided here is decided for speed and fairness.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from engine.batch import Batch, Part, plan
from engine.choosing import AGAIN, Choices, TokenSession
from engine.device import DeviceLost
from engine.errors import HaloError
from engine.fair_queue import FairQueue
from engine.observer import Gauges as Gauges
from engine.observer import Observer as Observer
from engine.observer import Reason as Reason
from engine.pace import Pace
from engine.request import DeadlinePassed, Event, QueueFull, Request
from engine.running import Running
from engine.sequence import Prompt, Step
from engine.slots import WORTH, Slots
from engine.speculate import OFF, Drafter, Experience, Speculation, Tally, accept, draft_together

if TYPE_CHECKING:
    from engine.tokenizer import TextTokenizer

DEFAULT_QUEUE_LIMIT: Final = 32
FEW: Final = 4  # sequences that decode with drafts; more of them fill a step by themselves
Delivery = tuple[Request, Event]


class Scheduler:
    """`submit` and `gauges` may be called by any thread; `step` and `end_all` by one at a time."""

    def __init__(
        self,
        session: TokenSession,
        tokenizer: TextTokenizer,
        stop_ids: frozenset[int],
        context: int,
        slots: int = 1,
        speculation: Speculation = OFF,
        most_entries: int = AGAIN,
    ) -> None:
        self.queue_limit = DEFAULT_QUEUE_LIMIT
        self.observer = Observer()
        self.deliver: Callable[[list[Delivery]], None] = put_each
        self.tally = Tally()
        self.pace = Pace(most_entries)
        self.slots = Slots(slots, context)
        self.change = threading.Condition()  # of the queue, and of what is cancelled
        self._session, self._tokenizer, self._stop_ids = session, tokenizer, stop_ids
        self._context, self._speculation = context, speculation
        self._queue = FairQueue()
        self._closed: Exception | None = None
        self._running: list[Running] = []
        self._batch = Batch(session, tokenizer.size)
        self._events: list[Delivery] = []
        self._learned = {greedy: Experience(speculation) for greedy in (True, False)}

    def submit(self, request: Request) -> None:
        """Queue a request; raises QueueFull, or why nothing more is run."""
        with self.change:
            if self._closed is not None:
                raise self._closed
            if self._queue.waiting() >= self.queue_limit + self.slots.free():
                self.observer.refused()
                raise QueueFull
            self.observer.submitted()
            self._queue.put(request)
            self.change.notify()

    def has_work(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self._running or self._queue)

    def running_requests(self) -> int:
        """Requests that have slots; from another thread, as of a moment ago."""
        return len({id(running.request) for running in list(self._running)})

    def gauges(self) -> Gauges:
        """How full it is; from another thread, as of a moment ago."""
        slots = self.slots
        with self.change:
            waiting = self._queue.waiting()
        total = slots.count * slots.context
        return Gauges(slots.count - slots.free(), waiting, slots.count, slots.used_tokens(), total)

    def step(self) -> bool:
        """End what is not wanted, admit what waits, run one batch; whether there was one to run."""
        began = perf_counter()
        self._sweep()
        self._admit()
        parts = self._plan()
        if parts:
            self._run(parts)
        self._flush()
        if parts:
            decodes = sum(part.size for part in parts if part.decodes)
            prefills = sum(part.size for part in parts) - decodes
            took = perf_counter() - began
            self.pace.record(decodes, prefills, took)
            self.observer.step(self._batch.native_s, took, decodes, prefills)
        return bool(parts)

    def end_all(self, error: Exception | None) -> None:
        """Nothing more is run, now or later: what runs or waits ends, with an error or as cancelled."""
        with self.change:
            self._closed = error or HaloError("The engine has stopped.", hint="start halo again")
            requests = self._queue.drop(lambda _: True)
        for request in [*requests, *(running.request for running in self._running)]:
            self._finish(request, "error" if error else "cancelled", error)
        for running in list(self._running):
            self._release(running)
        self._flush()

    def _flush(self) -> None:
        if self._events:
            events, self._events = self._events, []
            self.deliver(events)

    def _sweep(self) -> None:
        now = monotonic()
        with self.change:
            dropped = self._queue.drop(lambda request: _unwanted(request, now)) if self._queue else []
        for running in list(self._running):
            if _unwanted(running.request, now):
                dropped.append(running.request)
                self._release(running)
        for request in dropped:
            if request.cancelled() or request.ended:
                self._finish(request, "cancelled", None)
            else:
                error = DeadlinePassed("The request was not done within its time.", hint="ask for less")
                self._finish(request, "deadline", error)

    def _admit(self) -> None:
        while self._queue and self.slots.free():
            with self.change:
                busy = Counter(running.request.client for running in self._running)
                taken = self._queue.take(busy)
            if taken is None:
                return
            request, work = taken
            try:
                running = Running(request, work, self._tokenizer, self._stop_ids, self._context)
            except Exception as error:
                self._finish(request, "error", error)
                continue
            self._place(running)

    def _place(self, running: Running) -> None:
        """Give it a slot; where another is prefilling what it begins with, it waits to copy that."""
        slot = running.slot = self.slots.choose(running.prompt)
        own = self.slots.common(running.prompt)
        self.slots.take(slot)
        self.slots.cut(slot, 0 if running.scores_prompt else own[slot])
        for other in self._running:
            if other.prefilling and not running.scores_prompt:
                shared = common_length(other.prompt, running.prompt)
                if shared >= max(own) + WORTH and shared > running.shared and shared > other.filled:
                    running.leader, running.shared = other, shared
        self._running.append(running)

    def _begin(self, running: Running) -> None:
        """The prompt begins to run, behind what of it is there already."""
        running.begun = True
        running.leader = None
        request = running.request
        if not running.scores_prompt:
            slot = running.slot
            source, length = self.slots.source(slot, running.prompt)
            if source != slot:
                self._session.copy(source, slot, length)
                self.slots.hold(slot, 0, running.prompt[:length])
            running.filled = self.slots.lengths[slot]
            if running.work.seed_index == 0:
                request.cached_tokens += running.filled
        if request.timing.admitted is None:
            request.timing.admitted = now = monotonic()
            waited = now - request.timing.submitted
            self.observer.admitted(waited, len(running.prompt), running.filled)

    def _plan(self) -> list[Part]:
        for running in list(self._running):
            if running.ended or running.begun or running.waits():
                continue
            try:
                self._begin(running)
                if running.prompt_only and not running.scores_prompt:
                    self._say(running, running.prompt_done())
            except DeviceLost:
                raise
            except Exception as error:
                self._fail(running, error)
        wanted = [running for running in self._running if not running.request.behind()]
        self._draft(wanted)
        parts = [part for part in plan(wanted, self.pace) if self._prepared(part)]
        return [part for part in parts if not part.running.ended]

    def _prepared(self, part: Part) -> bool:
        if part.running.ended:
            return False
        if part.gives_token and part.running.sampler.constraint is not None:
            try:
                part.running.sampler.prepare()
            except Exception as error:
                self._fail(part.running, error)
                return False
        return True

    def _draft(self, few: Sequence[Running]) -> None:
        """Add drafts to what each runs next, where a few sequences decode and nothing else is to be done."""
        if not (self._speculation.limit and 0 < len(few) <= FEW) or any(one.prefilling for one in few):
            return
        drafters = [self._drafter(one) for one in few]
        rooms = [one.room() for one in few]
        costs = self._experience(few).costs(len(few))
        found = draft_together(drafters, rooms, self._speculation, costs)
        for one, drafts in zip(few, found, strict=True):
            one.next = [one.next[0], *drafts]

    def _drafter(self, running: Running) -> Drafter | None:
        if running.drafter is None and running.sampler.may_draft:
            known = self.slots.held(running.slot)
            running.drafter = self._experience([running]).drafter([*known, running.next[0]])
        return running.drafter

    def _experience(self, some: Sequence[Running]) -> Experience:
        """Drafts of greedy sequences are right at another rate, and their steps take another time."""
        return self._learned[all(one.greedy for one in some)]

    def _run(self, parts: list[Part]) -> None:
        for part in parts:
            self.slots.cut(part.running.slot, part.start)  # whatever happens now, what stood behind is gone
        began = perf_counter()
        try:
            choices = self._batch.run(parts)
        except DeviceLost:
            raise
        except Exception as error:
            if len(parts) == 1:
                self._fail(parts[0].running, error)
            else:  # whose fault it was shows when each runs alone; the native call has rewound them all
                for part in parts:
                    if not part.running.ended:
                        self._run([part])
            return
        if len(parts) <= FEW and all(part.decodes for part in parts):
            drafts = sum(part.size - 1 for part in parts)
            costs = self._experience([part.running for part in parts]).costs(len(parts))
            costs.record(drafts, perf_counter() - began)
        row = 0
        for part in parts:
            try:
                if part.running.ended:
                    pass  # another choice of its request has failed just now
                elif part.decodes:
                    self._decoded(part, choices, row)
                else:
                    self._prefilled(part, choices, row)
            except DeviceLost:
                raise
            except Exception as error:
                self._fail(part.running, error)
            row += part.wanted

    def _prefilled(self, part: Part, choices: Choices, row: int) -> None:
        running = part.running
        end = part.start + part.size
        self.slots.hold(running.slot, part.start, running.prompt[part.start : end])
        running.filled = end
        if running.scores_prompt:
            for k in range(part.wanted - part.gives_token):
                running.score(choices, row + k, part.start + k + 1)
        if end == len(running.prompt):
            self._say(running, running.prompt_done())
        if part.gives_token:
            self._take(running, [choices.token(row + part.wanted - 1)], choices, row + part.wanted - 1)

    def _decoded(self, part: Part, choices: Choices, row: int) -> None:
        """The tokens up to the first that is no draft; keys of wrong drafts are written over by the next."""
        running = part.running
        tokens = running.next
        kept = accept(tokens[1:], map(choices.token, range(row, row + part.size)))
        running.filled = part.start + len(kept)
        self.slots.hold(running.slot, part.start, tokens[: len(kept)])
        self.tally.count(part.size - 1, len(kept) - 1)
        self._take(running, kept, choices, row)

    def _take(self, running: Running, tokens: list[int], choices: Choices, row: int) -> None:
        """Tokens of the answer, whose logits are those of the rows from `row` on."""
        for at, token in enumerate(tokens):
            if running.drafter is not None:
                running.drafter.observe(token)
            step = running.take(token, choices, row + at)
            self._events.append((running.request, (running.work.index, step)))
            running.request.completion_tokens += not step.is_end
            if running.ended:
                break
        self._clock(running, at + 1)
        running.next = tokens[-1:]
        if running.ended:
            self._end(running, step)

    def _say(self, running: Running, events: Iterable[Prompt | Step]) -> None:
        for event in events:
            self._events.append((running.request, (running.work.index, event)))
            if isinstance(event, Step):
                self._end(running, event)

    def _clock(self, running: Running, count: int) -> None:
        timing, now = running.request.timing, monotonic()
        if timing.first_token is None:
            timing.first_token = now
            self.observer.first_token(now - timing.submitted)
            count -= 1
        if count:
            self.observer.token(now - (running.last_time or timing.first_token), count)
        timing.last_token = running.last_time = now

    def _end(self, running: Running, step: Step) -> None:
        request = running.request
        request.cut |= step.finish_reason == "length"
        request.left -= 1
        self._release(running)
        if not request.left:
            self._finish(request, "length" if request.cut else "stop", None)

    def _fail(self, running: Running, error: Exception) -> None:
        """This sequence cannot go on, and with it ends its request."""
        self.slots.cut(running.slot, 0)
        for one in [one for one in self._running if one.request is running.request]:
            self._release(one)
        self._finish(running.request, "error", error)

    def _release(self, running: Running) -> None:
        running.ended = True
        self._running.remove(running)
        self.slots.give_back(running.slot)

    def _finish(self, request: Request, reason: Reason, error: Exception | None) -> None:
        if request.ended:
            return
        request.ended = True
        self._events.append((request, error))
        took = monotonic() - request.timing.submitted
        self.observer.finished(reason, request.prompt_tokens, request.completion_tokens, took)


def put_each(events: list[Delivery]) -> None:
    """Deliver events where they are made."""
    for request, event in events:
        request.put(event)


def common_length(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """How many first tokens two prompts share, but for the last of the second."""
    most = min(len(one), len(other) - 1)
    differs = np.flatnonzero(one[:most] != other[:most])
    return int(differs[0]) if len(differs) else most


def _unwanted(request: Request, now: float) -> bool:
    if request.ended or request.cancelled():
        return True
    return request.deadline is not None and now >= request.deadline
