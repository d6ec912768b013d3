"""Step 4: the model in its store, prepared for the backend, proved by a decode, linked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from engine.errors import HaloError
from engine.formats.store import is_whole, read_description, store_name, unpack
from provision.context import Action, Context
from provision.endpoint import check_golden
from provision.files import remove_tree
from provision.model_source import model_source
from provision.run import run


def plan(ctx: Context) -> list[Action]:
    """What would be unpacked and linked."""
    description = read_description(model_source(ctx.source))
    if ctx.in_place:
        mend = Action(f"unpack and prepare {description['name']} anew", "the stored model is damaged")
        return [] if is_whole(ctx.layout.store, description) else [mend]
    actions = [
        Action(f"link model {description['name']} into the generation", "the server opens models/default")
    ]
    if not is_whole(ctx.layout.store, description):
        store = ctx.layout.store / store_name(description)
        what = f"unpack and prepare {description['name']} in {store}"
        actions.insert(0, Action(what, "it is not in the store, or not whole"))
    return actions


def apply(ctx: Context) -> str:
    """Have the model ready; returns its name."""
    source = model_source(ctx.source)
    description = read_description(source)
    name = str(description["name"])
    if ctx.in_place:
        if is_whole(ctx.layout.store, description):
            return f"{name} in place"
        mend(ctx, source, name)
        return f"{name} was damaged and is whole again"
    stored = ctx.layout.store / store_name(description)
    if not is_whole(ctx.layout.store, description):
        with ctx.change("model", f"unpack {name}"):
            if not stored.exists():  # else another generation links to it
                ctx.undo.append((f"remove {stored}", lambda: remove_tree(stored)))
            unpack(source, ctx.layout.store, anew=True)
    report = prove(ctx, str(stored))
    check_golden([int(token) for token in report["ids"]], description["golden"][0])
    ctx.sentence = description["golden"][0]["prompt"] + report["text"]
    with ctx.change("model", f"link {name}"):
        models = ctx.directory / "models"
        for link, target in ((models / name, str(stored)), (models / "default", name)):
            link.unlink(missing_ok=True)
            link.symlink_to(target)
    return name


def mend(ctx: Context, source: Path, name: str) -> None:
    """Put a damaged model's store right under the generation that links to it; the server maps it anew."""
    with ctx.change("model", f"unpack {name} anew"):
        stored = unpack(source, ctx.layout.store, anew=True)
        prove(ctx, str(stored))
    ctx.restart_due = True


def prove(ctx: Context, model_dir: str) -> dict[str, Any]:
    """Prepare the model and decode its golden prompt in a child, without a server."""
    env = {"HALO_GENERATION_DIR": str(ctx.directory)}
    argv: list[str | Path] = [ctx.venv_python, "-I", "-m", "provision.prove", model_dir]
    result = run(argv, log=ctx.log, env=env, check=False, timeout=600, tick=ctx.screen.tick)
    try:
        report: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        report = {"error": f"The engine cannot decode: {result.last_line() or result.returncode}", "hint": ""}
    if "error" in report:
        if "No space left" in str(report["error"]):
            raise HaloError(
                "The model cannot be prepared: the disk is full.", hint="df -h; make room, then again"
            )
        raise HaloError(report["error"], hint=report["hint"] or "see the log")
    if os.environ.get("HALO_LIB_DIR"):
        ctx.warn(
            "HALO_LIB_DIR is set: this decode may not be the generation's own library.", "unset HALO_LIB_DIR"
        )
    return report
