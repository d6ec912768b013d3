"""Read and write `.htok` tokenizer files, versions 1 and 2. Not an encoder: see `engine.tokenizer`.

Version 1 is "HTOK", vocabulary size, merges, bos, eos; version 2 has a version word after the magic and a
list of special ids at the end. Version 1 has no version word, so the two are told apart by which of them
the whole file fits, to its last byte. Tokens are stored in GPT-2's byte-to-letter mapping, and held here as
real bytes.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from engine.atomic import replacing
from engine.errors import HaloError

MAGIC: Final = b"HTOK"
MAX_VOCAB: Final = 1 << 20
MAX_MERGES: Final = 1 << 22
_LLAMA3_VOCAB: Final = 128256
_LLAMA3_FIRST_SPECIAL: Final = 128000
_FETCH: Final = "fetch the model again, or convert its tokenizer again"
_SPECIAL_TEXT: Final = re.compile(rb"<\|[^|]*\|>")


@dataclass(frozen=True)
class Vocabulary:
    """A byte-pair vocabulary: tokens (real bytes) in id order, merges (left, right, merged ids) in rank
    order.

    An empty token is an unused id. `special` lists the ids that no text may encode to, in rising order.
    """

    tokens: list[bytes]
    merges: list[tuple[int, int, int]]
    bos: int
    eos: int
    special: list[int] = field(default_factory=list)
    version: int = 2


def _letters() -> dict[int, str]:
    """GPT-2's mapping of the 256 byte values to printable letters (openai/gpt-2 `bytes_to_unicode`)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {value: chr(value) for value in plain}
    for value in range(256):
        if value not in table:
            table[value] = chr(256 + len(table) - len(plain))
    return table


LETTER_OF: Final = _letters()
BYTE_OF: Final = {letter: value for value, letter in LETTER_OF.items()}
# For str.translate, to Latin-1; a character that is no letter of the mapping becomes one that Latin-1 lacks.
_TO_BYTES: Final = {code: 0x100 for code in range(256)} | {ord(c): value for c, value in BYTE_OF.items()}


class _Damaged(Exception):
    """Why the bytes are not a file of the version that was tried."""


def read_htok(path: Path) -> Vocabulary:
    """Read a tokenizer of either version. Raises HaloError for anything that is not exactly one."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise HaloError(
            f"The tokenizer {path} cannot be read: {error.strerror}.", hint=f"ls -l {path}"
        ) from error
    if data[:4] != MAGIC:
        raise HaloError(f"{path} is no .htok tokenizer: its first bytes are not 'HTOK'.", hint=_FETCH)
    says_two = data[4:8] == struct.pack("<I", 2)
    reasons = []
    for version in (2, 1) if says_two else (1,):
        try:
            return _parse(data, version)
        except _Damaged as reason:
            reasons.append(f"as version {version}, {reason}")
    raise HaloError(f"The tokenizer {path} is damaged: {'; '.join(reasons)}.", hint=_FETCH)


class _Cursor:
    """Reads little-endian fields, and says so when the data ends first."""

    def __init__(self, data: bytes, offset: int) -> None:
        self.data, self.offset = data, offset

    def take(self, count: int) -> bytes:
        end = self.offset + count
        if end > len(self.data):
            raise _Damaged(f"it ends at byte {len(self.data)} where {end} are needed")
        chunk = self.data[self.offset : end]
        self.offset = end
        return chunk

    def words(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f"<{count}I", self.take(4 * count))


def _parse(data: bytes, version: int) -> Vocabulary:
    cursor = _Cursor(data, 8 if version == 2 else 4)
    size, merge_count, bos, eos = cursor.words(4)
    if not 1 <= size <= MAX_VOCAB or merge_count > MAX_MERGES:
        raise _Damaged(f"it says {size} tokens and {merge_count} merges")
    tokens = [_token(cursor, index) for index in range(size)]
    flat = cursor.words(3 * merge_count)
    merges = list(zip(flat[::3], flat[1::3], flat[2::3], strict=True))
    special = sorted(cursor.words(_special_count(cursor, size))) if version == 2 else _guess_special(tokens)
    if cursor.offset != len(data):
        raise _Damaged(f"it has {len(data) - cursor.offset} bytes too many")
    vocabulary = Vocabulary(tokens, merges, bos, eos, special, version)
    problem = _problem(vocabulary)
    if problem:
        raise _Damaged(problem)
    return vocabulary


def _token(cursor: _Cursor, index: int) -> bytes:
    text = cursor.take(int.from_bytes(cursor.take(2), "little"))
    try:
        return text.decode("utf-8").translate(_TO_BYTES).encode("latin-1")
    except UnicodeError:
        raise _Damaged(f"token {index} is not in the byte-to-letter mapping") from None


def _special_count(cursor: _Cursor, size: int) -> int:
    (count,) = cursor.words(1)
    if count > size:
        raise _Damaged(f"it says {count} special tokens of {size}")
    return count


def _guess_special(tokens: list[bytes]) -> list[int]:
    """Version 1 does not list its special ids: LLaMA-3's are its last 256, others those written <|...|>."""
    if len(tokens) == _LLAMA3_VOCAB:
        return list(range(_LLAMA3_FIRST_SPECIAL, _LLAMA3_VOCAB))
    return [index for index, token in enumerate(tokens) if _SPECIAL_TEXT.fullmatch(token)]


