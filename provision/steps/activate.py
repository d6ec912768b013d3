"""Step 6: make the generation current by one rename, and have systemd run it. Not whether it works."""

from __future__ import annotations

import getpass
from pathlib import Path

from engine.errors import HaloError
from provision import endpoint, generations, services
from provision.context import Action, Context
from provision.files import atomic_symlink
from units.render import SERVICE, SOCKET


def plan(ctx: Context) -> list[Action]:
    """What would be switched, linked and started."""
    actions = []
    live = generations.current_id(ctx.layout)
    if live != ctx.name:
        actions.append(
            Action(f"point {ctx.layout.current} at generations/{ctx.name}", f"current is {live or 'nothing'}")
        )
    if not _links_stand(ctx):
        actions.append(
            Action(f"link {ctx.layout.launcher} and {ctx.layout.models_link}", "paths that never change")
        )
    if not ctx.desired.units:
        return actions
    if not services.manager_runs(ctx.layout.scope):
        return [*actions, Action("leave the server unstarted", "no systemd manages this scope here")]
    if not services.links_in_place(ctx.layout):
        actions.append(
            Action(f"link the units into {ctx.layout.unit_dir}, also for boot", "they are not there")
        )
    answer = endpoint.health(ctx.desired.listen) if live == ctx.name else None
    if answer is None or answer["generation"] != ctx.name:
        actions.append(Action(f"restart {SERVICE}", "it does not run this generation"))
    if ctx.layout.scope == "user" and not services.lingers():
        actions.append(
            Action(f"loginctl enable-linger {getpass.getuser()}", "the server should run without a login")
        )
    return actions


def apply(ctx: Context) -> str:
    """Switch and start; what is undone when this or the proof fails is put on ctx.undo first."""
    before = generations.current_id(ctx.layout)
    started: list[list[services.Operation]] = []
    # Undone in reverse, and systemd is told after `current` is back: so this comes before the switch.
    ctx.undo.append(("have systemd run what ran before", lambda: _restore(ctx, started)))
    switch(ctx)
    if not ctx.desired.units:
        return "current; units left alone (--no-units)"
    if not services.manager_runs(ctx.layout.scope, ctx.log):
        ctx.warn(
            "No systemd runs here, so the server is not a service.",
            f"start it yourself: {ctx.layout.current}/bin/halo serve",
        )
        return "current; no service"
    start(ctx, before, started)
    ctx.served = True
    if ctx.layout.scope == "user":
        linger(ctx)
    return "running" if ctx.changes else "in place"


def _links_stand(ctx: Context) -> bool:
    wanted = (
        (ctx.layout.models_link, "current/models"),
        (ctx.layout.launcher, f"{ctx.layout.current}/bin/halo"),
    )
    return all(link.is_symlink() and str(link.readlink()) == target for link, target in wanted)


def switch(ctx: Context) -> None:
    """`current` by one rename, then the links that go through it."""
    layout = ctx.layout
    old, old_previous = generations.current_id(layout), generations.previous_id(layout)
    if old != ctx.name:
        with ctx.change("activate", f"make {ctx.name} current", old=old, new=ctx.name):
            ctx.undo.append(("put current back", lambda: generations.switch_back(layout, old, old_previous)))
            generations.switch(layout, ctx.name)
    if not _links_stand(ctx):
        with ctx.change("activate", f"link {layout.launcher} and {layout.models_link}"):
            _link(ctx, layout.models_link, "current/models")
            _link(ctx, layout.launcher, f"{layout.current}/bin/halo")


def _link(ctx: Context, path: Path, target: str) -> None:
    before = str(path.readlink()) if path.is_symlink() else None
    if before == target:
        return
    others = before is not None and before.endswith("/current/bin/halo") and not ctx.layout.standard
    if path.exists() and (before is None or others):
        owner = before.removesuffix("/current/bin/halo") if before else "somebody else"
        ctx.warn(f"{path} belongs to {owner}, so it is left alone.", f"use {ctx.layout.current}/bin/halo")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    ctx.undo.append((f"put {path} back", lambda: _unlink(path, before)))
    atomic_symlink(path, target)


def _unlink(link: Path, before: str | None) -> None:
    if before is None:
        link.unlink(missing_ok=True)
    else:
        atomic_symlink(link, before)


def start(ctx: Context, before: str | None, started: list[list[services.Operation]]) -> None:
    """Boot links, daemon-reload, restart: all through pyinfra's worker, and only what is not as it should be.

    `started` receives the operations that undo this, before anything is done.
    """
    layout = ctx.layout
    links = services.link_operations(layout)
    switched = before != ctx.name
    # What answers is asked, not what the links say: a killed run may have switched and not restarted.
    answer = endpoint.health(ctx.desired.listen) if before is not None else None
    right = answer is not None and answer["generation"] == ctx.name
    if right and not links and not switched and not ctx.restart_due:
        return
    socket_changed = before is not None and (
        answer is None or _unit_text(ctx, before) != _unit_text(ctx, ctx.name)
    )
    back = services.start_operations(layout, socket_changed=socket_changed)
    with ctx.change("activate", "have systemd run the generation"):
        if switched or links:
            started.append(services.stop_operations(layout) if before is None or links else back)
        operations = [*links, *services.start_operations(layout, socket_changed=socket_changed)]
        services.perform(ctx.venv_python, operations, ctx.log, ctx.screen.tick)


def _unit_text(ctx: Context, name: str) -> str:
    path = ctx.layout.generation(name) / "units" / SOCKET
    return path.read_text() if path.is_file() else ""


def _restore(ctx: Context, started: list[list[services.Operation]]) -> None:
    for operations in started:
        services.perform(ctx.venv_python, operations, ctx.log)


def linger(ctx: Context) -> None:
    """Without linger a user's server ends with the last login and does not start at boot."""
    user = getpass.getuser()
    if services.lingers():
        return
    operation = {"op": "linger", "user_name": user, "what": f"enable linger for {user}"}
    try:
        with ctx.change("activate", f"enable linger for {user}"):
            services.perform(ctx.venv_python, [operation], ctx.log, ctx.screen.tick)
    except HaloError as error:
        ctx.log.write(f"linger: {error}")
        ctx.warn(
            "The server will end with your last login: linger was denied.",
            f"sudo loginctl enable-linger {user}",
        )
