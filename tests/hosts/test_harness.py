"""The test hosts themselves: if these break, no other result of this folder can be believed."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts import hosts, roots
from tests.hosts.hosts import Host
from tests.hosts.network import Bridge, ip
from tests.hosts.shell import run

pytestmark = pytest.mark.hosts

CHECKOUT = Path(__file__).resolve().parents[2]
SOCKET = """
[Socket]
ListenStream=0.0.0.0:7000
Accept=yes
[Install]
WantedBy=sockets.target
"""
SERVICE = """
[Service]
ExecStart=/bin/cat
StandardInput=socket
DynamicUser=yes
ProtectSystem=strict
PrivateTmp=yes
"""
BAD = """
[Service]
ExecStart=/bin/false
[Install]
WantedBy=multi-user.target
"""


def echoed(host: Host, text: bytes) -> bytes:
    """What the host's socket-activated `cat` sends back to the machine."""
    with socket.create_connection((host.address, 7000), timeout=20) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(100)


def test_socket_unit_survives_power_cut_and_reboot(bare: Host) -> None:
    """A hardened, socket-activated unit answers over the bridge, and again after each kind of restart."""
    bare.write("/etc/systemd/system/echo.socket", SOCKET)
    bare.write("/etc/systemd/system/echo@.service", SERVICE)
    bare.run("systemctl daemon-reload && systemctl enable --now echo.socket && sync")
    assert echoed(bare, b"one") == b"one"
    bare.power_cut()
    with pytest.raises(OSError):
        echoed(bare, b"off")
    bare.boot()
    assert echoed(bare, b"two") == b"two"
    bare.reboot()
    assert echoed(bare, b"three") == b"three"


def test_host_has_no_way_out(bare: Host) -> None:
    """An install that succeeds in such a host used nothing but what was carried in."""
    assert "default" not in bare.run("ip route").out
    lookup = "import socket; socket.getaddrinfo('debian.org', 80)"
    assert bare.run(["python3", "-c", lookup], check=False).code != 0


def test_user_session_has_its_own_systemd(bare: Host) -> None:
    """`ssh ada@host systemctl --user` works, as it does for a person who logs in."""
    assert bare.run("systemctl --user is-system-running", user="ada").out.strip() == "running"
    assert bare.run("id -un && pwd", user="ada").out.split() == ["ada", "/home/ada"]


def test_unknown_host_key_is_refused(bare: Host) -> None:
    """The harness checks host keys strictly: another key at the same address does not get a session."""
    known = bare.home / "known_hosts"
    right = known.read_text()
    try:
        other = bare.home / "other"
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other])
        known.write_text(f"{bare.address} {other.with_suffix('.pub').read_text()}")
        assert bare.run("true", check=False).code == 255
    finally:
        known.write_text(right)


def test_nothing_is_left_behind(bridge: Bridge) -> None:
    """A host that is removed while it runs leaves no process, mount, namespace, device, group or disk."""
    with hosts.launch(bridge, roots.root(roots.BOOKWORM)) as host:
        process, home, groups, link = host.process, host.home, host.cgroups, host.link
        assert isinstance(process, subprocess.Popen)
        assert groups
        assert all(group.is_dir() for group in groups)
    assert process.returncode is not None
    assert not home.exists()
    assert not any(group.exists() for group in groups)
    assert link.namespace not in ip("netns", "list")
    assert link.device not in ip("-o", "link")
    assert str(home) not in Path("/proc/self/mounts").read_text()


ORPHAN = """
import sys, time
from tests.hosts import hosts, roots
from tests.hosts.network import Bridge
bridge = Bridge()
bridge.up()
with hosts.launch(bridge, roots.root(roots.BOOKWORM)) as host:
    print(host.name, bridge.name, host.home, flush=True)
    time.sleep(600)
"""


def test_killed_test_run_takes_its_hosts_with_it() -> None:
    """SIGKILL of a test run ends its hosts at once, and the next run clears away their networks and disks."""
    killed = subprocess.Popen([sys.executable, "-c", ORPHAN], cwd=CHECKOUT, stdout=subprocess.PIPE)
    try:
        assert killed.stdout is not None
        name, device, home = killed.stdout.readline().decode().split()
        assert name in ip("netns", "list")
    finally:
        killed.kill()
        killed.communicate()
    hosts.sweep()  # fails when a process of the host still lives
    assert name not in ip("netns", "list")
    assert device not in ip("-o", "link")
    assert not Path(home).exists()


def test_failed_unit_fails_the_boot(bridge: Bridge) -> None:
    """A host that comes up degraded is reported with the name of the unit, not used as if it were well."""
    with hosts.launch(bridge, roots.root(roots.BOOKWORM)) as host:
        host.write("/etc/systemd/system/bad.service", BAD)
        host.run("systemctl enable bad.service && sync")
        host.power_cut()
        with pytest.raises(AssertionError, match=r"bad\.service"):
            host.boot()
