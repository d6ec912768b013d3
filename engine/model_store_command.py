"""`halo model pull`, `list` and `verify`: arguments and what they print. The work is in engine/pull.py and
engine/inventory.py.

Nothing heavy is imported at the top: `halo --help` reads the arguments of every command.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engine.errors import EXIT_ERROR, EXIT_WELL, HaloError

if TYPE_CHECKING:
    from engine.hub import RemoteFile
    from engine.pull import Pulled, Wish

STALL_SECONDS: Final = 30.0


def configure(actions: Any) -> None:  # noqa: ANN401  # argparse names no public type for it
    """Add the actions to `halo model`'s."""
    _configure_pull(
        _action(actions, "pull", "fetch a model from a Hugging Face hub, and import it", run_pull)
    )
    _configure_list(_action(actions, "list", "show the models that this machine has", run_list))
    _configure_verify(_action(actions, "verify", "check every byte of a model directory", run_verify))


def _action(actions: Any, name: str, what: str, run: Callable[[Namespace], int]) -> ArgumentParser:  # noqa: ANN401
    parser: ArgumentParser = actions.add_parser(name, help=what, description=what)
    parser.set_defaults(run_action=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--debug", action="store_true", default=SUPPRESS, help="show a traceback with an error"
    )
    return parser


def _configure_pull(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("repo", metavar="REPO[@REVISION]", help="as microsoft/bitnet-b1.58-2B-4T; main unless said")
    add("destination", nargs="?", type=Path, metavar="DEST", help="directory to make (./ and REPO's name)")
    add("--file", metavar="FILE", help="the one .gguf or .h1b file of REPO that is the model")
    add("--name", metavar="NAME", help="the model's name (REPO's)")
    add("--no-import", action="store_true", help="leave the files as they are published, in DEST")
    add("--keep", action="store_true", help="keep the fetched files after the import")
    add("--endpoint", metavar="URL", help="another hub (HF_ENDPOINT, else https://huggingface.co)")
    add("--token-file", type=Path, metavar="FILE", help="file with a token (else HF_TOKEN, HF_TOKEN_PATH)")


def _configure_list(parser: ArgumentParser) -> None:
    parser.add_argument(
        "directories",
        nargs="*",
        type=Path,
        metavar="DIR",
        help="a model, or a folder of models (the installed ones, HALO_MODEL, and the current directory)",
    )


def _configure_verify(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("directory", nargs="?", type=Path, metavar="DIR", help="model directory (the one in use)")
    add("--seal", action="store_true", help="take what was changed on purpose as right, and seal it anew")


def run_pull(args: Namespace) -> int:
    """Fetch, import, and say what is there now."""
    from engine.fetch import Client
    from engine.hub import endpoint_of, read_token, split_repo
    from engine.pull import Wish, pull
    from engine.pull_progress import progress_for

    repo, revision = split_repo(args.repo)
    destination = args.destination or Path(args.name or repo.rpartition("/")[2])
    if not args.no_import and destination.exists():
        raise HaloError(f"{destination} exists already.", hint="name a directory that does not exist")
    client = Client(
        endpoint_of(args.endpoint, os.environ), read_token(args.token_file, os.environ), stall=STALL_SECONDS
    )
    work = destination if args.no_import else destination.parent / f".{destination.name}.pull"
    wish = Wish(repo, revision, args.file)
    with progress_for(sys.stderr) as progress:
        try:
            look = _fetched_whole if args.no_import else _importable
            pulled = pull(client, wish, work, progress, look=look)
        except (KeyboardInterrupt, HaloError):
            if work.exists():
                progress.note(f"What was fetched is kept in {work}; the same command goes on from there.")
            raise
    if not args.no_import:
        _import(pulled, wish, destination, args.name or repo.rpartition("/")[2], keep=args.keep)
    return _report_pull(args, pulled, destination)


def _fetched_whole(_directory: Path, _weights: RemoteFile) -> int:
    return 0


def _importable(directory: Path, weights: RemoteFile) -> int:
    """Refuse what cannot be imported before its weights are fetched; the bytes that the import will write."""
    from engine.formats.hf_config import read_config
    from engine.formats.tokenizer_files import tokenizer_files
    from engine.inventory import parameters

    if not weights.path.endswith(".safetensors"):
        return weights.size
    read = read_config(directory)
    tokenizer_files(directory, read)
    config = read.model
    tables = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
    return (parameters(config) - tables) // 4 + 4 * tables


def _import(pulled: Pulled, wish: Wish, destination: Path, name: str, *, keep: bool) -> None:
    """Make the model directory; what was fetched goes then, unless it is to stay or the import failed."""
    import shutil

    from engine.formats.importer import import_model
    from engine.pull import RECORD

    source = pulled.directory / pulled.files[-1].name if wish.file else pulled.directory
    try:
        report = import_model(source, destination, name, progress=_show_import)
    except HaloError as error:
        print(f"What was fetched is kept: {source}", file=sys.stderr)
        again = f"halo model import {shlex.quote(str(source))} {shlex.quote(str(destination))}"
        raise HaloError(
            error.message, hint=f"{error.hint}; then: {again}", exit_code=error.exit_code
        ) from error
    shutil.copyfile(pulled.directory / RECORD, destination / RECORD)
    for note in report.notes:
        print(note, file=sys.stderr)
    if not keep:
        shutil.rmtree(pulled.directory)


def _show_import(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rimport: {what} {done} of {total} ", end="\n" if done == total else "", file=sys.stderr)


def _report_pull(args: Namespace, pulled: Pulled, destination: Path) -> int:
    size = sum(file.size for file in pulled.files)
    if args.json:
        files = {file.path: {"bytes": file.size, "hash": file.pin} for file in pulled.files}
        told = {"directory": str(destination), "commit": pulled.commit, "bytes": size, "files": files}
        print(json.dumps({**told, "imported": not args.no_import}))
        return EXIT_WELL
    print(f"{destination}: {len(pulled.files)} files, {size:,} bytes, commit {pulled.commit}")
    where = shlex.quote(str(destination))
    if args.no_import:
        print(f"next: halo model import {where} DEST")
    else:
        print(f"next: halo chat --model {where}")
    return EXIT_WELL


def run_list(args: Namespace) -> int:
    """One line a model."""
    from engine.inventory import Known, known_models

    models = known_models(args.directories, os.environ)
    if args.json:
        print(json.dumps({"models": [_plain(model) for model in models]}))
        return EXIT_WELL
    if not models:
        print(
            "No models here. `halo install` brings one; `halo model pull REPO` fetches one.", file=sys.stderr
        )
        return EXIT_WELL

    def row(model: Known) -> list[str]:
        if model.problem:
            return [
                model.name,
                "damaged",
                "",
                _bytes(model.bytes),
                "",
                ", ".join(model.used_by),
                str(model.path),
            ]
        return [
            model.name, model.family, _count(model.parameters), _bytes(model.bytes), str(model.context),
            ", ".join(model.used_by), str(model.path),
        ]  # fmt: skip

    rows = [row(model) for model in models]
    for model in models:
        if model.problem:
            print(_clean(model.problem), file=sys.stderr)
    if not sys.stdout.isatty():
        for cells in rows:
            print("\t".join(map(_clean, cells)))
        return EXIT_WELL
    rows.insert(0, ["NAME", "FAMILY", "WEIGHTS", "ON DISK", "CONTEXT", "USED BY", "WHERE"])
    rows = [[_clean(cell) for cell in cells] for cells in rows]
    widths = [max(len(cells[at]) for cells in rows) for at in range(len(rows[0]))]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    return EXIT_WELL


def _plain(model: Any) -> dict[str, Any]:  # noqa: ANN401  # a dataclass of engine.inventory
    from dataclasses import asdict

    return {**asdict(model), "path": str(model.path)}


def run_verify(args: Namespace) -> int:
    """0 where every byte is right, 1 where one is not, 3 where there is nothing to check."""
    from engine.formats.seal import SEAL, seal
    from engine.inventory import verify
    from engine.locate import locate

    directory = args.directory or locate(None).model_dir
    verdict = verify(directory)
    if args.seal:
        seal(directory)
        verdict = verify(directory)
    if args.json:
        wrong = [{"file": name, "problem": problem} for name, problem in verdict.problems]
        told = {"directory": str(directory), "whole": verdict.whole, "problems": wrong}
        print(json.dumps({**told, "cure": verdict.cure if wrong else ""}))
        return EXIT_ERROR if wrong else EXIT_WELL
    for name in verdict.whole:
        print(f"whole    {_clean(name)}")
    for name, problem in verdict.problems:
        print(_clean(f"damaged  {name}: {problem}"))
    if verdict.problems:
        only_seal = all(name == SEAL for name, _ in verdict.problems)
        hint = f"halo model verify --seal {shlex.quote(str(directory))}" if only_seal else verdict.cure
        raise HaloError(f"The model in {directory} is damaged.", hint=hint)
    return EXIT_WELL


def _clean(text: str) -> str:
    """Text of a file that may be anyone's, for a terminal: nothing in it moves the cursor."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _bytes(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
