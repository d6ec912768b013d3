"""One file that installs offline: how it is made, and what an install takes from one already unpacked."""

from __future__ import annotations

import io
import json
import os
import platform
import tarfile
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from engine.errors import HaloError
from provision.files import copy_files, remove_tree, sha256_file, source_files
from provision.generations import SOURCE_NAMES, source_sha256, version_of
from provision.layout import source_root
from provision.model_source import DEMO_MODEL, model_source
from provision.render import TICK, Screen
from provision.run import Log, failure, run
from provision.signals import ending_signals
from provision.toolchain import (
    HIP_LIBRARY,
    HIP_TARGET,
    LIBRARY,
    Toolchain,
    build_native,
    libraries,
    system_toolchain,
    wheel_toolchain,
)
from provision.venv import VERSIONS, base_interpreter, install, probe

MANIFEST: Final = "bundle.json"
SCHEMA: Final = 1
# The tags under which wheels for these hosts are published, newest first.
PLATFORMS: Final = (
    "manylinux_2_28",
    "manylinux_2_27",
    "manylinux_2_26",
    "manylinux_2_24",
    "manylinux_2_17",
    "manylinux2014",
)


def prebuilt_library(bundle: Path, *, hip: bool = False) -> Path | None:
    """The bundle's native library, when it is for this machine and this C library is not too old.

    With `hip` only where the GPU's, with code for HIP_TARGET, lies beside it: else both are built here.
    """
    folder = bundle / "prebuilt" / platform.machine()
    if not all((folder / name).is_file() for name in (*libraries(hip=hip), "build.json")):
        return None
    facts = json.loads((folder / "build.json").read_text())
    if hip and HIP_TARGET not in facts.get("hip", {}).get("targets", ()):
        return None
    needed = str(facts.get("glibc", ""))
    name, have = platform.libc_ver()
    if needed and (name != "glibc" or _numbers(have) < _numbers(needed)):
        return None
    return folder / LIBRARY


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def configure_bundle(parser: ArgumentParser) -> None:
    """Arguments of `halo bundle`."""
    add = parser.add_argument
    add("-o", "--output", type=Path, metavar="FILE", help="the file to make (halo-VERSION-ARCH.tar)")
    add("--python", metavar="X.Y[,X.Y]", help="Pythons of the target hosts (this one's)")
    add("--hip", action="store_true", help=f"with {HIP_LIBRARY} for {HIP_TARGET}; needs ROCm here")
    add("--wheel-dir", type=Path, metavar="DIR", help="take wheels from DIR alone, with no index")


def run_bundle(args: Namespace) -> int:
    """Make a bundle of the source that runs, for this machine's architecture."""

    source = source_root()
    machine = platform.machine()
    pythons = parse_pythons(args.python)
    output = Path(args.output or f"halo-{version_of(source)}-{machine}.tar").absolute()
    screen, log = Screen(), Log.temporary("bundle")
    staging = Path(tempfile.mkdtemp(prefix=".halo-bundle-", dir=output.parent))
    try:
        with ending_signals():
            fill(staging, source, pythons, machine, screen, log, args.wheel_dir, hip=args.hip)
            screen.begin(4, 4, "pack")
            partial = staging.with_suffix(".tar.tmp")
            pack(staging, partial)
            partial.replace(output)
            screen.end(TICK, f"{output} ({output.stat().st_size >> 20} MiB)")
    except HaloError as error:
        raise HaloError(error.message, hint=f"{error.hint}; the full log: {log.path}") from error
    finally:
        remove_tree(staging)
        staging.with_suffix(".tar.tmp").unlink(missing_ok=True)
    screen.line(f"install from it: python3 install.py --bundle {output.name}")
    return 0


def parse_pythons(text: str | None) -> tuple[tuple[int, int], ...]:
    """`3.11,3.12` to version pairs; the running version when nothing is asked."""
    if text is None:
        found = probe(base_interpreter())
        return (found.version if found is not None else VERSIONS[0],)
    known = {f"{major}.{minor}": (major, minor) for major, minor in VERSIONS}
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or any(word not in known for word in words):
        raise HaloError(f"--python {text} is not a list of versions.", hint="for example --python 3.11,3.12")
    return tuple(known[word] for word in words)


