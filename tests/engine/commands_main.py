"""`generate`, `chat` and `serve` as a process of their own, for the tests of engine/commands.py.

With SCRIPT in the environment the native backend is replaced by one that emits these bytes, then ends.
"""

from __future__ import annotations

import argparse
import os
import sys

from engine import commands
from engine.errors import HaloError


def scripted_open(*_args: object, **_kwargs: object) -> object:
    """In the place of Engine.open."""
    from tests.engine.server_fixtures import EOT, ScriptedSession, byte_tokens, make_engine

    script = [*byte_tokens(os.fsencode(os.environ["SCRIPT"])), EOT]
    session = ScriptedSession(script, delay=float(os.environ.get("STEP_SECONDS", "0")))
    return make_engine(session, int(os.environ.get("CONTEXT", "512")), "halo-demo")


def main(argv: list[str] | None = None) -> int:
    """Parse and run, with a HaloError as its sentence and hint."""
    parser = argparse.ArgumentParser(prog="halo")
    subparsers = parser.add_subparsers(required=True)
    for name in ("generate", "chat", "serve"):
        sub = subparsers.add_parser(name)
        getattr(commands, f"configure_{name}")(sub)
        sub.set_defaults(run=getattr(commands, f"run_{name}"))
    args = parser.parse_args(argv)
    if "SCRIPT" in os.environ:
        import engine.generate

        engine.generate.Engine.open = scripted_open
    try:
        return args.run(args)
    except HaloError as error:
        print(error, file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
