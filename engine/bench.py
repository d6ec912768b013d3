"""`halo bench`: halo and other engines measured in turn, and what the figures mean. It prints nothing.

Rounds: in each one every engine runs every measurement, each as a child process of its own, and the order of
the engines turns from round to round. A rate is the median of its rounds. A ratio is the median of the ratios
within the rounds, since a machine that others share is faster in one minute than in the next, for all alike.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engine import bench_peers
from engine.bench_report import add_expectations, is_gpu, shape_of
from engine.errors import EXIT_COULD_NOT_RUN, EXIT_ERROR, HaloError

if TYPE_CHECKING:
    from engine.bench_peers import Finished, Peer
    from engine.model import ModelConfig

JSON_SCHEMA: Final = 1
OURS: Final = "halo"
BUSY_LOAD: Final = 0.5  # load average, above which a warning is due
_ROOT: Final = Path(__file__).resolve().parent.parent
_READ_IN_ROWS: Final = ("embedding", "head", "rope_cos", "rope_sin")  # of which a token reads a row or a few
Say = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is measured. Sizes in tokens; `timeout` in seconds and `prefix` are of each child."""

    model: Path
    prompt: int = 512
    tokens: int = 64
    contexts: tuple[int, ...] = (128, 1024, 4096)
    threads: tuple[int, ...] = (1,)
    batches: tuple[int, ...] = (1, 8)
    rounds: int = 5
    timeout: float = 900.0
    prefix: tuple[str, ...] = ()
    peers: tuple[Peer, ...] = ()
    bandwidth: float | None = None  # bytes a second; None: measured, of the CPU's memory


@dataclass(frozen=True)
class Case:
    """One line of the table: `kind` is prefill (of `context` tokens) or decode (at a context, of a batch)."""

    kind: str
    threads: int
    context: int
    batch: int = 1


@dataclass
class Readings:
    """What the rounds gave: tokens a second by case, engine and round; the rest by name."""

    rates: dict[Case, dict[str, dict[int, float]]] = field(default_factory=dict)
    guards: dict[str, str] = field(default_factory=dict)
    bandwidth: dict[int, list[float]] = field(default_factory=dict)
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, case: Case, engine: str, turn: int, rate: float) -> None:
        """Note one measured rate."""
        self.rates.setdefault(case, {}).setdefault(engine, {})[turn] = rate


def fitted(settings: Settings, config: ModelConfig) -> Settings:
    """The settings with contexts that the model has: the last is cut to what leaves room for the decoding."""
    most = config.max_seq_len - settings.tokens
    if most < 1 or settings.prompt > config.max_seq_len:
        raise HaloError(
            f"The model has {config.max_seq_len} positions: no room for a prompt of {settings.prompt} tokens "
            f"and for decoding {settings.tokens}.",
            hint="ask for less: --prompt 32 --tokens 16",
            exit_code=EXIT_COULD_NOT_RUN,
        )
    contexts = tuple(sorted({min(context, most) for context in settings.contexts}))
    return replace(settings, contexts=contexts)


def measure(settings: Settings, say: Say) -> Readings:
    """Run all rounds. A peer that fails is left out from then on, with a warning; halo's failure raises."""
    readings = Readings()
    _warn_if_busy(readings)
    peers = list(settings.peers)
    for turn in range(settings.rounds):
        for threads in settings.threads:
            readings.bandwidth.setdefault(threads, []).append(_bandwidth(settings, threads))
            engines: list[Peer | None] = [None, *peers]
            for engine in engines if turn % 2 == 0 else engines[::-1]:
                say(f"round {turn + 1} of {settings.rounds}, {threads} threads, {_name(engine)}")
                if engine is None:
                    _measure_ours(settings, readings, turn, threads)
                elif not _measure_peer(settings, engine, readings, turn, threads):
                    peers.remove(engine)
    say("memory")
    _measure_memory(settings, readings)
    return readings


def _bandwidth(settings: Settings, threads: int) -> float:
    if settings.bandwidth is not None:
        return settings.bandwidth
    job = {"job": "bandwidth", "threads": threads, "size": _bandwidth_bytes(settings.model)}
    return float(_ours(settings, job)["bytes_per_second"])


def _bandwidth_bytes(model: Path) -> int:
    """The array that is read: far beyond the caches, and no gigabyte for a model of a few megabytes."""
    return min(1 << 30, max(1 << 26, 4 * model.stat().st_size))


def _name(engine: Peer | None) -> str:
    return OURS if engine is None else engine.name


def _warn_if_busy(readings: Readings) -> None:
    load = os.getloadavg()[0]
    readings.facts["load"] = {"one_minute": load}
    if load > BUSY_LOAD:
        readings.warnings.append(
            f"this machine is busy (load {load:.1f}): other programs take part in these figures"
        )


