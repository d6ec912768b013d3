"""`halo bench`: its arguments and what it prints; the measuring is engine/bench.py.

Nothing heavy is imported at the top: `halo --help` reads the arguments of every command.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engine.bench_report import measurement_name
from engine.errors import EXIT_COULD_NOT_RUN, EXIT_DEGRADED, EXIT_WELL, HaloError

if TYPE_CHECKING:
    from engine.bench import Settings
    from engine.bench_peers import Peer

SHAPES: Final = ("2b4t", "tiny")
_CLEAR_LINE: Final = "\r\033[K"
_BAR: Final = 24  # characters of the longest bar
_EIGHTHS: Final = " ▏▎▍▌▋▊▉█"


def configure_bench(parser: ArgumentParser) -> None:
    """Arguments of `halo bench`."""
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, metavar="DIR", help="model directory (the installed one)")
    model.add_argument(
        "--synthetic", choices=SHAPES, help="random weights of that shape, made once in the user's cache"
    )
    add("--prompt", type=_count, default=512, metavar="N", help="prefill N tokens (512)")
    add("--tokens", type=_count, default=64, metavar="N", help="decode N tokens at each context (64)")
    add("--context", type=_counts, default=(128, 1024, 4096), metavar="N,N", help="contexts (128,1024,4096)")
    add("--threads", type=_counts, metavar="N,N", help="thread counts, as 1,2 (one per CPU)")
    add("--batch", type=_counts, default=(1, 8), metavar="N,N", help="sequences decoded at once (1,8)")
    add("--rounds", type=_count, default=5, metavar="N", help="interleaved rounds (5)")
    add("--timeout", type=_count, default=900, metavar="SECONDS", help="of each measurement (900)")
    add("--bandwidth", type=_rate, metavar="GB/S", help="of the memory, instead of a measured or known one")
    add("--serve", action="store_true", help="measure halo serve; peers are llama-servers then")
    add("--together", type=_count, default=8, metavar="N", help="of --serve: streams at once (8)")
    add("--prefix", default="", metavar="COMMAND", help='before each measurement, as "taskset -c 0,1"')
    for flag, value, what in (
        ("--peer", "NAME=EXECUTABLE", "compare with this llama-bench; may be given several times"),
        ("--peer-model", "NAME=FILE", "the peer's model"),
        ("--peer-args", "NAME=ARGS", "more arguments of the peer's llama-bench"),
        ("--peer-batched-args", "NAME=ARGS", "more arguments of the llama-batched-bench beside it"),
    ):
        add(flag, action="append", default=[], metavar=value, help=what)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print one JSON object")
    shown.add_argument("--markdown", action="store_true", help="print a table for a document")
    shown.add_argument("--report", action="store_true", help="print measured beside expected, for an issue")


def run_bench(args: Namespace) -> int:
    """Measure and print; exit code 2 when a peer failed or the machine was busy."""
    if args.serve:
        return _run_serve(args)
    from engine.bench import fitted, measure, report
    from engine.bench_report import issue_text
    from engine.formats.prepared import read_directory

    peers = _peers(args)
    say = _Progress()
    try:
        path, name = _model(args, say)
        config, _ = read_directory(path)
        settings = fitted(_settings(args, path, peers), config)
        result = report(settings, measure(settings, say), name)
    finally:
        say.clear()
    if args.json:
        print(json.dumps(result))
    elif args.markdown:
        print("\n".join(markdown(result)))
    elif args.report:
        print("\n".join(issue_text(result)))
    else:
        print("\n".join(plain(result, bars=sys.stdout.isatty())))
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    return EXIT_DEGRADED if result["warnings"] else EXIT_WELL


def _run_serve(args: Namespace) -> int:
    """The server's figures instead of the engine's."""
    from engine import bench_serve
    from engine.locate import locate, read_card

    peers, say = _peers(args), _Progress()
    try:
        if args.synthetic:
            from engine.bench_serve_model import served_model

            folder = served_model(args.synthetic, say)
        else:
            folder = locate(args.model).model_dir
        name = read_card(folder).name
        threads = (args.threads or (len(os.sched_getaffinity(0)),))[0]
        settings = bench_serve.ServeSettings(
            folder, args.prompt, args.tokens, args.together, threads, args.rounds, peers
        )
        result = bench_serve.measure_serve(settings, say)
    finally:
        say.clear()
    text = [bench_serve.as_json(result, name)] if args.json else bench_serve.lines(result, name)
    print("\n".join(f"- {line}" if args.markdown else line for line in text))
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    return EXIT_DEGRADED if result["warnings"] else EXIT_WELL


def _model(args: Namespace, say: Callable[[str], None]) -> tuple[Path, str]:
    """The prepared file to measure, and its name."""
    if args.synthetic:
        from engine.bench_synthetic import synthetic_model

        return synthetic_model(args.synthetic, say), f"synthetic {args.synthetic}"
    from engine.formats.seal import check_open
    from engine.locate import locate, read_card

    folder = locate(args.model).model_dir
    check_open(folder)
    return folder / "model.halo", read_card(folder).name


def _settings(args: Namespace, path: Path, peers: tuple[Peer, ...]) -> Settings:
    from engine.bench import Settings
    from engine.bench_report import chip_of
    from engine.device import choose_backend

    bandwidth, threads = args.bandwidth, args.threads or (len(os.sched_getaffinity(0)),)
    backend = choose_backend()
    if backend.name != "cpu":  # no threads work there, and the CPU's bandwidth is not the GPU's
        bandwidth, threads = bandwidth or chip_of(backend.facts()).bandwidth, (1,)
    try:
        prefix = tuple(shlex.split(args.prefix))
    except ValueError:
        raise HaloError(
            f"--prefix has an open quote: {args.prefix}.", hint="close it", exit_code=EXIT_COULD_NOT_RUN
        ) from None
    return Settings(
        model=path,
        prompt=args.prompt,
        tokens=args.tokens,
        contexts=args.context,
        threads=threads,
        batches=args.batch,
        rounds=args.rounds,
        timeout=float(args.timeout),
        prefix=prefix,
        peers=peers,
        bandwidth=bandwidth,
    )


def _peers(args: Namespace) -> tuple[Peer, ...]:
    from engine.bench_peers import parse_peer

    tables = [_table(flag, getattr(args, flag)) for flag in ("peer_model", "peer_args", "peer_batched_args")]
    peers = tuple(parse_peer(text, *tables) for text in args.peer)
    names = [peer.name for peer in peers]
    unknown = sorted({name for table in tables for name in table} - set(names))
    if unknown or len(set(names)) < len(names) or "halo" in names:
        what = f"There is no --peer {unknown[0]}" if unknown else "Two peers have one name, or one is halo"
        raise HaloError(f"{what}.", hint="halo bench --help", exit_code=EXIT_COULD_NOT_RUN)
    return peers


def _table(flag: str, values: Sequence[str]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    for name, equals, _ in pairs:
        if not name or not equals:
            raise HaloError(
                f"--{flag.replace('_', '-')} wants NAME=VALUE.",
                hint="halo bench --help",
                exit_code=EXIT_COULD_NOT_RUN,
            )
    return {name: value for name, _, value in pairs}


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1 << 20:
        raise ArgumentTypeError(f"{text!r} is not a number from 1 to {1 << 20}")
    return int(text)


def _rate(text: str) -> float:
    """GB a second as bytes a second."""
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0.1 <= rate <= 1e5:
        raise ArgumentTypeError(f"{text!r} is no number of GB a second")
    return rate * 1e9


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(part) for part in text.split(",")}))


class _Progress:
    """One line on stderr that is written over, on a terminal only; a longer story gets lines of its own."""

    def __call__(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"{_CLEAR_LINE}{text}", end="", file=sys.stderr, flush=True)
        elif text.startswith(("round", "making")):
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave an empty line."""
        if sys.stderr.isatty():
            print(_CLEAR_LINE, end="", file=sys.stderr, flush=True)


