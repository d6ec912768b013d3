"""Runs a gfx11 code object on NumPy arrays, instruction by instruction, on tinygrad's RDNA3 emulator.

HALO_TINYGRAD names a checkout of tinygrad's public repository (its PyPI package has not the emulator). What
each instruction does is tinygrad's; around it, this module adds what a GPU debugger would have: every address
is checked against the arrays that the kernel was given, accesses to LDS by two waves without a barrier
between them are refused, registers and LDS begin as rubbish, and waves and workgroups can run in reverse.
It knows nothing of time, caches or occupancy.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.engine.hip import fragments, overrides, shadow
from tests.engine.hip.elf import CodeObject, Descriptor

LANES = 32
_EXEC, _LIMIT = 126, 20_000_000
_MARGIN = 1 << 17  # behind LDS: more than an offset reaches
_RUBBISH = 0xFFC0DEAD  # as a float a NaN, as an address no array


class KernelFault(AssertionError):
    """The kernel did what a card would not forgive; the message names the instruction."""


def checkout() -> Path | None:
    """The tinygrad checkout of HALO_TINYGRAD, or None where the variable is not set."""
    named = os.environ.get("HALO_TINYGRAD")
    return Path(named) if named else None


@functools.cache
def _tinygrad() -> Any:
    """tinygrad's emulator module, with a fused multiply-add that is one on any compiler."""
    root = checkout()
    if root is None or not (root / "test/mockgpu/amd/emu.py").exists():
        raise RuntimeError(
            f"HALO_TINYGRAD must name a checkout of tinygrad with its test directory, not {root}"
        )
    os.environ.setdefault("CPU_COUNT", "1")
    sys.path.insert(0, str(root))
    from test.mockgpu.amd import emu, pcode  # type: ignore[import-not-found]
    from tinygrad.dtype import dtypes  # type: ignore[import-not-found]
    from tinygrad.uop.ops import Ops, UOp  # type: ignore[import-not-found]

    names = {dtypes.float32: "__builtin_fmaf", dtypes.float64: "__builtin_fma"}

    def fma(a: Any, b: Any, c: Any) -> Any:
        kind = next((x.dtype for x in (a, b, c) if x.dtype in names), None)
        if kind is None:
            raise NotImplementedError(f"fused multiply-add of {a.dtype}")
        return UOp(
            Ops.CUSTOM, kind, (a.cast(kind), b.cast(kind), c.cast(kind)), arg=names[kind] + "({0}, {1}, {2})"
        )

    pcode._FUNCS["fma"] = fma
    # A quotient below the smallest subnormal rounds to zero.
    fixup = emu.ir3.VOP3Op.V_DIV_FIXUP_F32
    emu.PCODE_RDNA3[fixup] = emu.PCODE_RDNA3[fixup].replace("UNDERFLOW_F32", "0.0F")
    # Rounding half to even by adding a half goes wrong at 0.49999997 and above 2^23.
    pcode._FUNCS["rint_f32"] = lambda a: UOp(Ops.CUSTOM, dtypes.float32, (a,), arg="__builtin_rintf({0})")
    for op in (emu.ir3.VOP1Op.V_RNDNE_F32_E32, emu.ir3.VOP3Op.V_RNDNE_F32_E64, emu.ir3.SOP1Op.S_RNDNE_F32):
        emu.PCODE_RDNA3[op] = "D0.f32 = rint_f32(S0.f32)"
    return emu


def pack(*values: Any) -> bytes:
    """A C struct, each member on its boundary: arrays are pointers, None is a null pointer, NumPy scalars are
    themselves, tuples are structs inside."""
    return _packed(values)[0]


def _packed(values: Sequence[Any]) -> tuple[bytes, int]:
    """The bytes of a struct, and its alignment."""
    out, widest = bytearray(), 1
    for value in values:
        if isinstance(value, tuple):
            raw, boundary = _packed(value)
        elif value is None or isinstance(value, np.ndarray):
            raw, boundary = struct.pack("<Q", 0 if value is None else value.ctypes.data), 8
        elif isinstance(value, np.generic):
            raw, boundary = value.tobytes(), value.nbytes
        else:
            raise TypeError(f"{type(value).__name__} has no size in C: use np.int32 and the like")
        widest = max(widest, boundary)
        out += bytes(-len(out) % boundary) + raw
    return bytes(out + bytes(-len(out) % widest)), widest


