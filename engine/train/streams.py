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

SEED = 1234
TRAINING = ("books", "stories", "talks")
HELD_OUT = ("held_books", "held_stories", "held_talks")
Streams = dict[str, NDArray[np.uint16]]


def build_streams(folder: Path, cache: Path, tokenizer_path: Path) -> tuple[Streams, dict[str, Any]]:
    """(token streams by name, counts); encoded once, and then read from the .npy files of `cache`."""
    if not (cache / "counts.json").exists():
        cache.mkdir(parents=True, exist_ok=True)
        corpus = data.load(folder)
        for name, stream in _encode(corpus, Tokenizer.from_file(str(tokenizer_path))).items():
            np.save(cache / f"{name}.npy", stream)
        (cache / "counts.json").write_text(json.dumps(_counts(corpus)))
    streams = {name: np.load(cache / f"{name}.npy") for name in (*TRAINING, *HELD_OUT)}
    return streams, json.loads((cache / "counts.json").read_text())


def _encode(corpus: data.Corpus, tokenizer: Tokenizer) -> Streams:
    rng = random.Random(SEED)
    # Four passes over the pairs, each shuffled and paraphrased anew.
    talks = [talk for _ in range(4) for talk in data.dialogue_text(corpus, rng)]
    return {
        "books": data.encode_documents(corpus.books, tokenizer),
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


class Batches:
    """Random windows of context + 1 tokens, streams on the device; a batch is a function of (seed, step)."""

    def __init__(self, streams: Streams, rows: int, context: int, device: str) -> None:
        self.streams = [torch.from_numpy(streams[n].astype(np.int32)).to(device) for n in TRAINING]
        self.rows, self.context, self.device = rows, context, device

    def __call__(self, step: int, shares: tuple[float, float, float]) -> tuple[Tensor, Tensor]:
        """(tokens, targets), int64 [rows, context] each; `shares` are those of books, stories and talks."""
        rng = np.random.default_rng([SEED, step])
        counts = rng.multinomial(self.rows, shares)
        window = torch.arange(self.context + 1, device=self.device)
        rows = []
        for stream, count in zip(self.streams, counts, strict=True):
            starts = torch.from_numpy(rng.integers(0, len(stream) - self.context - 1, count))
            rows.append(stream[starts.to(self.device)[:, None] + window])
        batch = torch.cat(rows).long()
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
