"""Can this machine compile HIP for gfx1151, and is its ROCm one that runs there? A pure reading of facts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from checks.case import Case, CompileProbe
from checks.finding import Confidence, Finding, Severity
from checks.host import RocmRoot, dotted
from checks.remedy import rocm_fix

FLOOR: Final = (6, 4)  # the first whose compiler and device libraries know gfx1151
# How compilers say that they, or their device libraries, lack the target.
_NO_GFX1151: Final = (
    "device library for gfx1151",
    "oclc_isa_version_1151",
    "invalid target ID",
    "unsupported HIP gpu arch",
)
ADVISED: Final = (7, 2)  # the first that reads the save-area size from the kernel; older ones need a backport


def check_rocm(case: Case) -> Iterator[Finding]:
    """A root, its version, and the compile where it was tried: the compile has the last word."""
    roots, probe = case.facts.rocm, case.compile_probe
    if not roots:
        fix, hint = rocm_fix(case.facts.os)
        yield Finding(
            "rocm.absent",
            "No ROCm compiler was found",
            Severity.FAIL,
            evidence=("no hipcc or amdclang++ in $ROCM_PATH, $HIP_PATH, /opt/rocm, /opt/rocm-*, /usr",),
            affects="building and running the GPU engine",
            fix=fix,
            hint=hint,
        )
        return
    compiled = probe is not None and probe.ok
    if roots[0].version and roots[0].version < FLOOR and not compiled:
        yield _too_old(case, roots[0])
    elif roots[0].version and roots[0].version < ADVISED:
        yield from _below_advised(case, roots[0])
    if probe is not None and not probe.ok:
        yield _compile_failed(case, probe)


def _too_old(case: Case, root: RocmRoot) -> Finding:
    fix, hint = rocm_fix(case.facts.os)
    return Finding(
        "rocm.too-old",
        f"ROCm {dotted(root.version)} does not know gfx1151",
        Severity.FAIL,
        evidence=(f"{root.version_source}: {dotted(root.version)}; {dotted(FLOOR)} is the first that does",),
        affects="building the GPU engine",
        depends_on=("rocm.absent",),
        fix=fix,
        hint=hint,
    )


def _below_advised(case: Case, root: RocmRoot) -> Iterator[Finding]:
    """Only with a fixed kernel in sight: that pair is what fails, and distributions may have mended it."""
    node = case.facts.gfx1151_node
    if node is None or node.cwsr_size != node.cwsr_expected(fixed=True):
        return
    fix, hint = rocm_fix(case.facts.os)
    yield Finding(
        "rocm.old-for-kernel",
        f"ROCm {dotted(root.version)} is older than the kernel's queue layout: queue creation may fail",
        Severity.WARN,
        evidence=(f"{root.version_source}: {dotted(root.version)}; cwsr_size {node.cwsr_size}",),
        affects="the first GPU kernel",
        confidence=Confidence.POSSIBLE,
        depends_on=("rocm.too-old", "kernel.cwsr-unfixed"),
        fix=fix,
        hint=hint,
    )


def _compile_failed(case: Case, probe: CompileProbe) -> Finding:
    tail = probe.tail
    fix, hint = rocm_fix(case.facts.os)
    identity, title = "rocm.compile-failed", "A small HIP kernel does not compile for gfx1151"
    if probe.code == -1:
        title, hint = (
            f"A small HIP kernel did not compile in {probe.seconds:.0f} s",
            "Run the command by hand.",
        )
    elif any(words in tail for words in _NO_GFX1151):
        identity, title = "rocm.no-gfx1151", "The ROCm that is installed has no gfx1151"
    elif "file not found" in tail and ("'cmath'" in tail or "'cstdlib'" in tail):
        title, fix = "The HIP compiler finds no C++ standard library", None
        hint = "Install the libstdc++ of the newest gcc here, for example: apt-get install libstdc++-14-dev"
    return Finding(
        identity,
        title,
        Severity.FAIL,
        evidence=(
            " ".join(probe.command),
            f"exit {probe.code} after {probe.seconds:.1f} s",
            *tail.split("\n")[-6:],
        ),
        affects="building the GPU engine",
        depends_on=("rocm.absent", "rocm.too-old"),
        fix=fix,
        hint=hint,
    )
