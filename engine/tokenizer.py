"""Text to token ids and back: what a tokenizer is, and byte-level BPE with Llama-3's pattern (tiktoken).

Other kinds (tokenizer.json, tokenizer.model) are in engine/tokenizer_library.py; chat templates are in
engine/chat.py.
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from engine.errors import HaloError

if TYPE_CHECKING:
    import tiktoken

# The Llama-3 pre-tokeniser, as in its tokenizer.json.
LLAMA3_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The pattern's `\s+(?!\S)` backtracks over the whole run: tiktoken's regex engine runs out of stack near
# a million characters and panics, so a longer run is cut here, where the pattern would.
MAX_WHITESPACE_RUN: Final = 10_000
# White_Space of Unicode, which is what \s means to both regex engines; Python's \s has \x1c to \x1f too.
WHITESPACE: Final = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
_RUN: Final = re.compile(f"[{WHITESPACE}]+")


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


class TextTokenizer(ABC):
    """A tokenizer, whatever it is made from; the way back is the same for all: an id stands for some bytes.

    `size` is the model's number of ids. `opening` is what stands before a text that is no conversation
    ([bos], or nothing). `stops` are ids that end an answer. `special` maps the text of each special token to
    its id; `strips` holds the special ids beside which a template's white space is dropped: (left, right).
    `chat_template` is the source of a Jinja template, or None, and `names` its variables (bos_token).
    """

    # Whether encode puts a space before a text, as SentencePiece does, which decode then takes away.
    adds_space = False

    def __init__(self, tokens: Sequence[bytes], special: Iterable[int], bos: int, eos: int) -> None:
        self.size, self.bos, self.eos = len(tokens), bos, eos
        self.opening = [bos]
        self.stops = frozenset([eos])
        self.strips: dict[int, tuple[bool, bool]] = {}
        self.chat_template: str | None = None
        self._special_ids = frozenset(special) | {bos, eos}
        self.special = {
            tokens[i].decode("utf-8", "replace"): i for i in sorted(self._special_ids) if 0 <= i < self.size
        }
        text_of = {i: text for text, i in self.special.items()}
        self.names = {"bos_token": text_of.get(bos, ""), "eos_token": text_of.get(eos, "")}
        self._bytes = [b"" if i in self._special_ids else token for i, token in enumerate(tokens)]
        self.longest_token = max(map(len, self._bytes), default=0) or 1

    @abstractmethod
    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """Token ids of `text`, never a special one; `first` is False where some text stands before it.

        What looks like a special token stays text; lone surrogates become U+FFFD.
        """

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
        text = b"".join(self.token_bytes(i) for i in ids).decode("utf-8", "replace")
        return text.removeprefix(" ") if self.adds_space else text

    def decode_stream(self) -> StreamDecoder:
        """A decoder that is fed ids one at a time and never gives out half a character."""
        return StreamDecoder(self)


class Tokenizer(TextTokenizer):
    """A byte-level vocabulary with Llama-3's pattern, ready for use."""

    def __init__(self, vocabulary: VocabularyLike) -> None:
        import tiktoken

        super().__init__(vocabulary.tokens, vocabulary.special, vocabulary.bos, vocabulary.eos)
        self._ranks = _ranks(vocabulary, self._special_ids)
        self._encoding = tiktoken.Encoding(
            "htok", pat_str=LLAMA3_PATTERN, mergeable_ranks=self._ranks, special_tokens={}
        )
        self._piece: tiktoken.Encoding | None = None

    @classmethod
    def from_htok(cls, path: Path) -> Tokenizer:
        """Read a .htok file (version 1 or 2); raises HaloError where it is damaged or out of rank order."""
        from engine.formats.htok import read_htok

        return cls(read_htok(path))

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """Token ids of `text`; `first` changes nothing here, for no space is put before a text."""
        if not has_long_whitespace(text):
            return self._encoding.encode_ordinary(text)
        ids: list[int] = []
        for part, is_piece in _cut_long_whitespace(text):
            ids += self._one_piece(part) if is_piece else self._encoding.encode_ordinary(part)
        return ids

    def _one_piece(self, text: str) -> list[int]:
        """Ids of a text that the pattern would not split."""
        import tiktoken

        if self._piece is None:
            self._piece = tiktoken.Encoding(
                "piece", pat_str=r"(?s:.+)", mergeable_ranks=self._ranks, special_tokens={}
            )
        return self._piece.encode_ordinary(text)


