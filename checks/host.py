"""The operating system's side of the facts: distribution, kernel, tools, disks, ports, systemd, ROCm roots.

Every function is a pure reading of one or two records of the stream; none of them judges.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from checks.hardware import parse_int
from checks.stream import State, Stream

Version = tuple[int, ...]
PACKAGE_MANAGERS: Final = ("apt-get", "dnf", "pacman", "zypper", "apk")
_MANAGER_BY_ID: Final[Mapping[str, str]] = {
    **dict.fromkeys(("debian", "ubuntu"), "apt-get"),
    **dict.fromkeys(("fedora", "rhel", "centos", "nobara"), "dnf"),
    **dict.fromkeys(("arch", "cachyos", "manjaro", "endeavouros", "steamos"), "pacman"),
    **dict.fromkeys(("opensuse", "suse", "opensuse-tumbleweed", "opensuse-leap"), "zypper"),
    "alpine": "apk",
}


def version_of(text: str) -> Version:
    """The first dotted number: "g++ (Debian 12.2.0-14) 12.2.0" -> (12, 2, 0); () if there is none."""
    match = re.search(r"(?<![0-9.])[0-9]{1,9}(?:\.[0-9]{1,9}){1,3}", text, re.ASCII)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def dotted(version: Version) -> str:
    return ".".join(map(str, version)) if version else "unknown"


@dataclass(frozen=True)
class OsRelease:
    """/etc/os-release, with the package manager that the distribution is known to use ("" when unknown)."""

    id: str = ""
    id_like: tuple[str, ...] = ()
    version_id: str = ""
    codename: str = ""
    variant_id: str = ""
    pretty_name: str = ""
    manager: str = ""
    immutable: str = ""

    @property
    def known(self) -> bool:
        return bool(self.manager) or self.id == "nixos"


def parse_os_release(text: str) -> dict[str, str]:
    """KEY=value lines with shell quoting. A line that does not parse is skipped, as systemd does."""
    values: dict[str, str] = {}
    for line in text.split("\n"):
        key, equals, raw = line.strip().partition("=")
        if not equals or not re.fullmatch(r"[A-Z][A-Z0-9_]*", key):
            continue
        try:
            values[key] = "".join(shlex.split(raw)[:1])
        except ValueError:
            continue
    return values


def read_os(stream: Stream) -> OsRelease:
    """The distribution. The immutability signs come before the package manager: dnf may exist and refuse."""
    text = stream.text("/etc/os-release") or stream.text("/usr/lib/os-release")
    values = parse_os_release(text)
    ids = (values.get("ID", "").lower(), *values.get("ID_LIKE", "").lower().split())
    return OsRelease(
        id=ids[0],
        id_like=ids[1:],
        version_id=values.get("VERSION_ID", ""),
        codename=values.get("VERSION_CODENAME", ""),
        variant_id=values.get("VARIANT_ID", ""),
        pretty_name=values.get("PRETTY_NAME", "") or ids[0],
        manager=next((_MANAGER_BY_ID[each] for each in ids if each in _MANAGER_BY_ID), ""),
        immutable=_immutable(stream, ids[0]),
    )


def _immutable(stream: Stream, distribution: str) -> str:
    """The sign by which the operating system is image-based, or ""."""
    for path in ("/run/ostree-booted", "/usr/share/ublue-os/image-info.json", "/etc/NIXOS"):
        if stream.place(path).state is State.PRESENT:
            return path
    if distribution in ("steamos", "nixos"):
        return f"ID={distribution}"
    return "/usr is mounted read-only" if mount_is_read_only(stream, "/usr/bin") else ""


@dataclass(frozen=True)
class Mount:
    """One line of /proc/self/mountinfo."""

    point: str
    filesystem: str
    read_only: bool


def read_mounts(stream: Stream) -> tuple[Mount, ...]:
    mounts = []
    for line in stream.text("/proc/self/mountinfo").split("\n"):
        head, _, tail = line.partition(" - ")
        fields, ends = head.split(" "), tail.split(" ")
        if len(fields) >= 6 and len(ends) >= 3:
            point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
            options = {*fields[5].split(","), *ends[2].split(",")}
            mounts.append(Mount(point, ends[0], "ro" in options))
    return tuple(mounts)


def mount_is_read_only(stream: Stream, path: str) -> bool:
    """Whether the filesystem that holds `path` is mounted read-only. The last mount of a point wins."""
    holding = [m for m in read_mounts(stream) if f"{path}/".startswith(m.point.rstrip("/") + "/")]
    longest = max((len(mount.point) for mount in holding), default=0)
    return any([mount.read_only for mount in holding if len(mount.point) == longest][-1:])


@dataclass(frozen=True)
class Kernel:
    """uname, with the release as numbers: "7.2.12+deb14-amd64" -> (7, 2, 12)."""

    release: str = ""
    version: Version = ()
    machine: str = ""
    command_line: tuple[str, ...] = ()


def read_kernel(stream: Stream) -> Kernel:
    words = stream.output("uname").split()
    release = stream.text("/proc/sys/kernel/osrelease") or (words[1] if len(words) > 1 else "")
    return Kernel(
        release=release,
        version=version_of(release),
        machine=words[2] if len(words) > 2 else "",
        command_line=tuple(stream.text("/proc/cmdline").split()),
    )


@dataclass(frozen=True)
class Tool:
    """A program on PATH that answered --version. `works` is False when it was found and did not run."""

    name: str
    path: str
    version: Version
    works: bool


def read_tools(stream: Stream) -> dict[str, Tool]:
    tools = {}
    for name, path in stream.tools.items():
        if path:
            asked = stream.outputs.get(f"{name} --version")
            version = version_of(asked.text) if asked and asked.ok else ()
            tools[name] = Tool(name, path, version, asked is None or asked.ok)
    return tools


@dataclass(frozen=True)
class Python:
    """One interpreter on PATH and which of the modules that an install needs it has."""

    name: str
    path: str
    version: Version
    modules: Mapping[str, bool]


def read_pythons(stream: Stream) -> tuple[Python, ...]:
    found = []
    for name, path in stream.tools.items():
        answer = stream.output(f"{name} features")
        if not path or not name.startswith("python") or not answer:
            continue
        pairs = [line.split() for line in answer.split("\n")]
        values = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
        version = version_of(values.pop("version", ""))
        found.append(Python(name, path, version, {key: value == "yes" for key, value in values.items()}))
    return tuple(found)


@dataclass(frozen=True)
class Disk:
    """Free bytes at the nearest existing ancestor of `path`; -1 when df did not say."""

    path: str
    nearest: str
    free: int
    writable: bool
    read_only_filesystem: bool


def read_disks(stream: Stream) -> dict[str, Disk]:
    disks = {}
    for path, text in stream.disks.items():
        nearest = stream.disk_places.get(path, "/")
        match = re.search(r"\s([0-9]{1,18})\s+([0-9]{1,18})\s+(-?[0-9]{1,18})\s+[0-9-]+%?\s", text, re.ASCII)
        free = int(match[3]) * 1024 if match else -1
        place = stream.place(nearest)
        disks[path] = Disk(path, nearest, free, place.writable, mount_is_read_only(stream, nearest))
    return disks


@dataclass(frozen=True)
class Listener:
    """A listening TCP socket. `address` is dotted or an IPv6 hexadecimal group form."""

    address: str
    port: int
    uid: int


def read_listeners(stream: Stream) -> tuple[Listener, ...]:
    found = []
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in stream.output(name).split("\n"):
            fields = line.split()
            local = fields[1] if len(fields) > 7 else ""
            match = re.fullmatch(r"([0-9A-Fa-f]{8}|[0-9A-Fa-f]{32}):([0-9A-Fa-f]{4})", local)
            if match:
                found.append(Listener(_address(match[1]), int(match[2], 16), parse_int(fields[7], -1)))
    return tuple(found)


def _address(text: str) -> str:
    """/proc/net/tcp's address, whose 32-bit words are in little-endian byte order here."""
    words = [bytes.fromhex(text[start : start + 8])[::-1] for start in range(0, len(text), 8)]
    if len(words) == 1:
        return ".".join(str(byte) for byte in words[0])
    raw = b"".join(words)
    return ":".join(raw[start : start + 2].hex() for start in range(0, 16, 2))


