"""Generations on disk: identity, manifest, soundness, the current link, collection. Not how one is built."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from engine.errors import HaloError
from provision.files import atomic_symlink, remove_tree, sha256_file, source_files
from provision.layout import Layout

MANIFEST: Final = "manifest.json"
SCHEMA: Final = 1
SOURCE_NAMES: Final = (
    "provision",
    "checks",
    "engine",
    "units",
    "install.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


def source_sha256(root: Path) -> str:
    """One hash over the paths and bytes of a generation's source; the lock is part of it."""
    digest = hashlib.sha256()
    for path in source_files(root, SOURCE_NAMES):
        digest.update(f"{path.relative_to(root).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def version_of(root: Path) -> str:
    """The version that pyproject.toml declares."""
    import tomllib

    try:
        declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise HaloError(
            f"{root} is not halo's source.", hint="run install.py from a clone or with --bundle"
        ) from error
    return str(declared)


def generation_id(version: str, source: str, declared: Iterable[str]) -> str:
    """`<version>-<12 hex digits>`: same source, declaration, machine and Python, same generation."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    parts = [source, platform.machine(), platform.libc_ver()[0], python, *declared]
    return f"{version}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:12]}"


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a complete generation, or None."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("schema") == SCHEMA else None


def hash_files(directory: Path) -> dict[str, str]:
    """sha256 of what must not change in a generation: libraries, units, launcher."""
    files = (path for name in ("bin", "lib", "units") for path in sorted((directory / name).rglob("*")))
    return {path.relative_to(directory).as_posix(): sha256_file(path) for path in files if path.is_file()}


def is_sound(directory: Path) -> bool:
    """Whether a generation is complete and its files still have the manifest's hashes."""
    manifest = read_manifest(directory)
    if manifest is None or not (directory / "venv/bin/python").exists():
        return False
    if not (directory / "models/default/model.json").is_file():
        return False
    return bool(manifest.get("files")) and manifest["files"] == hash_files(directory)


def current_id(layout: Layout) -> str | None:
    """The name of the generation that `current` points at."""
    return layout.current.readlink().name if layout.current.is_symlink() else None


def previous_id(layout: Layout) -> str | None:
    """The name of the generation that `previous` points at."""
    return layout.previous.readlink().name if layout.previous.is_symlink() else None


def choose_name(layout: Layout, wanted: str) -> str:
    """The directory name for the generation `wanted`.

    A current generation that is damaged is not remade under its own server's feet: its repair is `wanted-rN`.
    """
    live = current_id(layout) or ""
    if (live == wanted or live.startswith(f"{wanted}-r")) and is_sound(layout.generation(live)):
        return live
    for number in range(100):
        name = wanted if number == 0 else f"{wanted}-r{number}"
        if name != live:
            return name
    raise HaloError("There are a hundred repairs of one generation.", hint=f"look into {layout.generations}")


def switch(layout: Layout, name: str) -> str | None:
    """Make `name` current by one rename; what was current becomes previous. Returns the old name."""
    if read_manifest(layout.generation(name)) is None:
        raise HaloError(
            f"Generation {name} is not complete, so it does not become current.", hint="halo install"
        )
    old = current_id(layout)
    if old == name:
        return old
    if old is not None:
        atomic_symlink(layout.previous, f"generations/{old}")
    atomic_symlink(layout.current, f"generations/{name}")
    return old


def switch_back(layout: Layout, old: str | None, old_previous: str | None) -> None:
    """Undo a switch: `current` and `previous` are what they were, or are not there."""
    for link, name in ((layout.current, old), (layout.previous, old_previous)):
        if name is None:
            link.unlink(missing_ok=True)
        else:
            atomic_symlink(link, f"generations/{name}")


def blessed(layout: Layout, name: str) -> bool:
    """Whether the generation once proved itself with a decode."""
    return (layout.receipts / f"{name}.json").is_file()


def collect(layout: Layout, keep: int = 1) -> list[str]:
    """Remove old generations but current, previous and the newest `keep` others; returns their names."""
    protected = {current_id(layout), previous_id(layout)}
    others = [path for path in layout.generations.glob("*") if path.name not in protected]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in others[keep:]:
        # Without its manifest first: a kill half-way leaves something that is plainly not complete.
        (path / MANIFEST).unlink(missing_ok=True)
        remove_tree(path)
    return [path.name for path in others[keep:]]
