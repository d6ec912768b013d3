"""`halo generate`, `halo chat` and `halo serve`: arguments and what they run; decoding itself is elsewhere.

Nothing heavy is imported at the top: `halo --help` reads the arguments of every command.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

from engine.errors import EXIT_COULD_NOT_RUN, EXIT_WELL, HaloError

if TYPE_CHECKING:
    from engine.generate import Engine, Step
    from engine.router import NpuProbe
    from engine.sampling import SamplingParams
    from engine.speculate import Speculation, Tally

EXIT_INTERRUPTED: Final = 130
DEFAULT_LISTEN: Final = "127.0.0.1:8180"


def configure_generate(parser: ArgumentParser) -> None:
    """Arguments of `halo generate`."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue; - or none reads stdin")
    _sampling_arguments(parser, max_tokens=128)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.add_argument("--stats", action="store_true", help="print counts and speed to stderr")


def configure_chat(parser: ArgumentParser) -> None:
    """Arguments of `halo chat`."""
    parser.add_argument(
        "message", nargs="?", metavar="MESSAGE", help="one message; none: stdin, or a dialogue on a terminal"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message before the first turn")
    _sampling_arguments(parser, max_tokens=512)


def configure_serve(parser: ArgumentParser) -> None:
    """Arguments of `halo serve`."""
    parser.add_argument("--listen", metavar="ADDR:PORT", help=f"address and port ({DEFAULT_LISTEN})")
    parser.add_argument("--host", metavar="ADDR", help="address alone")
    parser.add_argument(
        "--port", type=_integer(0, 65535), metavar="PORT", help="port alone; 0 takes a free one"
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="model directory")
    parser.add_argument("--api-keys", type=Path, metavar="FILE", help="one sha256 of an API key a line")
    parser.add_argument(
        "--new-key", type=Path, metavar="FILE", help="make an API key, add its sha256 to FILE, print it, end"
    )
    parser.add_argument(
        "--slots",
        type=_integer(1, 256),
        metavar="N",
        help="requests that run at once (default: up to 8, as the memory has room for)",
    )
    parser.add_argument(
        "--deadline",
        type=_integer(1, 86_400),
        metavar="SECONDS",
        help="end a request that is not done after so long (default: never)",
    )
    parser.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin use the API, as http://localhost:3000; may be given again",
    )
    parser.add_argument("--threads", type=_integer(1, 1024), metavar="N", help="compute threads")
    _speculation_argument(parser)


def run_generate(args: Namespace) -> int:
    """Print the continuation of the prompt and nothing else."""
    prompt = _read_stdin() if args.prompt in (None, "-") else args.prompt
    params = _sampling(args)
    with _open_engine(args) as engine:
        ids = engine.encode_prompt(prompt)
        engine.check_prompt(ids)
        if args.json:
            return _generate_json(engine, ids, params)
        started = time.monotonic()
        code, count = _stream(engine.generate(ids, params))
        if args.stats:
            _print_stats(len(ids), count, time.monotonic() - started, engine.tally)
    return code


def run_chat(args: Namespace) -> int:
    """Answer one message, or hold a dialogue on a terminal."""
    from engine.dialogue import Dialogue, converse

    params = _sampling(args)
    message = args.message
    if message == "-" or (message is None and not sys.stdin.isatty()):
        message = _read_stdin()
    if message is not None and not message.strip():
        raise HaloError("The message is empty.", hint='ask something: halo chat "How do I list files?"')
    with _open_engine(args) as engine:
        dialogue = Dialogue(engine, params, system=args.system)
        if message is None:
            return converse(dialogue, _write)
        code, _ = _stream(dialogue.ask(message, _note))
        return code


def run_serve(args: Namespace, npu: NpuProbe | None = None) -> int:
    """Serve until told to end; `npu` is what the checks know of the NPU, which this room may not ask."""
    from engine.server.browsers import parse_origin
    from engine.server.early import EarlyModel
    from engine.server.sockets import parse_listen

    if args.new_key is not None:
        return _new_key(args.new_key)
    if args.listen and (args.host is not None or args.port is not None):
        raise HaloError("--listen already has address and port.", hint="drop --host and --port.")
    host, port = parse_listen(args.listen or DEFAULT_LISTEN)
    origins = tuple(parse_origin(text) for text in args.cors_origin)
    early = EarlyModel(args.model)  # it reads while what serves is imported

    from engine.server.serve import ServeOptions, serve

    return serve(
        ServeOptions(
            host=host if args.host is None else args.host,
            port=port if args.port is None else args.port,
            early=early,
            api_keys=args.api_keys,
            threads=args.threads,
            speculation=_speculation(args),
            npu=npu,
            cors_origins=origins,
            slots=args.slots,
            deadline=args.deadline,
        )
    )


