"""Which compiler and CMake build the native library, and the build itself. Installs no system package."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.errors import HaloError
from provision.files import sha256_file
from provision.run import Log, run

COMPILERS: Final = ("c++", "g++", "clang++")
MINIMUM_CMAKE: Final = (3, 20)
LIBRARY: Final = "libhalo_cpu.so"
HIP_LIBRARY: Final = "libhalo_hip.so"
HIP_TARGET: Final = "gfx1151"  # of the profile strix-halo
# By which an owner says where ROCm is; they reach CMake and hipcc alone.
_ROCM_VARIABLES: Final = ("ROCM_PATH", "HIP_PATH", "HIP_DEVICE_LIB_PATH", "LD_LIBRARY_PATH")


@dataclass(frozen=True)
class Toolchain:
    """What a build uses. `wheels` says that it came from hashed wheels and not from the system."""

    cmake: Path
    compiler: Path
    generator: str
    make: Path
    wheels: bool = False


def system_toolchain() -> tuple[Toolchain | None, tuple[str, ...]]:
    """The system's toolchain, or None and the names of the features that are missing."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    cmake = shutil.which("cmake")
    if cmake is not None and _cmake_version(Path(cmake)) < MINIMUM_CMAKE:
        cmake = None
    ninja, make = shutil.which("ninja"), shutil.which("make")
    found = {"compiler": compiler, "cmake": cmake, "ninja": ninja or make}
    missing = tuple(name for name, path in found.items() if path is None)
    if compiler is None or cmake is None or missing:
        return None, missing
    generator, tool = ("Ninja", ninja) if ninja else ("Unix Makefiles", make)
    return Toolchain(Path(cmake), Path(compiler), generator, Path(str(tool))), ()


