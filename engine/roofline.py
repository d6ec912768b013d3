"""How long a step of the GPU engine takes at the least, by what its kernels move. It measures nothing.

A kernel takes the longer of its bytes by the memory's bandwidth and its operations by the chip's rate, and
each launch its share besides. Kernels and bytes are those of engine/native/hip (session.cpp says which run,
layout.h and head_launch.h how the data lie). Caches are taken to keep nothing from one kernel to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from engine.model import ModelConfig

Packing = Literal["two_bits", "base_three"]
STEP_COLUMNS: Final[dict[str, int]] = {"two_bits": 256, "base_three": 320}  # of a tile's step, layout.h
TILE_ROWS: Final = 8
STEP_BYTES: Final = 512
HEAD_STEP: Final = (256, 1536)  # columns and bytes of a step of the coarse head, head_launch.h
KV_BLOCK: Final = 256  # positions whose sums are made in one piece
MOST_DECODE: Final = 16  # tokens that the decode kernels take at once
MOST_CHUNK: Final = 1024  # tokens that prefill takes through the layers together
# Share of the vocabulary that the exact pass computes, of one token and of several: docs/exact-head.md.
EXACT_SHARE: Final = (0.002, 0.008)


@dataclass(frozen=True)
class Chip:
    """Bytes and int8 operations a second that can be had, and seconds that a launch in a graph costs."""

    name: str
    bandwidth: float
    launch: float = 0.0
    operations: float = 0.0  # 0: not known, and then no bound


# As others measured: 212 GB/s in a device copy by rocm_bandwidth_test (256 on paper); 3.85 us a node of a
# graph of tiny kernels, on gfx1100; 43.2e12 operations in an int8 WMMA product (59.4e12 on paper at 2.9 GHz).
GFX1151: Final = Chip("gfx1151", 212e9, 3.85e-6, 43.2e12)
CHIPS: Final = {chip.name: chip for chip in (GFX1151,)}


@dataclass(frozen=True)
class Kernel:
    """One kernel of a step: its name, launches a step, and bytes and int8 operations of each launch."""

    name: str
    launches: int
    bytes: float
    operations: float = 0.0

    def seconds(self, chip: Chip) -> float:
        """All launches of a step: the work's time and that of launching."""
        return self.launches * (self.work_seconds(chip) + chip.launch)

    def work_seconds(self, chip: Chip) -> float:
        """One launch's work, at the bandwidth or at the rate of operations, whichever takes longer."""
        computing = self.operations / chip.operations if chip.operations else 0.0
        return max(self.bytes / chip.bandwidth, computing)


@dataclass(frozen=True)
class Step:
    """What one pass over the layers is made of; `tokens` come of it."""

    kernels: tuple[Kernel, ...]
    tokens: int

    @property
    def launches(self) -> int:
        return sum(kernel.launches for kernel in self.kernels)

    @property
    def bytes(self) -> float:
        return sum(kernel.launches * kernel.bytes for kernel in self.kernels)

    def seconds(self, chip: Chip) -> float:
        """The step's least time on `chip`."""
        return sum(kernel.seconds(chip) for kernel in self.kernels)

    def rate(self, chip: Chip) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds(chip)