@dataclass(frozen=True)
class User:
    """Who gathered: ids, the groups of the running session, and the members of render and video."""

    uid: int = -1
    name: str = ""
    groups: tuple[str, ...] = ()
    device_groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_user(stream: Stream) -> User:
    text = stream.output("id")
    who = re.search(r"uid=([0-9]{1,10})(?:\(([^)]*)\))?", text, re.ASCII)
    if not who:
        return User()
    groups = re.findall(r"[0-9]+\(([^)]*)\)", text.partition("groups=")[2])
    members = {}
    for line in stream.output("groups").split("\n"):
        fields = line.split(":")
        if len(fields) == 4:
            members[fields[0]] = tuple(name for name in fields[3].split(",") if name)
    return User(int(who[1]), who[2] or who[1], tuple(groups), members)


@dataclass(frozen=True)
class Unit:
    """What systemd says of one unit; every field is systemd's own word."""

    name: str
    load: str
    active: str
    sub: str
    enabled: str
    path: str
    listen: str
    restarts: int
    result: str


@dataclass(frozen=True)
class Systemd:
    """systemd as the gathering user meets it. `units` maps "system" and "user" to unit name -> Unit."""

    running: bool = False
    pid1: str = ""
    version: int = 0
    user_manager: bool = False
    linger: bool = False
    units: Mapping[str, Mapping[str, Unit]] = field(default_factory=dict)


