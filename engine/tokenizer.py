"""Text to token ids and back, byte-level BPE through tiktoken; chat templates are in engine/chat.py."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Protocol

from engine.errors import HaloError

# The Llama-3 pre-tokeniser, as in its tokenizer.json.
LLAMA3_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The pattern's `\s+(?!\S)` backtracks over the whole run: tiktoken's regex engine runs out of stack near
# a million, and panics.
MAX_WHITESPACE_RUN: Final = 100_000
_LONG_WHITESPACE = re.compile(rf"\s{{{MAX_WHITESPACE_RUN + 1}}}")


class VocabularyLike(Protocol):
    """The part of engine.formats.htok.Vocabulary that a tokenizer is made from."""

    @property
    def tokens(self) -> list[bytes]: ...
    @property
    def merges(self) -> list[tuple[int, int, int]]: ...
    @property
    def bos(self) -> int: ...
    @property
    def eos(self) -> int: ...
    @property
    def special(self) -> list[int]: ...


class Tokenizer:
    """A vocabulary ready for use. Special ids never come out of `encode` and make no text in `decode`."""

    def __init__(self, vocabulary: VocabularyLike) -> None:
        import tiktoken

        self.size = len(vocabulary.tokens)
        self.bos = vocabulary.bos
        self.eos = vocabulary.eos
        self._special_ids = frozenset(vocabulary.special) | {self.bos, self.eos}
        self.special = {
            vocabulary.tokens[i].decode("utf-8", "replace"): i
            for i in sorted(self._special_ids)
            if 0 <= i < self.size
        }
        ranks = _ranks(vocabulary, self._special_ids)
        self.longest_token = max(len(token) for token in ranks)
        self._bytes = [b"" if i in self._special_ids else token for i, token in enumerate(vocabulary.tokens)]
        self._encoding = tiktoken.Encoding(
            "htok", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )

    @classmethod
    def from_htok(cls, path: Path) -> Tokenizer:
        """Read a .htok file (version 1 or 2); raises HaloError where it is damaged or out of rank order."""
        from engine.formats.htok import read_htok

        return cls(read_htok(path))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. What looks like a special token stays text; lone surrogates become U+FFFD."""
        if len(text) > MAX_WHITESPACE_RUN and _LONG_WHITESPACE.search(text):
            raise HaloError(
                f"The text has a run of more than {MAX_WHITESPACE_RUN} whitespace characters.",
                hint="shorten the run: no model's context holds it.",
            )
        return self._encoding.encode_ordinary(text)

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of len(encode(text)) that costs next to nothing: bytes over the longest token."""
        return -(-len(text.encode("utf-8", "replace")) // self.longest_token)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; none for a special token."""
        if not 0 <= token < self.size:
            raise HaloError(f"Token id {token} is outside the vocabulary of {self.size}.")
        return self._bytes[token]

    def is_special(self, token: int) -> bool:
        """Whether a token is one of the template's, and so never text."""
        return token in self._special_ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", "replace")

    def decode_stream(self) -> StreamDecoder:
        """A decoder that is fed ids one at a time and never gives out half a character."""
        return StreamDecoder(self)


class StreamDecoder:
    """Incremental decode: the pieces put together equal Tokenizer.decode of all the ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Text that this token completes; bytes of an unfinished character wait for the next."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never came to its end."""
        return self._utf8.decode(b"", final=True)


def _ranks(vocabulary: VocabularyLike, special: frozenset[int]) -> dict[bytes, int]:
    """Merge ranks for tiktoken, which uses one number as rank and as id: so ids must follow merge order."""
    ranks: dict[bytes, int] = {}
    for i, token in enumerate(vocabulary.tokens):
        if i in special or not token:
            continue
        if token in ranks:
            raise _unusable(f"ids {ranks[token]} and {i} are the same bytes")
        ranks[token] = i
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise _unusable(
            f"{len(missing)} of the 256 single bytes have no token, the first is {missing[0]:#04x}"
        )
    _check_merges(vocabulary.tokens, vocabulary.merges)
    return ranks


def _check_merges(tokens: Sequence[bytes], merges: Sequence[tuple[int, int, int]]) -> None:
    last = -1
    made: set[int] = set()
    for left, right, merged in merges:
        if tokens[left] + tokens[right] != tokens[merged]:
            raise _unusable(f"the merge of {left} and {right} does not give token {merged}")
        # The first merge that makes a token gives it its rank; a later one of the same token changes nothing.
        if merged < last and merged not in made:
            raise _unusable(f"token {merged} was merged after token {last}: ids do not follow merge ranks")
        last = max(last, merged)
        made.add(merged)


def _unusable(why: str) -> HaloError:
    return HaloError(
        f"The tokenizer cannot be used: {why}.",
        hint="the .htok file is damaged or of another kind: run `halo install` again.",
    )
