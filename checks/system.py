"""Can this machine take an install: Python, compiler, disk, port, distribution, systemd? Pure.

These are preflight's checks; on a box where halo already runs, only the disk is worth asking again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from checks.case import Case
from checks.finding import Confidence, Finding, Fix, Severity
from checks.host import Python, dotted
from checks.remedy import install_fix
from checks.stream import State

PYTHON_FLOOR: Final = (3, 11)
PYTHON_CEILING: Final = (3, 15)  # the first that is not supported
CMAKE_FLOOR: Final = (3, 20)
GXX_FLOOR: Final = (10,)
CLANG_FLOOR: Final = (14,)
_NEEDED: Final = ("venv", "ensurepip", "ssl", "ctypes", "lzma", "zlib")


def usable_pythons(case: Case) -> list[Python]:
    """The interpreters on PATH whose version is supported, whatever modules they lack."""
    return [p for p in case.facts.pythons if PYTHON_FLOOR <= p.version[:2] < PYTHON_CEILING]


def check_python(case: Case) -> Iterator[Finding]:
    """One interpreter with every module is enough; otherwise the nearest one is told what it lacks."""
    usable = usable_pythons(case)
    fix = install_fix(case.facts.os, "install a complete Python", "venv")
    if not usable:
        found = [f"{p.name}: {dotted(p.version)} ({p.path})" for p in case.facts.pythons]
        yield Finding(
            "python.unsupported" if found else "python.absent",
            "There is no Python 3.11 to 3.14 on PATH",
            Severity.FAIL,
            evidence=tuple(found) or ("no python3 on PATH",),
            affects="the install itself",
            fix=fix,
        )
        return
    lacking = [(p, [m for m in _NEEDED if not p.modules.get(m)]) for p in usable]
    best, missing = min(lacking, key=lambda pair: len(pair[1]))
    if missing:
        yield Finding(
            "python.feature-missing",
            f"{best.name} ({dotted(best.version)}) lacks {', '.join(missing)}",
            Severity.FAIL,
            evidence=(f"{best.path} -c 'import importlib.util': no {', '.join(missing)}",),
            affects="the virtual environment of the install",
            fix=fix,
            hint="" if fix else "Install this distribution's package with Python's venv and ensurepip.",
        )


def missing_tools(case: Case) -> list[str]:
    """The capabilities among compiler, cmake and make that this machine lacks for a native build."""
    tools = case.facts.tools
    missing = []
    compilers = [tools[name] for name in ("c++", "g++", "clang++") if name in tools and tools[name].works]
    floors = {"clang++": CLANG_FLOOR}
    if not any(each.version >= floors.get(each.name, GXX_FLOOR) or not each.version for each in compilers):
        missing.append("compiler")
    cmake = tools.get("cmake")
    if cmake is None or not cmake.works or cmake.version < CMAKE_FLOOR:
        missing.append("cmake")
    if "make" not in tools and "ninja" not in tools:
        missing.append("make")
    return missing


def check_toolchain(case: Case) -> Iterator[Finding]:
    """A C++ compiler and CMake, where sources are built; a toolchain in wheels is a fair answer."""
    missing = missing_tools(case)
    if case.request.compiler == "unneeded" or not missing:
        return
    names = {"compiler": "C++ compiler", "cmake": f"CMake {dotted(CMAKE_FLOOR)}", "make": "make or ninja"}
    seen = [
        f"{n}: {t.path} {dotted(t.version)}"
        for n, t in case.facts.tools.items()
        if n in ("c++", "g++", "clang++", "cmake")
    ]
    required = case.request.compiler == "required"
    fix = install_fix(case.facts.os, "install a compiler", *missing)
    yield Finding(
        "toolchain.no-compiler" if "compiler" in missing else "toolchain.no-cmake",
        f"There is no {' and no '.join(names[each] for each in missing)}",
        Severity.FAIL if required else Severity.INFO,
        evidence=tuple(seen) or ("no c++, g++ or clang++ on PATH",),
        affects="building the native library",
        fix=fix,
        hint=""
        if required and fix
        else "Without one, the toolchain that comes as wheels is used, or a bundle's library.",
    )


def packages_needed(case: Case) -> list[str]:
    """The capabilities that an install must take from the distribution, by what preflight sees."""
    needed = missing_tools(case) if case.request.compiler == "required" else []
    usable = usable_pythons(case)
    if usable and not any(all(p.modules.get(m) for m in _NEEDED) for p in usable):
        needed = [*needed, "venv"]
    return needed


def check_distribution(case: Case) -> Iterator[Finding]:
    """An unknown distribution only matters where something must be installed from it."""
    os = case.facts.os
    if os.known:
        return
    needed = packages_needed(case)
    said = case.facts.stream.files.get("/etc/os-release")
    yield Finding(
        "system.distribution-unknown",
        f"This distribution is not known: {os.pretty_name or 'no os-release file'}",
        Severity.FAIL if needed else Severity.WARN,
        evidence=(
            f"/etc/os-release: {'ID=' + os.id if os.id else said.state if said else State.ABSENT}",
            *(
                (f"needed from it: {', '.join(needed)}",)
                if needed
                else ("nothing has to be installed from it",)
            ),
        ),
        affects="installing packages",
        hint="Install a C++ compiler, CMake and Python's venv by hand, then run again; or use a bundle.",
    )


def check_disk(case: Case) -> Iterator[Finding]:
    """Free bytes at the prefix, and whether it can be written: read-only and denied have different cures."""
    prefix, wanted = case.request.prefix, case.request.disk_bytes
    disk = case.facts.disks.get(prefix)
    if disk is None:
        return
    if 0 <= disk.free < wanted:
        yield Finding(
            "disk.full",
            f"{prefix} has {disk.free // 1_000_000} MB free; {wanted // 1_000_000} MB are needed",
            Severity.FAIL,
            evidence=(f"df -Pk {disk.nearest}: {disk.free // 1024} KiB available",),
            affects="the install" if case.installed is None else "the next upgrade, and logs",
            depends_on=("prefix.read-only",),
            hint="Free some space there, or choose another place: halo install --prefix DIR",
        )
    if case.installed is None and not disk.writable:
        yield _not_writable(case, disk.nearest, read_only=disk.read_only_filesystem)


def _not_writable(case: Case, nearest: str, *, read_only: bool) -> Finding:
    prefix = case.request.prefix
    if read_only:
        return Finding(
            "prefix.read-only",
            f"{prefix} lies on a filesystem that is mounted read-only",
            Severity.FAIL,
            evidence=(f"/proc/self/mountinfo: the mount that holds {nearest} is ro",),
            affects="the install",
            hint="Choose a place that can be written: halo install --prefix DIR",
        )
    return Finding(
        "prefix.denied",
        f"{case.facts.user.name or 'This user'} may not write to {nearest}",
        Severity.FAIL,
        evidence=(f"access({nearest}, write): denied to uid {case.facts.user.uid}",),
        affects="the install",
        hint="Run as root for --scope system, or install for yourself: halo install --scope user",
    )


def check_port(case: Case) -> Iterator[Finding]:
    """Whether another program listens where halo-server would."""
    address, _, text = case.request.listen.rpartition(":")
    port = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0
    if not 0 < port < 65536:
        yield Finding(
            "port.invalid",
            f"{case.request.listen!r} is no address and port",
            Severity.FAIL,
            evidence=(f"--listen {case.request.listen}",),
            affects="the server",
            hint="Give one such as: --listen 127.0.0.1:8180",
        )
        return
    holders = [each for each in case.facts.listeners if each.port == port and _overlap(each.address, address)]
    if not holders or case.request.port_ours or _held_by_halo(case, port):
        return
    yield Finding(
        "port.taken",
        f"Port {port} is taken by another program",
        Severity.FAIL,
        evidence=tuple(
            f"/proc/net/tcp: {each.address}:{port} is listened on by uid {each.uid}" for each in holders
        ),
        affects="the server",
        hint=f"See who has it: ss -ltnp 'sport = :{port}'; or choose another: --listen {address}:{port + 1}",
    )


def _overlap(held: str, wanted: str) -> bool:
    """Whether a socket on `held` is in the way of one on `wanted`. A wildcard is in everybody's way."""
    wildcards = ("", "0.0.0.0", "::", "[::]", "*", ":".join(["0000"] * 8))  # noqa: S104 - compared, not bound
    loopback = {"localhost": "127.0.0.1", "[::1]": ":".join(["0000"] * 7 + ["0001"])}
    return held in wildcards or wanted in wildcards or held == loopback.get(wanted, wanted)


