"""Boxes for the tests of checks: streams composed from a dictionary of files, and who they stand for.

No Strix Halo was at hand. Every such box here is COMPOSED from public logs and kernel sources (the values of
docs on gfx1151: KFD properties, PCI ids, sysfs sizes), and is no capture of a machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from checks.facts import Facts, parse

FIXTURES = Path(__file__).parent / "fixtures"
GPU = "/sys/bus/pci/devices/0000:c5:00.0"
NPU = "/sys/bus/pci/devices/0000:c6:00.1"
NODE = "/sys/class/kfd/kfd/topology/nodes/1/properties"

KFD = """cpu_cores_count 0
simd_count 80
max_waves_per_simd 16
lds_size_in_kb 64
wave_front_size 32
array_count 4
simd_arrays_per_engine 2
cu_per_simd_array 10
simd_per_cu 2
gfx_target_version 110501
vendor_id 4098
device_id 5510
location_id 50432
domain 0
drm_render_minor 128
num_xcc 1
cwsr_size 19185664
ctl_stack_size 16384"""

OS_RELEASE: Mapping[str, str] = {
    "debian": 'ID=debian\nVERSION_ID="12"\nVERSION_CODENAME=bookworm\nPRETTY_NAME="Debian GNU/Linux 12"',
    "forky": 'ID=debian\nVERSION_CODENAME=forky\nPRETTY_NAME="Debian GNU/Linux forky/sid"',
    "ubuntu": 'ID=ubuntu\nID_LIKE=debian\nVERSION_ID="26.04"\nPRETTY_NAME="Ubuntu 26.04 LTS"',
    "arch": 'ID=arch\nBUILD_ID=rolling\nPRETTY_NAME="Arch Linux"',
    "cachyos": 'ID=cachyos\nID_LIKE=arch\nBUILD_ID=rolling\nPRETTY_NAME="CachyOS"',
    "fedora": 'ID=fedora\nVERSION_ID=44\nVARIANT_ID=workstation\nPRETTY_NAME="Fedora Linux 44"',
    "bazzite": 'ID=bazzite\nID_LIKE="fedora"\nVERSION_ID=44\nPRETTY_NAME="Bazzite 44"',
    "unknown": 'ID=plan9\nPRETTY_NAME="Plan 9 from Bell Labs"',
}


@dataclass(frozen=True)
class Box:
    """What a stream is composed of. Keys are paths or names; an empty tool is one that is not there."""

    files: Mapping[str, str] = field(default_factory=dict)
    denied: tuple[str, ...] = ()
    places: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    rocm_roots: tuple[str, ...] = ()
    disks: Mapping[str, tuple[int, str, str]] = field(default_factory=dict)

    def but(self, **changes: object) -> Box:
        """This box with parts laid over it; a None value takes a key away."""
        merged = {}
        for name, value in changes.items():
            old = getattr(self, name)
            if isinstance(old, Mapping) and isinstance(value, Mapping):
                value = {k: v for k, v in {**old, **value}.items() if v is not None}
            merged[name] = value
        return Box(**{**self.__dict__, **merged})  # type: ignore[arg-type]

    def stream(self) -> bytes:
        lines = ["halo-facts 1 65536"]
        for path, text in self.files.items():
            lines += [f"@file present {path}", *(f" {line}" for line in text.split("\n"))]
        lines += [f"@file denied {path}" for path in self.denied]
        lines += [f"@path {kind} {path}" for path, kind in self.places.items()]
        for name, (code, text) in self.commands.items():
            lines += [f"@cmd {name}", *(f" {line}" for line in text.split("\n")), "", f"@exit {code}"]
        lines += [f"@tool {name} {path}".rstrip() for name, path in self.tools.items()]
        for name, value in self.env.items():
            lines += [f"@env {name}", f" {value}"]
        lines += ["@list rocm-roots", *(f" {root}" for root in self.rocm_roots)]
        for path, (free, rights, nearest) in self.disks.items():
            df = f" /dev/nvme0n1p2 488000000 1000 {free // 1024} 1% /"
            lines += [f"@disk {path}", " Filesystem 1024-blocks Used Available Capacity Mounted on", df]
            lines.append(f"@path dir {rights} {nearest}")
        return "\n".join([*lines, "@end", ""]).encode()

    def facts(self) -> Facts:
        return parse(self.stream())


def python_features(missing: str = "") -> tuple[int, str]:
    names = ("venv", "ensurepip", "pip", "ssl", "ctypes", "lzma", "zlib")
    lines = [f"{name} {'no' if name == missing else 'yes'}" for name in names]
    return 0, "\n".join(["version 3.12.4", *lines])


def plain(distribution: str = "debian", kernel: str = "6.12.8") -> Box:
    """A machine with a compiler, no AMD GPU, systemd, and room at /opt/halo."""
    return Box(
        files={
            "/etc/os-release": OS_RELEASE[distribution],
            "/proc/sys/kernel/osrelease": kernel,
            "/proc/meminfo": "MemTotal:       131072000 kB\nMemAvailable:   120000000 kB",
            "/proc/self/limits": "Max locked memory         unlimited            unlimited            bytes",
            "/proc/self/mountinfo": "27 1 254:0 / / rw,relatime - ext4 /dev/nvme0n1p2 rw",
            "/proc/1/comm": "systemd",
        },
        places={
            "/sys/bus/pci/devices": "dir r-",
            "/run/systemd/system": "dir rw",
            "/run/user/1000/systemd/private": "other rw",
            "/var/lib/systemd/linger/ada": "file r-",
        },
        commands={
            "uname": (0, f"Linux {kernel} x86_64"),
            "id": (0, "uid=1000(ada) gid=1000(ada) groups=1000(ada),44(video),105(render)"),
            "groups": (0, "render:x:105:ada\nvideo:x:44:ada"),
            "c++ --version": (0, "c++ (Debian 12.2.0-14+deb12u1) 12.2.0"),
            "cmake --version": (0, "cmake version 3.25.1"),
            "python3 features": python_features(),
        },
        tools={
            "c++": "/usr/bin/c++",
            "g++": "",
            "cmake": "/usr/bin/cmake",
            "make": "/usr/bin/make",
            "python3": "/usr/bin/python3",
        },
        disks={"/opt/halo": (50_000_000_000, "rw", "/opt")},
    )


def strix_halo(distribution: str = "arch", kernel: str = "7.2.5-arch1-1") -> Box:
    """A healthy Strix Halo with 128 GB, ROCm 7.2.3 and the NPU in use (composed, not captured)."""
    return plain(distribution, kernel).but(
        files={
            f"{GPU}/vendor": "0x1002",
            f"{GPU}/device": "0x1586",
            f"{GPU}/revision": "0xc1",
            f"{GPU}/class": "0x038000",
            f"{GPU}/uevent": "DRIVER=amdgpu\nPCI_CLASS=38000\nPCI_ID=1002:1586\nPCI_SLOT_NAME=0000:c5:00.0",
            f"{GPU}/mem_info_vram_total": "536870912",
            f"{GPU}/mem_info_gtt_total": "120259084288",
            f"{GPU}/fw_version/mes_fw_version": "0x00000086",
            f"{NPU}/vendor": "0x1022",
            f"{NPU}/device": "0x17f0",
            f"{NPU}/revision": "0x11",
            f"{NPU}/class": "0x118000",
            f"{NPU}/uevent": "DRIVER=amdxdna\nPCI_ID=1022:17F0",
            NODE.replace("/1/", "/0/"): "cpu_cores_count 32\nsimd_count 0\ngfx_target_version 0",
            NODE: KFD,
            "/opt/rocm/.info/version": "7.2.3-70",
        },
        places={
            "/sys/class/kfd/kfd/topology/nodes": "dir r-",
            "/dev/kfd": "char rw",
            "/dev/dri/renderD128": "char rw",
            "/dev/accel/accel0": "char rw",
            "/sys/module/amdgpu": "dir r-",
            "/sys/module/amdxdna": "dir r-",
            "/opt/rocm/bin/hipcc": "file r-",
            "/opt/rocm/lib/cmake/hip/hip-config.cmake": "file r-",
        },
        rocm_roots=("/opt/rocm", "/usr"),
    )


BOXES = {
    "debian-12-no-gpu": plain(),
    "strix-halo-arch": strix_halo(),
    "strix-halo-kernel-unfixed": strix_halo("fedora", "6.17.9-300.fc43.x86_64").but(
        files={NODE: KFD.replace("cwsr_size 19185664", "cwsr_size 13942784")}
    ),
    "forky-hipcc-no-gpu": plain("forky", "7.2.12+deb14-amd64").but(
        files={"/usr/include/hip/hip_version.h": "#define HIP_VERSION_MAJOR 6\n#define HIP_VERSION_MINOR 4"},
        places={"/usr/bin/hipcc": "file r-"},
        rocm_roots=("/usr",),
    ),
}


def write_fixtures() -> None:
    """`python -m tests.checks.boxes` writes the composed fixtures anew."""
    for name, box in BOXES.items():
        (FIXTURES / f"{name}.facts").write_bytes(box.stream())


if __name__ == "__main__":
    write_fixtures()
