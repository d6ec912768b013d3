"""/v1/responses as OpenAI's own client reads it: items, events in their order, schemas, tools, refusals."""

from __future__ import annotations

import json
from typing import Literal

import openai
import pydantic
import pytest

from tests.engine.openai_fixtures import CITY, MODEL, client_of, demo_directory, demo_server, post, says
from tests.engine.server_fixtures import wait_until

TOOLS = [{"type": "function", "name": "get_weather", "parameters": CITY, "strict": False}]
ANSWER = (
    'Let me look. <tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rom"}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory, native_library):
    with demo_server(demo_directory(tmp_path_factory.mktemp("store")), native_library) as server:
        yield server


def test_a_string_is_answered():
    with says("Grüße!") as server:
        done = client_of(server.url).responses.create(model=MODEL, input="hi", instructions="Be brief.")
        assert done.output_text == "Grüße!" and done.status == "completed" and done.id.startswith("resp_")
        assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens
        assert done.store is False and done.instructions == "Be brief." and done.error is None
        prompt = post(server.url, "/apply-template", {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
        })  # fmt: skip
        tokens = post(server.url, "/tokenize", {"messages": [
            {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]})  # fmt: skip
        assert tokens.json()["count"] == done.usage.input_tokens and "Be brief." in prompt.json()["prompt"]


ONE_TEXT = [
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]
ONE_CALL = [
    "response.output_item.added",
    "response.function_call_arguments.delta",
    "response.function_call_arguments.done",
    "response.output_item.done",
]


def kinds(events) -> list[str]:
    """The types of events, those that repeat named once."""
    names = [event.type for event in events]
    return [name for i, name in enumerate(names) if not i or name != names[i - 1]]


@pytest.mark.parametrize(
    ("answer", "more", "expected"),
    [
        ("Hello there", {}, [*ONE_TEXT, "response.completed"]),
        ("Hello there", {"max_output_tokens": 4}, [*ONE_TEXT, "response.incomplete"]),
        (ANSWER, {"tools": TOOLS}, [*ONE_TEXT, *ONE_CALL, *ONE_CALL, "response.completed"]),
        (ANSWER[13:], {"tools": TOOLS}, [*ONE_CALL, *ONE_CALL, "response.completed"]),
    ],
)
def test_events_come_in_their_documented_order(answer, more, expected):
    with says(answer) as server:
        events = list(client_of(server.url).responses.create(model=MODEL, input="hi", stream=True, **more))
        whole = client_of(server.url).responses.create(model=MODEL, input="hi", **more)
    assert kinds(events) == ["response.created", "response.in_progress", *expected]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final = events[-1].response
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    for event in events:  # every index is that of the item in the end
        if hasattr(event, "output_index"):
            item = final.output[event.output_index]
            assert getattr(event, "item_id", item.id) == item.id
            if hasattr(event, "item"):
                assert event.item.id == item.id
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert {item.status for item in final.output} <= {"completed", "incomplete"}


def test_an_answer_that_is_empty_is_an_empty_message():
    with says(b"") as server:
        done = client_of(server.url).responses.create(model=MODEL, input="hi")
        assert done.output_text == "" and [item.type for item in done.output] == ["message"]
        with client_of(server.url).responses.stream(model=MODEL, input="hi") as stream:
            assert stream.get_final_response().output_text == ""


def test_the_clients_stream_helper_puts_together_what_the_whole_answer_says():
    with (
        says(ANSWER) as server,
        client_of(server.url).responses.stream(model=MODEL, input="hi", tools=TOOLS) as stream,
    ):
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == "Let me look."
    assert [json.loads(call.arguments) for call in final.output[1:]] == [{"city": "Köln"}, {"city": "Rom"}]


def test_the_limit_is_told():
    with says("abcdefgh") as server:
        done = client_of(server.url).responses.create(model=MODEL, input="hi", max_output_tokens=3)
    assert done.status == "incomplete" and done.incomplete_details.reason == "max_output_tokens"
    assert done.output_text == "abc" and done.output[0].status == "incomplete"


def test_a_conversation_goes_on_with_its_items():
    with says(ANSWER) as server:
        client = client_of(server.url)
        items: list = [{"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]}]
        first = client.responses.create(model=MODEL, input=items, tools=TOOLS)
        items += [item.to_dict() for item in first.output]
        items.append({"type": "reasoning", "id": "rs_1", "summary": []})
        for item in first.output[1:]:
            items.append({"type": "function_call_output", "call_id": item.call_id, "output": "rain"})
        second = client.responses.create(model=MODEL, input=items, tools=TOOLS)
    assert second.usage.input_tokens > first.usage.input_tokens + 20


class Plan(pydantic.BaseModel):
    kind: Literal["walk", "swim"]
    minutes: int = pydantic.Field(ge=1, le=90)


def test_a_schema_is_obeyed_and_parsed(demo):
    client = client_of(demo.url)
    for seed in range(3):
        done = client.responses.parse(
            model=demo.service.model, input="Plan", text_format=Plan, max_output_tokens=100,
            extra_body={"seed": seed},
        )  # fmt: skip
        assert isinstance(done.output_parsed, Plan)
    with client.responses.stream(model=demo.service.model, input="Plan", text_format=Plan) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_response().output_parsed, Plan)


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "get_weather"},
        {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "get_weather"}],
        },
    ],
)
def test_a_call_can_be_forced(demo, choice):
    done = client_of(demo.url).responses.create(
        model=demo.service.model, input="Weather?", tools=TOOLS, tool_choice=choice, max_output_tokens=150,
        parallel_tool_calls=False, temperature=0.5,
    )  # fmt: skip
    (call,) = done.output
    assert call.type == "function_call" and call.name == "get_weather"
    if call.status == "completed":
        assert set(json.loads(call.arguments)) == {"city"}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_included_when_asked_for(demo, stream):
    asked = dict(model=demo.service.model, input="Hi", max_output_tokens=5, temperature=0)
    more = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    create = client_of(demo.url).responses.create
    answer = create(**asked, **more, stream=stream)
    done = list(answer)[-1].response if stream else answer
    scores = done.output[0].content[0].logprobs
    assert len(scores) == done.usage.output_tokens and all(len(each.top_logprobs) == 2 for each in scores)
    assert create(**asked).output[0].content[0].logprobs == []


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"store": True}, "store", "unsupported_parameter"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"prompt": {"id": "p"}}, "prompt", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "invalid_value"),
        ({"input": []}, "input", "invalid_type"),
        ({"input": 5}, "input", "invalid_type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "unsupported_parameter"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content",
         "invalid_value"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"role": "user"}]}, "input[0].content", "invalid_value"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "input[0]", "invalid_value"),
        ({"input": [{"type": "function_call_output"}]}, "input[0].output", "invalid_value"),
        ({"input": [{"type": "reasoning"}]}, "input", "invalid_value"),
        ({"tool_choice": {"type": "function", "name": "x"}, "tools": TOOLS}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "mcp"}, "tools": TOOLS}, "tool_choice", "invalid_value"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type", "invalid_value"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema", "invalid_value"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "text.format",
         "invalid_json_schema"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_type"),
        ({"input": "word " * 20_000}, "input", "context_length_exceeded"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(demo, change, param, code):
    answer = post(demo.url, "/v1/responses", {"input": "hi", **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code), error


def test_what_breaks_within_a_stream_is_a_failed_response():
    with says("hello " * 50) as server:
        session = server.session
        session.fail = True
        events = list(client_of(server.url).responses.create(model=MODEL, input="hi", stream=True))
        assert events[-1].type == "response.failed" and events[-1].response.error.code == "server_error"
        session.fail = True
        with pytest.raises(openai.InternalServerError):
            client_of(server.url).responses.create(model=MODEL, input="hi")


def test_what_was_said_before_it_broke_is_in_the_failed_response():
    with says("hello " * 50) as server:
        session = server.session
        session.delay = 0.005
        stream = client_of(server.url).responses.create(model=MODEL, input="hi", stream=True)
        said = ""
        for event in stream:
            if event.type == "response.output_text.delta":
                said += event.delta
                session.fail = len(said) > 10
        assert event.type == "response.failed" and event.response.output_text == said


def test_a_client_that_goes_away_ends_it():
    with says("tick " * 800) as server:
        session = server.session
        session.delay = 0.005
        stream = client_of(server.url).responses.create(model=MODEL, input="hi", stream=True)
        for event in stream:
            if event.type == "response.output_text.delta":
                break
        stream.close()
        wait_until(lambda: server.service.runner.counts() == (0, 0))
        assert session.runs < 2000
