"""May the one who asks open the GPU and the NPU? access(2) first, groups second. A pure reading of facts."""

from __future__ import annotations

from collections.abc import Iterator

from checks.case import Case
from checks.finding import Finding, Fix, Severity
from checks.stream import Place, State

_GPU = ("gpu", "npu.module-absent", "npu.driver-unbound", "npu.absent")


def check_access(case: Case) -> Iterator[Finding]:
    """Each device node that should be there: absent and denied have different cures."""
    facts = case.facts
    node, device = facts.gfx1151_node, facts.strix_halo_gpu
    if node is None and device is None:
        return
    if case.request.scope == "system" and facts.user.uid != 0:
        return  # the service has groups of its own; what this user may open says nothing about it
    yield from _one(case, "access.kfd", facts.stream.place("/dev/kfd"), "the GPU's compute device")
    render = [p for path, p in facts.stream.places.items() if path.startswith("/dev/dri/renderD")]
    minor = node.render_minor if node is not None else -1
    wanted = f"/dev/dri/renderD{minor}" if minor > 0 else "/dev/dri/renderD128"
    mine = next((p for p in render if p.path == wanted), render[0] if render else Place(wanted, State.ABSENT))
    yield from _one(case, "access.render", mine, "the GPU's render device")
    if facts.npu is not None and facts.npu.driver == "amdxdna":
        accel = [p for path, p in facts.stream.places.items() if path.startswith("/dev/accel/")]
        place = accel[0] if accel else Place("/dev/accel/accel0", State.ABSENT)
        yield from _one(case, "access.accel", place, "the NPU's device")


def _one(case: Case, identity: str, place: Place, what: str) -> Iterator[Finding]:
    if place.state is State.ABSENT:
        yield Finding(
            f"{identity}-absent",
            f"{place.path}, {what}, does not exist",
            Severity.FAIL,
            evidence=(f"{place.path}: absent",),
            affects="every use of that device",
            depends_on=_GPU,
            hint="In a container, pass it in: --device /dev/kfd --device /dev/dri; on a host: journalctl -k",
        )
    elif not (place.readable and place.writable):
        yield _denied(case, f"{identity}-denied", place, what)


def _denied(case: Case, identity: str, place: Place, what: str) -> Finding:
    user = case.facts.user
    joined = [group for group, members in user.device_groups.items() if user.name in members]
    stale = [group for group in joined if group not in user.groups]
    join = Fix(
        f"add {user.name or 'the user'} to the groups render and video",
        (("usermod", "-aG", "render,video", user.name or "$USER"),),
        needs_root=True,
        relogin=True,
    )
    return Finding(
        identity,
        f"{user.name or 'This user'} may not open {place.path}, {what}",
        Severity.FAIL,
        evidence=(
            f"access({place.path}, read and write): denied",
            f"groups of this session: {' '.join(user.groups) or 'unknown'}",
            f"/etc/group lists the user in {', '.join(stale)}: the session is older" if stale else "",
        ),
        affects="every use of that device",
        depends_on=_GPU,
        fix=None if stale else join,
        hint="Log out and in again: the session began before the group was joined." if stale else "",
    )
