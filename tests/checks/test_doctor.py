"""The doctor on an installed box: a real directory, a real HTTP server. Green means tokens; lies are seen."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from checks import client, collect
from checks.case import RUN_BYTES, Case, Request
from checks.doctor import configure_doctor, exit_code, judge, main, run_doctor
from checks.facts import Facts
from checks.finding import Severity
from checks.host import parse_units
from engine.errors import HaloError
from tests.checks.boxes import Box, plain

KEY = "halo-test-key-that-must-not-be-printed"
GOLDEN = [{"prompt": "Once upon a time", "prompt_ids": [0, 5, 6], "ids": [11, 12, 13, 14]}]
UNITS = "halo-server.socket", "halo-server.service"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def install(prefix: Path, listen: str = "127.0.0.1:8180", **changes: Any) -> Path:
    """A generation as the installer lays it, with small files; returns its directory."""
    generation = prefix / "generations" / "0.1.0-abcdef012345"
    store = prefix / "state" / "models" / "sha256-00ff"
    for directory in (
        generation / "lib",
        generation / "units",
        generation / "bin",
        generation / "models",
        store,
    ):
        directory.mkdir(parents=True)
    (generation / "lib" / "libhalo_cpu.so").write_bytes(b"\x7fELF library")
    (generation / "bin" / "halo").write_text("#!/bin/sh\n")
    for name in UNITS:
        (generation / "units" / name).write_text(f"[Unit]\nDescription={name}\n")
    for name in ("model.h1b", "tokenizer.htok", "model.halo"):
        (store / name).write_bytes(name.encode() * 50)
    listed = {
        n: {"sha256": sha256(store / n), "bytes": (store / n).stat().st_size}
        for n in ("model.h1b", "tokenizer.htok")
    }
    (store / "model.json").write_text(
        json.dumps({"schema": 1, "name": "halo-demo", "files": listed, "golden": GOLDEN})
    )
    (generation / "models" / "halo-demo").symlink_to(store)
    (generation / "models" / "default").symlink_to("halo-demo")
    files = [p for d in ("lib", "units", "bin") for p in sorted((generation / d).iterdir())]
    manifest = {
        "schema": 1,
        "id": generation.name,
        "profile": "cpu",
        "scope": "user",
        "files": {str(p.relative_to(generation)): sha256(p) for p in files},
        "model": {"name": "halo-demo", "store": str(store), "golden": GOLDEN},
        "listen": listen,
        **changes,
    }
    (generation / "manifest.json").write_text(json.dumps(manifest))
    (prefix / "current").symlink_to(f"generations/{generation.name}")
    return generation


def link_units(prefix: Path, unit_dir: Path) -> None:
    unit_dir.mkdir(parents=True)
    for name in UNITS:
        (unit_dir / name).symlink_to(prefix / "current" / "units" / name)


class Server(ThreadingHTTPServer):
    """A small stand-in for halo-server: what it answers is an attribute, so that a test can make it lie."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.health: Any = {
            "status": "ok",
            "generation": "0.1.0-abcdef012345",
            "backend": "cpu",
            "model": "halo-demo",
        }
        self.completion: Any = {
            "choices": [{"text": "", "token_ids": [11, 12, 13, 14], "finish_reason": "length"}]
        }
        self.status = 200
        self.key = ""
        self.location = ""
        self.requests: list[dict[str, Any]] = []

    @property
    def listen(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, value: object) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._send(200, self.server.health)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self._send(401, {"error": {"message": "wrong key"}})
        else:
            self._send(self.server.status, self.server.completion)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


SHOW = """Id=halo-server.socket
LoadState=loaded
ActiveState=active
SubState=listening
UnitFileState=enabled
Listen=127.0.0.1:8180 (Stream)

Id=halo-server.service
LoadState=loaded
ActiveState=inactive
UnitFileState=enabled
Result=success"""


