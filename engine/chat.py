"""Messages to token ids through a chat template; it holds no history and knows no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakKeyDictionary

from engine import tools as calling
from engine.chat_template import ChatTemplate, Part
from engine.errors import HaloError
from engine.tokenizer import WHITESPACE, TextTokenizer
from engine.tools import CallForm, Tool, ToolCall

END_OF_TURN: Final = "<|eot_id|>"
ROLES: Final = ("system", "user", "assistant", "tool")
JINJA: Final = "jinja"  # the checkpoint's own template, which load_tokenizer gives the tokenizer
_compiled: WeakKeyDictionary[TextTokenizer, ChatTemplate] = WeakKeyDictionary()


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    An assistant's may have calls of functions; a tool's is what one gave, for the call of `tool_call_id`.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None


def render(
    messages: Sequence[Message],
    tokenizer: TextTokenizer,
    template: str = "bitnet",
    tools: Sequence[Tool] = (),
) -> list[int]:
    """Token ids of a conversation, ending where the assistant's answer begins.

    bos, then for each message `Role: content<|eot_id|>` with the content stripped, then `Assistant:`
    (source: the chat template of microsoft/bitnet-b1.58-2B-4T). Template "bitnet" has the trailing space of
    the original; "halo-demo" leaves it to the answer's first token, as that model was trained; "jinja" is the
    template that the checkpoint carries. Content is encoded as plain text, so a `<|eot_id|>` that a user
    types ends no turn, in any of them. A template that takes no tools is given them as text (`flatten`).
    """
    for message in messages:
        if message.role not in ROLES:
            raise HaloError(f"Unknown role {message.role!r}.", hint=f"known are {', '.join(ROLES)}.")
    if template == JINJA:
        return encode_parts(_parts(messages, chat_template(tokenizer), tools), tokenizer)
    messages = flatten(messages, tools)
    ids = [tokenizer.bos]
    for message in messages:
        ids += tokenizer.encode(f"{message.role.capitalize()}: {message.content.strip()}")
        ids.append(end_of_turn(tokenizer))
    return ids + tokenizer.encode("Assistant:" if answer_has_leading_space(template) else "Assistant: ")


def flatten(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """The conversation for a template that knows no tools: what they are, calls and results are text.

    The tools are told at the end of the system message; results that follow each other are one user turn.
    """
    turns: list[Message] = []
    after_result = False
    for message in messages:
        is_result = message.role == "tool"
        if message.tool_calls:
            spelled = calling.TAGGED.spell(message.tool_calls)
            message = Message("assistant", f"{message.content}\n{spelled}".strip())
        elif is_result:
            message = Message("user", calling.result(message.content))
            if after_result:
                message = Message("user", f"{turns.pop().content}\n{message.content}")
        turns.append(message)
        after_result = is_result
    if tools:
        told = calling.describe(tools)
        first = turns.pop(0).content + "\n\n" if turns and turns[0].role == "system" else ""
        turns.insert(0, Message("system", first + told))
    return turns


def call_form(tokenizer: TextTokenizer, template: str) -> CallForm:
    """How this model is made to spell calls of functions."""
    if template != JINJA or not chat_template(tokenizer).takes_tools:
        return calling.TAGGED
    return calling.form_of(tokenizer.chat_template)


def _parts(messages: Sequence[Message], template: ChatTemplate, tools: Sequence[Tool]) -> list[Part]:
    """Through a checkpoint's own template; the refusal is that of the conversation as it is.

    Some templates know one call a turn, or cannot read some schema. So what they refuse is tried with each
    call in a turn of its own, then with calls and tools as text.
    """
    functions = [tool.function() for tool in tools]
    if not template.takes_tools:
        return template.render(_turns(flatten(messages, tools)))
    try:
        return template.render(_turns(messages), tools=functions)
    except HaloError:
        if not tools and all(message.role != "tool" and not message.tool_calls for message in messages):
            raise
        with suppress(HaloError):
            return template.render(_turns(one_call_a_turn(messages)), tools=functions)
        with suppress(HaloError):
            return template.render(_turns(flatten(messages, tools)))
        raise


def one_call_a_turn(messages: Sequence[Message]) -> list[Message]:
    """The conversation with several calls of one turn taken apart, each before what it gave."""
    turns: list[Message] = []
    results = {message.tool_call_id: message for message in messages if message.role == "tool"}
    told: set[str | None] = set()
    for message in messages:
        if len(message.tool_calls) < 2:
            turns += [] if message.role == "tool" and message.tool_call_id in told else [message]
            continue
        for number, call in enumerate(message.tool_calls):
            turns.append(Message(message.role, "" if number else message.content, (call,)))
            if call.id in results and call.id not in told:
                turns.append(results[call.id])
                told.add(call.id)
    return turns


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as Jinja templates take them (transformers' form); a result has its function's name too."""
    turns: list[dict[str, Any]] = []
    names: dict[str | None, str] = {}
    for message in messages:
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.values()},
                }
                for call in message.tool_calls
            ]
            names |= {call.id: call.name for call in message.tool_calls}
        if message.role == "tool":
            turn |= {"tool_call_id": message.tool_call_id or "", "name": names.get(message.tool_call_id, "")}
        turns.append(turn)
    return turns


def chat_template(tokenizer: TextTokenizer) -> ChatTemplate:
    """The compiled template of a tokenizer; HaloError where its model has none, or no usable one."""
    compiled = _compiled.get(tokenizer)
    if compiled is None:
        if tokenizer.chat_template is None:
            raise HaloError(
                "The model's chat template is missing: there is no chat_template.jinja.",
                hint="import or pull the model again",
            )
        compiled = ChatTemplate(tokenizer.chat_template, tokenizer.special, tokenizer.names)
        _compiled[tokenizer] = compiled
    return compiled


def encode_parts(parts: Sequence[Part], tokenizer: TextTokenizer) -> list[int]:
    """Token ids of texts and special ids, each text encoded by itself, as between added tokens in HF."""
    ids: list[int] = []
    for place, part in enumerate(parts):
        if isinstance(part, int):
            ids.append(part)
            continue
        if place and tokenizer.strips.get(_id(parts[place - 1]), (False, False))[1]:
            part = part.lstrip(WHITESPACE)
        if place + 1 < len(parts) and tokenizer.strips.get(_id(parts[place + 1]), (False, False))[0]:
            part = part.rstrip(WHITESPACE)
        if part:
            ids += tokenizer.encode(part, first=not place)
    return ids


def _id(part: Part) -> int:
    return part if isinstance(part, int) else -1


def end_of_turn(tokenizer: TextTokenizer) -> int:
    """The id that ends a turn: <|eot_id|>, or the end of text where the vocabulary has none."""
    return tokenizer.special.get(END_OF_TURN, tokenizer.eos)


def stop_ids(tokenizer: TextTokenizer) -> frozenset[int]:
    """The ids at which a generation ends: end of text, end of turn, and what the model's config names."""
    return tokenizer.stops | {tokenizer.eos, end_of_turn(tokenizer)}


def answer_has_leading_space(template: str) -> bool:
    """Whether an answer in this template begins with a space that is no part of it."""
    return template == "halo-demo"
