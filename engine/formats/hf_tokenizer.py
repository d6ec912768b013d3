"""A Hugging Face `tokenizer.json` as a Vocabulary: byte-level BPE with Llama-3's pattern. Not an encoder.

Source of the format: huggingface/tokenizers. What the engine's own tokenizer would encode otherwise than
the library (another pre-tokeniser, a normaliser, SentencePiece, added tokens that are ordinary text) is
refused by name: wrong ids give fluent nonsense.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from engine.errors import HaloError
from engine.formats.hf_config import HfConfig, read_object, shown
from engine.formats.htok import BYTE_OF, MAX_MERGES, MAX_VOCAB, Vocabulary
from engine.formats.merges import difference
from engine.tokenizer import LLAMA3_PATTERN, Tokenizer

MAX_TOKENIZER: Final = 64 << 20
_USE: Final = "use a model whose tokenizer is Llama-3's or of its kind"


def read_tokenizer(directory: Path, config: HfConfig) -> Vocabulary:
    """tokenizer.json of a checkpoint as a vocabulary of exactly the model's size; HaloError with the reason.

    bos and eos come from config.json, else from tokenizer_config.json's texts.
    """
    path = directory / "tokenizer.json"
    if not path.exists() and (directory / "tokenizer.model").exists():
        raise _refused(path, "there is only tokenizer.model, which is SentencePiece")
    data = read_object(path, MAX_TOKENIZER)
    model = data.get("model")
    if not isinstance(model, dict):
        raise _refused(path, "it has no model")
    _check_model(path, model)
    _check_pipeline(path, data)
    size = config.model.vocab_size
    if size > MAX_VOCAB:
        raise _refused(path, f"{size} tokens are more than the {MAX_VOCAB} of .htok")
    tokens, special, ids = _tokens(path, data, model, size)
    merges = _merges(path, model, ids)
    why = difference(tokens, special, merges, ignore_merges=bool(model.get("ignore_merges")))
    if why:
        raise _refused(path, why)
    bos = _end(directory, "bos", config.bos, tokens, special)
    eos = _end(directory, "eos", config.eos, tokens, special)
    vocabulary = Vocabulary(tokens, merges, bos, eos, sorted(special))
    try:
        Tokenizer(vocabulary)  # refuses ids that do not follow the merges' ranks, and bytes without a token
    except HaloError as error:
        raise _refused(path, error.message) from error
    return vocabulary


def _refused(path: Path, why: str) -> HaloError:
    return HaloError(f"halo cannot use the tokenizer {path}: {why}.", hint=_USE)


def _check_model(path: Path, model: dict[str, Any]) -> None:
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise _refused(path, f"its model is {shown(kind)}, not BPE")
    if model.get("byte_fallback"):
        raise _refused(path, "it falls back to bytes, as SentencePiece does, and is no byte-level BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(path, f"its model has {key}")


def _check_pipeline(path: Path, data: dict[str, Any]) -> None:
    if data.get("normalizer") is not None:
        kind = data["normalizer"].get("type") if isinstance(data["normalizer"], dict) else "unknown"
        raise _refused(path, f"it changes the text before encoding (normalizer {shown(kind)})")
    pre = data.get("pre_tokenizer")
    steps = pre.get("pretokenizers") if isinstance(pre, dict) and pre.get("type") == "Sequence" else [pre]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise _refused(path, "it has no pre-tokeniser, as SentencePiece has none")
    kinds = [shown(step.get("type")) for step in steps[:4]]
    if kinds != ["Split", "ByteLevel"]:
        raise _refused(path, f"its pre-tokeniser is {', '.join(kinds)}, not Llama-3's Split and ByteLevel")
    split, level = steps
    if split.get("pattern") != {"Regex": LLAMA3_PATTERN}:
        raise _refused(path, "the pattern of its pre-tokeniser is not Llama-3's")
    if split.get("behavior") != "Isolated" or split.get("invert"):
        raise _refused(path, "its pre-tokeniser does not keep each match as a piece")
    if level.get("add_prefix_space") or level.get("use_regex", True):
        raise _refused(path, "its byte-level step adds a space or splits again")


def _tokens(
    path: Path, data: dict[str, Any], model: dict[str, Any], size: int
) -> tuple[list[bytes], set[int], dict[str, int]]:
    """(tokens in id order, special ids, id of each ordinary text)."""
    vocab = model.get("vocab")
    added = data.get("added_tokens") or []
    if not isinstance(vocab, dict) or not isinstance(added, list):
        raise _refused(path, "it has no vocabulary")
    tokens = [b""] * size
    special: set[int] = set()
    for each in added:
        text = each.get("content") if isinstance(each, dict) else None
        if not isinstance(text, str) or not text or not text.isprintable():
            raise _refused(path, "an added token has no text")
        if each.get("special") is not True:
            raise _refused(path, f"its added token {text[:40]!r} is ordinary text, which .htok does not hold")
        if any(each.get(option) for option in ("lstrip", "rstrip", "single_word")):
            raise _refused(
                path, f"its added token {text[:40]!r} takes white space, which .htok does not hold"
            )
        index = _place(path, tokens, each.get("id"), text)
        tokens[index] = text.encode()
        special.add(index)
    ids: dict[str, int] = {}
    for text, index in vocab.items():
        if type(index) is int and index in special:
            if tokens[index] != text.encode("utf-8", "replace"):
                raise _refused(path, f"the id {index} has two texts")
            continue
        ids[text] = _place(path, tokens, index, text)
        try:
            tokens[index] = bytes(BYTE_OF[letter] for letter in text)
        except KeyError:
            raise _refused(path, f"its token {index} is not byte-level, as in SentencePiece") from None
    return tokens, special, ids


def _place(path: Path, tokens: list[bytes], index: object, text: str) -> int:
    if type(index) is not int or not 0 <= index < len(tokens):
        raise _refused(path, f"the id of {text[:40]!r} is outside the model's {len(tokens)} tokens")
    if tokens[index] or not text:
        raise _refused(path, f"the id {index} has two texts or none")
    return index


def _merges(path: Path, model: dict[str, Any], ids: dict[str, int]) -> list[tuple[int, int, int]]:
    """Merges as ids; the format has them as "left right" or, newer, as [left, right]."""
    listed = model.get("merges")
    if not isinstance(listed, list) or len(listed) > MAX_MERGES:
        raise _refused(path, "it has no list of merges")
    merges = []
    for rank, merge in enumerate(listed):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise _refused(path, f"its merge {rank} is no pair")
        left, right = pair
        if left not in ids or right not in ids or left + right not in ids:
            raise _refused(path, f"its merge {rank} names a text that is no token")
        merges.append((ids[left], ids[right], ids[left + right]))
    return merges


def _end(directory: Path, which: str, index: int | None, tokens: list[bytes], special: set[int]) -> int:
    """The id of bos or eos, which must be a special token: no text may encode to it."""
    if index is None:
        text = _configured(directory / "tokenizer_config.json", f"{which}_token")
        index = next((i for i in sorted(special) if tokens[i].decode() == text), None)
        if index is None:
            raise _refused(directory / "tokenizer.json", f"nothing names its {which} token")
    if index not in special:
        raise _refused(directory / "tokenizer.json", f"its {which} token, id {index}, is no special token")
    return index


def _configured(path: Path, key: str) -> str | None:
    if not path.exists():
        return None
    value = read_object(path, MAX_TOKENIZER).get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
