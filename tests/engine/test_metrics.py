"""What /metrics says is what was sent: prometheus_client's own parser reads it; so does the access log."""

from __future__ import annotations

import contextlib
import json
import socket
import threading

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.observer import Gauges
from engine.server.metrics import Histogram, Labels, Metrics, render
from tests.engine.ops_fixtures import operated, samples
from tests.engine.server_fixtures import (
    EOS,
    HashSession,
    ScriptedSession,
    byte_tokens,
    make_engine,
    wait_until,
)

CHAT = {"model": "halo-test", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}


def read(server) -> dict:
    answer = httpx.get(f"{server.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return samples(answer.text)


def test_every_count_is_what_was_sent(tmp_path):
    script = [*byte_tokens(b"abcdefgh"), EOS]
    with operated(make_engine(ScriptedSession(script)), tmp_path) as server:
        usages = []
        for request in ({}, {"max_tokens": 3}, {"stream": True, "stream_options": {"include_usage": True}}):
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT | request, timeout=30)
            last = answer.text.strip().split("data: ")[-2] if "stream" in request else answer.text
            usages.append(json.loads(last)["usage"])
        assert httpx.get(f"{server.url}/nothing").status_code == 404
        found = read(server)
        cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
        prompts = sum(usage["prompt_tokens"] for usage in usages)
        assert found["vllm:prompt_tokens_total", ()] == prompts
        assert found["vllm:prefix_cache_queries_total", ()] == prompts
        assert found["vllm:prefix_cache_hits_total", ()] == cached > 0
        made = sum(usage["completion_tokens"] for usage in usages)
        ends = 2  # the model's own end token, which usage does not count, came in two of the three answers
        assert made <= found["vllm:generation_tokens_total", ()] <= made + ends
        assert found["vllm:request_success_total", (("finished_reason", "stop"),)] == 2
        assert found["vllm:request_success_total", (("finished_reason", "length"),)] == 1
        assert found["vllm:request_success_total", (("finished_reason", "abort"),)] == 0
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
            assert found[f"vllm:{name}_seconds_count", ()] == 3
            assert found[f"vllm:{name}_seconds_bucket", (("le", "+Inf"),)] == 3
        assert found["vllm:num_requests_running", ()] == found["vllm:num_requests_waiting", ()] == 0
        assert 0 < found["vllm:kv_cache_usage_perc", ()] <= 1
        assert found["halo_requests_submitted_total", ()] == 3
        assert found["halo_http_requests_total", (("method", "POST"), ("status", "200"))] == 3
        assert found["halo_http_requests_total", (("method", "GET"), ("status", "404"))] == 1
        entries = {k: found["halo_step_entries_total", (("phase", k),)] for k in ("decode", "prefill")}
        assert entries["prefill"] == prompts - cached
        assert found["halo_steps_total", ()] == found["halo_step_seconds_count", ()] > 0
        build = next(labels for name, labels in found if name == "halo_build_info")
        assert {("generation", "test-generation"), ("backend", "cpu"), ("version", "9.9")} <= set(build)
        assert found["process_open_fds", ()] > 0


def test_between_tokens_is_counted_once_for_each_that_has_one_before(tmp_path):
    with operated(make_engine(ScriptedSession(byte_tokens(b"x"))), tmp_path) as server:
        body = {"model": "halo-test", "prompt": "ab", "max_tokens": 10, "ignore_eos": True}
        usage = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).json()["usage"]
        found = read(server)
        assert usage["completion_tokens"] == 10
        assert found["vllm:generation_tokens_total", ()] == 10
        assert found["vllm:inter_token_latency_seconds_count", ()] == 9


def test_what_runs_waits_is_refused_and_is_left_by_its_client_is_counted(tmp_path):
    session = ScriptedSession(byte_tokens(b"x"))
    with operated(make_engine(session), tmp_path, queue_limit=1) as server:
        session.gate.clear()
        body = json.dumps(CHAT).encode()
        clients = [_post(server.port, body) for _ in range(2)]
        wait_until(lambda: tuple(server.service.runner.gauges())[:2] == (1, 1))
        assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT).status_code == 429
        found = read(server)
        assert found["vllm:num_requests_running", ()] == found["vllm:num_requests_waiting", ()] == 1
        assert found["halo_requests_refused_total", ()] == 1
        for client in clients:
            client.close()
        session.gate.set()
        wait_until(lambda: server.service.runner.counts() == (0, 0))
        found = read(server)
        assert found["halo_requests_ended_total", (("reason", "cancelled"),)] == 2
        assert found["vllm:request_success_total", (("finished_reason", "abort"),)] == 2
        gone = [line for line in server.lines(5) if line["status"] == 499]
        assert len(gone) == 2 and all(line["finish"] == "cancelled" for line in gone)


