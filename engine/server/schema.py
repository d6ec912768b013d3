"""Fields that the OpenAI endpoints share, as msgspec structs, and what they mean; no HTTP, no engine."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from engine.sampling import SamplingParams
from engine.server.errors import ApiError
from engine.tools import MAX_DEPTH, Tool, ToolChoice, deeper_than

MAX_CHOICES: Final = 128  # choices of one request: prompts times n
MAX_STOPS: Final = 16
MAX_TOOLS: Final = 128
MAX_TOP: Final = 20

AtLeastOne = Annotated[int, Meta(ge=1)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Top = Annotated[int, Meta(ge=0, le=MAX_TOP)]
Stop = Annotated[str, Meta(min_length=1, max_length=1000)]
ToolName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:/-]{1,128}\Z")]


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Sampling(msgspec.Struct, kw_only=True):
    """Fields of every endpoint that generates. Fields that are not named are ignored."""

    model: str | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[int, Bias] | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    ignore_eos: bool | None = None

    def sampling(
        self, max_tokens: int | None, vocab: int, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """The sampling parameters; OpenAI's defaults are temperature 1 and top_p 1."""
        stop = [self.stop] if isinstance(self.stop, str) else (self.stop or [])
        bias = self.logit_bias or {}
        outside = next((token for token in bias if not 0 <= token < vocab), None)
        if outside is not None:
            raise _wrong(
                f"logit_bias names the token {outside}, and the vocabulary has {vocab}.", "logit_bias"
            )
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple(sorted(bias.items())),
            seed=self.seed,
            stop=tuple(stop),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            ignore_eos=bool(self.ignore_eos),
        )


class Common(Sampling, kw_only=True):
    """Fields of the chat and completions endpoints."""

    n: Choices | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    return_token_ids: bool | None = None

    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)


class FunctionSpec(msgspec.Struct):
    """What a function is. `parameters` is a JSON schema."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self, param: str) -> Tool:
        """The tool; raises ApiError on a schema that is too deep."""
        if deeper_than(self.parameters, MAX_DEPTH):
            raise _wrong(f"A schema nested deeper than {MAX_DEPTH}.", param)
        return Tool(self.name, self.description or "", self.parameters, bool(self.strict))


def check_tools(tools: list[Tool]) -> None:
    """Raise ApiError on too many tools, or two of one name."""
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or len(tools) > MAX_TOOLS:
        why = f"Two tools have the name {twice}." if twice else f"More than {MAX_TOOLS} tools."
        raise _wrong(why, "tools")


def chosen(mode: str, names: list[str] | None, tools: list[Tool], *, parallel: bool | None) -> ToolChoice:
    """A checked choice: `names` (all where None) are tools; required needs some."""
    known = {tool.name for tool in tools}
    stranger = next((name for name in names or () if name not in known), None)
    if stranger is not None:
        raise _wrong(f"tool_choice names {stranger!r}, which is none of tools.", "tool_choice")
    if mode not in ("auto", "none", "required"):
        raise _wrong(f"tool_choice {mode!r} is not known.", "tool_choice")
    if mode == "required" and not (tools if names is None else names):
        raise _wrong("tool_choice asks for a call, and there are no tools.", "tool_choice")
    allowed = None if names is None else tuple(names)
    return ToolChoice("none" if not tools else mode, allowed, parallel is not False)  # type: ignore[arg-type]


def answer_schema(format: dict[str, Any] | None, param: str) -> dict[str, Any] | None:
    """The schema that an answer obeys, of response_format (or text.format); None where any text will do."""
    if format is None:
        return None
    kind = format.get("type")
    if kind == "text":
        return None
    inner = format.get("json_schema", format)  # the Responses API has it flat
    if kind not in ("json_object", "json_schema"):
        raise _wrong(
            f"A format of type {str(kind)[:40]!r} is not known: text, json_object and json_schema are.",
            f"{param}.type",
        )
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if schema is None and kind == "json_object":
        return {"type": "object"}
    if not isinstance(schema, dict):
        at = f"{param}.json_schema" if "json_schema" in format else param
        raise _wrong("A json_schema format needs a schema.", f"{at}.schema")
    return schema


def _wrong(why: str, param: str) -> ApiError:
    return ApiError(400, why, param=param, code="invalid_value")