def _ours(settings: Settings, job: dict[str, Any]) -> dict[str, Any]:
    """Run one job of engine/bench_child.py in a child; its result."""
    from engine.bench_peers import run_child

    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    argv = [*settings.prefix, sys.executable, "-m", "engine.bench_child", json.dumps(job)]
    done = run_child(argv, timeout=settings.timeout, environment={**os.environ, "PYTHONPATH": path})
    try:
        result: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        result = {"error": _last_words(done), "hint": "halo doctor"}
    if "error" in result:
        code = done.status if done.status > 0 else EXIT_ERROR
        raise HaloError(result["error"], hint=result["hint"], exit_code=code)
    return result


def _last_words(done: Finished) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return f"The measuring child ended with {done.status}: {lines[-1] if lines else 'it said nothing'}."


def _job(settings: Settings, name: str, threads: int, **more: int) -> dict[str, Any]:
    return {
        "job": name,
        "model": str(settings.model.absolute()),
        "prompt": settings.prompt,
        "tokens": settings.tokens,
        "contexts": settings.contexts,
        "threads": threads,
        **more,
    }


def _measure_ours(settings: Settings, readings: Readings, turn: int, threads: int) -> None:
    result = _ours(settings, _job(settings, "single", threads))
    _check_guard(readings, result["guard"])
    readings.facts.setdefault(f"{OURS} {threads}", result["facts"])
    rate = settings.prompt / result["prefill_seconds"]
    readings.add(Case("prefill", threads, settings.prompt), OURS, turn, rate)
    for context in settings.contexts:
        rate = settings.tokens / result["decode_seconds"][str(context)]
        readings.add(Case("decode", threads, context), OURS, turn, rate)
    for batch in settings.batches:
        if batch > 1:
            result = _ours(settings, _job(settings, "batch", threads, batch=batch))
            _check_guard(readings, result["guard"])
            rate = batch * settings.tokens / result["seconds"]
            readings.add(Case("decode", threads, settings.contexts[0], batch), OURS, turn, rate)


def _check_guard(readings: Readings, guard: dict[str, str]) -> None:
    """Every round, thread count and batch must give the same greedy ids: a fast wrong engine is no engine."""
    for key, digest in guard.items():
        if readings.guards.setdefault(key, digest) != digest:
            raise HaloError(
                f"Two runs of the same measurement ({key}) decoded different tokens.",
                hint="the engine or the memory of this machine is faulty: halo doctor",
            )


def _measure_peer(settings: Settings, peer: Peer, readings: Readings, turn: int, threads: int) -> bool:
    try:
        _run_peer(settings, peer, readings, turn, threads)
    except HaloError as error:
        readings.warnings.append(f"{peer.name} left out from round {turn + 1} on: {error.message}")
        readings.warnings.append(f"({error.hint})")
        return False
    return True


def _run_peer(settings: Settings, peer: Peer, readings: Readings, turn: int, threads: int) -> None:
    common: dict[str, Any] = {"timeout": settings.timeout, "prefix": settings.prefix}
    alone = 0 if peer.batched else settings.tokens
    rates = bench_peers.run_bench(peer, threads=threads, prompt=settings.prompt, tokens=alone, **common)
    readings.facts.setdefault(peer.name, rates.facts)
    if rates.prefill is not None:
        readings.add(Case("prefill", threads, settings.prompt), peer.name, turn, rates.prefill)
    if rates.decode is not None:  # from an empty context, which flatters the peer a little
        readings.add(Case("decode", threads, settings.contexts[0]), peer.name, turn, rates.decode)
    if not peer.batched:
        return
    for batch in sorted({1, *settings.batches}):
        contexts = settings.contexts if batch == 1 else settings.contexts[:1]
        decoded = bench_peers.run_batched(
            peer, threads=threads, contexts=contexts, tokens=settings.tokens, batch=batch, **common
        )
        for context, rate in decoded.items():
            readings.add(Case("decode", threads, context, batch), peer.name, turn, rate)


def _measure_memory(settings: Settings, readings: Readings) -> None:
    threads = max(settings.threads)
    result = _ours(settings, _job(settings, "memory", threads))
    readings.memory[OURS] = {
        "peak_bytes": result["peak_bytes"],
        "interpreter_bytes": result["interpreter_bytes"],
        "kv_bytes": result["facts"]["kv_bytes"],
    }
    for peer in settings.peers:
        try:
            rates = bench_peers.run_bench(
                peer, threads=threads, prompt=0, tokens=settings.tokens, timeout=settings.timeout,
                prefix=settings.prefix,
            )  # fmt: skip
        except HaloError as error:
            readings.warnings.append(f"{peer.name}'s memory is not known: {error.message}")
        else:
            readings.memory[peer.name] = {"peak_bytes": rates.peak_bytes}


