"""Changes to the file system that survive a power cut: atomic writes and links, hashes, removal, copies."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from engine.atomic import fsync_directory, replacing

CHUNK: Final = 1 << 20


def atomic_write(path: Path, data: bytes | str, mode: int = 0o644) -> None:
    """Replace `path` with `data`: mode first, fsync, rename, fsync of the directory.

    A reader sees the old bytes or the new ones. Nothing with a wider mode than `mode` ever exists.
    """
    content = data.encode() if isinstance(data, str) else data
    with replacing(path, mode) as stream:
        stream.write(content)


def atomic_symlink(link: Path, target: str) -> None:
    """Point `link` at `target` by one rename(2), and make that durable."""
    if link.is_symlink() and str(link.readlink()) == target:
        return
    temporary = link.parent / f".{link.name}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    try:
        temporary.replace(link)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(link.parent)


def write_secret(path: Path, data: str) -> None:
    """Create `path` with mode 0600 from its first instant; an existing file is an error."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    fsync_directory(path.parent)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_tree(root: Path) -> None:
    """Make a whole tree durable; one syncfs where the system has it, since a venv has thousands of files."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "syncfs") or libc.syncfs(fd) != 0:
            os.sync()
    finally:
        os.close(fd)


def remove_tree(path: Path) -> None:
    """Remove a file, a link or a tree; nothing there is fine.

    A compiler whose parent was killed may still write one last file, so a non-empty directory is tried again.
    """
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
        return
    for attempt in range(5):
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            return
        except OSError:
            if attempt == 4:
                raise
            time.sleep(0.2)
        else:
            return


def remove_if_empty(directory: Path) -> None:
    """Remove a directory that holds nothing; anything else stays."""
    with contextlib.suppress(OSError):
        directory.rmdir()


def source_files(root: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """The files under `names` in `root`, sorted, without caches and editors' leavings."""
    for name in sorted(names):
        top = root / name
        if top.is_file():
            yield top
        for path in sorted(top.rglob("*")) if top.is_dir() else ():
            relative = path.relative_to(root)
            hidden = any(part == "__pycache__" or part.startswith(".") for part in relative.parts)
            if path.is_file() and not hidden and path.suffix not in (".pyc", ".pyo"):
                yield path


def copy_files(root: Path, files: Iterator[Path], destination: Path) -> None:
    """Copy `files`, all under `root`, to the same relative places under `destination`."""
    for path in files:
        target = destination / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        target.chmod(0o755 if os.access(path, os.X_OK) else 0o644)


def nearest_existing(path: Path) -> Path:
    """`path`, or its first ancestor that is there."""
    for candidate in (path, *path.parents):
        if candidate.exists():
            return candidate
    return Path("/")
