"""gather.sh runs on strangers' machines, over SSH, as any user: it changes nothing, survives everything."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checks.facts import SCRIPT, gather, parse
from checks.stream import State
from engine.errors import HaloError
from tests.checks.boxes import GPU, KFD, NODE

SHELLS = [
    pytest.param(
        argv, id=argv[0], marks=pytest.mark.skipif(not shutil.which(argv[0]), reason=f"no {argv[0]} here")
    )
    for argv in (["dash"], ["bash", "--posix"], ["busybox", "sh"], ["ksh"], ["zsh", "--emulate", "sh"])
]


def run(argv: list[str], *arguments: str, env: dict[str, str] | None = None) -> bytes:
    done = subprocess.run(
        [*argv, str(SCRIPT), *arguments], capture_output=True, check=False, env=env, stdin=subprocess.DEVNULL
    )
    assert done.stderr == b""
    return done.stdout


def tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for path, content in files.items():
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else (content + "\n").encode())
    return root


@pytest.mark.parametrize("shell", SHELLS)
def test_every_posix_shell_reads_this_machine_alike(
    shell: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    facts = parse(run(shell, "/", "/nonexistent/below"))
    with capsys.disabled():
        print(f"\n  gather.sh under {shell[0]}: {time.monotonic() - start:.2f} s", end="")
    assert facts.kernel.release == os.uname().release
    assert facts.kernel.machine == os.uname().machine
    assert facts.user.uid == os.getuid()
    assert facts.memory.total > 0
    assert facts.disks["/"].free > 0
    assert facts.disks["/nonexistent/below"].nearest == "/"
    assert facts.os.id


def test_a_strix_halo_is_read_from_files_alone(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "/etc/os-release": "ID=arch",
            f"{GPU}/vendor": "0x1002",
            f"{GPU}/device": "0x1586",
            f"{GPU}/class": "0x038000",
            f"{GPU}/uevent": "DRIVER=amdgpu",
            f"{GPU}/mem_info_vram_total": "536870912",
            f"{GPU}/fw_version/mes_fw_version": "0x86",
            "/sys/bus/pci/devices/0000:c6:00.1/vendor": "0x1022",
            "/sys/bus/pci/devices/0000:c6:00.1/device": "0x17f0",
            "/sys/bus/pci/devices/0000:00:00.0/vendor": "0x8086",
            NODE: KFD,
            "/opt/rocm/bin/hipcc": "x",
            "/opt/rocm/.info/version": "7.2.3-70",
            "/sys/module/amdxdna/refcnt": "1",
        },
    )
    facts = gather(["/opt"], root=root)
    assert facts.strix_halo_gpu is not None
    assert facts.strix_halo_gpu.driver == "amdgpu"
    assert facts.strix_halo_gpu.number("mem_info_vram_total") == 536870912
    assert facts.gfx1151_node is not None
    assert facts.npu is not None
    assert [(root.path, root.version) for root in facts.rocm] == [("/opt/rocm", (7, 2, 3))]
    assert facts.module_loaded("amdxdna")
    assert not facts.module_loaded("amdgpu")
    assert len(facts.pci) == 2


def test_it_writes_nothing(tmp_path: Path) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    env = {**os.environ, "HOME": str(home), "TMPDIR": str(work)}
    subprocess.run(["sh", str(SCRIPT), str(work)], check=True, cwd=work, env=env, stdout=subprocess.DEVNULL)
    assert list(home.iterdir()) == list(work.iterdir()) == []


@pytest.mark.skipif(not shutil.which("strace"), reason="no strace here")
def test_no_file_is_opened_for_writing_but_dev_null(tmp_path: Path) -> None:
    log = tmp_path / "log"
    calls = "openat,open,creat,unlink,unlinkat,rename,renameat2,mkdir,mkdirat,connect"
    strace = ["strace", "-f", "-qq", "-e", f"trace={calls}", "-o", str(log)]
    subprocess.run([*strace, "sh", str(SCRIPT), "/"], check=True, stdout=subprocess.DEVNULL)
    effects = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|creat\(|unlink|rename|mkdir|AF_INET")
    # Failed calls change nothing; a Python version manager's shim keeps a cache of its own.
    harmless = re.compile(r"/dev/null|/dev/tty| = -1 |pyenv|/\.cache")
    lines = log.read_text(errors="replace").splitlines()
    assert [line for line in lines if effects.search(line) and not harmless.search(line)] == []


def test_half_of_the_tools_missing_leaves_the_other_half_of_the_facts(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("dd", "uname"):
        (tools / name).symlink_to(shutil.which(name) or "/bin/true")
    script = SCRIPT.read_text().replace(":/usr/sbin:/sbin", "")
    copy = tmp_path / "gather.sh"
    copy.write_text(script)
    shell = shutil.which("dash") or "/bin/sh"
    done = subprocess.run([shell, str(copy), "/"], capture_output=True, check=True, env={"PATH": str(tools)})
    facts = parse(done.stdout)
    assert facts.kernel.release == os.uname().release
    assert facts.os.id
    assert facts.user.uid == -1, "unknown is not root"
    assert facts.disks["/"].free == -1, "unknown is not full"


def test_hostile_files_are_bounded_and_stay_content(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "/etc/os-release": b"ID=arch\n@end\n\x1b[2J\xff\xfe\x00\n" + b"A" * 10_000_000,
            "/proc/cmdline": b"no newline at the end",
            "/proc/meminfo": "MemTotal: 99999999999999999999999 kB",
            "/proc/self/mountinfo": b"\n" * 300_000,
            NODE: "gfx_target_version 1e9\nsimd_count " + "9" * 400,
        },
    )
    data = run(["sh"], "--root", str(root))
    assert len(data) < 400_000
    facts = parse(data)
    assert facts.os.id == "arch"
    assert facts.stream.files["/etc/os-release"].cut
    assert facts.kernel.command_line == ("no", "newline", "at", "the", "end")
    assert facts.memory.total == 0


@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="root sees all without setpriv")
def test_a_directory_that_may_not_be_searched_is_denied_not_absent(tmp_path: Path) -> None:
    root = tree(tmp_path, {"/etc/os-release": "ID=arch", "/proc/cmdline": "quiet"})
    (root / "proc").chmod(0o000)
    (root / "etc/os-release").chmod(0o000)
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.getuid() == 0 else []
    for parent in (tmp_path, *tmp_path.parents):
        if os.getuid() == 0 and parent.stat().st_uid == 0 and str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    script = Path("/tmp") / f"halo-gather-{os.getpid()}.sh"
    script.write_bytes(SCRIPT.read_bytes())
    try:
        done = subprocess.run(
            [*as_nobody, "sh", str(script), "--root", str(root)], capture_output=True, check=True, cwd="/"
        )
    finally:
        script.unlink()
        (root / "proc").chmod(0o755)
    stream = parse(done.stdout).stream
    assert stream.files["/proc/cmdline"].state is State.DENIED
    assert stream.files["/etc/os-release"].state is State.DENIED
    assert stream.files["/usr/lib/os-release"].state is State.ABSENT


def test_a_listening_port_is_seen_without_any_tool() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = [each for each in gather().listeners if each.port == port]
    assert [(each.address, each.uid) for each in found] == [("127.0.0.1", os.getuid())]


def test_this_python_is_among_those_found() -> None:
    env_path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    facts = parse(run(["sh"], env={**os.environ, "PATH": env_path}))
    assert sys.version_info[:3] in {each.version for each in facts.pythons}


def test_a_shell_that_is_not_there_is_one_clear_error() -> None:
    with pytest.raises(HaloError) as caught:
        gather(shell="/nonexistent/sh")
    assert caught.value.exit_code == 3
    assert "sh " in caught.value.hint
