"""Lemonade's endpoints in Lemonade's shapes, below /api/v1 and /api/v0."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import httpx
import openai
import pytest

from engine.observer import Observer
from engine.router import NpuReport
from engine.server.request_stats import StatsObserver
from engine.server.system_info import system_info
from tests.engine.server_fixtures import EOT, ScriptedSession, byte_tokens, make_engine, running

BASES = ("/api/v1", "/api/v0")


@pytest.fixture(scope="module")
def server():
    with running(make_engine(ScriptedSession([*byte_tokens(b"hello"), EOT]))) as found:
        yield found


@pytest.mark.parametrize("base", BASES)
def test_the_health_of_a_server_with_its_one_model(server, base):
    health = httpx.get(f"{server.url}{base}/health").json()
    assert health["status"] == "ok" and health["model_loaded"] == "halo-test"
    (loaded,) = health["all_models_loaded"]
    assert loaded["type"] == "llm" and loaded["device"] == "cpu" and loaded["recipe"] == "halo"
    assert loaded["recipe_options"] == {"ctx_size": 512} and loaded["backend_url"] == f"{server.url}/v1"
    assert health["max_models"]["llm"] == 1


@pytest.mark.parametrize("base", BASES)
def test_the_models_have_lemonades_fields(server, base):
    (model,) = httpx.get(f"{server.url}{base}/models?show_all=true").json()["data"]
    assert model == httpx.get(f"{server.url}{base}/models/halo-test").json()
    assert model["id"] == "halo-test" and model["downloaded"] is True and model["labels"] == []
    assert model["recipe"] == "halo" and model["context_length"] == 512
    missing = httpx.get(f"{server.url}{base}/models/other")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("base", BASES)
def test_openais_client_works_below_lemonades_paths(server, base):
    client = openai.OpenAI(base_url=server.url + base, api_key="none", max_retries=0)
    turns = [{"role": "user", "content": "hi"}]
    done = client.chat.completions.create(model="halo-test", messages=turns, temperature=0)
    assert done.choices[0].message.content == "hello"
    chunks = client.chat.completions.create(model="halo-test", messages=turns, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello"
    text = client.completions.create(model="halo-test", prompt="a", max_tokens=3)
    assert text.choices[0].text == "hel"
    assert [model.id for model in client.models.list()] == ["halo-test"]


def test_lemonades_name_of_a_field_is_understood_and_two_names_are_not(server):
    url = f"{server.url}/api/v1/completions"
    body = {"prompt": "a", "max_tokens": 2, "temperature": 0}
    assert httpx.post(url, json={**body, "repeat_penalty": 1.3}).status_code == 200
    both = httpx.post(url, json={**body, "repeat_penalty": 1.3, "repetition_penalty": 1.1})
    assert both.status_code == 400 and both.json()["error"]["param"] == "repeat_penalty"
    assert httpx.post(url, json={**body, "repeat_penalty": "much"}).status_code == 400


@pytest.mark.parametrize(
    "body",
    [b"", b"[1]", b"{", b'{"prompt": "\xff"}', b'{"repeti\xf6ion": 1}', b"[" * 50_000, b'{"a":' * 50_000],
)
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_body_that_is_none_is_refused_as_everywhere(server, path, body):
    answer = httpx.post(f"{server.url}/api/v1/{path}", content=body)
    assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("base", BASES)
def test_the_statistics_have_lemonades_fields(server, base):
    stats = httpx.get(f"{server.url}{base}/stats").json()
    assert set(stats) >= {"time_to_first_token", "tokens_per_second", "input_tokens", "output_tokens"}
    assert stats["prompt_tokens"] == stats["input_tokens"] + stats["cache_tokens"]


def test_the_statistics_count_what_an_observer_is_told():
    observer = StatsObserver()
    observer.admitted(0.0, 10, 4)
    observer.first_token(0.5)
    observer.finished("stop", 10, 5, 2.5)
    stats = observer.read()
    assert (stats.time_to_first_token, stats.tokens_per_second) == (0.5, 2.0)
    assert (stats.prompt_tokens, stats.cached_tokens, stats.output_tokens) == (10, 4, 5)
    observer.admitted(0.0, 3, 0)
    observer.finished("cancelled", 3, 0, 0.1)
    stats = observer.read()
    assert stats.time_to_first_token is None and stats.tokens_per_second is None
    assert (stats.requests_total, stats.prompt_tokens_total, stats.output_tokens_total) == (2, 13, 5)


def test_an_observer_inside_is_told_everything():
    """Prometheus' figures are counted inside this one: what is not handed on is missing on a dashboard."""
    told = []

    class Inner(Observer):
        def __getattribute__(self, name: str):
            return lambda *_: told.append(name) if name in names else object.__getattribute__(self, name)

    names = [name for name in vars(Observer) if not name.startswith("_")]
    outer = StatsObserver(Inner())
    for name in names:
        count = len(inspect.signature(getattr(Observer, name)).parameters) - 1
        getattr(outer, name)(*["stop" if name == "finished" and i == 0 else 1 for i in range(count)])
    assert told == names


# --- the machine


@pytest.mark.parametrize("base", BASES)
def test_the_system_has_its_devices_and_the_routers_targets(server, base):
    info = httpx.get(f"{server.url}{base}/system-info").json()
    assert info["devices"]["cpu"]["threads"] >= 1 and info["devices"]["amd_npu"]["available"] is False
    assert info["Physical Memory"].endswith(" GB") and info["OS Version"].startswith("Linux")
    backends = info["recipes"]["halo"]["backends"]
    assert backends["cpu"]["state"] == "installed" and backends["npu"]["state"] == "unsupported"
    assert backends["npu"]["message"] and info["recipes"]["halo"]["default_backend"] == "cpu"


def fake_root(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_the_system_of_a_strix_halo_box(server, tmp_path):
    cpu = "processor: {0}\nmodel name\t: AMD RYZEN AI MAX+ 395\nphysical id\t: 0\ncore id\t\t: {1}\n\n"
    root = fake_root(
        tmp_path,
        {
            "proc/cpuinfo": "".join(cpu.format(i, i // 2) for i in range(4)),
            "proc/meminfo": "MemTotal:       131072000 kB\n",
            "sys/class/drm/card1/device/vendor": "0x1002\n",
            "sys/class/drm/card1/device/device": "0x1586\n",
        },
    )
    npu = NpuReport(ready=True, reason="", driver_loaded=True)
    info = system_info(server.service, npu, root)
    assert info["Processor"] == "AMD RYZEN AI MAX+ 395" and info["devices"]["cpu"]["cores"] == 2
    assert info["Physical Memory"] == "125.0 GB"
    assert info["devices"]["amd_gpu"] == [{"name": "PCI 0x1002:0x1586", "available": False, "family": ""}]
    assert info["devices"]["amd_npu"]["family"] == "XDNA2" and info["devices"]["amd_npu"]["available"]
    assert info["recipes"]["halo"]["backends"]["npu"]["state"] == "unsupported", "there is no kernel"


def test_a_machine_that_tells_nothing_is_no_failure(server, tmp_path):
    info = system_info(server.service, NpuReport(False, "x"), tmp_path)
    assert json.dumps(info) and info["devices"]["cpu"]["cores"] >= 1
    assert info["devices"]["amd_gpu"] == []
