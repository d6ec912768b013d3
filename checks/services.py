"""Are halo's units linked, enabled and running, and do they outlive a logout? A pure reading of facts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from checks.case import Case, Installed
from checks.finding import Finding, Fix, Severity
from checks.host import Unit

SOCKET: Final = "halo-server.socket"
SERVICE: Final = "halo-server.service"
_INSTALL: Final = (
    "install.absent",
    "install.manifest-broken",
    "install.file-missing",
    "install.hash-mismatch",
    "install.model-broken",
)


def _systemctl(scope: str, *arguments: str) -> tuple[str, ...]:
    return ("systemctl", *(("--user",) if scope == "user" else ()), *arguments)


def check_services(case: Case) -> Iterator[Finding]:
    """Only on a box where halo was installed with units and systemd runs."""
    installed, systemd = case.installed, case.facts.systemd
    if installed is None or not installed.exists or not installed.units_wanted or not systemd.running:
        return
    scope = installed.scope
    if scope == "user" and not systemd.user_manager:
        yield _no_manager(case)
        return
    units = systemd.units.get(scope, {})
    yield from _links(installed)
    yield from _socket(units.get(SOCKET), scope)
    yield from _service(units.get(SERVICE), scope)
    if scope == "user" and not systemd.linger:
        yield Finding(
            "service.linger-off",
            "The server stops when you log out, and does not start at boot",
            Severity.WARN,
            evidence=(f"/var/lib/systemd/linger/{case.facts.user.name}: absent",),
            affects="the server after a logout or a reboot",
            fix=Fix(
                "let your units run without a login", (("loginctl", "enable-linger", case.facts.user.name),)
            ),
        )


def _no_manager(case: Case) -> Finding:
    user = case.facts.user
    return Finding(
        "service.no-user-manager",
        "Your systemd user manager does not run, so neither does the server",
        Severity.FAIL,
        evidence=(f"/run/user/{user.uid}/systemd/private: absent",),
        affects="the server",
        fix=Fix("start it, now and at boot", (("loginctl", "enable-linger", user.name),), needs_root=True),
    )


def _links(installed: Installed) -> Iterator[Finding]:
    """`unit_links` maps a unit to what is wrong with its file in systemd's directory: missing or a target."""
    if installed.unit_links:
        yield Finding(
            "service.unit-missing",
            "Unit files of halo are not where systemd looks",
            Severity.FAIL,
            evidence=tuple(f"{unit}: {problem}" for unit, problem in sorted(installed.unit_links.items())),
            affects="starting the server",
            depends_on=_INSTALL,
            fix=Fix("link the units again", (("halo", "install", "--yes"),)),
        )


def _socket(unit: Unit | None, scope: str) -> Iterator[Finding]:
    if unit is None or unit.load == "not-found":
        yield Finding(
            "service.unknown",
            f"systemd does not know {SOCKET}",
            Severity.FAIL,
            evidence=(f"systemctl show {SOCKET}: LoadState={unit.load if unit else 'no answer'}",),
            affects="the server",
            depends_on=("service.unit-missing", *_INSTALL),
            fix=Fix(
                "read the unit files again",
                (_systemctl(scope, "daemon-reload"),),
                needs_root=scope == "system",
            ),
        )
    elif unit.load == "masked":
        yield Finding(
            "service.masked",
            f"{SOCKET} is masked: nothing may start it",
            Severity.FAIL,
            evidence=("LoadState=masked",),
            affects="the server",
            fix=Fix(
                "unmask and start it",
                (_systemctl(scope, "unmask", SOCKET), _systemctl(scope, "enable", "--now", SOCKET)),
                needs_root=scope == "system",
            ),
        )
    else:
        yield from _socket_state(unit, scope)


def _socket_state(unit: Unit, scope: str) -> Iterator[Finding]:
    if unit.active != "active":
        yield Finding(
            "service.inactive",
            f"{SOCKET} does not run",
            Severity.FAIL,
            evidence=(f"ActiveState={unit.active} SubState={unit.sub} Result={unit.result}",),
            affects="the server",
            depends_on=("service.failed",),
            fix=Fix("start it", (_systemctl(scope, "restart", SOCKET),), needs_root=scope == "system"),
        )
    if unit.enabled not in ("enabled", "enabled-runtime", "static", "linked", "alias"):
        yield Finding(
            "service.not-enabled",
            f"{SOCKET} is not enabled: it will not start at boot",
            Severity.WARN,
            evidence=(f"UnitFileState={unit.enabled or '(empty)'}",),
            affects="the server after a reboot",
            depends_on=("service.unit-missing", "service.unknown"),
            # Not `systemctl enable`: that would tie the boot to one generation instead of `current`.
            fix=Fix("link it for boot", (("halo", "install", "--yes"),), needs_root=scope == "system"),
        )


def _service(unit: Unit | None, scope: str) -> Iterator[Finding]:
    """The service is started by its socket, so inactive is well; failed and masked are not."""
    if unit is None or (unit.active != "failed" and unit.load != "masked"):
        return
    user = "--user " if scope == "user" else ""
    yield Finding(
        "service.failed" if unit.load != "masked" else "service.server-masked",
        f"{SERVICE} {'is masked' if unit.load == 'masked' else 'failed'}",
        Severity.FAIL,
        evidence=(
            f"ActiveState={unit.active} Result={unit.result} NRestarts={unit.restarts} LoadState={unit.load}",
        ),
        affects="the server",
        depends_on=_INSTALL,
        fix=Fix(
            "start it again",
            (
                *((_systemctl(scope, "unmask", SERVICE),) if unit.load == "masked" else ()),
                _systemctl(scope, "reset-failed", SERVICE, SOCKET),
                _systemctl(scope, "restart", SOCKET),
            ),
            needs_root=scope == "system",
        ),
        hint=f"Read why it failed: journalctl {user}-u {SERVICE} -n 50",
    )
