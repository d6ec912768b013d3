"""The entries of a step: what each sequence has in it, laid out for one native call. No queue is here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from engine.choosing import AGAIN, Choices, Chooser, Sampler, TokenSession
from engine.running import Running

BUDGET: Final = AGAIN  # entries of a step: what one pass over the weights serves
SHARED_BUDGET: Final = 48  # ... while others decode, who wait for it
LEAST_PREFILL: Final = 12  # entries for prompts in every step, however many decode
SCORED: Final = 32  # entries of a prompt whose logits are all wanted, for which there must be room


class Part(NamedTuple):
    """What one sequence has in a step: `size` tokens from position `start`, the last `wanted` with results.

    Of a decoding sequence all are wanted; of a prompt none but the last of all, unless it is scored.
    """

    running: Running
    start: int
    size: int
    wanted: int
    decodes: bool
    gives_token: bool


def plan(running: Sequence[Running]) -> list[Part]:
    """The next step: everybody's next token, and prompts in equal shares of what is left of the budget."""
    parts = [Part(one, one.filled, len(one.next), len(one.next), True, True) for one in running if one.next]
    prompts = [one for one in running if not one.next and one.begun]
    if not prompts:
        return parts
    left = max((SHARED_BUDGET if parts else BUDGET) - len(parts), LEAST_PREFILL)
    prompts.sort(key=lambda one: len(one.prompt) - one.filled)  # stable: first come, first served
    for at, one in enumerate(prompts):
        count = min(len(one.prompt) - one.filled, max(left // (len(prompts) - at), 1))
        if one.scores_prompt:
            count = min(count, SCORED)
        if count > left:
            break
        left -= count
        parts.append(prompt_part(one, count))
    return parts


def prompt_part(one: Running, count: int) -> Part:
    """The next `count` tokens of a prompt."""
    done = one.filled + count == len(one.prompt)
    token = done and not one.prompt_only
    # A logit row at position p is for the token at p + 1: of the prompt, or the first of the answer.
    wanted = count - (done and not token) if one.scores_prompt else int(token)
    return Part(one, one.filled, count, wanted, False, token)


class Batch:
    """The arrays of a step, kept from one to the next."""

    def __init__(self, session: TokenSession, vocab: int, slots: int) -> None:
        self._chooser = Chooser(session, vocab)
        room = 2 * BUDGET + slots
        self._tokens, self._slots, self._positions = (np.zeros(room, np.int32) for _ in range(3))
        self._want = np.zeros(room, np.bool_)
        self._count = np.arange(room, dtype=np.int32)
        self.native_s = 0.0  # of the last run

    def run(self, parts: Sequence[Part]) -> Choices:
        """Run the parts together; rows of the choices are the wanted entries, in order."""
        rows: list[tuple[Sampler, int]] = []
        n = 0
        for part in parts:
            one, end = part.running, n + part.size
            stop = part.start + part.size
            self._tokens[n:end] = one.next if part.decodes else one.prompt[part.start : stop]
            self._slots[n:end] = one.slot
            self._positions[n:end] = self._count[: part.size]
            self._positions[n:end] += part.start
            self._want[n:end] = False
            last = min(stop, len(one.prompt) - 1) if one.prompt_only else stop
            first = n + last - part.wanted - part.start
            self._want[first : first + part.wanted] = True
            rows.extend((one.sampler, position) for position in range(last - part.wanted + 1, last + 1))
            n = end
        scored = any(part.running.scores_prompt and not part.decodes for part in parts)
        entries = (self._tokens[:n], self._slots[:n], self._positions[:n], self._want[:n])
        choices = self._chooser.run(entries, rows, all_logits=scored)
        self.native_s = self._chooser.native_s
        return choices
