"""The body of POST /v1/responses as a struct, and the conversation that its items are; no HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from engine.chat import Message
from engine.server.chat_schema import ContentPart, text_of
from engine.server.errors import ApiError
from engine.server.schema import FunctionSpec, Sampling, Top, answer_schema, check_tools, chosen
from engine.tools import Tool, ToolCall, ToolChoice

LOGPROBS: Final = "message.output_text.logprobs"
_ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_KINDS: Final = ("message", "function_call", "function_call_output", "reasoning")


class Item(msgspec.Struct, kw_only=True):
    """An item of the input: a message, a call, or what a call gave."""

    type: str = "message"
    role: str | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class ToolItem(FunctionSpec, kw_only=True):
    """A tool: here its parts are not in an object of their own."""

    type: str
    name: str = ""  # another kind of tool may have none


class NamedChoice(msgspec.Struct, kw_only=True):
    type: str
    name: str | None = None
    mode: str = "auto"
    tools: list[dict[str, Any]] = []


class TextOptions(msgspec.Struct):
    format: dict[str, Any] | None = None


class ResponsesRequest(Sampling, kw_only=True):
    """POST /v1/responses."""

    input: str | Annotated[list[Item], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    tools: list[ToolItem] | None = None
    tool_choice: str | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    top_logprobs: Top | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def turns(self) -> list[Message]:
        """The conversation; raises ApiError on items that are none of it."""
        head = [Message("system", self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*head, Message("user", self.input)]
        return [*head, *_turns(self.input)]

    def all_tools(self) -> list[Tool]:
        """The functions; raises ApiError on a tool of another kind."""
        tools = []
        for i, spec in enumerate(self.tools or ()):
            if spec.type != "function":
                raise ApiError(
                    400,
                    f"A tool of type {spec.type[:40]!r} is not supported: functions are.",
                    param=f"tools[{i}].type",
                    code="unsupported_parameter",
                )
            if not spec.name:
                raise _wrong("A function needs a name.", f"tools[{i}].name")
            tools.append(spec.tool(f"tools[{i}].parameters"))
        check_tools(tools)
        return tools

    def choice(self, tools: list[Tool]) -> ToolChoice:
        """What tool_choice means for these tools."""
        asked, parallel = self.tool_choice, self.parallel_tool_calls
        if asked is None or isinstance(asked, str):
            return chosen(asked or "auto", None, tools, parallel=parallel)
        if asked.type == "function" and asked.name:
            return chosen("required", [asked.name], tools, parallel=parallel)
        if asked.type == "allowed_tools":
            return chosen(
                asked.mode, [str(each.get("name")) for each in asked.tools], tools, parallel=parallel
            )
        raise _wrong(f"A tool_choice of type {asked.type[:40]!r} is not known.", "tool_choice")

    def format(self) -> dict[str, Any]:
        """text.format; text where there is none."""
        return (self.text.format if self.text else None) or {"type": "text"}

    def schema(self) -> dict[str, Any] | None:
        """The schema that the answer obeys."""
        return answer_schema(self.format(), "text.format")

    def wanted_logprobs(self) -> int | None:
        """How many alternatives a token comes with; None where no log probabilities are asked for."""
        asked = LOGPROBS in (self.include or ())
        return self.top_logprobs or 0 if asked or self.top_logprobs else None


def _turns(items: Sequence[Item]) -> list[Message]:
    turns: list[Message] = []
    for i, item in enumerate(items):
        param = f"input[{i}]"
        if item.type not in _KINDS:
            raise ApiError(
                400,
                f"An item of type {item.type[:40]!r} is not supported: messages, function calls and their "
                "outputs are.",
                param=f"{param}.type",
                code="unsupported_parameter",
            )
        if item.type == "message":
            turns.append(_message(item, param))
        elif item.type == "function_call":
            call = _call(item, param)
            last = turns.pop() if turns and turns[-1].role == "assistant" else Message("assistant", "")
            turns.append(Message("assistant", last.content, (*last.tool_calls, call)))
        elif item.type == "function_call_output":
            if item.output is None:
                raise _wrong("A function's output needs output.", f"{param}.output")
            turns.append(Message("tool", text_of(item.output, f"{param}.output"), (), item.call_id or ""))
    if not turns:
        raise _wrong("The input has no message.", "input")
    return turns


def _message(item: Item, param: str) -> Message:
    role = _ROLES.get(item.role or "")
    if role is None:
        raise _wrong(
            f"Unknown role {(item.role or '')[:40]!r}: known are {', '.join(_ROLES)}.", f"{param}.role"
        )
    if item.content is None:
        raise _wrong("A message needs content.", f"{param}.content")
    return Message(role, text_of(item.content, f"{param}.content"))


def _call(item: Item, param: str) -> ToolCall:
    if not item.name or item.arguments is None:
        raise _wrong("A function call needs name and arguments.", param)
    return ToolCall(item.call_id or "", item.name, item.arguments)


def _wrong(why: str, param: str) -> ApiError:
    return ApiError(400, why, param=param, code="invalid_value")
