"""Step 3: the generation's source, venv and native library, built here or taken from a checked bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

from engine.errors import HaloError
from provision.bundle import prebuilt_library
from provision.context import Action, Context
from provision.files import remove_tree
from provision.run import run
from provision.steps.environment import ensure_venv
from provision.toolchain import HIP_LIBRARY, HIP_TARGET, build_native, libraries

# A hardened service cannot write byte code, so what it imports is compiled now; the rest when it is used.
_WARM: Final = (
    "import engine.server.serve, engine.server.app, engine.generate, engine.commands, provision.cli"
)


def plan(ctx: Context) -> list[Action]:
    """What would be built."""
    if ctx.in_place:
        return []
    library = "copy the bundle's native library"
    if ctx.bundle is None or prebuilt_library(ctx.bundle, hip=ctx.hip) is None:
        library = "build the native library with CMake"
    if ctx.hip:
        library += f", and the GPU's ({HIP_LIBRARY}, {HIP_TARGET})"
    return [
        Action(f"make generation {ctx.name} in {ctx.directory}", "this source is not installed here"),
        Action("make its venv and install requirements.lock by hash", "a generation has its own packages"),
        Action(library, "the engine is native code"),
    ]


def apply(ctx: Context) -> str:
    """Make the engine's part of the generation; returns what built it."""
    if ctx.in_place:
        return "in place"
    ensure_venv(ctx)
    build = ctx.directory / "build"
    names = libraries(hip=ctx.hip)
    prebuilt = prebuilt_library(ctx.bundle, hip=ctx.hip) if ctx.bundle is not None else None
    if prebuilt is not None:
        with ctx.change("engine", f"copy {' and '.join(names)} from the bundle"):
            for name in (*names, "build.json"):
                shutil.copyfile(prebuilt.parent / name, ctx.directory / "lib" / name)
            ctx.build = json.loads((ctx.directory / "lib/build.json").read_text())
    else:
        if ctx.tools is None:
            raise HaloError("There is no compiler to build the engine with.", hint="see the packages step")
        with ctx.change("engine", f"build {' and '.join(names)}"):
            source, lib = ctx.directory / "src/engine/native", ctx.directory / "lib"
            ctx.build = build_native(
                source, build / "native", lib, ctx.tools, ctx.log, ctx.screen.tick, hip=ctx.hip
            )
    remove_tree(build)
    warm: list[str | Path] = [ctx.venv_python, "-I", "-c", _WARM]
    run(warm, log=ctx.log, what="The installed packages do not import", tick=ctx.screen.tick, timeout=300)
    return str(ctx.build.get("compiler", ""))
