"""Logits to one token id: greedy, temperature, top-k, top-p, seeded; stop conditions are in generate.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from engine.errors import HaloError

NEGLIGIBLE_NATS: Final = 30.0


@dataclass(frozen=True)
class SamplingParams:
    """How a continuation is chosen and where it ends.

    temperature 0 is greedy. top_k 0 and top_p 1 are off. max_tokens None is what the context leaves.
    The same seed on the same build gives the same tokens; None draws one from the system.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def validate(self) -> None:
        """Raise HaloError on a value out of range."""
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens must be at least 1")
        _require(0.0 <= self.temperature <= 100.0, "temperature must be between 0 and 100")
        _require(0.0 < self.top_p <= 1.0, "top_p must be above 0 and at most 1")
        _require(self.top_k >= 0, "top_k must not be negative")
        _require(all(self.stop), "a stop string must not be empty")


def make_rng(seed: int | None, index: int = 0) -> np.random.Generator:
    """The random source of choice number `index`; choice 0 is what the seed alone gives."""
    if seed is None:
        return np.random.Generator(np.random.PCG64())
    word = seed % 2**64  # OpenAI's seed is a signed 64-bit number
    return np.random.Generator(np.random.PCG64(word if index == 0 else [word, index]))


def sample(logits: NDArray[np.float32], params: SamplingParams, rng: np.random.Generator) -> int:
    """One token id from logits f32[vocab]; at temperature 0 the arg max, the lowest id on a tie."""
    best = int(np.argmax(logits))
    if not np.isfinite(logits[best]):
        raise HaloError(
            "The model gave logits that are no numbers.",
            hint="its files may be damaged: run `halo doctor`.",
        )
    if params.temperature == 0.0 or params.top_k == 1:
        return best
    # Tokens e^-30 below the best are never drawn in practice, and sorting a whole vocabulary is slow.
    near = np.flatnonzero(logits >= logits[best] - np.float32(NEGLIGIBLE_NATS * params.temperature))
    # Stable, so that equal logits keep the order of their ids on every machine.
    order = near[np.argsort(-logits[near], kind="stable")]
    if params.top_k:
        order = order[: params.top_k]
    scaled = (logits[order].astype(np.float64) - float(logits[best])) / params.temperature
    cumulative = np.cumsum(np.exp(scaled))
    total = float(cumulative[-1])
    if params.top_p < 1.0:
        kept = int(np.searchsorted(cumulative, params.top_p * total, side="left")) + 1
        kept = min(kept, len(cumulative))
        total = float(cumulative[kept - 1])
        cumulative = cumulative[:kept]
    place = int(np.searchsorted(cumulative, rng.random() * total, side="right"))
    return int(order[min(place, len(cumulative) - 1)])


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise HaloError(f"{sentence}.")
