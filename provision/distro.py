"""This distribution's package manager and its names for what halo needs. Pure look-ups; installs nothing."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_UNKNOWN: Final = "an unknown distribution"


@dataclass(frozen=True)
class Manager:
    """A package manager: its program, how it installs without asking, and its names of the features."""

    name: str
    program: str
    install: tuple[str, ...]
    packages: dict[str, tuple[str, ...]]
    refresh: tuple[str, ...] = ()


MANAGERS: Final = (
    Manager(
        "apt",
        "apt-get",
        ("apt-get", "install", "-y", "--no-install-recommends"),
        {"compiler": ("g++",), "cmake": ("cmake",), "ninja": ("ninja-build",), "venv": ("python3-venv",)},
        ("apt-get", "update"),
    ),
    Manager(
        "dnf",
        "dnf",
        ("dnf", "install", "-y"),
        {"compiler": ("gcc-c++",), "cmake": ("cmake",), "ninja": ("ninja-build",), "venv": ("python3-pip",)},
    ),
    Manager(
        "pacman",
        "pacman",
        ("pacman", "-S", "--needed", "--noconfirm"),
        {"compiler": ("gcc",), "cmake": ("cmake",), "ninja": ("ninja",), "venv": ("python", "python-pip")},
    ),
    Manager(
        "zypper",
        "zypper",
        ("zypper", "--non-interactive", "install"),
        {"compiler": ("gcc-c++",), "cmake": ("cmake",), "ninja": ("ninja",), "venv": ("python3-pip",)},
    ),
    Manager(
        "apk",
        "apk",
        ("apk", "add"),
        {"compiler": ("g++",), "cmake": ("cmake",), "ninja": ("ninja",), "venv": ("py3-pip",)},
    ),
)


def detect_manager() -> Manager | None:
    """The package manager whose program is on PATH, or None on a distribution unknown to halo."""
    return next((manager for manager in MANAGERS if shutil.which(manager.program)), None)


def distribution() -> str:
    """What /etc/os-release calls this system, for a sentence."""
    for path in (Path("/etc/os-release"), Path("/usr/lib/os-release")):
        try:
            return pretty_name(path.read_text(errors="replace"))
        except OSError:
            continue
    return _UNKNOWN


def pretty_name(text: str) -> str:
    """PRETTY_NAME of an os-release file's text."""
    for line in text.splitlines():
        if line.startswith("PRETTY_NAME="):
            with contextlib.suppress(ValueError):  # a quote that is never closed
                return "".join(shlex.split(line.partition("=")[2])) or _UNKNOWN
    return _UNKNOWN


def install_command(features: tuple[str, ...], manager: Manager | None) -> str:
    """What a person types to install `features` here; a sentence where the distribution is unknown."""
    if manager is None:
        return f"install {', '.join(features)} with your distribution's package manager"
    names = [name for feature in features for name in manager.packages.get(feature, ())]
    command = shlex.join([*manager.install, *names])
    return command if os.geteuid() == 0 else f"sudo {command}"
