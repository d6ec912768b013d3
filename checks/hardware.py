"""What the kernel says of the GPU and the NPU: KFD topology and PCI, decoded. It judges nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from checks.stream import Stream

AMD_GPU_VENDOR: Final = 0x1002
AMD_CPU_VENDOR: Final = 0x1022
STRIX_HALO_GPU: Final = 0x1586
STRIX_HALO_NPU: Final = 0x17F0
STRIX_HALO_NPU_REVISION: Final = 0x11  # 0x10 is Strix Point, 0x20 Krackan (amdxdna's own table)
GFX1151: Final = 110501

# Devices that are mistaken for a Strix Halo: (name, gfx). libdrm amdgpu.ids.
LOOK_ALIKES: Final[Mapping[int, str]] = {
    0x150E: "Strix Point, gfx1150",
    0x1114: "Krackan Point, gfx1152",
    0x15BF: "Phoenix, gfx1103",
    0x1900: "Hawk Point, gfx1103",
}

# The fixed kernel's wave save area: CUs * (VGPR 0x60000 + SGPR 0x4000 + LDS 0x10000 + HWREG 0x1000) + control
# stack; an unfixed one counts 0x40000 for the VGPRs. The 40 CU value was seen in five independent reports.
_SAVE_PER_CU: Final = 0x60000 + 0x4000 + 0x10000 + 0x1000
_UNFIXED_SAVE_PER_CU: Final = 0x40000 + 0x4000 + 0x10000 + 0x1000
_SKUS: Final[Mapping[int, str]] = {40: "8060S", 32: "8050S", 16: "8040S"}


def gfx_name(target_version: int) -> str:
    """KFD's gfx_target_version as the compiler spells it: 110501 -> gfx1151, 90010 -> gfx90a.

    major is decimal, minor and step are one hexadecimal digit each. 0 (a CPU node) gives "".
    """
    if target_version <= 0:
        return ""
    major, rest = divmod(target_version, 10000)
    minor, step = divmod(rest, 100)
    return f"gfx{major}{minor:x}{step:x}"


def location(location_id: int, domain: int = 0) -> str:
    """KFD's location_id (bus << 8 | device << 3 | function) as a PCI address: 49664 -> 0000:c2:00.0."""
    bus, device, function = (location_id >> 8) & 0xFF, (location_id >> 3) & 0x1F, location_id & 7
    return f"{domain & 0xFFFFFFFF:04x}:{bus:02x}:{device:02x}.{function}"


@dataclass(frozen=True)
class KfdNode:
    """One node of the KFD topology. Sizes in bytes; -1 where the kernel does not say."""

    number: int
    gfx: str
    target_version: int
    vendor: int
    device: int
    address: str
    simd_count: int
    simd_per_cu: int
    cwsr_size: int
    ctl_stack_size: int
    render_minor: int

    @property
    def is_gpu(self) -> bool:
        return self.simd_count > 0 and self.target_version > 0

    @property
    def compute_units(self) -> int:
        return self.simd_count // self.simd_per_cu if self.simd_per_cu > 0 else 0

    @property
    def sku(self) -> str:
        """8060S, 8050S or 8040S by the number of compute units; "" for anything else."""
        return _SKUS.get(self.compute_units, "") if self.target_version == GFX1151 else ""

    def cwsr_expected(self, *, fixed: bool) -> int:
        """Bytes of the wave save area that a fixed (or unfixed) kernel reports for this many CUs."""
        per_cu = _SAVE_PER_CU if fixed else _UNFIXED_SAVE_PER_CU
        stack = 8192 if self.compute_units <= 16 else 16384
        return self.compute_units * per_cu + stack


@dataclass(frozen=True)
class PciDevice:
    """A PCI function with the attributes that its driver exports. `driver` is "" when none is bound."""

    address: str
    vendor: int
    device: int
    revision: int
    pci_class: int
    driver: str
    attributes: Mapping[str, str]

    @property
    def pci_id(self) -> str:
        return f"{self.vendor:04x}:{self.device:04x}"

    def number(self, name: str) -> int:
        """A decimal attribute, or -1 when the driver does not export it."""
        return parse_int(self.attributes.get(name, ""), -1)


def parse_int(text: str, otherwise: int = 0) -> int:
    """A decimal or 0x number of at most 20 digits, else `otherwise`: sysfs text is not trusted."""
    text = text.strip()
    if re.fullmatch(r"-?[0-9]{1,20}", text, re.ASCII):
        return int(text)
    return int(text, 16) if re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}", text) else otherwise


def parse_properties(text: str) -> dict[str, int]:
    """A KFD `properties` file: `name value` lines; lines of another shape are skipped."""
    pairs = (line.split() for line in text.split("\n"))
    return {pair[0]: parse_int(pair[1], -1) for pair in pairs if len(pair) == 2}


def read_kfd(stream: Stream) -> tuple[KfdNode, ...]:
    """Every KFD node of the stream, by number."""
    nodes = []
    for path, found in stream.files.items():
        match = re.fullmatch(r"/sys/class/kfd/kfd/topology/nodes/([0-9]{1,4})/properties", path)
        if match:
            nodes.append(_kfd_node(int(match[1]), parse_properties(found.text)))
    return tuple(sorted(nodes, key=lambda node: node.number))


def _kfd_node(number: int, values: Mapping[str, int]) -> KfdNode:
    target = values.get("gfx_target_version", 0)
    return KfdNode(
        number=number,
        gfx=gfx_name(target),
        target_version=target,
        vendor=values.get("vendor_id", 0),
        device=values.get("device_id", 0),
        address=location(values.get("location_id", 0), values.get("domain", 0)),
        simd_count=values.get("simd_count", 0),
        simd_per_cu=values.get("simd_per_cu", 0),
        cwsr_size=values.get("cwsr_size", -1),
        ctl_stack_size=values.get("ctl_stack_size", -1),
        render_minor=values.get("drm_render_minor", -1),
    )


def read_pci(stream: Stream) -> tuple[PciDevice, ...]:
    """Every PCI function that gather.sh read whole: AMD's display controllers and NPUs."""
    prefix = "/sys/bus/pci/devices/"
    attributes: dict[str, dict[str, str]] = {}
    for path, found in stream.files.items():
        if path.startswith(prefix):
            address, _, name = path[len(prefix) :].partition("/")
            attributes.setdefault(address, {})[name] = found.text.strip()
    return tuple(_pci_device(address, values) for address, values in sorted(attributes.items()))


def _pci_device(address: str, values: Mapping[str, str]) -> PciDevice:
    driver = re.search(r"^DRIVER=(\S+)$", values.get("uevent", ""), re.MULTILINE)
    return PciDevice(
        address=address,
        vendor=parse_int(values.get("vendor", "")),
        device=parse_int(values.get("device", "")),
        revision=parse_int(values.get("revision", "")),
        pci_class=parse_int(values.get("class", "")),
        driver=driver[1] if driver else "",
        attributes=values,
    )
