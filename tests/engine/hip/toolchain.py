"""ROCm's compiler and LLVM's tools, run inside Debian forky's root (tests/hosts/roots.py). It needs no GPU.

The root is mounted read-only: each command gets a mount name space of its own, with /proc, /sys, /dev and a
temporary /tmp over it, and all of that ends with the command. Not the build of the library: CMake.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from tests.hosts import machine, roots
from tests.hosts.shell import CommandFailed, Result, run

NATIVE = Path(__file__).resolve().parents[3] / "engine" / "native"
TARGET = "gfx1151"
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra")

# /srv is the work directory, /mnt what is compiled (read-only). $1 is the root.
_SCRIPT = """set -e
mount --bind "$1" "$1"
mount -o remount,bind,ro "$1"
cd /
mount -t proc proc "$1/proc"
mount --rbind /sys "$1/sys"
mount --rbind /dev "$1/dev"
mount -t tmpfs tmpfs "$1/tmp"
mount --bind "$2" "$1/mnt"
mount -o remount,bind,ro "$1/mnt"
mount --bind "$3" "$1/srv"
root=$1
shift 3
exec chroot "$root" /usr/bin/env -i PATH=/usr/bin:/bin HOME=/tmp "$@"
"""


@functools.cache
def missing() -> str:
    """Why the forky root cannot be had or used here, in a few words; an empty string when it can."""
    absent = [tool for tool in ("mmdebstrap", "unshare", "chroot") if shutil.which(tool) is None]
    if os.geteuid() != 0:
        return "needs root"
    if absent:
        return f"not installed: {', '.join(absent)}"
    try:
        made = roots.root(roots.FORKY_ROCM)
    except (CommandFailed, OSError) as error:
        return f"Debian forky's root with hipcc cannot be made: {str(error)[-300:]}"
    return "" if (made / "usr/bin/hipcc").exists() else f"no hipcc in {made}"


def inside(source: Path, work: Path, argv: Sequence[str], *, check: bool = True) -> Result:
    """Run argv in the forky root: `source` is /mnt there (read-only), `work` is /srv (where results go)."""
    root = roots.root(roots.FORKY_ROCM)
    namespace = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _SCRIPT, "sh"]
    return run([*namespace, root, source, work, *argv], check=check, timeout=1200)


@functools.cache
def llvm() -> str:
    """The directory of LLVM's tools inside the root, such as /usr/lib/llvm-21/bin."""
    root = roots.root(roots.FORKY_ROCM)
    found = sorted(root.glob("usr/lib/llvm-*/bin/llvm-objdump"))
    if not found:
        raise RuntimeError(f"no llvm-objdump in {root}")
    return "/" + str(found[-1].parent.relative_to(root))


def genco(
    source: Path, output: Path, *, target: str = TARGET, tree: Path | None = None, defines: Sequence[str] = ()
) -> Path:
    """Compile one file of device code to a code object (an ELF for `target`) at `output`.

    `tree` is the directory that its includes reach into (the file's own, unless given).
    """
    tree = tree or source.parent
    output.parent.mkdir(parents=True, exist_ok=True)
    argv = [
        "hipcc",
        "--genco",
        "--no-gpu-bundle-output",
        f"--offload-arch={target}",
        "-x",
        "hip",
        *FLAGS,
        *(f"-D{name}" for name in defines),
        f"/mnt/{source.relative_to(tree)}",
        "-o",
        f"/srv/{output.name}",
    ]
    inside(tree, output.parent, argv)
    return output


def hipcc_version() -> str:
    """What hipcc says it is, in one line."""
    shown = inside(NATIVE, NATIVE, ["hipcc", "--version"]).out.splitlines()
    return ", ".join(line.strip() for line in shown[:2])


if __name__ == "__main__":
    print(machine.missing() or missing() or hipcc_version())
