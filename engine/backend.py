"""The native engine from Python: ctypes over `engine/native/halo.h`. Not a sampler and not a scheduler.

Nothing is loaded before `NativeModel.open`; NumPy is imported by the calls that make arrays. Which library is
taken: engine/device.py. Environment: HALO_CPU_PATH (scalar, avx2, avx512, avx512vbmi, neon, neondot: forces
a CPU path), HALO_GPU_PATH (graph, eager: how a step is put on a GPU), HALO_THREADS (threads of a session),
HALO_KV (form of the KV cache).
"""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from engine.device import Backend, RawConfig, check, choose_backend, open_backend, read_facts
from engine.errors import HaloError
from engine.model import ACTIVATIONS, ModelConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RUN_ARGMAX: Final = 1
KV_FORMS: Final = ("f32", "f16", "int8", "rotor3")  # of a KV cache; engine/kv_forms.py defines them
DEFAULT_KV: Final = "int8"  # the library's own; docs/kv-cache.md says why
_OPAQUE = ctypes.c_void_p


def _thread_count(threads: int | None) -> int:
    if threads is not None:
        return threads
    text = os.environ.get("HALO_THREADS", "0")
    if not text.isdecimal():
        raise HaloError(
            f"HALO_THREADS is {text!r}, not a number.", hint="unset HALO_THREADS, or set it to 1 or more"
        )
    return int(text)


def check_kv_form(form: str, head_dim: int) -> None:
    """Raise HaloError unless `form` is one of KV_FORMS that holds heads of this size."""
    if form not in KV_FORMS:
        raise HaloError(
            f"{form[:40]!r} is no form of the KV cache.", hint=f"choose one of {', '.join(KV_FORMS)}"
        )
    if form == "rotor3" and not (32 <= head_dim <= 1024 and head_dim & (head_dim - 1) == 0):
        raise HaloError(
            f"The KV form rotor3 needs heads of 32, 64, 128 ... 1024 elements, not {head_dim}.",
            hint="choose int8, or unset HALO_KV",
        )


def _kv_form(kv: str | None, head_dim: int) -> str | None:
    form = kv or os.environ.get("HALO_KV") or None
    if form is not None:
        check_kv_form(form, head_dim)
    return form


