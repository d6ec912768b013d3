"""Fuzz targets of what the API modules read beyond plain requests: items, tools, schemas, answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from engine.chat import stop_ids
from engine.errors import HaloError
from engine.grammar import Grammars, call_grammar, json_grammar, text_grammar
from engine.tool_parser import CallDelta, ToolParser
from engine.tools import BARE, TAGGED, Tool
from tests.engine.server_fixtures import TOKENIZER
from tests.fuzz.target import Finding, Target
from tests.fuzz.wire_targets import request

NAMES = frozenset({"f", "get_weather"})


@cache
def _grammars() -> Grammars:
    return Grammars(TOKENIZER, stop_ids(TOKENIZER))


def run_answer(data: bytes, _folder: Path) -> None:
    """A model's answer, in pieces of the size that its first byte says, and whole: the same comes out."""
    text = data[1:].decode("utf-8", "replace")
    step = max(1, data[0] % 9) if data else 1
    one, other = _read(text, step), _read(text, len(text) or 1)
    if one != other:
        raise Finding(f"cut to pieces of {step} it reads as {one!r:.100}, whole as {other!r:.100}")


def _read(text: str, step: int) -> tuple[str, list[list[str]]]:
    parser = ToolParser(NAMES)
    events = [event for i in range(0, len(text), step) for event in parser.feed(text[i : i + step])]
    said, calls = "", []
    for event in [*events, *parser.finish()]:
        if isinstance(event, CallDelta):
            if event.name is not None:
                calls.append([event.name, ""])
            calls[event.index][1] += event.arguments
        else:
            said += event
    return said, calls


def run_schema(data: bytes, _folder: Path) -> None:
    """A schema of an answer and of a tool: it compiles and its masks let tokens come, or it is refused."""
    try:
        schema: Any = json.loads(data)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):  # mutations of JSON are seldom JSON
        schema = _built(iter(data[:200]))
    tools = [Tool("f", "", schema), Tool("get_weather", "", schema, strict=True)]
    for make in (
        lambda: json_grammar(schema),
        lambda: call_grammar(tools, BARE, parallel=True),
        lambda: text_grammar(tools, TAGGED, parallel=False),
    ):
        try:
            _walk(_grammars().compile(make()))
        except HaloError as error:
            if not error.message or not error.hint:
                raise Finding("a refusal without a hint") from error


def _built(bits: Iterator[int], depth: int = 0) -> dict[str, Any]:
    """A schema whose every choice is a byte of the input."""
    schema: dict[str, Any] = {}
    for _ in range(next(bits, 0) % 4 + (depth == 0)):
        name = _KEYWORDS[next(bits, 0) % len(_KEYWORDS)]
        schema[name] = _value(name, bits, depth + 1)
    return schema


def _value(name: str, bits: Iterator[int], depth: int) -> Any:
    """Mostly of the kind that the keyword takes."""
    kind = _KEYWORDS.index(name) if next(bits, 0) % 8 else next(bits, 0)
    inner = [_built(bits, depth) for _ in range(next(bits, 0) % 3)] if depth < 5 else []
    choices: tuple[Any, ...] = (
        inner[0] if inner else {},
        inner,
        {f"k{i}": each for i, each in enumerate(inner)} | {"n": {}},
        ("string", "integer", "object", "array", "null", ["number", "null"], "boolean")[next(bits, 0) % 7],
        ("#", "#/$defs/n", "#/properties/n", "^a+(b|c){2,}$", "date", "uuid", "(a?){9}a{9}")[
            next(bits, 0) % 7
        ],
        (-1, 0, 1, 3, 2.5, 1e9, 10**30)[next(bits, 0) % 7],
        [None, 1, "x", {"a": []}][: next(bits, 0) % 5],
        bool(next(bits, 0) % 2),
    )
    return choices[kind % len(choices)]


def _walk(constraint: Any) -> None:
    """The first tokens that may come, the highest of each mask."""
    for _ in range(12):
        if constraint.finished():
            return
        allowed = constraint.mask().nonzero()[0]
        if not len(allowed):
            raise Finding("no token may come")
        constraint.accept(int(allowed[-1]))


def _answers() -> Iterator[bytes]:
    yield b'\x01Sure. <tool_call>\n{"name": "f", "arguments": {"a": [1, "}"]}}\n</tool_call> done'
    yield b'\x02[TOOL_CALLS][{"name":"f","arguments":{}}, {"name":"get_weather","parameters":{"q":"\\""}}]'
    yield b'\x03```json\n{"type":"function","function":{"name":"f","parameters":{"x":1}}}\n```'
    yield b'\x04<|python_tag|>{"name": "f", "parameters": {}}; {"name": "f", "arguments": "{\\"x\\": 1}"}'
    yield b'\x05<function=f>{"a": {"b": null}}</function>'
    yield b'\x00{"arguments": {"x": 2}, "name": "f", "id": 3}'


