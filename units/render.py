"""Render the systemd units of a generation from the templates beside this file. Writes nothing."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Final, Literal

from engine.errors import HaloError

SOCKET: Final = "halo-server.socket"
SERVICE: Final = "halo-server.service"
UNIT_NAMES: Final = (SOCKET, SERVICE)
CREDENTIAL: Final = "api-keys"
# What the kernel does with namespaces. Where a user may make none, systemd could not start a unit with these.
_NEEDS_NAMESPACES: Final = (
    "PrivateUsers=", "PrivateTmp=", "PrivateNetwork=", "PrivateIPC=", "PrivateDevices=", "ProtectSystem=",
    "ProtectHome=", "ProtectProc=", "ProcSubset=", "ProtectClock=", "ProtectHostname=",
    "ProtectKernelModules=", "ProtectKernelTunables=", "ProtectControlGroups=", "DevicePolicy=",
    "DeviceAllow=", "CapabilityBoundingSet=",  # without a user namespace a user may not drop from it
)  # fmt: skip
_TEMPLATES: Final = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class UnitContext:
    """What the units depend on: `listen` is ADDR:PORT, `api_keys` the hashed keys (None on loopback).

    `namespaces` is False where a user's systemd may make none; the unit then has what works without them.
    """

    scope: Literal["system", "user"]
    profile: Literal["cpu", "strix-halo"]
    prefix: Path
    listen: str
    api_keys: Path | None = None
    namespaces: bool = True


def render_units(context: UnitContext) -> dict[str, str]:
    """The unit files by name. Raises HaloError for a prefix that no unit file can express."""
    _check_path(context.prefix)
    values = {
        "prefix": str(context.prefix),
        "listen": context.listen,
        "exec_start": _exec_start(context),
        "ip_rules": _ip_rules(context),
        "devices": _devices(context),
        **_runtime_values(context),
        **_scope_values(context),
    }
    texts = {name: Template((_TEMPLATES / name).read_text()).substitute(values) for name in UNIT_NAMES}
    return texts if context.namespaces else {name: _without_namespaces(text) for name, text in texts.items()}


def _runtime_values(context: UnitContext) -> dict[str, str]:
    """What the GPU's runtime needs beyond the CPU engine.

    It reads /proc/cpuinfo and /proc/meminfo, makes its threads with an affinity (sched_setaffinity is of
    @resources), binds memory (mbind, the same), and maps code that it wrote.
    """
    gpu = context.profile == "strix-halo"
    return {
        "deny_write_execute": "no" if gpu else "yes",
        "proc_subset": "all" if gpu else "pid",
        "denied_calls": "@privileged" if gpu else "@privileged @resources",
    }


def _without_namespaces(text: str) -> str:
    """The unit less every setting that a mount, user, network or host name namespace is made for."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(_NEEDS_NAMESPACES))


def wants_directory(name: str, scope: str) -> str:
    """The .wants directory that starts the unit `name` at boot."""
    if name == SOCKET:
        return "sockets.target.wants"
    return "multi-user.target.wants" if scope == "system" else "default.target.wants"


def _check_path(path: Path) -> None:
    """systemd splits ExecStart at blanks and expands % and $: a prefix with those is refused, not quoted."""
    if any(letter.isspace() or letter in "%$\"'\\;{}:*?[]" for letter in str(path)):
        raise HaloError(
            f"{path!s} has a letter that systemd units cannot carry.", hint="choose a plain --prefix DIR"
        )


def _is_loopback(listen: str) -> bool:
    return ipaddress.ip_address(listen.rpartition(":")[0].strip("[]")).is_loopback


def _exec_start(context: UnitContext) -> str:
    command = f"{context.prefix}/current/bin/halo serve --listen {context.listen}"
    if context.api_keys is None:
        return command
    return f"{command} --api-keys " + (
        "%d/" + CREDENTIAL if context.scope == "system" else str(context.api_keys)
    )


def _scope_values(context: UnitContext) -> dict[str, str]:
    credentials = ""
    if context.api_keys is not None and context.scope == "system":
        credentials = f"LoadCredential={CREDENTIAL}:{context.api_keys}\n"
    if context.scope == "system":
        groups = "SupplementaryGroups=render video\n" if context.profile == "strix-halo" else ""
        identity = f"DynamicUser=yes\n{groups}"
        return {
            "identity": identity,
            "credentials": credentials,
            "protect": "ProtectHome=yes\nProtectKernelLogs=yes\n",
            "wanted_by": "multi-user.target",
        }
    # A user manager cannot mask /proc/kmsg in a container, and a user reads no kernel log by it anyway.
    return {
        "identity": "",
        "credentials": credentials,
        "protect": "ProtectHome=read-only\n",
        "wanted_by": "default.target",
    }


def _devices(context: UnitContext) -> str:
    """No device at all on a CPU; the compute, render and accelerator nodes for strix-halo."""
    if context.profile == "cpu":
        return "PrivateDevices=yes\nDevicePolicy=closed\n"
    return (
        "DevicePolicy=closed\nDeviceAllow=/dev/kfd rw\nDeviceAllow=char-drm rw\nDeviceAllow=char-accel rw\n"
    )


def _ip_rules(context: UnitContext) -> str:
    return "IPAddressDeny=any\nIPAddressAllow=localhost\n" if _is_loopback(context.listen) else ""