def read_systemd(stream: Stream, user: User) -> Systemd:
    version = re.match(r"systemd ([0-9]{1,5})", stream.output("systemctl --version"), re.ASCII)
    show = {"system": stream.output("systemctl show"), "user": stream.output("systemctl --user show")}
    return Systemd(
        running=stream.place("/run/systemd/system").state is State.PRESENT,
        pid1=stream.text("/proc/1/comm"),
        version=int(version[1]) if version else 0,
        user_manager=stream.place(f"/run/user/{user.uid}/systemd/private").state is not State.ABSENT,
        linger=stream.place(f"/var/lib/systemd/linger/{user.name}").state is State.PRESENT,
        units={scope: parse_units(text) for scope, text in show.items()},
    )


def parse_units(text: str) -> dict[str, Unit]:
    """`systemctl show` of several units: blocks of KEY=value with an empty line between them."""
    units = {}
    for block in re.split(r"\n\s*\n", text):
        values = dict(line.partition("=")[::2] for line in block.split("\n") if "=" in line)
        listen = " ".join(line.partition("=")[2] for line in block.split("\n") if line.startswith("Listen="))
        if values.get("Id"):
            units[values["Id"]] = Unit(
                name=values["Id"],
                load=values.get("LoadState", ""),
                active=values.get("ActiveState", ""),
                sub=values.get("SubState", ""),
                enabled=values.get("UnitFileState", ""),
                path=values.get("FragmentPath", ""),
                listen=listen,
                restarts=parse_int(values.get("NRestarts", ""), 0),
                result=values.get("Result", ""),
            )
    return units


@dataclass(frozen=True)
class RocmRoot:
    """A directory that holds a HIP compiler. `version` () when nothing there says it."""

    path: str
    version: Version
    version_source: str
    hipcc: str
    clang: str
    hip_cmake: bool


def read_rocm(stream: Stream) -> tuple[RocmRoot, ...]:
    """ROCm roots in the order in which they are looked for; a root without a compiler is left out."""
    found = []
    for root in dict.fromkeys(stream.lists.get("rocm-roots", ())):
        have = {path for path in stream.places if path.startswith(root + "/")}
        clangs = [f"{root}/{each}" for each in ("bin/amdclang++", "llvm/bin/clang++", "lib/llvm/bin/clang++")]
        hipcc = f"{root}/bin/hipcc" if f"{root}/bin/hipcc" in have else ""
        clang = next((path for path in clangs if path in have), "")
        if hipcc or clang:
            version, source = _rocm_version(stream, root)
            cmake = any(path.endswith("/hip/hip-config.cmake") for path in have)
            found.append(RocmRoot(root, version, source, hipcc, clang, cmake))
    return tuple(found)


def _rocm_version(stream: Stream, root: str) -> tuple[Version, str]:
    info = f"{root}/.info/version"
    if version_of(stream.text(info)):
        return version_of(stream.text(info)), info
    for path, names in (
        (f"{root}/include/rocm-core/rocm_version.h", "ROCM_VERSION_"),
        # HIP's own number. It equals ROCm's release up to 7.2; later it runs behind (10.0 has HIP 7.15).
        (f"{root}/include/hip/hip_version.h", "HIP_VERSION_"),
    ):
        text = stream.text(path)
        parts = [re.search(rf"#define\s+{names}{part}\s+([0-9]{{1,6}})", text) for part in ("MAJOR", "MINOR")]
        if parts[0] and parts[1]:
            return (int(parts[0][1]), int(parts[1][1])), path
    return (), ""
