"""Anthropic's Messages API: the real anthropic client and raw HTTP against a live server over scripts."""

from __future__ import annotations

import contextlib
import json

import anthropic
import httpx
import pytest

from tests.engine.server_fixtures import (
    EOT,
    HashSession,
    ScriptedSession,
    byte_tokens,
    make_engine,
    running,
    wait_until,
)

CLIENT = httpx.Client(verify=False, timeout=30)  # one, for certificates take their time to load
HELLO = [{"role": "user", "content": "Hello"}]
PLAIN = {"model": "claude-halo", "max_tokens": 64, "messages": HELLO}
BODY = {**PLAIN, "temperature": 0}
ASK = {**PLAIN, "extra_body": {"temperature": 0}}  # the client's newest version has no temperature
WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "cache_control": {"type": "ephemeral", "ttl": "1h"},
}
CALL = b'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


@contextlib.contextmanager
def scripted(text: bytes, *, end: bool = True, context: int = 512, delay: float = 0.0, **kwargs):
    session = ScriptedSession([*byte_tokens(text), *([EOT] if end else [])], delay=delay)
    with running(make_engine(session, context), **kwargs) as server:
        yield server, session


@pytest.fixture(scope="module")
def any_server():
    """A server for requests that are refused before anything runs."""
    with scripted(b"x") as (server, _):
        yield server


def client_of(url: str, key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=30)


def events_of(url: str, body: dict) -> list[tuple[str, dict]]:
    """(event's name, its data) of a raw stream."""
    found = []
    with CLIENT.stream("POST", f"{url}/v1/messages", json={**body, "stream": True}) as stream:
        assert stream.status_code == 200, stream.read()
        assert stream.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in stream.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                found.append((name, json.loads(line.removeprefix("data: "))))
    return found


def error_of(url: str, body: object, path: str = "/v1/messages", status: int = 400) -> dict:
    """The error of a request that must fail, which must have Anthropic's form."""
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = CLIENT.post(url + path, content=content)
    assert answer.status_code == status, answer.text
    found = answer.json()
    assert set(found) == {"type", "error", "request_id"} and found["type"] == "error"
    assert set(found["error"]) == {"type", "message"}
    return found["error"]


# --- answers


def test_a_message_and_its_stream_are_the_same():
    with scripted("Grüße, 🌍!".encode()) as (server, _):
        client = client_of(server.url)
        whole = client.messages.create(**ASK)
        assert [(b.type, b.text) for b in whole.content] == [("text", "Grüße, 🌍!")]
        assert (whole.role, whole.type, whole.stop_reason) == ("assistant", "message", "end_turn")
        assert whole.id.startswith("msg_") and whole.model == "halo-test"
        with client.messages.stream(**ASK) as stream:
            text = "".join(stream.text_stream)
            final = stream.get_final_message()
        assert text == "Grüße, 🌍!"
        assert final.content[0].text == text and final.usage.output_tokens == whole.usage.output_tokens


