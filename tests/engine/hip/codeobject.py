"""The table of a gfx1151 code object: registers, occupancy, and what its inner loops are made of.

  python3 -m tests.engine.hip.codeobject             compiles engine/native/hip/kernels.cpp by the real hipcc
  python3 -m tests.engine.hip.codeobject FILE        a code object, or a library with one in it

Registers and sizes are the code object's own metadata (elf.py); instructions come from llvm-objdump of the
root that has hipcc (toolchain.py). It says nothing of speed.

Occupancy, on gfx1151 (LLVM's AMDGPU.td: Feature1_5xVGPRs; AMD's "RDNA3.5" ISA reference guide): a SIMD has
1536 vector registers of 32 lanes, given out in granules of 24, and room for 16 waves; a WGP has 4 SIMDs and
128 KB of LDS, and a workgroup stays on one WGP. Dynamic LDS is not in a code object: --lds NAME=BYTES.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.engine.hip import toolchain
from tests.engine.hip.elf import CodeObject, unbundle
from tests.engine.hip.loops import Instruction, innermost, natural_loops

REGISTERS, GRANULE, MOST_WAVES, SIMDS, LDS_OF_WGP, LDS_GRANULE = 1536, 24, 16, 4, 128 << 10, 512
_LINE = re.compile(
    r"^\t(?P<text>\S.*?)\s*// (?P<at>[0-9A-F]{12}): (?P<words>[0-9A-F ]+)(?:<(?P<to>[^>]+)>)?\s*$"
)
_SYMBOL = re.compile(r"^[0-9a-f]{16} <(?P<name>[^>]+)>:$")


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop (loops.py)."""

    body: tuple[Instruction, ...]

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, i.text)) for i in self.body)

    @property
    def narrow_loads(self) -> int:
        """Global loads of fewer than 128 bits a lane."""
        return self.count("global_load_") - self.count("global_load_b128")

    @property
    def drained(self) -> int:
        """Waits in the loop for every load that is under way."""
        return self.count(r"s_waitcnt .*vmcnt\(0\)")


@dataclass(frozen=True)
class Kernel:
    """A kernel of a code object; sizes in bytes, waves a SIMD with the LDS that was said."""

    name: str
    threads: int
    vgprs: int
    sgprs: int
    lds: int
    scratch: int
    spills: int
    body: tuple[Instruction, ...]
    exact_floats: bool  # rounds to nearest, keeps subnormals

    def count(self, pattern: str) -> int:
        return Loop(self.body).count(pattern)

    @property
    def waves(self) -> float:
        return occupancy(self.vgprs, self.threads, self.lds)

    @cached_property
    def _loops(self) -> list[tuple[Instruction, ...]]:
        return natural_loops(self.body)

    def inner_loops(self) -> list[Loop]:
        """Loops that have no other inside them."""
        return [Loop(body) for body in innermost(self._loops)]

    def hot_loop(self) -> Loop:
        """The inner loop with most products in it: of matrices, else of four bytes, else fused.

        Where no inner loop has any, the smallest loop with some; without one, it is empty.
        """
        for pattern in ("v_wmma_", "v_dot4_", "v_(dual_)?fma"):
            inner = [loop for loop in self.inner_loops() if loop.count(pattern)]
            if inner:
                return max(inner, key=lambda loop: loop.count(pattern))
            outer = [loop for loop in map(Loop, self._loops) if loop.count(pattern)]
            if outer:
                return min(outer, key=lambda loop: len(loop.body))
        return Loop(())