class _Closing(ABC):
    """What holds a handle of the library: closed at the end of a `with` block, or when it is collected."""

    _handle: ctypes.c_void_p

    @abstractmethod
    def close(self) -> None:
        """Give the handle back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self.close()


class NativeModel(_Closing):
    """A prepared model, mapped. Close it, or use it as a context manager; its sessions may outlive it."""

    def __init__(self, backend: Backend, path: Path) -> None:
        library = self._library = backend.library
        self.backend = backend
        self._handle = _OPAQUE()
        self.path = path
        check(library, library.halo_model_open(os.fsencode(path), ctypes.byref(self._handle)))
        raw = RawConfig()
        check(library, library.halo_model_config(self._handle, ctypes.byref(raw)))
        values = {name: getattr(raw, name) for name, *_ in RawConfig._fields_}
        values["activation"] = ACTIVATIONS[raw.activation]
        flags = {name: bool(values[name]) for name in ("tie_embeddings", "sub_norms")}
        self.config = ModelConfig(**{**values, **flags})

    @classmethod
    def open(cls, path: Path, library: Path | None = None) -> NativeModel:
        """Map the prepared file at `path` with the given library, else with the backend of this machine."""
        return cls(open_backend(library) if library else choose_backend(), Path(path))

    @property
    def facts(self) -> dict[str, Any]:
        """backend, backend_reason, abi, isa, threads and what else the library says of its device.

        isa and threads are what a session will use by default.
        """
        facts = self.backend.facts()
        if self.backend.name == "cpu":
            facts["isa"] = os.environ.get("HALO_CPU_PATH") or facts["isa"]
        facts["threads"] = _thread_count(None) or facts.get("cpus", 1)
        return facts

    def session(
        self,
        slots: int = 1,
        context: int | None = None,
        threads: int | None = None,
        path: str | None = None,
        kv: str | None = None,
    ) -> Session:
        """A session of `slots` sequences of up to `context` tokens (default: the model's most).

        `threads` defaults to HALO_THREADS, else one per CPU; `path` to HALO_CPU_PATH or, on a GPU,
        HALO_GPU_PATH, else the best; `kv` (one of KV_FORMS) to HALO_KV, else to DEFAULT_KV.
        """
        if not self._handle:
            raise HaloError("The model is closed.", hint="open it again")
        variable = "HALO_CPU_PATH" if self.backend.name == "cpu" else "HALO_GPU_PATH"
        path = path or os.environ.get(variable) or None
        form = _kv_form(kv, self.config.head_dim)
        handle = _OPAQUE()
        room = context if context is not None else self.config.max_seq_len
        status = self._library.halo_session_create(
            self._handle,
            slots,
            room,
            _thread_count(threads),
            path.encode() if path else None,
            form.encode() if form else None,
            ctypes.byref(handle),
        )
        check(self._library, status)
        return Session(self._library, handle, self.config, slots, room)

    def close(self) -> None:
        """Give the handle back; calling it twice does nothing."""
        if self._handle:
            self._library.halo_model_close(self._handle)
            self._handle = _OPAQUE()


class Drawn(NamedTuple):
    """A drawn token, and the (ids, logits) near it; None where they were not asked for, or are too many."""

    token: int
    ids: NDArray[np.int32] | None = None
    logits: NDArray[np.float32] | None = None


class _Entries:
    """Where the library reads the entries of a run, and writes ids; taken once for many runs."""

    def __init__(self, room: int) -> None:
        import numpy as np

        self.room = room
        self._rows, self._want = np.zeros((4, room), np.int32), np.zeros(room, np.bool_)
        self.inputs = (*(row.ctypes.data for row in self._rows[:3]), self._want.ctypes.data)
        self.ids = self._rows[3].ctypes.data
        self.count = self.wanted = 0

    def put(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[bool]
    ) -> None:
        """Take the entries of a run; HaloError for numbers that cannot be theirs."""
        n = self.count = len(tokens)
        rows = self._rows
        try:
            rows[0, :n], rows[1, :n], rows[2, :n] = tokens, slots, positions
        except OverflowError as error:
            raise HaloError(
                "A token, slot or position is out of range.", hint="all are small numbers"
            ) from error
        self._want[:n] = want
        self.wanted = int(self._want[:n].sum())

    def read_ids(self) -> list[int]:
        """The ids that the library has written, one a wanted entry."""
        ids: list[int] = self._rows[3, : self.wanted].tolist()
        return ids


class Session(_Closing):
    """KV slots and the forward pass over them. One thread at a time; made by `NativeModel.session`."""

    def __init__(
        self, library: ctypes.CDLL, handle: ctypes.c_void_p, config: ModelConfig, slots: int, context: int
    ) -> None:
        self._library, self._handle = library, handle
        self.config, self.slots, self.context = config, slots, context
        self._spare: list[_Entries] = []  # no run uses them now

    @property
    def facts(self) -> dict[str, Any]:
        """isa, threads, slots, context, kv and kv_bytes of this session."""
        return read_facts(self._library, "halo_session_facts", self._open())

    def run(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[bool]
    ) -> NDArray[np.float32]:
        """Run entries (token, slot, position) in order; logits float32 [number wanted, vocab] of those
        wanted.

        Positions of a slot are filled in order; a lower one rewinds the slot. Raises HaloError for a token,
        slot or position out of range, and then nothing has run.
        """
        import numpy as np

        entries = self._entries(tokens, slots, positions, want)
        logits = np.empty((entries.wanted, self.config.vocab_size), dtype=np.float32)
        self._run(entries, 0, logits.ctypes.data, logits.size, None, 0)
        self._spare.append(entries)
        return logits

    def run_argmax(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[bool]
    ) -> list[int]:
        """As `run`, but only the arg max of each wanted entry (the lowest id on a tie)."""
        entries = self._entries(tokens, slots, positions, want)
        self._run(entries, RUN_ARGMAX, None, 0, entries.ids, entries.room)
        ids = entries.read_ids()
        self._spare.append(entries)
        return ids

    def run_draw(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        want: Sequence[bool],
        noise: NDArray[np.float32],
        depth: float = 0.0,
        room: int = 0,
    ) -> list[Drawn]:
        """As `run`, but of each wanted entry the token of the largest logit + noise (the lowest id on a tie).

        noise: float32 [number wanted, vocab]. With `room`, what is near comes along: every token whose logit
        is at least the winner's, or within `depth` of one of the largest. Every other is certainly below.
        """
        import numpy as np

        entries = self._entries(tokens, slots, positions, want)
        wanted = entries.wanted
        rows = np.ascontiguousarray(noise, dtype=np.float32)
        if rows.shape != (wanted, self.config.vocab_size):
            raise HaloError(
                "noise has the wrong shape.", hint="one row of the vocabulary's size a wanted entry"
            )
        winners, found = np.empty((2, wanted), dtype=np.int32)
        ids = np.empty((wanted, room), dtype=np.int32)
        logits = np.empty((wanted, room), dtype=np.float32)
        check(
            self._library,
            self._library.halo_session_draw(
                self._open(), entries.count, *entries.inputs, rows.ctypes.data, depth, room, wanted,
                *(array.ctypes.data for array in (winners, found, ids, logits)),
            ),
        )  # fmt: skip
        self._spare.append(entries)
        counts = zip(winners.tolist(), found.tolist(), strict=True)
        return [
            Drawn(token, *((ids[k, :n], logits[k, :n]) if n >= 0 else ()))
            for k, (token, n) in enumerate(counts)
        ]

    def logits_again(self, index: int) -> NDArray[np.float32]:
        """All logits [vocab] of the last run's wanted entry number `index`, if it had at most 96 entries."""
        import numpy as np

        logits = np.empty(self.config.vocab_size, dtype=np.float32)
        status = self._library.halo_session_logits(self._open(), index, logits.ctypes.data, logits.size)
        check(self._library, status)
        return logits

    def copy(self, source: int, target: int, length: int) -> None:
        """Let slot `target` hold the first `length` tokens of slot `source`, as if it had run them."""
        check(self._library, self._library.halo_session_copy(self._open(), source, target, length))

    def prefill(self, slot: int, tokens: Sequence[int], start: int = 0) -> NDArray[np.float32]:
        """Run `tokens` of one slot at positions start, start+1, ...; the logits of the last, [vocab]."""
        if not tokens:
            raise HaloError("There is nothing to prefill.", hint="begin with the model's bos token")
        count = len(tokens)
        want = [False] * (count - 1) + [True]
        last: NDArray[np.float32] = self.run(tokens, [slot] * count, range(start, start + count), want)[0]
        return last

    def _run(self, entries: _Entries, flags: int, *results: int | None) -> None:
        status = self._library.halo_session_run(self._open(), entries.count, *entries.inputs, flags, *results)
        check(self._library, status)

    def _entries(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[bool]
    ) -> _Entries:
        """The entries of a run, in memory that no other run uses: a second thread's is refused, no more."""
        n = len(tokens)
        if not len(slots) == len(positions) == len(want) == n:
            raise HaloError(
                "tokens, slots, positions and want have different lengths.", hint="one of each an entry"
            )
        try:
            entries = self._spare.pop()
        except IndexError:
            entries = _Entries(max(n, 128))
        if entries.room < n:
            entries = _Entries(n)
        entries.put(tokens, slots, positions, want)
        return entries

    def _open(self) -> ctypes.c_void_p:
        if not self._handle:
            raise HaloError("The session is closed.", hint="make a new one")
        return self._handle

    def close(self) -> None:
        """Give the memory back; calling it twice does nothing."""
        if self._handle:
            self._library.halo_session_close(self._handle)
            self._handle = _OPAQUE()
