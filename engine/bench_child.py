"""What one child process of `halo bench` measures of halo itself. Not what is compared, nor how it is shown.

`python -m engine.bench_child JOB`: JOB and the one line that is printed are JSON objects. A process of its
own for each measurement, as a peer's executable is one: memory is of that run alone, and nothing stays warm.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engine.errors import HaloError

if TYPE_CHECKING:
    from engine.backend import NativeModel, Session

WARM_UP: Final = 2  # tokens decoded and thrown away, so that the threads are up and the weights are in
_SHORT: Final = 32
_HUGE_PAGE: Final = 2 << 20
_PIECE: Final = 8 << 20  # bytes: long beside the cost of a call, short beside the whole


def prompt(vocabulary: int, length: int, stream: int = 0) -> list[int]:
    """`length` random ids; the same ones, and a longer prompt's first ones, at every call."""
    rng = random.Random(stream + 1)  # noqa: S311 - a prompt, no secret
    return [rng.randrange(vocabulary) for _ in range(length)]


def fingerprint(ids: Sequence[int]) -> str:
    """A short digest of the ids, by which rounds are compared."""
    return hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:16]


def fill(session: Session, tokens: Sequence[int], slot: int, start: int) -> int:
    """Prefill tokens[start:] at their own positions; the greedy id after the last."""
    rest = tokens[start:]
    want = [False] * (len(rest) - 1) + [True]
    return session.run_argmax(rest, [slot] * len(rest), range(start, len(tokens)), want)[0]


def decode(session: Session, ids: Sequence[int], position: int, tokens: int) -> list[list[int]]:
    """Decode greedily `tokens` steps from `position`, one sequence a slot; the new ids of each step."""
    count = len(ids)
    slots, want, steps = list(range(count)), [True] * count, []
    step = list(ids)
    for at in range(position, position + tokens):
        step = session.run_argmax(step, slots, [at] * count, want)
        steps.append(step)
    return steps


def _warm_up(session: Session, tokens: Sequence[int]) -> None:
    """A short prompt, yet long enough for the kernels of a long one, and a few tokens."""
    short = tokens[: max(1, min(_SHORT, session.context - WARM_UP))]
    decode(session, [fill(session, short, 0, 0)], len(short), WARM_UP)


def measure_single(model: NativeModel, job: dict[str, Any]) -> dict[str, Any]:
    """Prefill of the prompt, then decode at each context, all in one slot."""
    contexts, tokens = sorted(job["contexts"]), job["tokens"]
    ids = prompt(model.config.vocab_size, max(job["prompt"], *contexts))
    room = min(model.config.max_seq_len, max(job["prompt"], contexts[-1] + tokens))
    with model.session(context=room, threads=job["threads"]) as session:
        _warm_up(session, ids)
        started = time.perf_counter()
        first = fill(session, ids[: job["prompt"]], 0, 0)
        prefill = time.perf_counter() - started
        guard = {f"prefill {job['prompt']}": fingerprint([first])}
        filled, decodes = job["prompt"], {}
        if filled > contexts[0]:
            filled = 0
        for context in contexts:
            # One token at least is run again: decoding begins with the arg max after the prompt's last.
            first = fill(session, ids[:context], 0, min(filled, context - 1))
            started = time.perf_counter()
            steps = decode(session, [first], context, tokens)
            decodes[str(context)] = time.perf_counter() - started
            guard[f"decode {context}"] = fingerprint([step[0] for step in steps])
            filled = context
        facts = {**model.facts, **session.facts}
    return {"prefill_seconds": prefill, "decode_seconds": decodes, "guard": guard, "facts": facts}


