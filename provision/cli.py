"""The `halo` command line: one table of subcommands, imported when used. Errors become sentences here."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Final, NoReturn

from engine.errors import EXIT_COULD_NOT_RUN, HaloError


@dataclass(frozen=True)
class Command:
    """One subcommand: its help line, and where its two functions are."""

    name: str
    help: str
    module: str
    configure: str
    run: str


COMMANDS: Final = (
    Command(
        "install",
        "bring this box to its declared state",
        "provision.install",
        "configure_install",
        "run_install",
    ),
    Command(
        "plan",
        "say what install would do, and change nothing",
        "provision.report",
        "configure_plan",
        "run_plan",
    ),
    Command(
        "status", "what is current, and whether it runs", "provision.report", "configure_status", "run_status"
    ),
    Command(
        "generations", "list the generations", "provision.report", "configure_generations", "run_generations"
    ),
    Command(
        "bundle", "make one file that installs offline", "provision.bundle", "configure_bundle", "run_bundle"
    ),
    Command(
        "doctor",
        "say what is wrong and how to mend it",
        "checks.doctor",
        "configure_doctor",
        "run_doctor_command",
    ),
    Command("generate", "continue a prompt", "engine.commands", "configure_generate", "run_generate"),
    Command("chat", "talk to the model", "engine.commands", "configure_chat", "run_chat"),
    Command("serve", "serve the APIs", "provision.serve", "configure_serve", "run_serve"),
    Command("ppl", "measure the perplexity of a text", "engine.ppl_command", "configure_ppl", "run_ppl"),
    Command(
        "bench", "measure the speed, and compare", "engine.bench_command", "configure_bench", "run_bench"
    ),
    Command("model", "import a checkpoint", "engine.model_command", "configure_model", "run_model"),
)


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is one of ours: a sentence, a hint, exit code 3 (2 would mean degraded)."""

    def error(self, message: str) -> NoReturn:
        raise HaloError(
            f"{message[:1].upper()}{message[1:]}.", hint=f"{self.prog} --help", exit_code=EXIT_COULD_NOT_RUN
        )


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser; only the chosen subcommand's module is imported for its arguments."""
    parser = Parser(
        prog="halo", description="One command from a bare machine to a box that decodes a ternary LLM."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        sub = subparsers.add_parser(command.name, help=command.help, description=command.help)
        sub.add_argument("--debug", action="store_true", help="show a traceback with an error")
        if command.name == chosen:
            getattr(import_module(command.module), command.configure)(sub)
    return parser


def version() -> str:
    """The version of the source that runs."""
    from provision.generations import version_of
    from provision.layout import source_root

    return version_of(source_root())


def dispatch(argv: Sequence[str]) -> int:
    """Parse, import the one command, run it."""
    names = {command.name: command for command in COMMANDS}
    chosen = next((word for word in argv if word in names), None)
    parser = build_parser(chosen)
    args = parser.parse_args(argv)
    if args.version:
        print(f"halo {version()}")
        return 0
    if args.command is None:
        parser.print_help()
        return 0
    command = names[args.command]
    run: Callable[[argparse.Namespace], int] = getattr(import_module(command.module), command.run)
    return run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. No traceback without --debug."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            return dispatch(words)
        finally:
            sys.stdout.flush()  # here, where a reader that went away is handled; --help leaves by SystemExit
    except HaloError as error:
        if "--debug" in words:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away; closing stdout again at exit must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:  # a bug of ours: still a sentence, and the way to see where
        if "--debug" in words:
            raise
        print(
            f"error: {type(error).__name__}: {error}\nhint: the same again with --debug shows where",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
