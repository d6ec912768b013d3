"""Every field of the APIs beside OpenAI's and what becomes of it; OpenAI's are in fields.py.

docs/api-fields.md is made of both, and tests send each field to a live server. Nothing else reads this.
"""

from __future__ import annotations

from typing import Final

from engine.server.anthropic_schema import REFUSED
from engine.server.fields import Fate, Field

MESSAGES: Final = "/v1/messages"
COUNT: Final = "/v1/messages/count_tokens"
PPL: Final = "/ppl"
LEMONADE_CHAT: Final = "/api/v1/chat/completions"
LEMONADE_COMPLETIONS: Final = "/api/v1/completions"


def _rows(endpoints: tuple[str, ...], fate: Fate, rows: dict[str, str]) -> list[Field]:
    return [Field(name, endpoint, fate, note) for endpoint in endpoints for name, note in rows.items()]


_PROMPT: Final = {
    "model": "the served name, or any that begins with claude-; another is 404",
    "messages": "roles user, assistant, system; a last turn of the assistant's is continued",
    "messages.content": "text, tool_use, tool_result and search_result blocks; thinking is left out; "
    "image and document are refused",
    "system": "a text or text blocks; the line x-anthropic-billing-header is left out",
    "tools": "name, description, input_schema, strict; tools that Anthropic defines are refused by type",
    "tool_choice": "auto, any, tool, none, enforced as tokens are chosen; disable_parallel_tool_use",
    "output_config.format": "json_schema, enforced as tokens are chosen",
    "output_format": "the older name of output_config.format",
}
_ANSWER: Final = {
    "max_tokens": "required; what the context leaves is the end too: model_context_window_exceeded",
    "temperature": "0 to 1; 1 by default; 0 is greedy",
    "top_p": "0 to 1; 0 is greedy",
    "top_k": "0 or more; 0 is off",
    "stop_sequences": "up to 64; the one that came is named in stop_sequence",
    "stream": "server-sent events in Anthropic's order",
}
_NO_EFFECT: Final = {
    "cache_control": "every prompt stays in the KV cache until its slot is needed; also in blocks and tools",
    "output_config.effort": "the model has one",
    "thinking": "these models do not think apart from the answer",
    "speed": "there is one",
    "user_profile_id": "nothing is kept by user",
    "workspace_id": "there is one",
}
_NO_EFFECT_ON_ANSWERS: Final = {
    "betas": "headers and fields of betas are not looked at",
    "billing_policy": "nothing is billed",
    "context_management": "nothing is cleared; a prompt that is too long is refused",
    "diagnostics": "nothing is diagnosed",
    "fallback_credit_token": "nothing is billed",
    "fallbacks": "there is one model",
    "inference_geo": "it runs here",
    "metadata": "nothing is stored",
    "service_tier": "there is one tier",
}
_NOT_HERE: Final = {name: why[0].lower() + why[1:] for name, why in REFUSED.items()}

OTHER_FIELDS: Final[tuple[Field, ...]] = (
    *_rows((MESSAGES, COUNT), "honoured", _PROMPT),
    *_rows((MESSAGES,), "honoured", _ANSWER),
    *_rows((MESSAGES, COUNT), "ignored", _NO_EFFECT),
    *_rows((MESSAGES,), "ignored", _NO_EFFECT_ON_ANSWERS),
    *(
        Field(name, endpoint, "refused", why, (None, []))
        for name, why in _NOT_HERE.items()
        for endpoint in (MESSAGES, COUNT)
        if (name, endpoint) != ("compaction", COUNT)
    ),
    Field("compaction", COUNT, "ignored", "the count is that of the messages, as Anthropic's"),
    *_rows(
        (LEMONADE_CHAT, LEMONADE_COMPLETIONS),
        "honoured",
        {"repeat_penalty": "Lemonade's name of repetition_penalty; all else as below /v1"},
    ),
    *_rows(
        (PPL,),
        "honoured",
        {
            "text": "what is scored",
            "stride": "tokens from one window's start to the next; 1024 by default",
            "window": "extension; tokens a window; the stride by default, at most the context less 2",
            "max_tokens": "of the text; 8192 by default",
        },
    ),
)