def test_a_failing_engine_is_an_error_and_no_success(tmp_path):
    session = ScriptedSession(byte_tokens(b"x"))
    with operated(make_engine(session), tmp_path) as server:
        session.fail = True
        assert httpx.post(f"{server.url}/v1/chat/completions", json=CHAT).status_code == 500
        found = read(server)
        assert found["halo_requests_ended_total", (("reason", "error"),)] == 1
        assert sum(v for (name, _), v in found.items() if name == "vllm:request_success_total") == 0
        (line,) = [line for line in server.lines(2) if line["method"] == "POST"]
        assert (line["status"], line["finish"]) == (500, "error")


def _post(port: int, body: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


@given(st.lists(st.floats(0, 20), max_size=30))
def test_a_histogram_is_what_prometheus_says_one_is(values):
    bounds = (0.5, 1.0, 5.0)
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    pairs = histogram.cumulative()
    assert [name for name, _ in pairs] == ["0.5", "1.0", "5.0", "+Inf"]
    for (_, count), bound in zip(pairs, (*bounds, float("inf")), strict=True):
        assert count == sum(value <= bound for value in values)
    assert histogram.sum == pytest.approx(sum(values))


@given(st.text(max_size=30), st.text(max_size=30))
def test_a_model_s_name_of_any_letters_is_read_back(model, device):
    model, device = (text.encode("utf-8", "replace").decode() for text in (model, device))
    text = render(Metrics(), Gauges(0, 0, 1, 0, 0), Labels(model, {"device": device})).decode()
    for name in ("\r", "\x85", "\u2028", "\x1c", "\x0b", "\x0c", "\x1d", "\x1e", "\u2029"):
        if name in model + device:
            return  # the parser itself splits lines there; Prometheus does not
    found = samples(text)
    assert found["halo_build_info", (("device", device),)] == 1


# --- the access log


def test_a_line_has_what_a_request_took_and_no_word_of_it(tmp_path):
    with operated(make_engine(ScriptedSession([*byte_tokens(b"answered"), EOS])), tmp_path) as server:
        secret = {"Authorization": "Bearer the-secret-key", "x-request-id": "mine-1"}
        body = {"model": "halo-test", "prompt": "my private question", "max_tokens": 64}
        answer = httpx.post(f"{server.url}/v1/completions?key=hidden", json=body, headers=secret)
        assert answer.headers["x-request-id"] == "mine-1"
        (line,) = server.lines(1)
        usage = answer.json()["usage"]
        assert line["id"] == "mine-1" and line["client"] == "127.0.0.1" and line["path"] == "/v1/completions"
        assert (line["method"], line["status"], line["finish"]) == ("POST", 200, "stop")
        assert (line["tokens_in"], line["tokens_out"]) == (usage["prompt_tokens"], usage["completion_tokens"])
        assert 0 < line["first_token_seconds"] <= line["seconds"]
        text = server.log.read_text()
        assert not any(word in text for word in ("private", "answered", "secret", "hidden"))


@pytest.mark.parametrize("given_id", ["", "a b", "x" * 129, "-x", 'a"b', "é", "a\tb"])
def test_an_id_that_is_not_well_formed_is_replaced(tmp_path, given_id):
    with operated(make_engine(HashSession()), tmp_path) as server:
        headers = {"x-request-id": given_id.encode()}
        made = [httpx.get(f"{server.url}/health", headers=headers).headers["x-request-id"] for _ in range(2)]
        assert made[0] != made[1] and all(each.startswith("req_") for each in made)
        assert [line["id"] for line in server.lines(2)] == made


def test_anthropic_s_paths_have_its_name_for_the_id_too(tmp_path):
    with operated(make_engine(HashSession()), tmp_path) as server:
        answer = httpx.post(f"{server.url}/v1/messages", content=b"{")
        assert answer.status_code == 400
        assert answer.headers["request-id"] == answer.headers["x-request-id"]
        assert answer.json()["request_id"] == answer.headers["request-id"]


def test_paths_with_line_ends_stay_one_line(tmp_path):
    with operated(make_engine(HashSession()), tmp_path) as server:
        httpx.get(f"{server.url}/a%0a%22b%00{'x' * 900}")
        (line,) = server.lines(1)
        assert line["path"].startswith('/a\n"b\0x') and len(line["path"]) == 256


def test_a_reader_that_stalls_costs_lines_and_not_the_server():
    import os

    from engine.server.access import LINES_HELD, LineWriter

    reading, writing = os.pipe()
    writer = LineWriter(writing)
    for index in range(LINES_HELD + 5000):  # more than the pipe and the queue hold
        writer.write({"n": index, "filler": "x" * 200})
    lines: list[dict] = []

    def drain() -> None:
        with os.fdopen(reading) as stream:
            lines.extend(json.loads(line) for line in stream)

    thread = threading.Thread(target=drain)
    thread.start()
    wait_until(lambda: writer._lines.empty())
    writer.write({"n": "last"})
    writer.close()
    os.close(writing)
    thread.join(20)
    assert lines[-1]["n"] == "last" and lines[-1]["lines_dropped_before"] > 0
    assert len(lines) + lines[-1]["lines_dropped_before"] == LINES_HELD + 5000 + 1
    with contextlib.suppress(OSError):
        os.close(writing)