def _schemas() -> Iterator[bytes]:
    item = {"type": "object", "properties": {"v": {"$ref": "#/$defs/n"}}, "required": ["v"]}
    yield json.dumps({"$defs": {"n": {"type": "integer", "minimum": 1, "maximum": 9}}, **item}).encode()
    yield json.dumps({"anyOf": [{"type": "string", "pattern": "^a+$"}, {"enum": [1, None, "x"]}]}).encode()
    yield json.dumps({"type": "array", "items": {"type": "string", "format": "date"}, "maxItems": 3}).encode()
    yield json.dumps({"type": "array", "prefixItems": [{"const": 1}], "items": False, "title": "t"}).encode()
    yield json.dumps({"type": ["string", "null"], "minLength": 1, "maxLength": 4, "default": ""}).encode()


def _responses() -> Iterator[bytes]:
    yield b'{"input": "a", "max_output_tokens": 2, "temperature": 0}'
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "r"}]}
    user = {"role": "user", "content": [{"type": "input_text", "text": "x"}]}
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
    more = {"tools": [tool], "tool_choice": {"type": "function", "name": "f"}, "stream": True}
    yield json.dumps({"input": [user, call, output], "max_output_tokens": 3} | more).encode()
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object", "properties": {"a": {}}}}
    include = ["message.output_text.logprobs"]
    yield json.dumps(
        {
            "input": "a",
            "text": {"format": form},
            "include": include,
            "top_logprobs": 1,
            "max_output_tokens": 4,
        }
    ).encode()


def _tokens() -> Iterator[bytes]:
    yield b'{"prompt": "a b", "return_token_strs": true}'
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    yield json.dumps({"messages": [{"role": "user", "content": "x"}], "tools": [tool]}).encode()


# In the order of the kinds in _value, over and over.
_KEYWORDS = (
    "items", "anyOf", "properties", "type", "$ref", "minimum", "enum", "additionalProperties",
    "not", "allOf", "$defs", "const", "pattern", "maximum", "required", "uniqueItems",
    "additionalItems", "oneOf", "patternProperties", "type", "format", "minLength", "examples", "items",
    "if", "prefixItems", "definitions", "title", "$ref", "maxItems", "enum", "deprecated",
    "contains", "anyOf", "properties", "type", "description", "multipleOf", "default", "exclusiveMinimum",
)  # fmt: skip
_SCHEMA = (
    b'"type"', b'"object"', b'"properties"', b'"required"', b'"additionalProperties"', b'"items"',
    b'"$ref"', b'"#/$defs/n"', b'"#"', b'"enum"', b'"const"', b'"anyOf"', b'"allOf"', b'"oneOf"',
    b'"pattern"', b'"format"', b'"minimum"', b'"maxLength"', b'"minItems"', b'"not"', b'"x-guidance"',
    b"1e999", b"-1", b"999999999", b'"(a|b)*c"', b'"date-time"', b'"uniqueItems"', b'"multipleOf"',
    b'"patternProperties"',
)  # fmt: skip
_ANSWER = (
    b"<tool_call>", b"</tool_call>", b'"name"', b'"arguments"', b'"parameters"', b'"function"',
    b"[TOOL_CALLS]", b"<|python_tag|>", b"<function=", b"```json", b"```", b'"f"', b"; ", b'\\"',
    b"functools", b"null",
)  # fmt: skip
_ITEMS = (
    b'"input"', b'"type"', b'"function_call"', b'"function_call_output"', b'"message"', b'"reasoning"',
    b'"tools"', b'"tool_choice"', b'"required"', b'"strict"', b'"text"', b'"format"', b'"json_schema"',
    b'"schema"', b'"name"', b'"arguments"', b'"output"', b'"include"', b'"stream"', b"true", b"null",
    b'"instructions"', b'"messages"',
)  # fmt: skip

TARGETS = [
    Target("responses_request", request("/v1/responses"), _responses, words=_ITEMS, seconds=5.0),
    Target("tokenize_request", request("/tokenize"), _tokens, words=_ITEMS, seconds=5.0),
    Target("tool_answer", run_answer, _answers, words=_ANSWER),
    Target("schema", run_schema, _schemas, words=_SCHEMA, seconds=5.0),
]