def _new_key(path: Path) -> int:
    from engine.server.keys import new_key

    _write(f"{new_key(path)}\n")
    _note(f"Its sha256 is in {path}; the key itself is kept nowhere, so note it now.")
    return EXIT_WELL


def _sampling_arguments(parser: ArgumentParser, max_tokens: int) -> None:
    add = parser.add_argument
    add(
        "--max-tokens",
        type=_integer(1, 2**31),
        default=max_tokens,
        metavar="N",
        help=f"at most N ({max_tokens})",
    )
    add("--temperature", type=_number(0, 100), default=0.0, metavar="T", help="0, the default, is greedy")
    add(
        "--top-p", type=_number(0, 1), default=1.0, metavar="P", help="smallest set with this probability (1)"
    )
    add("--top-k", type=_integer(0, 2**31), default=0, metavar="K", help="only the K best; 0 is off")
    add("--seed", type=int, metavar="S", help="the same seed gives the same text")
    add("--model", type=Path, metavar="DIR", help="model directory")
    add("--threads", type=_integer(1, 1024), metavar="N", help="compute threads")
    _speculation_argument(parser)


def _speculation_argument(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--speculate",
        metavar="HOW",
        help="auto (the default), off, or N drafts a step; changes the speed and never the text",
    )


def _speculation(args: Namespace) -> Speculation | None:
    from engine.speculate import parse_speculation

    return None if args.speculate is None else parse_speculation(args.speculate)


def _sampling(args: Namespace) -> SamplingParams:
    from engine.sampling import SamplingParams

    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
    )
    params.validate()
    return params


def _open_engine(args: Namespace) -> Engine:
    from engine.generate import Engine
    from engine.locate import locate

    speculation = _speculation(args)
    return Engine.open(locate(args.model).model_dir, threads=args.threads, speculation=speculation)


def _generate_json(engine: Engine, ids: list[int], params: SamplingParams) -> int:
    started = time.monotonic()
    completion = engine.complete(ids, params)
    report = {
        "model": engine.card.name,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "prompt_token_ids": ids,
        "seconds": round(time.monotonic() - started, 6),
    }
    _write(json.dumps(report, ensure_ascii=False) + "\n")
    return EXIT_WELL


def _stream(steps: Iterable[Step]) -> tuple[int, int]:
    """Write the text as it comes; (exit code, tokens). Ends quietly when nobody reads on."""
    count = 0
    last = ""
    try:
        for step in steps:
            count += not step.is_end
            last = step.text or last
            _write(step.text)
    except KeyboardInterrupt:
        _end_line(last)
        return EXIT_INTERRUPTED, count
    except BrokenPipeError:
        _abandon_stdout()
        return EXIT_WELL, count
    _end_line(last)
    return EXIT_WELL, count


def _end_line(last: str) -> None:
    """On a terminal, leave the prompt of the shell a line of its own; a pipe gets the text alone."""
    if sys.stdout.isatty() and not last.endswith("\n"):
        _write("\n")


def _write(text: str) -> None:
    """UTF-8 to stdout at once, whatever the locale says."""
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    sys.stdout.buffer.flush()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _abandon_stdout() -> None:
    """After a broken pipe: keep the interpreter from flushing into it at exit."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _read_stdin() -> str:
    """The whole of stdin as text, less one newline at its end (a shell's echo adds it)."""
    if sys.stdin.isatty():
        _note("(reading the text from the terminal; end it with Ctrl-D)")
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise HaloError(
            f"The input is not UTF-8 (byte {error.start}).",
            hint="convert it, as with: iconv -f latin1 -t utf-8",
            exit_code=EXIT_COULD_NOT_RUN,
        ) from error


def _print_stats(prompt_tokens: int, tokens: int, seconds: float, tally: Tally) -> None:
    rate = tokens / seconds if seconds > 0 else 0.0
    _note(f"prompt {prompt_tokens} tokens, generated {tokens} in {seconds:.2f} s, {rate:.1f} tokens/s")
    if tally.drafted:
        _note(f"speculation: {tally.accepted} of {tally.drafted} drafts were right, {tally.steps} steps")


Bounded = TypeVar("Bounded", int, float)


def _integer(low: int, high: int) -> Callable[[str], int]:
    return _bounded(int, low, high, "no whole number")


def _number(low: float, high: float) -> Callable[[str], float]:
    return _bounded(float, low, high, "no number")


def _bounded(
    kind: Callable[[str], Bounded], low: float, high: float, otherwise: str
) -> Callable[[str], Bounded]:
    def parse(text: str) -> Bounded:
        try:
            value = kind(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is {otherwise}") from None
        if not low <= value <= high:
            raise ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return parse
