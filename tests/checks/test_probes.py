"""A probe runs a stranger's compiler: one that hangs, floods or forks must end and leave nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from checks.probes import compiler_command, probe_compile, run_bounded
from tests.checks.boxes import Box, strix_halo


def fake_rocm(tmp_path: Path, script: str) -> Box:
    """A box whose ROCm root holds a hipcc that is this shell script."""
    root = tmp_path / "rocm"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "hipcc").write_text(f"#!/bin/sh\n{script}\n")
    (root / "bin" / "hipcc").chmod(0o755)
    return strix_halo().but(places={f"{root}/bin/hipcc": "file r-"}, rocm_roots=(str(root),))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_compile_that_makes_an_object_is_well(tmp_path: Path) -> None:
    box = fake_rocm(
        tmp_path, 'test "$1" = --offload-arch=gfx1151 && test -s probe.hip && echo object >probe.o'
    )
    probe = probe_compile(box.facts())
    assert probe is not None
    assert probe.ok, probe.tail


def test_a_compiler_that_says_well_and_makes_nothing_is_not_believed(tmp_path: Path) -> None:
    probe = probe_compile(fake_rocm(tmp_path, "exit 0").facts())
    assert probe is not None
    assert not probe.ok


def test_a_failed_compile_keeps_its_last_words(tmp_path: Path) -> None:
    probe = probe_compile(fake_rocm(tmp_path, "seq 1 500 >&2; echo 'error: no gfx1151' >&2; exit 1").facts())
    assert probe is not None
    assert (probe.code, probe.tail.split("\n")[-1]) == (1, "error: no gfx1151")
    assert len(probe.tail.split("\n")) <= 12


def test_a_compiler_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    box = fake_rocm(tmp_path, f"sleep 300 & echo $! >{pids}; echo $$ >>{pids}; wait")
    start = time.monotonic()
    probe = probe_compile(box.facts(), timeout=1.0)
    assert probe is not None
    assert probe.code == -1
    assert time.monotonic() - start < 60
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(alive(int(pid)) for pid in pids.read_text().split()):
        time.sleep(0.05)
    assert not [pid for pid in pids.read_text().split() if alive(int(pid))]


def test_a_child_that_outlives_its_compiler_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    probe = probe_compile(fake_rocm(tmp_path, f"sleep 300 & echo $! >{pids}; exit 0").facts())
    assert probe is not None
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and alive(int(pids.read_text())):
        time.sleep(0.05)
    assert not alive(int(pids.read_text()))


def test_a_flood_does_not_fill_the_memory(tmp_path: Path) -> None:
    code, tail = run_bounded(["sh", "-c", "yes | head -c 20000000; echo end"], timeout=60, cwd=tmp_path)
    assert code == 0
    assert len(tail) <= 65536
    assert tail.endswith("end")


def test_a_program_that_dies_by_a_signal_says_so(tmp_path: Path) -> None:
    code, _ = run_bounded(["sh", "-c", "kill -SEGV $$"], timeout=10, cwd=tmp_path)
    assert code == -11


def test_a_compiler_that_cannot_be_started_is_no_traceback(tmp_path: Path) -> None:
    box = fake_rocm(tmp_path, "")
    (tmp_path / "rocm/bin/hipcc").chmod(0o644)
    probe = probe_compile(box.facts())
    assert probe is not None
    assert probe.code == -2
    assert "Permission denied" in probe.tail


def test_the_probe_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(work))
    probe_compile(fake_rocm(tmp_path, "echo x >probe.o; echo y >$TMPDIR/more").facts())
    assert list(work.iterdir()) == []


def test_a_root_without_hipcc_is_asked_through_its_clang() -> None:
    box = strix_halo().but(places={"/opt/rocm/bin/hipcc": None, "/opt/rocm/llvm/bin/clang++": "file r-"})
    command = compiler_command(box.facts())
    assert command[:4] == ("/opt/rocm/llvm/bin/clang++", "-x", "hip", "--rocm-path=/opt/rocm")
    assert "--offload-arch=gfx1151" in command
