"""Open the engine in a thread while the server answers already, and close it at the end; it serves none."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from engine.errors import HaloError
from engine.server.asgi import App

if TYPE_CHECKING:
    from engine.server.early import EarlyModel
    from engine.server.metrics import Metrics
    from engine.server.runner import Runner
    from engine.server.serve import ServeOptions
    from engine.server.service import Service

GRACE_SECONDS: Final = 0.03  # for the first /health: NumPy's import alone holds the interpreter as long
SWITCH_SECONDS: Final = 0.0005  # how long the imports may hold the interpreter while /health is asked
CLOSE_SECONDS: Final = 20.0  # a load cannot be interrupted, and takes seconds at most


class Load:
    """The engine, its thread and its application; `error` where it could not be had. `start` it on a loop."""

    def __init__(self, options: ServeOptions, early: EarlyModel, metrics: Metrics) -> None:
        self._options, self._early, self._metrics = options, early, metrics
        self._thread: threading.Thread | None = None
        self.service: Service | None = None
        self.app: App | None = None
        self.error: Exception | None = None

    @property
    def runner(self) -> Runner | None:
        """What runs the engine, once it is there."""
        return self.service.runner if self.service else None

    def start(self, done: Callable[[], None]) -> None:
        """Begin; `done` is called on the running event loop when it is over."""
        loop = asyncio.get_running_loop()

        def run() -> None:
            try:
                self._open()
            except Exception as error:
                self.error = error
            try:
                loop.call_soon_threadsafe(done)
            except RuntimeError:
                return  # the loop has ended meanwhile: nobody waits

        self._thread = threading.Thread(target=run, name="halo-load", daemon=True)
        loop.call_later(GRACE_SECONDS, self._begin)

    def _begin(self) -> None:
        self._early.listening()
        if self._thread is not None:
            self._thread.start()

    def _open(self) -> None:
        """What only an answer needs is imported, and the model, which is being read meanwhile, waited for."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        from engine.generate import Engine
        from engine.server.app import inner_app
        from engine.server.request_stats import StatsObserver
        from engine.server.runner import DEFAULT_QUEUE_LIMIT, Runner
        from engine.server.service import Service

        sys.setswitchinterval(before)  # the runner sets its own
        options = self._options
        engine = Engine.open(
            self._early.home.model_dir,
            threads=options.threads,
            speculation=options.speculation,
            slots=options.slots,
            model=self._early.result(),
        )
        try:
            stats = StatsObserver(self._metrics)
            runner = Runner(engine, options.queue_limit or DEFAULT_QUEUE_LIMIT, stats)
            home, now = self._early.home, int(time.time())
            service = Service(engine, runner, home, now, stats, options.npu, options.deadline)
            self.app = inner_app(service, self._metrics)
            runner.start()
        except BaseException:
            engine.close()
            raise
        self.service = service

    def close(self) -> None:
        """End the engine's thread and close the engine."""
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)
        if self.service is not None:
            self.service.runner.stop()
            self.service.engine.close()

    def raise_error(self) -> None:
        """Raise what the load failed with, if it did; a bug of ours stays one."""
        if self.error is not None:
            raise self.error

    def lost(self) -> HaloError | None:
        """Why the engine answers no more."""
        return self.runner.lost if self.runner else None

    def useless(self) -> bool:
        """Whether the server may as well end: the load failed, or the device is lost."""
        return self.error is not None or self.lost() is not None
