"""`halo ppl`: its arguments, reading the text, and the report; the computation is engine/ppl.py."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engine.backend import DEFAULT_KV, KV_FORMS
from engine.errors import EXIT_COULD_NOT_RUN, EXIT_DEGRADED, EXIT_WELL, HaloError

if TYPE_CHECKING:
    from engine.ppl import Protocol, Scores
    from engine.tokenizer import TextTokenizer

JSON_SCHEMA: Final = 1
_CLEAR_LINE: Final = "\r\033[K"


def configure_ppl(parser: ArgumentParser) -> None:
    """Arguments of `halo ppl`."""
    add = parser.add_argument
    add("file", nargs="?", default="-", metavar="FILE", help="UTF-8 text; - or none reads stdin")
    add("--model", type=Path, metavar="DIR", help="model directory")
    add("--window", type=int, metavar="N", help="tokens a window (the model's context)")
    add("--stride", type=int, metavar="N", help="from a window's start to the next (the window: no overlap)")
    add("--bos", action=BooleanOptionalAction, default=True, help="begin each window with BOS (yes)")
    add("--tokens", type=int, metavar="MAX", help="only the first MAX tokens of the text")
    add("--threads", type=int, metavar="N", help="compute threads")
    add("--kv", choices=KV_FORMS, help=f"form of the KV cache ({DEFAULT_KV})")
    add("--json", action="store_true", help="print one JSON object")


def run_ppl(args: Namespace) -> int:
    """Measure and report; exit code 2 when the result says that the weights are damaged."""
    _check_range("--tokens", args.tokens, 2**31)
    _check_range("--threads", args.threads, 1024)
    data = _read(args.file)
    report = _measure(args, _decode(data))
    report["text"] = {"name": args.file, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    print(json.dumps(report) if args.json else _summary(report))
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    return EXIT_DEGRADED if report["warnings"] else EXIT_WELL


def _measure(args: Namespace, text: str) -> dict[str, Any]:
    """Open the model, score the text, and say everything about it but the text's name."""
    from engine import ppl
    from engine.backend import NativeModel
    from engine.formats.seal import check_open
    from engine.locate import locate, read_card
    from engine.tokenizer import load_tokenizer

    folder = locate(args.model).model_dir
    check_open(folder)
    card, tokenizer = read_card(folder), load_tokenizer(folder)
    with NativeModel.open(folder / "model.halo") as model:
        _check_vocabulary(folder, model.config.vocab_size, tokenizer)
        context = min(card.context, model.config.max_seq_len)
        protocol = _protocol(args, context, tokenizer.bos)
        tokens = tokenizer.encode(text)[: args.tokens]
        ppl.plan(len(tokens), protocol)  # a text too short is refused before the session takes its memory
        with model.session(context=protocol.window, threads=args.threads, kv=args.kv) as session:
            facts = {**model.facts, **session.facts}
            started = time.monotonic()
            at_once = ppl.positions_at_once(tokenizer.size)
            scores = ppl.score(session, tokens, protocol, at_once, _show_progress)
            seconds = time.monotonic() - started
    scored = tokens[len(tokens) - scores.tokens :]
    return {
        "schema": JSON_SCHEMA,
        "model": {"name": card.name, "context": context, "vocabulary": tokenizer.size},
        "engine": {key: facts[key] for key in ("backend", "isa", "threads", "kv", "kv_bytes")},
        "protocol": {
            "window": protocol.window,
            "stride": protocol.stride,
            "bos": protocol.bos,
            "max_tokens": args.tokens,
        },
        **_figures(scores, ppl.characters(tokenizer, scored)),
        "seconds": round(seconds, 3),
        "warnings": _warnings(scores, tokenizer.size),
    }


def _protocol(args: Namespace, context: int, bos: int) -> Protocol:
    from engine.ppl import Protocol

    window = context if args.window is None else args.window
    protocol = Protocol(window, window if args.stride is None else args.stride, bos if args.bos else None)
    protocol.validate(context)
    return protocol


