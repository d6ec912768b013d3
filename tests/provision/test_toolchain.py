"""Building the native libraries: with and without the GPU's, what is recorded, what a bundle must have."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import pytest

from engine.errors import HaloError
from provision.bundle import prebuilt_library
from provision.run import Log
from provision.toolchain import (
    HIP_LIBRARY,
    LIBRARY,
    Toolchain,
    build_native,
    code_objects,
    describe_hip,
    system_toolchain,
)
from tests.provision.conftest import CHECKOUT

# The options of engine/native/CMakeLists.txt, over a source of one line; LACKS makes it a box without ROCm.
CMAKE = """
cmake_minimum_required(VERSION 3.20)
project(small LANGUAGES CXX)
set(HALO_HIP AUTO CACHE STRING "")
set(HALO_HIP_TARGETS none CACHE STRING "")
file(WRITE ${CMAKE_BINARY_DIR}/one.cpp "extern \\"C\\" const char *halo_said() { return SAYS; }\\n")
add_library(halo_cpu SHARED ${CMAKE_BINARY_DIR}/one.cpp)
target_compile_definitions(halo_cpu PRIVATE SAYS="cpu")
if(HALO_HIP STREQUAL ON)
  if(EXISTS ${CMAKE_SOURCE_DIR}/LACKS)
    message(FATAL_ERROR "halo: HALO_HIP is ON, and ROCm cannot be used: no hipcc and no amdclang++")
  endif()
  set(HALO_HIP_COMPILER ${CMAKE_CXX_COMPILER} CACHE FILEPATH "")
  set(HALO_HIP_RUNTIME /opt/rocm/lib/libamdhip64.so CACHE FILEPATH "")
  set(HALO_HIP_FLAGS "-O3 -ffp-contract=off" CACHE STRING "")
  add_library(halo_hip SHARED ${CMAKE_BINARY_DIR}/one.cpp)
  target_compile_definitions(halo_hip PRIVATE SAYS="hipv4-amdgcn-amd-amdhsa--${HALO_HIP_TARGETS}")
elseif(NOT HALO_HIP STREQUAL OFF)
  message(FATAL_ERROR "ROCm must not be looked for where nobody asked for it")
