"""What an install refuses, and that it leaves the box as it was: a sentence, a hint, an exit code."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import box, hosts, roots
from tests.hosts.box import PORT
from tests.hosts.hosts import Host
from tests.hosts.network import Bridge
from tests.hosts.shell import Result

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module")
def host(bridge: Bridge, bundle: Path) -> Iterator[Host]:
    """A bare host without a network that has the source, the bundle and a user `ada`; never installed on."""
    with hosts.launch(bridge, roots.root(roots.BOOKWORM), users=["ada"]) as made:
        for user in ("root", "ada"):
            box.carry_source(made, user)
            made.put(bundle, f"{box.SOURCE}/bundle", user=user)
        yield made


def refused(host: Host, *options: str, user: str = "root", code: int = 1) -> Result:
    """Install, expecting a refusal of the right form that leaves the box as it was."""
    before = box.snapshot(host)
    result = box.install(host, *options, user=user, check=False)
    assert result.code == code, result
    said = result.err.strip().splitlines()
    assert any(line.startswith("error: ") for line in said), result
    assert any(line.startswith("hint: ") for line in said), result
    assert "Traceback" not in result.err + result.out
    assert not before ^ box.snapshot(host)
    return result


def test_missing_compiler_without_a_network(host: Host) -> None:
    """No compiler, no network, no bundle: the hint is a command of this distribution."""
    result = refused(host, "--no-units")
    assert "apt-get install" in result.out + result.err


def test_missing_compiler_for_a_user_without_a_network(host: Host) -> None:
    """The same for a person without root's rights."""
    result = refused(host, "--no-units", user="ada")
    assert "apt-get install" in result.out + result.err


def test_unknown_distribution(host: Host) -> None:
    """On a distribution that halo has no package names for it says so, and what it would have needed."""
    tools = "/usr/bin/apt-get"
    host.run("cp -a --remove-destination $(readlink -f /etc/os-release) /etc/os-release.kept")
    host.run(f"mv {tools} {tools}.away")
    host.run("rm /etc/os-release; printf 'ID=plan9\\nPRETTY_NAME=\"Plan 9\"\\n' > /etc/os-release")
    try:
        result = refused(host, "--no-units")
    finally:
        host.run(f"mv {tools}.away {tools}; rm /etc/os-release; mv /etc/os-release.kept /etc/os-release")
    assert "Plan 9" in result.out
    assert "system.distribution-unknown" in box.findings(result)


def test_port_taken(host: Host) -> None:
    """Another server on the port is named before anything is written, not found out after the switch."""
    host.run(f"systemd-run -q --unit=squatter python3 -m http.server {PORT} --bind 127.0.0.1")
    host.run(f"for i in $(seq 100); do ss -ltn | grep -q ':{PORT} ' && exit; sleep 0.1; done; exit 1")
    try:
        result = refused(host, "--bundle", "bundle")
    finally:
        host.run("systemctl stop squatter")
    assert str(PORT) in result.err


def test_read_only_prefix(host: Host) -> None:
    """A prefix on a read-only file system is refused with its name."""
    host.run("mkdir -p /srv/ro && mount -t tmpfs -o ro none /srv/ro")
    try:
        result = refused(host, "--bundle", "bundle", "--no-units", "--prefix", "/srv/ro/halo")
    finally:
        host.run("umount /srv/ro && rmdir /srv/ro")
    assert "read-only" in result.err


def test_prefix_of_another_user(host: Host) -> None:
    """A person who may not write the prefix is told so, and how to choose another."""
    result = refused(
        host, "--bundle", "bundle", "--no-units", "--scope", "user", "--prefix", "/opt/halo", user="ada"
    )
    assert "/opt" in result.err


def test_disk_too_small(host: Host) -> None:
    """A disk that cannot hold an install is refused before the first byte."""
    host.run("mkdir -p /srv/small && mount -t tmpfs -o size=64m none /srv/small")
    try:
        result = refused(host, "--bundle", "bundle", "--no-units", "--prefix", "/srv/small/halo")
        assert host.run("ls -A /srv/small").out == ""
    finally:
        host.run("umount /srv/small && rmdir /srv/small")
    assert box.findings(result) == ["disk.full"]


def test_disk_that_fills_up_on_the_way(host: Host) -> None:
    """Somebody else takes the room while the install runs: it stops, and takes away what it had made."""
    host.run("mkdir -p /srv/filling && mount -t tmpfs -o size=600m none /srv/filling")
    filler = (
        "for i in $(seq 600); do test -d /srv/filling/halo/generations/*/venv && break; sleep 0.02; done;"
        " head -c 1G /dev/zero > /srv/filling/other"
    )
    host.run(f"systemd-run -q --unit=filler sh -c {shlex.quote(filler)}")
    try:
        result = refused(host, "--bundle", "bundle", "--no-units", "--prefix", "/srv/filling/halo")
        assert host.run("ls -A /srv/filling").out.split() == ["other"]
    finally:
        host.run("systemctl stop filler; umount /srv/filling && rmdir /srv/filling")
    assert "full" in result.err.lower() or "No space left" in result.err


def test_damaged_bundle(host: Host, bundle: Path) -> None:
    """One flipped byte anywhere in the bundle ends in a sentence about a hash, and no install."""
    data = bytearray(bundle.read_bytes())
    data[len(data) * 2 // 3] ^= 0x40
    host.run(f"cat > {box.SOURCE}/damaged", stdin=bytes(data))
    refused(host, "--bundle", "damaged", "--no-units")
    host.run(f"head -c 100000 {box.SOURCE}/bundle > {box.SOURCE}/damaged")
    refused(host, "--bundle", "damaged", "--no-units")


def test_strix_halo_profile_names_each_failing_thing(host: Host) -> None:
    """On a machine that is no Strix Halo the strict profile refuses with a finding for every part."""
    result = refused(host, "--bundle", "bundle", "--profile", "strix-halo")
    old_kernel = ["kernel.too-old"] if int(os.uname().release.split(".")[0]) < 7 else []
    assert box.findings(result) == ["gpu.absent", *old_kernel, "rocm.absent"]
    assert "so also: npu.module-absent, npu.absent" in result.out


def test_the_box_still_takes_an_install(host: Host) -> None:
    """After all those refusals nothing stands in the way of the install itself."""
    box.install_from_bundle(host)
    assert box.completion(host, box.SYSTEM)
