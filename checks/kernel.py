"""Is the kernel one on which gfx1151 computes without hanging? A pure reading of facts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from checks.case import Case
from checks.finding import Confidence, Finding, Fix, Severity
from checks.hardware import KfdNode
from checks.remedy import initramfs_command, kernel_fix, packages

FLOOR: Final = (7,)  # what the strix-halo profile asks
FIXED_UPSTREAM: Final = (6, 18, 4)  # where mainline got the gfx1151 queue-size fix
_BAD_MES: Final = 0x83
_UPDATE: Final = {
    "apt-get": ("apt-get", "install", "--yes"),
    "pacman": ("pacman", "-Sy"),
    "dnf": ("dnf", "upgrade", "--assumeyes"),
}
_GPU: Final = ("gpu.absent", "gpu.not-gfx1151", "gpu.unreadable", "gpu.driver-unbound", "gpu.kfd-absent")


def check_kernel(case: Case) -> Iterator[Finding]:
    """The version that the profile asks, then what the running kernel says of its own fixes."""
    yield from _floor(case)
    node = case.facts.gfx1151_node
    if node is not None:
        yield from _cwsr(case, node)


def _floor(case: Case) -> Iterator[Finding]:
    kernel, node = case.facts.kernel, case.facts.gfx1151_node
    if kernel.version[:1] >= FLOOR:
        return
    evidence = [f"uname -r: {kernel.release or 'unknown'}; the strix-halo profile asks for 7.x"]
    if node is not None and node.cwsr_size == node.cwsr_expected(fixed=True):
        evidence.append(f"it does carry the gfx1151 queue fix (cwsr_size {node.cwsr_size})")
    elif kernel.version >= FIXED_UPSTREAM:
        evidence.append("6.18.4 and later carry the gfx1151 queue fix; the profile asks for more")
    fix, hint = kernel_fix(case.facts.os)
    yield Finding(
        "kernel.too-old" if kernel.version else "kernel.unknown",
        f"Kernel {kernel.release or '(unknown)'} is older than 7.0"
        if kernel.version
        else "The kernel's version could not be read",
        Severity.FAIL,
        evidence=tuple(evidence),
        affects="the strix-halo profile: GPU queues and the NPU driver",
        fix=fix,
        hint=hint,
    )


def _cwsr(case: Case, node: KfdNode) -> Iterator[Finding]:
    """The save area is sized by the kernel; too small a one corrupts memory and hangs the GPU under load."""
    wanted = node.cwsr_expected(fixed=True)
    path = f"/sys/class/kfd/kfd/topology/nodes/{node.number}/properties"
    if node.cwsr_size == wanted:
        return
    known_unfixed = node.cwsr_size < 0 or node.cwsr_size == node.cwsr_expected(fixed=False)
    fix, hint = kernel_fix(case.facts.os)
    found = "no cwsr_size line" if node.cwsr_size < 0 else f"cwsr_size {node.cwsr_size}"
    yield Finding(
        "kernel.cwsr-unfixed" if known_unfixed else "kernel.cwsr-unknown",
        "The kernel lacks the gfx1151 queue-size fix: the GPU will hang under load"
        if known_unfixed
        else "The kernel reports a wave save area that is neither the fixed nor the old size",
        Severity.FAIL if known_unfixed else Severity.INFO,
        evidence=(f"{path}: {found}; a fixed kernel says {wanted} for {node.compute_units} CUs",),
        affects="every GPU decode: MES hangs, memory access faults",
        confidence=Confidence.CERTAIN if node.cwsr_size > 0 else Confidence.LIKELY,
        depends_on=(*_GPU, "kernel.too-old"),
        fix=fix,
        hint=hint or "Until then the kernel parameter amdgpu.cwsr_enable=0 avoids the hang.",
    )


def check_firmware(case: Case) -> Iterator[Finding]:
    """The loaded MES firmware: version 0x83 faults on first dispatch; 0x80, 0x82 and later ones do not."""
    device = case.facts.strix_halo_gpu
    if device is None:
        return
    text = device.attributes.get("fw_version/mes_fw_version", "")
    try:
        version = int(text, 16) & 0xFFF if text else -1
    except ValueError:
        version = -1
    if version != _BAD_MES:
        return
    names = packages(case.facts.os, "firmware")
    argv = _UPDATE.get(case.facts.os.manager)
    steps = ((*argv, *names), initramfs_command(case.facts.os)) if argv and names else ()
    yield Finding(
        "firmware.mes-bad",
        "The loaded MES firmware 0x83 faults on the first GPU dispatch",
        Severity.FAIL,
        evidence=(f"/sys/bus/pci/devices/{device.address}/fw_version/mes_fw_version: {text}",),
        affects="every GPU decode",
        fix=Fix("update the firmware and initramfs", steps, needs_root=True, reboot=True) if steps else None,
        hint="linux-firmware 20260110 has a good one; it is loaded from the initramfs, so rebuild that.",
    )
