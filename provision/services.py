"""systemd as halo uses it: which manager is there, which links make a boot, what the worker is told."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import HaloError
from provision.layout import Layout
from provision.run import Log, Result, run
from units.render import SERVICE, SOCKET, UNIT_NAMES, wants_directory

Operation = dict[str, Any]


def systemctl(scope: str) -> list[str]:
    """The command for the manager of `scope`."""
    return ["systemctl", "--user"] if scope == "user" else ["systemctl"]


def manager_runs(scope: str, log: Log | None = None) -> bool:
    """Whether a systemd would take units in `scope`. A container without one is not an error."""
    if not Path("/run/systemd/system").is_dir():
        return False
    result = run(
        [*systemctl(scope), "show", "--property=Version", "--value"], log=log, check=False, timeout=20
    )
    return result.ok and bool(result.stdout.strip())


def makes_namespaces(scope: str) -> bool:
    """Whether the service can have its whole sandbox: asked of the manager that starts it, with `true`.

    Ubuntu's AppArmor and some hardened kernels let an ordinary user make no namespaces. Of all ways in which
    that unit can fail only those three exit codes of systemd say so: 217 user, 225 network, 226 mount.
    """
    if scope == "system" or not manager_runs(scope):
        return True
    settings = ("PrivateUsers=yes", "PrivateNetwork=yes", "ProtectSystem=strict", "PrivateTmp=yes")
    properties = [f"--property={setting}" for setting in settings]
    argv = ["systemd-run", "--user", "--quiet", "--wait", "--collect", *properties, "true"]
    return run(argv, check=False, timeout=30).returncode not in (217, 225, 226)


def is_active(scope: str, unit: str) -> bool:
    """Whether `unit` is active now."""
    return run([*systemctl(scope), "is-active", "--quiet", unit], check=False, timeout=20).ok


def boot_links(layout: Layout) -> dict[Path, str]:
    """Every link that makes the units known and started at boot. They all go through `current`.

    `systemctl enable` would resolve `current` and tie the boot to one generation.
    """
    links = {}
    for name in UNIT_NAMES:
        target = f"{layout.current}/units/{name}"
        links[layout.unit_dir / name] = target
        links[layout.unit_dir / wants_directory(name, layout.scope) / name] = target
    return links


def links_in_place(layout: Layout) -> bool:
    """Whether all boot links are as they should be."""
    return all(link.is_symlink() and str(link.readlink()) == to for link, to in boot_links(layout).items())


def link_operations(layout: Layout) -> list[Operation]:
    """Operations for the boot links that are missing or point elsewhere."""
    return [
        {"op": "link", "path": str(link), "target": to, "what": f"link {link}"}
        for link, to in boot_links(layout).items()
        if not (link.is_symlink() and str(link.readlink()) == to)
    ]


def start_operations(layout: Layout, *, socket_changed: bool) -> list[Operation]:
    """Read the units again, and start or restart what they describe; a changed socket is opened anew."""
    user = layout.scope == "user"
    operations: list[Operation] = [{"op": "reload", "user": user, "what": "systemctl daemon-reload"}]
    operations += [
        {"op": "reset_failed", "name": name, "user": user, "what": f"forget failures of {name}"}
        for name in UNIT_NAMES
    ]
    if socket_changed:
        for name in (SERVICE, SOCKET):
            operations.append(
                {"op": "service", "name": name, "user": user, "running": False, "what": f"stop {name}"}
            )
    operations.append({"op": "service", "name": SOCKET, "user": user, "what": f"start {SOCKET}"})
    restart = {
        "op": "service",
        "name": SERVICE,
        "user": user,
        "restarted": True,
        "what": f"restart {SERVICE}",
    }
    return [*operations, restart]


def stop_operations(layout: Layout) -> list[Operation]:
    """Undo of a first activation: stop the units, remove the links, read the units again."""
    user = layout.scope == "user"
    operations: list[Operation] = [
        {
            "op": "service",
            "name": name,
            "user": user,
            "running": False,
            "optional": True,
            "what": f"stop {name}",
        }
        for name in (SOCKET, SERVICE)
    ]
    operations += [
        {"op": "unlink", "path": str(link), "what": f"remove {link}"} for link in boot_links(layout)
    ]
    return [*operations, {"op": "reload", "user": user, "what": "systemctl daemon-reload"}]


def perform(
    python: Path, operations: list[Operation], log: Log, tick: Callable[[], None] | None = None
) -> list[dict[str, Any]]:
    """Have pyinfra's worker do `operations` in order. Raises HaloError at the first needed one that fails."""
    argv: list[str | Path] = [python, "-I", "-m", "provision.worker"]
    result = run(argv, log=log, stdin=json.dumps(operations), check=False, timeout=1800, tick=tick)
    reports = []
    for line in result.stdout.splitlines():
        if line.startswith("{"):
            reports.append(json.loads(line))
    needed = {operation["what"] for operation in operations if not operation.get("optional")}
    failed = next((report for report in reports if not report["ok"] and report["what"] in needed), None)
    if failed is not None:
        raise HaloError(
            f"Could not {failed['what']}: {_reason(operations, result, log)}", hint=_hint(operations)
        )
    if not result.ok:
        raise HaloError(
            f"The worker that changes the system failed: {result.last_line()}", hint="see the log"
        )
    return reports


def _reason(operations: list[Operation], result: Result, log: Log) -> str:
    """Why it failed, in the words of whoever knows: the unit's journal, else the command that was run."""
    if any(operation["op"] == "service" for operation in operations):
        user = ["--user"] if any(operation.get("user") for operation in operations) else []
        argv = [
            "journalctl",
            *user,
            "--unit",
            SOCKET,
            "--unit",
            SERVICE,
            "--lines",
            "20",
            "--no-pager",
            "--output",
            "cat",
        ]
        told = run(argv, log=log, check=False, timeout=30).stdout.splitlines()
        errors = [line for line in told if "rror" in line or ("Failed " in line and "result" not in line)]
        if errors:
            return errors[-1].strip()
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    spoken = [line for line in lines if not line.startswith(("--->", "Starting", "[@local] Error: executed"))]
    return spoken[-1] if spoken else result.last_line()


def _hint(operations: list[Operation]) -> str:
    """What to look at: the units' journal for units, the log of this run for everything else."""
    user = any(operation.get("user") for operation in operations)
    units = any(operation["op"] == "service" for operation in operations)
    if units and (user or os.geteuid() == 0):
        return f"journalctl {'--user ' if user else ''}-u {SOCKET} -u {SERVICE} -n 30"
    return "see the log; run it again when that is mended"


def lingers() -> bool:
    """Whether this user's services run without a login."""
    return Path(f"/var/lib/systemd/linger/{getpass.getuser()}").exists()
