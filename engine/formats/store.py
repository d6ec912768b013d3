"""The content-addressed model store: verify, unpack, name by content. Not how a model file is parsed.

What holds a model directory together, wherever it lies, is its seal: engine/formats/seal.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import os
import re
import shutil
from pathlib import Path
from typing import Any, Final

from engine.atomic import fsync_directory
from engine.errors import HaloError
from engine.formats.seal import PREPARED, SEAL, check_open, problems, seal, sha256_of

__all__ = [
    "PREPARED", "SEAL", "is_stored", "is_whole", "read_description", "seal", "store_name", "unpack",
]  # fmt: skip
_CHUNK: Final = 1 << 20
_DESCRIPTION: Final = "model.json"
_SHA256: Final = re.compile("[0-9a-f]{64}")


def read_description(directory: Path) -> dict[str, Any]:
    """model.json of a model directory, checked for what the store needs of it."""
    path = directory / _DESCRIPTION
    try:
        description = json.loads(path.read_text())
        name, files = description["name"], description["files"]
        sound = description["schema"] == 1 and isinstance(name, str) and _is_plain_name(name) and files
        sound = sound and all(_is_plain_name(file) and _is_described(facts) for file, facts in files.items())
    except FileNotFoundError as error:
        raise HaloError(f"There is no model at {directory}.", hint="get the clone or bundle anew") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise HaloError(f"{path} is not a model description.", hint="get the model anew") from error
    if not sound:
        raise HaloError(f"{path} is not a model description.", hint="get the model anew")
    return dict(description)


def _is_plain_name(name: str) -> bool:
    """A file's name that every file system holds and every terminal shows."""
    return name.isprintable() and 1 <= len(name.encode()) <= 200 and "/" not in name and name[0] != "."


def _is_described(facts: dict[str, Any]) -> bool:
    sha256, size = facts["sha256"], facts["bytes"]
    return isinstance(sha256, str) and bool(_SHA256.fullmatch(sha256)) and type(size) is int and size >= 0


def store_name(description: dict[str, Any]) -> str:
    """`sha256-<hex>` over the hashes of the files, sorted by file name."""
    joined = "".join(description["files"][name]["sha256"] for name in sorted(description["files"]))
    return "sha256-" + hashlib.sha256(joined.encode()).hexdigest()


def is_stored(store: Path, description: dict[str, Any]) -> bool:
    """Whether the model is in the store, whole (sizes; the hashes were checked before it got its name)."""
    directory = store / store_name(description)
    if not (directory / _DESCRIPTION).is_file():
        return False
    return all(_size(directory / name) == facts["bytes"] for name, facts in description["files"].items())


def is_whole(store: Path, description: dict[str, Any]) -> bool:
    """Whether every stored file, the prepared one too, still has the hash that it had when it was made."""
    directory = store / store_name(description)
    if not is_stored(store, description):
        return False
    try:
        return not any(problems(directory)) and all(
            sha256_of(directory / name) == facts["sha256"] for name, facts in description["files"].items()
        )
    except (OSError, HaloError):
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def unpack(source: Path, store: Path, *, anew: bool = False) -> Path:
    """Bring the model in `source` (plain or .xz files) into `store`; returns its directory there.

    Every file is hashed while it is written into a staging directory, which gets its name by one rename when
    all hashes are right. A model that is there already is left alone, unless it is wanted `anew`.
    """
    description = read_description(source)
    final = store / store_name(description)
    if is_stored(store, description) and not anew:
        return final
    store.mkdir(parents=True, exist_ok=True)
    staging = store / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        for name, facts in description["files"].items():
            _unpack_file(source, name, staging / name, facts)
        _copy_companions(source, staging, description)
        if (staging / SEAL).is_file():  # a model that was sealed where it was made
            check_open(staging)
        fsync_directory(staging)
        if final.exists():
            shutil.rmtree(final)
        staging.rename(final)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    fsync_directory(store)
    return final


def _unpack_file(source: Path, name: str, target: Path, facts: dict[str, Any]) -> None:
    packed = source / f"{name}.xz"
    origin = packed if packed.is_file() else source / name
    digest, size = hashlib.sha256(), 0
    try:
        with contextlib.ExitStack() as stack:
            stream: Any = stack.enter_context(origin.open("rb"))
            if origin is packed:
                stream = stack.enter_context(lzma.LZMAFile(stream))
            out = stack.enter_context(target.open("wb"))
            while chunk := stream.read(_CHUNK):
                size += len(chunk)
                if size > facts["bytes"]:
                    break
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except (lzma.LZMAError, EOFError, FileNotFoundError) as error:
        raise HaloError(f"{origin} is missing or damaged.", hint="get the clone or bundle anew") from error
    if size != facts["bytes"] or digest.hexdigest() != facts["sha256"]:
        raise HaloError(
            f"{origin} does not have the hash that model.json names.", hint="get the clone or bundle anew"
        )


def _copy_companions(source: Path, staging: Path, description: dict[str, Any]) -> None:
    """Everything beside the model that travels with it: licence notices, credits, the description last."""
    for path in sorted(source.iterdir()):
        packed_model = path.suffix == ".xz" and path.stem in description["files"]
        if path.is_file() and not packed_model and path.name not in (*description["files"], _DESCRIPTION):
            shutil.copyfile(path, staging / path.name)
    shutil.copyfile(source / _DESCRIPTION, staging / _DESCRIPTION)
