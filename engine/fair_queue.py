"""Requests that wait for slots, fair between clients: who has the fewest slots comes next, else in turns."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping

from engine.request import Request, Work


class FairQueue:
    """A line for each client. Not for two threads at once: the scheduler's lock is around it."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Request]] = OrderedDict()

    def __iter__(self) -> Iterator[Request]:
        return (request for line in self._lines.values() for request in line)

    def __bool__(self) -> bool:
        return bool(self._lines)

    def waiting(self) -> int:
        """Requests no choice of which has had a slot yet, and that are still wanted."""
        return sum(not (request.admitted or request.cancelled()) for request in self)

    def put(self, request: Request) -> None:
        """At the end of its client's line."""
        self._lines.setdefault(request.client, deque()).append(request)

    def take(self, slots_of: Mapping[str, int]) -> tuple[Request, Work] | None:
        """The next choice to run, given how many slots each client has; its client goes to the end.

        Of clients with equally few, the one that has waited longest since its last turn.
        """
        if not self._lines:
            return None
        client = min(self._lines, key=lambda name: slots_of.get(name, 0))
        line = self._lines[client]
        request = line[0]
        work = request.works[request.admitted]
        request.admitted += 1
        self._lines.move_to_end(client)
        if request.admitted == len(request.works):
            line.popleft()
            if not line:
                del self._lines[client]
        return request, work

    def drop(self, unwanted: Callable[[Request], bool]) -> list[Request]:
        """Take out the unwanted ones."""
        dropped = [request for request in self if unwanted(request)]
        if dropped:
            gone = set(map(id, dropped))
            for client, line in list(self._lines.items()):
                kept = deque(request for request in line if id(request) not in gone)
                if kept:
                    self._lines[client] = kept
                else:
                    del self._lines[client]
        return dropped
