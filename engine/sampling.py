"""Logits to one token id: greedy, temperature, top-k, top-p, seeded; stop conditions are in generate.py.

A token is drawn by Gumbel's rule: of the tokens that top-k and then top-p leave, the one at which
logit + temperature * noise is largest. With noise -log(exponential), one number a token of the vocabulary,
this draws from the softmax of the logits over the temperature (E. J. Gumbel, 1954). The noise is a function
of the seed, the number of the choice and the position alone, and of nothing that was drawn before. So a seed
gives the same tokens with speculation on or off, alone or in a batch, and a continuation that is taken up
again at some position goes on as it would have gone on. And the largest of many sums needs few of the logits
(docs/exact-head.md): `settled` says whether those near the winner decide.

What changes the logits before (engine/edits.py) comes in this order: the repetition penalty, then one sum of
bias, presence and frequency penalty, then the mask; after it min-p, top-k and top-p, each over what the one
before left. One float32 operation each; the sum is added to the noise before both are added to the logit.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from engine.errors import HaloError

if TYPE_CHECKING:
    from engine.edits import Edits

COLDEST: Final = 1e-6  # a temperature below would overflow; logits so near to each other are equal
DEPTH: Final = 6.0  # temperatures
FLOORS: Final = (0.05, 2.5e-3, 1e-4, 5e-6, 2.5e-7, 0.0)  # of the likeliest token's weight


@dataclass(frozen=True)
class SamplingParams:
    """How a continuation is chosen and where it ends.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and the other neutral values are off. max_tokens None
    is what the context leaves; 0 asks for the prompt alone. The same seed gives the same tokens on the same
    build, with speculation or without, alone or in a batch; None draws one from the system.
    repetition_penalty is over prompt and answer (above 1: fewer repetitions), presence_penalty and
    frequency_penalty over the answer, as vLLM has them. logit_bias: (token id, what is added to its logit).
    logprobs, prompt_logprobs: how many of the likeliest tokens come with each, None for no log probabilities.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False

    def validate(self) -> None:
        """Raise HaloError on a value out of range."""
        _require(self.max_tokens is None or self.max_tokens >= 0, "max_tokens must not be negative")
        _require(0.0 <= self.temperature <= 100.0, "temperature must be between 0 and 100")
        _require(0.0 < self.top_p <= 1.0, "top_p must be above 0 and at most 1")
        _require(self.top_k >= 0, "top_k must not be negative")
        _require(0.0 <= self.min_p <= 1.0, "min_p must be between 0 and 1")
        _require(0.01 <= self.repetition_penalty <= 100.0, "repetition_penalty must be between 0.01 and 100")
        _require(abs(self.presence_penalty) <= 100.0, "presence_penalty must be between -100 and 100")
        _require(abs(self.frequency_penalty) <= 100.0, "frequency_penalty must be between -100 and 100")
        _require(all(abs(b) <= 1000.0 for _, b in self.logit_bias), "a bias must be between -1000 and 1000")
        _require(
            all(n is None or n >= 0 for n in (self.logprobs, self.prompt_logprobs)),
            "logprobs must not be negative",
        )
        _require(all(self.stop), "a stop string must not be empty")


@dataclass(frozen=True)
class Noise:
    """The random numbers of one choice, a row a position: counter-based, so each on its own."""

    key: int

    def at(self, position: int, vocab: int) -> NDArray[np.float32]:
        """Gumbel's distribution, [vocab], for the token at `position` of the sequence (the first has 0)."""
        return self.scaled(position, vocab, 1.0)

    def scaled(self, position: int, vocab: int, temperature: float) -> NDArray[np.float32]:
        """The same times the temperature: what is added to the logits."""
        stream = np.random.Generator(np.random.Philox(key=self.key, counter=position << 128))
        row = stream.standard_exponential(vocab).astype(np.float32)
        np.maximum(row, np.float32(1e-30), out=row)  # 0 comes once in 2^53
        np.log(row, out=row)
        return np.multiply(row, -np.float32(max(temperature, COLDEST)), out=row)


def make_noise(seed: int | None, index: int = 0) -> Noise:
    """The random numbers of choice number `index` under `seed`; without one, the system draws it."""
    word = secrets.randbits(64) if seed is None else seed % 2**64  # OpenAI's is a signed 64-bit number
    digest = hashlib.sha256(b"halo" + word.to_bytes(8, "little") + index.to_bytes(8, "little")).digest()
    return Noise(int.from_bytes(digest[:16], "little"))


def is_greedy(params: SamplingParams) -> bool:
    """Whether the arg max is all that is asked for."""
    return params.temperature == 0.0 or params.top_k == 1


