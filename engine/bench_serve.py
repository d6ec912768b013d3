"""`halo bench --serve`: the server's cold start, first token, own time, throughput and memory, in one run.

Rounds are interleaved: each measures one stream, then so many at once, of halo and of each peer in turn, all
over real sockets. A peer is a llama-server (--peer NAME=EXECUTABLE, --peer-model NAME=FILE.gguf).
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engine.bench import BUSY_LOAD
from engine.bench_child import prompt
from engine.bench_stream import (
    Server,
    completion,
    free_port,
    halo_command,
    metrics,
    running,
    stream,
    together,
)
from engine.formats.prepared import read_directory

if TYPE_CHECKING:
    from engine.bench_peers import Peer

LEAST_PROMPT: Final = 8
NATIVE: Final = "halo_step_native_seconds_total"
OWN: Final = "halo_step_other_seconds_total"
Say = Callable[[str], None]


@dataclass(frozen=True)
class ServeSettings:
    """What is measured: `model` is a model directory; `tokens` a stream decodes, after `prompt` others."""

    model: Path
    prompt: int
    tokens: int
    together: int
    threads: int
    rounds: int
    peers: tuple[Peer, ...] = ()


@dataclass
class Rates:
    """Of one server, a figure a round."""

    one: list[float]  # tokens a second of one stream, from its first token on
    many: list[float]  # of all at once
    first: list[float]  # seconds to the first token of one stream
    native: list[float]  # of halo: share of a stream's time within the native steps
    outside: list[float]  # of halo: seconds a token outside of them
    scheduler: list[float]  # of halo: of these, the scheduler's own around the steps


def measure_serve(settings: ServeSettings, say: Say) -> dict[str, Any]:
    """All of it, as a JSON object."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="halo-bench-") as folder:
        logs = Path(folder)
        say("cold starts")
        cold = [cold_start(settings, logs) for _ in range(settings.rounds)]
        with ExitStack() as stack:
            servers = [stack.enter_context(each) for each in _servers(settings, logs)]
            for server in servers:
                server.wait_health(loaded=server.name == "halo")
            rest = {server.name: server.memory() for server in servers}
            rates = {server.name: Rates([], [], [], [], [], []) for server in servers}
            for server in servers:
                _warm_up(settings, server)
            for index in range(settings.rounds):
                for server in servers:
                    say(f"round {index + 1} of {settings.rounds}: {server.name}")
                    _round(settings, server, rates[server.name], index)
    busy = f"this machine is busy (load {load:.1f}): other programs take part in these figures"
    return _result(settings, cold, rates, rest) | {"warnings": [busy] if load > BUSY_LOAD else []}


def cold_start(settings: ServeSettings, logs: Path) -> dict[str, float]:
    """From exec: to the first 200, to the model loaded, to the first token; and the processor's time."""
    port = free_port()
    with running("halo", _halo(settings, port), port, logs / "cold.log") as server:
        health = server.wait_health()
        cpu = server.cpu_seconds()
        loaded = server.wait_health(loaded=True)
        asyncio.run(stream(port, completion(prompt(_vocabulary(settings), LEAST_PROMPT), 2)))
        return {"health": health, "health_cpu": cpu, "loaded": loaded, "token": _since(server)}


def _since(server: Server) -> float:
    from time import perf_counter

    return perf_counter() - server.started


def _servers(settings: ServeSettings, logs: Path) -> Iterator[Any]:
    port = free_port()
    yield running("halo", _halo(settings, port), port, logs / "halo.log")
    for peer in settings.peers:
        port = free_port()
        room = settings.together * (settings.prompt + settings.tokens + 16)
        argv = [
            *peer.command, "--model", str(peer.model), "--host", "127.0.0.1", "--port", str(port),
            "--threads", str(settings.threads), "--parallel", str(settings.together), "--ctx-size", str(room),
            *peer.arguments,
        ]  # fmt: skip
        yield running(peer.name, argv, port, logs / f"{peer.name}.log")


def _halo(settings: ServeSettings, port: int) -> list[str]:
    return [
        *halo_command(), "serve", "--listen", f"127.0.0.1:{port}", "--model", str(settings.model),
        "--threads", str(settings.threads), "--slots", str(settings.together), "--speculate", "off",
    ]  # fmt: skip


def _vocabulary(settings: ServeSettings) -> int:
    return read_directory(settings.model / "model.halo")[0].vocab_size


def _bodies(settings: ServeSettings, index: int, count: int) -> list[dict[str, Any]]:
    """Prompts of their own each, and others every round: none begins with another's tokens."""
    vocabulary = _vocabulary(settings)
    return [
        completion(prompt(vocabulary, settings.prompt, 1 + index * 100 + k), settings.tokens)
        for k in range(count)
    ]


