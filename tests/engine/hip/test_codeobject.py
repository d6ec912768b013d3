"""The engine's gfx1151 code as the real hipcc made it: what must be in it, and what must not.

`python3 -m tests.engine.hip.codeobject` prints the table that is judged here.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.engine.hip import codeobject, toolchain
from tests.engine.hip import test_emulated_attention as attention
from tests.engine.hip import test_emulated_decode as decode
from tests.engine.hip import test_emulated_head as head
from tests.engine.hip import test_emulated_prefill as prefill
from tests.engine.hip.codeobject import Kernel, Loop, occupancy
from tests.engine.hip.elf import CodeObject, NotACodeObject, unbundle

GEMV = re.compile(r"halo_(two|three)_\d+$")
PREFILL = re.compile(r"halo_(gemm_|prefill_(int8|rotor3))")


@pytest.fixture(scope="module")
def table(kernels_code: Path) -> list[Kernel]:
    return codeobject.kernels(kernels_code)


@pytest.fixture(scope="module")
def gemv(table: list[Kernel]) -> list[Kernel]:
    found = [kernel for kernel in table if GEMV.match(kernel.name)]
    assert found, "no kernel of the decode products has the name that this test knows"
    return found


def _names(kernels: list[Kernel]) -> list[str]:
    return [kernel.name for kernel in kernels]


def test_table_can_be_printed(table: list[Kernel], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{codeobject.table(table)}")
    assert len(table) > 10


def test_nothing_is_spilled_and_no_scratch_memory_is_used(table: list[Kernel]) -> None:
    assert _names([k for k in table if k.scratch or k.spills or k.count("scratch_")]) == []


def test_floats_are_those_of_the_engines_arithmetic(table: list[Kernel]) -> None:
    """Wave32, rounding to nearest, subnormals kept: what the kernel's descriptor sets on the card."""
    assert _names([k for k in table if not k.exact_floats]) == []


def test_no_approximation_stands_for_a_function(table: list[Kernel]) -> None:
    """v_exp, v_log, v_sin, v_rsq are not correctly rounded; v_rcp and v_sqrt begin what is refined."""
    assert _names([k for k in table if k.count(r"v_s?_?(exp|log|sin|cos|rsq)_f(32|16)")]) == []


def test_fused_operations_are_those_that_are_written(table: list[Kernel]) -> None:
    """Contraction is off, so v_mad and v_mac (which flush subnormals besides) never appear."""
    assert _names([k for k in table if k.count(r"v_(mad|mac)_(legacy_)?f32")]) == []


def test_the_disassembler_knows_every_instruction(table: list[Kernel]) -> None:
    """What gfx1151 has not, llvm-objdump writes as .long."""
    assert _names([k for k in table if k.count(r"\.long|<unknown>")]) == []


def test_decode_products_are_made_of_dot4(gemv: list[Kernel]) -> None:
    for kernel in gemv:
        assert kernel.hot_loop().count("v_dot4_i32_iu8") >= 16, kernel.name


def test_weights_are_loaded_128_bits_a_lane(gemv: list[Kernel]) -> None:
    for kernel in gemv:
        loop = kernel.hot_loop()
        assert loop.count("global_load_b128") >= 1, kernel.name
        assert loop.narrow_loads == 0, kernel.name


def test_no_kernel_addresses_memory_flat_in_its_hot_loop(table: list[Kernel]) -> None:
    """A flat access waits for LDS and global memory at once: the compiler lost track of a pointer."""
    assert _names([k for k in table if k.hot_loop().count("flat_")]) == []


def test_prefill_products_are_made_of_matrix_instructions(table: list[Kernel]) -> None:
    found = [k for k in table if PREFILL.match(k.name)]
    assert len(found) >= 8, "the prefill kernels have not the names that this test knows"
    for kernel in found:
        assert kernel.hot_loop().count("v_wmma_i32_16x16x16_iu8"), kernel.name


def test_decode_kernels_leave_room_for_four_waves_a_simd(gemv: list[Kernel]) -> None:
    """Fewer cannot hide the memory's latency."""
    assert {k.name: k.waves for k in gemv if k.waves < 4} == {}


