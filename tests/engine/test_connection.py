"""Bad and slow clients on the wire: what each can hold, and for how long; raw sockets, a live server."""

from __future__ import annotations

import json
import socket
import time

import httpx
import pytest

from engine.server import connection
from tests.engine.server_fixtures import EOS, ScriptedSession, byte_tokens, make_engine, running, wait_until

HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
FOREVER = 10**6  # a context that no test fills


def raw(server, data: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=30)
    client.sendall(data)
    return client


def rest(client: socket.socket) -> bytes:
    """All that comes until the server closes."""
    parts = []
    try:
        while part := client.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def answer_of(client: socket.socket) -> bytes:
    """One answer, its body included."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += client.recv(1 << 16)
    head, _, body = data.partition(b"\r\n\r\n")
    (length,) = (
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length")
    )
    while len(body) < length:
        body += client.recv(1 << 16)
    return head + b"\r\n\r\n" + body


@pytest.fixture
def hasty(monkeypatch):
    """A server with short limits."""
    for name, seconds in (("REQUEST_SECONDS", 0.5), ("STALL_SECONDS", 0.5), ("LINGER_SECONDS", 0.2)):
        monkeypatch.setattr(connection, name, seconds)
    with running(make_engine(ScriptedSession([*byte_tokens(b"ok"), EOS]))) as server:
        yield server


@pytest.mark.parametrize(
    "begun",
    [b"", b"GET", b"GET /health HTTP/1.1\r\nhost: local", HEALTH[:-2],
     b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{",
     b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
     b"transfer-encoding: chunked\r\n\r\n5\r\n{\"pro"],
)  # fmt: skip
def test_a_request_that_does_not_come_to_its_end_is_ended(hasty, begun):
    with raw(hasty, begun) as client:
        answer = rest(client)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 408 ")
    assert httpx.get(f"{hasty.url}/health").status_code == 200
    wait_until(lambda: not hasty.server.server_state.tasks)


def test_one_byte_at_a_time_does_not_win_more(hasty):
    with raw(hasty) as client:
        for byte in HEALTH * 100:
            try:
                client.sendall(bytes([byte]))
            except OSError:
                break
            time.sleep(0.02)
        else:
            raise AssertionError("it was never cut off")


def test_a_connection_between_two_requests_is_kept(hasty):
    with raw(hasty, HEALTH) as client:
        assert answer_of(client).startswith(b"HTTP/1.1 200 ")
        time.sleep(1.0)  # longer than a request may take to come
        client.sendall(HEALTH)
        assert answer_of(client).startswith(b"HTTP/1.1 200 ")


def test_a_second_request_that_trickles_in_is_ended_too(hasty):
    with raw(hasty, HEALTH + HEALTH[:20]) as client:
        answer = rest(client)
    assert answer.startswith(b"HTTP/1.1 200 ") and b"HTTP/1.1 408 " in answer


def test_a_reader_that_takes_nothing_is_cut_off_and_its_generation_ends(monkeypatch):
    monkeypatch.setattr(connection, "STALL_SECONDS", 0.5)
    engine = make_engine(ScriptedSession(byte_tokens(b"tick ")), context=FOREVER)
    with running(engine) as server:
        body = json.dumps(
            {"model": "halo-test", "prompt": "a", "max_tokens": FOREVER, "stream": True}
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        with client:
            client.sendall(head.encode() + body)
            wait_until(lambda: server.service.runner.counts() == (1, 0))
            (held,) = server.server.server_state.connections
            wait_until(lambda: held.flow.write_paused, 100)  # the kernel takes megabytes before
            assert held.transport.get_write_buffer_size() < 1 << 17
            wait_until(lambda: server.service.runner.counts() == (0, 0))
            wait_until(lambda: not server.server.server_state.connections)


def test_a_slow_reader_that_reads_gets_all_of_it(monkeypatch):
    monkeypatch.setattr(connection, "STALL_SECONDS", 5.0)
    script = [*byte_tokens(b"word " * 600), EOS]
    with running(make_engine(ScriptedSession(script), context=FOREVER)) as server:
        body = json.dumps(
            {"model": "halo-test", "prompt": "a", "max_tokens": FOREVER, "stream": True}
        ).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        with raw(server, head.encode() + body) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            text = b""
            while part := client.recv(1 << 15):
                text += part
                time.sleep(0.001)
        assert text.count(b"data: ") > 600 and b"data: [DONE]" in text


def test_more_connections_than_may_be_are_told_so(monkeypatch):
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 8)
    with running(make_engine(ScriptedSession([EOS]))) as server:
        held = [raw(server, HEALTH) for _ in range(8)]
        assert all(answer_of(client).startswith(b"HTTP/1.1 200 ") for client in held)
        with raw(server, HEALTH) as client:
            answer = rest(client)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: 2" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        held.pop().close()
        wait_until(lambda: len(server.server.server_state.connections) < 8)
        with raw(server, HEALTH) as client:
            assert answer_of(client).startswith(b"HTTP/1.1 200 ")
        for client in held:
            client.close()


@pytest.mark.parametrize(
    "nonsense",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
     b"GET / HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
     b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 200_000 + b"\r\n\r\n", b"\r\n" * 50 + b"\0",
     b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n"],
)  # fmt: skip
def test_what_is_no_http_is_an_error_in_json(hasty, nonsense):
    with raw(hasty) as client:
        try:
            client.sendall(nonsense)
        except OSError:
            return  # it was refused before all of it was sent
        answer = rest(client)
    if answer:
        assert answer.startswith(b"HTTP/1.1 4")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert httpx.get(f"{hasty.url}/health").status_code == 200


def test_a_body_that_goes_on_after_its_refusal_does_not_hold_the_connection(hasty):
    size = 1 << 30
    with raw(
        hasty, f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {size}\r\n\r\n".encode()
    ) as c:
        piece, sent = b" " * (1 << 20), 0
        try:
            while sent < size:
                c.sendall(piece)
                sent += len(piece)
        except OSError:
            pass
    assert sent < size
    assert httpx.get(f"{hasty.url}/health").status_code == 200


def test_a_refused_upgrade_is_an_answer(hasty):
    asked = b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
    with raw(hasty, asked) as client:
        assert answer_of(client).startswith(b"HTTP/1.1 200 ")


def test_requests_sent_ahead_are_answered_in_their_order(hasty):
    with raw(
        hasty, HEALTH * 3 + b"GET /nothing HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    ) as client:
        answer = rest(client)
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"200", b"200", b"404"]
