"""The only module that imports pyinfra: a child process that changes the operating system, JSON lines out.

Run as `python -m provision.worker`; a JSON list of operations on stdin. Never imported by the rest of halo:
gevent patches the process, and importing pyinfra takes a third of a second. Immediate mode: each operation
runs when it is called, so that the journal's intent stands before it and its done after it.
"""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

import json  # noqa: E402
import logging  # noqa: E402
import shlex  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

from pyinfra.api.config import Config  # noqa: E402
from pyinfra.api.connect import connect_all, disconnect_all  # noqa: E402
from pyinfra.api.inventory import Inventory  # noqa: E402
from pyinfra.api.operation import OperationMeta  # noqa: E402
from pyinfra.api.state import State  # noqa: E402
from pyinfra.context import ctx_host, ctx_state  # noqa: E402
from pyinfra.operations import apt, dnf, pacman, server, systemd, zypper  # noqa: E402


def packages(manager: str, names: list[str]) -> OperationMeta:
    """Install packages with the distribution's own manager."""
    if manager == "apt":
        return apt.packages(packages=names, update=True, no_recommends=True)
    if manager == "dnf":
        return dnf.packages(packages=names)
    if manager == "pacman":
        return pacman.packages(packages=names)
    if manager == "zypper":
        return zypper.packages(packages=names)
    return server.packages(packages=names)


def link(path: str, target: str) -> OperationMeta:
    """Point a link at a target by one rename; pyinfra's own files.link removes first."""
    temporary = shlex.quote(path.rpartition("/")[0] + "/.halo-" + path.rpartition("/")[2] + ".tmp")
    directory = shlex.quote(path.rpartition("/")[0])
    make = f"mkdir -p {directory} && ln -sfn {shlex.quote(target)} {temporary}"
    return server.shell(commands=[f"{make} && mv -T {temporary} {shlex.quote(path)} && sync {directory}"])


def unlink(path: str) -> OperationMeta:
    """Remove a link, or nothing."""
    return server.shell(commands=[f"rm -f {shlex.quote(path)}"])


def reload(user: bool) -> OperationMeta:
    """Make systemd read its units again."""
    return systemd.daemon_reload(user_mode=user)


def service(name: str, user: bool, running: bool = True, restarted: bool = False) -> OperationMeta:
    """Start, stop or restart a unit; boot links are halo's own, since enable would resolve `current`."""
    return systemd.service(service=name, running=running, restarted=restarted, user_mode=user)


def reset_failed(name: str, user: bool) -> OperationMeta:
    """Forget earlier failures, so that a start limit that was hit does not refuse this start."""
    flag = "--user " if user else ""
    return server.shell(commands=[f"systemctl {flag}reset-failed {shlex.quote(name)} 2>/dev/null || true"])


def linger(user_name: str) -> OperationMeta:
    """Let a user's services run without a login."""
    return server.shell(commands=[f"loginctl --no-ask-password enable-linger {shlex.quote(user_name)}"])


OPERATIONS: dict[str, Callable[..., OperationMeta]] = {
    "packages": packages,
    "link": link,
    "unlink": unlink,
    "reload": reload,
    "service": service,
    "reset_failed": reset_failed,
    "linger": linger,
}


def emit(**record: object) -> None:
    """One JSON line on the real stdout."""
    print(json.dumps(record), file=sys.__stdout__, flush=True)


def perform(request: dict[str, Any]) -> bool:
    """Run one operation, report how it went, and return whether it went well."""
    arguments = {key: value for key, value in request.items() if key not in ("op", "what", "optional")}
    try:
        meta = OPERATIONS[request["op"]](**arguments)
    except Exception as error:
        cause = error.__cause__ or error.__context__
        detail = str(error) or type(error).__name__
        emit(what=request["what"], ok=False, error=f"{detail}" + (f": {cause}" if cause else ""))
        return False
    lines = [*meta.stdout_lines, *meta.stderr_lines] if meta.is_complete() else []
    emit(what=request["what"], ok=True, changed=bool(meta.did_change()), output=lines[-20:])
    return True


def main() -> int:
    """Perform the operations of stdin in order; the first failure of a needed one ends the run."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    requests = json.load(sys.stdin)
    inventory = Inventory((["@local"], {}))  # type: ignore[no-untyped-call]
    state = State(inventory, Config(), check_for_changes=False)  # type: ignore[no-untyped-call]
    state.is_executing = True
    with ctx_state.use(state):
        connect_all(state)
        host = next(iter(state.inventory))
        with ctx_host.use(host):
            for request in requests:
                if not perform(request) and not request.get("optional"):
                    return 1
        disconnect_all(state)
    return 0


if __name__ == "__main__":
    sys.exit(main())
