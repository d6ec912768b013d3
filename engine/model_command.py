"""`halo model`: its arguments and what is printed. The work is in engine/formats/ and engine/pull.py.

Nothing heavy is imported at the top: `halo --help` reads the arguments of every command.
"""

from __future__ import annotations

import shlex
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from engine.errors import EXIT_WELL

FORMATS: Final = ("h1b2", "h1b4", "tq2_0", "i2_s")
_SOURCE: Final = "checkpoint's folder (with config.json), .gguf or .h1b file, or model directory"


def configure_model(parser: ArgumentParser) -> None:
    """Arguments of `halo model`, which has actions of its own."""
    from engine import model_store_command

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _configure_import(
        _action(actions, "import", "turn a checkpoint or file into a model directory", run_import)
    )
    _configure_export(_action(actions, "export", "write a model as a file that others read", run_export))
    _configure_prepare(_action(actions, "prepare", "make model.halo of a directory anew", run_prepare))
    model_store_command.configure(actions)


def _action(actions: Any, name: str, what: str, run: Callable[[Namespace], int]) -> ArgumentParser:  # noqa: ANN401
    """An action's parser; argparse has no public type for what `add_subparsers` gives."""
    parser: ArgumentParser = actions.add_parser(name, help=what, description=what)
    parser.set_defaults(run_action=run)
    parser.add_argument(
        "--debug", action="store_true", default=SUPPRESS, help="show a traceback with an error"
    )
    return parser


def _configure_import(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help=_SOURCE)
    add("destination", type=Path, metavar="DEST", help="directory to make; it must not exist")
    add("--name", metavar="NAME", help="the model's name (the folder's, or the file's)")
    _reading_arguments(parser)


def _configure_export(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("source", type=Path, metavar="MODEL", help=_SOURCE)
    add("destination", type=Path, metavar="FILE", help="file to make; it must not exist")
    add("--format", choices=FORMATS, required=True, help=".h1b version 2 or 4, or GGUF in TQ2_0 or I2_S")
    add("--embedding", choices=("f16", "bf16", "f32"), default="f16", help="type of embedding and head (f16)")
    add(
        "--architecture",
        choices=("bitnet", "bitnet-b1.58", "llama"),
        default="",
        help="GGUF's name of it (bitnet for tq2_0, bitnet-b1.58 for i2_s, llama without sub-norms)",
    )
    add("--exact", action="store_true", help="round nothing: take a form that holds each number, or refuse")
    add("--name", metavar="NAME", default="", help="general.name of the file (the model's)")
    _reading_arguments(parser)


def _configure_prepare(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "directory",
        type=Path,
        metavar="MODEL",
        help="model directory, with a .h1b or .gguf file or model.halo",
    )
    _activation_argument(parser)


def _activation_argument(parser: ArgumentParser) -> None:
    parser.add_argument("--activation", choices=("relu2", "silu"), help="of a GGUF file that does not say it")


def _reading_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help=".htok file or checkpoint's folder, instead of the model's own",
    )
    _activation_argument(parser)


def run_model(args: Namespace) -> int:
    """Run the action that was chosen."""
    code: int = args.run_action(args)
    return code


def run_import(args: Namespace) -> int:
    """Import, then say what was made and what a person should know of it."""
    from engine.formats.importer import import_model

    report = import_model(
        args.source,
        args.destination,
        args.name,
        tokenizer=args.tokenizer,
        activation=args.activation,
        progress=_show,
    )
    for name, facts in report.description["files"].items():
        print(f"{report.directory / name}: {facts['bytes']} bytes, sha256 {facts['sha256']}")
    for note in report.notes:
        print(note)
    print(f"next: halo generate --model {shlex.quote(str(report.directory))} PROMPT")
    return EXIT_WELL


def run_export(args: Namespace) -> int:
    """Export, then say what was written and what was rounded."""
    from engine.formats.exporter import ExportOptions, export_model

    report = export_model(
        args.source,
        args.destination,
        args.format,
        ExportOptions(args.embedding, args.architecture, args.exact, args.name),
        tokenizer=args.tokenizer,
        activation=args.activation,
        progress=_show,
    )
    for file in report.files:
        print(f"{file}: {file.stat().st_size} bytes")
    for note in report.notes:
        print(note)
    return EXIT_WELL


def run_prepare(args: Namespace) -> int:
    """Make model.halo of a directory anew from the model file that lies in it, and seal it."""
    from engine.formats.importer import prepare_directory

    made = prepare_directory(args.directory, activation=args.activation, progress=_show)
    print(f"{made}: {made.stat().st_size} bytes")
    return EXIT_WELL


def _show(what: str, done: int, total: int) -> None:
    """How far the work is, on one line of a terminal; nothing for a log."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{what}: {done} of {total}", end=end, file=sys.stderr, flush=True)