def _cmake_version(cmake: Path) -> tuple[int, ...]:
    result = run([cmake, "--version"], timeout=30, check=False)
    match = re.search(r"cmake version (\d+)\.(\d+)", result.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def wheel_toolchain(directory: Path) -> Toolchain:
    """The toolchain in `directory`, where the wheels of toolchain.lock were unpacked."""
    cmake = _first(directory, "cmake/data/bin/cmake", "bin/cmake")
    ninja = _first(directory, "ninja/data/bin/ninja", "bin/ninja")
    zig = _first(directory, "ziglang/zig")
    wrapper = directory / "zig-c++"
    # CMake wants a compiler that is one program. The caches stay inside, so that removal is complete.
    cache = directory / "zig-cache"
    wrapper.write_text(
        f"#!/bin/sh\nZIG_GLOBAL_CACHE_DIR='{cache}' ZIG_LOCAL_CACHE_DIR='{cache}' exec '{zig}' c++ \"$@\"\n"
    )
    for path in (wrapper, cmake, ninja, zig):
        path.chmod(0o755)
    return Toolchain(cmake, wrapper, "Ninja", ninja, wheels=True)


def _first(directory: Path, *names: str) -> Path:
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise HaloError(
        f"The toolchain wheels have no {names[0]}.", hint="install a C++ compiler and cmake, then again"
    )


def libraries(*, hip: bool) -> tuple[str, ...]:
    """The files of the native libraries that an install has."""
    return (LIBRARY, HIP_LIBRARY) if hip else (LIBRARY,)


def build_native(
    source: Path,
    build: Path,
    lib: Path,
    tools: Toolchain,
    log: Log,
    tick: Callable[[], None] | None = None,
    *,
    hip: bool = False,
) -> dict[str, Any]:
    """Build `source` (engine/native) in `build` and put the libraries into `lib`; returns build.json.

    `hip`: the GPU's library for HIP_TARGET too, for which CMake finds ROCm.
    """
    hint = f"the log has the compiler's words; by hand: cmake -S {source} -B BUILD && cmake --build BUILD"
    if hip:
        hint = f"{hint} (with -DHALO_HIP=ON); without the GPU: halo install --profile cpu"
    env = {name: os.environ[name] for name in _ROCM_VARIABLES if name in os.environ} if hip else {}
    configure = _configure(source, build, tools, hip=hip)
    run(configure, log=log, env=env, what="The native engine cannot be configured", hint=hint, tick=tick)
    jobs = str(os.cpu_count() or 1)
    compile_argv: list[str | Path] = [tools.cmake, "--build", build, "-j", jobs]
    run(compile_argv, log=log, env=env, what="The native engine cannot be built", hint=hint, tick=tick)
    lib.mkdir(parents=True, exist_ok=True)
    for name in libraries(hip=hip):
        shutil.copyfile(build / name, lib / name)
        (lib / name).chmod(0o755)
    facts = describe(tools, lib, build, hip=hip)
    (lib / "build.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    return facts


def _configure(source: Path, build: Path, tools: Toolchain, *, hip: bool) -> list[str | Path]:
    argv: list[str | Path] = [tools.cmake, "-S", source, "-B", build, "-G", tools.generator]
    argv += ["-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CXX_COMPILER={tools.compiler}"]
    argv += [f"-DCMAKE_MAKE_PROGRAM={tools.make}"]
    argv += ["-DHALO_HIP=ON", f"-DHALO_HIP_TARGETS={HIP_TARGET}"] if hip else ["-DHALO_HIP=OFF"]
    if not tools.wheels:
        argv.append("-DCMAKE_SHARED_LINKER_FLAGS=-static-libstdc++ -static-libgcc")
    return argv


def describe(tools: Toolchain, lib: Path, build: Path, *, hip: bool = False) -> dict[str, Any]:
    """build.json: compiler, flags, needed C library, sha256 of the libraries; of the GPU's more, in `hip`."""
    cache = (build / "CMakeCache.txt").read_text(errors="replace")
    flags = re.findall(r"^CMAKE_CXX_FLAGS(?:_RELEASE)?:STRING=(.*)$", cache, re.MULTILINE)
    made = [lib / name for name in libraries(hip=hip)]
    facts = {
        "schema": 1,
        "compiler": _version(tools.compiler),
        "from_wheels": tools.wheels,
        "flags": " ".join(flag for flag in flags if flag),
        "glibc": max((needed_glibc(library) for library in made), key=_numbers),
        "sha256": {library.name: sha256_file(library) for library in made},
    }
    if hip:
        facts["hip"] = describe_hip(lib / HIP_LIBRARY, cache)
    return facts


def describe_hip(library: Path, cache: str) -> dict[str, Any]:
    """Of the GPU's library: the GPUs it has code for, its compiler and the compiler's flags."""
    entries = dict(re.findall(r"^(HALO_HIP\w*):\w+=(.*)$", cache, re.MULTILINE))
    compiler = entries.get("HALO_HIP_COMPILER", "")
    asked = [target for target in entries.get("HALO_HIP_TARGETS", "").split(";") if target]
    return {
        "targets": code_objects(library) or asked,
        "compiler": _version(Path(compiler)) if compiler else "",
        "program": compiler,
        "runtime": entries.get("HALO_HIP_RUNTIME", ""),
        "flags": entries.get("HALO_HIP_FLAGS", "").replace(";", " "),
    }


def code_objects(library: Path) -> list[str]:
    """The GPUs for which a HIP library has code, as its offload bundle names them; [] where it is packed."""
    names = re.findall(rb"amdgcn-amd-amdhsa-[\w.]*-(gfx[0-9a-f]+)", library.read_bytes())
    return sorted({name.decode() for name in names})


def _version(compiler: Path) -> str:
    """The first line that says what a compiler is: hipcc's own comes before its clang's."""
    lines = run([compiler, "--version"], timeout=60, check=False).stdout.splitlines()
    return next((line.strip() for line in lines if "clang" in line), lines[0] if lines else compiler.name)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part)


def needed_glibc(library: Path) -> str:
    """The newest GLIBC symbol version that the library names, as 2.34; empty for none."""
    names = re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes())
    newest = max(((int(a), int(b)) for a, b in names), default=None)
    return f"{newest[0]}.{newest[1]}" if newest else ""


def wheels_fit() -> bool:
    """Whether toolchain.lock has a compiler for this machine."""
    import platform

    return platform.machine() in ("x86_64", "aarch64")
