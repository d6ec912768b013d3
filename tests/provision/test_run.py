"""The one door to subprocesses: no caller's variables leak in, nothing outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.errors import HaloError
from provision.run import Log, minimal_env, run

SH = "/bin/sh"


def test_environment_is_minimal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "CXXFLAGS", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME"):
        monkeypatch.setenv(name, "stale")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    env = minimal_env()
    assert "stale" not in env.values()
    assert env["PIP_NO_INDEX"] == "1"
    assert env["LANG"] == "C.UTF-8"


def test_failure_is_a_sentence_with_a_pasteable_command(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    with pytest.raises(HaloError) as caught:
        run([SH, "-c", "echo noise; echo the reason >&2; exit 7"], log=log, what="It cannot be built")
    assert caught.value.message == "It cannot be built (exit 7): the reason"
    assert "/bin/sh -c 'echo noise" in caught.value.hint
    assert "noise" in (tmp_path / "log").read_text()


def test_absent_program_and_full_disk() -> None:
    with pytest.raises(HaloError, match="not found"):
        run(["/nonexistent/program"])
    with pytest.raises(HaloError, match="disk is full"):
        run([SH, "-c", "echo 'cp: No space left on device' >&2; exit 1"], what="The copy failed")


def test_stdin_is_closed() -> None:
    assert run([SH, "-c", "cat"]).stdout == ""


def test_timeout_takes_the_grandchildren_too(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    result = run([SH, "-c", f"(sleep 2; touch {mark}) & sleep 60"], timeout=0.6, check=False)
    assert result.returncode == 124
    time.sleep(2.2)
    assert not mark.exists()


def test_child_dies_with_a_killed_installer(tmp_path: Path) -> None:
    """After SIGKILL no pip may go on writing into a directory that the next run rebuilds."""
    program = (
        f"from provision.run import run; run(['/bin/sh', '-c', 'echo $$ > {tmp_path}/pid; exec sleep 60'])"
    )
    parent = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = int((tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while time.monotonic() < deadline and _alive(child):
        time.sleep(0.05)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_log_falls_back_to_the_temporary_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = Log.open(tmp_path / "file/logs", "install")
    assert log.path is not None
    log.write("a line")
    assert "a line" in log.path.read_text()
    log.close()
    log.path.unlink()
