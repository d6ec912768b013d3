"""Messages to token ids through a chat template; it holds no history and knows no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from engine.errors import HaloError
from engine.tokenizer import Tokenizer

END_OF_TURN: Final = "<|eot_id|>"
ROLES: Final = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


def render(messages: Sequence[Message], tokenizer: Tokenizer, template: str = "bitnet") -> list[int]:
    """Token ids of a conversation, ending where the assistant's answer begins.

    bos, then for each message `Role: content<|eot_id|>` with the content stripped, then `Assistant:`
    (source: the chat template of microsoft/bitnet-b1.58-2B-4T). Template "bitnet" has the trailing space of
    the original; "halo-demo" leaves it to the answer's first token, as that model was trained. Content is
    encoded as plain text, so a `<|eot_id|>` that a user types never ends a turn.
    """
    ids = [tokenizer.bos]
    for message in messages:
        if message.role not in ROLES:
            raise HaloError(f"Unknown role {message.role!r}.", hint=f"known are {', '.join(ROLES)}.")
        ids += tokenizer.encode(f"{message.role.capitalize()}: {message.content.strip()}")
        ids.append(end_of_turn(tokenizer))
    return ids + tokenizer.encode("Assistant:" if answer_has_leading_space(template) else "Assistant: ")


def end_of_turn(tokenizer: Tokenizer) -> int:
    """The id that ends a turn: <|eot_id|>, or the end of text where the vocabulary has none."""
    return tokenizer.special.get(END_OF_TURN, tokenizer.eos)


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids at which a generation ends: end of text and end of turn."""
    return frozenset((tokenizer.eos, end_of_turn(tokenizer)))


def answer_has_leading_space(template: str) -> bool:
    """Whether an answer in this template begins with a space that is no part of it."""
    return template == "halo-demo"
