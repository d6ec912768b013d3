"""Building the native libraries: with and without the GPU's, what is recorded, what a bundle must have."""

from __future__ import annotations

import io
import json
import platform
import shutil
from pathlib import Path

import pytest

from checks.case import Case, Installed
from checks.install import check_install
from engine.errors import HaloError
from provision.bundle import prebuilt_library
from provision.context import Context
from provision.desired import Desired
from provision.journal import Journal
from provision.layout import Layout
from provision.render import Screen
from provision.run import Log
from provision.steps import engine as engine_step
from provision.toolchain import (
    HIP_LIBRARY,
    LIBRARY,
    Toolchain,
    build_native,
    code_objects,
    describe_hip,
    system_toolchain,
)
from tests.checks.boxes import plain
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
  set(HALO_HIP_RUNTIME $ENV{ROCM_PATH}/lib/libamdhip64.so CACHE FILEPATH "")
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
    tmp_path: Path, source: Path, tools: Toolchain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROCM_PATH", "/srv/my-rocm")
    lib = tmp_path / "lib"
    facts = build_native(source, tmp_path / "build", lib, tools, Log(), hip=True)
    assert facts == json.loads((lib / "build.json").read_text())
    assert facts["hip"]["targets"] == ["gfx1151"]
    assert facts["hip"]["program"] == str(tools.compiler) and facts["hip"]["compiler"]
    assert facts["hip"]["flags"] == "-O3 -ffp-contract=off"
    assert facts["hip"]["runtime"] == "/srv/my-rocm/lib/libamdhip64.so", "the owner's place reaches CMake"
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


@pytest.fixture
def strix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """An install for a Strix Halo, just before its engine step; its venv is somebody else's test."""
    monkeypatch.setattr(engine_step, "ensure_venv", lambda _: None)
    monkeypatch.setattr(engine_step, "run", lambda *_, **__: None)
    prefix = tmp_path / "halo"
    layout = Layout("user", prefix, prefix / "state", tmp_path / "units", tmp_path / "bin/halo")
    screen = Screen(io.StringIO(), terminal=False)
    ctx = Context(
        layout, Desired("strix-halo"), tmp_path, screen, Log(), name="0.1.0-ab", profile="strix-halo"
    )
    ctx.journal = Journal.start(tmp_path / "journal", "install")
    (ctx.directory / "lib").mkdir(parents=True)
    (ctx.directory / "build").mkdir()
    return ctx


def judged(ctx: Context) -> list[str]:
    """What the doctor says of the manifest that such a step leads to."""
    manifest = {"profile": ctx.profile, "compiler": ctx.build, "files": {}}
    installed = Installed("/p", "/p/g", manifest, exists=True)
    case = Case(plain().facts(), "cpu", installed=installed)
    return [finding.id for finding in check_install(case)]


def test_the_step_builds_both_libraries_and_the_doctor_reads_what_it_records(
    strix: Context, source: Path, tools: Toolchain
) -> None:
    native = strix.directory / "src/engine/native"
    shutil.copytree(source, native)
    strix.tools = tools
    assert HIP_LIBRARY in engine_step.plan(strix)[-1].what
    engine_step.apply(strix)
    assert {p.name for p in (strix.directory / "lib").iterdir()} == {LIBRARY, HIP_LIBRARY, "build.json"}
    assert strix.changes == [f"build {LIBRARY} and {HIP_LIBRARY}"]
    assert judged(strix) == []
    strix.build["hip"]["targets"] = ["gfx1100"]
    assert judged(strix) == ["engine.no-code-object"]


def test_the_step_takes_both_libraries_from_a_bundle_that_has_them(strix: Context, tmp_path: Path) -> None:
    strix.bundle = bundle(tmp_path / "bundle", {"targets": ["gfx1151"]}, LIBRARY, HIP_LIBRARY)
    engine_step.apply(strix)
    assert {p.name for p in (strix.directory / "lib").iterdir()} == {LIBRARY, HIP_LIBRARY, "build.json"}
    assert judged(strix) == []


def test_a_bundle_without_the_gpus_library_needs_a_compiler_there(strix: Context, tmp_path: Path) -> None:
    """The CPU's alone would be an install that says strix-halo and never uses its GPU."""
    strix.bundle = bundle(tmp_path / "bundle", None, LIBRARY)
    with pytest.raises(HaloError, match="no compiler"):
        engine_step.apply(strix)


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
