"""Fuzz targets of requests to the APIs beside OpenAI's: Anthropic's, Lemonade's, the predecessor's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tests.fuzz.target import Target
from tests.fuzz.wire_targets import request


def _messages() -> Iterator[bytes]:
    plain: dict[str, Any] = {
        "model": "claude-x",
        "max_tokens": 2,
        "messages": [{"role": "user", "content": "a"}],
    }
    yield json.dumps(plain).encode()
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "b"}]}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"ttl": "1h"}}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "h"}, call]},
        {"role": "user", "content": [result, {"type": "text", "text": "c"}]},
        {"role": "system", "content": "d"},
    ]
    tools = [{"name": "f", "input_schema": {"type": "object", "properties": {}}}]
    more = {"system": [{"type": "text", "text": "x-anthropic-billing-header: a\ns"}], "tools": tools}
    yield json.dumps(plain | more | {"messages": turns, "tool_choice": {"type": "auto"}}).encode()
    choice = {"tool_choice": {"type": "tool", "name": "f"}, "stream": True, "stop_sequences": ["q"]}
    yield json.dumps(plain | more | choice | {"temperature": 0.5, "top_p": 0, "top_k": 3}).encode()


def _ppl() -> Iterator[bytes]:
    yield b'{"text": "a b c d", "stride": 2, "window": 3, "max_tokens": 4}'


def _lemonade() -> Iterator[bytes]:
    yield b'{"prompt": "a b", "max_tokens": 2, "temperature": 0, "repeat_penalty": 1.2}'
    yield b'{"prompt": [4, 5], "stop": "q", "repetition_penalty": 0.9, "max_tokens": 1}'


_BLOCKS = (
    b'"messages"', b'"role"', b'"content"', b'"assistant"', b'"stream"', b"true", b"null", b'"max_tokens"',
    b"1e400", b"-9223372036854775809", b"\\ud83d", b"\\u0000", b"[[",
    b'"type"', b'"text"', b'"tool_use"', b'"tool_result"', b'"tool_use_id"', b'"input"', b'"system"',
    b'"tools"', b'"input_schema"', b'"tool_choice"', b'"any"', b'"image"', b'"thinking"', b'"output_config"',
    b'{"format": {"type": "json_schema", "schema": {}}}', b'"$ref"', b'"stop_sequences"',
)  # fmt: skip
_NUMBERS = (b'"stride"', b'"window"', b'"text"', b"1e9", b"null", b'"repeat_penalty"', b'"prompt"')

TARGETS = [
    Target("messages_request", request("/v1/messages"), _messages, words=_BLOCKS, seconds=5.0),
    Target("count_request", request("/v1/messages/count_tokens"), _messages, words=_BLOCKS, seconds=5.0),
    Target("lemonade_request", request("/api/v1/completions"), _lemonade, words=_NUMBERS, seconds=5.0),
    Target("ppl_request", request("/ppl"), _ppl, words=_NUMBERS, seconds=5.0),
]