def _held_by_halo(case: Case, port: int) -> bool:
    """By the socket unit of this very scope: another scope's halo is another program here."""
    unit = case.facts.systemd.units.get(case.request.scope, {}).get("halo-server.socket")
    return unit is not None and unit.active == "active" and f":{port} " in f"{unit.listen} "


def check_systemd(case: Case) -> Iterator[Finding]:
    """Where there is no systemd the box works all the same; somebody must start the server."""
    systemd = case.facts.systemd
    if not case.request.units:
        return
    if not systemd.running:
        yield Finding(
            "system.no-systemd",
            "systemd does not run here: the server will not be started for you",
            Severity.INFO,
            evidence=(f"/run/systemd/system: absent; pid 1 is {systemd.pid1 or 'unknown'}",),
            affects="starting the server at boot",
            hint="Start it by hand, or from your own init: halo serve",
        )
    elif case.request.scope == "user" and not systemd.user_manager:
        user = case.facts.user
        yield Finding(
            "system.no-user-manager",
            f"{user.name or 'This user'} has no systemd user manager running",
            Severity.WARN,
            evidence=(f"/run/user/{user.uid}/systemd/private: absent",),
            affects="units of --scope user",
            confidence=Confidence.LIKELY,
            depends_on=("system.no-systemd",),
            fix=Fix(
                "start one, now and at boot",
                (("loginctl", "enable-linger", user.name),),
                needs_root=user.uid != 0,
            ),
        )
