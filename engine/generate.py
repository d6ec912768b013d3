"""A model opened with its tokenizer, and one prompt to a stream of steps; what runs it is the scheduler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engine.chat import stop_ids
from engine.choosing import AGAIN
from engine.choosing import TokenSession as TokenSession
from engine.errors import HaloError
from engine.locate import ModelCard, read_card
from engine.request import Request, Work
from engine.sampling import SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import Prompt as Prompt
from engine.sequence import Step as Step
from engine.sequence import TokenLogprob as TokenLogprob
from engine.speculate import OFF, Speculation, Tally, default_speculation
from engine.tokenizer import TextTokenizer, load_tokenizer

if TYPE_CHECKING:
    from engine.backend import NativeModel


GPU_ENTRIES: Final = 512  # of a prompt in a step: a GPU's prefill is the faster the more it has at once


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


@dataclass(frozen=True)
class Completion:
    """A whole continuation, collected; `token_ids` is all that was decoded, an end token included."""

    token_ids: list[int]
    text: str
    finish_reason: str


class Engine:
    """A model, its tokenizer and the scheduler over its KV slots. `generate` is for one thread at a time."""

    def __init__(
        self,
        session: TokenSession,
        tokenizer: TextTokenizer,
        card: ModelCard,
        facts: dict[str, Any] | None = None,
        speculation: Speculation = OFF,
        slots: int = 1,
    ) -> None:
        self.tokenizer = tokenizer
        self.card = card
        self.facts = facts or {}
        self.context = card.context
        self._closers: list[Callable[[], None]] = [session.close]
        self.scheduler = Scheduler(session, tokenizer, stop_ids(tokenizer), card.context, slots, speculation)

    @classmethod
    def open(
        cls,
        model_dir: Path,
        library: Path | None = None,
        *,
        context: int | None = None,
        threads: int | None = None,
        speculation: Speculation | None = None,
        slots: int | None = 1,
        model: NativeModel | None = None,
    ) -> Engine:
        """Open a model directory (model.halo, tokenizer.htok, model.json) on the native backend.

        `speculation` defaults to what HALO_SPECULATE says; it changes the speed and never a token. `slots`:
        sequences that can run at once; None for as many as the memory has room for (engine/capacity.py).
        `model`: its model.halo where that is open already; the engine closes it.
        """
        from engine.backend import NativeModel
        from engine.capacity import default_slots
        from engine.formats.seal import check_open

        speculation = default_speculation() if speculation is None else speculation
        check_open(model_dir)
        card = read_card(model_dir)
        tokenizer = load_tokenizer(model_dir)
        model = model or NativeModel.open(model_dir / "model.halo", library)
        try:
            if model.config.vocab_size != tokenizer.size:
                raise HaloError(
                    f"The model in {model_dir} has {model.config.vocab_size} tokens and its tokenizer "
                    f"{tokenizer.size}.",
                    hint="they are of different models: run `halo install` again.",
                )
            length = min(context or card.context, card.context, model.config.max_seq_len)
            slots = slots or default_slots(model.config, length)
            session = model.session(slots=slots, context=length, threads=threads)
        except BaseException:
            model.close()
            raise
        facts = {**model.facts, **session.facts}
        card = ModelCard(card.name, card.chat_template, length)
        engine = cls(session, tokenizer, card, facts, speculation, slots)
        engine.scheduler.pace.most = AGAIN if facts["backend"] == "cpu" else GPU_ENTRIES
        engine._closers.append(model.close)
        return engine

    @property
    def tally(self) -> Tally:
        """What speculation did so far."""
        return self.scheduler.tally

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
        word, for a template that leaves it to the model. Not for use while a server runs the scheduler.
        """
        params.validate()
        self.check_prompt(prompt_ids)
        request = Request([Work(prompt_ids, params, seed_index=index, strip_leading=strip_leading)])
        self.scheduler.submit(request)
        try:
            while not cancelled():
                if not request.events:
                    self.scheduler.step()
                    continue
                event = request.events.popleft()
                if event is None:
                    return
                if isinstance(event, Exception):
                    raise event
                if isinstance(event[1], Step):
                    yield event[1]
        finally:
            if not request.ended:  # cancelled, or nobody asks for the rest
                request.cancel()

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
