"""Is the GPU a gfx1151, does amdgpu hold it, and does KFD show it? A pure reading of facts."""

from __future__ import annotations

from collections.abc import Iterator

from checks.case import Case
from checks.facts import Facts
from checks.finding import Confidence, Finding, Fix, Severity
from checks.hardware import LOOK_ALIKES, PciDevice
from checks.stream import State

_NODES = "/sys/class/kfd/kfd/topology/nodes"


def check_gpu(case: Case) -> Iterator[Finding]:
    """The chain PCI -> driver -> KFD; each link is only tried where the one before it held."""
    facts = case.facts
    node, device = facts.gfx1151_node, facts.strix_halo_gpu
    if node is None and device is None:
        yield from _no_strix_halo(facts)
        return
    if device is not None and device.driver != "amdgpu":
        yield _unbound(device)
    if node is None:
        yield _no_node(facts, device)


def _no_strix_halo(facts: Facts) -> Iterator[Finding]:
    use_cpu = Fix("install the cpu profile instead", (("halo", "install", "--profile", "cpu"),))
    names = [f"KFD node {node.number}: {node.gfx}" for node in facts.kfd if node.is_gpu]
    names += [f"{g.address}: {g.pci_id} {LOOK_ALIKES.get(g.device, '')}".strip() for g in facts.amd_gpus]
    if names:
        yield Finding(
            "gpu.not-gfx1151",
            "The AMD GPU of this machine is not a Strix Halo (gfx1151)",
            Severity.FAIL,
            evidence=(*names, "wanted: PCI 1002:1586, gfx_target_version 110501"),
            affects="the strix-halo profile",
            fix=use_cpu,
        )
        return
    denied = [p for p in ("/sys/bus/pci/devices", _NODES) if facts.stream.place(p).state is State.DENIED]
    if denied or facts.stream.place("/sys/bus/pci/devices").state is State.ABSENT:
        yield Finding(
            "gpu.unreadable",
            "Whether there is a GPU cannot be seen: sysfs is not readable here",
            Severity.FAIL,
            evidence=tuple(f"{p}: {facts.stream.place(p).state}" for p in ("/sys/bus/pci/devices", _NODES)),
            affects="the strix-halo profile",
            hint="In a container, pass /sys and the devices in; on a host: mount -t sysfs sysfs /sys",
        )
        return
    yield Finding(
        "gpu.absent",
        "There is no AMD GPU in this machine",
        Severity.FAIL,
        evidence=(
            "/sys/bus/pci/devices: no display controller of vendor 0x1002",
            f"{_NODES}: no GPU node ({facts.stream.place(_NODES).state})",
        ),
        affects="the strix-halo profile",
        fix=use_cpu,
    )


def _unbound(device: PciDevice) -> Finding:
    rescan = Fix("load the driver", (("modprobe", "amdgpu"),), needs_root=True)
    held = device.driver
    return Finding(
        "gpu.driver-unbound",
        f"The GPU is held by {held}, not by amdgpu" if held else "No driver is bound to the GPU",
        Severity.FAIL,
        evidence=(f"/sys/bus/pci/devices/{device.address}/uevent: DRIVER={held or '(none)'}",),
        affects="every use of the GPU",
        fix=None if held else rescan,
        hint=(
            f"Take the GPU's ids ({device.pci_id}) out of {held}'s options on the kernel command line or in "
            "/etc/modprobe.d, then reboot."
            if held
            else "If it does not load, look for a blacklist line in /etc/modprobe.d, nomodeset, or a kernel "
            "older than 6.11."
        ),
    )


def _no_node(facts: Facts, device: PciDevice | None) -> Finding:
    others = [f"KFD node {node.number}: {node.gfx}" for node in facts.kfd if node.is_gpu]
    where = facts.stream.place(_NODES).state
    return Finding(
        "gpu.kfd-absent",
        "The GPU is there, but the kernel's compute side (KFD) does not show it",
        Severity.FAIL,
        evidence=(
            f"{_NODES}: {where}, no node with gfx_target_version 110501",
            *others,
            f"PCI {device.address} {device.pci_id}" if device else "",
        ),
        affects="ROCm, HIP, every GPU decode",
        confidence=Confidence.CERTAIN if where is State.PRESENT else Confidence.LIKELY,
        depends_on=("gpu.driver-unbound", "gpu.absent", "gpu.not-gfx1151", "gpu.unreadable"),
        hint="The kernel needs CONFIG_HSA_AMD; read why in: journalctl -k --grep 'kfd|amdgpu'",
    )
