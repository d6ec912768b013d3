"""What the doctor says of the GPU engine of an install: built, for this GPU, and the one that decodes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checks.collect import read_installed
from checks.doctor import judge, main
from checks.finding import Severity
from checks.probes import probe_engine
from tests.checks.test_doctor import Server, case_of, install, roots

BUILT: dict[str, Any] = {"hip": {"targets": ["gfx1151"], "compiler": "AMD clang version 22"}}
STRIX = {"profile": "strix-halo", "compiler": BUILT}
NO_DEVICE = "The native engine (hip) refused: there is no GPU here that the driver knows."


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that decodes on the GPU."""
    with Server() as made:
        made.health |= {"backend": "hip", "backend_reason": "", "device": "AMD Radeon 8060S"}
        thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join(10)


def test_a_gpu_engine_that_decodes_has_no_finding(tmp_path: Path, server: Server) -> None:
    install(tmp_path, **STRIX)
    assert roots(case_of(tmp_path, server)) == []


@pytest.mark.parametrize(
    ("compiler", "wanted"),
    [
        ({}, "engine.no-gpu-library"),
        (None, "engine.no-gpu-library"),
        ({"hip": None}, "engine.no-gpu-library"),
        ({"hip": {"targets": "gfx1151"}}, "engine.no-gpu-library"),
        ({"hip": {"targets": []}}, "engine.no-code-object"),
        ({"hip": {"targets": ["gfx1100", "gfx1150"]}}, "engine.no-code-object"),
        ({"hip": {"targets": [7, None]}}, "engine.no-code-object"),
    ],
)
def test_a_library_that_this_gpu_cannot_run_is_one_finding_with_its_cure(
    tmp_path: Path, server: Server, compiler: Any, wanted: str
) -> None:
    """That the CPU decodes follows from it, and is not a second thing to look at."""
    server.health |= {"backend": "cpu", "backend_reason": "there is no libhalo_hip.so here"}
    install(tmp_path, profile="strix-halo", compiler=compiler)
    folded = judge(case_of(tmp_path, server))[1]
    assert [f.id for f in folded.roots] == [wanted]
    assert folded.roots[0].severity is Severity.WARN and folded.roots[0].fix is not None
    assert folded.consequences[wanted] == ("decode.cpu-backend",)


def test_an_install_for_the_cpu_needs_no_gpu_engine(tmp_path: Path, server: Server) -> None:
    server.health |= {"backend": "cpu", "backend_reason": "there is no libhalo_hip.so here"}
    install(tmp_path, profile="cpu", compiler={})
    assert judge(case_of(tmp_path, server))[1].roots == ()


def test_wrong_tokens_are_not_hidden_by_a_missing_gpu_engine(tmp_path: Path, server: Server) -> None:
    server.completion = {"choices": [{"token_ids": [1]}]}
    install(tmp_path, profile="strix-halo", compiler={})
    assert roots(case_of(tmp_path, server)) == ["decode.wrong-tokens", "engine.no-gpu-library"]


def test_a_gpu_that_is_not_found_is_said_with_the_librarys_words(tmp_path: Path, server: Server) -> None:
    server.health |= {"backend": "cpu", "backend_reason": NO_DEVICE}
    install(tmp_path, **STRIX)
    (finding,) = judge(case_of(tmp_path, server))[1].roots
    assert (finding.id, finding.severity) == ("decode.cpu-backend", Severity.WARN)
    assert NO_DEVICE in finding.evidence[0] and "HALO_BACKEND=hip" in finding.hint


def test_the_cpu_that_was_asked_for_is_no_fault(tmp_path: Path, server: Server) -> None:
    server.health |= {"backend": "cpu", "backend_reason": "HALO_BACKEND=cpu"}
    install(tmp_path, **STRIX)
    (finding,) = judge(case_of(tmp_path, server))[1].roots
    assert (finding.id, finding.severity) == ("decode.cpu-backend", Severity.INFO)


def test_the_reason_of_an_older_server_is_simply_not_there(tmp_path: Path, server: Server) -> None:
    server.health = {"status": "ok", "generation": "0.1.0-abcdef012345", "backend": "cpu"}
    install(tmp_path, **STRIX)
    assert roots(case_of(tmp_path, server)) == ["decode.cpu-backend"]


def test_the_table_says_what_decoded(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path, server.listen)
    (tmp_path / "halo.toml").write_text("units = false\n")
    assert main(["--prefix", str(tmp_path)]) == 0
    assert "served by hip on AMD Radeon 8060S" in capsys.readouterr().out


def test_where_no_server_runs_the_engine_tells_its_backend(tmp_path: Path) -> None:
    """The probe is a child of the generation's own Python; here a script in its place."""
    generation = install(tmp_path, systemd=False, **STRIX)
    python = generation / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    answer = '{"ids": [11, 12, 13, 14], "backend": "cpu", "backend_reason": "no GPU", "device": null}'
    python.write_text(f"#!/bin/sh\necho '{answer}'\n")
    python.chmod(0o755)
    decoded = probe_engine(read_installed(tmp_path, hashes=False))
    assert decoded.ids == (11, 12, 13, 14) and decoded.by_engine
    assert decoded.health == {"backend": "cpu", "backend_reason": "no GPU"}
