"""What the machine that runs the tests offers: tools, package sources, pip's configuration, cgroups.

Everything is asked of the machine at run time; no mirror, proxy or path of one machine is written here.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

from tests.hosts.shell import run

TOOLS = ("systemd-nspawn", "mmdebstrap", "ip", "ssh", "ssh-keygen", "slirp4netns", "unshare", "setpriv")


@functools.cache
def missing() -> str:
    """Why test hosts cannot run here, in a few words; an empty string when they can."""
    if os.geteuid() != 0:
        return "needs root"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def cache() -> Path:
    """The directory that keeps base roots and package caches from one run to the next."""
    chosen = os.environ.get("HALO_TEST_CACHE")
    path = Path(chosen) if chosen else Path.home() / ".cache" / "halo-tests"
    path.mkdir(parents=True, exist_ok=True)
    return path


def disks() -> Path:
    """The directory for what hosts write: in memory where there is plenty of it, else beside the base roots.

    A power cut of a host leaves either as it was; in memory the many small files of an install
    are made and removed without a disk.
    """
    memory = Path("/dev/shm")
    available = re.search(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    plenty = available is not None and int(available[1]) > 10 << 20
    if plenty and memory.is_mount() and shutil.disk_usage(memory).free > 6 << 30:
        return memory / "halo-test-hosts"
    return cache() / "hosts"


def apt_sources(suite: str) -> list[str]:
    """One-line apt sources of `suite`, derived from what this machine's own apt uses.

    Each repository of the machine is kept when it serves the suite; for a suite the machine does not follow,
    its repository of the plain release is asked for that suite. Empty where apt follows nothing: mmdebstrap
    then uses its default.
    """
    form = "$(REPO_URI) $(RELEASE)"
    shown = run(["apt-get", "indextargets", "--no-release-info", "--format", form], check=False)
    pairs = dict.fromkeys(tuple(line.split()) for line in shown.out.splitlines() if len(line.split()) == 2)
    own = [f"deb {uri} {release} main" for uri, release in pairs if release.split("-")[0] == suite]
    if own:
        return own
    plain = [uri for uri, release in pairs if "-" not in release and "/" not in release]
    return [f"deb {plain[0]} {suite} main"] if plain else []


def apt_options() -> list[str]:
    """This machine's apt settings about fetching (proxy, snapshot dates), as `Key "value"` lines."""
    shown = run(["apt-config", "dump", "Acquire"], check=False).out.splitlines()
    wanted = re.compile(r"^Acquire::(https?::|Check-Valid-Until|Check-Date|Retries)", re.IGNORECASE)
    return [line.rstrip(";") for line in shown if wanted.match(line) and '""' not in line]


def pip_settings() -> dict[str, str]:
    """pip's settings on this machine, from its files and from PIP_* variables (these win)."""
    shown = run([sys.executable, "-m", "pip", "config", "list"], check=False).out
    settings: dict[str, str] = {}
    for line in shown.splitlines():
        name, _, value = line.partition("=")
        settings[name.rsplit(".", 1)[-1].strip()] = value.strip().strip("'").replace("\\n", " ")
    return settings


def local_paths(values: list[str]) -> list[Path]:
    """The existing absolute paths and file: addresses named in `values`, each one once.

    Of a package index in files, the folder around it: its pages link to their neighbours.
    """
    found: dict[Path, None] = {}
    for word in (word for value in values for word in value.split()):
        path = Path(urlsplit(word).path).parent if word.startswith("file:") else Path(word)
        if path.is_absolute() and len(path.parts) > 2 and path.exists():
            found[path] = None
    return list(found)


def proxies() -> dict[str, str]:
    """The proxy variables of this machine's environment."""
    names = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")
    return {name: value for name, value in os.environ.items() if name.lower() in names}


def cgroup_parents() -> list[Path]:
    """The control groups under which a host's own may be made: in version 2, and in systemd's version 1 tree.

    A machine has either or both mounted; systemd-nspawn follows the one that it finds, so both are given.
    """
    groups = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    parents = []
    for mount in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, options = mount.split()[:4]
        name = "" if kind == "cgroup2" else "name=systemd"
        if kind == "cgroup2" or (kind == "cgroup" and name in options.split(",")):
            parents.append(Path(point) / groups.get(name, "/").lstrip("/"))
    return parents
