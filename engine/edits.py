"""What a sequence's own history does to its logits: penalties, bias, a mask. The draw is in sampling.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from engine.errors import HaloError

if TYPE_CHECKING:
    from engine.sampling import SamplingParams

MASKED: Final = np.float32(-1e30)  # added to a logit, it is all that is left of the sum


class Edits:
    """The changes to one sequence's logits, kept up to date token by token."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] | NDArray[Any], vocab: int) -> None:
        self._params = params
        self._vocab = vocab
        self.penalises = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        self.shift: NDArray[np.float32] | None = None  # what is added
        self._bias: dict[int, float] = {}
        self._counts: dict[int, int] = {}  # of the answer's tokens
        self._seen: NDArray[np.bool_] | None = None
        self.allowed: NDArray[np.bool_] | None = None  # the mask of the next token
        if self.penalises or params.logit_bias:
            self.shift = np.zeros(vocab, np.float32)
        for token, bias in params.logit_bias:
            if not 0 <= token < vocab:
                raise HaloError(f"Token id {token} of logit_bias is outside the vocabulary of {vocab}.")
            self._bias[token] = bias
            self._renew(token)
        if params.repetition_penalty != 1.0:
            self._seen = np.zeros(vocab, np.bool_)
            self._seen[np.asarray(prompt_ids, np.int64)] = True

    @property
    def repeats(self) -> bool:
        """Whether logits are scaled where their tokens came before: no sum of noise can say that."""
        return self._seen is not None

    def take(self, token: int) -> None:
        """The next token of the answer."""
        if self._seen is not None:
            self._seen[token] = True
        if self.penalises:
            self._counts[token] = self._counts.get(token, 0) + 1
            self._renew(token)

    def mask(self, allowed: NDArray[Any]) -> None:
        """Only these tokens may come next; raises HaloError if there are none."""
        self.allowed = allowed.astype(np.bool_, copy=False)
        if len(self.allowed) != self._vocab:
            raise HaloError(f"A mask of {len(self.allowed)} tokens for a vocabulary of {self._vocab}.")
        if not self.allowed.any():
            raise HaloError(
                "The grammar leaves no token that may come next.", hint="the schema may contradict itself"
            )

    def repeated(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """The logits after the repetition penalty: of what came before, divided, or multiplied below zero."""
        if self._seen is None:
            return logits
        penalty = np.float32(self._params.repetition_penalty)
        changed = np.where(logits > 0, logits / penalty, logits * penalty)
        return np.where(self._seen, changed, logits)

    def shifted(self, row: NDArray[np.float32]) -> NDArray[np.float32]:
        """A row (of logits, or of noise) after bias, penalties of the answer, and the mask; a new one."""
        row = row.copy() if self.shift is None else row + self.shift
        if self.allowed is not None:
            row[~self.allowed] = MASKED
        return row

    def _renew(self, token: int) -> None:
        if self.shift is None:
            return
        count = self._counts.get(token, 0)
        penalty = self._params.frequency_penalty * count + self._params.presence_penalty * (count > 0)
        self.shift[token] = self._bias.get(token, 0.0) - penalty
