"""A dialogue with its history, and the terminal loop around it; one answer at a time, no server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Final

from engine.chat import Message, answer_has_leading_space, render
from engine.errors import HaloError
from engine.generate import ContextOverflow, Engine, Step
from engine.sampling import SamplingParams

EXIT_INTERRUPTED: Final = 130
HELP: Final = "/reset forgets the dialogue, /exit ends it; Ctrl-C stops an answer."


class Dialogue:
    """Turns so far and how to answer the next. The engine's slot keeps what the turns have in common."""

    def __init__(self, engine: Engine, params: SamplingParams, system: str | None = None) -> None:
        self._engine = engine
        self._params = params
        self._system = [Message("system", system)] if system else []
        self.turns: list[Message] = []
        # Room that an answer gets before older turns have to go.
        self._reserve = min(params.max_tokens or 64, max(1, engine.context // 4))

    def reset(self) -> None:
        """Forget all turns."""
        self.turns.clear()

    def ask(self, message: str, note: Callable[[str], None]) -> Generator[Step, None, None]:
        """Answer a message, step by step; `note` hears of turns that were dropped to make room.

        An answer that is broken off stays in the history as far as it got; a message that does not fit
        raises ContextOverflow and leaves the history as it was.
        """
        engine = self._engine
        template = engine.card.chat_template
        before = self.turns
        self.turns = [*before, Message("user", message)]
        try:
            ids = self._fit(template, note)
        except HaloError:
            self.turns = before
            raise
        pieces: list[str] = []
        steps = engine.generate(ids, self._params, strip_leading=answer_has_leading_space(template))
        try:
            for step in steps:
                pieces.append(step.text)
                yield step
        finally:
            self.turns.append(Message("assistant", "".join(pieces)))

    def _fit(self, template: str, note: Callable[[str], None]) -> list[int]:
        """Token ids of the dialogue, with its oldest turns dropped until an answer has room."""
        dropped = 0
        while True:
            ids = render([*self._system, *self.turns], self._engine.tokenizer, template)
            if len(ids) + self._reserve <= self._engine.context:
                break
            if len(self.turns) < 3:
                if len(ids) < self._engine.context:
                    break
                raise ContextOverflow(len(ids), self._engine.context)
            self.turns = self.turns[2:]  # a question and its answer
            dropped += 1
        if dropped:
            turns = "turn was" if dropped == 1 else f"{dropped} turns were"
            note(f"(the oldest {turns} dropped: the context of {self._engine.context} tokens is full)")
        return ids


def converse(dialogue: Dialogue, write: Callable[[str], None]) -> int:
    """Read messages from the terminal and answer them until /exit or end of input (0), or Ctrl-C (130)."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    write(HELP + "\n")
    try:
        while (message := input("> ").strip()) not in ("/exit", "/quit"):
            _obey(dialogue, message, write)
    except EOFError:
        write("\n")
    except KeyboardInterrupt:
        write("\n")
        return EXIT_INTERRUPTED
    return 0


def _obey(dialogue: Dialogue, message: str, write: Callable[[str], None]) -> None:
    if message == "/reset":
        dialogue.reset()
    elif message == "/help":
        write(HELP + "\n")
    elif message:
        _answer(dialogue, message, write)


def _answer(dialogue: Dialogue, message: str, write: Callable[[str], None]) -> None:
    steps = dialogue.ask(message, lambda text: write(text + "\n"))
    try:
        for step in steps:
            write(step.text)
    except KeyboardInterrupt:
        steps.close()
    except HaloError as error:
        write(str(error))
    write("\n")
