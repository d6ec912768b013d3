"""Base root file systems for test hosts: made once by mmdebstrap, cached, never written to again.

A host lays an overlay above one of these. It is not the place for anything that a test changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.hosts import machine
from tests.hosts.shell import run

# What makes a Debian a host that can be booted and reached. Python alone, no python3-venv and no compiler:
# that is the bare box which the installer has to cope with.
BARE = (
    "systemd", "systemd-sysv", "dbus", "libpam-systemd", "dbus-user-session", "openssh-server",
    "iproute2", "python3", "sudo", "ca-certificates",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A suite and the packages in it beyond mmdebstrap's minimal set."""

    suite: str
    packages: tuple[str, ...]

    def key(self) -> str:
        """Twelve hex digits that change whenever the root would be another."""
        parts = [self.suite, *self.packages, *machine.apt_sources(self.suite), *machine.apt_options()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


BOOKWORM = Recipe("bookworm", BARE)
BOOKWORM_BUILD = Recipe("bookworm", (*BARE, "python3-venv", "g++", "cmake"))
FORKY_ROCM = Recipe("forky", (*BARE, "python3-venv", "hipcc", "cmake", "ninja-build"))


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Only one process at a time makes roots in this cache."""
    with (directory / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def root(recipe: Recipe) -> Path:
    """The recipe's root directory, made on first use (half a minute for BOOKWORM, with a network)."""
    roots = machine.cache() / "roots"
    roots.mkdir(exist_ok=True)
    target = roots / f"{recipe.suite}-{recipe.key()}"
    with _locked(roots):
        if not target.exists():
            partial = target.with_suffix(".partial")
            if partial.exists():
                shutil.rmtree(partial)
            _bootstrap(recipe, partial)
            partial.rename(target)
    return target


def _bootstrap(recipe: Recipe, target: Path) -> None:
    options = [f"--aptopt={line}" for line in machine.apt_options()]
    # A mirror may serve an older snapshot of a suite that this machine does not follow.
    options.append('--aptopt=Acquire::Check-Valid-Until "false"')
    run(
        ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(recipe.packages)}", *options,
         recipe.suite, target, *machine.apt_sources(recipe.suite)],
        timeout=1200,
    )  # fmt: skip
