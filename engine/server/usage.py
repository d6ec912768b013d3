"""Token counts and log probabilities as OpenAI's endpoints write them; nothing is counted here."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from engine.sequence import TokenLogprob
from engine.server.runner import Job
from engine.tokenizer import TextTokenizer


def usage(job: Job, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """The counts of a whole answer. The model's own end token is not counted."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": min(job.cached_tokens, prompt_tokens)},
    }


def chat_logprobs(tokenizer: TextTokenizer, logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """Log probabilities in chat's shape; `bytes` are a token's own, also where they are half a character."""
    return [
        _chat_token(tokenizer, each.token_id, each.logprob)
        | {"top_logprobs": [_chat_token(tokenizer, token, value) for token, value in each.top]}
        for each in logprobs
    ]


def _chat_token(tokenizer: TextTokenizer, token: int, value: float) -> dict[str, Any]:
    data = token_bytes(tokenizer, token)
    return {"token": data.decode("utf-8", "replace"), "logprob": finite(value), "bytes": list(data)}


def token_bytes(tokenizer: TextTokenizer, token: int) -> bytes:
    """The bytes of a token; of a special one its name, so that two of them are told apart."""
    if tokenizer.is_special(token):
        return special_name(tokenizer, token).encode()
    return tokenizer.token_bytes(token)


def special_name(tokenizer: TextTokenizer, token: int) -> str:
    """The text that stands for a special token."""
    return next((text for text, each in tokenizer.special.items() if each == token), f"<|{token}|>")


def token_text(tokenizer: TextTokenizer, token: int) -> str:
    """A token's text; one that is no whole characters as bytes:\\xNN, as OpenAI's completions have it."""
    data = token_bytes(tokenizer, token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def finite(value: float) -> float:
    """A log probability that JSON can hold; OpenAI's own least is -9999."""
    return max(value, -9999.0)


def legacy_logprobs(
    tokenizer: TextTokenizer, logprobs: Sequence[tuple[int, TokenLogprob | None]], offset: int
) -> dict[str, Any]:
    """(token id, its log probability) in the shape of /v1/completions; `offset` is where the first begins.

    Offsets are in characters of the choice's text, in which special tokens have no place.
    """
    shape: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    for token, each in logprobs:
        shape["tokens"].append(token_text(tokenizer, token))
        shape["token_logprobs"].append(None if each is None else finite(each.logprob))
        top = None if each is None else {token_text(tokenizer, t): finite(v) for t, v in each.top}
        if top is not None and each is not None and top:
            top.setdefault(token_text(tokenizer, token), finite(each.logprob))
        shape["top_logprobs"].append(top)
        shape["text_offset"].append(offset)
        offset += len(decoder.decode(tokenizer.token_bytes(token)))
    return shape