def sample(
    logits: NDArray[np.float32],
    params: SamplingParams,
    noise: Noise | None,
    position: int,
    edits: Edits | None = None,
) -> int:
    """The token id at `position` from logits f32[vocab]; greedy (no noise) takes the lowest id on a tie."""
    greedy = is_greedy(params) or noise is None
    row = None if greedy or noise is None else noise.scaled(position, len(logits), params.temperature)
    return sample_with(logits, params, row, edits)


def sample_with(
    logits: NDArray[np.float32],
    params: SamplingParams,
    row: NDArray[np.float32] | None,
    edits: Edits | None = None,
) -> int:
    """As `sample`, with what is added to the logits (Noise.scaled); None: greedy."""
    best = int(np.argmax(logits))
    if not np.isfinite(logits[best]):
        raise HaloError(
            "The model gave logits that are no numbers.",
            hint="its files may be damaged: run `halo doctor`.",
        )
    repeated = edits.repeated(logits) if edits else logits
    ranked = edits.shifted(repeated) if edits else logits
    if row is None:
        return int(np.argmax(ranked))
    values = repeated + (edits.shifted(row) if edits else row)
    if not is_narrowed(params):
        return int(np.argmax(values))
    weights = _weights(ranked, int(np.argmax(ranked)), params.temperature)
    left = _left(ranked, weights, params)
    value = values[left]
    return int(left[value == value.max()].min())


def is_narrowed(params: SamplingParams) -> bool:
    """Whether min-p, top-k or top-p leave tokens out."""
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def depth_of(params: SamplingParams) -> float:
    """How far below the largest logit `settled` should see: what lies deeper has 1/400 of its weight."""
    return DEPTH * max(params.temperature, COLDEST)


def settled(token: int, ids: NDArray[np.int32], logits: NDArray[np.float32], params: SamplingParams) -> bool:
    """Whether `token`, the winner among all, is certainly one that min-p, top-k and top-p leave.

    ids rising, and their logits: every token whose logit is at least the winner's is among them. The winner
    among all is the winner among those that are left, if it is left; else the others have to be known.
    """
    own = logits[np.searchsorted(ids, token)]
    before = (logits > own) | ((logits == own) & (ids < token))
    if params.top_k and np.count_nonzero(before) >= params.top_k:
        return False
    if params.top_p == 1.0 and not params.min_p:
        return True
    # The whole is at least what is seen of it. A little off, since sums differ in the last bits.
    weights = _weights(logits, int(np.argmax(logits)), params.temperature)
    if params.min_p:
        if weights[np.searchsorted(ids, token)] < np.float32(params.min_p):
            return False
        weights[weights < np.float32(params.min_p)] = 0.0
    seen = float(np.sort(weights)[-params.top_k :].sum(dtype=np.float64))
    return float(weights[before].sum(dtype=np.float64)) < params.top_p * seen * (1 - 1e-9)


def _weights(logits: NDArray[np.float32], best: int, temperature: float) -> NDArray[np.float32]:
    """exp((logit - best logit) / temperature), float32."""
    with np.errstate(over="ignore", under="ignore"):
        weights: NDArray[np.float32] = np.exp((logits - logits[best]) / np.float32(max(temperature, COLDEST)))
    return weights


def _left(
    logits: NDArray[np.float32], weights: NDArray[np.float32], params: SamplingParams
) -> NDArray[np.int64]:
    """The ids that min_p, then top_k and then top_p leave, in no order; of equal logits the lower ids first.

    A vocabulary is rarely sorted: those above a falling floor are, until they are enough.
    """
    least = np.float32(params.min_p)
    if params.min_p:
        weights = np.where(weights >= least, weights, np.float32(0.0))
    total = float(weights.sum(dtype=np.float64))
    for floor in FLOORS:
        near = np.flatnonzero(weights >= max(np.float32(floor), least))
        if floor <= params.min_p:
            break
        if len(near) >= params.top_k > 0:
            break
        if not params.top_k and float(weights[near].sum(dtype=np.float64)) >= params.top_p * total:
            break
    count = min(params.top_k or len(near), len(near))
    if params.top_p < 1.0:
        # Equal logits have equal weights, so the sums do not depend on the order of their ids.
        cumulative = np.cumsum(np.sort(weights[near])[::-1][:count], dtype=np.float64)
        enough = params.top_p * (float(cumulative[-1]) if params.top_k else total)
        count = min(int(np.searchsorted(cumulative, enough, side="left")) + 1, count)
    own = logits[near]
    last = -np.partition(-own, count - 1)[count - 1]
    above = near[own > last]
    return np.concatenate((above, near[own == last][: count - len(above)]))


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise HaloError(f"{sentence}.")
