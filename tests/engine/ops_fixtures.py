"""A server in this process with all that stands around it, on a real socket: metrics, log, origins, keys."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from engine.generate import Engine
from engine.locate import Home
from engine.server.access import LineWriter
from engine.server.app import inner_app
from engine.server.front import guarded
from engine.server.metrics import Metrics
from engine.server.request_stats import StatsObserver
from engine.server.runner import Runner
from engine.server.serve import HaloServer, announcement
from engine.server.service import Service
from engine.server.sockets import bind
from tests.engine.server_fixtures import wait_until


@dataclass
class Operated:
    """A server that answers on loopback, and the file of its access log."""

    url: str
    port: int
    service: Service
    log: Path

    def lines(self, count: int) -> list[dict]:
        """The log's lines once there are so many."""
        wait_until(lambda: len(self.log.read_bytes().splitlines()) >= count)
        return [json.loads(line) for line in self.log.read_bytes().splitlines()]


@contextlib.contextmanager
def operated(
    engine: Engine,
    folder: Path,
    *,
    digests: list[bytes] | None = None,
    origins: tuple[str, ...] = (),
    queue_limit: int = 32,
) -> Iterator[Operated]:
    """Serve `engine` on a free loopback port, as `halo serve` does once its model is loaded."""
    metrics = Metrics()
    stats = StatsObserver(metrics)
    home = Home(generation_dir=None, model_dir=Path(), generation="test-generation", version="9.9")
    service = Service(engine, Runner(engine, queue_limit, stats), home, 1, stats)
    log = folder / "access.jsonl"
    fd = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    writer = LineWriter(fd)
    app = guarded(
        inner_app(service, metrics), digests=digests, origins=origins, writer=writer, count=metrics.request
    )
    sockets = bind("127.0.0.1", 0)
    port = sockets[0].getsockname()[1]
    server = HaloServer(app, announcement(service, sockets))
    service.runner.start()
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Operated(f"http://127.0.0.1:{port}", port, service, log)
    finally:
        server.should_exit = True
        service.runner.stop()
        thread.join(20)
        writer.close()
        os.close(fd)


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of an exposition by name and labels, less model_name; prometheus_client parses it."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "model_name"))
            assert (sample.name, labels) not in found, f"{sample.name} {labels} twice"
            found[sample.name, labels] = sample.value
    return found
