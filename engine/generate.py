"""One prompt to a stream of decoded steps on one KV slot; neither queue nor chat history is here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.chat import stop_ids
from engine.errors import HaloError
from engine.locate import ModelCard, read_card
from engine.sampling import (
    Noise,
    SamplingParams,
    depth_of,
    is_greedy,
    is_narrowed,
    make_noise,
    sample,
    scaled_noise,
    settled,
)
from engine.sequence import Prompt as Prompt
from engine.sequence import Step as Step
from engine.sequence import TokenLogprob as TokenLogprob
from engine.speculate import (
    OFF,
    Drafter,
    Experience,
    Speculation,
    Tally,
    accept,
    default_speculation,
)
from engine.tokenizer import TextTokenizer, load_tokenizer

if TYPE_CHECKING:
    from engine.backend import Drawn

NEAR: Final = 2048  # tokens near the winner that are looked at; where more are, all are
PREFILL_CHUNK: Final = (
    96  # what one pass over the weights serves; a cancelled request is noticed between chunks
)


class ContextOverflow(HaloError):
    """A prompt that leaves no room for even one token."""

    def __init__(self, tokens: int, context: int, *, at_least: bool = False) -> None:
        few = "at least " if at_least else ""
        super().__init__(
            f"The prompt is {few}{tokens} tokens long and the context of the model holds {context}.",
            hint="shorten the prompt; room for at least one new token must remain.",
        )
        self.tokens = tokens
        self.context = context


class TokenSession(Protocol):
    """What generation needs of engine.backend.Session: tokens at positions of slots in, logits out."""

    def run(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[bool]
    ) -> NDArray[np.float32]:
        """Logits f32[n_wanted, vocab]; KV entries at `positions` are overwritten, earlier ones are read."""
        ...

    def run_argmax(
        self, tokens: Sequence[int], slots: Sequence[int], positions: Sequence[int], want: Sequence[bool]
    ) -> list[int]:
        """As `run`, but the arg max of each wanted row alone, the lowest id on a tie."""
        ...

    def run_draw(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        want: Sequence[bool],
        noise: NDArray[np.float32],
        depth: float = 0.0,
        room: int = 0,
    ) -> Sequence[Drawn]:
        """As `run`, but the arg max of each wanted row + noise, and what is near it."""
        ...

    def logits_again(self, index: int) -> NDArray[np.float32]:
        """Logits of the last run's wanted row number `index`."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Completion:
    """A whole continuation, collected; `token_ids` is all that was decoded, an end token included."""

    token_ids: list[int]
    text: str
    finish_reason: str


