"""The tokenizer in a GGUF file's metadata: to and from a Vocabulary. No encoder, and no SentencePiece.

Keys: tokenizer.ggml.model (gpt2: byte-level BPE), .pre (the pre-tokeniser's name), .tokens in GPT-2's
letters, .token_type (1 ordinary, 3 special, 4 added, 5 unused), .merges ("left right"), .bos_token_id and
.eos_token_id. Source: ggml-org/llama.cpp, gguf-py/gguf/constants.py and src/llama-vocab.cpp.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from engine.errors import HaloError
from engine.formats.gguf import GgufFile
from engine.formats.htok import BYTE_OF, LETTER_OF, MAX_MERGES, MAX_VOCAB, Vocabulary
from engine.formats.merges import difference

PREFIX: Final = "tokenizer.ggml."
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# What llama.cpp gives Llama-3's pattern under, and no other.
_LLAMA3: Final = ("llama-bpe", "llama3", "llama-v3")
_LLAMA3_VOCAB: Final = 128256
_KINDS: Final = {
    "llama": "SentencePiece", "t5": "SentencePiece (unigram)", "bert": "WordPiece", "rwkv": "RWKV's",
    "none": "none", "no_vocab": "none",
}  # fmt: skip
_GIVE: Final = "give the model's own: --tokenizer FILE.htok, or the folder of its Hugging Face checkpoint"
END_OF_TURN: Final = b"<|eot_id|>"


def refused(path: Path, why: str) -> HaloError:
    """The error of a tokenizer that is not one halo has, with what to do instead."""
    return HaloError(f"halo cannot use the tokenizer in {path}: {why}.", hint=_GIVE)


def gguf_vocabulary(file: GgufFile, size: int) -> tuple[Vocabulary, list[str]]:
    """(vocabulary of exactly `size` tokens, sentences for the person) of a file's metadata.

    Raises HaloError where it is another kind of tokenizer, or not one.
    """
    from engine.tokenizer import Tokenizer

    path = file.path
    notes = _check_kind(file, size)
    texts = _texts(file, "tokens", MAX_VOCAB)
    if len(texts) != size:
        raise refused(path, f"it has {len(texts)} tokens, and the model {size}")
    special = _special(file, texts)
    unused = {index for index, kind in enumerate(_types(file, size)) if kind == UNUSED}
    tokens = [_token(path, index, text, special, unused) for index, text in enumerate(texts)]
    merges = _merges(file, texts, special | unused)
    # llama.cpp looks a whole word up first where the pre-tokeniser is Llama-3's.
    why = difference(tokens, special | unused, merges, ignore_merges=True)
    if why:
        raise refused(path, why)
    ends = [_end(file, name, size, special) for name in ("bos", "eos")]
    vocabulary = Vocabulary(tokens, merges, ends[0], ends[1], sorted(special))
    try:
        Tokenizer(vocabulary)  # refuses ids that do not follow the merges' ranks, and bytes without a token
    except HaloError as error:
        raise refused(path, error.message.rstrip(".")) from error
    return vocabulary, notes


def _check_kind(file: GgufFile, size: int) -> list[str]:
    """Refuse all but byte-level BPE with Llama-3's pattern; a note where the file does not name it."""
    model, pre = file.metadata.get(f"{PREFIX}model"), file.metadata.get(f"{PREFIX}pre")
    if model is None:
        raise refused(file.path, "there is none")
    if model != "gpt2":
        raise refused(file.path, f"it is {_KINDS.get(str(model), str(model)[:40])}, not byte-level BPE")
    if pre is None:
        # The official file of BitNet-b1.58-2B-4T lacks the key; llama.cpp then cuts text otherwise.
        if file.metadata.get("general.architecture") == "llama" and size != _LLAMA3_VOCAB:
            raise refused(file.path, "it does not name its pre-tokeniser (tokenizer.ggml.pre)")
        return ["The file does not name its pre-tokeniser; it is taken for Llama-3's (llama-bpe)."]
    if pre not in _LLAMA3:
        raise refused(file.path, f"its pre-tokeniser is {str(pre)[:40]}, not Llama-3's (llama-bpe)")
    return []