def _warm_up(settings: ServeSettings, server: Server) -> None:
    body = completion(prompt(_vocabulary(settings), LEAST_PROMPT, 99), 4)
    asyncio.run(together(server.port, [body] * settings.together))


def _round(settings: ServeSettings, server: Server, rates: Rates, index: int) -> None:
    one, *many = _bodies(settings, index, 1 + settings.together)
    before = metrics(server.port) if server.name == "halo" else {}
    done = asyncio.run(stream(server.port, one))
    rates.one.append((done.tokens - 1) / (done.whole - done.first))
    rates.first.append(done.first)
    if before:
        after = metrics(server.port)
        native, own = (after[name] - before[name] for name in (NATIVE, OWN))
        rates.scheduler.append(own / done.tokens)
        rates.native.append(native / done.whole)
        rates.outside.append((done.whole - native) / done.tokens)
    seconds, each = asyncio.run(together(server.port, many))
    rates.many.append(sum(stream.tokens for stream in each) / seconds)


def _result(
    settings: ServeSettings,
    cold: Sequence[dict[str, float]],
    rates: dict[str, Rates],
    rest: dict[str, dict[str, int]],
) -> dict[str, Any]:
    own = rates["halo"]
    servers = {}
    for name, each in rates.items():
        gain = [many / one for many, one in zip(each.many, each.one, strict=True)]
        servers[name] = {
            "one": _spread(each.one), "many": _spread(each.many), "gain": _spread(gain),
            "first": _spread(each.first), "memory": rest[name],
            "halo_one_ratio": _spread([a / b for a, b in zip(own.one, each.one, strict=True)]),
            "halo_many_ratio": _spread([a / b for a, b in zip(own.many, each.many, strict=True)]),
        }  # fmt: skip
    return {
        "settings": {
            "prompt": settings.prompt, "tokens": settings.tokens, "together": settings.together,
            "threads": settings.threads, "rounds": settings.rounds,
            "peers": {peer.name: {"model": peer.model.name, "bytes": peer.model.stat().st_size}
                      for peer in settings.peers},
        },
        "model_bytes": (settings.model / "model.halo").stat().st_size,
        "cold": {key: _spread([each[key] for each in cold]) for key in cold[0]},
        "outside_share": _spread([1 - share for share in own.native]),
        "outside_token": _spread(own.outside),
        "scheduler_token": _spread(own.scheduler),
        "servers": servers,
    }  # fmt: skip


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def lines(result: dict[str, Any], name: str) -> list[str]:
    """The report for a person, and for a document."""
    given, cold = result["settings"], result["cold"]
    out = [
        f"{name}, {given['threads']} threads, {given['rounds']} rounds: medians (least to most); a prompt of "
        f"{given['prompt']} tokens, {given['tokens']} decoded, no speculation",
        f"cold start, exec to the first 200 of /health: {_ms(cold['health'])}, "
        f"of which {_ms(cold['health_cpu'])} processor; to the model loaded and every byte checked: "
        f"{_ms(cold['loaded'])}; to the first token: {_ms(cold['token'])}",
        f"outside the native steps at batch 1: {result['outside_share']['median']:.1%} of a stream's time "
        f"({result['outside_share']['least']:.1%} to {result['outside_share']['most']:.1%}), "
        f"{result['outside_token']['median'] * 1e6:.0f} us a token with this client and the sockets, "
        f"of which {result['scheduler_token']['median'] * 1e6:.0f} us are the scheduler's",
        f"the model's file: {result['model_bytes'] / 1e6:.1f} MB",
    ]
    many = given["together"]
    for server, each in result["servers"].items():
        memory = each["memory"]
        ratio = (
            ""
            if server == "halo"
            else f"; halo / {server}: one stream {_times(each['halo_one_ratio'])}, "
            + (f"{many} at once {_times(each['halo_many_ratio'])}")
        )
        out.append(
            f"{server}: one stream {each['one']['median']:.1f} tokens/s, {many} at once "
            f"{each['many']['median']:.1f} ({_times(each['gain'])} of one), first token "
            f"{_ms(each['first'])}, at rest {memory['rss'] / 1e6:.0f} MB in memory "
            f"({memory.get('anon', 0) / 1e6:.0f} its own, {memory.get('file', 0) / 1e6:.0f} mapped){ratio}"
        )
    return out


def _ms(spread: dict[str, float]) -> str:
    return f"{spread['median'] * 1e3:.0f} ms ({spread['least'] * 1e3:.0f} to {spread['most'] * 1e3:.0f})"


def _times(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f}x ({spread['least']:.2f} to {spread['most']:.2f})"


def as_json(result: dict[str, Any], name: str) -> str:
    """The result as one JSON object."""
    return json.dumps({"model": name, **result})
