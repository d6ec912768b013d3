"""How much memory may the GPU map, and what lowers it? A pure reading of facts; it never refuses."""

from __future__ import annotations

from collections.abc import Iterator

from checks.case import Case
from checks.finding import Confidence, Finding, Severity

_GIB = 1 << 30
_PAGES = ("/sys/module/ttm/parameters/pages_limit", "/sys/module/amdttm/parameters/pages_limit")


def check_memory(case: Case) -> Iterator[Finding]:
    """VRAM and GTT are two views of one DRAM and are never added."""
    device, total = case.facts.strix_halo_gpu, case.facts.memory.total
    if device is None:
        return
    vram, gtt = device.number("mem_info_vram_total"), device.number("mem_info_gtt_total")
    if vram > 4 * _GIB:
        yield Finding(
            "memory.carve-out",
            f"The firmware sets {vram / _GIB:.0f} GiB aside for the GPU; the system sees only the rest",
            Severity.WARN,
            evidence=(f"mem_info_vram_total: {vram}", f"MemTotal: {total}"),
            affects="large models: mapping a file needs system memory",
            hint="Set the UMA frame buffer to 512 MB in the firmware setup; GTT gives the GPU the rest.",
        )
    if gtt > 0 and total > 0 and max(gtt, vram) < 0.75 * total:
        limits = [
            f"{path}: {case.facts.stream.text(path)}" for path in _PAGES if case.facts.stream.text(path)
        ]
        pages = total * 9 // 10 // 4096
        yield Finding(
            "memory.gtt-default",
            f"The GPU may map only {gtt / _GIB:.0f} of {total / _GIB:.0f} GiB",
            Severity.INFO,
            evidence=(f"mem_info_gtt_total: {gtt}", *limits),
            affects="models larger than that",
            confidence=Confidence.LIKELY,
            depends_on=("memory.carve-out",),
            hint=f"Add ttm.pages_limit={pages} to the kernel command line and reboot, when a model needs it.",
        )


def check_environment(case: Case) -> Iterator[Finding]:
    """HSA_OVERRIDE_GFX_VERSION makes ROCm load kernels of another ISA; 11.5.1 is what the GPU is anyway."""
    stream = case.facts.stream
    value = stream.env.get("HSA_OVERRIDE_GFX_VERSION", "").strip()
    where = stream.output("hsa-override").strip()
    if not (value or where) or value == "11.5.1":
        return
    evidence = [f"environment: HSA_OVERRIDE_GFX_VERSION={value}"] if value else []
    yield Finding(
        "environment.hsa-override",
        "HSA_OVERRIDE_GFX_VERSION is set: ROCm takes the GPU for another one",
        Severity.WARN,
        evidence=(*evidence, *where.split("\n")[:4]) if where else tuple(evidence),
        affects="GPU kernels: crashes and hangs",
        hint="Remove it where it is set, then log in again; nothing on gfx1151 needs it.",
    )


def check_memlock(case: Case) -> Iterator[Finding]:
    """The NPU pins its buffers: 8 MiB of locked memory is not enough."""
    limit = case.facts.memory.locked_limit
    if case.facts.npu is None or limit in (-1, 0) or limit >= _GIB:
        return
    yield Finding(
        "memory.memlock",
        f"Only {limit // 1024} KiB of memory may be locked; the NPU needs more",
        Severity.INFO,
        evidence=(f"/proc/self/limits: Max locked memory {limit}",),
        affects="the NPU",
        hint="Put '* soft memlock unlimited' and '* hard memlock unlimited' into "
        "/etc/security/limits.d/99-amdxdna.conf and log in again.",
    )
