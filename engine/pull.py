"""Fetch a model's files from a hub into a directory, going on after cuts. What the files mean is not here.

Everything comes from one commit. Every byte is under a hash that the hub named before the file was fetched;
a file gets its name when its bytes have that hash, and is NAME.part until then.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from engine.atomic import fsync_directory, replacing
from engine.errors import HaloError
from engine.fetch import Client, Refused, Response, Retry, Transient
from engine.hub import INDEX, RemoteFile, choose, file_url, listing, refusal, resolve, shards

if TYPE_CHECKING:
    from hashlib import _Hash

T = TypeVar("T")
RECORD: Final = "pull.json"
SPARE: Final = 16 << 20
ENOUGH: Final = 1 << 20  # bytes in one try after which a cut does not count as a failure in a row
_CHUNK: Final = 1 << 20
_WHOLE_TRIES: Final = 2


class Progress(Protocol):
    """What a person sees: the sum of bytes once it is known, how many a file has by now, and sentences."""

    def total(self, size: int) -> None: ...

    def at(self, name: str, held: int) -> None: ...

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class Wish:
    """What to fetch: a repository of a hub, its revision, and the one file of it (None: a checkpoint)."""

    repo: str
    revision: str
    file: str | None = None


@dataclass(frozen=True)
class Pulled:
    """What lies in `directory` now: the files of `wish` at `commit`, the weights last."""

    directory: Path
    commit: str
    files: list[RemoteFile]


Look = Callable[[Path, RemoteFile], int]


def pull(
    client: Client,
    wish: Wish,
    directory: Path,
    progress: Progress,
    retry: Retry | None = None,
    look: Look = lambda _directory, _weights: 0,
) -> Pulled:
    """Fetch into `directory` what `wish` needs; run again, it goes on where it was, at the same commit.

    `look(directory, weights)` sees the small files before the weights are fetched: it may refuse the model,
    and says how many bytes more the disk must hold. Raises HaloError; what is whole by then stays.
    """
    retry = retry or Retry()
    with _held(directory, wish, client.endpoint) as commit:
        if commit is None:
            commit = _again(retry, progress, lambda: resolve(client, wish.repo, wish.revision))
        _write_record(directory, client, wish, commit, [])
        files = _again(retry, progress, lambda: listing(client, wish.repo, commit))
        small, weights = choose(files, wish.repo, wish.file)
        getter = _Getter(client, wish, commit, directory, progress, retry)
        if weights.path == INDEX:
            getter.get(weights)
            small, heavy = [*small, weights], shards(directory / INDEX, files)
        else:
            heavy = [weights]
        progress.total(sum(file.size for file in [*small, *heavy]))
        for file in small:
            getter.get(file)
        _check_space(directory, heavy, look(directory, heavy[0]))
        for file in heavy:
            getter.get(file)
        _write_record(directory, client, wish, commit, [*small, *heavy])
        return Pulled(directory, commit, [*small, *heavy])


def _again(retry: Retry, progress: Progress, action: Callable[[], T]) -> T:
    return retry.run(action, progress.note, lambda: False)


@contextlib.contextmanager
def _held(directory: Path, wish: Wish, endpoint: str) -> Iterator[str | None]:
    """The directory, for this process alone; the commit that an earlier run of the same wish resolved."""
    made = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield _earlier(directory, wish, endpoint)
        finally:
            os.close(descriptor)
            if made and not any(directory.iterdir()):
                directory.rmdir()  # it came to nothing: the hub was not even reached
    except BlockingIOError as error:
        raise HaloError(f"Another pull works in {directory}.", hint="wait until it has ended") from error
    except OSError as error:
        raise HaloError(
            f"The pull cannot go on in {directory}: {error.strerror}.", hint=f"df -h {directory.parent}"
        ) from error


_WISH: Final = ("endpoint", "repo", "revision", "file")


def _earlier(directory: Path, wish: Wish, endpoint: str) -> str | None:
    """The commit in pull.json, if that is of the same wish; HaloError where other things lie there."""
    recorded = _read_record(directory / RECORD)
    if recorded is None:
        if any(directory.iterdir()):
            raise HaloError(
                f"{directory} has files that no pull put there.", hint="name a directory that does not exist"
            )
        return None
    if [recorded[key] for key in _WISH] != [endpoint, wish.repo, wish.revision, wish.file]:
        raise HaloError(
            f"{directory} has a pull of {recorded['repo']} at {recorded['revision']} in it.",
            hint=f"take another directory, or remove that one: rm -r {shlex.quote(str(directory))}",
        )
    return str(recorded["commit"])


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        data = None
    commit = data.get("commit") if isinstance(data, dict) else None
    if not isinstance(commit, str) or not re.fullmatch("[0-9a-f]{40}", commit) or not set(_WISH) <= set(data):
        raise HaloError(
            f"{path} is damaged.", hint=f"remove its directory: rm -r {shlex.quote(str(path.parent))}"
        )
    return dict(data)


def _write_record(directory: Path, client: Client, wish: Wish, commit: str, files: list[RemoteFile]) -> None:
    """pull.json: where everything came from, and under which hashes."""
    named = {file.name: {"path": file.path, "bytes": file.size, "hash": file.pin} for file in files}
    wished = dict(zip(_WISH, (client.endpoint, wish.repo, wish.revision, wish.file), strict=True))
    with replacing(directory / RECORD) as stream:
        stream.write((json.dumps({**wished, "commit": commit, "files": named}, indent=1) + "\n").encode())


def _check_space(directory: Path, heavy: list[RemoteFile], more: int) -> None:
    missing = sum(file.size - _held_bytes(directory / file.name) for file in heavy)
    free = shutil.disk_usage(directory).free
    if missing + more + SPARE > free:
        raise HaloError(
            f"{missing + more + SPARE:,} bytes are needed in {directory}, and {free:,} are free.",
            hint=f"df -h {directory}; make room, or name a directory on another disk",
        )


def _held_bytes(path: Path) -> int:
    for candidate in (path, path.with_name(path.name + ".part")):
        with contextlib.suppress(OSError):
            return candidate.stat().st_size
    return 0


def hasher(file: RemoteFile) -> _Hash:
    """The hash that `file.pin` is of: SHA-256 of an LFS object, or git's SHA-1 of a blob."""
    if file.sha256:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def is_whole(path: Path, file: RemoteFile) -> bool:
    """Whether `path` has every byte of `file`."""
    try:
        if path.stat().st_size != file.size:
            return False
        digest = hasher(file)
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    except FileNotFoundError:
        return False
    return bool(digest.hexdigest() == (file.sha256 or file.blob))


