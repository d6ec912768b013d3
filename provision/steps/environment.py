"""The generation's directory, source copy, venv and launcher; shared by the packages and engine steps."""

from __future__ import annotations

import shlex
from typing import Final

from engine.errors import HaloError
from provision.context import Context
from provision.files import atomic_write, copy_files, remove_tree, source_files
from provision.generations import MANIFEST, SOURCE_NAMES
from provision.venv import compile_modules, create, install, pip_command, site_packages

_LAUNCHER: Final = """#!/bin/sh
# The halo of this generation. It knows its own place, so that a rollback takes it along.
HALO_GENERATION_DIR={directory}
export HALO_GENERATION_DIR
exec {directory}/venv/bin/python -I -c 'from provision.cli import main; raise SystemExit(main())' "$@"
"""


def ensure_directory(ctx: Context) -> None:
    """An empty place for the generation; what a killed run left there goes first."""
    if ctx.begun:
        return
    with ctx.change("engine", f"make {ctx.directory}"):
        (ctx.directory / MANIFEST).unlink(missing_ok=True)
        remove_tree(ctx.directory)
        ctx.begun = True
        ctx.undo.append((f"remove {ctx.directory}", lambda: remove_tree(ctx.directory)))
        for name in ("src", "bin", "lib", "units", "models"):
            (ctx.directory / name).mkdir(parents=True)
        copy_files(ctx.source, source_files(ctx.source, SOURCE_NAMES), ctx.directory / "src")
        launcher = _LAUNCHER.format(directory=shlex.quote(str(ctx.directory)))
        atomic_write(ctx.directory / "bin/halo", launcher, 0o755)


def ensure_venv(ctx: Context, *, packages: bool = True) -> None:
    """The venv and, with `packages`, everything of requirements.lock in it."""
    ensure_directory(ctx)
    venv, python = ctx.directory / "venv", ctx.interpreter()
    if not (venv / "bin/python").exists():
        with ctx.change("engine", f"make {venv}"):
            create(python, venv, ctx.log)
            (site_packages(venv, python) / "halo.pth").write_text("../../../../src\n")
    marker = venv / ".filled"
    if not packages or marker.exists():
        return
    pip = pip_command(python, venv, ctx.wheels)
    if pip is None:
        raise HaloError("This Python has neither pip nor ensurepip.", hint="see the packages step")
    with ctx.change("engine", "install the Python packages of requirements.lock"):
        lock = ctx.source / "provision/requirements.lock"
        install(pip, lock, ctx.log, wheels=ctx.wheels, tick=ctx.screen.tick)
        compile_modules(venv, python, ctx.directory / "src", ctx.log)
    marker.touch()