def measure_batch(model: NativeModel, job: dict[str, Any]) -> dict[str, Any]:
    """Decode of `batch` sequences at once, each with a prompt of its own; sequence 0 is measure_single's."""
    batch, context, tokens = job["batch"], job["contexts"][0], job["tokens"]
    vocabulary = model.config.vocab_size
    with model.session(slots=batch, context=context + tokens, threads=job["threads"]) as session:
        _warm_up(session, prompt(vocabulary, context))
        first = [fill(session, prompt(vocabulary, context, slot), slot, 0) for slot in range(batch)]
        decode(session, first, context, min(WARM_UP, tokens))
        started = time.perf_counter()
        steps = decode(session, first, context, tokens)
        seconds = time.perf_counter() - started
        facts = {**model.facts, **session.facts}
    guard = {f"decode {context}": fingerprint([step[0] for step in steps])}
    for slot in range(1, batch):
        guard[f"decode {context} slot {slot}"] = fingerprint([step[slot] for step in steps])
    return {"seconds": seconds, "guard": guard, "facts": facts}


def peak_memory() -> int:
    """The most memory that this process ever held, in bytes, mapped files that it touched included."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    if not found:
        raise HaloError("/proc/self/status has no VmHWM.", hint="run it on Linux with /proc mounted")
    return int(found[1]) * 1024


def measure_memory(job: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of a process that opens the model and decodes, and of the interpreter before that."""
    before = peak_memory()
    with _open(job) as model:
        context, tokens = job["contexts"][0], job["tokens"]
        ids = prompt(model.config.vocab_size, context)
        with model.session(context=context + tokens, threads=job["threads"]) as session:
            decode(session, [fill(session, ids, 0, 0)], context, tokens)
            facts = {**model.facts, **session.facts}
    return {"peak_bytes": peak_memory(), "interpreter_bytes": before, "facts": facts}


def measure_bandwidth(threads: int, size: int, passes: int = 5) -> dict[str, Any]:
    """Bytes a second that `threads` threads read from huge pages: each sums pieces, `passes` times over.

    NumPy's sum of int64 is bound by memory here and lets go of the interpreter's lock; it is within a few
    percent of a loop of vector loads in C. The best pass counts: it is the machine's limit that is asked for.
    """
    import numpy as np

    memory = mmap.mmap(-1, size + _HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, dtype=np.int64)[: size // 8]
    whole[:] = 1  # a page that was never written is one shared page of zeros
    pieces = [whole[start : start + _PIECE // 8] for start in range(0, len(whole), _PIECE // 8)]
    return {"bytes_per_second": max(_one_pass(pieces, threads, size) for _ in range(passes))}


def _one_pass(pieces: Sequence[Any], threads: int, size: int) -> float:
    """Every thread takes the next piece until none is left, so that none waits for another at the end."""
    ready, turn = threading.Barrier(threads + 1), itertools.count()

    def read() -> None:
        ready.wait()
        while (index := next(turn)) < len(pieces):
            pieces[index].sum()

    workers = [threading.Thread(target=read, daemon=True) for _ in range(threads)]
    for worker in workers:
        worker.start()
    ready.wait()
    started = time.perf_counter()
    for worker in workers:
        worker.join()
    return size / (time.perf_counter() - started)


def _open(job: dict[str, Any]) -> NativeModel:
    from engine.backend import NativeModel

    return NativeModel.open(Path(job["model"]))


def _with_model(measure: Callable[[NativeModel, dict[str, Any]], dict[str, Any]]) -> Callable[..., Any]:
    def run(job: dict[str, Any]) -> dict[str, Any]:
        with _open(job) as model:
            return measure(model, job)

    return run


JOBS: Final[dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "single": _with_model(measure_single),
    "batch": _with_model(measure_batch),
    "memory": measure_memory,
    "bandwidth": lambda job: measure_bandwidth(job["threads"], job["size"]),
}


def main(argument: str) -> int:
    """Do the job; one JSON object on stdout, or the error's sentence as {"error": ..., "hint": ...}."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    job = json.loads(argument)
    try:
        print(json.dumps(JOBS[job["job"]](job)))
    except HaloError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
