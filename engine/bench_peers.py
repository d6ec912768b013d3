"""Other engines' own benchmarks, run for `halo bench`, and every child process of it. None is built here.

A peer is llama.cpp's `llama-bench`, or a fork's, given by its path; where its `llama-batched-bench` lies
beside it, decoding at a context and in batches is measured with that. Both say what they measured:
llama-bench as JSON (`-o json`), llama-batched-bench as a table.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from engine.errors import EXIT_COULD_NOT_RUN, HaloError

BATCHED: Final = "llama-batched-bench"
MOST_OUTPUT: Final = 16 << 20  # bytes that a child may print
_POLL: Final = 0.02  # seconds
_GRACE: Final = 3.0  # seconds from SIGTERM to SIGKILL
_ROW: Final = re.compile(
    r"^[ \t]*\|((?:[ \t]*\d{1,12}(?:\.\d{1,12})?[ \t]*\|){10})[ \t]*$", re.MULTILINE | re.ASCII
)
# What of llama-bench's record says which program ran; forks leave some out.
_FACTS: Final = ("build_commit", "build_number", "cpu_info", "model_type", "model_size", "model_n_params")


@dataclass(frozen=True)
class Finished:
    """What a child printed, its exit status (negative: a signal) and the most memory it held, in bytes."""

    stdout: str
    stderr: str
    status: int
    peak_bytes: int


@dataclass(frozen=True)
class Peer:
    """An engine to compare with. `command` ends with the path of its llama-bench; `env` before it is fine."""

    name: str
    command: tuple[str, ...]
    model: Path
    arguments: tuple[str, ...] = ()
    batched_arguments: tuple[str, ...] = ()

    @property
    def batched(self) -> tuple[str, ...] | None:
        """The command of the llama-batched-bench that lies beside the llama-bench; None if there is none."""
        path = Path(self.command[-1]).parent / BATCHED
        return (*self.command[:-1], str(path)) if os.access(path, os.X_OK) else None


@dataclass(frozen=True)
class PeerRates:
    """Tokens a second, and what the program said of itself."""

    prefill: float | None
    decode: float | None
    facts: dict[str, Any]
    peak_bytes: int


def parse_peer(
    text: str, models: Mapping[str, str], arguments: Mapping[str, str], batched: Mapping[str, str]
) -> Peer:
    """The peer of `NAME=COMMAND`. HaloError unless its program can be executed and its model is a file."""
    name, _, command = text.partition("=")
    words = _words(name, command)
    if not name or not words:
        raise _misused(f"--peer is {text!r}, not NAME=EXECUTABLE.", "--peer other=/path/to/llama-bench")
    for word in {words[0], words[-1]}:
        if shutil.which(word) is None:
            raise _misused(f"The peer {name} cannot be executed: {word}.", f"ls -l {shlex.quote(word)}")
    if name not in models:
        raise _misused(f"The peer {name} has no model.", f"--peer-model {name}=FILE")
    model = Path(models[name])
    if not model.is_file():
        raise _misused(f"The peer {name}'s model {model} is no file.", f"ls -l {shlex.quote(str(model))}")
    extra, more = _words(name, arguments.get(name, "")), _words(name, batched.get(name, ""))
    # A child runs in a directory of its own, so a path must hold from anywhere.
    program = str(Path(shutil.which(words[-1]) or words[-1]).absolute())
    return Peer(name, (*words[:-1], program), model.absolute(), extra, more)


def _words(name: str, text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise _misused(
            f"The words given for the peer {name} have an open quote: {text}.", "close it"
        ) from error


def _misused(message: str, hint: str) -> HaloError:
    return HaloError(message, hint=hint, exit_code=EXIT_COULD_NOT_RUN)


def identity(peer: Peer) -> dict[str, Any]:
    """What of a peer is known before it runs: command, the program's SHA-256, model, arguments."""
    with Path(peer.command[-1]).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "command": list(peer.command),
        "sha256": digest,
        "model": str(peer.model),
        "model_bytes": peer.model.stat().st_size,
        "arguments": list(peer.arguments),
        "batched_arguments": list(peer.batched_arguments),
        "decode_by": BATCHED if peer.batched else "llama-bench",
    }


def run_bench(
    peer: Peer, *, threads: int, prompt: int, tokens: int, timeout: float, prefix: Sequence[str] = ()
) -> PeerRates:
    """One llama-bench: prefill of `prompt` tokens, decode of `tokens` from an empty context (0: neither)."""
    argv = [*prefix, *peer.command, "-m", str(peer.model), "-t", str(threads)]
    argv += ["-p", str(prompt), "-n", str(tokens), "-r", "1", "-o", "json", *peer.arguments]
    done = run_child(argv, timeout=timeout)
    rates = read_bench(peer.name, argv, done)
    if (prompt and rates.prefill is None) or (tokens and rates.decode is None):
        raise _strange(peer.name, argv, done, "it left out what it was asked for")
    return rates


def read_bench(name: str, argv: Sequence[str], done: Finished) -> PeerRates:
    """What a llama-bench printed. HaloError unless it ended well and said so as JSON."""
    records = _records(name, argv, done)
    rates = dict(_rate(name, argv, done, record) for record in records)
    facts: dict[str, Any] = {key: records[0][key] for key in _FACTS if key in records[0]}
    return PeerRates(rates.get(True), rates.get(False), facts, done.peak_bytes)


