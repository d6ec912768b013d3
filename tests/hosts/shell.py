"""The one door to subprocesses of the test hosts: argument lists only, output kept, failures told whole."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """What a command did: exit code, both outputs as text, and its wall time in seconds."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str
    seconds: float

    def __str__(self) -> str:
        return (
            f"$ {' '.join(self.argv)}\nexit {self.code} after {self.seconds:.1f} s\n"
            f"--- stdout\n{self.out[-6000:]}\n--- stderr\n{self.err[-6000:]}"
        )


class CommandFailed(AssertionError):
    """A command that had to succeed did not; the message holds all of its output."""


def run(
    argv: Sequence[str | Path],
    *,
    check: bool = True,
    stdin: bytes | None = None,
    timeout: float = 600,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> Result:
    """Run argv to its end. With `check`, a non-zero exit code raises CommandFailed."""
    words = tuple(str(word) for word in argv)
    start = time.monotonic()
    done = subprocess.run(
        words,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        timeout=timeout,
        env=env,
        cwd=cwd,
        check=False,
    )
    result = Result(
        words,
        done.returncode,
        done.stdout.decode(errors="replace"),
        done.stderr.decode(errors="replace"),
        time.monotonic() - start,
    )
    if check and result.code != 0:
        raise CommandFailed(str(result))
    return result
