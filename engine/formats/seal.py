"""The seal of a model directory, SHA256SUMS: written when a model is made, checked at each open. Stdlib only.

It is what `sha256sum --check` reads, and two lines more, which that program takes for comments: the length of
model.halo with the hash of its first MiB, which holds the CRC of each of its tensors; and the hash of the
lines before. An open hashes the small files whole. The tensors of model.halo are checked by the engine that
maps it, so an open need not hash gigabytes. A seal shows damage and mix-ups; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from engine.errors import HaloError

DESCRIPTION: Final = "model.json"
PREPARED: Final = "model.halo"
SEAL: Final = "SHA256SUMS"
TOKENIZERS: Final = ("tokenizer.htok", "tokenizer.json", "tokenizer.model")
RUN_FILES: Final = (
    DESCRIPTION, PREPARED, *TOKENIZERS, "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja",
)  # fmt: skip
NOT_READ_AT_RUN: Final = ("model.h1b",)
HEAD: Final = 1 << 20
MAX_SEAL: Final = 1 << 16
_CHUNK: Final = 1 << 20
_LINE: Final = re.compile(r"([0-9a-f]{64})  ([!-.0-\[\]-~][ -.0-\[\]-~]{0,200})")
_HEAD_LINE: Final = re.compile(
    rf"# {re.escape(PREPARED)}: (\d{{1,18}}) bytes, of the first MiB ([0-9a-f]{{64}})"
)
_LAST: Final = "# of the lines above: "


def sha256_of(path: Path) -> str:
    """The SHA-256 of a whole file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def seal(directory: Path) -> None:
    """Write SHA256SUMS of what lies in `directory` now: the files a run reads, and those model.json lists."""
    from engine.atomic import replacing  # here, for a start seals nothing and waits for no import in vain

    listed = _listed(directory)
    names = sorted(name for name in {*RUN_FILES, *listed} if (directory / name).is_file())
    lines = [f"{sha256_of(directory / name)}  {name}\n" for name in names]
    if PREPARED in names:
        size, head = _head(directory / PREPARED)
        lines.append(f"# {PREPARED}: {size} bytes, of the first MiB {head}\n")
    text = "".join(lines)
    with replacing(directory / SEAL) as stream:
        stream.write(f"{text}{_LAST}{_of(text)}\n".encode())


def check_open(directory: Path) -> None:
    """Refuse a model directory in which anything that a run reads is damaged, missing, or of another model.

    Costs milliseconds: of model.halo only the length and the first MiB are looked at, see the first lines.
    """
    sums, size, head = read_seal(directory)
    for name in (DESCRIPTION, PREPARED):
        if name not in sums:
            raise broken(directory, f"{SEAL} does not list {name}")
    if not any(name in sums for name in TOKENIZERS):
        raise broken(directory, f"{SEAL} lists no tokenizer")
    for name in RUN_FILES:
        if name not in sums and (directory / name).exists():
            raise broken(directory, f"{name} is not listed in {SEAL}: it came later, or from another model")
    for name, expected in sums.items():
        if name == PREPARED:
            problem = _prepared_problem(directory / name, size, head)
        else:
            problem = "" if name in NOT_READ_AT_RUN else _problem(directory / name, expected)
        if problem:
            raise broken(directory, f"{name} {problem}")


def problems(directory: Path) -> Iterator[tuple[str, str]]:
    """(name, what is wrong) of every file whose bytes are not those that were sealed; reads all of them."""
    sums, size, head = read_seal(directory)
    for name, expected in sums.items():
        problem = _problem(directory / name, expected)
        if not problem and name == PREPARED:
            problem = _prepared_problem(directory / name, size, head)
        if problem:
            yield name, problem


def read_seal(directory: Path) -> tuple[dict[str, str], int, str]:
    """(sha256 of each name, length of model.halo, sha256 of its first MiB); HaloError for a damaged seal."""
    path = directory / SEAL
    try:
        if path.exists() and not path.is_file():
            raise broken(directory, f"{SEAL} is no file")
        with path.open("rb") as stream:
            text = stream.read(MAX_SEAL + 1).decode("ascii")
    except FileNotFoundError as error:
        raise broken(directory, f"it has no {SEAL}, by which its files are known to be whole") from error
    except UnicodeDecodeError as error:
        raise broken(directory, f"{SEAL} is damaged") from error
    except OSError as error:
        raise broken(directory, f"{SEAL} cannot be read: {error.strerror}") from error
    body, mark, last = text.rpartition(_LAST)
    if not mark or last != f"{_of(body)}\n":
        raise broken(directory, f"{SEAL} is damaged")
    *lines, head_line = body.splitlines() or [""]
    matches = [_LINE.fullmatch(line) for line in lines]
    head_match = _HEAD_LINE.fullmatch(head_line)
    if head_match is None or not all(matches):
        raise broken(directory, f"{SEAL} is not one that halo writes")
    return {m[2]: m[1] for m in matches if m}, int(head_match[1]), head_match[2]


def broken(directory: Path, why: str) -> HaloError:
    """The refusal of a model directory, with the ways to a whole one."""
    return HaloError(
        f"The model in {directory} is refused: {why}.",
        hint="import or pull it again (`halo install` for the bundled one). What was changed on purpose is "
        f"sealed anew with: halo model verify --seal {shlex.quote(str(directory))}",
    )


def _listed(directory: Path) -> list[str]:
    """The names that model.json lists, as far as they can be read: sealing judges nothing."""
    try:
        names = list(json.loads((directory / DESCRIPTION).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str) and _LINE.fullmatch(f"{'0' * 64}  {name}")]


def _problem(path: Path, expected: str) -> str:
    try:
        if path.exists() and not path.is_file():
            return "is no file"
        return "" if sha256_of(path) == expected else "does not have the bytes that were sealed"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _prepared_problem(path: Path, size: int, head: str) -> str:
    try:
        if path.exists() and not path.is_file():
            return "is no file"
        found = _head(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if found[0] != size:
        return f"has {found[0]} bytes, and {size} were sealed"
    return "" if found[1] == head else "does not begin with the bytes that were sealed"


def _head(path: Path) -> tuple[int, str]:
    with path.open("rb") as stream:
        return path.stat().st_size, hashlib.sha256(stream.read(HEAD)).hexdigest()


def _of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
