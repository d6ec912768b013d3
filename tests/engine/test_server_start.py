"""How the server starts, is guarded and ends: keys, addresses, sockets from systemd, signals."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import HaloError
from engine.server.keys import key_is_known, read_keys
from engine.server.sockets import activated_sockets, bind, is_local, parse_listen, refuse_open_address
from tests.engine.server_fixtures import (
    EOS,
    ScriptedSession,
    byte_tokens,
    free_port,
    make_engine,
    running,
    wait_until,
)

ROOT = Path(__file__).parents[2]
CHAT = {"model": "halo-test", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}


def client_of(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


# --- keys


def test_without_the_right_key_only_health_answers(tmp_path):
    keys = tmp_path / "keys"
    digest = hashlib.sha256(b"secret").hexdigest()
    keys.write_text(f"# mine\n\n{digest.upper()}  # laptop\n{hashlib.sha256(b'other').hexdigest()}\n")
    engine = make_engine(ScriptedSession([*byte_tokens(b"ok"), EOS]))
    with running(engine, key_digests=read_keys(keys)) as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        wrong = ["Bearer wrong", "Basic secret", f"Bearer {digest}", "Bearer", b"Bearer \xff", "secret"]
        for headers in ({}, *({"Authorization": value} for value in wrong)):
            answer = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        with pytest.raises(openai.AuthenticationError):
            client_of(server.url, "wrong").models.list()
        for key in ("secret", "other"):
            assert client_of(server.url, key).chat.completions.create(**CHAT).choices


@pytest.mark.parametrize("content", ["", "# nothing\n", "abc\n", "secret\n", "f" * 63 + "\n"])
def test_a_key_file_that_lets_nobody_in_is_refused_at_start(tmp_path, content):
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(HaloError) as info:
        read_keys(path)
    assert str(path) in info.value.message and info.value.hint
    with pytest.raises(HaloError):
        read_keys(tmp_path / "absent")


@given(st.text(), st.text())
def test_a_key_is_known_only_if_it_is_the_same(key, other):
    digests = [hashlib.sha256(key.encode("utf-8")).digest()]
    assert key_is_known(key, digests)
    assert key_is_known(other, digests) == (key == other)


# --- addresses and sockets


@pytest.mark.parametrize(
    ("text", "expected"),
    [("127.0.0.1:8180", ("127.0.0.1", 8180)), ("[::1]:80", ("::1", 80)), ("localhost:0", ("localhost", 0))],
)
def test_addresses_are_read(text, expected):
    assert parse_listen(text) == expected


@pytest.mark.parametrize(
    "text", ["", "8180", ":8180", "1.2.3.4:", "1.2.3.4:x", "h:70000", "::1:80", "h:-1", "h:²"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(HaloError):
        parse_listen(text)


def test_a_taken_port_is_a_sentence_that_tells_how_to_find_the_holder():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(HaloError) as info:
            bind("127.0.0.1", port)
        assert str(port) in info.value.message and "ss -ltnp" in info.value.hint
        assert info.value.exit_code == 3


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "\udcff"])
def test_an_address_that_is_not_ours_is_refused(host):
    with pytest.raises(HaloError):
        bind(host, 0)


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("127.9.9.9", True), ("0.0.0.0", False)])
def test_whether_others_reach_a_socket_is_read_from_the_socket(host, local):
    sockets = bind(host, 0)
    try:
        assert is_local(sockets[0]) is local
        with contextlib.nullcontext() if local else pytest.raises(HaloError, match="API keys"):
            refuse_open_address(sockets)
    finally:
        sockets[0].close()


def test_localhost_is_every_loopback_address_that_this_machine_has():
    sockets = bind("localhost", free_port())
    try:
        assert "127.0.0.1" in {sock.getsockname()[0] for sock in sockets}
        assert all(is_local(sock) for sock in sockets)
    finally:
        for sock in sockets:
            sock.close()


def test_sockets_meant_for_another_process_are_left_alone():
    assert activated_sockets({"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1"}) == []
    assert activated_sockets({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"}) == []
    assert activated_sockets({}) == []


# --- as a process: signals, activation, notification


def _spawn(*args: str, env: dict[str, str] | None = None, **kwargs) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.engine.server_fixtures", *args]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, stderr=subprocess.PIPE, **kwargs
    )


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_sigterm_lets_a_stream_end_then_exits_0():
    port = free_port()
    process = _spawn("127.0.0.1", str(port), env={"STEP_SECONDS": "0.02"})
    try:
        wait_until(lambda: _answers(port))
        request = {**CHAT, "stream": True, "max_tokens": 50}
        lines = []
        with httpx.stream(
            "POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=request, timeout=30
        ) as stream:
            for line in stream.iter_lines():
                lines.append(line)
                if len(lines) == 5:
                    process.send_signal(signal.SIGTERM)
        assert "data: [DONE]" in lines
        assert '"finish_reason":"length"' in "".join(lines)
        assert process.wait(20) == 0
    finally:
        _end(process)


def test_a_stream_that_does_not_end_in_time_is_told_and_does_not_hold_up_the_shutdown(monkeypatch):
    monkeypatch.setattr("engine.server.serve.DRAIN_SECONDS", 1)
    engine = make_engine(ScriptedSession(byte_tokens(b"tick "), delay=0.02), context=10**6)
    with running(engine) as server:
        stream = client_of(server.url, "x").chat.completions.create(**CHAT, stream=True)
        next(iter(stream))
        server.server.should_exit = True
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        wait_until(lambda: server.service.runner.counts() == (0, 0))


def test_ctrl_c_exits_130():
    port = free_port()
    process = _spawn("127.0.0.1", str(port))
    try:
        wait_until(lambda: _answers(port))
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
    finally:
        _end(process)


def test_a_socket_from_systemd_is_used_and_readiness_is_told(tmp_path):
    listener = bind("127.0.0.1", 0)[0]
    port = listener.getsockname()[1]
    notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notified.bind(f"\0halo-test-{os.getpid()}")
    notified.settimeout(20)
    process = _activated(listener, f"@halo-test-{os.getpid()}")
    try:
        assert notified.recv(100) == b"READY=1"
        assert _answers(port)
        process.send_signal(signal.SIGTERM)
        assert notified.recv(100) == b"STOPPING=1"
        assert process.wait(20) == 0
    finally:
        notified.close()
        listener.close()
        _end(process)


def test_an_open_socket_from_systemd_needs_keys_too():
    listener = bind("0.0.0.0", 0)[0]
    process = _activated(listener, "")
    try:
        assert process.wait(20) == 3
        assert b"API keys" in process.stderr.read()
    finally:
        listener.close()
        _end(process)


def _activated(listener: socket.socket, notify: str) -> subprocess.Popen[bytes]:
    """Start the server as systemd does: the socket is descriptor 3, LISTEN_PID is the server's own."""
    shell = 'exec 3<&"$0" && LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
    command = ["bash", "-c", shell, str(listener.fileno()), sys.executable, "-m"]
    return subprocess.Popen(
        [*command, "tests.engine.server_fixtures", "127.0.0.1", "1"],
        cwd=ROOT, env={**os.environ, "NOTIFY_SOCKET": notify}, pass_fds=[listener.fileno()],
        stderr=subprocess.PIPE,
    )  # fmt: skip


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait(10)
    if process.stderr:
        process.stderr.close()