@dataclass(frozen=True)
class Shape:
    """A model as the GPU has it. `row_bytes` is a row of the embedding or of the head, in full precision."""

    config: ModelConfig
    packing: Packing = "base_three"
    kv: str = "int8"
    row_bytes: int = 0

    @property
    def row(self) -> int:
        return self.row_bytes or 2 * self.config.hidden_size  # bfloat16

    def matrices(self) -> tuple[tuple[str, int, int], ...]:
        """The four products of a layer: (name, rows, columns)."""
        c = self.config
        return (
            ("qkv", c.q_size + 2 * c.kv_size, c.hidden_size),
            ("o", c.hidden_size, c.q_size),
            ("gate and up", 2 * c.intermediate_size, c.hidden_size),
            ("down", c.hidden_size, c.intermediate_size),
        )

    def matrix_bytes(self, rows: int, cols: int) -> int:
        """Tiles and the rows' scales."""
        steps = -(-cols // STEP_COLUMNS[self.packing])
        return -(-rows // TILE_ROWS) * steps * STEP_BYTES + 4 * rows

    def head_bytes(self) -> int:
        """The coarse head: tiles, and 16 bytes of facts a row."""
        columns, size = HEAD_STEP
        rows = -(-self.config.vocab_size // (2 * TILE_ROWS)) * 2 * TILE_ROWS
        return rows // TILE_ROWS * -(-self.config.hidden_size // columns) * size + 16 * rows

    def kv_bytes(self) -> float:
        """Keys, values and their scales of one position in one layer."""
        width = -(-self.config.head_dim // 16) * 16
        of_head = {"f16": 2 * width, "int8": width + 4, "rotor3": width // 16 * 6 + 4}[self.kv]
        return 2 * self.config.num_kv_heads * of_head

    def bytes_a_token(self) -> dict[str, int]:
        """What one token reads of the weights: ternary, head, rest (norms, embedding), total."""
        c = self.config
        ternary = c.num_layers * sum(self.matrix_bytes(rows, cols) for _, rows, cols in self.matrices())
        exact = round(EXACT_SHARE[0] * c.vocab_size) * self.row
        rest = 4 * (2 * c.hidden_size * c.num_layers + c.hidden_size) + self.row
        if c.sub_norms:
            rest += 4 * c.num_layers * (c.q_size + c.intermediate_size)
        head = self.head_bytes() + exact
        return {"ternary": ternary, "head": head, "rest": rest, "total": ternary + head + rest}


def decode_step(shape: Shape, position: float, batch: int = 1) -> Step:
    """One token for each of `batch` sequences (1 to MOST_DECODE) that stand at `position`."""
    c, layers = shape.config, shape.config.num_layers
    kernels = [Kernel("embed", 1, batch * (shape.row + 4 * c.hidden_size))]
    if batch > 1:
        kernels.append(Kernel("norm, quantise", 4 * layers, batch * 5 * _mean_columns(shape)))
    qkv, *rest = (_product(shape, *matrix, batch, layers) for matrix in shape.matrices())
    attention = Kernel("attention", layers, batch * _attention_bytes(shape, position))
    return Step((*kernels, qkv, attention, *rest, *_head(shape, batch)), batch)


def prefill_steps(shape: Shape, tokens: int) -> Step:
    """A prompt of `tokens`, in chunks of MOST_CHUNK; then the arg max after its last."""
    c, layers = shape.config, shape.config.num_layers
    kernels: list[Kernel] = []
    for start in range(0, tokens, MOST_CHUNK):
        count = min(MOST_CHUNK, tokens - start)
        if count <= MOST_DECODE:
            step = decode_step(shape, start + count / 2, count)
            kernels += [kernel for kernel in step.kernels if kernel.name not in _HEAD_NAMES]
            continue
        kernels.append(Kernel("embed", 1, count * (shape.row + 4 * c.hidden_size)))
        kernels.append(Kernel("norm, quantise", 4 * layers, count * 5 * _mean_columns(shape)))
        kernels += [_product(shape, *matrix, count, layers) for matrix in shape.matrices()]
        kernels.append(Kernel("KV append", layers, count * (4 * 2 * c.kv_size + shape.kv_bytes())))
        kernels.append(_prefill_attention(shape, start, count))
    return Step((*_joined(kernels), *_head(shape, 1)), tokens)


_HEAD_NAMES: Final = ("head, coarse", "head, norm", "head, exact", "publish")


def _product(shape: Shape, name: str, rows: int, cols: int, tokens: int, layers: int) -> Kernel:
    """Weights once; activations in (float32 of one token, else int8) and out; `o` and `down` add to x."""
    read = (4 if tokens == 1 else 1) * cols
    written = 4 * rows * (2 if name in ("o", "down") else 1)
    if name == "gate and up":
        written //= 2
    return Kernel(
        name, layers, shape.matrix_bytes(rows, cols) + tokens * (read + written), 2.0 * rows * cols * tokens
    )


def _mean_columns(shape: Shape) -> float:
    """Columns of a layer's four inputs, on the mean: each is read as float32 and written as int8."""
    return sum(cols for _, _, cols in shape.matrices()) / 4


def _attention_bytes(shape: Shape, position: float) -> float:
    """The cache up to `position`, the new key and value, queries in, result out, partial sums of blocks."""
    c = shape.config
    blocks = -(-(position + 1) // KV_BLOCK)
    partial = 2 * 4 * blocks * c.q_size if blocks > 1 else 0
    return (position + 1) * shape.kv_bytes() + 4 * (2 * c.q_size + 2 * c.kv_size) + partial


def _prefill_attention(shape: Shape, start: int, count: int) -> Kernel:
    """Scores and sums of each query over what is before it; the cache is read once for 64 rows of queries."""
    c = shape.config
    seen = count * (start + (count + 1) / 2)
    tile = max(1, 64 // (c.num_heads // c.num_kv_heads))
    moved = seen / tile * shape.kv_bytes() + 8 * count * c.q_size
    return Kernel("attention", c.num_layers, moved, 4.0 * seen * c.q_size)


def _head(shape: Shape, tokens: int) -> list[Kernel]:
    """Coarse pass, exact pass and the result: of up to 16 tokens together."""
    c = shape.config
    share = EXACT_SHARE[tokens > 1]
    bounds = 4 * c.vocab_size * tokens
    kernels = [Kernel("head, norm", 1, 5 * c.hidden_size * tokens)] if tokens > 1 else []
    coarse = shape.head_bytes() + bounds
    exact = bounds + share * c.vocab_size * shape.row * tokens
    kernels.append(Kernel("head, coarse", 1, coarse, 4.0 * c.vocab_size * c.hidden_size * tokens))
    return [*kernels, Kernel("head, exact", 1, exact), Kernel("publish", 1, 64)]


def _joined(kernels: Sequence[Kernel]) -> list[Kernel]:
    """Kernels of one name and of the same work as one entry, in the order of their first."""
    found: dict[tuple[str, float, float], int] = {}
    for each in kernels:
        key = each.name, each.bytes, each.operations
        found[key] = found.get(key, 0) + each.launches
    return [Kernel(name, launches, size, work) for (name, size, work), launches in found.items()]
