"""python3 -m engine.bench_expected: what gfx1151 should do with BitNet-b1.58-2B-4T. It measures nothing.

Tables for docs/hip-kernels.md, by engine/roofline.py. The range is from the least that others saw of good
kernels (190 GB/s, 30e12 operations a second in a ternary product) to what the chip can have (a streaming read
at 225 GB/s, 59.4e12 operations, launches that cost nothing).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Final

from engine.bench_report import kernel_rows
from engine.bench_synthetic import SHAPES
from engine.roofline import GFX1151, Chip, Packing, Shape, Step, decode_step, prefill_steps

LEAST: Final = replace(GFX1151, bandwidth=190e9, operations=30e12)
MOST: Final = replace(GFX1151, bandwidth=225e9, operations=59.4e12, launch=0.0)
PACKINGS: Final[tuple[tuple[Packing, str], ...]] = (("base_three", "1.6 bits"), ("two_bits", "2 bits"))


def steps(packing: Packing) -> dict[str, Step]:
    """What is shown of one packing, by name."""
    shape = Shape(SHAPES["2b4t"], packing)
    shown = {f"decode at {at}": decode_step(shape, at) for at in (128, 1024, 4096)}
    shown |= {f"decode at 128, {n} sequences": decode_step(shape, 128, n) for n in (4, 8, 16)}
    return shown | {f"prefill {n}": prefill_steps(shape, n) for n in (512, 4096)}


def row(name: str, bits: str, step: Step, chip: Chip = GFX1151) -> str:
    """One row of the table."""
    launching = step.launches * chip.launch
    cells = [name, bits, f"{step.rate(chip):.0f}", f"{step.rate(LEAST):.0f} to {step.rate(MOST):.0f}"]
    cells += [f"{1e3 * step.seconds(chip):.2f}", f"{1e3 * launching:.2f}", f"{step.bytes / 1e6:.0f}"]
    return "| " + " | ".join([*cells, str(step.launches)]) + " |"


def lines() -> list[str]:
    """Both tables."""
    titles = ("", "weights", "tokens/s", "range", "ms a step", "of which launches", "MB a step", "launches")
    table = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for packing, bits in PACKINGS:
        table += [row(name, bits, step) for name, step in steps(packing).items()]
    step = decode_step(Shape(SHAPES["2b4t"]), 128)
    return [
        *table,
        "",
        "Decode at 128, 1.6 bits a weight, kernel by kernel:",
        "",
        *kernel_rows(step, GFX1151),
    ]


def main() -> int:
    """Print them."""
    print("\n".join(lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
