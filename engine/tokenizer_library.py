"""tokenizer.json and tokenizer.model through their own libraries, both optional; not Llama-3's kind of BPE.

tokenizer.json: huggingface/tokenizers; BPE alone, byte-level or with byte fallback. tokenizer.model:
google/sentencepiece. Each is imported when such a model is opened.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol, cast

from engine.errors import HaloError
from engine.formats.htok import BYTE_OF
from engine.tokenizer import TextTokenizer
from engine.tokenizer_facts import MAX_SIZE, TokenizerFacts

MAX_FILE: Final = 64 << 20
SPACE: Final = "\u2581"  # SentencePiece's mark of a space
_BYTE: Final = re.compile("<0x([0-9A-F]{2})>")
_FETCH: Final = "fetch the model again, or use one whose tokenizer is byte-level BPE"


class _Encoding(Protocol):
    @property
    def ids(self) -> list[int]: ...


class _Hf(Protocol):
    """The part of tokenizers.Tokenizer that is used."""

    def encode(self, text: str, /, *, add_special_tokens: bool) -> _Encoding: ...


class _SentencePiece(Protocol):
    """The part of sentencepiece.SentencePieceProcessor that is used."""

    def get_piece_size(self) -> int: ...
    def id_to_piece(self, index: int, /) -> str: ...
    def is_control(self, index: int, /) -> bool: ...
    def is_unknown(self, index: int, /) -> bool: ...
    def is_unused(self, index: int, /) -> bool: ...
    def is_byte(self, index: int, /) -> bool: ...


def load_library_tokenizer(directory: Path, facts: TokenizerFacts) -> TextTokenizer:
    """The tokenizer of a directory without tokenizer.htok. Raises HaloError where it cannot be used."""
    path = directory / "tokenizer.json"
    if path.exists():
        return JsonTokenizer(path, facts)
    return SentencePieceTokenizer(directory / "tokenizer.model", facts)


def read_bounded(path: Path) -> bytes:
    """A tokenizer's file of at most MAX_FILE bytes."""
    try:
        with path.open("rb") as stream:
            data = stream.read(min(MAX_FILE, os.fstat(stream.fileno()).st_size) + 1)
    except OSError as error:
        raise HaloError(
            f"The tokenizer {path} cannot be read: {error.strerror}.", hint=f"ls -l {path}"
        ) from error
    if len(data) > MAX_FILE:
        raise unusable(path, f"it is larger than {MAX_FILE} bytes")
    return data


def unusable(path: Path, why: str) -> HaloError:
    """The refusal of a tokenizer's file."""
    return HaloError(f"halo cannot use the tokenizer {path}: {why}.", hint=_FETCH)


class LibraryMissing(HaloError):
    """The library that reads a tokenizer's file is not installed."""

    def __init__(self, path: Path, library: str) -> None:
        super().__init__(
            f"The tokenizer {path} needs the library {library}, which is not installed.",
            hint=f"{_pip()} install --no-deps {library}",
        )


def _pip() -> str:
    """The pip for this interpreter. An installed box's has none of its own: then python3's, from outside."""
    if importlib.util.find_spec("pip") is not None:
        return f"{shlex.quote(sys.executable)} -m pip"
    return f"python3 -m pip --python {shlex.quote(sys.executable)}"