def _figures(scores: Scores, characters: int) -> dict[str, Any]:
    """What was measured, full precision; what is no finite number is null."""
    error = scores.standard_error
    figures: dict[str, float | None] = {
        "nats_per_token": scores.nats_per_token,
        "nats_per_token_error": error,
        "perplexity": scores.perplexity,
        "perplexity_error": None if error is None else scores.perplexity * error,
        "bits_per_character": scores.bits_per_character(characters),
    }
    finite = {key: value if value is None or math.isfinite(value) else None for key, value in figures.items()}
    return {
        "tokens_scored": scores.tokens,
        "characters_scored": characters,
        "windows": len(scores.nats),
        **finite,
    }


def _warnings(scores: Scores, vocabulary: int) -> list[str]:
    if not scores.is_uniform(vocabulary):
        return []
    return [
        f"the perplexity is that of guessing evenly among the {vocabulary} tokens: the weights are damaged "
        "or mis-read (halo doctor checks them)"
    ]


def _summary(report: dict[str, Any]) -> str:
    """The report for a person, a fact a line."""
    protocol = report["protocol"]
    bos = "without BOS" if protocol["bos"] is None else f"each after BOS ({protocol['bos']})"
    rate = report["tokens_scored"] / max(report["seconds"], 1e-9)
    bits = _number(report["bits_per_character"], 4)
    return "\n".join(
        (
            f"perplexity        {_with_error(report, 'perplexity')}",
            f"nats a token      {_with_error(report, 'nats_per_token')}",
            f"bits a character  {bits} ({report['characters_scored']} characters)",
            f"tokens scored     {report['tokens_scored']}, each once",
            f"windows           {report['windows']} of at most {protocol['window']} tokens, "
            f"stride {protocol['stride']}, {bos}",
            f"KV cache          {report['engine']['kv']}, {report['engine']['kv_bytes']} bytes",
            f"seconds           {report['seconds']:.2f} ({rate:.0f} tokens/s, "
            f"{report['engine']['isa']}, threads: {report['engine']['threads']})",
        )
    )


def _with_error(report: dict[str, Any], key: str) -> str:
    error = report[f"{key}_error"]
    tail = " (one window: no standard error)" if report["windows"] < 2 else f" +- {_number(error, 4)}"
    return _number(report[key], 4) + tail


def _number(value: float | None, digits: int) -> str:
    return "beyond any number" if value is None else f"{value:.{digits}f}"


def _show_progress(done: int, total: int) -> None:
    """One line that is written over, on a terminal only; cleared at the end."""
    if sys.stderr.isatty():
        line = f"{_CLEAR_LINE}{done} of {total} tokens" if done < total else _CLEAR_LINE
        print(line, end="", file=sys.stderr, flush=True)


def _check_range(flag: str, value: int | None, most: int) -> None:
    if value is not None and not 1 <= value <= most:
        raise HaloError(
            f"{flag} is {value}; 1 to {most} is possible.",
            hint="halo ppl --help",
            exit_code=EXIT_COULD_NOT_RUN,
        )


def _check_vocabulary(folder: Path, vocabulary: int, tokenizer: TextTokenizer) -> None:
    if vocabulary != tokenizer.size:
        raise HaloError(
            f"The model in {folder} has {vocabulary} tokens and its tokenizer {tokenizer.size}.",
            hint="they are of different models: run `halo install` again",
        )


def _read(name: str) -> bytes:
    if name == "-":
        if sys.stdin.isatty():
            print("(reading the text from the terminal; end it with Ctrl-D)", file=sys.stderr, flush=True)
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise HaloError(
            f"The text {name} cannot be read: {getattr(error, 'strerror', None) or error}.",
            hint=f"look at it: ls -l {name}",
            exit_code=EXIT_COULD_NOT_RUN,
        ) from error


def _decode(data: bytes) -> str:
    """The text as it is: no newline is changed and none is taken off."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HaloError(
            f"The text is not UTF-8 (byte {error.start}).",
            hint="convert it, as with: iconv -f latin1 -t utf-8",
            exit_code=EXIT_COULD_NOT_RUN,
        ) from error