def _texts(file: GgufFile, name: str, most: int) -> list[bytes]:
    texts = file.metadata.get(PREFIX + name)
    if not isinstance(texts, list) or len(texts) > most:
        raise refused(file.path, f"its {PREFIX}{name} is no list of at most {most} texts")
    return texts


def _types(file: GgufFile, size: int) -> list[int]:
    """The type of each token; all ordinary where the file has no types."""
    kinds = file.metadata.get(f"{PREFIX}token_type")
    if kinds is None:
        return [NORMAL] * size
    if isinstance(kinds, list | str | bool | int | float) or len(kinds) != size:
        raise refused(file.path, "its token types are not one for each token")
    return [int(kind) for kind in kinds.tolist()]


def _special(file: GgufFile, texts: list[bytes]) -> set[int]:
    """The special ids: those that the file says are, or, of a file without types, those written <|...|>."""
    if file.metadata.get(f"{PREFIX}token_type") is None:
        return {index for index, text in enumerate(texts) if text.startswith(b"<|") and text.endswith(b"|>")}
    special = set()
    for index, kind in enumerate(_types(file, len(texts))):
        if kind == USER_DEFINED:
            text = texts[index][:40].decode("utf-8", "replace")
            raise refused(file.path, f"its added token {text!r} is ordinary text, which .htok does not hold")
        if kind == CONTROL:
            special.add(index)
        elif kind not in (NORMAL, UNUSED):
            raise refused(file.path, f"its token {index} is of type {kind}, as in SentencePiece")
    return special


def _token(path: Path, index: int, text: bytes, special: set[int], unused: set[int]) -> bytes:
    """The real bytes of a token; an unused id is an empty one."""
    if index in unused:
        return b""
    if index in special:
        return text
    try:
        return bytes(BYTE_OF[letter] for letter in text.decode("utf-8"))
    except (UnicodeDecodeError, KeyError):
        raise refused(path, f"its token {index} is not in the byte-to-letter mapping") from None


def _merges(file: GgufFile, texts: list[bytes], apart: set[int]) -> list[tuple[int, int, int]]:
    ids = {text: index for index, text in enumerate(texts) if index not in apart}
    merges = []
    for rank, merge in enumerate(_texts(file, "merges", MAX_MERGES)):
        left, _, right = merge.partition(b" ")
        try:
            merges.append((ids[left], ids[right], ids[left + right]))
        except KeyError:
            raise refused(file.path, f"its merge {rank} names a text that is no token") from None
    return merges


def _end(file: GgufFile, which: str, size: int, special: set[int]) -> int:
    index = file.metadata.get(f"{PREFIX}{which}_token_id")
    if type(index) is not int or not 0 <= index < size:
        raise refused(file.path, f"it does not say its {which} token")
    if index not in special:
        raise refused(file.path, f"its {which} token, id {index}, is no special token")
    return index


def vocabulary_metadata(vocabulary: Vocabulary) -> dict[str, tuple[str, object]]:
    """The metadata of a vocabulary for `write_gguf`, as llama.cpp's converter writes Llama-3's."""
    special = {*vocabulary.special, vocabulary.bos, vocabulary.eos}
    texts = [_letters(index, token, special) for index, token in enumerate(vocabulary.tokens)]
    kinds = [
        CONTROL if index in special else NORMAL if token else UNUSED
        for index, token in enumerate(vocabulary.tokens)
    ]
    metadata: dict[str, tuple[str, object]] = {
        "model": ("str", "gpt2"),
        "pre": ("str", "llama-bpe"),
        "tokens": ("strs", texts),
        "token_type": ("i32s", kinds),
        "merges": ("strs", [texts[left] + b" " + texts[right] for left, right, _ in vocabulary.merges]),
        "bos_token_id": ("u32", vocabulary.bos),
        "eos_token_id": ("u32", vocabulary.eos),
        "add_bos_token": ("bool", True),
    }
    if END_OF_TURN in vocabulary.tokens:
        metadata["eot_token_id"] = ("u32", vocabulary.tokens.index(END_OF_TURN))
    return {PREFIX + name: value for name, value in metadata.items()}


def _letters(index: int, token: bytes, special: set[int]) -> bytes:
    if index in special:
        return token
    if not token:
        return f"[PAD{index}]".encode()
    return "".join(LETTER_OF[value] for value in token).encode()