def test_the_events_come_in_anthropics_order_and_each_names_itself():
    with scripted(b"ab") as (server, _):
        events = events_of(server.url, BODY)
    assert [name for name, _ in events] == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert all(name == data["type"] for name, data in events)
    start = events[0][1]["message"]
    assert start["usage"]["input_tokens"] > 0 and start["stop_reason"] is None and start["content"] == []
    assert events[1][1] == {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    end = events[-2][1]
    assert end["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert end["usage"]["output_tokens"] == 2
    assert end["usage"]["input_tokens"] == start["usage"]["input_tokens"]


def test_an_answer_without_text_has_no_block():
    with scripted(b"") as (server, _):
        assert client_of(server.url).messages.create(**ASK).content == []
        names = [name for name, _ in events_of(server.url, BODY)]
        assert names == ["message_start", "message_delta", "message_stop"]


def test_the_limit_is_told_from_the_contexts_end():
    with scripted(b"x", end=False, context=100) as (server, _):
        client = client_of(server.url)
        short = client.messages.create(**{**ASK, "max_tokens": 3})
        assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 3)
        full = client.messages.create(**{**ASK, "max_tokens": 10_000})
        assert full.stop_reason == "model_context_window_exceeded"
        usage = full.usage
        assert usage.input_tokens + usage.cache_read_input_tokens + usage.output_tokens == 100


def test_a_stop_sequence_is_named_and_not_sent():
    with scripted(b"one END two") as (server, _):
        client = client_of(server.url)
        for sequences in (["END"], ["never", "END"]):
            done = client.messages.create(**ASK, stop_sequences=sequences)
            assert (done.content[0].text, done.stop_reason) == ("one ", "stop_sequence")
            assert done.stop_sequence == "END"
            with client.messages.stream(**ASK, stop_sequences=sequences) as stream:
                assert "".join(stream.text_stream) == "one "
                assert stream.get_final_message().stop_sequence == "END"


def test_usage_is_a_partition_of_the_prompt():
    """What the KV cache had is not counted a second time as input: Claude Code adds the parts up."""
    long = [{"role": "user", "content": "The same long question, asked twice. " * 4}]
    with running(make_engine(HashSession())) as server:
        client = client_of(server.url)
        counted = client.messages.count_tokens(model="halo-test", messages=long).input_tokens
        for _ in range(2):
            usage = client.messages.create(**{**ASK, "messages": long, "max_tokens": 2}).usage
            parts = usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens
            assert sum(parts) == counted and min(parts) >= 0


def test_the_answer_continues_a_last_turn_of_the_assistant():
    with running(make_engine(HashSession())) as server:
        client = client_of(server.url)
        ask = {"model": "halo-test", "messages": HELLO}
        begun = [*HELLO, {"role": "assistant", "content": "The answer is ("}]
        plain = client.messages.count_tokens(**ask).input_tokens
        more = client.messages.count_tokens(model="halo-test", messages=begun).input_tokens
        assert more - plain == len(server.service.engine.tokenizer.encode("The answer is ("))
        said = error_of(server.url, {**BODY, "messages": [*HELLO, {"role": "assistant", "content": "So "}]})
        assert "white space" in said["message"]


def test_the_models_are_listed_in_the_clients_own_shape():
    with scripted(b"x") as (server, _):
        client = client_of(server.url)
        (model,) = client.models.list()
        assert (model.id, model.type) == ("halo-test", "model") and model.created_at.year >= 1970
        assert client.models.retrieve("halo-test").display_name == "halo-test"
        with pytest.raises(anthropic.NotFoundError):
            client.models.retrieve("other")
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["object"] == "model"


# --- what goes in


def test_the_system_prompt_as_text_and_as_blocks_is_the_same_prompt():
    with scripted(b"x") as (server, _):
        client = client_of(server.url)
        cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
        client.messages.create(**ASK, system=[{"type": "text", "text": "Be brief.", **cached}])
        counts = {
            client.messages.count_tokens(model="halo-test", messages=HELLO, system=system).input_tokens
            for system in ("Be brief.", [{"type": "text", "text": "Be brief.", **cached}])
        }
        assert len(counts) == 1


def test_the_line_that_counts_claude_codes_requests_is_no_part_of_the_prompt():
    """Its hash differs in each request and stands first: with it no turn would find the last in the cache."""
    with scripted(b"x") as (server, _):
        client = client_of(server.url)

        def tokens(first: list[dict], messages=HELLO) -> int:
            rest = {"type": "text", "text": "You are Claude Code."}
            asked = {"model": "halo-test", "messages": messages, "system": [*first, rest]}
            return client.messages.count_tokens(**asked).input_tokens

        line = "x-anthropic-billing-header: cc_version=2.1.117.48f; cc_entrypoint=cli; cch=71fea;"
        assert tokens([{"type": "text", "text": line}]) == tokens([])
        inline = [*HELLO, {"role": "system", "content": line}]
        assert tokens([], inline) == tokens([])


def test_a_system_turn_between_the_others_is_taken():
    """Claude Code since 2.1.154; servers that know two roles refuse every request of it."""
    turns = [*HELLO, {"role": "system", "content": "New instructions."}, *HELLO]
    with scripted(b"ok") as (server, _):
        assert client_of(server.url).messages.create(**{**ASK, "messages": turns}).content[0].text == "ok"


def test_unknown_fields_and_vendors_fields_are_tolerated():
    extra = {
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]},
        "metadata": {"user_id": "user_1"},
        "output_config": {"effort": "high"},
        "service_tier": "auto",
        "betas": ["context-management-2025-06-27"],
        "speed": "standard",
        "something_of_next_year": [1, {"a": None}],
    }
    thought = {"type": "thinking", "thinking": "hm", "signature": "x"}
    turns = [*HELLO, {"role": "assistant", "content": [thought, {"type": "text", "text": "Hi"}]}, *HELLO]
    with scripted(b"ok") as (server, _):
        answer = httpx.post(
            f"{server.url}/v1/messages?beta=true",
            json={**BODY, **extra, "messages": turns},
            headers={"anthropic-version": "2023-06-01", "anthropic-beta": "a-2025-01-01"},
        )
        assert answer.status_code == 200 and answer.json()["content"][0]["text"] == "ok"


