"""Every field of the OpenAI endpoints and what becomes of it; refusals by name are made from this table.

docs/api-fields.md and the OpenAPI document are made from it too. The other APIs have tables of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

import msgspec

from engine.server.errors import ApiError

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
RESPONSES: Final = "/v1/responses"
TOKENIZE: Final = "/tokenize"
DETOKENIZE: Final = "/detokenize"
APPLY_TEMPLATE: Final = "/apply-template"

Fate = Literal["honoured", "refused", "ignored"]


@dataclass(frozen=True)
class Field:
    """One field of a request's body. `harmless` are the values with which a refused one is no request."""

    name: str
    endpoint: str
    fate: Fate
    note: str
    harmless: tuple[object, ...] = (None,)


def refuse(endpoint: str, body: bytes) -> None:
    """Raise ApiError where a body asks for what this endpoint refuses; `body` is JSON of an object."""
    asked = msgspec.json.decode(body, type=_shape(endpoint))
    for field in _refused(endpoint):
        value = getattr(asked, field.name)
        if not any(value == each and type(value) is type(each) for each in field.harmless):
            raise ApiError(
                400,
                f"{field.name} is not supported by this server: {field.note}.",
                param=field.name,
                code="unsupported_parameter",
            )


@cache
def _refused(endpoint: str) -> tuple[Field, ...]:
    return tuple(field for field in FIELDS if field.endpoint == endpoint and field.fate == "refused")


@cache
def _shape(endpoint: str) -> type[msgspec.Struct]:
    names: list[Any] = [(field.name, Any, None) for field in _refused(endpoint)]
    return msgspec.defstruct("Refused", names)


def _rows(endpoints: tuple[str, ...], fate: Fate, rows: dict[str, str]) -> list[Field]:
    return [Field(name, endpoint, fate, note) for endpoint in endpoints for name, note in rows.items()]


_SAMPLING: Final = {
    "temperature": "0 to 2; 1 by default; 0 is greedy",
    "top_p": "above 0, to 1",
    "stream": "server-sent events",
    "model": "the served name; without one, the served model",
    "ignore_eos": "extension; goes on after the model's own end",
    "top_k": "extension; -1 and 0 are off",
    "min_p": "extension; 0 to 1, a share of the likeliest token's probability",
    "repetition_penalty": "extension; 0.01 to 10, over prompt and answer, as Hugging Face has it",
    "seed": "the same seed gives the same tokens, alone or in a batch",
    "stop": "a string or up to 16; found across token borders, never sent",
    "presence_penalty": "-2 to 2, over the answer",
    "frequency_penalty": "-2 to 2, over the answer",
    "logit_bias": "token id to -100..100",
}
_BOTH: Final = {
    "n": "1 to 128; choice 0 is what the seed alone gives",
    "stream_options.include_usage": "a last chunk with usage",
    "response_format": "text, json_object, json_schema; the schema is enforced as tokens are chosen",
    "return_token_ids": "extension; the ids of what was decoded",
}
_NO_EFFECT: Final = {
    "user": "nothing is kept by user",
    "metadata": "nothing is stored",
    "safety_identifier": "nothing is kept by user",
    "service_tier": "there is one tier",
    "prompt_cache_key": "prefixes are found by their tokens",
    "prompt_cache_options": "prefixes are found by their tokens",
    "prompt_cache_retention": "a prefix stays until its slot is needed",
}