endif()
"""


@pytest.fixture(scope="module")
def tools() -> Toolchain:
    found, missing = system_toolchain()
    assert found is not None, missing
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "CMakeLists.txt").write_text(CMAKE)
    return folder


def test_the_gpus_library_and_what_made_it_are_recorded(
    tmp_path: Path, source: Path, tools: Toolchain
) -> None:
    lib = tmp_path / "lib"
    facts = build_native(source, tmp_path / "build", lib, tools, Log(), hip=True)
    assert facts == json.loads((lib / "build.json").read_text())
    assert facts["hip"]["targets"] == ["gfx1151"]
    assert facts["hip"]["program"] == str(tools.compiler) and facts["hip"]["compiler"]
    assert facts["hip"]["flags"] == "-O3 -ffp-contract=off"
    assert facts["hip"]["runtime"] == "/opt/rocm/lib/libamdhip64.so"
    assert set(facts["sha256"]) == {LIBRARY, HIP_LIBRARY}
    assert {path.name for path in lib.iterdir()} == {LIBRARY, HIP_LIBRARY, "build.json"}


def test_without_the_profile_no_rocm_is_looked_for(tmp_path: Path, source: Path, tools: Toolchain) -> None:
    lib = tmp_path / "lib"
    facts = build_native(source, tmp_path / "build", lib, tools, Log())
    assert "hip" not in facts and set(facts["sha256"]) == {LIBRARY}
    assert not (lib / HIP_LIBRARY).exists()


def test_a_box_without_rocm_is_told_how_to_go_on_without_a_gpu(
    tmp_path: Path, source: Path, tools: Toolchain
) -> None:
    (source / "LACKS").touch()
    lib = tmp_path / "lib"
    with pytest.raises(HaloError) as caught:
        build_native(source, tmp_path / "build", lib, tools, Log(), hip=True)
    assert "cannot be configured" in caught.value.message
    assert "halo install --profile cpu" in caught.value.hint
    assert not lib.exists()


def test_code_objects_are_read_from_the_library_itself(tmp_path: Path) -> None:
    """What CMake was asked for is not always what the compiler made."""
    library = tmp_path / HIP_LIBRARY
    names = [
        "host-x86_64-unknown-linux--",
        "hipv4-amdgcn-amd-amdhsa--gfx1151",
        "hipv4-amdgcn-amd-amdhsa--gfx90a",
    ]
    library.write_bytes(b"\x7fELF\0__CLANG_OFFLOAD_BUNDLE__\0" + b"\0\1".join(n.encode() for n in names) * 2)
    assert code_objects(library) == ["gfx1151", "gfx90a"]
    assert describe_hip(library, "HALO_HIP_TARGETS:STRING=gfx1100\n")["targets"] == ["gfx1151", "gfx90a"]


def test_of_a_packed_bundle_what_was_asked_for_counts(tmp_path: Path) -> None:
    library = tmp_path / HIP_LIBRARY
    library.write_bytes(b"\x7fELF\0CCOB" + bytes(range(256)))
    assert code_objects(library) == []
    assert describe_hip(library, "HALO_HIP_TARGETS:STRING=gfx1151;gfx1100\n")["targets"] == [
        "gfx1151",
        "gfx1100",
    ]
    assert describe_hip(library, "")["targets"] == []


def bundle(folder: Path, hip: object, *names: str) -> Path:
    place = folder / "prebuilt" / platform.machine()
    place.mkdir(parents=True)
    for name in names:
        (place / name).write_bytes(b"\x7fELF")
    facts = {"glibc": "2.17", **({"hip": hip} if hip else {})}
    (place / "build.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize(
    ("hip", "names", "cpu", "gpu"),
    [
        (None, (LIBRARY,), True, False),
        ({"targets": ["gfx1151"]}, (LIBRARY, HIP_LIBRARY), True, True),
        ({"targets": ["gfx1100"]}, (LIBRARY, HIP_LIBRARY), True, False),
        ({"targets": ["gfx1151"]}, (LIBRARY,), True, False),
        (None, (LIBRARY, HIP_LIBRARY), True, False),
        ({"targets": ["gfx1151"]}, (HIP_LIBRARY,), False, False),
    ],
)
def test_a_bundle_serves_a_strix_halo_only_with_code_for_its_gpu(
    tmp_path: Path, hip: object, names: tuple[str, ...], cpu: bool, gpu: bool
) -> None:
    """Without it both libraries are built there, which needs a compiler but no wrong engine."""
    made = bundle(tmp_path, hip, *names)
    assert (prebuilt_library(made) is not None) == cpu
    assert (prebuilt_library(made, hip=True) is not None) == gpu


def test_an_empty_bundle_serves_nobody(tmp_path: Path) -> None:
    assert prebuilt_library(tmp_path) is None and prebuilt_library(tmp_path, hip=True) is None
    shutil.rmtree(tmp_path)
    assert prebuilt_library(tmp_path, hip=True) is None


_IN_FORKY = """
import glob, json, sys
sys.dont_write_bytecode = True
sys.path.insert(0, "/mnt")
from pathlib import Path
from engine.device import choose_backend
from engine.errors import HaloError
from provision.run import Log
from provision.toolchain import Toolchain, build_native
compiler = Path(sorted(glob.glob("/usr/lib/llvm-*/bin/clang++"))[-1])
tools = Toolchain(Path("/usr/bin/cmake"), compiler, "Ninja", Path("/usr/bin/ninja"))
facts = build_native(Path("/mnt/engine/native"), Path("/srv/build"), Path("/srv/lib"), tools, Log(), hip=True)
try:
    choose_backend({"HALO_BACKEND": "hip"})
except HaloError as error:
    said = error.message
print(json.dumps({"facts": facts, "auto": choose_backend({}).facts(), "said": said}))
"""


@pytest.mark.slow
def test_the_real_hipcc_builds_it_and_without_a_gpu_the_cpu_decodes(tmp_path: Path) -> None:
    """In Debian forky, with HIP's runtime and no GPU: the install's own build, then the backend's choice."""
    from tests.engine.hip import toolchain as rocm

    if rocm.missing():
        pytest.skip(rocm.missing())
    argv = ["env", "HALO_LIB_DIR=/srv/lib", "python3", "-c", _IN_FORKY]
    answer = json.loads(rocm.inside(CHECKOUT, tmp_path, argv).out.splitlines()[-1])
    hip = answer["facts"]["hip"]
    assert (
        hip["targets"] == ["gfx1151"] and "clang" in hip["compiler"] and "-ffp-contract=off" in hip["flags"]
    )
    assert code_objects(tmp_path / "lib" / HIP_LIBRARY) == ["gfx1151"]
    assert answer["auto"]["backend"] == "cpu" and "there is no GPU here" in answer["auto"]["backend_reason"]
    assert answer["said"] == answer["auto"]["backend_reason"]
