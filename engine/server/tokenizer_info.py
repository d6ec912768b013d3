"""GET /tokenizer_info: the tokenizer as lm-evaluation-harness asks vLLM for it; it encodes nothing."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from engine.server.service import json_response, service_of
from engine.server.usage import special_name


async def tokenizer_info(request: Request) -> Response:
    """The names of the special tokens, and the checkpoint's own template where it has one.

    A name that is sent to /tokenize as a text gives its letters: no text becomes a special token. The ids
    are in bos_token_id and eos_token_id.
    """
    engine = service_of(request).engine
    tokenizer = engine.tokenizer
    return json_response(
        {
            "tokenizer_class": type(tokenizer).__name__,
            "vocab_size": tokenizer.size,
            "model_max_length": engine.context,
            "bos_token": special_name(tokenizer, tokenizer.bos),
            "bos_token_id": tokenizer.bos,
            "eos_token": special_name(tokenizer, tokenizer.eos),
            "eos_token_id": tokenizer.eos,
            "chat_template": tokenizer.chat_template,
        }
    )
