"""`halo plan`, `halo status`, `halo generations`: what is there, what would change. They change nothing."""

from __future__ import annotations

import json
import os
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from engine.errors import EXIT_DEGRADED, EXIT_WELL
from provision import endpoint, generations
from provision.desired import load_desired
from provision.install import configure_install, make_context, own_prefix
from provision.install import run_plan as print_plan
from provision.layout import Layout, default_scope, places
from provision.render import print_table


def configure_plan(parser: ArgumentParser) -> None:
    """Arguments of `halo plan`: those of install."""
    configure_install(parser)


def run_plan(args: Namespace) -> int:
    """What `halo install` would do."""
    return print_plan(make_context(args), as_json=args.json)


def _configure_places(parser: ArgumentParser) -> None:
    parser.add_argument("--scope", choices=("user", "system"), help="whose installation")
    parser.add_argument("--prefix", type=Path, metavar="DIR", help="where it lives")
    parser.add_argument("--json", action="store_true", help="print JSON")


def configure_status(parser: ArgumentParser) -> None:
    """Arguments of `halo status`."""
    _configure_places(parser)


def configure_generations(parser: ArgumentParser) -> None:
    """Arguments of `halo generations`."""
    _configure_places(parser)


def report_layout(args: Namespace) -> Layout:
    """The installation asked about: the flags, else the generation that runs, else the default.

    Reading needs no root, so a system installation is looked at by anyone.
    """
    home = os.environ.get("HALO_GENERATION_DIR", "")
    scope, prefix = args.scope, args.prefix
    if prefix is None and home:
        scope = scope or (generations.read_manifest(Path(home)) or {}).get("scope")
        prefix = own_prefix(Path(home), scope)
    return places(scope or default_scope(), prefix)


def describe(layout: Layout) -> dict[str, Any]:
    """The state of an installation, as data."""
    from provision import services
    from units.render import UNIT_NAMES

    name = generations.current_id(layout)
    manifest = (generations.read_manifest(layout.generation(name)) if name else None) or {}
    listen = str(manifest.get("listen") or load_desired(layout.config).listen)
    answer = endpoint.health(listen) if name else None
    running = answer is not None and answer.get("generation") == name
    managed = bool(name) and services.manager_runs(layout.scope)
    units = {unit: services.is_active(layout.scope, unit) for unit in UNIT_NAMES} if managed else {}
    return {
        "schema": 1,
        "prefix": str(layout.prefix),
        "scope": layout.scope,
        "current": name,
        "previous": generations.previous_id(layout),
        "blessed": bool(name) and generations.blessed(layout, str(name)),
        "sound": bool(name) and generations.is_sound(layout.generation(str(name))),
        "profile": manifest.get("profile"),
        "model": (manifest.get("model") or {}).get("name"),
        "listen": listen,
        "units": units,
        "health": answer,
        "well": running or (bool(name) and not managed),
    }


def run_status(args: Namespace) -> int:
    """Print the state; exit 0 when well, 2 when installed and not well or not installed."""
    state = describe(report_layout(args))
    if args.json:
        print(json.dumps(state, indent=1))
        return EXIT_WELL if state["well"] else EXIT_DEGRADED
    if state["current"] is None:
        print(f"halo is not installed in {state['prefix']}\nhint: python3 install.py")
        return EXIT_DEGRADED
    rows = [
        ("generation", f"{state['current']}" + ("" if state["blessed"] else "  (never proved)")),
        ("previous", str(state["previous"] or "none")),
        ("profile", f"{state['profile']}, {state['scope']} scope, {state['prefix']}"),
        ("model", str(state["model"])),
        *((unit, "active" if active else "NOT active") for unit, active in state["units"].items()),
        ("server", _server_line(state)),
    ]
    for label, text in rows:
        print(f"{label:<20} {text}")
    return EXIT_WELL if state["well"] else EXIT_DEGRADED


def _server_line(state: dict[str, Any]) -> str:
    answer = state["health"]
    if answer is None:
        return f"nobody answers at {state['listen']}" + (
            "" if state["units"] else "; no systemd here starts it"
        )
    same = (
        "this generation"
        if answer["generation"] == state["current"]
        else f"generation {answer['generation']}"
    )
    return f"http://{state['listen']} answers: {same}, backend {answer.get('backend', '?')}"


def run_generations(args: Namespace) -> int:
    """List the generations, newest first."""
    layout = report_layout(args)
    entries = []
    for directory in sorted(layout.generations.glob("*"), key=lambda path: -path.stat().st_mtime):
        manifest = generations.read_manifest(directory)
        if manifest is None:
            continue
        name = directory.name
        role = {generations.previous_id(layout): "previous", generations.current_id(layout): "current"}.get(
            name, ""
        )
        blessed = generations.blessed(layout, name)
        entries.append({"id": name, "role": role, "created": manifest["created"], "blessed": blessed})
    if args.json:
        print(json.dumps({"schema": 1, "generations": entries}, indent=1))
    elif not entries:
        print(f"no generation in {layout.prefix}")
    else:
        print_table(
            ("generation", "role", "created", "proved"),
            [
                (str(e["id"]), str(e["role"]), str(e["created"]), "yes" if e["blessed"] else "no")
                for e in entries
            ],
        )
    return EXIT_WELL