class _Part:
    """NAME.part, and NAME.part.json: which file it is the beginning of, and the ETag that its bytes had."""

    def __init__(self, target: Path, file: RemoteFile) -> None:
        self.file, self.target = file, target
        self.path = target.with_name(f"{target.name}.part")
        self.state = target.with_name(f"{target.name}.part.json")
        self.etag = ""
        try:
            said = json.loads(self.state.read_bytes())
            known = self.path.is_file() and said["pin"] == file.pin and said["bytes"] == file.size
            self.etag = str(said["etag"]) if known else ""
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            known = False
        self.stream = self.path.open("r+b" if known else "w+b")
        self.size, self.digest = 0, hasher(file)
        while chunk := self.stream.read(_CHUNK):
            self.digest.update(chunk)
            self.size += len(chunk)
        if self.size > file.size:
            self.restart()

    def restart(self) -> None:
        """Forget what there is."""
        self.stream.seek(0)
        self.stream.truncate()
        self.size, self.digest, self.etag = 0, hasher(self.file), ""

    def follow(self, etag: str) -> None:
        """Write down what the coming bytes belong to, before the first of them."""
        self.etag = etag
        with replacing(self.state) as stream:
            said = {"pin": self.file.pin, "bytes": self.file.size, "etag": etag}
            stream.write(json.dumps(said).encode())

    def write(self, chunk: bytes) -> None:
        """Append; one byte more than the file has is too many, and is not written."""
        if self.size + len(chunk) > self.file.size:
            self.restart()
            raise Transient(f"{self.file.path} is longer than the {self.file.size} bytes that the hub lists.")
        self.stream.write(chunk)
        self.digest.update(chunk)
        self.size += len(chunk)

    def is_right(self) -> bool:
        """Whether the bytes, all of them, have the hash."""
        return bool(self.digest.hexdigest() == (self.file.sha256 or self.file.blob))

    def finish(self) -> None:
        """Give the file its name."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.path.replace(self.target)
        self.state.unlink(missing_ok=True)
        fsync_directory(self.target.parent)


@dataclass(frozen=True)
class _Getter:
    """Gets files of one commit into one directory."""

    client: Client
    wish: Wish
    commit: str
    directory: Path
    progress: Progress
    retry: Retry

    def get(self, file: RemoteFile) -> None:
        """Have `file` in the directory, whole and under its hash."""
        target = self.directory / file.name
        if is_whole(target, file):
            self.progress.at(file.name, file.size)
            return
        part = _Part(target, file)
        self.progress.at(file.name, part.size)
        with part.stream:
            for _ in range(_WHOLE_TRIES):
                self._fill(part)
                if part.is_right():
                    part.finish()
                    return
                part.restart()
                self.progress.note(f"{file.path} arrived with wrong bytes and is fetched from its start.")
        part.path.unlink(missing_ok=True)
        part.state.unlink(missing_ok=True)
        raise HaloError(
            f"{file.path} does not have the hash that the hub lists for it ({file.pin}).",
            hint="what answers is not what the hub means to give: check the endpoint and any proxy",
        )

    def _fill(self, part: _Part) -> None:
        """All bytes of the file into `part`, over as many connections as it takes."""
        before = part.size

        def moved() -> bool:
            nonlocal before
            far, before = part.size - before >= ENOUGH, max(part.size, before)
            return far

        try:
            self.retry.run(lambda: self._go_on(part), self.progress.note, moved)
        except Refused as error:
            raise refusal(error, f"{self.wish.repo}/{part.file.path}", self.commit) from error

    def _go_on(self, part: _Part) -> None:
        """One request: from the byte that `part` lacks to the end."""
        if part.size == part.file.size:
            return
        headers = {}
        if part.size:
            headers["Range"] = f"bytes={part.size}-"
            if part.etag:
                headers["If-Range"] = part.etag
        url = file_url(self.client.endpoint, self.wish.repo, self.commit, part.file.path)
        with self.client.get(url, headers) as response:
            _agree(part, response)
            part.follow(_strong(response.header("ETag")))
            for chunk in response.chunks():
                part.write(chunk)
                self.progress.at(part.file.name, part.size)
        part.stream.flush()
        if part.size < part.file.size:
            raise Transient(f"{part.file.path} broke off after {part.size:,} of {part.file.size:,} bytes.")


def _agree(part: _Part, response: Response) -> None:
    """Make the part end where the answer begins, or refuse the answer."""
    file, start = part.file, 0
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", response.header("Content-Range"))
        asked = (str(part.size), str(file.size - 1))
        if (
            not part.size
            or match is None
            or match.groups()[:2] != asked
            or match[3] not in (str(file.size), "*")
        ):
            part.restart()
            raise Transient(f"{file.path} came in another range than was asked for.")
        start = part.size
    elif response.status == 416:
        had = part.size
        part.restart()
        raise Transient(f"The server has no byte {had} of {file.path}: it is another file there.")
    elif part.size:
        part.restart()  # a whole file: it has changed, or the server knows no ranges
    if response.length is not None and response.length != file.size - start:
        raise Transient(
            f"{file.path} would have {response.length + start:,} bytes; the hub lists {file.size:,}."
        )


def _strong(etag: str) -> str:
    """An ETag that If-Range may carry: a strong one of sane length, else none."""
    return etag if re.fullmatch(r'"[!#-~]{0,200}"', etag) else ""
