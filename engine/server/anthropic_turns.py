"""A Messages request as the turns that the chat template takes, and as token ids; it answers nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from engine.chat import JINJA, Message, answer_has_leading_space, render
from engine.errors import HaloError
from engine.server.anthropic_schema import (
    CountRequest,
    InputMessage,
    RedactedThinkingBlock,
    ThinkingBlock,
    plain_text,
    system_text,
)
from engine.server.errors import ApiError
from engine.server.service import Service, encode


def turns_of(request: CountRequest, template: str) -> list[Message]:
    """The conversation; raises ApiError on blocks that this model cannot read.

    Turns of one role that follow each other are one turn, as Anthropic says. A system turn inside the
    conversation stays where it is, or is the user's where the checkpoint's own template would refuse it.
    """
    turns: list[Message] = []
    if system := system_text(request):
        turns.append(Message("system", system))
    for i, message in enumerate(request.messages):
        role = message.role
        if role == "system" and template == JINJA and any(turn.role != "system" for turn in turns):
            role = "user"
        _append(turns, Message(role, _text(message, f"messages[{i}]")))
    return turns


def _append(turns: list[Message], turn: Message) -> None:
    if turns and turns[-1].role == turn.role:
        joined = "\n\n".join(text for text in (turns[-1].content, turn.content) if text)
        turns[-1] = Message(turn.role, joined)
    else:
        turns.append(turn)


def _text(message: InputMessage, param: str) -> str:
    if isinstance(message.content, str):
        return message.content
    kept = [b for b in message.content if not isinstance(b, ThinkingBlock | RedactedThinkingBlock)]
    return plain_text(kept, f"{param}.content")


def split_prefill(turns: Sequence[Message]) -> tuple[list[Message], str]:
    """The turns before the answer, and the answer's beginning: a last turn of the assistant is one."""
    if not turns or turns[-1].role != "assistant":
        return list(turns), ""
    text = turns[-1].content
    if text != text.rstrip():
        raise ApiError(
            400,
            "The last assistant turn, which the answer continues, must not end with white space.",
            param="messages",
            code="invalid_value",
        )
    return list(turns[:-1]), text


def render_turns(service: Service, turns: Sequence[Message]) -> list[int]:
    """Token ids up to where the answer goes on. Raises ApiError and HaloError."""
    engine = service.engine
    before, begun = split_prefill(turns)
    ids = render(before, engine.tokenizer, engine.card.chat_template)
    if begun:
        space = " " if answer_has_leading_space(engine.card.chat_template) else ""
        ids += engine.tokenizer.encode(space + begun, first=False)
    return ids


async def prompt_ids(service: Service, turns: Sequence[Message]) -> list[int]:
    """Token ids that fit the context; raises ApiError where they do not."""
    text = "".join(turn.content for turn in turns)
    return await encode(service, text, lambda: render_turns(service, turns), "messages")


async def count(service: Service, turns: Sequence[Message]) -> int:
    """How many tokens the prompt has, also where that is more than the context holds."""
    try:
        return len(await asyncio.to_thread(render_turns, service, turns))
    except HaloError as error:
        raise ApiError(400, error.message, param="messages", code="invalid_value") from error
