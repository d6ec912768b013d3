"""POST /ppl on the native engine: the figure of `halo ppl`, to the last digits, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from checks.npu_report import npu_report
from tests.engine.server_fixtures import free_port, wait_until

ROOT = Path(__file__).parents[2]
TEXT = " ".join((ROOT / "docs" / "demo-model.md").read_text("utf-8").split())[:2400]


@pytest.mark.parametrize(("window", "stride"), [(200, 200), (128, 64)])
def test_it_is_the_perplexity_of_halo_ppl(
    live: str, demo: Path, native_library: Path, tmp_path: Path, window: int, stride: int
) -> None:
    (tmp_path / "text").write_text(TEXT, "utf-8")
    env = {**os.environ, "HALO_LIB_DIR": str(native_library.parent), "HALO_MODEL": str(demo)}
    command = [sys.executable, "-m", "provision.cli", "ppl", "--json", "--window", str(window)]
    command += ["--stride", str(stride), str(tmp_path / "text")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = json.loads(done.stdout)
    body = {"text": TEXT, "window": window, "stride": stride}
    found = httpx.post(f"{live}/ppl", json=body, timeout=120).json()
    assert found["tokens"] == wanted["tokens_scored"] and found["windows"] == wanted["windows"]
    assert found["mean_nll"] == pytest.approx(wanted["nats_per_token"], abs=1e-7)
    assert found["perplexity"] == pytest.approx(wanted["perplexity"], rel=1e-7)
    assert found["elapsed_ms"] > 0


def test_the_predecessors_own_fields_are_enough(live: str) -> None:
    found = httpx.post(f"{live}/ppl", json={"text": TEXT, "stride": 100, "max_tokens": 250}).json()
    assert found["tokens"] == 250 and (found["window"], found["stride"], found["windows"]) == (100, 100, 3)
    whole = httpx.post(f"{live}/ppl", json={"text": TEXT}).json()
    assert whole["window"] == 1022, "a stride of 1024 is more than the context has room for"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": ""}, "text"),
        ({"text": TEXT, "stride": 0}, "stride"),
        ({"text": TEXT, "stride": 1}, "stride"),
        ({"text": TEXT, "window": 1023}, "window"),
        ({"text": TEXT, "window": 0}, "window"),
        ({"text": TEXT, "max_tokens": 0}, "max_tokens"),
        ({"text": 5}, "text"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_name(live: str, body: dict, param: str) -> None:
    answer = httpx.post(f"{live}/ppl", json=body, timeout=120)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_halo_serve_asks_the_checks_about_the_npu(demo: Path, native_library: Path) -> None:
    """The whole command: what it says of the NPU is what the checks of this machine say."""
    port = free_port()
    env = {**os.environ, "HALO_LIB_DIR": str(native_library.parent), "HALO_MODEL": str(demo)}
    command = [sys.executable, "-m", "provision.cli", "serve", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/v1/models").status_code == 200
        return False

    try:
        wait_until(answers, 60)
        status = httpx.get(f"{url}/v1/npu/status", timeout=60).json()
        assert status["reason"] == npu_report().reason or status["reason"] == "halo has no kernel for the NPU"
        assert status["kernel"] is None and status["routes"]["decode"]["target"] in ("cpu", "gpu")
    finally:
        process.terminate()
        process.wait(30)
