"""Small tokenizers of the kinds that checkpoints have, as a checkpoint's files; and text to try them on.

They are built here, without the library that will read them, from merges of this repository's own text.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from engine.formats.htok import LETTER_OF
from engine.tokenizer import LLAMA3_PATTERN

TEXT: Final = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text("utf-8")

GPT2_PATTERN: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPACE: Final = "\u2581"
SPECIALS: Final = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
)  # fmt: skip
LOOK_ALIKES: Final = (*SPECIALS, "<s>", "</s>", "<unk>", "<|eot_id", "|>", "<0x0A>", "<|EOT_ID|>")
# One stretch of each script and kind of character that splits or joins in its own way.
SCRIPTS: Final = (
    (0x20, 0x7E), (0xA0, 0x17F), (0x250, 0x2FF), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF),
    (0x530, 0x58F), (0x590, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0xF00, 0xFFF),
    (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x13A0, 0x13FF), (0x1E00, 0x1EFF), (0x2000, 0x206F),
    (0x2070, 0x209F), (0x20A0, 0x20CF), (0x2100, 0x218F), (0x2190, 0x23FF), (0x2460, 0x24FF),
    (0x3000, 0x30FF), (0x4E00, 0x4FFF), (0xAC00, 0xAEFF), (0xE000, 0xE0FF), (0xFB00, 0xFB4F),
    (0xFE00, 0xFE2F), (0xFF00, 0xFFEF), (0x10400, 0x1044F), (0x1D400, 0x1D7FF), (0x1F000, 0x1FAFF),
    (0x20000, 0x200FF), (0xE0000, 0xE01EF), (0xF0000, 0xF00FF), (0, 0x10FFFF),
)  # fmt: skip
ODD: Final = (
    " ", "  ", "\n", "\r\n", "\n\n", "\t", "\u3000", "\x85", "\x1c", "\x00", "\ufeff", "\u200d", "\ufe0f",
    "'s", "'LL", "\u2019s", "'\u017f", "\u212a", "don't", "1234567", "\u0661\u0662\u0663\u0664", "\u00bd",
    "e\u0301\u0302", "\u0915\u094d\u0937", "👩\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "🇩🇪", "...", "!?\n", "_", "://",
)  # fmt: skip


def fuzzed(rng: random.Random) -> str:
    """A text of up to a few dozen pieces: runs, mixtures of scripts, odd things, words, broken UTF-8."""
    pieces = []
    for _ in range(rng.choice((1, 2, 3, 5, 8, 13))):
        kind = rng.random()
        if kind < 0.35:
            low, high = rng.choice(SCRIPTS)
            codes = (rng.randint(low, high) for _ in range(rng.randint(1, 6)))
            pieces.append("".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000))
        elif kind < 0.65:
            pieces.append(rng.choice(ODD))
        elif kind < 0.75:
            pieces.append(rng.choice(ODD) * rng.randint(1, 40))
        elif kind < 0.85:
            pieces.append(rng.choice(LOOK_ALIKES))
        elif kind < 0.9:
            pieces.append(rng.randbytes(rng.randint(1, 12)).decode("utf-8", "replace"))
        else:
            at = rng.randrange(len(TEXT) - 20)
            pieces.append(TEXT[at : at + rng.randint(1, 20)])
    return "".join(pieces)


@cache
def train(count: int) -> tuple[tuple[str, str], ...]:
    """The merges of a byte-pair encoding of the text's words, the most frequent pair first."""
    words = Counter(" " + word for word in TEXT.split())
    pieces = {word: [LETTER_OF[b] for b in word.encode()] for word in words}
    made: dict[tuple[str, str], None] = {}
    while len(made) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, often in words.items():
            for pair in pairwise(pieces[word]):
                pairs[pair] += often
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        made[best] = None
        for parts in pieces.values():
            at = 0
            while at < len(parts) - 1:
                if (parts[at], parts[at + 1]) == best:
                    parts[at : at + 2] = ["".join(best)]
                at += 1
    return tuple(made)


def byte_level(pattern: str = LLAMA3_PATTERN, steps: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """A byte-level tokenizer.json: Llama-3's pipeline, or other steps before the byte-level one."""
    merges = train(300)
    ids = {text: i for i, text in enumerate([*LETTER_OF.values(), *(left + right for left, right in merges)])}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(len(ids) + i, text) for i, text in enumerate(SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*(steps or [split]), level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": [list(pair) for pair in merges],
            "ignore_merges": False,
        },
    }


def falcon() -> dict[str, Any]:
    """Another sequence of pre-tokenisers: punctuation, GPT-2's pattern, digits by threes."""
    gpt2 = {"type": "Split", "pattern": {"Regex": GPT2_PATTERN}, "behavior": "Isolated", "invert": False}
    threes = {
        "type": "Split",
        "pattern": {"Regex": "[0-9][0-9][0-9]"},
        "behavior": "Isolated",
        "invert": False,
    }
    return byte_level(steps=[{"type": "Punctuation", "behavior": "Contiguous"}, gpt2, threes])


def llama2(*, metaspace: bool = False) -> dict[str, Any]:
    """SentencePiece's kind as a tokenizer.json: byte fallback, a space before the text; old form or newer."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), SPACE]
    texts += sorted({c for c in TEXT if c.isalnum()} | set(".,"))
    merges = []
    for word in sorted(set(TEXT.split()))[:400]:
        left = SPACE
        for letter in word:
            if letter not in texts:
                break
            if left + letter not in texts:
                texts.append(left + letter)
                merges.append([left, letter])
            left += letter
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
    first = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    return {
        "version": "1.0",
        "added_tokens": [_added(i, text) for i, text in enumerate(texts[:3])],
        "normalizer": None if metaspace else normalizer,
        "pre_tokenizer": first if metaspace else None,
        "post_processor": _begins_with("<s>", 1),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {text: i for i, text in enumerate(texts)},
            "merges": merges,
        },
    }


def _added(index: int, text: str) -> dict[str, Any]:
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **options, "special": True}


def _begins_with(text: str, index: int) -> dict[str, Any]:
    token, sequence = {"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = [token, sequence, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {text: {"id": text, "ids": [index], "tokens": [text]}}
    return {
        "type": "TemplateProcessing",
        "single": [token, sequence],
        "pair": pair,
        "special_tokens": special,
    }


def size_of(data: dict[str, Any]) -> int:
    """One more than the largest id."""
    return 1 + max(*data["model"]["vocab"].values(), *(token["id"] for token in data["added_tokens"]))


def write_checkpoint(folder: Path, data: dict[str, Any], **config: object) -> Path:
    """A folder with tokenizer.json, and tokenizer_config.json of `config`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(data), "utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


KINDS: Final[dict[str, Callable[[], dict[str, Any]]]] = {
    "llama3": byte_level,
    "falcon": falcon,
    "llama2": llama2,
    "llama2 metaspace": lambda: llama2(metaspace=True),
}
