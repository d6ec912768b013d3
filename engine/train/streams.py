"""Token streams and the batches cut from them. The texts are those of `engine.train.data`; no training here.

The batch of a step depends on (seed, step) alone, so a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from engine.train import data
from engine.train.recipe import Recipe, Shares

SEED = 1234
GOLDEN_RATIO = 0x9E3779B97F4A7C15  # of 2^64
NEW_LINE = "\u010a"  # as byte-level BPE writes it
TRAINING = ("books", "stories", "talks")
HELD_OUT = ("held_books", "held_stories", "held_talks")
Streams = dict[str, NDArray[np.uint16]]


def build_streams(
    folder: Path, cache: Path, tokenizer_path: Path, recipe: Recipe
) -> tuple[Streams, dict[str, Any]]:
    """(token streams by name, counts); encoded once, and then read from the .npy files of `cache`.

    `paragraphs` is no stream: it holds where a paragraph of the books begins. A cache whose talks are not
    those of `recipe` ends the program.
    """
    if not (cache / "counts.json").exists():
        cache.mkdir(parents=True, exist_ok=True)
        corpus = data.load(folder)
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
        for name, stream in _encode(corpus, tokenizer, recipe.story_passes).items():
            np.save(cache / f"{name}.npy", stream)
        (cache / "counts.json").write_text(
            json.dumps(_counts(corpus) | {"story_passes": recipe.story_passes})
        )
    streams = {name: np.load(cache / f"{name}.npy") for name in (*TRAINING, *HELD_OUT, "paragraphs")}
    counts = json.loads((cache / "counts.json").read_text())
    if counts["story_passes"] != recipe.story_passes:
        raise SystemExit(f"{cache} was made for another recipe; give another --cache")
    return streams, counts


def _encode(corpus: data.Corpus, tokenizer: Tokenizer, story_passes: int) -> Streams:
    rng = random.Random(SEED)
    # Four passes over the pairs, each shuffled and paraphrased anew.
    talks = [talk for i in range(4) for talk in data.dialogue_text(corpus, rng, i < story_passes)]
    books = data.encode_documents(corpus.books, tokenizer)
    return {
        "books": books,
        "paragraphs": paragraph_starts(books, tokenizer),
        "stories": data.encode_documents(corpus.stories, tokenizer),
        "talks": data.encode_talks(talks, tokenizer),
        "held_books": data.encode_documents(corpus.held_books, tokenizer),
        "held_stories": data.encode_documents(corpus.held_stories, tokenizer),
        "held_talks": data.encode_talks([[pair] for pair in corpus.held_pairs], tokenizer),
    }


def _counts(corpus: data.Corpus) -> dict[str, Any]:
    """Characters of the held-out texts, and the sha256 of each data file."""
    characters = {
        "held_books": sum(map(len, corpus.held_books)),
        "held_stories": sum(map(len, corpus.held_stories)),
        "held_talks": sum(len(q) + len(a) for q, a in corpus.held_pairs),
    }
    return {"characters": characters, "sha256": corpus.sha256}


def paragraph_starts(stream: NDArray[np.uint16], tokenizer: Tokenizer) -> NDArray[np.uint32]:
    """The places of `stream` that come after an empty line or after BOS."""
    ends = np.zeros(tokenizer.get_vocab_size(), dtype=bool)
    ends[data.BOS] = True
    for token, i in tokenizer.get_vocab().items():
        ends[i] |= token.endswith(NEW_LINE * 2)
    return (np.flatnonzero(ends[stream]) + 1).astype(np.uint32)


def spread(first: int, count: int, places: int) -> NDArray[np.int64]:
    """Members first .. first + count - 1 of a sequence that fills 0 .. places - 1 evenly, however long it is.

    Fractions of a multiple of the golden ratio; `places` is below 2^32.
    """
    turns = np.arange(first, first + count, dtype=np.uint64) * np.uint64(GOLDEN_RATIO)
    return ((turns >> np.uint64(32)) * np.uint64(places) >> np.uint64(32)).astype(np.int64)


class Batches:
    """Windows of a number of tokens, and the token after each; a batch is a function of (seed, step)."""

    def __init__(self, streams: Streams, tokens: int, device: str, recipe: Recipe) -> None:
        self.streams = [torch.from_numpy(streams[n].astype(np.int32)).to(device) for n in TRAINING]
        self.paragraphs = streams["paragraphs"].astype(np.int64)
        self.tokens, self.device, self.recipe = tokens, device, recipe

    def __call__(self, step: int, window: int, shares: Shares) -> tuple[Tensor, Tensor, list[int]]:
        """(tokens, targets, rows of each stream): int64 [rows, window] each, of books, stories and talks."""
        rng = np.random.default_rng([SEED, step])
        rows = max(1, self.tokens // window)
        counts = rng.multinomial(rows, shares)
        length = torch.arange(window + 1, device=self.device)
        parts = []
        for i, (stream, count) in enumerate(zip(self.streams, counts, strict=True)):
            room = len(stream) - window - 1
            if room < 1:
                raise ValueError(f"a text of {len(stream)} tokens is too short for windows of {window}")
            starts = spread(step * rows, count, room) if self.recipe.spread else rng.integers(0, room, count)
            opened = rng.random(count) < self.recipe.book_bos if i == 0 and self.recipe.book_bos else None
            if opened is not None:
                starts[opened] = self._paragraphs_before(starts[opened])
            part = stream[torch.from_numpy(starts).to(self.device)[:, None] + length]
            parts.append(part if opened is None else _opened(part, torch.from_numpy(opened)))
        batch = torch.cat(parts).long()
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous(), counts.tolist()

    def _paragraphs_before(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """The last start of a paragraph that is not behind each place; 1 is one, after BOS."""
        found = np.searchsorted(self.paragraphs, starts, side="right") - 1
        return self.paragraphs[np.maximum(found, 0)]


def _opened(windows: Tensor, chosen: Tensor) -> Tensor:
    """The `chosen` windows with BOS before them, and without their last token."""
    shifted = windows.roll(1, dims=1)
    shifted[:, 0] = data.BOS
    return torch.where(chosen.to(windows.device)[:, None], shifted, windows)
