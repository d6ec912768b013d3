"""The shapes of what the endpoints answer, for the OpenAPI document; answers are made elsewhere, as dicts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=0)]


class ErrorDetail(Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Struct):
    """OpenAI's form."""

    error: ErrorDetail


class AnthropicErrorDetail(Struct):
    type: str
    message: str


class AnthropicError(Struct):
    """Anthropic's form."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str | None


class Health(Struct):
    status: Literal["ok", "error"]
    loading: bool
    model_mapped: bool
    generation: str
    backend: str | None
    model: str
    version: str
    context: Count
    running: Count
    waiting: Count


class Model(Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: Count


class Models(Struct):
    object: Literal["list"]
    data: list[Model]


class AnthropicModel(Struct):
    """A model for a client that sends the header anthropic-version."""

    id: str
    type: Literal["model"]
    display_name: str
    created_at: str


class AnthropicModels(Struct):
    data: list[AnthropicModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Usage(Struct):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count


class FunctionCall(Struct):
    name: str
    arguments: str


class MadeCall(Struct):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(Struct):
    role: Literal["assistant"]
    content: str | None
    tool_calls: list[MadeCall] | None = None


class ChatChoice(Struct):
    index: Count
    message: AssistantMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(Struct):
    index: Count
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class Completion(Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ResponseObject(Struct):
    """A response of /v1/responses; its items are as OpenAI's."""

    id: str
    object: Literal["response"]
    model: str
    status: str
    output: list[dict[str, Any]]


class MessageUsage(Struct):
    input_tokens: Count
    output_tokens: Count
    cache_creation_input_tokens: Count
    cache_read_input_tokens: Count


class AnswerText(Struct, tag_field="type", tag="text"):
    text: str


class AnswerToolUse(Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class AnthropicMessage(Struct):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerText | AnswerToolUse]
    stop_reason: Literal[
        "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
    ]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(Struct):
    input_tokens: Count


class Tokenized(Struct):
    tokens: list[int]
    count: Count
    max_model_len: Count


class Detokenized(Struct):
    prompt: str
    content: str


class AppliedTemplate(Struct):
    prompt: str


class TokenizerInfo(Struct):
    vocab_size: Count
    bos_token: str
    bos_token_id: int
    eos_token: str
    eos_token_id: int
    chat_template: str | None


class LemonadeHealth(Struct):
    status: Literal["ok", "error"]
    version: str
    model_loaded: str
    all_models_loaded: list[dict[str, Any]]
    max_models: dict[str, int]


class LemonadeModel(Model):
    checkpoint: str
    recipe: str
    size: float
    downloaded: bool
    labels: list[str]


class LemonadeModels(Struct):
    object: Literal["list"]
    data: list[LemonadeModel]


class LemonadeStats(Struct):
    time_to_first_token: float | None
    tokens_per_second: float | None
    input_tokens: Count
    output_tokens: Count
    prompt_tokens: Count
    cache_tokens: Count
    request_count_total: Count


class LemonadeSystem(Struct):
    devices: dict[str, Any]
    recipes: dict[str, Any]
    model_storage: dict[str, Any]


class Perplexity(Struct):
    mean_nll: float
    perplexity: float | None
    tokens: Annotated[int, Meta(ge=1)]
    elapsed_ms: float
    window: Count
    stride: Count
    windows: Count


class NpuStatus(Struct):
    backend: str | None
    ready: bool
    reason: str
    routes: dict[str, Any]
    error: str | None
    advisories: list[str]
