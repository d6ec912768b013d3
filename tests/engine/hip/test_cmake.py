"""What CMake makes of the options of the GPU engine: libraries found or lacking, said in words.

Configured and, by nvcc where it is, built; by this machine's CMake, and by that of the root that has hipcc.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest

from tests.engine.hip import toolchain
from tests.hosts.shell import Result, run

ROOM = ["PATH", "HOME", "TMPDIR", "LANG"]


def _configure(folder: Path, *options: str, env: dict[str, str] | None = None) -> Result:
    """`cmake -S engine/native` with these options; the makefiles are in `folder`."""
    if shutil.which("cmake") is None:
        pytest.fail("cmake is not installed; python3 tests/run.py brings what the tests need")
    kept = {name: os.environ[name] for name in ROOM if name in os.environ} | (env or {})
    return run(["cmake", "-S", toolchain.NATIVE, "-B", folder, *options], check=False, env=kept)


def _has_rocm() -> bool:
    return any(Path(place).exists() for place in ("/opt/rocm", "/usr/bin/hipcc")) or bool(
        shutil.which("hipcc")
    )


def _in_root(tmp_path: Path, *options: str) -> Result:
    """The same in the root that has hipcc; its output in one."""
    compiler = f"CMAKE_CXX_COMPILER={toolchain.llvm()}/clang++"
    argv = ["cmake", "-G", "Ninja", "-S", "/mnt", "-B", "/srv/build", f"-D{compiler}", *options]
    return toolchain.inside(toolchain.NATIVE, tmp_path, argv, check=False)


def _in_words(text: str) -> str:
    """CMake breaks the lines of its errors."""
    return " ".join(text.split())


@pytest.mark.skipif(_has_rocm(), reason="this machine has ROCm")
def test_without_rocm_the_library_is_left_out_with_the_reason(tmp_path: Path) -> None:
    done = _configure(tmp_path)
    assert done.code == 0 and "halo: no HIP library (no hipcc and no amdclang++)" in done.out
    listed = run(["cmake", "--build", tmp_path, "--target", "help"], check=False).out
    assert "halo_cpu" in listed
    assert not any(name in listed for name in ("halo_hip", "halo_cuda", "halo_sim"))


@pytest.mark.skipif(_has_rocm(), reason="this machine has ROCm")
def test_rocm_that_was_asked_for_and_is_not_there_is_an_error_with_a_hint(tmp_path: Path) -> None:
    done = _configure(tmp_path, "-DHALO_HIP=ON", env={"ROCM_PATH": "/nowhere"})
    said = _in_words(done.err)
    assert done.code != 0
    assert "no hipcc and no amdclang++ Looked in /nowhere, /opt/rocm" in said and "-DHALO_HIP=OFF" in said


def test_cuda_that_was_asked_for_and_is_not_there_is_an_error_with_a_hint(
    hipcc: None, tmp_path: Path
) -> None:
    done = _in_root(tmp_path, "-DHALO_HIP=OFF", "-DHALO_CUDA=ON")
    said = _in_words(done.err)
    assert done.code != 0 and "there is no nvcc in PATH" in said and "-DHALO_CUDA=OFF" in said, done


def test_an_nvcc_without_its_toolkit_is_named(tmp_path: Path) -> None:
    done = _configure(tmp_path, "-DHALO_HIP=OFF", "-DHALO_CUDA=ON", "-DHALO_NVCC=/bin/true")
    assert done.code != 0 and "/bin/true has no cudart_static" in _in_words(done.err), done


def test_the_simulated_device_needs_no_compiler_of_its_own(tmp_path: Path) -> None:
    done = _configure(tmp_path, "-DHALO_HIP=OFF", "-DHALO_SIM=ON")
    assert done.code == 0 and "halo: library of the simulated GPU" in done.out, done
    assert "halo_sim" in run(["cmake", "--build", tmp_path, "--target", "help"], check=False).out


def test_debians_hipcc_is_found_and_tried(hipcc: None, tmp_path: Path) -> None:
    done = _in_root(tmp_path)
    assert done.code == 0 and "halo: HIP library for gfx1151: /usr/bin/hipcc, /usr/lib/" in done.out, done


def test_several_targets(hipcc: None, tmp_path: Path) -> None:
    done = _in_root(tmp_path, "-DHALO_HIP=ON", "-DHALO_HIP_TARGETS=gfx1151;gfx1100")
    assert done.code == 0 and "halo: HIP library for gfx1151,gfx1100:" in done.out, done


@pytest.mark.parametrize("wanted", ["AUTO", "ON"])
def test_a_target_that_the_compiler_does_not_know_is_named(hipcc: None, tmp_path: Path, wanted: str) -> None:
    done = _in_root(tmp_path, f"-DHALO_HIP={wanted}", "-DHALO_HIP_TARGETS=gfx9999")
    assert (done.code == 0) == (wanted == "AUTO")
    assert "/usr/bin/hipcc makes no code for gfx9999" in _in_words(done.out + done.err), done


def test_nvcc_compiles_the_same_source(tmp_path: Path) -> None:
    if not list(Path("/usr/local").glob("cuda*/bin/nvcc")) and not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    done = _configure(tmp_path, "-DHALO_HIP=OFF", "-DHALO_CUDA=ON", "-DCMAKE_BUILD_TYPE=Release")
    assert done.code == 0, done
    done = run(["cmake", "--build", tmp_path, "--target", "halo_cuda"], check=False, timeout=900)
    assert done.code == 0, done
    library, needed = ctypes.CDLL(str(tmp_path / "libhalo_cuda.so")), ctypes.c_size_t()
    facts = ctypes.create_string_buffer(4096)
    status = library.halo_device_facts(facts, ctypes.c_size_t(len(facts)), ctypes.byref(needed))
    assert status in (0, 4)  # a GPU's facts; without one HALO_UNSUPPORTED, and no crash
