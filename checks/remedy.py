"""Which command puts a thing on this distribution. It names packages; it runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from checks.finding import Fix
from checks.host import OsRelease

_INSTALL: Final[Mapping[str, tuple[str, ...]]] = {
    "apt-get": ("apt-get", "install", "--yes"),
    "dnf": ("dnf", "install", "--assumeyes"),
    "pacman": ("pacman", "-S", "--needed", "--noconfirm"),
    "zypper": ("zypper", "--non-interactive", "install"),
    "apk": ("apk", "add"),
}

# What provides a capability, by package manager; the names are those of the distributions' archives.
PACKAGES: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "compiler": {
        "apt-get": ("g++",),
        "dnf": ("gcc-c++",),
        "pacman": ("gcc",),
        "zypper": ("gcc-c++",),
        "apk": ("g++", "musl-dev"),
    },
    "cmake": {manager: ("cmake",) for manager in _INSTALL},
    "make": {manager: ("make",) for manager in _INSTALL},
    "venv": {
        "apt-get": ("python3-venv",),
        "dnf": ("python3", "python3-pip"),
        "pacman": ("python",),
        "zypper": ("python3", "python3-pip"),
        "apk": ("python3", "py3-pip"),
    },
    "rocm": {
        "apt-get": ("hipcc", "libamdhip64-dev", "rocminfo"),
        "dnf": ("hipcc", "rocm-hip-devel", "rocm-device-libs", "rocminfo"),
        "pacman": ("rocm-hip-sdk", "rocminfo"),
    },
    "firmware": {
        "apt-get": ("firmware-amd-graphics",),
        "dnf": ("linux-firmware", "amd-gpu-firmware"),
        "pacman": ("linux-firmware",),
        "zypper": ("kernel-firmware-amdgpu",),
    },
}
# Releases whose own archive holds a ROCm that cannot compile for gfx1151.
_OLD_ROCM: Final = frozenset(
    {("debian", "11"), ("debian", "12"), ("debian", "13"), ("ubuntu", "22.04"), ("ubuntu", "24.04")}
)


def packages(os: OsRelease, *capabilities: str) -> tuple[str, ...]:
    """The packages that provide `capabilities` here, each once; () when this distribution is not known."""
    found = [name for each in capabilities for name in PACKAGES[each].get(os.manager, ())]
    return tuple(dict.fromkeys(found))


def install_fix(os: OsRelease, summary: str, *capabilities: str) -> Fix | None:
    """The fix that installs `capabilities` on this distribution, or None where nobody knows how.

    On an image-based system nothing is layered: the work goes into a toolbox, whose own manager is used.
    """
    names = packages(os, *capabilities)
    if os.id == "nixos":
        wanted = {
            "compiler": "gcc",
            "cmake": "cmake",
            "make": "gnumake",
            "venv": "python3",
            "rocm": "rocmPackages.clr",
        }
        nix = [wanted[each] for each in capabilities if each in wanted]
        return Fix(f"{summary} in a shell", (("nix-shell", "-p", *nix),)) if nix else None
    if not names:
        return None
    install = (*_INSTALL[os.manager], *names)
    if os.immutable:
        enter = ("toolbox", "run", "sudo", *install)
        return Fix(
            f"{summary} in a toolbox, for the system itself is read-only",
            (("toolbox", "create", "-y"), enter),
        )
    refresh: tuple[tuple[str, ...], ...] = (("apt-get", "update"),) if os.manager == "apt-get" else ()
    return Fix(summary, (*refresh, install), needs_root=True)


def rocm_fix(os: OsRelease) -> tuple[Fix | None, str]:
    """(fix, hint) for a ROCm that compiles for gfx1151."""
    guide = "AMD's ROCm install guide for Ryzen names a repository: take its gfx1151 SDK."
    if (os.id, os.version_id) in _OLD_ROCM or os.manager in ("", "zypper", "apk"):
        return (
            None,
            f"The archive of {os.pretty_name or 'this distribution'} has no ROCm for gfx1151. {guide}",
        )
    return install_fix(os, "install ROCm", "rocm"), "A shell opened before the install may lack its PATH."


def kernel_fix(os: OsRelease) -> tuple[Fix | None, str]:
    """(fix, hint) for a newer kernel; a reboot follows."""
    if os.immutable and os.id not in ("nixos", "steamos"):
        return Fix("update the image", (("rpm-ostree", "upgrade"),), needs_root=True, reboot=True), ""
    argv: dict[str, tuple[tuple[str, ...], ...]] = {
        "dnf": (("dnf", "upgrade", "--refresh", "--assumeyes", "kernel"),),
        "pacman": (("pacman", "-Syu"),),
        "zypper": (("zypper", "--non-interactive", "dup"),),
    }
    if os.manager in argv:
        return Fix("update the kernel", argv[os.manager], needs_root=True, reboot=True), ""
    if os.id == "ubuntu":
        return None, "Ubuntu 26.04 and later ship a 7.x kernel: upgrade the release, then reboot."
    if os.id == "debian" and os.version_id:
        suite = f"{os.codename}-backports" if os.codename else "backports"
        return (
            None,
            f"Take a 7.x kernel from {suite} where it has one, or move to a newer Debian; then reboot.",
        )
    if os.manager == "apt-get":
        update = (("apt-get", "update"), ("apt-get", "install", "--yes", "linux-image-amd64"))
        return Fix("update the kernel", update, needs_root=True, reboot=True), ""
    return None, "Install a 7.x kernel from this distribution, then reboot."


def initramfs_command(os: OsRelease) -> tuple[str, ...]:
    """The command that packs firmware into the initramfs anew: it is loaded from there, not from disk."""
    return {
        "apt-get": ("update-initramfs", "-u", "-k", "all"),
        "pacman": ("mkinitcpio", "-P"),
    }.get(os.manager, ("dracut", "--force"))
