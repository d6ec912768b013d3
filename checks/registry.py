"""Every check by name, when it runs, and how it is run. The one list to add a check to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from checks.access import check_access
from checks.case import Case
from checks.catalogue import catalogue
from checks.decode import check_decode
from checks.finding import Confidence, Finding, Severity
from checks.gpu import check_gpu
from checks.install import check_install
from checks.kernel import check_firmware, check_kernel
from checks.memory import check_environment, check_memlock, check_memory
from checks.npu import check_npu
from checks.rocm import check_rocm
from checks.services import check_services
from checks.system import (
    check_disk,
    check_distribution,
    check_port,
    check_python,
    check_systemd,
    check_toolchain,
)
from engine.errors import EXIT_COULD_NOT_RUN, HaloError


@dataclass(frozen=True)
class Check:
    """A pure function of a case, and where it has a meaning.

    `level`: active needs a probe's result. `preflight`, `doctor`: a compiler matters before an install, an
    enabled unit after it. `profile`: the only one that asks for it, "" for any. `on_install`: it looks at an
    install, so that it says nothing where there is none.
    """

    id: str
    title: str
    run: Callable[[Case], Iterator[Finding]]
    level: str = "passive"
    preflight: bool = True
    doctor: bool = True
    profile: str = ""
    on_install: bool = False

    def applies(self, case: Case) -> bool:
        there = case.installed is not None and case.installed.exists
        return self.profile in ("", case.profile) and (there or not self.on_install)


# The order is that of causes: what is named first explains what comes later.
CHECKS: Final = (
    Check("distribution", "Distribution", check_distribution, doctor=False),
    Check("python", "Python", check_python, doctor=False),
    Check("toolchain", "Compiler and CMake", check_toolchain, doctor=False),
    Check("disk", "Disk space and rights", check_disk),
    Check("port", "Port", check_port, doctor=False),
    Check("systemd", "systemd", check_systemd, doctor=False),
    Check("gpu", "GPU", check_gpu, profile="strix-halo"),
    Check("kernel", "Kernel", check_kernel, profile="strix-halo"),
    Check("firmware", "Firmware", check_firmware, profile="strix-halo"),
    Check("access", "Device access", check_access, profile="strix-halo"),
    Check("memory", "Memory for the GPU", check_memory, profile="strix-halo"),
    Check("environment", "Environment", check_environment, profile="strix-halo"),
    Check("rocm", "ROCm", check_rocm, profile="strix-halo"),
    Check("npu", "NPU", check_npu, profile="strix-halo"),
    Check("memlock", "Locked memory", check_memlock, profile="strix-halo"),
    Check("install", "Installed files and model", check_install, preflight=False),
    Check("services", "Services", check_services, preflight=False, on_install=True),
    Check("decode", "Decode", check_decode, level="active", preflight=False, on_install=True),
)


@dataclass(frozen=True)
class Outcome:
    """One check that ran: its findings, and how long it took."""

    check: Check
    findings: tuple[Finding, ...]
    seconds: float


def run_checks(case: Case, checks: Iterable[Check]) -> list[Outcome]:
    """Run each check that applies to the case's profile.

    One that crashes is itself a finding and stops no other.
    """
    outcomes = []
    for check in (each for each in checks if each.applies(case)):
        start = time.monotonic()
        try:
            found = tuple(check.run(case))
        except Exception as error:
            found = (_crashed(check, error),)
        outcomes.append(Outcome(check, found, time.monotonic() - start))
    return outcomes


def _crashed(check: Check, error: Exception) -> Finding:
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    place = f"{where.tb_frame.f_code.co_name}, line {where.tb_lineno}" if where else "?"
    return Finding(
        "check.crashed",
        f"The check '{check.id}' crashed: its answer is unknown",
        Severity.WARN,
        evidence=(f"{type(error).__name__}: {error} (in {place})"[:400],),
        affects=f"the check '{check.id}'",
        confidence=Confidence.CERTAIN,
        hint=f"Leave it out with: halo doctor --skip {check.id}; and report this with: halo doctor --json",
    )


def select(checks: Sequence[Check], only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[Check]:
    """The checks that `only` and `skip` leave; a name is a check's id or a finding's (gpu, gpu.absent)."""
    owner = {finding: entry.check for finding, entry in catalogue().items()}
    known = {check.id for check in CHECKS}
    wanted = {owner.get(name, name) for name in only}
    unwanted = {name for name in skip if name in known}
    for name in (*wanted, *skip):
        if name not in known and name not in owner:
            raise HaloError(
                f"There is no check named {name!r}.",
                hint="See them all: halo doctor --list",
                exit_code=EXIT_COULD_NOT_RUN,
            )
    return [c for c in checks if (not wanted or c.id in wanted) and c.id not in unwanted]


def keep_finding(finding: Finding, only: Sequence[str], skip: Sequence[str]) -> bool:
    """Whether a finding survives --only and --skip when those name single findings."""
    exact = [name for name in only if "." in name]
    groups = [name for name in only if "." not in name]
    if finding.id in skip:
        return False
    return not exact or bool(groups) or finding.id in exact or finding.id == "check.crashed"