def test_thoughts_of_earlier_answers_are_left_out():
    with scripted(b"x") as (server, _):
        client = client_of(server.url)
        thought = {"type": "thinking", "thinking": "a very long thought " * 9, "signature": "x"}
        text = {"type": "text", "text": "Hi"}

        def tokens(content: list[dict]) -> int:
            turns = [*HELLO, {"role": "assistant", "content": content}, *HELLO]
            return client.messages.count_tokens(model="halo-test", messages=turns).input_tokens

        assert tokens([thought, text]) == tokens([text])


# --- tools


def test_a_call_comes_as_a_block_of_its_own_and_goes_back_with_its_result():
    with scripted(CALL, context=2048) as (server, session):
        client = client_of(server.url)
        ask = {**ASK, "max_tokens": 200, "tools": [WEATHER]}
        whole = client.messages.create(**ask)
        assert whole.stop_reason == "tool_use"
        text, call = whole.content
        assert text.text.strip() == "Let me look."
        assert (call.type, call.name, call.input) == ("tool_use", "weather", {"city": "Bern"})
        assert call.id.startswith("toolu_")
        with client.messages.stream(**ask) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_message()
        assert "input_json" in kinds and final.content[1].input == {"city": "Bern"}
        assert final.stop_reason == "tool_use"
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Sun"}]}
        turns = [
            *HELLO,
            {"role": "assistant", "content": whole.content},
            {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
        ]
        client.messages.create(**{**ask, "messages": turns})
        tokenizer = server.service.engine.tokenizer
        prompt = tokenizer.decode([token for part in session.prefills for token in part])
        assert "Sun" in prompt and "And now?" in prompt


def test_a_call_that_the_limit_cuts_is_no_error():
    with scripted(CALL, context=2048) as (server, _):
        client = client_of(server.url)
        cut = client.messages.create(**{**ASK, "max_tokens": len(CALL) - 30, "tools": [WEATHER]})
        assert cut.stop_reason == "max_tokens"
        assert [block.type for block in cut.content] == ["text", "tool_use"]
        assert cut.content[1].input == {}


def test_without_tools_what_looks_like_a_call_is_text():
    with scripted(CALL) as (server, _):
        client = client_of(server.url)
        for extra in ({}, {"tools": [WEATHER], "tool_choice": {"type": "none"}}):
            done = client.messages.create(**{**ASK, "max_tokens": 200, **extra})
            assert [block.type for block in done.content] == ["text"] and done.stop_reason == "end_turn"


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ({"tool_choice": {"type": "tool", "name": "nobody"}, "tools": [WEATHER]}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "never"}, "tools": [WEATHER]}, "tool_choice"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"mcp_servers": [{"type": "url", "url": "http://x", "name": "x"}]}, "mcp_servers"),
        ({"container": "c"}, "container"),
    ],
)
def test_tools_that_cannot_be_are_refused_by_name(any_server, extra, where):
    said = error_of(any_server.url, {**BODY, **extra})
    assert said["type"] == "invalid_request_error" and where in said["message"]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]},
        {"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "a"}]},
        {"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": ""}}]},
        {"role": "user", "content": [{"type": "document", "source": {"type": "url", "url": "x"}}]},
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "image"}]}],
        },
        {"role": "user", "content": [{"type": "server_tool_use", "id": "a"}]},
        {"role": "robot", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": 5},
    ],
)
def test_blocks_that_cannot_be_read_are_refused_by_their_place(any_server, turn):
    said = error_of(any_server.url, {**BODY, "messages": [turn]})
    assert said["type"] == "invalid_request_error" and "messages[0]" in said["message"]


# --- errors