def _records(name: str, argv: Sequence[str], done: Finished) -> list[dict[str, Any]]:
    """The JSON array in llama-bench's output; forks print warnings around it."""
    start, end = done.stdout.find("["), done.stdout.rfind("]")
    try:
        records = [] if done.status else json.loads(done.stdout[start : end + 1])
    except (ValueError, RecursionError):
        records = []
    if not isinstance(records, list) or not records or not all(isinstance(r, dict) for r in records):
        raise _strange(name, argv, done, "its output is not llama-bench's JSON")
    return records


def _rate(name: str, argv: Sequence[str], done: Finished, record: dict[str, Any]) -> tuple[bool, float]:
    """Whether a record is of a prefill, and its tokens a second."""
    prompt, tokens = record.get("n_prompt"), record.get("n_gen")
    try:
        rate = float(record["avg_ts"])
    except (KeyError, TypeError, ValueError, OverflowError):
        rate = math.nan
    counted = isinstance(prompt, int) and isinstance(tokens, int) and (prompt > 0) != (tokens > 0)
    if not counted or not (math.isfinite(rate) and rate > 0):
        raise _strange(name, argv, done, "a record lacks n_prompt, n_gen or avg_ts")
    return bool(prompt), rate


def run_batched(
    peer: Peer,
    *,
    threads: int,
    contexts: Sequence[int],
    tokens: int,
    batch: int,
    timeout: float,
    prefix: Sequence[str] = (),
) -> dict[int, float]:
    """Decode tokens a second (of the whole batch) at each context, which all CPUs fill beforehand."""
    if peer.batched is None:
        raise _misused(f"The peer {peer.name} has no {BATCHED}.", "build it beside its llama-bench")
    room = batch * -(-(max(contexts) + tokens) // 256) * 256
    argv = [*prefix, *peer.batched, "-m", str(peer.model), "-t", str(threads)]
    argv += ["-tb", str(len(os.sched_getaffinity(0))), "-c", str(room), "-npl", str(batch)]
    argv += ["-npp", ",".join(map(str, contexts)), "-ntg", str(tokens), *peer.batched_arguments]
    return read_batched(peer.name, argv, run_child(argv, timeout=timeout), contexts, tokens, batch)


def read_batched(
    name: str, argv: Sequence[str], done: Finished, contexts: Sequence[int], tokens: int, batch: int
) -> dict[int, float]:
    """What a llama-batched-bench printed, by context. HaloError unless every context is there.

    The columns are PP, TG, B, N_KV, T_PP s, S_PP t/s, T_TG s, S_TG t/s, T s, S t/s; forks print on stderr.
    """
    rates = {}
    for match in _ROW.finditer(f"{done.stdout}\n{done.stderr}"):
        cells = [float(cell) for cell in match[1].split("|")[:10]]
        if cells[1] == tokens and cells[2] == batch and 0 < cells[7] < math.inf:
            rates[int(cells[0])] = cells[7]
    if done.status or sorted(rates) != sorted(contexts):
        raise _strange(name, argv, done, f"its table does not have the contexts {list(contexts)}")
    return rates


def _strange(name: str, argv: Sequence[str], done: Finished, what: str) -> HaloError:
    """An error about a child's output: its last words, and the command that shows them again."""
    if done.status:
        what = f"it was killed by signal {-done.status}" if done.status < 0 else f"exit code {done.status}"
    lines = [line.strip() for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
    last = f" ({lines[-1][:200]})" if lines else ""
    return HaloError(f"{name} did not give figures: {what}{last}.", hint=f"run it alone: {shlex.join(argv)}")


def run_child(
    argv: Sequence[str], *, timeout: float, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run argv in an empty directory of its own, stdin closed, and wait for it.

    Its whole process group is gone when this returns or raises, also at Ctrl-C. HaloError when it cannot be
    started, takes longer than `timeout` seconds, or prints more than MOST_OUTPUT bytes.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="halo-bench-"))
        out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        try:
            process = subprocess.Popen(
                list(argv),
                cwd=folder,
                env=None if environment is None else dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        except OSError as error:
            raise _misused(f"{argv[0]} cannot be started: {error.strerror}.", shlex.join(argv)) from error
        with _ended(process):
            status, peak = _wait(process, (out, err), argv, timeout)
        return Finished(_text(out), _text(err), status, peak)


def _wait(
    process: subprocess.Popen[bytes], outputs: Sequence[IO[bytes]], argv: Sequence[str], timeout: float
) -> tuple[int, int]:
    """Exit status and peak memory of the child. wait4, since only that tells the memory of one child."""
    end = time.monotonic() + timeout
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage.ru_maxrss * 1024
        if time.monotonic() > end:
            raise HaloError(
                f"{argv[0]} has not ended after {timeout:.0f} seconds.",
                hint=f"give it more with --timeout, or run it alone: {shlex.join(argv)}",
            )
        if sum(os.fstat(file.fileno()).st_size for file in outputs) > MOST_OUTPUT:
            raise HaloError(f"{argv[0]} prints without end.", hint=f"run it alone: {shlex.join(argv)}")
        time.sleep(_POLL)


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever happens inside, no process of the child's group is left, and the child is reaped."""
    try:
        yield
    finally:
        if process.returncode is None:
            _signal(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        _signal(process.pid, signal.SIGKILL)
        process.wait()


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(MOST_OUTPUT).decode("utf-8", "replace")