def read_bytes(path: Path) -> dict[str, int]:
    """What one token reads of a prepared file, in bytes: ternary, head, rest (norms, scales), total.

    The head is the coarse one where the file has one, of which every row is read; then a few rows only of the
    embedding or of the head of full precision. Without it the whole of that one is read.
    """
    from engine.formats.prepared import TERNARY, read_directory

    config, entries = read_directory(path)
    sizes = {entry.name: entry.size for entry in entries}
    ternary = sum(entry.size for entry in entries if entry.dtype == TERNARY)
    head = sum(size for name, size in sizes.items() if name.split(".")[0] == "coarse")
    rest = sum(
        size for name, size in sizes.items() if name.split(".")[0] != "coarse" and name not in _READ_IN_ROWS
    )
    rest -= ternary
    if not head:
        head = sizes["embedding" if config.tie_embeddings else "head"]
    return {"ternary": ternary, "head": head, "rest": rest, "total": ternary + head + rest}


def report(settings: Settings, readings: Readings, name: str) -> dict[str, Any]:
    """Everything measured and computed, as one JSON object."""
    engine = readings.facts.get(f"{OURS} {max(settings.threads)}", {})
    if is_gpu(engine):  # whose cache has room for whole blocks of positions
        shape = shape_of(settings.model, engine)
        weights, kv_token = shape.bytes_a_token(), shape.config.num_layers * shape.kv_bytes()
    else:
        weights, kv_token = read_bytes(settings.model), _kv_bytes_a_token(readings)
    lines = [_line(case, rates, readings, weights, kv_token, settings) for case, rates in _sorted(readings)]
    result = {
        "schema": JSON_SCHEMA,
        "machine": {**machine_facts(), **readings.facts.get("load", {})},
        "model": {"name": name, "file_bytes": settings.model.stat().st_size, "bytes_a_token": weights},
        "kv_bytes_a_position": kv_token,
        "settings": {
            "prompt": settings.prompt,
            "tokens": settings.tokens,
            "rounds": settings.rounds,
            "prefix": list(settings.prefix),
        },
        "engine": engine,
        "bandwidth": {str(threads): max(values) for threads, values in readings.bandwidth.items()},
        "lines": lines,
        "memory": readings.memory,
        "peers": {
            peer.name: {**bench_peers.identity(peer), **readings.facts.get(peer.name, {})}
            for peer in settings.peers
        },
        "greedy_ids": readings.guards,
        "warnings": readings.warnings,
    }
    limits = {threads: max(values) for threads, values in readings.bandwidth.items()}
    add_expectations(result, settings.model, settings.bandwidth, limits)
    return result


def _sorted(readings: Readings) -> list[tuple[Case, dict[str, dict[int, float]]]]:
    def key(item: tuple[Case, Any]) -> tuple[int, bool, int, int]:
        case = item[0]
        return case.threads, case.kind != "prefill", case.batch, case.context

    return sorted(readings.rates.items(), key=key)


def _kv_bytes_a_token(readings: Readings) -> float:
    for facts in readings.facts.values():
        if "kv_bytes" in facts:
            return float(facts["kv_bytes"] / (facts["slots"] * facts["context"]))
    return 0.0


def _line(
    case: Case,
    rates: dict[str, dict[int, float]],
    readings: Readings,
    weights: dict[str, int],
    kv_token: float,
    settings: Settings,
) -> dict[str, Any]:
    ours = rates[OURS]
    line: dict[str, Any] = {
        "kind": case.kind,
        "threads": case.threads,
        "context": case.context,
        "batch": case.batch,
        OURS: _summary(ours),
        "peers": {
            name: {**_summary(theirs), "ratio": ratio(ours, theirs)}
            for name, theirs in rates.items()
            if name != OURS
        },
    }
    if case.kind == "decode":
        # One reading of the weights serves the batch; the KV cache grows while decoding: its middle counts.
        position = case.context + settings.tokens / 2
        step = weights["total"] + case.batch * position * kv_token
        limit = max(readings.bandwidth[case.threads])  # no bad moment of the machine's flatters the engine
        line["bytes_a_token"] = round(step / case.batch)
        line["bandwidth_share"] = line[OURS]["median"] / case.batch * step / limit if limit else None
    return line


def _summary(rates: dict[int, float]) -> dict[str, Any]:
    values = [rates[turn] for turn in sorted(rates)]
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "rounds": values,
    }


def ratio(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """The median over the rounds that both ran of our rate by theirs."""
    return float(statistics.median(ours[turn] / theirs[turn] for turn in theirs if turn in ours))


def machine_facts() -> dict[str, Any]:
    """Processor, usable CPUs and the huge-page setting, as this kernel tells them."""
    return {
        "cpu": _found(Path("/proc/cpuinfo"), r"^model name\s*:\s*(.+)$") or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "huge_pages": _found(Path("/sys/kernel/mm/transparent_hugepage/enabled"), r"\[(\w+)\]"),
    }


def _found(path: Path, pattern: str) -> str:
    try:
        match = re.search(pattern, path.read_text(), re.MULTILINE)
    except OSError:
        return ""
    return match[1].strip() if match else ""


def shares(sequence: Sequence[float]) -> list[float]:
    """Each number as a share of the greatest, for bars."""
    most = max(sequence, default=0.0)
    return [value / most if most > 0 else 0.0 for value in sequence]