class StreamDecoder:
    """Incremental decode: the pieces put together equal decode of all the ids."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._at_start = tokenizer.adds_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Text that this token completes; bytes of an unfinished character wait for the next."""
        return self._shown(self._utf8.decode(self._tokenizer.token_bytes(token)))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never came to its end."""
        return self._shown(self._utf8.decode(b"", final=True))

    def _shown(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


def load_tokenizer(directory: Path) -> TextTokenizer:
    """The tokenizer of a model directory: tokenizer.htok, else tokenizer.json, else tokenizer.model.

    What the files do not say (the size with its padding, bos, eos, what opens a text and ends an answer)
    comes from `tokenizer` in model.json, and the template from chat_template.jinja. Raises HaloError where a
    file is missing or damaged, or needs a library that is not installed.
    """
    from engine.formats.seal import TOKENIZERS
    from engine.tokenizer_facts import read_facts, read_template

    directory = Path(directory)
    facts = read_facts(directory / "model.json")
    if not any((directory / name).exists() for name in TOKENIZERS):
        raise HaloError(f"There is no tokenizer in {directory}.", hint="import or pull the model again")
    tokenizer: TextTokenizer
    if (directory / "tokenizer.htok").exists() or facts is None:
        tokenizer = Tokenizer.from_htok(directory / "tokenizer.htok")
    else:
        from engine.tokenizer_library import load_library_tokenizer

        tokenizer = load_library_tokenizer(directory, facts)
    if facts is not None:
        facts.apply(tokenizer)
    tokenizer.chat_template = read_template(directory)
    return tokenizer


def has_long_whitespace(text: str) -> bool:
    """Whether some run of white space is longer than MAX_WHITESPACE_RUN; in time linear in the text.

    Such a run holds at least one whole block of half that length, at a multiple of it.
    """
    half = MAX_WHITESPACE_RUN // 2
    if not any(text[at : at + half].isspace() for at in range(0, len(text) - half, half)):
        return False
    return any(run.end() - run.start() > MAX_WHITESPACE_RUN for run in _RUN.finditer(text))


def _cut_long_whitespace(text: str) -> Iterator[tuple[str, bool]]:
    """The text in parts, and whether a part is one piece of Llama-3's pattern; no piece spans two parts.

    A run of white space is taken apart by the pattern so: its first line ends belong to punctuation before
    it; then all up to its last line end is a piece; then the rest, but for one character where text follows.
    The pattern looks back nowhere, so a text may be cut wherever a piece ends.
    """
    start = 0
    for run in _RUN.finditer(text):
        if run.end() - run.start() <= MAX_WHITESPACE_RUN:
            continue
        at, end = run.start(), run.end()
        if at and _is_punctuation(text[at - 1]):
            at += len(text[at:end]) - len(text[at:end].lstrip("\r\n"))
        yield text[start:at], False
        line_end = 1 + max(text.rfind("\n", at, end), text.rfind("\r", at, end))
        if line_end:
            yield text[at:line_end], True
            at = line_end
        last = end if end == len(text) else max(at, end - 1)
        yield text[at:last], True
        start = last
    yield text[start:], False


def _is_punctuation(character: str) -> bool:
    """Whether the pattern's `[^\\s\\p{L}\\p{N}]` takes it, as tiktoken's own tables of Unicode have it."""
    import tiktoken

    ranks = {bytes([value]): value for value in range(256)}
    other = tiktoken.Encoding("other", pat_str=r"[^\s\p{L}\p{N}]", mergeable_ranks=ranks, special_tokens={})
    return bool(other.encode_ordinary(character))


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