def _header(result: dict[str, Any]) -> list[str]:
    machine, model, engine = result["machine"], result["model"], result["engine"]
    weights = model["bytes_a_token"]
    return [
        f"{machine['cpu']}, {machine['cpus']} CPUs; {_device(result)}",
        f"{model['name']}: a token reads {weights['total'] / 1e6:.0f} MB of weights "
        f"(ternary {weights['ternary'] / 1e6:.0f}, head {weights['head'] / 1e6:.0f}), "
        f"{result['kv_bytes_a_position'] / 1e3:.1f} kB of KV a position; path {engine.get('isa', '?')}",
        f"median of {result['settings']['rounds']} interleaved rounds, tokens a second; "
        "ratios are medians of the rounds' own",
    ]


def _device(result: dict[str, Any]) -> str:
    """What decoded, and the bandwidth that it is measured by."""
    engine = result["engine"]
    if engine.get("device"):
        roof = result["roofline"]
        known = f"bandwidth {roof['bandwidth'] / 1e9:.1f} GB/s ({roof['source']})"
        return f"{engine['backend']} on {engine['device']}" + (f"; {known}" if roof["bandwidth"] else "")
    rates = ", ".join(f"{value / 1e9:.1f} GB/s with {n}" for n, value in result["bandwidth"].items())
    reason = f"backend cpu ({engine['backend_reason']}); " if engine.get("backend_reason") else ""
    return f"{reason}read bandwidth by threads: {rates}"