def running_box(show: str = SHOW) -> Box:
    return plain().but(
        commands={"systemctl --user show": (0, show)}, disks={"/home/ada/halo": (50_000_000_000, "rw", "/")}
    )


def case_of(
    prefix: Path, server: Server | None = None, *, box: Box | None = None, unit_dir: Path | None = None
) -> Case:
    """What the doctor would judge: the composed machine with the real directory and the real server."""
    directory = unit_dir or prefix / "unit-dir"
    if not directory.exists():
        link_units(prefix, directory)
    installed = collect.read_installed(prefix, unit_dir=directory)
    decoded = None
    if server is not None:
        decoded = client.decode_golden(
            f"http://{server.listen}", installed.golden, key=client.read_key(str(prefix)), timeout=5
        )
    facts: Facts = (box or running_box()).facts()
    return Case(
        facts, "cpu", Request("/home/ada/halo", disk_bytes=RUN_BYTES), installed=installed, decoded=decoded
    )


def roots(case: Case) -> list[str]:
    return [f.id for f in judge(case)[1].roots if f.severity is not Severity.INFO]


def test_a_fresh_install_has_no_finding(tmp_path: Path, server: Server) -> None:
    install(tmp_path)
    case = case_of(tmp_path, server)
    assert judge(case)[1].roots == ()
    assert exit_code(judge(case)[1].roots) == 0
    assert server.requests == [
        {
            "model": "halo-demo",
            "prompt": "Once upon a time",
            "max_tokens": 4,
            "temperature": 0,
            "return_token_ids": True,
        }
    ]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "library replaced": (lambda g: flip(g / "lib/libhalo_cpu.so"), "install.hash-mismatch"),
    "launcher gone": (lambda g: (g / "bin/halo").unlink(), "install.file-missing"),
    "unit edited": (lambda g: flip(g / "units/halo-server.service"), "install.hash-mismatch"),
    "model byte flipped": (lambda g: flip(g / "models/default/model.h1b"), "install.model-broken"),
    "tokenizer cut": (
        lambda g: (g / "models/default/tokenizer.htok").write_bytes(b"x"),
        "install.model-broken",
    ),
    "prepared file gone": (lambda g: (g / "models/default/model.halo").unlink(), "install.model-broken"),
    "model store gone": (lambda g: shutil.rmtree((g / "models/default").resolve()), "install.model-broken"),
    "model link gone": (lambda g: (g / "models/default").unlink(), "install.model-broken"),
    "manifest gone": (lambda g: (g / "manifest.json").unlink(), "install.manifest-broken"),
    "manifest cut": (lambda g: (g / "manifest.json").write_text('{"files": {'), "install.manifest-broken"),
    "manifest a list": (lambda g: (g / "manifest.json").write_text("[]"), "install.manifest-broken"),
    "generation gone": (lambda g: shutil.rmtree(g), "install.manifest-broken"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_on_disk_is_one_finding_with_its_cure(tmp_path: Path, server: Server, name: str) -> None:
    damage, wanted = DAMAGES[name]
    damage(install(tmp_path))
    link_units(tmp_path, tmp_path / "unit-dir")
    case = case_of(tmp_path, server)
    folded = judge(case)[1]
    assert [f.id for f in folded.roots] == [wanted]
    assert folded.roots[0].fix is not None
    assert exit_code(folded.roots) == 1


def test_damage_by_permissions_is_denied_not_missing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Root reads everything, so as root the test runs once more without the capabilities that let it."""
    generation = install(tmp_path)
    (generation / "lib").chmod(0o000)
    if os.access(generation / "lib", os.R_OK):
        assert "HALO_TEST_HELD" not in os.environ, "mode 000 is readable also without the capabilities"
        held = "-dac_override,-dac_read_search"
        argv = ["setpriv", f"--bounding-set={held}", f"--inh-caps={held}", sys.executable, "-m", "pytest"]
        again = [*argv, "-q", "-p", "no:cacheprovider", request.node.nodeid]
        env = {**os.environ, "HALO_TEST_HELD": "1"}
        done = subprocess.run(again, cwd=request.config.rootpath, env=env, capture_output=True, check=False)
        assert done.returncode == 0 and b"1 passed" in done.stdout, done.stdout.decode()
        return
    assert roots(case_of(tmp_path)) == ["install.file-denied"]


UNIT_FAULTS = {
    "socket stopped": (SHOW.replace("ActiveState=active", "ActiveState=inactive"), "service.inactive"),
    "not enabled": (
        SHOW.replace("UnitFileState=enabled", "UnitFileState=disabled", 1),
        "service.not-enabled",
    ),
    "masked": (SHOW.replace("LoadState=loaded", "LoadState=masked", 1), "service.masked"),
    "not loaded": (SHOW.replace("LoadState=loaded", "LoadState=not-found", 1), "service.unknown"),
    "server failed": (
        SHOW.replace("ActiveState=active", "ActiveState=failed").replace("=inactive", "=failed"),
        "service.failed",
    ),
}


@pytest.mark.parametrize("name", UNIT_FAULTS)
def test_a_unit_that_will_not_serve_is_one_finding_and_explains_the_silence(
    tmp_path: Path, name: str
) -> None:
    show, wanted = UNIT_FAULTS[name]
    install(tmp_path)
    with Server() as closed:
        pass
    case = case_of(tmp_path, closed if wanted != "service.not-enabled" else None, box=running_box(show))
    assert roots(case) == [wanted]


def test_a_unit_file_that_leads_elsewhere_is_found(tmp_path: Path, server: Server) -> None:
    install(tmp_path)
    link_units(tmp_path, tmp_path / "unit-dir")
    (tmp_path / "unit-dir" / UNITS[0]).unlink()
    (tmp_path / "unit-dir" / UNITS[1]).unlink()
    (tmp_path / "unit-dir" / UNITS[1]).write_text("[Service]\nExecStart=/bin/true\n")
    assert roots(case_of(tmp_path, server)) == ["service.unit-missing"]


def test_linger_off_is_a_warning(tmp_path: Path, server: Server) -> None:
    install(tmp_path)
    box = running_box().but(places={"/var/lib/systemd/linger/ada": None})
    case = case_of(tmp_path, server, box=box)
    assert roots(case) == ["service.linger-off"]
    assert exit_code(judge(case)[1].roots) == 2


def engine_that(generation: Path, script: str) -> None:
    """Give the generation a Python that is this shell script; what the engine answers is tests/engine's."""
    python = generation / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)


