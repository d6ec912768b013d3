"""Conversations as LibreChat, Open WebUI and Claude Code hold them: the shapes of their request bodies.

Where the bodies come from stands in each file of bodies/.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.engine.server_fixtures import EOT, ScriptedSession, byte_tokens, make_engine, running

BODIES = Path(__file__).with_name("bodies")


def requests_of(name: str) -> list[dict[str, Any]]:
    return json.loads((BODIES / f"{name}.json").read_text("utf-8"))["requests"]


def filled(body: dict[str, Any], model: str, answer: str = "") -> dict[str, Any]:
    """The body with the model's name, and with the answer before where the conversation goes on."""
    text = json.dumps(body).replace('"MODEL"', json.dumps(model)).replace('"ANSWER"', json.dumps(answer))
    return json.loads(text)


def chunks_of(client: httpx.Client, request: dict[str, Any], body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    headers = request.get("headers", {})
    with client.stream("POST", request["path"], json=body, headers=headers) as stream:
        assert stream.status_code == 200, stream.read()
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def answer_of(chunks: list[dict[str, Any]], *, usage: bool) -> str:
    """The text of a chat stream, whose shape is what @langchain/openai and Open WebUI take apart."""
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert len({chunk["id"] for chunk in chunks}) == 1
    ended = [chunk for chunk in chunks if chunk["choices"]]
    assert ended[-1]["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls")
    if usage:
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] >= 0
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in ended)


@pytest.mark.parametrize("application", ["librechat", "open_webui"])
def test_a_conversation_of(application: str, live: str) -> None:
    model, answer = "", ""
    with httpx.Client(base_url=live, timeout=120) as client:
        for request in requests_of(application):
            if request["method"] == "GET":
                listed = client.get(request["path"], headers=request.get("headers", {})).json()
                model = listed["data"][0]["id"]
                assert listed["object"] == "list" and listed["data"][0]["object"] == "model"
                continue
            body = filled(request["body"], model, answer)
            if body["stream"]:
                answer = answer_of(chunks_of(client, request, body), usage="stream_options" in body)
                continue
            found = client.post(request["path"], json=body)
            assert found.status_code == 200, (request["what"], found.text)
            message = found.json()["choices"][0]["message"]
            if request["answer"] == "call":
                (call,) = message["tool_calls"]
                assert call["function"]["name"] == "extract"
                assert isinstance(json.loads(call["function"]["arguments"])["title"], str)
            else:
                assert isinstance(message["content"], str)


def events_of(client: httpx.Client, request: dict[str, Any], body: dict[str, Any]) -> list[dict[str, Any]]:
    with client.stream("POST", request["path"], json=body, headers=request["headers"]) as stream:
        assert stream.status_code == 200, stream.read()
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines]


def test_claude_code_on_a_model_that_holds_its_prompt() -> None:
    """A stand-in for the weights alone: the demo model's context is shorter than Claude Code's prompt."""
    turn, _, _ = requests_of("claude_code")
    call = b'I read it.\n<tool_call>\n{"name": "Read", "arguments": {"file_path": "README.md"}}\n</tool_call>'
    session = ScriptedSession([*byte_tokens(call), EOT])
    with (
        running(make_engine(session, context=8192)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        events = events_of(client, turn, turn["body"])
        kinds = [event["type"] for event in events]
        assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
        assert events[0]["message"]["usage"]["input_tokens"] > 100
        starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
        assert [block["type"] for block in starts] == ["text", "tool_use"] and starts[1]["name"] == "Read"
        parts = [
            event["delta"]["partial_json"]
            for event in events
            if event["type"] == "content_block_delta" and event["delta"]["type"] == "input_json_delta"
        ]
        assert json.loads("".join(parts)) == {"file_path": "README.md"}
        assert events[-2]["delta"]["stop_reason"] == "tool_use"
        again = json.loads(json.dumps(turn["body"]).replace("cch=36ee5", "cch=0aaa9"))
        usage = events_of(client, turn, again)[0]["message"]["usage"]
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == sum(
            events[0]["message"]["usage"][name] for name in ("input_tokens", "cache_read_input_tokens")
        )


def test_claude_code_on_the_demo_model(live: str) -> None:
    """The long prompt is refused in words by which Claude Code compacts; the small question is answered."""
    turn, question, count = requests_of("claude_code")
    with httpx.Client(base_url=live, timeout=120) as client:
        long = json.loads(json.dumps(turn["body"]).replace("Nothing to do.", "Nothing to do. " * 600))
        refused = client.post(turn["path"], json=long, headers=turn["headers"])
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"].startswith("prompt is too long: ")
        events = events_of(client, question, question["body"])
        text = "".join(
            event["delta"].get("text", "") for event in events if event["type"] == "content_block_delta"
        )
        assert isinstance(json.loads(text)["isNewTopic"], bool)
        counted = client.post(count["path"], json=count["body"], headers=count["headers"]).json()
        assert counted["input_tokens"] > 0
