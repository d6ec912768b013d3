"""Step 5: render the generation's units, make an API key where one is needed, and complete the manifest."""

from __future__ import annotations

import datetime
import hashlib
import json
import secrets

from engine.formats.store import read_description, store_name
from provision.context import Action, Context
from provision.desired import is_loopback
from provision.files import atomic_write, fsync_tree, write_secret
from provision.generations import MANIFEST, SCHEMA, hash_files
from provision.model_source import model_source
from units.render import UnitContext, render_units


def plan(ctx: Context) -> list[Action]:
    """What would be rendered."""
    actions = []
    if needs_key(ctx):
        actions.append(
            Action(f"make an API key in {ctx.layout.api_key}", "the server listens beyond loopback")
        )
    if not ctx.in_place:
        actions.append(
            Action("render halo-server.socket and halo-server.service", f"listen on {ctx.desired.listen}")
        )
    return actions


def apply(ctx: Context) -> str:
    """Complete the generation; its manifest is written last, after everything else is on the disk."""
    keyed = not is_loopback(ctx.desired.listen)
    if needs_key(ctx):
        with ctx.change("units", f"make an API key in {ctx.layout.api_key}"):
            make_key(ctx)
    if ctx.in_place:
        return "in place"
    context = UnitContext(
        scope=ctx.layout.scope,
        profile=ctx.profile,
        prefix=ctx.layout.prefix,
        listen=ctx.desired.listen,
        api_keys=ctx.layout.api_keys_hashed if keyed else None,
        namespaces=ctx.namespaces,
    )
    if not ctx.namespaces:
        ctx.warn(
            "This machine lets no user make namespaces, so the service gets a weaker sandbox.",
            "install for the whole machine to have the full one: sudo python3 install.py --scope system",
        )
    with ctx.change("units", f"complete generation {ctx.name}"):
        for name, text in render_units(context).items():
            (ctx.directory / "units" / name).write_text(text)
        write_manifest(ctx)
    return f"{ctx.layout.scope} units for {ctx.desired.listen}" + (
        f", key in {ctx.layout.api_key}" if keyed else ""
    )


def needs_key(ctx: Context) -> bool:
    """Whether the server will want a key and there is none yet."""
    if is_loopback(ctx.desired.listen):
        return False
    return not (ctx.layout.api_key.is_file() and ctx.layout.api_keys_hashed.is_file())


def make_key(ctx: Context) -> None:
    """A key for the owner (0600), and its hash for the server (0600); the key is never printed."""
    layout = ctx.layout
    if not layout.api_key.is_file():
        write_secret(layout.api_key, f"halo-{secrets.token_urlsafe(32)}\n")
        ctx.undo.append((f"remove {layout.api_key}", lambda: layout.api_key.unlink(missing_ok=True)))
    hashed = hashlib.sha256(layout.api_key.read_text().strip().encode()).hexdigest()
    atomic_write(layout.api_keys_hashed, hashed + "\n", 0o600)
    ctx.undo.append(
        (f"remove {layout.api_keys_hashed}", lambda: layout.api_keys_hashed.unlink(missing_ok=True))
    )


def write_manifest(ctx: Context) -> None:
    """manifest.json: what this generation is, with the hashes of what must not change."""
    description = read_description(model_source(ctx.source))
    manifest = {
        "schema": SCHEMA,
        "id": ctx.name,
        "version": ctx.version,
        "source_sha256": ctx.source_sha256,
        "profile": ctx.profile,
        "scope": ctx.layout.scope,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": ctx.interpreter().tag,
        "files": hash_files(ctx.directory),
        "model": {
            "name": description["name"],
            "store": store_name(description),
            "golden": description["golden"],
        },
        "compiler": ctx.build,
        "listen": ctx.desired.listen,
        "systemd": ctx.desired.units,
    }
    fsync_tree(ctx.directory)
    atomic_write(ctx.directory / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
