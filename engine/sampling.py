"""Logits to one token id: greedy, temperature, top-k, top-p, seeded; stop conditions are in generate.py.

A token is a function of its logits, the seed, the number of the choice and its position in the sequence, and
of nothing that was drawn before. So a seed gives the same tokens with speculation on or off, alone or in a
batch, and a continuation that is taken up again at some position goes on as it would have gone on.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from engine.errors import HaloError

BLOCK: Final = 256  # weights that are summed together
COLDEST: Final = 1e-6  # a temperature below would overflow; logits so near to each other are equal
FLOORS: Final = (0.05, 2.5e-3, 1e-4, 5e-6, 2.5e-7, 0.0)  # of the likeliest token's weight


@dataclass(frozen=True)
class SamplingParams:
    """How a continuation is chosen and where it ends.

    temperature 0 is greedy. top_k 0 and top_p 1 are off. max_tokens None is what the context leaves.
    The same seed gives the same tokens on the same build, with speculation or without, alone or in a batch;
    None draws one from the system.
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


@dataclass(frozen=True)
class Noise:
    """The random numbers of one choice, one a position: counter-based, so each on its own."""

    key: bytes

    def at(self, position: int) -> float:
        """Uniform in [0, 1), with 53 bits, for the token at `position` of the sequence (the first has 0)."""
        digest = hashlib.sha256(self.key + position.to_bytes(8, "little")).digest()
        return (int.from_bytes(digest[:8], "little") >> 11) * 2.0**-53


def make_noise(seed: int | None, index: int = 0) -> Noise:
    """The random numbers of choice number `index` under `seed`; without one, the system draws it."""
    word = secrets.randbits(64) if seed is None else seed % 2**64  # OpenAI's is a signed 64-bit number
    return Noise(b"halo" + word.to_bytes(8, "little") + index.to_bytes(8, "little"))


def is_greedy(params: SamplingParams) -> bool:
    """Whether the arg max is all that is asked for."""
    return params.temperature == 0.0 or params.top_k == 1


def sample(logits: NDArray[np.float32], params: SamplingParams, noise: Noise, position: int) -> int:
    """The token id at `position` from logits f32[vocab]; greedy takes the lowest id on a tie."""
    best = int(np.argmax(logits))
    if not np.isfinite(logits[best]):
        raise HaloError(
            "The model gave logits that are no numbers.",
            hint="its files may be damaged: run `halo doctor`.",
        )
    if is_greedy(params):
        return best
    weights = _weights(logits, best, params.temperature)
    if params.top_k == 0 and params.top_p == 1.0:
        return _draw(weights, noise.at(position))
    order, cumulative = _likeliest(logits, weights, params)
    return int(order[_passes(cumulative, noise.at(position) * float(cumulative[-1]))])


def _weights(logits: NDArray[np.float32], best: int, temperature: float) -> NDArray[np.float32]:
    """exp((logit - best logit) / temperature), f32, with zeros after them up to a multiple of BLOCK."""
    weights = np.zeros(-(-len(logits) // BLOCK) * BLOCK, np.float32)
    with np.errstate(over="ignore", under="ignore"):
        scaled = (logits - logits[best]) / np.float32(max(temperature, COLDEST))
        np.exp(scaled, out=weights[: len(logits)])
    return weights


def _draw(weights: NDArray[np.float32], uniform: float) -> int:
    """The id where the running sum of the weights passes `uniform` of the whole: by blocks, then in one."""
    blocks = weights.reshape(-1, BLOCK)
    sums = np.cumsum(blocks.sum(axis=1), dtype=np.float64)
    target = uniform * float(sums[-1])
    block = _passes(sums, target)
    within = np.cumsum(blocks[block], dtype=np.float64)
    return block * BLOCK + _passes(within, target - (float(sums[block - 1]) if block else 0.0))


def _passes(running: NDArray[np.float64], target: float) -> int:
    """The first place above `target`; where rounding put the target at the end, the last that adds to it."""
    last = int(np.searchsorted(running, running[-1], side="left"))
    return min(int(np.searchsorted(running, target, side="right")), last)


def _likeliest(
    logits: NDArray[np.float32], weights: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The ids that top_k and then top_p leave, the likeliest first, and the running sum of their weights.

    A vocabulary is never sorted: those above a falling floor are, until they are enough.
    """
    vocab = len(logits)
    total = float(weights.sum(dtype=np.float64))
    for floor in FLOORS:
        near = np.flatnonzero(weights[:vocab] >= np.float32(floor))
        if len(near) >= params.top_k > 0:
            break
        if not params.top_k and float(weights[near].sum(dtype=np.float64)) >= params.top_p * total:
            break
    # Stable, so that equal logits keep the order of their ids on every machine.
    order = near[np.argsort(-logits[near], kind="stable")]
    if params.top_k:
        order = order[: params.top_k]
    cumulative = np.cumsum(weights[order], dtype=np.float64)
    if params.top_p < 1.0:
        enough = params.top_p * (float(cumulative[-1]) if params.top_k else total)
        kept = int(np.searchsorted(cumulative, enough, side="left")) + 1
        order, cumulative = order[:kept], cumulative[:kept]
    return order, cumulative


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise HaloError(f"{sentence}.")
