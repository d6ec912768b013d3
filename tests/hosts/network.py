"""The test hosts' network: one bridge for a run of tests, one namespace a host, and no way out of either.

A host that needs package registries gets user-mode NAT (slirp4netns) in its namespace: nothing of the
machine's own routing or firewall is touched. Names carry the pid of the run that made them, so that a
later run can remove what a killed one left.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.hosts.shell import run

DNS_OF_SLIRP = "10.0.2.3"


def ip(*words: str, check: bool = True) -> str:
    """`ip WORDS`; its output."""
    return run(["ip", *words], check=check).out


def _free_subnet() -> str:
    """The first three numbers of a private /24 that no route or address of this machine uses."""
    used = ip("route", "show", "table", "all") + ip("address", "show")
    start = os.getpid() % 200
    for step in range(200):
        prefix = f"10.213.{(start + step) % 200 + 20}"
        if f"{prefix}." not in used:
            return prefix
    raise RuntimeError("every subnet of the test hosts is in use on this machine")


@dataclass
class Bridge:
    """A bridge with the address .1 of its own /24; `join` makes a host's namespace with a link to it."""

    prefix: str = field(default_factory=_free_subnet)
    tag: str = field(default_factory=lambda: f"{os.getpid():x}")
    joined: int = 0

    @property
    def name(self) -> str:
        """The bridge's interface name (at most 15 characters)."""
        return f"halob{self.tag}"

    def up(self) -> None:
        """Make it."""
        ip("link", "add", self.name, "type", "bridge")
        ip("address", "add", f"{self.prefix}.1/24", "dev", self.name)
        ip("link", "set", self.name, "up")

    def join(self) -> Link:
        """A new namespace whose host0 has the next address of the bridge's subnet."""
        self.joined += 1
        number = self.joined
        link = Link(f"halo-{self.tag}-{number}", f"halov{self.tag}x{number}", f"{self.prefix}.{number + 1}")
        ip("netns", "add", link.namespace)
        ip("link", "add", link.device, "type", "veth", "peer", "name", "host0", "netns", link.namespace)
        ip("link", "set", link.device, "master", self.name, "up")
        ip("-n", link.namespace, "address", "add", f"{link.address}/24", "dev", "host0")
        ip("-n", link.namespace, "link", "set", "host0", "up")
        ip("-n", link.namespace, "link", "set", "lo", "up")
        return link

    def down(self) -> None:
        """Remove the bridge."""
        ip("link", "delete", self.name, check=False)


@dataclass
class Link:
    """One host's namespace and its device on the bridge."""

    namespace: str
    device: str
    address: str
    nat: subprocess.Popen[bytes] | None = None

    @property
    def path(self) -> Path:
        """Where the namespace is bound in the file system."""
        return Path("/run/netns") / self.namespace

    def open_nat(self) -> None:
        """Let this namespace out through user-mode NAT; names are resolved at DNS_OF_SLIRP."""
        self.nat = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "slirp4netns", "--configure", "--ready-fd=1",
             "--netns-type=path", str(self.path), "tap0"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        if self.nat.stdout is None or self.nat.stdout.read(1) != b"1":
            raise RuntimeError("slirp4netns did not come up in the host's namespace")

    def close(self) -> None:
        """End the NAT, remove the device and the namespace."""
        if self.nat is not None:
            self.nat.kill()
            self.nat.wait()
            if self.nat.stdout is not None:
                self.nat.stdout.close()
        ip("link", "delete", self.device, check=False)
        ip("netns", "delete", self.namespace, check=False)


def sweep() -> None:
    """Remove namespaces and devices named after a process that no longer lives."""
    for namespace in re.findall(r"^halo-[0-9a-f]+-\d+", ip("netns", "list"), re.MULTILINE):
        if not lives(namespace.split("-")[1]):
            ip("netns", "delete", namespace, check=False)
    device_names = re.compile(r"^\d+: (halo[bv]([0-9a-f]+)(?:x\d+)?)[@:]", re.MULTILINE)
    for device, tag in device_names.findall(ip("-o", "link")):
        if not lives(tag):
            ip("link", "delete", device, check=False)


def lives(tag: str) -> bool:
    """Whether the process whose pid is `tag` in hexadecimal is there."""
    return Path(f"/proc/{int(tag, 16)}").exists()
