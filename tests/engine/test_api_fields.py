"""The table of OpenAI's fields is true: what it says is refused is, what it says is taken is."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from openai.types import chat, completion_create_params, responses
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params

from engine.server.fields import CHAT, COMPLETIONS, FIELDS, RESPONSES, Field
from tests.engine.openai_fixtures import function, post, says

BASES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    COMPLETIONS: {"prompt": "hi", "max_tokens": 2},
    RESPONSES: {"input": "hi", "max_output_tokens": 2},
}
TYPES = {
    CHAT: chat_params.CompletionCreateParamsNonStreaming,
    COMPLETIONS: completion_create_params.CompletionCreateParamsNonStreaming,
    RESPONSES: response_create_params.ResponseCreateParamsNonStreaming,
}
ANY: tuple[Any, ...] = ("x", 1, True, {"a": 1}, [1], ["x"], {})


@pytest.fixture(scope="module")
def server():
    with says("hello") as running:
        yield running


def of(*fates: str) -> list[Field]:
    return [field for field in FIELDS if field.fate in fates and field.endpoint in BASES]


@pytest.mark.parametrize("endpoint", BASES)
def test_every_field_that_openais_client_knows_is_in_the_table(endpoint):
    known = {field.name.split(".")[0] for field in FIELDS if field.endpoint == endpoint}
    fields = {
        name for kind in inspect.getmro(TYPES[endpoint]) for name in getattr(kind, "__annotations__", {})
    }
    fields |= set(TYPES[endpoint].__required_keys__) | set(TYPES[endpoint].__optional_keys__)
    assert fields - known == set()


def test_no_field_is_told_twice():
    names = [(field.endpoint, field.name) for field in FIELDS]
    assert len(names) == len(set(names))
    assert all(field.note and not field.note.endswith(".") for field in FIELDS)


@pytest.mark.parametrize("field", of("refused"), ids=lambda field: f"{field.endpoint} {field.name}")
def test_what_is_refused_is_refused_by_its_name(server, field):
    for value in ANY:
        answer = post(server.url, field.endpoint, BASES[field.endpoint] | {field.name: value})
        error = answer.json()["error"]
        assert answer.status_code == 400, answer.text
        assert (error["param"], error["code"]) == (field.name, "unsupported_parameter")
    for value in field.harmless:
        answer = post(server.url, field.endpoint, BASES[field.endpoint] | {field.name: value})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("field", of("ignored"), ids=lambda field: f"{field.endpoint} {field.name}")
def test_what_is_ignored_changes_nothing(server, field):
    head, _, rest = field.name.partition(".")
    if head == "messages":
        return
    body = BASES[field.endpoint] | {"temperature": 0}
    values = {"metadata": {"a": "b"}}.get(head, "x")
    plain = post(server.url, field.endpoint, body).json()
    answer = post(server.url, field.endpoint, body | {head: {rest: values} if rest else values})
    assert answer.status_code == 200, answer.text
    assert text_of(answer.json()) == text_of(plain)


SAMPLES: dict[str, Any] = {
    "temperature": 0.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 1,
    "stop": ["zz"], "presence_penalty": 1, "frequency_penalty": -1, "n": 2, "logit_bias": {"5": 1},
    "stream": False, "response_format": {"type": "json_object"}, "ignore_eos": True, "return_token_ids": True,
    "messages": [{"role": "developer", "content": "x"}], "max_completion_tokens": 3, "max_tokens": 3,
    "logprobs": True, "tools": [function()], "tool_choice": "auto", "parallel_tool_calls": True,
    "prompt": [1, 2], "echo": True, "best_of": 2, "input": [{"role": "user", "content": "x"}],
    "instructions": "x", "max_output_tokens": 3, "include": ["message.output_text.logprobs"],
    "model": "halo-test", "top_logprobs": 1,
}  # fmt: skip


@pytest.mark.parametrize("field", of("honoured"), ids=lambda field: f"{field.endpoint} {field.name}")
def test_what_is_honoured_is_taken_and_looked_at(server, field):
    head, _, rest = field.name.partition(".")
    body = dict(BASES[field.endpoint])
    if rest:
        sample: Any = {rest: {"type": "text"} if rest == "format" else True}
    elif (field.endpoint, head) == (RESPONSES, "tools"):
        sample = [{"type": "function", "name": "f"}]
    elif (field.endpoint, head) == (COMPLETIONS, "logprobs"):
        sample = 2
    else:
        sample = SAMPLES[head]
    more = {"logprobs": True} if head == "top_logprobs" and field.endpoint == CHAT else {}
    assert post(server.url, field.endpoint, body | more | {head: sample}).status_code == 200
    value = object_that_is_none(head)
    wrong = post(server.url, field.endpoint, body | {head: {rest: value} if rest else value})
    assert wrong.status_code in (400, 404), wrong.text


def object_that_is_none(name: str) -> object:
    """A value that the field cannot have."""
    return (
        5
        if name in ("model", "tool_choice", "stream", "echo", "logprobs") and name != "logprobs"
        else {"no": []}
    )


def text_of(answer: dict[str, Any]) -> Any:
    if "output" in answer:
        return [item["content"][0]["text"] for item in answer["output"]]
    return [choice.get("text", choice.get("message", {}).get("content")) for choice in answer["choices"]]


def test_the_modules_of_the_client_are_those_that_are_read():
    assert chat.ChatCompletion and responses.Response
