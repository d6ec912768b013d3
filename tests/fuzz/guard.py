"""What one input may take of time and memory, and the faults that inputs have shown, each once."""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import time
import traceback
from pathlib import Path
from typing import Any

from tests.fuzz.target import Target

PER_BYTE = 16  # bytes of memory that one byte of an input may cost
FREE = 64 << 20  # and what any input may
ADDRESSES = 6 << 30  # bytes of address space: an allocation beyond fails, and is a fault


class Hang(BaseException):
    """An input took many times what it may; no `except Exception` of a parser takes it for its own."""


def _hang(_signal: int, _frame: object) -> None:
    raise Hang("it goes on and on")


class Guard:
    """Runs inputs of one target, and keeps count. `folder` is scratch, `kept` gets state and faults."""

    def __init__(self, target: Target, folder: Path, kept: Path, fuzzer: str) -> None:
        self.target, self.folder, self.kept = target, folder, kept
        self.path = kept / f"{target.name}.json"
        self.state: dict[str, Any] = {
            "target": target.name,
            "fuzzer": fuzzer,
            "cpu": 0.0,
            "runs": 0,
            "read": 0,
        }
        self.state |= {"slowest": 0.0, "faults": {}, "starts": 0}
        if self.path.exists():
            self.state |= json.loads(self.path.read_text())
        self.state["starts"] += 1
        self._before = self.state["cpu"] - time.process_time()
        self._written = 0.0
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        signal.signal(signal.SIGPROF, _hang)

    @property
    def cpu(self) -> float:
        """Seconds of CPU time in all runs of this target."""
        return float(self._before + time.process_time())

    def run(self, data: bytes) -> None:
        """One input; a fault is written down, and the fuzzing goes on."""
        before, start = _peak(), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, 5 * self.target.seconds)
        try:
            self.state["read"] += self.target(data, self.folder)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self._fault(_place(error), data)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        took, grown = time.process_time() - start, _peak() - before
        self.state["runs"] += 1
        self.state["slowest"] = max(self.state["slowest"], took)
        if took > self.target.seconds:
            self._fault(f"slow: more than {self.target.seconds} s", data)
        if grown > max(FREE, PER_BYTE * self.target.expanded(data)):
            self._fault(f"memory: {grown >> 20} MiB for {len(data)} bytes", data)
        if start - self._written > 2:
            self._written = start
            self.save()

    def save(self) -> None:
        """Write the counts down."""
        self.state["cpu"] = self.cpu
        self.path.with_suffix(".tmp").write_text(json.dumps(self.state, indent=1))
        self.path.with_suffix(".tmp").replace(self.path)

    def _fault(self, what: str, data: bytes) -> None:
        faults = self.state["faults"]
        faults[what] = faults.get(what, 0) + 1
        name = f"{self.target.name}-{hashlib.sha256(what.encode()).hexdigest()[:10]}"
        path = self.kept / "faults" / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or len(data) < path.stat().st_size:  # the shortest input for each fault
            path.write_bytes(data)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _place(error: BaseException) -> str:
    """The exception's kind and where it came out of this repository's own code."""
    root = str(Path(__file__).parents[2])
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(root)]
    own = [f for f in frames if "/tests/" not in f.filename] or frames
    where = f"{Path(own[-1].filename).relative_to(root)}:{own[-1].lineno}" if own else "?"
    return (
        f"{type(error).__name__} at {where}: {str(error)[:120]}"
        if not own
        else f"{type(error).__name__} at {where}"
    )
