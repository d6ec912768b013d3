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


def build_native(
    source: Path, build: Path, lib: Path, tools: Toolchain, log: Log, tick: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Build `source` (engine/native) in `build` and put the library into `lib`; returns build.json."""
    configure: list[str | Path] = [
        tools.cmake,
        "-S",
        source,
        "-B",
        build,
        "-G",
        tools.generator,
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    configure += [f"-DCMAKE_CXX_COMPILER={tools.compiler}", f"-DCMAKE_MAKE_PROGRAM={tools.make}"]
    if not tools.wheels:
        configure.append("-DCMAKE_SHARED_LINKER_FLAGS=-static-libstdc++ -static-libgcc")
    hint = f"the log has the compiler's words; by hand: cmake -S {source} -B BUILD && cmake --build BUILD"
    run(configure, log=log, what="The native engine cannot be configured", hint=hint, tick=tick)
    jobs = str(os.cpu_count() or 1)
    compile_argv: list[str | Path] = [tools.cmake, "--build", build, "-j", jobs]
    run(compile_argv, log=log, what="The native engine cannot be built", hint=hint, tick=tick)
    lib.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(build / LIBRARY, lib / LIBRARY)
    (lib / LIBRARY).chmod(0o755)
    facts = describe(tools, lib / LIBRARY, build)
    (lib / "build.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
    return facts


def describe(tools: Toolchain, library: Path, build: Path) -> dict[str, Any]:
    """build.json: compiler, flags, what the library needs of the C library, its sha256."""
    version = run([tools.compiler, "--version"], timeout=60, check=False).stdout.partition("\n")[0]
    cache = (build / "CMakeCache.txt").read_text(errors="replace")
    flags = re.findall(r"^CMAKE_CXX_FLAGS(?:_RELEASE)?:STRING=(.*)$", cache, re.MULTILINE)
    return {
        "schema": 1,
        "compiler": version or tools.compiler.name,
        "from_wheels": tools.wheels,
        "flags": " ".join(flag for flag in flags if flag),
        "glibc": needed_glibc(library),
        "sha256": {library.name: sha256_file(library)},
    }


def needed_glibc(library: Path) -> str:
    """The newest GLIBC symbol version that the library names, as 2.34; empty for none."""
    names = re.findall(rb"GLIBC_(\d+)\.(\d+)", library.read_bytes())
    newest = max(((int(a), int(b)) for a, b in names), default=None)
    return f"{newest[0]}.{newest[1]}" if newest else ""


def wheels_fit() -> bool:
    """Whether toolchain.lock has a compiler for this machine."""
    import platform

    return platform.machine() in ("x86_64", "aarch64")