@pytest.mark.parametrize("field", ["model", "max_tokens", "messages"])
def test_what_is_required_is_named(any_server, field):
    body = {name: value for name, value in BODY.items() if name != field}
    assert field in error_of(any_server.url, body)["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", "many"),
        ("temperature", 1.5),
        ("top_p", -0.1),
        ("top_k", -1),
        ("stop_sequences", [""]),
        ("stop_sequences", "END"),
        ("messages", []),
        ("system", 7),
        ("stream", "yes"),
    ],
)
def test_what_is_out_of_its_range_is_named(any_server, field, value):
    said = error_of(any_server.url, {**BODY, field: value})
    assert said["type"] == "invalid_request_error" and field in said["message"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model": "\xff"}', b"[" * 100_000])
def test_a_body_that_is_no_request_is_refused(any_server, path, body):
    assert error_of(any_server.url, body, path)["type"] == "invalid_request_error"


def test_a_prompt_that_is_too_long_is_anthropics_own_error_and_can_be_counted():
    """By these words Claude Code knows that it has to compact."""
    long = [{"role": "user", "content": "word " * 400}]
    with scripted(b"x", context=128) as (server, _):
        client = client_of(server.url)
        with pytest.raises(anthropic.BadRequestError) as info:
            client.messages.create(**{**ASK, "messages": long})
        message = info.value.body["error"]["message"]
        count = client.messages.count_tokens(model="halo-test", messages=long).input_tokens
        words = message.split()
        assert message.startswith("prompt is too long: ") and message.endswith("tokens > 127 maximum")
        assert 127 < int(words[4]) == count


def test_statuses_are_the_clients_own_exceptions():
    with scripted(b"x", key_digests=[bytes(32)]) as (server, _), pytest.raises(anthropic.AuthenticationError):
        client_of(server.url).messages.create(**ASK)
    with scripted(b"x") as (server, _):
        with pytest.raises(anthropic.NotFoundError):
            client_of(server.url).messages.create(**{**ASK, "model": "gpt-9"})
        assert error_of(server.url, {}, "/v1/messages/batches", 404)["type"] == "not_found_error"
        assert httpx.get(f"{server.url}/v1/messages").json()["error"]["type"] == "invalid_request_error"
        huge = b'{"model": "' + b"x" * (9 << 20)
        assert error_of(server.url, huge, status=413)["type"] == "request_too_large"


def test_a_request_has_an_id_in_its_header_and_in_its_error():
    with scripted(b"x") as (server, _):
        good = httpx.post(f"{server.url}/v1/messages", json=BODY)
        bad = httpx.post(f"{server.url}/v1/messages", json={})
        assert good.headers["request-id"] and good.headers["request-id"] != bad.headers["request-id"]
        assert bad.json()["request_id"] == bad.headers["request-id"]
        with pytest.raises(anthropic.NotFoundError) as info:
            client_of(server.url).messages.create(**{**ASK, "model": "gpt-9"})
        assert info.value.request_id


def test_a_failure_inside_a_stream_is_an_event():
    with scripted(b"abc") as (server, session):
        session.fail = True
        events = events_of(server.url, BODY)
        name, data = events[-1]
        assert name == "error" and data["error"]["type"] == "api_error" and data["type"] == "error"
        assert client_of(server.url).messages.create(**ASK).stop_reason == "end_turn"


def test_a_reader_who_leaves_ends_the_work():
    with scripted(b"x", end=False, delay=0.01, context=2048) as (server, session):
        body = {**BODY, "max_tokens": 2000, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/messages", json=body, timeout=30) as stream:
            next(stream.iter_lines())
        wait_until(lambda: server.service.runner.counts()[0] == 0)
        assert session.runs < 1000


def test_a_stream_that_waits_says_nothing_before_its_start(monkeypatch):
    """Anthropic's clients refuse a ping before message_start; a comment keeps the connection alive."""
    monkeypatch.setattr("engine.server.service.PING_SECONDS", 0.02)
    with scripted(b"ok") as (server, session):
        session.gate.clear()
        with httpx.stream("POST", f"{server.url}/v1/messages", json={**BODY, "stream": True}) as stream:
            lines = stream.iter_lines()
            waited = [line for _, line in zip(range(6), lines, strict=False)]
            session.gate.set()
            rest = list(lines)
    names = [line for line in [*waited, *rest] if line.startswith("event: ")]
    assert any(line.startswith(":") or line == "event: ping" for line in waited)
    assert names[0] == "event: message_start" and names[-1] == "event: message_stop"
