"""Request bodies of the OpenAI endpoints as msgspec structs, and what they mean; no HTTP, no engine."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from engine.chat import Message
from engine.sampling import SamplingParams
from engine.server.errors import ApiError

MAX_CHOICES = 16  # choices of one request: prompts times n
MAX_STOPS = 16

AtLeastOne = Annotated[int, Meta(ge=1)]
Stop = Annotated[str, Meta(min_length=1, max_length=1000)]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Common(msgspec.Struct, kw_only=True):
    """Fields of both endpoints. Fields that are not named here are ignored."""

    model: str | None = None
    max_tokens: AtLeastOne | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Meta(ge=1, le=8)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    response_format: dict[str, Any] | None = None

    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int | None) -> SamplingParams:
        """The sampling parameters; OpenAI's defaults are temperature 1 and top_p 1."""
        stop = [self.stop] if isinstance(self.stop, str) else (self.stop or [])
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            seed=self.seed,
            stop=tuple(stop),
        )


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct):
    role: str
    content: str | list[ContentPart] | None = None


class ChatRequest(Common, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: AtLeastOne | None = None
    logprobs: bool | None = None
    tools: list[Any] | None = None

    def turns(self) -> list[Message]:
        """The conversation as the template takes it; raises ApiError on other roles and parts."""
        return [_turn(message, f"messages[{i}]") for i, message in enumerate(self.messages)]

    def refuse_unsupported(self) -> None:
        """Raise ApiError on a field that would change the answer and that this server cannot honour."""
        _refuse(bool(self.logprobs), "logprobs")
        _refuse(bool(self.tools), "tools")
        _refuse(_format_is_special(self.response_format), "response_format")


class CompletionRequest(Common, kw_only=True):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts: one string, several, one list of token ids, or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [p for p in self.prompt if isinstance(p, int)]
        if len(ids) == len(self.prompt):
            return [ids]
        if ids:
            raise ApiError(
                400, "prompt mixes token ids with strings or lists.", param="prompt", code="invalid_type"
            )
        return [p for p in self.prompt if not isinstance(p, int)]

    def refuse_unsupported(self) -> None:
        """Raise ApiError on a field that would change the answer and that this server cannot honour."""
        _refuse(self.logprobs is not None, "logprobs")
        _refuse(bool(self.echo), "echo")
        _refuse(bool(self.suffix), "suffix")
        _refuse(_format_is_special(self.response_format), "response_format")


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _turn(message: ChatMessage, param: str) -> Message:
    role = _ROLES.get(message.role)
    if role is None:
        raise ApiError(
            400,
            f"Unknown role {message.role!r}: known are {', '.join(_ROLES)}.",
            param=f"{param}.role",
            code="invalid_value",
        )
    if message.content is None:
        if role != "assistant":
            raise ApiError(400, "A message needs content.", param=f"{param}.content", code="invalid_value")
        return Message(role, "")
    if isinstance(message.content, str):
        return Message(role, message.content)
    for part in message.content:
        if part.type not in ("text", "input_text") or part.text is None:
            raise ApiError(
                400,
                f"Content of type {part.type!r} is not supported: this model reads text.",
                param=f"{param}.content",
                code="invalid_value",
            )
    return Message(role, "".join(part.text or "" for part in message.content))


def _refuse(asked: bool, param: str) -> None:
    if asked:
        raise ApiError(
            400, f"{param} is not supported by this server.", param=param, code="unsupported_parameter"
        )


def _format_is_special(value: dict[str, Any] | None) -> bool:
    return value is not None and value.get("type", "text") != "text"