def well_formed(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, as a library that takes UTF-8 needs it."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class JsonTokenizer(TextTokenizer):
    """A tokenizer.json. Those of its added tokens that are not special are found in any text, as HF does."""

    def __init__(self, path: Path, facts: TokenizerFacts) -> None:
        raw = read_bounded(path)
        data = parse_tokenizer(path, raw)
        added = added_tokens(path, data)
        special = {token["id"] for token in added if token["special"]} | {facts.bos, facts.eos}
        tokens = _token_table(path, data, added, facts.size)
        super().__init__(tokens, special, facts.bos, facts.eos)
        # By id: two of them may have one text.
        ids = [i for i in self._special_ids if 0 <= i < self.size]
        self._texts = {i: tokens[i].decode("utf-8", "replace") for i in ids}
        self._path, self._raw = path, raw
        self.adds_space = not is_byte_level(data) and "Strip" in _steps(data, "decoder", "decoders")
        self.strips = {token["id"]: sides for token in added if any(sides := _sides(token))}
        self._bounded = is_byte_level(data) and data.get("normalizer") is None
        self._only_first = "first" in _schemes(data)
        self._library = _open_library(path, raw)
        self._later = None if self._only_first else self._library

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """As the library encodes with no special token; one that its model has as a word is spelled out."""
        ids = self._run(self._library if first else self._continuing(), text)
        if self._special_ids.isdisjoint(ids):
            return ids
        return [each for i in ids for each in ([i] if i not in self._special_ids else self._spelled(i))]

    def fewest_tokens(self, text: str) -> int:
        """Bytes over the longest token, where nothing shortens a text before it is encoded; else 0."""
        return super().fewest_tokens(text) if self._bounded else 0

    def _spelled(self, index: int) -> list[int]:
        ids = [i for letter in self._texts[index] for i in self._run(self._continuing(), letter)]
        return [i for i in ids if i not in self._special_ids]

    def _continuing(self) -> _Hf:
        """The library's tokenizer for what does not begin a text: no space is put before it."""
        if self._later is None:
            data = parse_tokenizer(self._path, self._raw)
            for step in _parts(data.get("pre_tokenizer"), "pretokenizers"):
                if step.get("prepend_scheme") == "first":
                    step["prepend_scheme"] = "never"
            self._later = _open_library(self._path, json.dumps(data).encode())
        return self._later

    def _run(self, library: _Hf, text: str) -> list[int]:
        try:
            ids = library.encode(well_formed(text), add_special_tokens=False).ids
        except BaseException as error:
            raise_unusable(self._path, error)
        return ids


class SentencePieceTokenizer(TextTokenizer):
    """A tokenizer.model: BPE with byte fallback, as LLaMA-2's. Its user-defined symbols are ordinary text."""

    def __init__(self, path: Path, facts: TokenizerFacts) -> None:
        raw = read_bounded(path)
        try:
            import sentencepiece
        except ImportError as error:
            raise LibraryMissing(path, "sentencepiece") from error
        self._path = path
        try:
            self._library: Any = sentencepiece.SentencePieceProcessor(model_proto=raw)
            tokens, special, values = _pieces(self._library)
        except Exception as error:
            raise_unusable(path, error)
        if values != set(range(256)):
            raise unusable(path, "it has no byte fallback, so some texts have no tokens")
        if len(tokens) > facts.size:
            raise unusable(path, f"it has {len(tokens)} tokens, and the model {facts.size}")
        super().__init__([*tokens, *[b""] * (facts.size - len(tokens))], special, facts.bos, facts.eos)
        self.adds_space = self._library.encode("a", out_type=str)[0].startswith(SPACE)

    def encode(self, text: str, *, first: bool = True) -> list[int]:
        """As the library encodes; it puts a space before every text, wherever it stands (LLaMA-2's way)."""
        try:
            ids: list[int] = self._library.encode(well_formed(text))
        except Exception as error:
            raise_unusable(self._path, error)
        return ids

    def fewest_tokens(self, text: str) -> int:
        """0: the library's normaliser may shorten a text."""
        return 0


def _pieces(library: _SentencePiece) -> tuple[list[bytes], set[int], set[int]]:
    """(bytes of each id, special ids, the byte values that have a token)."""
    tokens: list[bytes] = []
    special, values = set(), set()
    for index in range(library.get_piece_size()):
        text = library.id_to_piece(index)
        if library.is_control(index) or library.is_unknown(index) or library.is_unused(index):
            special.add(index)
            tokens.append(text.encode())
        elif library.is_byte(index):
            values.add(int(text[1:-1], 16))
            tokens.append(bytes([int(text[1:-1], 16)]))
        else:
            tokens.append(text.replace(SPACE, " ").encode())
    return tokens, special, values


def _open_library(path: Path, raw: bytes) -> _Hf:
    try:
        import tokenizers
    except ImportError as error:
        raise LibraryMissing(path, "tokenizers") from error
    try:
        library: Any = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True
    except BaseException as error:
        raise_unusable(path, error)
    return cast(_Hf, library)


def raise_unusable(path: Path, error: BaseException) -> NoReturn:
    """A library's exception as a refusal. A panic of Rust is a BaseException, and of no importable class."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit | MemoryError):
        raise error
    raise unusable(path, f"its library says: {' '.join(str(error).split())[:200]}") from error


def parse_tokenizer(path: Path, raw: bytes) -> dict[str, Any]:
    """A tokenizer.json that is BPE of a kind whose tokens are known bytes; HaloError for any other."""
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise unusable(path, "it is not valid JSON") from error
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise unusable(path, "it has no model")
    model = data["model"]
    if model.get("type", "BPE") != "BPE":
        raise unusable(path, f"its model is {str(model.get('type'))[:40]}, not BPE")
    if not isinstance(model.get("vocab"), dict) or len(model["vocab"]) > MAX_SIZE:
        raise unusable(path, f"it has no vocabulary of at most {MAX_SIZE} tokens")
    if not is_byte_level(data) and not model.get("byte_fallback"):
        raise unusable(path, "it is neither byte-level nor falls back to bytes, so some texts have no tokens")
    return data


def added_tokens(path: Path, data: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens, each with an id, a text and whether it is special."""
    added = data.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MAX_SIZE:
        raise unusable(path, "its added tokens are no list")
    for token in added:
        sound = isinstance(token, dict) and type(token.get("id")) is int and token["id"] >= 0
        if not sound or not isinstance(token.get("content"), str) or not token["content"]:
            raise unusable(path, "an added token has no id or no text")
        if not isinstance(token.get("special"), bool):
            raise unusable(path, f"its added token {token['id']} is neither special nor not")
    return added


def is_byte_level(data: dict[str, Any]) -> bool:
    """Whether tokens are spelled in GPT-2's letters, one a byte."""
    return "ByteLevel" in _steps(data, "decoder", "decoders")


def _parts(value: object, listed: str) -> list[dict[str, Any]]:
    """The steps of a component: those of a Sequence, or the one."""
    if not isinstance(value, dict):
        return []
    steps = value.get(listed) if value.get("type") == "Sequence" else [value]
    return [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []


def _steps(data: dict[str, Any], component: str, listed: str) -> list[str]:
    kinds = [str(step.get("type")) for step in _parts(data.get(component), listed)]
    return ["Strip" if kind == "Metaspace" else kind for kind in kinds]


def _schemes(data: dict[str, Any]) -> list[object]:
    return [step.get("prepend_scheme") for step in _parts(data.get("pre_tokenizer"), "pretokenizers")]


def _sides(token: dict[str, Any]) -> tuple[bool, bool]:
    return (bool(token["special"] and token.get("lstrip")), bool(token["special"] and token.get("rstrip")))


def _token_table(path: Path, data: dict[str, Any], added: list[dict[str, Any]], size: int) -> list[bytes]:
    """The bytes of each id below `size`; none for an id that the file does not use."""
    tokens = [b""] * size
    spell: Callable[[str], bytes] = _letters_to_bytes if is_byte_level(data) else _marks_to_bytes
    named = [(text, index, spell) for text, index in data["model"]["vocab"].items()]
    named += [(token["content"], token["id"], str.encode) for token in added]
    for text, index, how in named:
        if type(index) is not int or not 0 <= index < size:
            raise unusable(path, f"the id of {text[:40]!r} is outside the model's {size} tokens")
        try:
            tokens[index] = how(text)
        except UnicodeEncodeError:
            raise unusable(path, f"its token {index} is no Unicode text") from None
    spelled = {f"<0x{b:02X}>": b for b in range(256)}
    named_bytes = BYTE_OF if is_byte_level(data) else spelled
    vocabulary = data["model"]["vocab"]
    # One whose id an added token took for itself has none either.
    lacking = [
        b
        for name, b in named_bytes.items()
        if name not in vocabulary or tokens[vocabulary[name]] != bytes([b])
    ]
    if lacking:
        raise unusable(
            path, f"{len(lacking)} of the 256 bytes have no token, the first is {min(lacking):#04x}"
        )
    return tokens


def _letters_to_bytes(text: str) -> bytes:
    """GPT-2's letters; a token with any other is spelled as itself."""
    try:
        return bytes(BYTE_OF[letter] for letter in text)
    except KeyError:
        return text.encode()


def _marks_to_bytes(text: str) -> bytes:
    """SentencePiece's: <0x0A> is a byte, and its mark a space."""
    match = _BYTE.fullmatch(text)
    return bytes([int(match[1], 16)]) if match else text.replace(SPACE, " ").encode()
