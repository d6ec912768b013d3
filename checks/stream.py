"""The framing of gather.sh's stream, as records; what the records mean is for the modules that read them.

The format is described at the head of gather.sh. Any bytes give a `Stream` or one `HaloError`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from engine.errors import EXIT_COULD_NOT_RUN, HaloError

VERSION: Final = 1
MAX_STREAM_BYTES: Final = 16 << 20


class State(StrEnum):
    """Whether a thing could be seen. Absent and denied are different answers with different cures."""

    PRESENT = "present"
    ABSENT = "absent"
    DENIED = "denied"


@dataclass(frozen=True)
class File:
    """A file as it was read: `text` is empty unless `state` is present; `cut` when the limit shortened it."""

    path: str
    state: State
    text: str = ""
    cut: bool = False


@dataclass(frozen=True)
class Place:
    """A path that was looked at but not read: its kind (file dir char block other, or "") and our rights."""

    path: str
    state: State
    kind: str = ""
    readable: bool = False
    writable: bool = False


@dataclass(frozen=True)
class Output:
    """A command's output and exit code; 124 is a timeout, 126 a command that could not be started."""

    name: str
    code: int
    text: str

    @property
    def ok(self) -> bool:
        return self.code == 0


@dataclass(frozen=True)
class Stream:
    """All records of one pass, by name. Unknown kinds of record are skipped: a newer script may send more."""

    files: dict[str, File] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    outputs: dict[str, Output] = field(default_factory=dict)
    tools: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    lists: dict[str, tuple[str, ...]] = field(default_factory=dict)
    disks: dict[str, str] = field(default_factory=dict)
    disk_places: dict[str, str] = field(default_factory=dict)

    def text(self, path: str) -> str:
        """The stripped content of `path`, or "" when it is absent, denied or empty."""
        found = self.files.get(path)
        return found.text.strip() if found else ""

    def output(self, name: str) -> str:
        """The output of command `name`, or "" when it did not run or failed."""
        found = self.outputs.get(name)
        return found.text if found and found.ok else ""

    def place(self, path: str) -> Place:
        return self.places.get(path, Place(path, State.ABSENT))


def read_stream(data: bytes) -> Stream:
    """Parse gather.sh's output. HaloError when it is no such stream, of another version, or cut off."""
    if len(data) > MAX_STREAM_BYTES:
        raise _refuse(f"The facts stream has {len(data)} bytes, more than the {MAX_STREAM_BYTES} allowed.")
    lines = data.split(b"\n")
    header = lines[0].split()
    if len(header) < 2 or header[0] != b"halo-facts":
        raise _refuse("This is not a facts stream: its first line is not 'halo-facts'.")
    if header[1] != str(VERSION).encode():
        raise _refuse(f"The facts stream has version {_decode(header[1])!r}; this halo reads {VERSION}.")
    limit = int(header[2]) if len(header) > 2 and header[2].isdigit() and len(header[2]) < 10 else 0
    return _collect(_records(lines[1:]), limit)


def _refuse(message: str) -> HaloError:
    hint = "Gather again on that machine with this version's checks/gather.sh."
    return HaloError(message, hint=hint, exit_code=EXIT_COULD_NOT_RUN)


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace").replace("\0", "�")


def _records(lines: list[bytes]) -> Iterator[tuple[str, str]]:
    """(header, body) pairs. Raises when the last line "@end" is missing."""
    header = ""
    body: list[bytes] = []
    for line in lines:
        if line.startswith(b" "):
            body.append(line[1:])
        elif line.startswith(b"@"):
            if header:
                yield header, _decode(b"\n".join(body))
            header, body = _decode(line), []
            if header == "@end":
                return
    raise _refuse("The facts stream was cut off: its last line is not '@end'.")


def _collect(records: Iterator[tuple[str, str]], limit: int) -> Stream:
    stream = Stream({}, {}, {}, {}, {}, {}, {}, {})
    pending_command: tuple[str, str] | None = None
    pending_disk = ""
    for header, body in records:
        kind, _, rest = header.partition(" ")
        if kind == "@cmd":
            pending_command = (rest, body)
        elif kind == "@exit" and pending_command:
            name, text = pending_command
            stream.outputs[name] = Output(name, _integer(rest, 126), text)
            pending_command = None
        elif kind == "@disk":
            pending_disk = rest
            stream.disks[rest] = body
        else:
            place = _simple_record(stream, kind, rest, body, limit)
            if place and pending_disk:
                stream.disk_places[pending_disk] = place
                pending_disk = ""
    return stream


def _simple_record(stream: Stream, kind: str, rest: str, body: str, limit: int) -> str:
    """Add a one-header record to `stream`; returns the path of a @path record, else ""."""
    first, _, tail = rest.partition(" ")
    if kind == "@file" and first in State.__members__.values():
        cut = bool(limit) and len(body.encode("utf-8", errors="replace")) >= limit - 1
        stream.files[tail] = File(tail, State(first), body, cut)
    elif kind == "@path":
        rights, _, path = tail.partition(" ")
        state = State(first) if first in (State.ABSENT, State.DENIED) else State.PRESENT
        real_kind = first if state is State.PRESENT else ""
        stream.places[path] = Place(path, state, real_kind, "r" in rights, "w" in rights)
        return path
    elif kind == "@tool":
        stream.tools[first] = tail
    elif kind == "@env":
        stream.env[rest] = body
    elif kind == "@list":
        stream.lists[rest] = tuple(item for item in body.split("\n") if item)
    return ""


def _integer(text: str, otherwise: int) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else otherwise