@dataclass
class Step:
    """One decoded instruction: what runs it, and what it may touch."""

    size: int
    name: str
    text: str
    compiled: Callable[..., Any] | None = None  # tinygrad's, which moves the program counter on
    buffers: Sequence[int] = ()
    own: Callable[[shadow.Wave], None] | None = None
    check: Callable[[shadow.Wave], None] | None = None
    move: Callable[[shadow.Wave], int] | None = None  # of a DPP operand; gives the lanes that may execute
    lds_address: int = -1  # the register with a DS instruction's address
    stands_in: np.ndarray | None = (
        None  # the instruction without DPP: tinygrad reads its fields where the counter is
    )


@dataclass
class Program:
    """A code object at its place in memory, its instructions decoded as they are met."""

    code: CodeObject
    steps: dict[int, Step] = field(default_factory=dict)
    executed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        loads = self.code.loads()
        size = max(at + length for at, _, length in loads)
        self._memory = np.zeros(size + 8192, np.uint8)
        pad = -self._memory.ctypes.data % 4096
        for at, data, _ in loads:
            self._memory[pad + at : pad + at + len(data)] = np.frombuffer(data, np.uint8)
        self.base = self._memory.ctypes.data + pad
        self.image = self._memory[pad : pad + size]
        self.arch = "rdna3"

    def threads(self, kernel: str) -> int:
        """The work items of a workgroup that the kernel was compiled for."""
        return int(self.code.kernels[kernel][".max_flat_workgroup_size"])

    def step(self, pc: int) -> Step:
        found = self.steps.get(pc)
        if found is None:
            found = self.steps[pc] = self._decode(pc)
        return found

    def _decode(self, pc: int) -> Step:
        emu = _tinygrad()
        raw = bytes((ctypes.c_char * 16).from_address(pc))
        if int.from_bytes(raw[:4], "little") in overrides.CACHE_INVALIDATES:
            return Step(8, "CACHE_INVALIDATE", f"a cache invalidation at {pc - self.base:#x}")
        inst = emu.decode_inst(raw, self.arch)
        name = emu._op_name(inst)
        step = Step(inst.size(), name, f"{inst!r} at {pc - self.base:#x}")
        try:
            step.own = overrides.find(inst, name)
            moved = overrides.dpp(inst, raw)
            if moved is not None:
                raw, step.size, step.move = moved
                step.stands_in = np.frombuffer(raw, np.uint8)
            if step.own is None:
                (program, runtime) = emu._get_runner(
                    raw[: emu.decode_inst(raw, self.arch).size() + 4], self.arch
                )
                step.compiled, step.buffers = runtime.fxn, program.arg.globals
        except (
            Exception
        ) as error:  # whatever tinygrad raises where it knows an instruction not, or not this form
            raise KernelFault(
                f"the emulator cannot run {step.text}: {type(error).__name__}: {error}"
            ) from error
        step.check = shadow.checker(inst, name)
        if type(inst).__name__ == "DS":
            step.lds_address = inst.addr.offset - 256
        return step


def _with_moved_operand(step: Step, fiber: _Fiber) -> None:
    """Run the instruction that stands in for one with a DPP operand."""
    before = int(fiber.sgpr[_EXEC])
    fiber.sgpr[_EXEC] = step.move(fiber.wave)  # type: ignore[misc]
    fiber.state.pc = step.stands_in.ctypes.data  # type: ignore[union-attr]
    step.compiled(*[fiber.pointers[i] for i in step.buffers])  # type: ignore[misc]
    fiber.sgpr[_EXEC] = before


def _with_safe_addresses(step: Step, fiber: _Fiber) -> None:
    """Run a DS instruction with address 0 in the lanes that do not execute: tinygrad loads for those too."""
    idle = ~fiber.wave.active()
    before = fiber.vgpr[step.lds_address][idle]
    fiber.vgpr[step.lds_address][idle] = 0
    step.compiled(*[fiber.pointers[i] for i in step.buffers])  # type: ignore[misc]
    fiber.vgpr[step.lds_address][idle] = before


