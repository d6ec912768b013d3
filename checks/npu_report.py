"""What the checks know of the NPU, as the server's router takes it; it prints nothing and mends nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from itertools import chain

from checks import facts
from checks.access import check_access
from checks.case import Case
from checks.facts import Facts
from checks.finding import Finding, Severity, fold
from checks.gpu import check_gpu
from checks.kernel import check_kernel
from checks.memory import check_memlock
from checks.npu import check_npu
from checks.stream import State
from engine.errors import HaloError
from engine.router import NpuReport


def npu_report() -> NpuReport:
    """The NPU as this process finds it now: one pass of gather.sh, about a second."""
    try:
        return report_of(facts.gather(), tool_installed=shutil.which("xrt-smi") is not None)
    except HaloError as error:
        return NpuReport(ready=False, reason=f"the checks could not look: {error.message}")


def report_of(seen: Facts, *, tool_installed: bool = False) -> NpuReport:
    """The report from facts. Pure. The reason is the gravest root cause, in the doctor's own words."""
    roots = fold(_findings(Case(seen, "strix-halo"))).roots
    fatal = [finding for finding in roots if finding.severity is Severity.FAIL]
    return NpuReport(
        ready=not fatal,
        reason=_sentence(fatal[0]) if fatal else "",
        device_node_present=bool(_accel(seen)),
        memlock_unlimited=seen.memory.locked_limit == -1,
        driver_loaded=seen.module_loaded("amdxdna"),
        tool_installed=tool_installed,
        firmware_version=_firmware(seen),
        advisories=tuple(_sentence(finding) for finding in roots),
    )


def _findings(case: Case) -> Iterable[Finding]:
    """Findings about the NPU alone: what is wrong with the GPU is no reason why the NPU would not run."""
    every = chain(
        check_gpu(case), check_npu(case), check_access(case), check_memlock(case), check_kernel(case)
    )
    wanted = (
        "gpu.absent",
        "gpu.not-gfx1151",
        "gpu.unreadable",
        "npu.",
        "access.accel",
        "kernel.too-old",
        "memory.memlock",
    )
    return (finding for finding in every if finding.id.startswith(wanted))


def _sentence(finding: Finding) -> str:
    return f"{finding.title}. {finding.hint or (finding.fix.describe() if finding.fix else '')}".strip()


def _accel(seen: Facts) -> list[str]:
    return [
        path
        for path, place in seen.stream.places.items()
        if path.startswith("/dev/accel/") and place.state is not State.ABSENT
    ]


def _firmware(seen: Facts) -> str | None:
    return seen.npu.attributes.get("fw_version") or None if seen.npu is not None else None
