"""The entries of a step: what each sequence has in it, laid out for one native call. No queue is here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from engine.choosing import Choices, Chooser, Sampler, TokenSession
from engine.pace import Pace
from engine.running import Running

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


def plan(running: Sequence[Running], pace: Pace) -> list[Part]:
    """The next step: everybody's next token, and prompts in equal shares of the room that is left."""
    parts = [Part(one, one.filled, len(one.next), len(one.next), True, True) for one in running if one.next]
    prompts = [one for one in running if not one.next and one.begun]
    if not prompts:
        return parts
    left = pace.room(len(parts))
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
    """Lays the parts of a step out for one native call."""

    def __init__(self, session: TokenSession, vocab: int) -> None:
        self._chooser = Chooser(session, vocab)

    @property
    def native_s(self) -> float:
        """Seconds in the native call of the last run."""
        return self._chooser.native_s

    def run(self, parts: Sequence[Part]) -> Choices:
        """Run the parts together; rows of the choices are the wanted entries, in order."""
        tokens: list[int] = []
        slots: list[int] = []
        positions: list[int] = []
        want: list[bool] = []
        rows: list[tuple[Sampler, int]] = []
        scored = False
        for one, start, size, wanted, decodes, _ in parts:
            end = start + size
            if decodes and size == 1:  # most parts of most steps
                tokens.append(one.next[0])
                slots.append(one.slot)
                positions.append(start)
                want.append(True)
                rows.append((one.sampler, end))
                continue
            tokens += one.next if decodes else one.prompt[start:end].tolist()
            slots += [one.slot] * size
            positions += range(start, end)
            # The last entry of a prompt that is only scored has no row: what follows it is not asked for.
            last = end - (one.prompt_only and end == len(one.prompt))
            want += [position >= last - wanted for position in range(start, last)]
            want += [False] * (end - last)
            rows += [(one.sampler, position + 1) for position in range(last - wanted, last)]
            scored |= one.scores_prompt and not decodes
        return self._chooser.run((tokens, slots, positions, want), rows, all_logits=scored)
