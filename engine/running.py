"""One choice while it has a slot: its tokens so far, what it runs next, and the steps that come of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import numpy as np

from engine.choosing import Choices, Sampler, token_logprob
from engine.sequence import Prompt, Step, TokenLogprob
from engine.text_stream import TextStream

if TYPE_CHECKING:
    from engine.request import Request, Work
    from engine.speculate import Drafter
    from engine.tokenizer import TextTokenizer

NO_TOKEN: Final = -1


class Running:
    """The state of one choice. It is prefilling while `filled` is less than its prompt, then decoding."""

    def __init__(
        self, request: Request, work: Work, tokenizer: TextTokenizer, stop_ids: frozenset[int], context: int
    ) -> None:
        params = work.params
        self.request, self.work = request, work
        self.prompt = np.array(work.prompt_ids, np.int32)
        constraint = work.constraint.fork() if work.constraint else None
        self.sampler = Sampler(params, self.prompt, tokenizer.size, work.seed_index, constraint)
        self._text = TextStream(tokenizer, params.stop, work.strip_leading)
        self._stop_ids: frozenset[int] = frozenset() if params.ignore_eos else stop_ids
        self.length = len(self.prompt)  # of prompt and answer
        self._end = context if params.max_tokens is None else min(context, self.length + params.max_tokens)
        self._prompt_end = self.length
        self.slot = -1
        self.begun = False  # its prompt runs, or has run
        self.filled = 0  # tokens whose keys and values the slot holds
        self.next: list[int] = []  # to run next, while decoding: the last token and drafts of those after it
        self.drafter: Drafter | None = None
        self.leader: Running | None = None  # it prefills what this one will copy
        self.shared = 0  # ... so many tokens
        self.last_time = 0.0  # of the last token
        self._scored: list[TokenLogprob | None] = [None]  # of the prompt, if that is asked for
        self.ended = False

    @property
    def prefilling(self) -> bool:
        """Whether there is no token of the answer yet."""
        return not self.next

    @property
    def prompt_only(self) -> bool:
        """Whether no token of an answer is asked for."""
        return self._end == self._prompt_end

    @property
    def greedy(self) -> bool:
        """Whether its tokens are the likeliest ones: drafts are right at another rate then."""
        return self.sampler.noise is None

    def waits(self) -> bool:
        """Whether another sequence is about to run what this one begins with, and it had better copy that."""
        leader = self.leader
        return leader is not None and not leader.ended and leader.filled < self.shared

    @property
    def scores_prompt(self) -> bool:
        """Whether the log probabilities of the prompt are asked for: then all of it is run."""
        return self.work.params.prompt_logprobs is not None

    def room(self) -> int:
        """Drafts that may be verified with the next step: the last token ends the text anyway."""
        return self._end - self.length - 1

    def score(self, choices: Choices, row: int, position: int) -> None:
        """Take the log probability of the prompt's token at `position`, whose logits are those of `row`."""
        top = self.work.params.prompt_logprobs or 0
        self._scored.append(token_logprob(choices.logits(row), int(self.prompt[position]), top))

    def prompt_done(self) -> Iterable[Prompt | Step]:
        """What is to be said when the prompt has run, before the first token."""
        if self.scores_prompt:
            yield Prompt(self._scored)
        if self.prompt_only:
            self.ended = True
            yield Step(NO_TOKEN, "", "length")

    def take(self, token: int, choices: Choices, row: int) -> Step:
        """The next token of the answer; sets `ended` with the last one."""
        self.length += 1
        top = self.work.params.logprobs
        logprob = None if top is None else token_logprob(choices.logits(row), token, top)
        if token in self._stop_ids:
            self.ended = True
            return Step(token, self._text.finish(), "stop", True, logprob)
        sampler = self.sampler
        if not sampler.is_plain:
            sampler.take(token)
        text = self._text
        piece = text.feed(token)
        reason = None
        if text.stop_string is not None:
            reason = "stop"
        elif self.length >= self._end or (sampler.constraint and sampler.constraint.finished()):
            piece += text.finish()
            done = text.stop_string is not None or self.length < self._end
            reason = "stop" if done or (sampler.constraint and sampler.constraint.finished()) else "length"
        self.ended = reason is not None
        return Step(token, piece, reason, False, logprob, text.stop_string)