FIELDS: Final[tuple[Field, ...]] = (
    *_rows((CHAT, COMPLETIONS, RESPONSES), "honoured", _SAMPLING),
    *_rows((CHAT, COMPLETIONS), "honoured", _BOTH),
    *_rows(
        (CHAT,),
        "honoured",
        {
            "messages": "roles system, developer, user, assistant, tool; content is text or text parts",
            "max_completion_tokens": "wins over max_tokens; by default what the context leaves",
            "max_tokens": "as max_completion_tokens",
            "logprobs": "log probabilities of the answer's tokens, of the model's own distribution",
            "top_logprobs": "0 to 20, with logprobs",
            "tools": "functions; told through the model's own template where it takes tools",
            "tool_choice": "auto, none, required, a named function, allowed_tools",
            "parallel_tool_calls": "false: one call at most",
        },
    ),
    *_rows(
        (COMPLETIONS,),
        "honoured",
        {
            "prompt": "a string, strings, token ids, or lists of these",
            "max_tokens": "16 by default; 0 with echo scores the prompt",
            "echo": "the prompt before the answer, with its log probabilities where asked",
            "logprobs": "0 to 20, in the endpoint's own shape",
            "best_of": "the n of best_of with the highest mean log probability; not streamed",
        },
    ),
    *_rows(
        (RESPONSES,),
        "honoured",
        {
            "input": "a string, or items: messages, function calls and their outputs",
            "instructions": "a system message before the input",
            "max_output_tokens": "by default what the context leaves",
            "tools": "functions",
            "tool_choice": "auto, none, required, a named function, allowed_tools",
            "parallel_tool_calls": "false: one call at most",
            "text.format": "text, json_object, json_schema; the schema is enforced",
            "top_logprobs": "0 to 20, with include message.output_text.logprobs",
            "include": "message.output_text.logprobs; others have nothing to include",
        },
    ),
    *_rows((CHAT, COMPLETIONS, RESPONSES), "ignored", _NO_EFFECT),
    *_rows((CHAT,), "ignored", {"store": "nothing is stored"}),
    *_rows((CHAT, RESPONSES), "ignored", {"stream_options.include_obfuscation": "nothing is padded"}),
    *_rows(
        (CHAT,),
        "ignored",
        {
            "prediction": "a hint for speed, which speculation here does without",
            "reasoning_effort": "these models do not reason apart from the answer",
            "verbosity": "the models were not trained for it",
            "messages.name": "templates have no place for it",
        },
    ),
    *_rows(
        (RESPONSES,),
        "ignored",
        {
            "reasoning": "these models do not reason apart from the answer",
            "text.verbosity": "the models were not trained for it",
            "max_tool_calls": "of built-in tools, of which there are none",
            "context_management": "nothing is compacted; a prompt that is too long is refused",
            "access_programs": "none exist here",
        },
    ),
    *(
        Field(name, endpoint, "refused", "nothing here judges contents")
        for name in ("moderation",)
        for endpoint in (CHAT, RESPONSES)
    ),
    Field("audio", CHAT, "refused", "the model writes text"),
    Field("modalities", CHAT, "refused", "the model writes text", (None, ["text"])),
    Field("web_search_options", CHAT, "refused", "nothing here searches the web"),
    Field("functions", CHAT, "refused", "its successor is tools", (None, [])),
    Field("function_call", CHAT, "refused", "its successor is tool_choice", (None, "none", "auto")),
    Field("suffix", COMPLETIONS, "refused", "the model was not trained to fill in", (None, "")),
    Field("store", RESPONSES, "refused", "nothing is stored; send false", (None, False)),
    Field("previous_response_id", RESPONSES, "refused", "nothing is stored; send the whole input"),
    Field("conversation", RESPONSES, "refused", "nothing is stored; send the whole input"),
    Field("background", RESPONSES, "refused", "nothing is stored to be asked for later", (None, False)),
    Field("background_options", RESPONSES, "refused", "nothing is stored to be asked for later"),
    Field("prompt", RESPONSES, "refused", "no prompt templates are stored"),
    Field("image", RESPONSES, "refused", "the model writes text"),
    Field("truncation", RESPONSES, "refused", "only disabled is known", (None, "disabled")),
    *_rows(
        (TOKENIZE,),
        "honoured",
        {
            "model": "the served name",
            "prompt": "a text",
            "content": "a text; llama-server's name for prompt",
            "add_special_tokens": "whether what opens a text comes first; true by default",
            "messages": "a conversation instead, through the chat template",
            "tools": "as in /v1/chat/completions",
            "return_token_strs": "the text of each token too",
        },
    ),
    *_rows((DETOKENIZE,), "honoured", {"model": "the served name", "tokens": "token ids"}),
    *_rows(
        (APPLY_TEMPLATE,),
        "honoured",
        {
            "model": "the served name",
            "messages": "as in /v1/chat/completions",
            "tools": "as in /v1/chat/completions",
        },
    ),
)
