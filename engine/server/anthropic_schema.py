"""Request bodies of Anthropic's Messages API as msgspec structs, and what they mean; no HTTP, no engine.

A field that is not named here is ignored, whatever it holds: Claude Code sends new ones with every version,
and a server that forbids them answers no turn of it. What would change the answer is named, and refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from engine.sampling import SamplingParams
from engine.server.errors import ApiError

AtLeastOne = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
StopSequence = Annotated[str, Meta(min_length=1, max_length=1000)]
Schema = dict[str, Any]

MAX_STOPS: Final = 64
REFUSED: Final = {
    "mcp_servers": "This server connects to no MCP server",
    "container": "This server runs no code",
    "thread": "This server keeps no conversation: send all of it",
    "compaction": "This server summarizes no conversation",
}
BILLING: Final = "x-anthropic-billing-header:"


class Block(msgspec.Struct, tag_field="type", kw_only=True):
    """A content block. `cache_control`, `citations` and what else a block may have is ignored."""


class TextBlock(Block, tag="text"):
    text: str


class PlainText(msgspec.Struct, kw_only=True):
    """A text block where nothing else may be."""

    text: str
    type: Literal["text"] = "text"


class ThinkingBlock(Block, tag="thinking"):
    """An earlier answer's thoughts: the template has no place for them, so they are left out."""

    thinking: str = ""


class RedactedThinkingBlock(Block, tag="redacted_thinking"):
    data: str = ""


class ToolUseBlock(Block, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class ImageBlock(Block, tag="image"):
    source: Any = None


class DocumentBlock(Block, tag="document"):
    source: Any = None


class SearchResultBlock(Block, tag="search_result"):
    title: str = ""
    source: str = ""
    content: list[PlainText] = []


class ToolResultBlock(Block, tag="tool_result"):
    tool_use_id: str
    content: str | list[TextBlock | ImageBlock | DocumentBlock | SearchResultBlock] | None = None
    is_error: bool | None = None


Content = (
    TextBlock
    | ThinkingBlock
    | RedactedThinkingBlock
    | ToolUseBlock
    | ToolResultBlock
    | ImageBlock
    | DocumentBlock
    | SearchResultBlock
)


class InputMessage(msgspec.Struct):
    """A turn. Claude Code puts turns of role `system` between the others since 2.1.154."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Content]


class Tool(msgspec.Struct):
    """A tool that the client runs. `type` names the others, which Anthropic defines or runs itself."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    input_schema: Schema | None = None
    description: str | None = None
    type: str | None = None
    strict: bool | None = None


class Choice(msgspec.Struct, tag_field="type", kw_only=True):
    disable_parallel_tool_use: bool | None = None


class ChoiceAuto(Choice, tag="auto"):
    pass


class ChoiceAny(Choice, tag="any"):
    pass


class ChoiceNone(Choice, tag="none"):
    pass


class ChoiceTool(Choice, tag="tool"):
    name: str


class OutputFormat(msgspec.Struct):
    """A schema that the answer's text follows."""

    type: Literal["json_schema"]
    schema: Schema


class OutputConfig(msgspec.Struct):
    """`effort` is ignored: this model has one."""

    format: OutputFormat | None = None


class CountRequest(msgspec.Struct, kw_only=True):
    """POST /v1/messages/count_tokens, and what it shares with POST /v1/messages."""

    model: str
    messages: Annotated[list[InputMessage], Meta(min_length=1)]
    system: str | list[PlainText] | None = None
    tools: list[Tool] | None = None
    tool_choice: ChoiceAuto | ChoiceAny | ChoiceNone | ChoiceTool | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    mcp_servers: Any = None
    container: Any = None
    thread: Any = None

    def refuse_unsupported(self) -> None:
        """Raise ApiError on what would change the answer and cannot be honoured here."""
        for name, why in REFUSED.items():
            if getattr(self, name, None) not in (None, []):
                raise _unsupported(name, why)
        for i, tool in enumerate(self.tools or []):
            if tool.type not in (None, "custom"):
                raise _unsupported(
                    f"tools[{i}].type", f"The tool {tool.type!r} is one that only Anthropic's models know"
                )
            if tool.input_schema is None:
                raise ApiError(
                    400,
                    "A tool needs an input_schema.",
                    param=f"tools[{i}].input_schema",
                    code="invalid_value",
                )

    def answer_schema(self) -> Schema | None:
        """The schema that the answer's text must follow, or None."""
        asked = (self.output_config and self.output_config.format) or self.output_format
        return asked.schema if asked else None


class MessagesRequest(CountRequest, kw_only=True):
    """POST /v1/messages."""

    max_tokens: AtLeastOne
    temperature: Share | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    stop_sequences: Annotated[list[StopSequence], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    compaction: Any = None

    def sampling(self) -> SamplingParams:
        """The sampling parameters; Anthropic's default temperature is 1, and top_p 0 is greedy."""
        top_p = 1.0 if self.top_p is None else self.top_p
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=top_p or 1.0,
            top_k=1 if top_p == 0.0 else self.top_k or 0,
            stop=tuple(self.stop_sequences or ()),
        )


def system_text(request: CountRequest) -> str:
    """The system prompt, without the line in which Claude Code counts its requests.

    That line has a hash that differs in every request, and stands first: no turn would find the one before
    in the KV cache.
    """
    blocks = [request.system] if isinstance(request.system, str) else [b.text for b in request.system or []]
    kept = (without_billing(text) for text in blocks)
    return "\n\n".join(text for text in kept if text)


def without_billing(text: str) -> str:
    """`text` without a first line that is Claude Code's billing header."""
    return text.partition("\n")[2].lstrip("\n") if text.startswith(BILLING) else text


def plain_text(content: str | list[Any] | None, param: str) -> str:
    """The text of blocks that must all be text; raises ApiError naming the first that is not."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(_text_of(block, f"{param}[{i}]") for i, block in enumerate(content))


def _text_of(block: Block, param: str) -> str:
    if isinstance(block, TextBlock):
        return block.text
    if isinstance(block, SearchResultBlock):
        return "\n".join([f"{block.title} ({block.source})", *(part.text for part in block.content)])
    kind = block.__struct_config__.tag
    raise _unsupported(param, f"A block of type {kind!r} cannot be read: this model reads text")


def _unsupported(param: str, sentence: str) -> ApiError:
    return ApiError(400, f"{sentence}.", param=param, code="unsupported_parameter")
