"""A Messages request as the turns that the chat template takes, and as token ids; it answers nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from engine.chat import JINJA, Message, answer_has_leading_space, render
from engine.errors import HaloError
from engine.generate import ContextOverflow
from engine.server.anthropic_schema import (
    ChoiceAny,
    ChoiceNone,
    ChoiceTool,
    CountRequest,
    InputMessage,
    MessagesRequest,
    RedactedThinkingBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    plain_text,
    system_text,
    without_billing,
)
from engine.server.errors import ApiError
from engine.server.service import Service, encode
from engine.server.turn import Ask, Names, Prepared, prepare
from engine.tools import Tool, ToolCall, ToolChoice

NAMES: Final = Names("messages", "tools", "output_config.format")


@dataclass(frozen=True)
class Conversation:
    """What is asked: the turns before the answer, how the answer begins, and the tools that are told."""

    turns: list[Message]
    begun: str
    tools: list[Tool]
    choice: ToolChoice

    def beginning(self, service: Service) -> list[int]:
        """The tokens of how the answer begins."""
        if not self.begun:
            return []
        space = " " if answer_has_leading_space(service.engine.card.chat_template) else ""
        return service.engine.tokenizer.encode(space + self.begun, first=False)

    def render(self, service: Service) -> list[int]:
        """Token ids up to where the answer goes on. Raises HaloError where the template refuses it."""
        engine, told = service.engine, self.choice.allowed(self.tools)
        ids = render(self.turns, engine.tokenizer, engine.card.chat_template, told)
        return ids + self.beginning(service)


def conversation_of(request: CountRequest, template: str) -> Conversation:
    """The conversation; raises ApiError on blocks that this model cannot read, and on a tool that is none.

    Turns of one role that follow each other are one turn, as Anthropic says. A system turn inside the
    conversation stays where it is, or is the user's where the checkpoint's own template would refuse it.
    """
    turns: list[Message] = []
    if system := system_text(request):
        turns.append(Message("system", system))
    for i, message in enumerate(request.messages):
        role: str = message.role
        if role == "system" and template == JINJA and any(turn.role != "system" for turn in turns):
            role = "user"
        for turn in _turns(message, role, f"messages[{i}].content"):
            _append(turns, turn)
    begun = ""
    if turns and turns[-1].role == "assistant" and not turns[-1].tool_calls:
        begun = _beginning(turns.pop().content)
    choice = _choice(request)
    tools = [] if choice.mode == "none" else _tools(request)
    if choice.names and not choice.allowed(tools):
        raise ApiError(
            400, f"There is no tool {choice.names[0]!r}.", param="tool_choice.name", code="invalid_value"
        )
    if choice.mode == "required" and not tools:
        raise ApiError(
            400, "tool_choice asks for a tool, and tools has none.", param="tool_choice", code="invalid_value"
        )
    return Conversation(turns, begun, tools, choice)


def _turns(message: InputMessage, role: str, param: str) -> Iterator[Message]:
    """One message as turns: what a tool gave is a turn of its own, before or after the text around it."""
    if isinstance(message.content, str):
        text = without_billing(message.content) if role == "system" else message.content
        if text or role != "system":
            yield Message(role, text)
        return
    texts: list[str] = []
    calls: list[ToolCall] = []
    for i, block in enumerate(message.content):
        place = f"{param}[{i}]"
        if isinstance(block, ThinkingBlock | RedactedThinkingBlock):
            continue
        if isinstance(block, ToolUseBlock):
            _only_in(role, "assistant", "tool_use", place)
            calls.append(ToolCall(block.id, block.name, msgspec.json.encode(block.input).decode()))
        elif isinstance(block, ToolResultBlock):
            _only_in(role, "user", "tool_result", place)
            if texts:
                yield Message(role, "\n".join(texts))
                texts.clear()
            yield Message("tool", _result(block, place), tool_call_id=block.tool_use_id)
        else:
            texts.append(plain_text([block], place))
    if texts or calls or not message.content:
        yield Message(role, "\n".join(texts), tuple(calls))


def _result(block: ToolResultBlock, place: str) -> str:
    text = plain_text(block.content, f"{place}.content")
    return f"Error: {text}" if block.is_error else text


def _only_in(role: str, wanted: str, kind: str, param: str) -> None:
    if role != wanted:
        raise ApiError(
            400, f"A {kind} block belongs into a turn of the {wanted}.", param=param, code="invalid_value"
        )


def _append(turns: list[Message], turn: Message) -> None:
    if turns and turns[-1].role == turn.role != "tool":
        before = turns[-1]
        joined = "\n\n".join(text for text in (before.content, turn.content) if text)
        turns[-1] = Message(turn.role, joined, before.tool_calls + turn.tool_calls)
    else:
        turns.append(turn)


def _beginning(text: str) -> str:
    """The text of a last turn of the assistant's, which the answer continues."""
    if text != text.rstrip():
        raise ApiError(
            400,
            "The last assistant turn, which the answer continues, must not end with white space.",
            param="messages",
            code="invalid_value",
        )
    return text


def _choice(request: CountRequest) -> ToolChoice:
    asked = request.tool_choice
    if asked is None:
        return ToolChoice()
    parallel = not asked.disable_parallel_tool_use
    if isinstance(asked, ChoiceTool):
        return ToolChoice("required", (asked.name,), parallel)
    if isinstance(asked, ChoiceNone):
        return ToolChoice("none", None, parallel)
    return ToolChoice("required" if isinstance(asked, ChoiceAny) else "auto", None, parallel)


def _tools(request: CountRequest) -> list[Tool]:
    return [
        Tool(tool.name, tool.description or "", tool.input_schema, bool(tool.strict))
        for tool in request.tools or []
    ]


async def prepared_of(service: Service, request: MessagesRequest) -> Prepared:
    """The work of a request; raises ApiError where its prompt or a schema cannot be."""
    asked = conversation_of(request, service.engine.card.chat_template)
    schema = request.answer_schema()
    if schema is not None and asked.begun:
        raise ApiError(
            400,
            "An answer of a schema cannot continue a last turn of the assistant.",
            param="output_config.format",
            code="invalid_value",
        )
    ask = Ask(asked.turns, request.sampling(), 1, asked.tools, asked.choice, schema)
    try:
        prepared = await _fitting(service, ask, asked)
    except ApiError as error:
        if not isinstance(error.__cause__, ContextOverflow):
            raise
        # By how much it is too long decides what Claude Code leaves out: a lower bound is not enough.
        exact = ContextOverflow(await count(service, asked), service.engine.context)
        raise ApiError(400, exact.message, param=error.param, code=error.code) from exact
    return prepared


async def _fitting(service: Service, ask: Ask, asked: Conversation) -> Prepared:
    """The work, with how the answer begins; raises ApiError where it does not fit."""
    prepared = await prepare(service, ask, NAMES)
    if not asked.begun:
        return prepared
    (work,) = prepared.works
    ids = [*work.prompt_ids, *asked.beginning(service)]
    await encode(service, "", lambda: ids, "messages")  # does it still fit?
    return Prepared([replace(work, prompt_ids=ids, strip_leading=False)], len(ids), prepared.reader)


async def count(service: Service, asked: Conversation) -> int:
    """How many tokens the prompt has, also where that is more than the context holds."""
    try:
        return len(await asyncio.to_thread(asked.render, service))
    except HaloError as error:
        raise ApiError(400, error.message, param="messages", code="invalid_value") from error