ENGINES = {
    "right": ("echo '{\"ids\": [11, 12, 13, 14]}'", 0, ""),
    "wrong": ("echo '{\"ids\": [11, 12, 13, 15]}'", 1, "decode.wrong-tokens"),
    "crashed": ("echo boom >&2; kill -SEGV $$", 1, "decode.engine-failed"),
    "broken": ('echo \'{"error": "no library"}\'; exit 1', 1, "decode.engine-failed"),
    "asked for the model": ('test -e "$3/model.h1b" && echo \'{"ids": [11, 12, 13, 14]}\'', 0, ""),
}


@pytest.mark.parametrize("name", ENGINES)
def test_where_no_server_is_expected_the_engine_itself_must_decode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    script, code, wanted = ENGINES[name]
    with Server() as closed:
        pass
    engine_that(install(tmp_path, closed.listen), script)
    (tmp_path / "halo.toml").write_text("units = false\n")
    assert main(["--prefix", str(tmp_path), "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert [finding["id"] for finding in report["findings"]] == ([wanted] if wanted else [])


def test_an_address_that_was_named_and_is_silent_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install(tmp_path)
    (tmp_path / "halo.toml").write_text("units = false\n")
    with Server() as closed:
        pass
    assert main(["--prefix", str(tmp_path), "--url", f"http://{closed.listen}"]) == 1
    assert "decode.no-answer" in capsys.readouterr().out


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "one wrong token": (
        {"completion": {"choices": [{"token_ids": [11, 12, 99, 14]}]}},
        "decode.wrong-tokens",
    ),
    "first token dropped": (
        {"completion": {"choices": [{"token_ids": [12, 13, 14]}]}},
        "decode.wrong-tokens",
    ),
    "no tokens": ({"completion": {"choices": [{"token_ids": []}]}}, "decode.wrong-tokens"),
    "text alone": ({"completion": {"choices": [{"text": "there was"}]}}, "decode.failed"),
    "no choices": ({"completion": {"choices": []}}, "decode.failed"),
    "not JSON": ({"completion": b"<html>"}, "decode.failed"),
    "a fault": ({"status": 500, "completion": {"error": "boom"}}, "decode.failed"),
    "another generation": (
        {"health": {"generation": "0.0.9-old", "backend": "cpu"}},
        "decode.other-generation",
    ),
    "health is no object": ({"health": [1]}, "decode.no-answer"),
    "a key is asked for": ({"key": KEY}, "decode.unauthorised"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_server_that_answers_is_not_yet_a_server_that_decodes(
    tmp_path: Path, server: Server, name: str
) -> None:
    answers, wanted = LIES[name]
    for attribute, value in answers.items():
        setattr(server, attribute, value)
    install(tmp_path)
    assert roots(case_of(tmp_path, server)) == [wanted]


def test_another_generation_with_other_tokens_is_one_root_cause(tmp_path: Path, server: Server) -> None:
    server.health = {"generation": "0.0.9-old", "backend": "cpu"}
    server.completion = {"choices": [{"token_ids": [1]}]}
    install(tmp_path)
    folded = judge(case_of(tmp_path, server))[1]
    assert [f.id for f in folded.roots] == ["decode.other-generation"]
    assert folded.consequences["decode.other-generation"] == ("decode.wrong-tokens",)


def test_the_owners_key_is_used_and_never_shown(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.key = KEY
    install(tmp_path, server.listen)
    (tmp_path / "halo.toml").write_text("units = false\n")
    (tmp_path / "api-key").write_text(KEY + "\n")
    for as_json in (False, True):
        assert run_doctor(prefix=tmp_path, as_json=as_json) == 0
    out = capsys.readouterr()
    assert KEY not in out.out + out.err


def test_the_json_report_has_its_schema(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.completion = {"choices": [{"token_ids": [1, 2, 3, 4]}]}
    install(tmp_path, server.listen)
    (tmp_path / "halo.toml").write_text("units = false\n")
    assert main(["--json", "--prefix", str(tmp_path)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["schema"], report["exit_code"]) == (1, 1)
    (finding,) = report["findings"]
    assert finding["id"] == "decode.wrong-tokens"
    assert finding["fix"]["argv"] == [["halo", "install", "--yes"]]
    assert {check["id"]: check["ok"] for check in report["checks"]} == {
        "disk": True, "install": True, "services": True, "decode": False,
    }  # fmt: skip
    assert report["facts"]["kernel"]["release"] == os.uname().release


def test_no_install_is_could_not_run_with_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prefix", str(tmp_path)]) == 3
    out = capsys.readouterr().out
    assert "halo is not installed here" in out
    assert "halo install" in out
    assert "Services" not in out, "what was not looked at has no tick"


def test_passive_asks_no_server(tmp_path: Path, server: Server) -> None:
    install(tmp_path, server.listen)
    (tmp_path / "halo.toml").write_text("units = false\n")
    assert main(["--level", "passive", "--prefix", str(tmp_path)]) == 0
    assert server.requests == []


def test_only_and_skip_choose_checks_and_findings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(install(tmp_path) / "lib/libhalo_cpu.so")
    (tmp_path / "halo.toml").write_text("units = false\n")
    prefix = ["--level", "passive", "--prefix", str(tmp_path)]
    assert main([*prefix, "--only", "disk"]) == 0
    case = case_of(tmp_path)
    assert [f.id for f in judge(case, only=["install.hash-mismatch"])[1].roots] == ["install.hash-mismatch"]
    assert judge(case, skip=["install.hash-mismatch"])[1].roots == ()
    assert judge(case, skip=["install"])[1].roots == ()
    capsys.readouterr()
    assert main([*prefix, "--only", "weather"]) == 3
    assert "--list" in capsys.readouterr().err


def test_every_finding_can_be_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--explain", "kernel.cwsr-unfixed"]) == 0
    assert "0x60000" in capsys.readouterr().out
    assert main(["--list"]) == 0
    assert "decode.wrong-tokens" in capsys.readouterr().out
    assert main(["--explain", "no.such"]) == 3


def test_evidence_cannot_drive_the_terminal(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.status, server.completion = 500, b"\x1b[2J\x1b]0;owned\x07"
    install(tmp_path, server.listen)
    (tmp_path / "halo.toml").write_text("units = false\n")
    assert main(["--prefix", str(tmp_path)]) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_a_redirect_does_not_carry_the_key_to_another_server(tmp_path: Path, server: Server) -> None:
    with Server() as other:
        thread = threading.Thread(target=other.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        server.status, server.location = 307, f"http://{other.listen}/v1/completions"
        decoded = client.decode_golden(f"http://{server.listen}", GOLDEN, key=KEY, timeout=5)
        other.shutdown()
        thread.join()
    assert (decoded.code, decoded.ids, other.requests) == (307, None, [])


@pytest.mark.parametrize(
    "manifest",
    [
        {"files": {"lib/x": None, "../../../../etc/passwd": 1, "/dev/zero": "0", "": ""}},
        {"files": {}, "model": [], "listen": 5, "profile": {"a": 1}, "scope": [], "id": {"x": 1}},
        {"files": {}, "model": {"golden": [1, {"prompt": 2}, {"prompt": "x", "ids": ["a"]}], "store": 7}},
        {"files": []},
        {},
    ],
)
def test_no_manifest_breaks_the_doctor(tmp_path: Path, server: Server, manifest: dict[str, Any]) -> None:
    generation = install(tmp_path)
    (generation / "manifest.json").write_text(json.dumps(manifest))
    case = case_of(tmp_path, server)
    findings = judge(case)[1].roots
    assert findings
    assert "check.crashed" not in {finding.id for finding in findings}
    assert run_doctor(prefix=tmp_path, level="passive") in (0, 1)


def test_urls_that_are_no_http_are_refused(tmp_path: Path) -> None:
    assert "no http URL" in client.decode_golden("file:///etc/passwd", GOLDEN).error


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        ("127.0.0.1:8180", "http://127.0.0.1:8180"),
        ("0.0.0.0:8180", "http://127.0.0.1:8180"),
        ("[::]:8180", "http://[::1]:8180"),
        ("10.0.0.7:80", "http://10.0.0.7:80"),
    ],
)
def test_the_server_is_asked_where_this_machine_reaches_it(listen: str, url: str) -> None:
    assert client.base_url(listen) == url


def test_systemctl_blocks_are_told_apart() -> None:
    units = parse_units(SHOW)
    assert [units[name].active for name in UNITS] == ["active", "inactive"]
    assert units[UNITS[0]].listen == "127.0.0.1:8180 (Stream)"


def test_the_parser_takes_what_the_command_line_promises() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    configure_doctor(parser)
    args = parser.parse_args(
        ["--json", "--level", "passive", "--only", "gpu", "--skip", "npu", "--scope", "user"]
    )
    assert (args.json, args.level, args.only, args.skip, args.scope) == (
        True,
        "passive",
        "gpu",
        "npu",
        "user",
    )


def test_a_wrong_name_is_refused_before_anything_runs() -> None:
    with pytest.raises(HaloError) as caught:
        run_doctor(only=["weather"])
    assert caught.value.exit_code == 3
