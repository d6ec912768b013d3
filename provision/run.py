"""The one door to every subprocess: argv lists, minimal environment, stdin closed, everything logged."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from engine.errors import HaloError

_KEPT: Final = ("HOME", "USER", "LOGNAME", "PATH", "TMPDIR", "DBUS_SESSION_BUS_ADDRESS", "SOURCE_DATE_EPOCH")
_KEPT_PREFIXES: Final = ("PIP_", "XDG_", "SSL_CERT_", "REQUESTS_CA_", "HALO_")
_KEPT_PROXIES: Final = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")
_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None)


class Log:
    """The full record of a run. Without a path (a dry run) nothing is written anywhere."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._stream: TextIO | None = None
        if path is not None:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._stream = os.fdopen(fd, "a", encoding="utf-8", errors="replace")

    @classmethod
    def open(cls, directory: Path, name: str) -> Log:
        """A log in `directory`, or in the temporary directory when that cannot be written."""
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        try:
            directory.mkdir(parents=True, exist_ok=True)
            return cls(directory / f"{name}-{stamp}-{os.getpid()}.log")
        except OSError:
            return cls.temporary(name)

    @classmethod
    def temporary(cls, name: str) -> Log:
        """A log in the temporary directory; without room for one, no log rather than no run."""
        try:
            fd, path = tempfile.mkstemp(prefix=f"halo-{name}-", suffix=".log")
        except OSError:
            return cls(None)
        os.close(fd)
        return cls(Path(path))

    def write(self, text: str) -> None:
        """Append a line with its time. A full disk does not end a run for want of a log."""
        if self._stream is None:
            return
        stamp = datetime.datetime.now(datetime.UTC).strftime("%H:%M:%S.%f")[:-3]
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(f"{stamp} {text.rstrip()}\n")
            self._stream.flush()

    def close(self) -> None:
        """Close the file; later lines are dropped."""
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
            self._stream = None


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether it exited with 0."""
        return self.returncode == 0

    def last_line(self) -> str:
        """The last thing it said: stderr before stdout; what a person needs first."""
        lines = [
            line
            for text in (self.stderr, self.stdout)
            for line in reversed(text.splitlines())
            if line.strip()
        ]
        return lines[0].strip() if lines else ""


def minimal_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """What children are given: no CC, CFLAGS, PYTHON* or LD_* of the caller's shell."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT or name.startswith(_KEPT_PREFIXES) or name.lower() in _KEPT_PROXIES
    }
    env.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    env["LANG"] = env["LC_ALL"] = "C.UTF-8"
    env["PYTHONNOUSERSITE"] = "1"
    runtime = Path(f"/run/user/{os.getuid()}")
    if "XDG_RUNTIME_DIR" not in env and runtime.is_dir():
        env["XDG_RUNTIME_DIR"] = str(runtime)
    env.update(extra or {})
    return env


def _die_with_parent() -> None:
    # An installer that is killed must not leave a pip behind that writes into a directory being rebuilt.
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run(
    argv: Sequence[str | Path],
    *,
    log: Log | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 900,
    stdin: str | None = None,
    tick: Callable[[], None] | None = None,
    check: bool = True,
    what: str = "",
    hint: str = "",
) -> Result:
    """Run `argv` to its end and return how it ended.

    With `check` a failure is a HaloError whose sentence starts with `what`. A command that outlives `timeout`
    seconds is killed with its whole process group and counts as failed with code 124.
    """
    command = [str(part) for part in argv]
    journal = log or Log()
    journal.write(f"$ {shlex.join(command)}" + (f"   (in {cwd})" if cwd else ""))
    started = time.monotonic()
    try:
        result = _communicate(command, cwd, minimal_env(env), timeout, stdin, tick, started)
    except FileNotFoundError:
        result = Result(tuple(command), 127, "", f"{command[0]}: not found", time.monotonic() - started)
    except PermissionError:
        result = Result(
            tuple(command), 126, "", f"{command[0]}: cannot be executed", time.monotonic() - started
        )
    for line in (*result.stdout.splitlines(), *result.stderr.splitlines()):
        journal.write(f"| {line}")
    journal.write(f"= {result.returncode} after {result.seconds:.1f} s")
    if check and not result.ok:
        raise failure(result, what=what, hint=hint)
    return result


def _communicate(
    command: list[str],
    cwd: Path | None,
    env: dict[str, str],
    timeout: float,
    stdin: str | None,
    tick: Callable[[], None] | None,
    started: float,
) -> Result:
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=env,
        stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=_die_with_parent,  # noqa: PLW1509  # one prctl, no locks taken
    ) as process:
        try:
            while True:
                try:
                    out, err = process.communicate(stdin, timeout=0.5)
                    return Result(tuple(command), process.returncode, out, err, time.monotonic() - started)
                except subprocess.TimeoutExpired:
                    stdin = None
                    if tick is not None:
                        tick()
                    if time.monotonic() - started > timeout:
                        _kill_group(process)
                        out, err = process.communicate()
                        err += f"\nkilled: still running after {timeout:.0f} s"
                        return Result(tuple(command), 124, out, err, time.monotonic() - started)
        except BaseException:
            _kill_group(process)
            raise


def _kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def failure(result: Result, *, what: str = "", hint: str = "") -> HaloError:
    """The error for a command that failed: one sentence, and a command that can be pasted."""
    pasteable = shlex.join(result.argv)
    if "No space left on device" in result.stderr + result.stdout:
        return HaloError(
            f"{what or 'A command failed'}: the disk is full.", hint="df -h; then make room and run it again"
        )
    said = result.last_line()
    sentence = what or f"{Path(result.argv[0]).name} failed"
    code = "" if result.returncode in (126, 127) else f" (exit {result.returncode})"
    message = f"{sentence}{code}" + (f": {said}" if said else ".")
    return HaloError(message, hint=hint or f"the same by hand: {pasteable}")
