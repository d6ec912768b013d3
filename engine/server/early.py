"""Open the native model in a thread from the first moment on, while what serves is imported; no more.

The seal is checked first (engine/formats/seal.py), in milliseconds; then the library reads the whole file,
checks every byte of it and copies what is hot, in seconds for a model of gigabytes. The interpreter is free
meanwhile. Nothing heavy is imported here.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from engine.locate import Home, ModelCard, locate, read_card

if TYPE_CHECKING:
    from engine.backend import NativeModel


class EarlyModel:
    """A model that is being opened. `result` waits for it; a refusal is raised there, and by `sealed`."""

    def __init__(self, model: Path | None) -> None:
        self.home: Home = locate(model)
        self.card: ModelCard = read_card(self.home.model_dir)
        self._model: NativeModel | None = None
        self._error: Exception | None = None
        self._seal = threading.Event()
        self._thread = threading.Thread(target=self._run, name="halo-model", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            from engine.formats.seal import PREPARED, check_open

            check_open(self.home.model_dir)
            self._seal.set()
            from engine.backend import NativeModel

            self._model = NativeModel.open(self.home.model_dir / PREPARED)
        except Exception as error:
            self._error = error
        finally:
            self._seal.set()

    def sealed(self) -> None:
        """Wait until the seal is checked; raises what is wrong with it."""
        self._seal.wait()
        if self._error is not None:
            raise self._error

    def mapped(self) -> bool:
        """Whether the model is in memory, every byte of it checked."""
        return self._model is not None

    def result(self) -> NativeModel:
        """The model, waited for; raises why there is none."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._model is not None
        return self._model