class _Fiber:
    """A wave: its registers in tinygrad's form, and views of them."""

    def __init__(self, emu: Any, state: Any, shared: Sequence[int], index: int) -> None:
        self.state = state
        self.done = False
        self.sgpr = np.frombuffer(state._sgpr_mv, np.uint32)
        self.vgpr = np.frombuffer(state._vgpr_mv, np.uint32).reshape(-1, LANES)
        addresses = (
            state.sgpr_buf._buf.va_addr,
            state.vgpr_buf._buf.va_addr,
            *shared,
            state.accvgpr_buf._buf.va_addr,
        )
        self.pointers = [ctypes.c_uint64(address) for address in addresses]
        self.wave = shadow.Wave(index, self.sgpr, self.vgpr)


def _user_registers(descriptor: Descriptor, packet: int, kernarg: int) -> list[int]:
    """The scalar registers that the command processor fills before a wave starts, in their order."""
    wanted = ((0, 4), (packet, 2), (0, 2), (kernarg, 2), (0, 2), (0, 2), (descriptor.private_bytes, 1))
    out: list[int] = []
    for bit, (number, words) in enumerate(wanted):
        if descriptor.properties & (1 << bit):
            out += [number & 0xFFFFFFFF, number >> 32, 0, 0][:words]
    return out


def _kernarg(
    program: Program, kernel: str, struct_bytes: bytes, grid: Sequence[int], block: Sequence[int], lds: int
) -> np.ndarray:
    """The kernel's argument segment: its one struct, then the hidden arguments that its metadata ask for."""
    meta = program.code.kernels[kernel]
    room = np.zeros(int(meta[".kernarg_segment_size"]) + 64, np.uint8)
    explicit = [arg for arg in meta[".args"] if not str(arg[".value_kind"]).startswith("hidden")]
    if len(explicit) != 1 or explicit[0][".size"] != len(struct_bytes):
        sizes = [arg[".size"] for arg in explicit]
        raise KernelFault(
            f"{kernel} takes arguments of {sizes} bytes, and was given one struct of {len(struct_bytes)}"
        )
    room[: len(struct_bytes)] = np.frombuffer(struct_bytes, np.uint8)
    known = {f"hidden_block_count_{axis}": grid[i] for i, axis in enumerate("xyz")}
    known |= {f"hidden_group_size_{axis}": block[i] for i, axis in enumerate("xyz")}
    known |= {f"hidden_remainder_{axis}": 0 for axis in "xyz"}
    known |= {f"hidden_global_offset_{axis}": 0 for axis in "xyz"}
    known |= {"hidden_grid_dims": 3, "hidden_dynamic_lds_size": lds}
    for arg in meta[".args"]:
        kind, size, at = str(arg[".value_kind"]), int(arg[".size"]), int(arg[".offset"])
        if kind in known:
            room[at : at + size] = np.frombuffer(known[kind].to_bytes(size, "little"), np.uint8)
    return room


