"""How `halo serve` begins and ends as a process: the load, damage, the watchdog, two signals."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from engine.bench_stream import Server, free_port, halo_command, running
from engine.formats.prepared import read_directory
from engine.formats.seal import HEAD
from engine.server.watchdog import Watchdog, watchdog_seconds
from tests.engine.server_fixtures import wait_until

ROOT = Path(__file__).parents[3]
BODY = {"prompt": "Hello", "max_tokens": 4, "temperature": 0}


@contextlib.contextmanager
def started(model: Path, folder: Path, *more: str) -> Iterator[Server]:
    port = free_port()
    argv = [*halo_command(), "serve", "--listen", f"127.0.0.1:{port}", "--model", str(model), *more]
    with running("halo", argv, port, folder / "server.log") as server:
        yield server


@pytest.fixture(autouse=True)
def library(native_library: Path, monkeypatch) -> None:
    monkeypatch.setenv("HALO_LIB_DIR", str(native_library.parent))
    monkeypatch.delenv("HALO_GENERATION_DIR", raising=False)


def test_what_is_asked_during_the_load_waits_and_is_answered(demo_model, tmp_path):
    with started(demo_model, tmp_path) as server:
        server.wait_health()
        url = f"http://127.0.0.1:{server.port}"
        first = httpx.get(f"{url}/health").json()
        assert first["status"] == "ok" and first["model"] == "halo-demo" and first["context"] > 0
        answer = httpx.post(f"{url}/v1/completions", json=BODY, timeout=60)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
        last = httpx.get(f"{url}/health").json()
        assert set(first) == set(last)
        assert last["loading"] is False and last["model_mapped"] is True and last["backend"] == "cpu"


def test_the_start_imports_nothing_that_only_an_answer_needs():
    heavy = (
        "numpy",
        "starlette",
        "msgspec",
        "jinja2",
        "click",
        "tiktoken",
        "prometheus_client",
        "llguidance",
    )
    code = "import engine.server.serve, engine.server.early, sys\n"
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_uvicorn_is_whole_after_the_lean_import():
    code = (
        "import engine.server.serve, sys, logging.config, uvicorn.main\n"
        "assert callable(logging.config.dictConfig) and callable(uvicorn.main.run)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("place", ["tensor", "tokenizer", "length"])
def test_of_a_damaged_model_not_one_token_is_given(demo_model, tmp_path, place):
    model = tmp_path / "model"
    shutil.copytree(demo_model, model)
    damage(model, place)
    with started(model, tmp_path) as server:
        with contextlib.suppress(httpx.TransportError):
            while server.process.poll() is None:
                answer = httpx.post(f"http://127.0.0.1:{server.port}/v1/completions", json=BODY, timeout=60)
                assert answer.status_code == 503, answer.text
        assert server.process.wait(60) != 0
    log = (tmp_path / "server.log").read_text()
    assert "error: " in log and "hint: " in log and "Traceback" not in log and "serves" not in log


def damage(model: Path, place: str) -> None:
    path = model / ("tokenizer.htok" if place == "tokenizer" else "model.halo")
    with path.open("r+b") as file:
        if place == "length":
            file.truncate(path.stat().st_size - 4096)
            return
        entry = next(e for e in read_directory(model / "model.halo")[1] if e.offset > HEAD)
        file.seek(entry.offset + 5 if place == "tensor" else 500)  # behind what the seal's open looks at
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def test_a_new_key_is_printed_once_and_opens_a_server(demo_model, tmp_path):
    keys = tmp_path / "keys"
    made = subprocess.run(
        [*halo_command(), "serve", "--new-key", keys], capture_output=True, text=True, check=True
    )
    key = made.stdout.strip()
    assert (
        hashlib.sha256(key.encode()).hexdigest() in keys.read_text()
        and key not in keys.read_text() + made.stderr
    )
    with started(demo_model, tmp_path, "--api-keys", str(keys)) as server:
        server.wait_health()
        url = f"http://127.0.0.1:{server.port}/v1/models"
        assert httpx.get(url, timeout=30).status_code == 401  # also during the load
        assert httpx.get(url, headers={"x-api-key": key}, timeout=30).status_code == 200


def test_a_wrong_origin_is_refused_before_anything_listens(demo_model, tmp_path):
    with started(demo_model, tmp_path, "--cors-origin", "*") as server:
        assert server.process.wait(30) == 3
    assert "--cors-origin" in (tmp_path / "server.log").read_text()


# --- the watchdog and the signals, on a scripted engine whose steps take as long as the test says


@contextlib.contextmanager
def scripted(port: int, seconds: str, **env: str) -> Iterator[subprocess.Popen]:
    argv = [sys.executable, "-m", "tests.engine.server_fixtures", "127.0.0.1", str(port)]
    process = subprocess.Popen(argv, cwd=ROOT, env={**os.environ, "STEP_SECONDS": seconds, **env})
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def _answers(port: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    return False


def _ask(port: int) -> socket.socket:
    body = json.dumps({"prompt": "a", "max_tokens": 50}).encode()
    client = socket.create_connection(("127.0.0.1", port))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    client.sendall(head.encode() + body)
    return client


def test_a_step_that_hangs_stops_the_pings_and_one_that_ends_brings_them_back(tmp_path):
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(name)
        notified.settimeout(20)
        port = free_port()
        with scripted(port, "6", NOTIFY_SOCKET=name, WATCHDOG_USEC="2000000"):
            assert notified.recv(100) == b"READY=1"
            assert [notified.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
            with _ask(port):
                notified.settimeout(2.5)  # longer than systemd would wait; a step takes 6 s
                with pytest.raises(TimeoutError):
                    while True:
                        notified.recv(100)
                notified.settimeout(20)
                assert notified.recv(100) == b"WATCHDOG=1"


def test_a_second_signal_ends_it_at_once_though_a_step_hangs():
    port = free_port()
    with scripted(port, "25") as process:
        wait_until(lambda: _answers(port))
        with _ask(port):
            wait_until(lambda: httpx.get(f"http://127.0.0.1:{port}/health").json()["running"] == 1)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)  # it drains
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 128 + signal.SIGTERM


class Engine:
    def __init__(self) -> None:
        self.running, self.busy = True, 0.0

    def alive(self) -> bool:
        return self.running

    def busy_for(self) -> float:
        return self.busy


def test_the_watchdog_vouches_for_a_loop_and_an_engine_that_moves():
    said: list[str] = []
    engine, watchdog = Engine(), Watchdog(8.0, said.append)
    watchdog.tick(0.0, None)  # still loading
    watchdog.tick(1.9, engine)
    assert len(said) == 1
    watchdog.tick(2.0, engine)
    engine.busy = 3.9
    watchdog.tick(4.0, engine)
    assert len(said) == 3
    engine.busy = 4.0
    watchdog.tick(6.0, engine)
    engine.busy, engine.running = 0.0, False
    watchdog.tick(8.0, engine)
    assert len(said) == 3
    Watchdog(None, said.append).tick(99.0, None)
    assert said == ["WATCHDOG=1"] * 3


def test_systemd_s_wish_is_read_as_it_is_meant():
    own = str(os.getpid())
    assert watchdog_seconds({"WATCHDOG_USEC": "120000000", "WATCHDOG_PID": own}) == 120.0
    assert watchdog_seconds({"WATCHDOG_USEC": "5"}) == 5e-6
    for text in ("0", "x", "-1", "²", ""):
        assert watchdog_seconds({"WATCHDOG_USEC": text}) is None
    assert watchdog_seconds({}) is None
    assert watchdog_seconds({"WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"}) is None