def fill(
    staging: Path,
    source: Path,
    pythons: Sequence[tuple[int, int]],
    machine: str,
    screen: Screen,
    log: Log,
    wheel_dir: Path | None = None,
    *,
    hip: bool = False,
) -> None:
    """Source, wheels and libraries into `staging`, and its manifest last."""
    screen.begin(1, 4, "source")
    copy_files(source, source_files(source, SOURCE_NAMES), staging)
    model = model_source(source)
    copy_files(model, model.iterdir(), staging / DEMO_MODEL)
    screen.end(TICK)
    screen.begin(2, 4, "wheels")
    wheels = staging / "wheels"
    wheels.mkdir()
    fetch_wheels(source / "provision/requirements.lock", wheels, pythons, machine, log, screen, wheel_dir)
    screen.end(TICK, f"{len(list(wheels.iterdir()))} for Python {', '.join(f'{a}.{b}' for a, b in pythons)}")
    screen.begin(3, 4, "native library")
    build = build_library(source, staging / "prebuilt" / machine, log, screen, hip=hip)
    screen.end(TICK, f"needs glibc {build['glibc']}" if build["glibc"] else "")
    manifest = {
        "schema": SCHEMA,
        "version": version_of(source),
        "machine": machine,
        "pythons": [f"{major}.{minor}" for major, minor in pythons],
        "source_sha256": source_sha256(source),
        "glibc": build["glibc"],
        "files": {
            path.relative_to(staging).as_posix(): sha256_file(path)
            for path in sorted(staging.rglob("*"))
            if path.is_file()
        },
    }
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def fetch_wheels(
    lock: Path,
    wheels: Path,
    pythons: Sequence[tuple[int, int]],
    machine: str,
    log: Log,
    screen: Screen,
    wheel_dir: Path | None = None,
) -> None:
    """Every wheel of the lock for each Python, checked by hash, and a pip that installs them."""
    python = probe(base_interpreter(), log)
    if python is None:
        raise HaloError("This Python is not one of 3.11 to 3.14.", hint="run it with another python3.1x")
    pip = _downloader(python.path, python.pip_wheel(), python.has_pip)
    for major, minor in pythons:
        argv = [*pip, "download", "--disable-pip-version-check", "--no-input", "-q", "--dest", str(wheels)]
        argv += [
            "--require-hashes",
            "--no-deps",
            "--only-binary",
            ":all:",
            "-r",
            str(_lock_for(lock, wheels, minor)),
        ]
        argv += ["--no-index", "--find-links", str(wheel_dir)] if wheel_dir is not None else []
        if (major, minor) != python.version:
            argv += [
                "--python-version",
                f"{major}.{minor}",
                "--implementation",
                "cp",
                "--abi",
                f"cp{major}{minor}",
            ]
            argv += ["--abi", "abi3", "--abi", "none"]
            argv += [word for tag in PLATFORMS for word in ("--platform", f"{tag}_{machine}")]
        result = run(argv, log=log, check=False, tick=screen.tick, timeout=1800)
        if not result.ok:
            raise failure(result, what=f"The wheels for Python {major}.{minor} cannot be had")
    (wheels / "requirements.txt").unlink(missing_ok=True)
    fetch_pip(pip, lock.with_name("pip.lock"), wheels, log, screen, wheel_dir)


def fetch_pip(
    pip: Sequence[str], lock: Path, wheels: Path, log: Log, screen: Screen, wheel_dir: Path | None
) -> None:
    """The pinned pip: that of this Python may be too old for another one's."""
    argv = [*pip, "download", "--disable-pip-version-check", "--no-input", "-q", "--dest", str(wheels)]
    argv += ["--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", str(lock)]
    argv += ["--no-index", "--find-links", str(wheel_dir)] if wheel_dir is not None else []
    run(argv, log=log, what="A pip for the bundle cannot be had", tick=screen.tick)


def _downloader(python: Path, wheel: Path | None, has_pip: bool) -> list[str]:
    if has_pip:
        return [str(python), "-m", "pip"]
    if wheel is not None:
        return [str(python), "-I", f"{wheel}/pip"]
    raise HaloError(
        "This Python has no pip to fetch wheels with.", hint="install python3-pip or python3-venv"
    )


def _lock_for(lock: Path, scratch: Path, minor: int) -> Path:
    """The lock with its version markers decided for Python 3.`minor`.

    pip evaluates markers for the Python that runs it, not for --python-version, so they are decided here.
    """
    text = lock.read_text()
    kept = []
    for block in text.replace("\\\n", "\0").splitlines():
        head = block.partition("\0")[0]
        marker = head.partition(";")[2]
        older = "python_full_version < '3.12'" in marker
        newer = "python_full_version >= '3.12'" in marker
        if (older and minor >= 12) or (newer and minor < 12):
            continue
        requirement = head.partition(";")[0].strip()
        kept.append(requirement + " " + block.partition("\0")[2].replace("\0", " "))
    path = scratch / "requirements.txt"
    path.write_text("\n".join(kept) + "\n")
    return path


def build_library(source: Path, into: Path, log: Log, screen: Screen, *, hip: bool) -> dict[str, Any]:
    """The native libraries for the hosts that have no compiler."""
    with tempfile.TemporaryDirectory(prefix="halo-build-") as scratch:
        build = Path(scratch)
        tools, missing = system_toolchain()
        chosen: Toolchain = (
            tools if tools is not None else _wheel_tools(source, build / "toolchain", missing, log)
        )
        native = source / "engine/native"
        return build_native(native, build / "native", into, chosen, log, screen.tick, hip=hip)


def _wheel_tools(source: Path, target: Path, missing: Sequence[str], log: Log) -> Toolchain:
    python = probe(base_interpreter(), log)
    if python is None:
        raise HaloError(f"There is no {', no '.join(missing)} here.", hint="install a C++ compiler and cmake")
    pip = _downloader(python.path, python.pip_wheel(), python.has_pip)
    install(pip, source / "provision/toolchain.lock", log, target=target)
    return wheel_toolchain(target)


def pack(staging: Path, output: Path) -> None:
    """A tar with the manifest first, so that a reader checks each member as it comes; no times, no owners."""
    with (
        output.open("wb") as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar,
    ):
        files = sorted(path for path in staging.rglob("*") if path.is_file() and path.name != MANIFEST)
        for path in (staging / MANIFEST, *files):
            info = tarfile.TarInfo(path.relative_to(staging).as_posix())
            data = path.read_bytes()
            info.size, info.mode = len(data), 0o755 if os.access(path, os.X_OK) else 0o644
            tar.addfile(info, io.BytesIO(data))
        stream.flush()
        os.fsync(stream.fileno())
