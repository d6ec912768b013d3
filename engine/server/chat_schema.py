"""The body of POST /v1/chat/completions as a struct, and what its messages and tools are; no HTTP."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from engine.chat import Message
from engine.server.errors import ApiError
from engine.server.schema import (
    AtLeastOne,
    Common,
    FunctionSpec,
    Top,
    answer_schema,
    check_tools,
    chosen,
)
from engine.tools import Tool, ToolCall, ToolChoice

_ROLES: Final = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
TEXT_PARTS: Final = ("text", "input_text", "output_text", "refusal")


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str | dict[str, Any] = "{}"  # some clients send the object


class CallOfAssistant(msgspec.Struct):
    function: CalledFunction
    id: str | None = None  # some clients lose it
    type: str = "function"


class ChatMessage(msgspec.Struct):
    role: str
    content: str | list[ContentPart] | None = None
    tool_calls: list[CallOfAssistant] | None = None
    tool_call_id: str | None = None


class ToolSpec(msgspec.Struct):
    type: str
    function: FunctionSpec | None = None


class NamedFunction(msgspec.Struct):
    name: str


class AllowedTool(msgspec.Struct):
    function: NamedFunction
    type: str = "function"


class AllowedTools(msgspec.Struct):
    mode: str
    tools: list[AllowedTool]


class NamedChoice(msgspec.Struct):
    type: str
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


Messages = Annotated[list[ChatMessage], Meta(min_length=1)]


def turns_of(messages: list[ChatMessage]) -> list[Message]:
    """The conversation as the template takes it; raises ApiError on other roles and parts."""
    return [_turn(message, f"messages[{i}]") for i, message in enumerate(messages)]


def tools_of(specs: list[ToolSpec] | None) -> list[Tool]:
    """The functions that the model may call; raises ApiError on tools of other kinds."""
    tools = [_tool(spec, f"tools[{i}]") for i, spec in enumerate(specs or ())]
    check_tools(tools)
    return tools


class ChatRequest(Common, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Messages
    tools: list[ToolSpec] | None = None
    max_tokens: AtLeastOne | None = None
    max_completion_tokens: AtLeastOne | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    tool_choice: str | NamedChoice | None = None
    parallel_tool_calls: bool | None = None

    def limit(self) -> int | None:
        """The most tokens of an answer; None is what the context leaves."""
        return self.max_completion_tokens or self.max_tokens

    def wanted_logprobs(self) -> int | None:
        """How many alternatives a token comes with; None where no log probabilities are asked for."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(
                400, "top_logprobs needs logprobs to be true.", param="top_logprobs", code="invalid_value"
            )
        return self.top_logprobs or 0 if self.logprobs else None

    def choice(self, tools: list[Tool]) -> ToolChoice:
        """What tool_choice means for these tools."""
        asked = self.tool_choice
        if asked is None or isinstance(asked, str):
            return chosen(asked or "auto", None, tools, parallel=self.parallel_tool_calls)
        if asked.type == "function" and asked.function:
            return chosen("required", [asked.function.name], tools, parallel=self.parallel_tool_calls)
        if asked.type == "allowed_tools" and asked.allowed_tools:
            names = [each.function.name for each in asked.allowed_tools.tools]
            return chosen(asked.allowed_tools.mode, names, tools, parallel=self.parallel_tool_calls)
        raise ApiError(
            400,
            f"A tool_choice of type {asked.type[:40]!r} is not known, or lacks what it names.",
            param="tool_choice",
            code="invalid_value",
        )

    def schema(self) -> dict[str, Any] | None:
        """The schema that the answer obeys."""
        return answer_schema(self.response_format, "response_format")


def text_of(content: str | list[ContentPart] | None, param: str) -> str:
    """The text of a message; raises ApiError on a part that is none."""
    if content is None or isinstance(content, str):
        return content or ""
    pieces = []
    for part in content:
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in TEXT_PARTS or text is None:
            raise ApiError(
                400,
                f"Content of type {part.type[:40]!r} is not supported: this model reads text.",
                param=param,
                code="invalid_value",
            )
        pieces.append(text)
    return "".join(pieces)


def _turn(message: ChatMessage, param: str) -> Message:
    role = _ROLES.get(message.role)
    if role is None:
        raise ApiError(
            400,
            f"Unknown role {message.role[:40]!r}: known are {', '.join(_ROLES)}.",
            param=f"{param}.role",
            code="invalid_value",
        )
    if message.content is None and role != "assistant":
        raise ApiError(400, "A message needs content.", param=f"{param}.content", code="invalid_value")
    if message.tool_calls and role != "assistant":
        raise ApiError(
            400, "Only an assistant calls tools.", param=f"{param}.tool_calls", code="invalid_value"
        )
    calls = tuple(_call(call) for call in message.tool_calls or ())
    text = text_of(message.content, f"{param}.content")
    return Message(role, text, calls, message.tool_call_id if role == "tool" else None)


def _call(call: CallOfAssistant) -> ToolCall:
    arguments = call.function.arguments
    if not isinstance(arguments, str):
        arguments = msgspec.json.encode(arguments).decode()
    return ToolCall(call.id or "", call.function.name, arguments)


def _tool(spec: ToolSpec, param: str) -> Tool:
    if spec.type != "function":
        raise ApiError(
            400,
            f"A tool of type {spec.type[:40]!r} is not supported: functions are.",
            param=f"{param}.type",
            code="unsupported_parameter",
        )
    if spec.function is None:
        raise ApiError(
            400, "A tool needs its function.", param=f"{param}.function", code="missing_required_parameter"
        )
    return spec.function.tool(f"{param}.function.parameters")