def _problem(vocabulary: Vocabulary) -> str:
    """What is impossible in a vocabulary, or an empty string."""
    tokens, size = vocabulary.tokens, len(vocabulary.tokens)
    if vocabulary.bos >= size or vocabulary.eos >= size:
        return f"bos {vocabulary.bos} or eos {vocabulary.eos} is outside its {size} tokens"
    if any(index >= size for index in vocabulary.special) or len(set(vocabulary.special)) != len(
        vocabulary.special
    ):
        return "a special id is outside the vocabulary or listed twice"
    for rank, (left, right, merged) in enumerate(vocabulary.merges):
        if max(left, right, merged) >= size:
            return f"merge {rank} names an id outside its {size} tokens"
        if not tokens[left] or not tokens[right] or tokens[left] + tokens[right] != tokens[merged]:
            return f"merge {rank} does not join its two tokens"
    used = [token for token in tokens if token]
    if len(set(used)) != len(used):
        return "a token occurs twice"
    return ""


def write_htok(path: Path, vocabulary: Vocabulary, version: int = 2) -> None:
    """Write a tokenizer as version 1 or 2, atomically. Version 1 does not hold the list of special ids."""
    path = Path(path)
    if version not in (1, 2):
        raise HaloError(f"halo writes .htok versions 1 and 2, not {version}.", hint="use version 2")
    problem = _problem(vocabulary)
    if problem:
        raise HaloError(f"The vocabulary cannot be written: {problem}.", hint="check what built it")
    data = _encode(vocabulary, version)
    with replacing(path) as file:
        file.write(data)


def _encode(vocabulary: Vocabulary, version: int) -> bytes:
    head = (len(vocabulary.tokens), len(vocabulary.merges), vocabulary.bos, vocabulary.eos)
    parts = [MAGIC, struct.pack("<I", 2) if version == 2 else b"", struct.pack("<4I", *head)]
    for token in vocabulary.tokens:
        text = "".join(LETTER_OF[value] for value in token).encode()
        if len(text) > 0xFFFF:
            raise HaloError(
                f"A token of {len(text)} bytes is too long for .htok.", hint="check what built it"
            )
        parts += [struct.pack("<H", len(text)), text]
    parts += [struct.pack("<3I", *merge) for merge in vocabulary.merges]
    if version == 2:
        parts.append(
            struct.pack(f"<I{len(vocabulary.special)}I", len(vocabulary.special), *vocabulary.special)
        )
    return b"".join(parts)