def test_every_kernel_is_run_in_the_emulator(table: list[Kernel]) -> None:
    """A new kernel comes with a test that runs its machine code; a test's kernel is there."""
    tested = set().union(*(module.KERNELS for module in (attention, decode, head, prefill)))
    assert tested == set(_names(table))


@pytest.mark.parametrize(
    ("vgprs", "threads", "lds", "waves"),
    [(24, 256, 0, 16), (96, 256, 0, 16), (97, 256, 0, 12), (128, 128, 0, 10), (256, 256, 0, 4),
     (24, 256, 65536, 4), (24, 256, 20000, 12), (8, 32, 0, 16)],
)  # fmt: skip
def test_occupancy(vgprs: int, threads: int, lds: int, waves: float) -> None:
    """1536 registers in granules of 24; workgroups whole; 128 KB of LDS among four SIMDs."""
    assert occupancy(vgprs, threads, lds) == waves


def test_a_spilling_kernel_is_seen(hipcc: None, tmp_path: Path) -> None:
    """The table tells the truth of a kernel that is bad in each way: scratch, narrow loads, drained loads."""
    source = tmp_path / "bad.cpp"
    source.write_text(
        "#include <hip/hip_runtime.h>\n"
        'extern "C" __global__ void bad(const signed char *w, const int *at, int *out, int n) {\n'
        "  int local[40];\n"
        "  for (int i = 0; i < 40; ++i) local[i] = at[i];\n"
        "  int sum = 0;\n"
        "  for (int i = 0; i < n; ++i) sum += w[i * 64 + threadIdx.x] * local[at[i] % 40];\n"
        "  out[threadIdx.x] = sum;\n"
        "}\n"
    )
    (kernel,) = codeobject.kernels(toolchain.genco(source, tmp_path / "bad.co"))
    assert kernel.scratch >= 160 and kernel.count("scratch_store")
    loops = kernel.inner_loops()
    assert any(loop.narrow_loads for loop in loops) and any(loop.drained for loop in loops)
    assert kernel.hot_loop() == Loop(())


def test_code_of_another_gpu_is_not_mistaken(hipcc: None, tmp_path: Path) -> None:
    source = tmp_path / "one.cpp"
    source.write_text('#include <hip/hip_runtime.h>\nextern "C" __global__ void one(int *p) { *p = 1; }\n')
    code = CodeObject(toolchain.genco(source, tmp_path / "one.co", target="gfx1100").read_bytes())
    assert code.target == "amdgcn-amd-amdhsa--gfx1100"


def test_library_gives_its_code_object(hipcc: None, tmp_path: Path) -> None:
    """A host library with two targets in it: the one asked for comes out, a third is refused by name."""
    source = tmp_path / "two.cpp"
    source.write_text('#include <hip/hip_runtime.h>\nextern "C" __global__ void two(int *p) { *p = 2; }\n')
    both = ["--offload-arch=gfx1151", "--offload-arch=gfx1100"]
    argv = ["hipcc", *both, "-shared", "-fPIC", "-x", "hip", "/mnt/two.cpp", "-o", "/srv/two.so"]
    toolchain.inside(tmp_path, tmp_path, argv)
    library = (tmp_path / "two.so").read_bytes()
    for target in ("gfx1151", "gfx1100"):
        code = CodeObject(unbundle(library, target))
        assert code.target.endswith(target) and list(code.kernels) == ["two"]
    with pytest.raises(NotACodeObject, match="gfx1201"):
        unbundle(library, "gfx1201")


@pytest.mark.parametrize(
    "data", [b"", b"\x7fELF" + bytes(60), b"# text" * 100], ids=["empty", "other-elf", "text"]
)
def test_what_is_no_code_object_is_refused(data: bytes) -> None:
    with pytest.raises(NotACodeObject):
        CodeObject(unbundle(data, "gfx1151"))


def test_the_root_cannot_be_written_to(hipcc: None, tmp_path: Path) -> None:
    """The compiler's root is shared by all tests that need it."""
    done = toolchain.inside(tmp_path, tmp_path, ["touch", "/usr/bin/hipcc"], check=False)
    assert done.code != 0 and "Read-only" in done.err
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