class Engine:
    """A model, its tokenizer and one KV slot. Not for use by two threads at once."""

    def __init__(
        self,
        session: TokenSession,
        tokenizer: TextTokenizer,
        card: ModelCard,
        facts: dict[str, Any] | None = None,
        speculation: Speculation = OFF,
    ) -> None:
        self.tokenizer = tokenizer
        self.card = card
        self.facts = facts or {}
        self.context = card.context
        self._session = session
        self._closers: list[Callable[[], None]] = [session.close]
        self._stop_ids = stop_ids(tokenizer)
        self._cached: list[int] = []  # tokens whose keys and values the slot holds
        self.speculation = speculation
        self.tally = Tally()
        self._unsettled = 0.0  # share of the late draws that took all logits
        self._learned = {greedy: Experience(speculation) for greedy in (True, False)}

    @classmethod
    def open(
        cls,
        model_dir: Path,
        library: Path | None = None,
        *,
        context: int | None = None,
        threads: int | None = None,
        speculation: Speculation | None = None,
    ) -> Engine:
        """Open a model directory (model.halo, tokenizer.htok, model.json) on the native backend.

        `speculation` defaults to what HALO_SPECULATE says; it changes the speed and never a token.
        """
        from engine.backend import NativeModel
        from engine.formats.seal import check_open

        speculation = default_speculation() if speculation is None else speculation
        check_open(model_dir)
        card = read_card(model_dir)
        tokenizer = load_tokenizer(model_dir)
        model = NativeModel.open(model_dir / "model.halo", library)
        try:
            if model.config.vocab_size != tokenizer.size:
                raise HaloError(
                    f"The model in {model_dir} has {model.config.vocab_size} tokens and its tokenizer "
                    f"{tokenizer.size}.",
                    hint="they are of different models: run `halo install` again.",
                )
            length = min(context or card.context, card.context, model.config.max_seq_len)
            session = model.session(slots=1, context=length, threads=threads)
        except BaseException:
            model.close()
            raise
        facts = {**model.facts, **session.facts}
        engine = cls(session, tokenizer, ModelCard(card.name, card.chat_template, length), facts, speculation)
        engine._closers.append(model.close)
        return engine

    def close(self) -> None:
        """Free the session and the model; twice does no harm."""
        closers, self._closers = self._closers, []
        for closer in closers:
            closer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def encode_prompt(self, text: str) -> list[int]:
        """What opens a text (bos) and its tokens; raises ContextOverflow before encoding what cannot fit."""
        fewest = len(self.tokenizer.opening) + self.tokenizer.fewest_tokens(text)
        if fewest >= self.context:
            raise ContextOverflow(fewest, self.context, at_least=True)
        return [*self.tokenizer.opening, *self.tokenizer.encode(text)]

    def check_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Raise HaloError for a prompt that cannot be run: empty, too long, or with ids the model lacks."""
        if not prompt_ids:
            raise HaloError("The prompt has no tokens.", hint="give at least one token.")
        if len(prompt_ids) >= self.context:
            raise ContextOverflow(len(prompt_ids), self.context)
        for token in prompt_ids:
            if not 0 <= token < self.tokenizer.size:
                raise HaloError(
                    f"Token id {token} is outside the vocabulary of {self.tokenizer.size}.",
                    hint="encode the prompt with this model's tokenizer.",
                )

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        index: int = 0,
        strip_leading: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[Step]:
        """Decode step by step; the last step has a finish_reason, unless `cancelled` came true first.

        `index` numbers the choice (it varies the seed). `strip_leading` drops white space before the first
        word, for a template that leaves it to the model.
        """
        params.validate()
        self.check_prompt(prompt_ids)
        noise = None if is_greedy(params) else make_noise(params.seed, index)
        text = _TextStream(self.tokenizer, params.stop, strip_leading)
        position = len(prompt_ids)  # of the next token
        end = self.context if params.max_tokens is None else min(self.context, position + params.max_tokens)
        drafter: Drafter | None = None
        tokens = self._prefill(prompt_ids, params, noise, cancelled)
        while tokens:
            for token in tokens:
                if cancelled():
                    return
                position += 1
                step = self._step(token, text, last=position == end)
                yield step
                if step.finish_reason is not None:
                    return
            if drafter is None and self.speculation.limit:  # not before the first token is out
                drafter = self._learned[noise is None].drafter(prompt_ids)
            drafts = drafter.next(tokens, end - position - 1) if drafter else []
            tokens = self._verify([tokens[-1], *drafts], position - 1, params, noise)

    def complete(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, strip_leading: bool = False
    ) -> Completion:
        """Run `generate` to its end."""
        ids: list[int] = []
        pieces: list[str] = []
        reason = "length"
        for step in self.generate(prompt_ids, params, strip_leading=strip_leading):
            pieces.append(step.text)
            ids.append(step.token_id)
            reason = step.finish_reason or reason
        return Completion(ids, "".join(pieces), reason)

    def _step(self, token: int, text: _TextStream, *, last: bool) -> Step:
        if token in self._stop_ids:
            return Step(token, text.finish(), "stop", is_end=True)
        piece = text.feed(token)
        if not text.stopped and last:
            piece += text.finish()
            return Step(token, piece, "stop" if text.stopped else "length")
        return Step(token, piece, "stop" if text.stopped else None)

    def _prefill(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        noise: Noise | None,
        cancelled: Callable[[], bool],
    ) -> list[int]:
        """The token after the prompt, or none where cancelled. What the slot holds is not run again."""
        start = min(_common_prefix(self._cached, prompt_ids), len(prompt_ids) - 1)
        tokens: list[int] = []
        while start < len(prompt_ids):
            if cancelled():
                return []
            chunk = prompt_ids[start : start + PREFILL_CHUNK]
            is_last = start + len(chunk) == len(prompt_ids)
            tokens = list(self._run(chunk, start, int(is_last), params, noise))
            start += len(chunk)
        return tokens

    def _verify(
        self, tokens: Sequence[int], start: int, params: SamplingParams, noise: Noise | None
    ) -> list[int]:
        """One step: the tokens after tokens[0] as the model has them, up to the first that is no draft.

        The slot then holds keys of wrong drafts too; the next run begins before them and writes over them.
        """
        began = time.perf_counter()
        choices = self._run(tokens, start, len(tokens), params, noise)
        self._learned[noise is None].costs.record(len(tokens) - 1, time.perf_counter() - began)
        kept = accept(tokens[1:], choices)
        self.tally.count(len(tokens) - 1, len(kept) - 1)
        return kept

    def _run(
        self, tokens: Sequence[int], start: int, wanted: int, params: SamplingParams, noise: Noise | None
    ) -> Iterator[int]:
        """Run tokens at positions start..; the choices after each of the last `wanted`."""
        n = len(tokens)
        del self._cached[start:]  # whatever happens now, what stood there is gone
        entries = (list(tokens), [0] * n, range(start, start + n), [False] * (n - wanted) + [True] * wanted)
        if noise is None:
            ids = self._session.run_argmax(*entries)
            self._cached.extend(tokens)
            return iter(ids)
        first = start + n - wanted + 1
        narrowed = is_narrowed(params)
        if narrowed and self._unsettled > 0.5:
            self._unsettled *= 0.99  # so that what is near is tried again after some tokens
            logits = self._session.run(*entries)
            self._cached.extend(tokens)
            return (sample(row, params, noise, first + i) for i, row in enumerate(logits))
        rows = np.empty((wanted, self.tokenizer.size), np.float32)
        for i in range(wanted):
            rows[i] = scaled_noise(noise, first + i, self.tokenizer.size, params.temperature)
        drawn = self._session.run_draw(*entries, rows, depth_of(params), NEAR if narrowed else 0)
        self._cached.extend(tokens)
        return (
            self._narrow(one, i, first + i, params, noise) if narrowed else one.token
            for i, one in enumerate(drawn)
        )

    def _narrow(self, one: Drawn, index: int, position: int, params: SamplingParams, noise: Noise) -> int:
        """The token that top-k and top-p leave: that of all if it is surely left, else from all logits."""
        ids, logits = one.ids, one.logits
        sure = ids is not None and logits is not None and settled(one.token, ids, logits, params)
        self._unsettled += 0.2 * ((not sure) - self._unsettled)
        return one.token if sure else sample(self._session.logits_again(index), params, noise, position)


class _TextStream:
    """Tokens to text that may be shown: whole characters, no stop string, no beginning of one."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str], strip_leading: bool) -> None:
        self._decoder = tokenizer.decode_stream()
        self._stop = tuple(stop)
        self._strip = strip_leading
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        return self._release(self._decoder.feed(token), at_end=False)

    def finish(self) -> str:
        return self._release(self._decoder.finish(), at_end=True)

    def _release(self, text: str, *, at_end: bool) -> str:
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            keep = min(found)
        else:
            keep = len(self._held) - (0 if at_end else _longest_tail(self._held, self._stop))
        shown, self._held = self._held[:keep], "" if found else self._held[keep:]
        return shown


def _longest_tail(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` with which some stop string begins."""
    best = 0
    for word in stop:
        for length in range(min(len(word) - 1, len(text)), best, -1):
            if text.endswith(word[:length]):
                best = length
                break
    return best


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