def occupancy(vgprs: int, threads: int, lds: int) -> float:
    """Waves a SIMD: by vector registers, by slots, and by LDS in whole workgroups of `threads` on a WGP."""
    waves_of_group = -(-threads // 32)
    by_registers = min(MOST_WAVES, REGISTERS // max(-(-vgprs // GRANULE) * GRANULE, GRANULE))
    groups = SIMDS * by_registers // waves_of_group
    if lds:
        groups = min(groups, LDS_OF_WGP // (-(-lds // LDS_GRANULE) * LDS_GRANULE))
    return groups * waves_of_group / SIMDS


def disassemble(path: Path) -> dict[str, tuple[Instruction, ...]]:
    """symbol -> its instructions, by llvm-objdump."""
    argv = [f"{toolchain.llvm()}/llvm-objdump", "--disassemble", f"/mnt/{path.name}"]
    listing = toolchain.inside(path.parent, path.parent, argv).out
    starts: dict[str, int] = {}
    rows: dict[str, list[tuple[int, str, str | None]]] = {}
    name = ""
    for line in listing.splitlines():
        if symbol := _SYMBOL.match(line):
            name = symbol["name"]
            starts[name] = int(line[:16], 16)
            rows[name] = []
        elif found := _LINE.match(line):
            rows[name].append((int(found["at"], 16), found["text"], found["to"]))
        elif line.startswith("\t"):
            raise ValueError(f"llvm-objdump wrote a line that is not understood: {line!r}")
    return {
        name: tuple(Instruction(at, text, _address(to, starts)) for at, text, to in body)
        for name, body in rows.items()
    }


def _address(symbol: str | None, starts: dict[str, int]) -> int | None:
    """The address of `name` or `name+0x1f`."""
    if symbol is None:
        return None
    name, _, offset = symbol.partition("+")
    return starts[name] + int(offset or "0", 16) if name in starts else None


def kernels(path: Path, lds: dict[str, int] | None = None) -> list[Kernel]:
    """The kernels of a code object's file, in the order of its metadata."""
    code = CodeObject(path.read_bytes())
    bodies = disassemble(path)
    found = []
    for name, meta in code.kernels.items():
        descriptor = code.descriptor(name)
        found.append(Kernel(
            name=name,
            threads=meta[".max_flat_workgroup_size"],
            vgprs=meta[".vgpr_count"],
            sgprs=meta[".sgpr_count"],
            lds=meta[".group_segment_fixed_size"] + (lds or {}).get(name, 0),
            scratch=meta[".private_segment_fixed_size"],
            spills=meta[".vgpr_spill_count"] + meta[".sgpr_spill_count"],
            body=_without_padding(bodies[name]),
            exact_floats=descriptor.rounds_to_nearest and descriptor.keeps_denormals and descriptor.wave32,
        ))  # fmt: skip
    return found


def _without_padding(body: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
    last = max((n for n, i in enumerate(body) if i.name == "s_endpgm"), default=len(body) - 1)
    return body[: last + 1]


_COLUMNS = ("kernel", "VGPR", "SGPR", "LDS", "scratch", "spills", "waves/SIMD", "dot4", "wmma", "flat",
            "loop: instr", "dot4", "wmma", "b128", "narrower", "drains")  # fmt: skip


def _row(kernel: Kernel) -> tuple[str, ...]:
    loop = kernel.hot_loop()
    numbers = (
        kernel.vgprs, kernel.sgprs, kernel.lds, kernel.scratch, kernel.spills, f"{kernel.waves:g}",
        kernel.count("v_dot4_i32_iu8"), kernel.count("v_wmma_"), kernel.count("flat_"), len(loop.body),
        loop.count("v_dot4_i32_iu8"), loop.count("v_wmma_"), loop.count("global_load_b128"),
        loop.narrow_loads, loop.drained,
    )  # fmt: skip
    return (kernel.name, *map(str, numbers))


def table(found: list[Kernel]) -> str:
    """The kernels as lines of text; the loop is the inner loop with most products in it."""
    rows = [_COLUMNS, *map(_row, found)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(_COLUMNS))]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def compiled(folder: Path, target: str = toolchain.TARGET) -> Path:
    """The engine's device code as a code object in `folder`."""
    source, output = toolchain.NATIVE / "hip" / "kernels.cpp", folder / f"kernels.{target}.co"
    return toolchain.genco(source, output, target=target, tree=toolchain.NATIVE)


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.engine.hip.codeobject", description="gfx1151 code, as a table"
    )
    parser.add_argument(
        "file", nargs="?", type=Path, help="a code object or a library; none: compile the engine's"
    )
    parser.add_argument("--target", default=toolchain.TARGET)
    parser.add_argument(
        "--lds", action="append", default=[], metavar="NAME=BYTES", help="dynamic LDS of a kernel"
    )
    said = parser.parse_args(argv)
    if reason := toolchain.missing():
        print(f"Debian forky's root with hipcc is needed: {reason}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code.co"
        if said.file is None:
            path = compiled(Path(folder), said.target)
        else:
            path.write_bytes(unbundle(said.file.read_bytes(), said.target))
        lds = {name: int(size) for name, _, size in (item.partition("=") for item in said.lds)}
        print(f"{CodeObject(path.read_bytes()).target}, {toolchain.hipcc_version()}")
        print(table(kernels(path, lds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
