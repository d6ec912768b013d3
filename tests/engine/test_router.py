"""The router's table, the NPU's report from the checks, and what a server says of both."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import httpx
import pytest

from checks import facts
from checks.npu_report import npu_report, report_of
from engine import router
from engine.errors import HaloError
from engine.router import NpuReport, Readiness, readiness, route, routes
from tests.engine.server_fixtures import EOT, ScriptedSession, byte_tokens, make_engine, running

READY = NpuReport(ready=True, reason="")
ABSENT = NpuReport(ready=False, reason="The NPU is not on the bus")
HIP = {"backend": "hip", "backend_reason": ""}
CPU = {"backend": "cpu", "backend_reason": "there is no libhalo_hip.so here"}


@pytest.mark.parametrize("ready", list(itertools.product([False, True], repeat=2)))
def test_each_phase_takes_the_first_of_its_row_that_is_ready(ready):
    npu, gpu = ready
    known = {"npu": Readiness(npu, "n"), "gpu": Readiness(gpu, "g"), "cpu": Readiness(True)}
    prefill, decode = (route(phase, known) for phase in router.TABLE)
    assert prefill.target == ("npu" if npu else "gpu" if gpu else "cpu")
    assert decode.target == ("gpu" if gpu else "cpu")
    wanted = [("npu", "n")] * (not npu) + [("gpu", "g")] * (not npu and not gpu)
    assert list(prefill.passed_over) == wanted
    assert list(decode.passed_over) == [("gpu", "g")] * (not gpu)


def test_no_npu_kernel_is_claimed():
    """An NPU that is well changes nothing while there is no kernel for it."""
    assert router.npu_kernel() is None
    for found in routes(HIP, READY):
        assert found.target == "gpu"
    assert routes(HIP, READY)[0].passed_over == (("npu", "halo has no kernel for the NPU"),)


def test_a_kernel_is_one_function_away(monkeypatch):
    monkeypatch.setattr(router, "npu_kernel", lambda: "aie2p-prefill")
    prefill, decode = routes(HIP, READY)
    assert (prefill.target, decode.target) == ("npu", "gpu")
    assert [found.target for found in routes(CPU, ABSENT)] == ["cpu", "cpu"]
    assert routes(CPU, ABSENT)[0].passed_over == (("npu", ABSENT.reason), ("gpu", CPU["backend_reason"]))


def test_a_backend_without_a_reason_still_gets_one():
    found = readiness({"backend": "cpu", "backend_reason": ""}, ABSENT, None)
    assert not found["gpu"].ready and found["gpu"].reason


def test_the_engine_asks_the_checks_through_a_door_alone():
    """engine/ must not import checks/: what it needs is a function that halo serve is given."""
    for name in ("router.py", "server/predecessor.py", "server/system_info.py", "server/service.py"):
        tree = ast.parse((Path(router.__file__).parent / name).read_text("utf-8"))
        names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        assert not [n for n in names if n.split(".")[0] in ("checks", "provision")]


# --- the checks' own report


def box(tmp_path: Path, files: dict[str, str]) -> facts.Facts:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return facts.gather(root=tmp_path)


def pci(device: str, vendor: str, kind: str, driver: str, revision: str = "0x11") -> dict[str, str]:
    base = f"sys/bus/pci/devices/0000:c5:00.{1 if vendor == '0x1022' else 0}"
    return {
        f"{base}/vendor": vendor,
        f"{base}/device": device,
        f"{base}/revision": revision,
        f"{base}/class": kind,
        f"{base}/uevent": f"DRIVER={driver}\n" if driver else "",
    }


GPU = pci("0x1586", "0x1002", "0x030000", "amdgpu", "0xc1")


def test_a_box_without_the_apu_says_so_and_not_that_its_firmware_is_wrong(tmp_path):
    nvidia = pci("0x2684", "0x10de", "0x030000", "nvidia")
    report = report_of(box(tmp_path, nvidia))
    assert not report.ready and report.reason.startswith(("There is no AMD GPU", "Whether there is a GPU"))
    assert "firmware setup" not in report.reason
    assert not report.device_node_present and not report.driver_loaded


def test_an_npu_without_its_driver_is_not_ready_and_the_reason_says_which(tmp_path):
    npu = pci("0x17f0", "0x1022", "0x118000", "")
    report = report_of(box(tmp_path, {**GPU, **npu}))
    assert not report.ready and not report.driver_loaded
    assert "amdxdna" in report.reason


def test_a_report_that_cannot_be_made_is_a_reason_and_no_failure(monkeypatch):
    def broken() -> facts.Facts:
        raise HaloError("gather.sh is missing.")

    monkeypatch.setattr(facts, "gather", broken)
    report = npu_report()
    assert not report.ready and "gather.sh is missing" in report.reason


# --- over HTTP


def test_the_status_tells_the_routes_and_the_checks_words():
    engine = make_engine(ScriptedSession([*byte_tokens(b"x"), EOT]))
    asked = []

    def probe() -> NpuReport:
        asked.append(1)
        return NpuReport(False, "The NPU driver amdxdna is not loaded", memlock_unlimited=True)

    with running(engine) as server:
        object.__setattr__(server.service, "npu", probe)
        status = httpx.get(f"{server.url}/v1/npu/status").json()
    assert asked == [1]
    assert status["ready"] is False and status["kernel"] is None
    assert status["error"] == status["reason"] == "The NPU driver amdxdna is not loaded"
    assert status["memlock_unlimited"] is True and status["amdxdna_loaded"] is False
    assert status["routes"]["prefill"]["target"] == "cpu" == status["routes"]["decode"]["target"]
    assert status["routes"]["prefill"]["passed_over"][0] == {
        "target": "npu",
        "reason": "The NPU driver amdxdna is not loaded",
    }


def test_a_server_that_was_started_without_the_checks_says_so():
    with running(make_engine(ScriptedSession([EOT]))) as server:
        status = httpx.get(f"{server.url}/v1/npu/status").json()
    assert "without the checks" in status["reason"] and status["routes"]["decode"]["target"] == "cpu"