def _table_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    names = list(result["peers"])
    titles = ["threads", "measurement", "halo", "MB/token", "% of bandwidth"]
    rows = []
    for line in result["lines"]:
        decode = line["kind"] == "decode"
        row = [str(line["threads"]), measurement_name(line), f"{line['halo']['median']:.1f}"]
        row.append(f"{line['bytes_a_token'] / 1e6:.0f}" if decode else "")
        row.append(f"{line['bandwidth_share']:.0%}" if decode and line["bandwidth_share"] else "")
        for name in names:
            peer = line["peers"].get(name)
            row += [f"{peer['median']:.1f}", f"{peer['ratio']:.2f}x"] if peer else ["", ""]
        rows.append(row)
    for name in names:
        titles += [name, f"halo / {name}"]
    return titles, rows


def _memory(result: dict[str, Any]) -> list[str]:
    ours = result["memory"]["halo"]
    size, kv = result["model"]["file_bytes"], ours["kv_bytes"]
    lines = [
        f"peak memory {ours['peak_bytes'] / 1e6:.0f} MB: less {kv / 1e6:.1f} MB of KV cache "
        f"{(ours['peak_bytes'] - kv) / size:.2f} times the model's {size / 1e6:.0f} MB "
        f"({ours['interpreter_bytes'] / 1e6:.0f} MB were the interpreter's before)"
    ]
    for name, facts in result["peers"].items():
        peak = result["memory"].get(name, {}).get("peak_bytes")
        if peak:
            lines.append(
                f"{name}: peak memory {peak / 1e6:.0f} MB, its model {facts['model_bytes'] / 1e6:.0f} MB"
            )
    return lines


def _identities(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, facts in result["peers"].items():
        version = f"{facts.get('build_commit', 'unknown')} ({facts.get('build_number', '?')})"
        lines.append(
            f"{name}: build {version}, program sha256 {facts['sha256'][:12]}, "
            f"{facts.get('model_type', '?')}, "
            f"{Path(facts['model']).name}, arguments {shlex.join(facts['arguments']) or 'none'}; "
            f"decode by {facts['decode_by']} {shlex.join(facts['batched_arguments'])}".rstrip()
        )
    return lines


def plain(result: dict[str, Any], *, bars: bool) -> list[str]:
    """The report for a person: a table, with bars where a terminal shows it."""
    from engine.bench import shares

    titles, rows = _table_rows(result)
    widths = [max(len(cell) for cell in column) for column in zip(titles, *rows, strict=True)]
    lines = [*_header(result), ""]
    lengths = shares([line["halo"]["median"] for line in result["lines"]])
    for row, share in zip([titles, *rows], [0.0, *lengths], strict=True):
        cells = [
            c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  ".join(cells) + (f"  {bar(share)}" if bars else "")).rstrip())
    return [*lines, "", *_memory(result), *_identities(result)]


def bar(share: float) -> str:
    """A bar of that share (0 to 1) of the greatest length, in eighths of a character."""
    eighths = round(max(0.0, min(1.0, share)) * _BAR * 8)
    return _EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def markdown(result: dict[str, Any]) -> list[str]:
    """The same for a document."""
    titles, rows = _table_rows(result)
    lines = [f"- {line}" for line in _header(result)]
    lines += ["", "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return [*lines, "", *[f"- {line}" for line in (*_memory(result), *_identities(result))]]
