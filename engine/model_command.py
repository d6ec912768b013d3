"""`halo model import`: its arguments and what it prints. The import itself is engine/formats/hf.py.

Nothing heavy is imported at the top: `halo --help` reads the arguments of every command.
"""

from __future__ import annotations

import shlex
from argparse import SUPPRESS, ArgumentParser, Namespace
from pathlib import Path

from engine.errors import EXIT_WELL


def configure_model(parser: ArgumentParser) -> None:
    """Arguments of `halo model`, which has actions of its own."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    what = "turn a Hugging Face BitNet checkpoint into a model directory"
    action = actions.add_parser("import", help=what, description=what)
    action.add_argument(
        "source", type=Path, metavar="SRC", help="folder with config.json and its safetensors"
    )
    action.add_argument("destination", type=Path, metavar="DEST", help="directory to make; it must not exist")
    action.add_argument("--name", metavar="NAME", help="the model's name (the folder's)")
    action.add_argument(
        "--debug", action="store_true", default=SUPPRESS, help="show a traceback with an error"
    )


def run_model(args: Namespace) -> int:
    """Import, prepare for the engine, then say what was made and what a person should know of it."""
    from engine.formats.h1b import read_h1b
    from engine.formats.hf import import_checkpoint
    from engine.formats.prepared import prepare
    from engine.formats.store import PREPARED, seal

    report = import_checkpoint(args.source, args.destination, args.name)
    prepare(read_h1b(report.directory / "model.h1b"), report.directory / PREPARED)
    seal(report.directory)
    for name, facts in report.description["files"].items():
        print(f"{report.directory / name}: {facts['bytes']} bytes, sha256 {facts['sha256']}")
    for note in report.notes:
        print(note)
    print(f"next: halo generate --model {shlex.quote(str(report.directory))} PROMPT")
    return EXIT_WELL
