"""Functions in chat completions as OpenAI's own client reads them: called, forced, streamed, answered."""

from __future__ import annotations

import json

import jsonschema
import pytest

from tests.engine.openai_fixtures import (
    CITY,
    MODEL,
    USER,
    client_of,
    demo_directory,
    demo_server,
    function,
    post,
    says,
)

CHAT = {"model": MODEL, "messages": USER, "temperature": 0}
TWO_CALLS = (
    'Let me look. <tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)
TOOLS = [function(), function("get_time", {"type": "object", "properties": {}})]


@pytest.fixture(scope="module")
def demo(tmp_path_factory, native_library):
    with demo_server(demo_directory(tmp_path_factory.mktemp("store")), native_library) as server:
        yield server


@pytest.fixture(scope="module")
def calls():
    with says(TWO_CALLS) as server:
        yield server


def test_calls_come_back_whole(calls):
    done = client_of(calls.url).chat.completions.create(**CHAT, tools=TOOLS)
    choice = done.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
    assert [(c.type, c.function.name, c.function.arguments) for c in choice.message.tool_calls] == [
        ("function", "get_weather", '{"city": "Köln"}'),
        ("function", "get_time", "{}"),
    ]
    assert len({c.id for c in choice.message.tool_calls}) == 2


@pytest.mark.parametrize("n", [1, 3])
def test_the_clients_stream_helper_puts_together_what_the_whole_answer_says(calls, n):
    client = client_of(calls.url)
    whole = client.chat.completions.create(**CHAT, tools=TOOLS, n=n)
    with client.chat.completions.stream(**CHAT, tools=TOOLS, n=n) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.done") == 2 * n and "content.delta" in kinds
    for one, other in zip(whole.choices, streamed.choices, strict=True):
        assert one.finish_reason == other.finish_reason == "tool_calls"
        assert one.message.content == other.message.content
        names = [
            [(c.function.name, c.function.arguments) for c in m.message.tool_calls] for m in (one, other)
        ]
        assert names[0] == names[1]


def test_each_chunk_of_a_call_is_of_the_form_that_clients_depend_on(calls):
    """The first has id, type, name and empty arguments; later ones the index and a piece alone."""
    seen: dict[int, str] = {}
    for chunk in client_of(calls.url).chat.completions.create(**CHAT, tools=TOOLS, stream=True):
        parts = chunk.choices[0].delta.tool_calls or []
        assert len(parts) <= 1
        for part in parts:
            if part.index not in seen:
                assert part.id and part.type == "function" and part.function.name
                assert part.function.arguments == ""
                seen[part.index] = ""
            else:
                assert part.id is None and part.type is None and part.function.name is None
                seen[part.index] += part.function.arguments
    assert seen == {0: '{"city": "Köln"}', 1: "{}"}


def test_without_parallel_calls_there_is_one(calls):
    done = client_of(calls.url).chat.completions.create(**CHAT, tools=TOOLS, parallel_tool_calls=False)
    assert len(done.choices[0].message.tool_calls) == 1


@pytest.mark.parametrize("more", [{}, {"tools": TOOLS, "tool_choice": "none"}])
def test_without_tools_what_looks_like_a_call_is_text(calls, more):
    choice = client_of(calls.url).chat.completions.create(**CHAT, **more).choices[0]
    assert choice.finish_reason == "stop" and choice.message.content == TWO_CALLS
    assert choice.message.tool_calls is None


def test_a_call_that_the_limit_cuts_is_length(calls):
    choice = client_of(calls.url).chat.completions.create(**CHAT, tools=TOOLS, max_tokens=70).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments in '{"city": "Köln"}'


def test_an_answer_of_a_tool_goes_back_into_the_conversation(demo):
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
    ]  # fmt: skip
    done = post(demo.url, "/v1/chat/completions", {"messages": messages, "tools": TOOLS, "max_tokens": 3})
    assert done.status_code == 200, done.text
    prompt = post(demo.url, "/apply-template", {"messages": messages, "tools": TOOLS}).json()["prompt"]
    assert "<tool_response>\nrain\n</tool_response>" in prompt and '"name": "get_weather"' in prompt
    for call in messages[1]["tool_calls"]:
        call["id"] = None  # as aichat sends it
    messages[2]["tool_call_id"] = None
    assert post(demo.url, "/v1/chat/completions", {"messages": messages, "max_tokens": 3}).status_code == 200


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_is_one_whatever_the_model_would_have_said(demo, choice, stream):
    tools = [function(strict=True), function("set", {**CITY, "properties": {"city": {"enum": ["Rom"]}}})]
    create = client_of(demo.url).chat.completions.create
    for seed in range(3):
        asked = dict(
            model=demo.service.model, messages=USER, tools=tools, tool_choice=choice, seed=seed,
            max_tokens=120, parallel_tool_calls=False,
        )  # fmt: skip
        done = create(**asked)
        message, reason = done.choices[0].message, done.choices[0].finish_reason
        assert reason in ("tool_calls", "length") and not (message.content or "").strip()
        (call,) = message.tool_calls
        assert choice == "required" or call.function.name == "get_weather"
        if reason == "tool_calls":
            schema = next(t for t in tools if t["function"]["name"] == call.function.name)
            jsonschema.validate(json.loads(call.function.arguments), schema["function"]["parameters"])
        if stream:
            pieces = [c.choices[0].delta.tool_calls for c in create(**asked, stream=True)]
            assert "".join(p[0].function.arguments for p in pieces if p) == call.function.arguments


def test_a_strict_function_is_called_rightly_or_not_at_all(demo):
    """Of its own will, and pushed to begin a call: its arguments obey, for no other token may come."""
    tokenizer = demo.service.engine.tokenizer
    push = {str(token): 40 for token in tokenizer.encode("<tool_call>")}
    tools = [function(strict=True)]
    for bias in ({}, push):
        for seed in range(3):
            body = {"messages": USER, "tools": tools, "seed": seed, "max_tokens": 60, "logit_bias": bias}
            choice = post(demo.url, "/v1/chat/completions", body).json()["choices"][0]
            calls = choice["message"].get("tool_calls") or []
            for call in calls if choice["finish_reason"] == "tool_calls" else ():
                jsonschema.validate(json.loads(call["function"]["arguments"]), CITY)
            assert "<tool_call>" not in (choice["message"]["content"] or "")


def test_allowed_tools_are_the_only_ones(demo):
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "required",
            "tools": [{"type": "function", "function": {"name": "get_time"}}],
        },
    }
    done = post(demo.url, "/v1/chat/completions", {"messages": USER, "tools": TOOLS, "tool_choice": choice})
    assert done.json()["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "get_time"
