"""Open the native model in a thread from the first moment on, while what serves is imported; no more.

The seal is checked first (engine/formats/seal.py), in milliseconds; then the library reads the whole file,
checks every byte of it and copies what is hot, in seconds for a model of gigabytes, whose turn comes when the
server listens. The interpreter is free meanwhile. Nothing heavy is imported here.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine.locate import Home, ModelCard, locate, read_card

if TYPE_CHECKING:
    from engine.backend import NativeModel

AT_ONCE: Final = 64 << 20  # bytes that are read in the time of the imports; reading more would hold them up


class EarlyModel:
    """A model that is being opened. `result` waits for it; a refusal is raised there, and by `sealed`."""

    def __init__(self, model: Path | None) -> None:
        self.home: Home = locate(model)
        self.card: ModelCard = read_card(self.home.model_dir)
        self._model: NativeModel | None = None
        self._error: Exception | None = None
        self._seal, self._listening = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="halo-model", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            from engine.formats.seal import PREPARED, check_open

            check_open(self.home.model_dir)
            self._seal.set()
            from engine.backend import NativeModel

            path = self.home.model_dir / PREPARED
            if path.stat().st_size > AT_ONCE:
                self._listening.wait()
            self._model = NativeModel.open(path)
        except Exception as error:
            self._error = error
        finally:
            self._seal.set()

    def sealed(self) -> None:
        """Wait until the seal is checked; raises what is wrong with it."""
        self._seal.wait()
        if self._error is not None:
            raise self._error

    def listening(self) -> None:
        """The server listens: a large model may take the processors now."""
        self._listening.set()

    def mapped(self) -> bool:
        """Whether the model is in memory, every byte of it checked."""
        return self._model is not None

    def result(self) -> NativeModel:
        """The model, waited for; raises why there is none."""
        self._listening.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._model is not None
        return self._model
