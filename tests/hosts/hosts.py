"""A test host: a Debian with its own systemd, sshd, network and disk, that can lose its power.

Its disk is an overlay above a cached root, mounted in the host's own mount namespace, so that it goes with
the host; its processes live in a process namespace of their own, so that the kernel ends all of them at once.
A host dies with the test process, whatever ends that. Not a sandbox against malice.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.hosts import machine, network
from tests.hosts.network import DNS_OF_SLIRP, Bridge, Link
from tests.hosts.shell import Result, run

BOOT_SECONDS = 60.0

_START = """
set -e
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/merged"
for group in $3; do
    mkdir -p "$group"
    echo 0 > "$group/cgroup.procs"
done
shift 3
exec "$@"
"""


@dataclass(frozen=True)
class Bind:
    """A path of the machine shown inside a host, read-only unless it is a cache."""

    source: Path
    target: str
    writable: bool = False

    def option(self) -> str:
        """systemd-nspawn's word for it."""
        return f"--bind{'' if self.writable else '-ro'}={self.source}:{self.target}"


@dataclass
class Host:
    """One host, made by `launch`. `link` is its network, `home` holds its overlay, key and console log."""

    name: str
    root: Path
    home: Path
    link: Link
    binds: tuple[Bind, ...] = ()
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        """Its address on the bridge, as seen by the machine."""
        return self.link.address

    @property
    def disk(self) -> Path:
        """The overlay's upper directory: what this host has written. Write here only while it is off."""
        return self.home / "upper"

    @property
    def cgroups(self) -> list[Path]:
        """Its own control groups, so that two hosts do not share one tree of services."""
        return [parent / self.name for parent in machine.cgroup_parents()]

    def prepare(self) -> None:
        """Lay an empty disk with a host key, root's authorized key, and a known_hosts file that pins it."""
        for part in ("upper", "work", "merged"):
            (self.home / part).mkdir(parents=True)
        ssh = self.disk / "etc" / "ssh"
        ssh.mkdir(parents=True)
        for path in (ssh / "ssh_host_ed25519_key", self.home / "key"):
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name, "-f", path])
        public = (ssh / "ssh_host_ed25519_key.pub").read_text()
        (self.home / "known_hosts").write_text(f"{self.address} {public}")
        (self.disk / "etc" / "hostname").write_text(f"{self.name}\n")
        self.authorize(Path("root"))

    def authorize(self, folder: Path) -> None:
        """Accept this host's test key for the home directory `folder` (relative to /) before it boots."""
        home = self.disk / folder
        (home / ".ssh").mkdir(parents=True)
        shutil.copy(self.home / "key.pub", home / ".ssh" / "authorized_keys")
        for path in (home, home / ".ssh"):
            path.chmod(0o700)

    def boot(self) -> float:
        """Power on, and wait until systemd says it is up; seconds taken. A failed unit is an error."""
        start = time.monotonic()
        nspawn = [
            "systemd-nspawn", "--quiet", "-D", str(self.home / "merged"), "--boot", "--console=pipe",
            f"--network-namespace-path={self.link.path}", f"--machine={self.name}", "--register=no",
            "--keep-unit", "--resolv-conf=off", "--timezone=off", "--link-journal=no",
            *(bind.option() for bind in self.binds),
        ]  # fmt: skip
        with (self.home / "console.log").open("ab") as console:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private",
                 "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "sh", "-c", _START, "sh",
                 str(self.root), str(self.home), " ".join(map(str, self.cgroups)), *nspawn],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                # systemd 258 and newer boot with version 2 alone; older ones take either.
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )  # fmt: skip
        self._wait_until_up(start + BOOT_SECONDS)
        return time.monotonic() - start

    def _wait_until_up(self, deadline: float) -> None:
        state = ""
        while time.monotonic() < deadline:
            if self.process is None or self.process.poll() is not None:
                break
            shown = self.run("systemctl is-system-running --wait", check=False, timeout=BOOT_SECONDS)
            state = shown.out.strip() or shown.err.strip()
            if shown.code == 0:
                return
            if state in ("degraded", "maintenance"):
                state += "\n" + self.run("systemctl --failed --no-pager", check=False).out
                break
            time.sleep(0.1)
        console = (self.home / "console.log").read_text(errors="replace")[-3000:]
        raise AssertionError(f"{self.name} did not come up: {state}\n{console}")

    def _ssh(self, user: str) -> list[str]:
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "HostKeyAlgorithms": "ssh-ed25519",
            "UserKnownHostsFile": str(self.home / "known_hosts"),
            "GlobalKnownHostsFile": "/dev/null",
            "ConnectTimeout": "5",
            "LogLevel": "ERROR",
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return ["ssh", "-F", "none", "-i", str(self.home / "key"), *words, f"{user}@{self.address}"]

    def run(
        self,
        command: str | Sequence[str],
        *,
        user: str = "root",
        check: bool = True,
        stdin: bytes | None = None,
        timeout: float = 600,
    ) -> Result:
        """Run a shell line, or an argument list, over ssh as `user`, in a real login session."""
        line = command if isinstance(command, str) else shlex.join(command)
        return run([*self._ssh(user), line], check=check, stdin=stdin, timeout=timeout)

    def put(self, source: Path, target: str, *, user: str = "root") -> None:
        """Copy a file to `target` in the host."""
        self.run(f"cat > {shlex.quote(target)}", user=user, stdin=source.read_bytes())

    def write(self, target: str, text: str, *, user: str = "root") -> None:
        """Write text to `target` in the host."""
        self.run(f"cat > {shlex.quote(target)}", user=user, stdin=text.encode())

    def power_cut(self) -> None:
        """Kill the whole host at once; what it had written to its disk stays, as after a real power cut."""
        if self.process is not None:
            for child in _children(self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            self.process.kill()
            self.process.wait()
            self.process = None
        for group in self.cgroups:
            _remove_group(group)

    def reboot(self) -> float:
        """Shut down in order, then boot again from the same disk; seconds of the boot."""
        self.run("systemctl poweroff", check=False, timeout=30)
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(60)
        self.power_cut()
        return self.boot()

    def remove(self) -> None:
        """Power off, and take away its control group, network and disk."""
        self.power_cut()
        self.link.close()
        shutil.rmtree(self.home, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.home.parent.rmdir()  # the last host's


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def _remove_group(group: Path) -> None:
    """Wait until a control group has no process, and remove it with the groups below."""
    for _ in range(200):
        if not group.exists():
            return
        for folder in (*sorted((p for p in group.rglob("*") if p.is_dir()), reverse=True), group):
            with contextlib.suppress(OSError):
                folder.rmdir()
        time.sleep(0.02)
    raise AssertionError(f"processes of a host that lost its power still live in {group}")


@contextlib.contextmanager
def launch(bridge: Bridge, root: Path, *, online: bool = False, users: Sequence[str] = ()) -> Iterator[Host]:
    """A booted host above `root`, removed at the end whatever happens.

    Without `online` there is no way out of it. With it, package registries are reached as the machine
    reaches them: pip's configuration, certificates and proxies are the machine's, with kept caches.
    `users` are made with a home directory, the test key and no rights.
    """
    home = machine.disks() / f"{os.getpid()}-{bridge.joined + 1}"
    if home.exists():
        shutil.rmtree(home)
    link = bridge.join()
    host = Host(link.namespace, root, home, link)
    try:
        host.prepare()
        if online:
            link.open_nat()
            host.binds = _registry_access(host.disk)
        host.boot()
        for user in users:
            _add_user(host, user)
        yield host
    finally:
        host.remove()


def _add_user(host: Host, user: str) -> None:
    home = shlex.quote(f"/home/{user}")
    host.run(
        f"useradd --create-home --shell /bin/bash {shlex.quote(user)} && cp -r /root/.ssh {home}/"
        f" && chown -R {shlex.quote(user)}: {home}"
    )


def _registry_access(disk: Path) -> tuple[Bind, ...]:
    """Write the machine's pip, proxy and name settings to a host's disk; what has to be bound there."""
    settings = machine.pip_settings()
    settings["cache-dir"] = "/var/cache/pip"
    lines = [f"{key} = {value}" for key, value in settings.items()]
    (disk / "etc" / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    (disk / "etc" / "resolv.conf").write_text(f"nameserver {DNS_OF_SLIRP}\n")
    (disk / "etc" / "environment").write_text(
        "".join(f"{name}={value}\n" for name, value in machine.proxies().items())
    )
    binds = [Bind(path, str(path)) for path in machine.local_paths(list(settings.values()))]
    for name, target in (("pip", "/var/cache/pip"), ("apt", "/var/cache/apt/archives")):
        source = machine.cache() / name
        (source / "partial").mkdir(parents=True, exist_ok=True)
        binds.append(Bind(source, target, writable=True))
    return tuple(binds)


def sweep() -> None:
    """Remove the disks, control groups and networks of hosts whose test process no longer lives."""
    folders = {machine.disks(), machine.cache() / "hosts"}
    for home in (home for folder in folders if folder.is_dir() for home in folder.iterdir()):
        if not Path(f"/proc/{home.name.split('-')[0]}").exists():
            shutil.rmtree(home, ignore_errors=True)
    for parent in machine.cgroup_parents():
        for group in parent.glob("halo-*-*"):
            if not network.lives(group.name.split("-")[1]):
                _remove_group(group)
    network.sweep()
