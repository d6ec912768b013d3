"""Read what is installed under a prefix: manifest, hashes, model store, unit links. Judges nothing."""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from checks.case import Installed, Scope

UNITS: Final = ("halo-server.socket", "halo-server.service")
MAX_MANIFEST_BYTES: Final = 8 << 20


def default_prefix(scope: Scope | None = None) -> Path:
    """Where an install of `scope` lies.

    Without a scope: that of the generation that runs this, else what exists, else the asker's own place.
    """
    generation = os.environ.get("HALO_GENERATION_DIR", "")
    if scope is None and generation:
        return Path(generation).absolute().parent.parent
    data = os.environ.get("XDG_DATA_HOME", "")
    user = (Path(data) if data.startswith("/") else Path.home() / ".local/share") / "halo"
    system = Path("/opt/halo")
    if scope is not None:
        return system if scope == "system" else user
    order = (system, user) if os.geteuid() == 0 else (user, system)
    return next((each for each in order if (each / "current").is_symlink()), order[0])


def unit_directory(scope: Scope) -> Path:
    """Where systemd looks for the administrator's (or the user's own) units."""
    if scope == "system":
        return Path("/etc/systemd/system")
    config = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(config) if config.startswith("/") else Path.home() / ".config") / "systemd/user"


def read_installed(prefix: Path, *, hashes: bool = True, unit_dir: Path | None = None) -> Installed:
    """What is installed under `prefix`. `hashes` reads every listed file and the model; without it only
    presence and size are looked at. Never raises for what it finds."""
    current = prefix / "current"
    if not current.is_symlink() and not current.exists():
        return Installed(str(prefix), exists=False)
    generation = Path(os.path.realpath(current))
    manifest, problem = _read_json(generation / "manifest.json")
    if problem or not isinstance(manifest.get("files"), Mapping):
        return Installed(str(prefix), str(generation), manifest, True, problem or "it lists no files")
    scope: Scope = "system" if manifest.get("scope") == "system" else "user"
    manifest = {**manifest, "systemd": _units_wanted(prefix)}
    units = _unit_links(prefix, generation, unit_dir or unit_directory(scope)) if manifest["systemd"] else {}
    return Installed(
        prefix=str(prefix),
        generation=str(generation),
        manifest=manifest,
        exists=True,
        files_checked=len(manifest["files"]),
        wrong_files=_compare(generation, manifest["files"], hashes=hashes),
        model_problems=tuple(_model_problems(generation, manifest, hashes=hashes)),
        unit_links=units,
    )


def _units_wanted(prefix: Path) -> bool:
    """halo.toml's `units`: False when the owner left systemd alone."""
    try:
        return bool(tomllib.loads((prefix / "halo.toml").read_text()).get("units", True))
    except (OSError, ValueError, RecursionError):
        return True


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    """(object, "") or ({}, why not)."""
    try:
        with path.open("rb") as stream:
            value = json.loads(stream.read(MAX_MANIFEST_BYTES + 1)[:MAX_MANIFEST_BYTES])
    except FileNotFoundError:
        return {}, "absent"
    except PermissionError:
        return {}, "denied"
    except OSError as error:
        return {}, error.strerror or str(error)
    except (ValueError, RecursionError):
        return {}, "it is not JSON"
    return (value, "") if isinstance(value, dict) else ({}, "it is not a JSON object")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _wrong(path: Path, sha256: str, *, hashes: bool) -> str:
    """ "" when the file is as listed; else missing, denied, or the hash found."""
    try:
        if not path.is_file():
            return "missing"
        found = _sha256(path) if hashes else sha256
    except PermissionError:
        return "denied"
    except OSError as error:
        return error.strerror or "unreadable"
    return "" if found == sha256 else found


def _compare(generation: Path, files: Mapping[str, Any], *, hashes: bool) -> dict[str, str]:
    wrong = {}
    for relative, sha256 in files.items():
        problem = _wrong(generation / relative, str(sha256), hashes=hashes)
        if problem:
            wrong[relative] = problem
    return wrong


def _model_problems(generation: Path, manifest: Mapping[str, Any], *, hashes: bool) -> list[str]:
    """Sentences on the model link, its store and the files that the store's model.json lists."""
    link = generation / "models" / "default"
    if not link.is_symlink() and not link.exists():
        return [f"{link}: absent"]
    store = Path(os.path.realpath(link))
    if not store.is_dir():
        return [f"{link}: points at {store}, which is not there"]
    described, problem = _read_json(store / "model.json")
    files = described.get("files")
    if problem or not isinstance(files, Mapping):
        return [f"{store}/model.json: {problem or 'it lists no files'}"]
    problems = list(filter(None, (_model_file(store, name, entry, hashes) for name, entry in files.items())))
    if not (store / "model.halo").is_file():
        problems.append(f"{store}/model.halo: absent; the prepared file that the server maps")
    model = manifest.get("model")
    named = model.get("store") if isinstance(model, Mapping) else None
    if isinstance(named, str) and named and Path(named).name != store.name:
        problems.append(f"{link}: points at {store.name}, the manifest names {Path(named).name}")
    return problems


def _model_file(store: Path, name: str, entry: object, hashes: bool) -> str:
    path = store / name
    size = entry.get("bytes") if isinstance(entry, Mapping) else None
    try:
        if not path.is_file():
            return f"{path}: missing"
        found = path.stat().st_size
    except OSError as error:
        return f"{path}: {error.strerror}"
    if isinstance(size, int) and found != size:
        return f"{path}: {found} bytes; model.json says {size}"
    sha256 = entry.get("sha256") if isinstance(entry, Mapping) else None
    problem = _wrong(path, str(sha256), hashes=hashes and isinstance(sha256, str))
    return f"{path}: {'sha256 is now ' + problem[:16] if len(problem) == 64 else problem}" if problem else ""


def _unit_links(prefix: Path, generation: Path, directory: Path) -> dict[str, str]:
    """What is wrong with each unit's file in systemd's directory: it must lead to this generation's."""
    wrong = {}
    for name in UNITS:
        ours, theirs = generation / "units" / name, directory / name
        if not theirs.is_symlink() and not theirs.exists():
            wrong[name] = f"{theirs} is absent"
        elif theirs.is_symlink() and theirs.readlink() == Path("/dev/null"):
            continue  # masked: systemd says so itself
        elif not _same(ours, theirs):
            wrong[name] = f"{theirs} is not {prefix}/current/units/{name}"
    return wrong


def _same(ours: Path, theirs: Path) -> bool:
    try:
        return theirs.samefile(ours) or theirs.read_bytes() == ours.read_bytes()
    except OSError:
        return False
