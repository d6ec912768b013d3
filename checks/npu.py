"""Is the XDNA2 NPU there, and does amdxdna hold it? A pure reading of facts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from checks.case import Case
from checks.facts import Facts
from checks.finding import Finding, Fix, Severity
from checks.hardware import STRIX_HALO_NPU, STRIX_HALO_NPU_REVISION, PciDevice

_LOAD: Final = Fix("load the NPU driver", (("modprobe", "amdxdna"),), needs_root=True)
_GPU: Final = ("gpu.absent", "gpu.not-gfx1151", "gpu.unreadable")


def check_npu(case: Case) -> Iterator[Finding]:
    """The NPU is a function of the same APU: without a Strix Halo GPU its absence says nothing new."""
    facts = case.facts
    npu = facts.npu
    if not facts.module_loaded("amdxdna") and (npu is None or npu.driver != "amdxdna"):
        yield _module_absent(facts)
    if npu is None:
        yield Finding(
            "npu.absent",
            "The NPU (PCI 1022:17f0) is not on the bus",
            Severity.FAIL,
            evidence=("/sys/bus/pci/devices: no function 1022:17f0",),
            affects="the NPU",
            depends_on=_GPU,
            hint="Enable the NPU (IPU, AI engine) in the firmware setup of the machine.",
        )
        return
    if (npu.device, npu.revision) != (STRIX_HALO_NPU, STRIX_HALO_NPU_REVISION):
        yield _other(npu)
    elif npu.driver != "amdxdna":
        yield _unbound(facts, npu)


def _module_absent(facts: Facts) -> Finding:
    on_disk = facts.stream.output("amdxdna-on-disk").strip()
    return Finding(
        "npu.module-absent",
        "The NPU driver amdxdna is not loaded",
        Severity.FAIL,
        evidence=(
            "/sys/module/amdxdna: absent",
            f"modules.dep: {on_disk.splitlines()[0][:120]}" if on_disk else "modules.dep: no amdxdna",
        ),
        affects="the NPU",
        depends_on=(*_GPU, "npu.absent", "kernel.too-old"),
        fix=_LOAD if on_disk else None,
        hint="" if on_disk else "Mainline has it since 6.14: take a kernel with CONFIG_DRM_ACCEL_AMDXDNA.",
    )


def _other(npu: PciDevice) -> Finding:
    return Finding(
        "npu.not-strix-halo",
        "The NPU is not that of a Strix Halo",
        Severity.FAIL,
        evidence=(f"{npu.address}: {npu.pci_id} revision {npu.revision:#04x}; wanted 17f0, 0x11",),
        affects="the NPU",
        depends_on=_GPU,
        hint="The strix-halo profile is for this one APU; install with: halo install --profile cpu",
    )


def _unbound(facts: Facts, npu: PciDevice) -> Finding:
    off = "amd_iommu=off" in facts.kernel.command_line
    return Finding(
        "npu.driver-unbound",
        f"The NPU is held by {npu.driver}, not by amdxdna" if npu.driver else "amdxdna has not taken the NPU",
        Severity.FAIL,
        evidence=(
            f"/sys/bus/pci/devices/{npu.address}/uevent: DRIVER={npu.driver or '(none)'}",
            *(("/proc/cmdline: amd_iommu=off (the NPU needs the IOMMU)",) if off else ()),
        ),
        affects="the NPU",
        depends_on=("npu.module-absent", *_GPU),
        fix=None if off or npu.driver else _LOAD,
        hint="Take amd_iommu=off from the kernel command line and reboot."
        if off
        else "Read why in: journalctl -k --grep amdxdna (firmware missing, IOMMU off in the firmware setup).",
    )