@dataclass
class Launch:
    """What a launch is about, for the workgroups of it."""

    program: Program
    kernel: str
    descriptor: Descriptor
    block: Sequence[int]
    lds_bytes: int
    user: list[int]
    kernarg: int
    arrays: shadow.Arrays
    backward: bool

    def run(self, grid: Sequence[int]) -> None:
        groups = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        for group in reversed(groups) if self.backward else groups:
            self._workgroup(group)

    def _fibers(self, group: tuple[int, int, int], lds: np.ndarray) -> list[_Fiber]:
        emu = _tinygrad()
        threads = self.block[0] * self.block[1] * self.block[2]
        lds_at = lds.ctypes.data
        made = []
        for index, start in enumerate(range(0, threads, LANES)):
            state = emu._init_wave(
                self.program.base + self.descriptor.entry, start, threads, *self.block, self.kernarg,
                self.descriptor.rsrc2, 0, self.program.arch, *group, self.user, LANES,
            )  # fmt: skip
            fiber = _Fiber(emu, state, (0, lds_at, 0), index)
            fiber.vgpr[1:] = _RUBBISH
            first = len(self.user) + (self.descriptor.rsrc2 >> 7 & 7).bit_count()
            fiber.sgpr[first:104] = _RUBBISH
            made.append(fiber)
        return made

    def _workgroup(self, group: tuple[int, int, int]) -> None:
        lds = np.full(self.lds_bytes + _MARGIN, 0xA5, np.uint8)
        watch = shadow.Lds(self.lds_bytes, lds)
        fibers = self._fibers(group, lds)
        order = list(reversed(fibers)) if self.backward else fibers
        while not all(fiber.done for fiber in fibers):
            for fiber in order:
                if not fiber.done:
                    self._until_barrier(fiber, watch)
            watch.barrier()
        if not (lds[self.lds_bytes :] == 0xA5).all():
            raise KernelFault(f"{self.kernel} wrote behind its {self.lds_bytes} bytes of LDS")

    def _until_barrier(self, fiber: _Fiber, watch: shadow.Lds) -> None:
        emu = _tinygrad()
        program, state, wave = self.program, fiber.state, fiber.wave
        wave.lds, wave.arrays, wave.backward = watch, self.arrays, self.backward
        count = program.executed
        for _ in range(_LIMIT):
            pc = state.pc
            if pc == emu.ENDPGM_PC:
                fiber.done = True
                return
            step = program.steps.get(pc) or program.step(pc)
            count[step.name] += 1
            try:
                if step.check is not None:
                    step.check(wave)
                if step.own is not None:
                    step.own(wave)
                elif step.move is not None:
                    _with_moved_operand(step, fiber)
                elif step.lds_address >= 0:
                    _with_safe_addresses(step, fiber)
                    continue
                elif step.compiled is not None:
                    step.compiled(*[fiber.pointers[i] for i in step.buffers])
                    if step.name == "S_BARRIER":
                        return
                    continue
            except (shadow.Violation, fragments.BadFragment) as error:
                raise KernelFault(f"{self.kernel}: {step.text}: {error}") from None
            state.pc = pc + step.size
        raise KernelFault(f"{self.kernel}: a wave ran {_LIMIT} instructions without a barrier or an end")


def launch(
    program: Program,
    kernel: str,
    grid: Sequence[int],
    block: Sequence[int],
    argument: bytes,
    arrays: Sequence[np.ndarray],
    *,
    lds: int = 0,
    backward: bool = False,
) -> None:
    """Run a kernel to its end. Arrays are changed in place; all that it may touch must be among `arrays`.

    grid in workgroups, block in work items, each three numbers. `argument` is the kernel's one struct, `lds`
    the bytes of dynamic shared memory. Raises KernelFault where something goes wrong.
    """
    descriptor = program.code.descriptor(kernel)
    if not (descriptor.wave32 and descriptor.keeps_denormals and descriptor.rounds_to_nearest):
        raise KernelFault(f"{kernel} is not wave32 with subnormals and rounding to nearest: {descriptor}")
    if descriptor.private_bytes:
        raise KernelFault(f"{kernel} uses {descriptor.private_bytes} bytes of scratch memory a lane")
    total = descriptor.lds_bytes + lds
    kernarg = _kernarg(program, kernel, argument, grid, block, lds)
    packet = np.zeros(64, np.uint8)
    items = [grid[axis] * block[axis] for axis in range(3)]
    struct.pack_into("<HHHHHHIIIII", packet.data, 0, 0, 3, *block, 0, *items, descriptor.private_bytes, total)
    known = shadow.Arrays([*arrays, kernarg, packet, program.image])
    user = _user_registers(descriptor, packet.ctypes.data, kernarg.ctypes.data)
    Launch(program, kernel, descriptor, block, total, user, kernarg.ctypes.data, known, backward).run(grid)


def launch_both_ways(
    program: Program,
    kernel: str,
    grid: Sequence[int],
    block: Sequence[int],
    argument: bytes,
    arrays: Sequence[np.ndarray],
    *,
    lds: int = 0,
) -> None:
    """Launch twice, with waves and workgroups forward and backward; the results must be the same bytes.

    Backward, the approximate instructions are off by one unit in the last place, as the card's may be.
    """
    before = [array.copy() for array in arrays]
    launch(program, kernel, grid, block, argument, arrays, lds=lds)
    forward = [array.copy() for array in arrays]
    for array, kept in zip(arrays, before, strict=True):
        if array.flags.writeable:
            array[...] = kept
    launch(program, kernel, grid, block, argument, arrays, lds=lds, backward=True)
    for array, other in zip(arrays, forward, strict=True):
        if array.tobytes() != other.tobytes():
            raise KernelFault(f"{kernel}: other results when waves and workgroups run in reverse")


def load(path: Path) -> Program:
    """The code object of a file."""
    return Program(CodeObject(path.read_bytes()))
