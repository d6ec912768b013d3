"""Models of random weights for `halo bench`, of a real model's shape; made once and cached. They say nothing.

The recipe keeps activations sane: digits evenly among -1, 0 and 1, one scale a matrix drawn from
U(0.8, 1.2) / sqrt(0.6 cols), norms of one, an embedding of standard deviation 0.05. Scales and embedding are
exact in bfloat16 (the scales in float16 too), so that every format of every engine can hold the same numbers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from engine.errors import EXIT_COULD_NOT_RUN, HaloError
from engine.model import Layer, ModelConfig, ModelStream, Ternary

SHAPES: Final = {
    # microsoft/bitnet-b1.58-2B-4T
    "2b4t": ModelConfig(
        hidden_size=2560, intermediate_size=6912, num_layers=30, num_heads=20, num_kv_heads=5,
        vocab_size=128256, max_seq_len=4096, tie_embeddings=True, rope_theta=500000.0, rms_norm_eps=1e-5,
    ),
    # for tests, and for a first look at the command
    "tiny": ModelConfig(
        hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2,
        vocab_size=1024, max_seq_len=256, tie_embeddings=True, rope_theta=10000.0, rms_norm_eps=1e-5,
    ),
}  # fmt: skip
SEED: Final = 1
BLOCK: Final = 2048  # rows of the embedding at a time
Progress = Callable[[str], None]


def _four_digits() -> NDArray[np.uint8]:
    """The packed byte of each of the 81 ways to choose four codes."""
    n = np.arange(81, dtype=np.uint8)
    codes = np.stack([n % 3, n // 3 % 3, n // 9 % 3, n // 27])
    shifts = np.array([[0], [2], [4], [6]], dtype=np.uint8)
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(codes << shifts, axis=0)
    return packed


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The values cut to the 16 upper bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def _ternary(rng: np.random.Generator, rows: int, cols: int) -> Ternary:
    packed = _four_digits()[rng.integers(0, 81, (rows, cols // 4), dtype=np.uint8)]
    scale = to_bfloat16(np.array([rng.uniform(0.8, 1.2) / (0.6 * cols) ** 0.5], dtype=np.float32))
    return Ternary(packed, np.repeat(scale, rows), cols)


def _layer(config: ModelConfig, index: int) -> Layer:
    rng = np.random.default_rng([SEED, 1 + index])
    hidden, inter = config.hidden_size, config.intermediate_size
    first, second, third, fourth = (
        np.ones(size, dtype=np.float32) for size in (hidden, hidden, config.q_size, inter)
    )
    matrices = [_ternary(rng, rows, cols) for _, rows, cols in config.projections()]
    return Layer(first, second, third, fourth, *matrices)


def stream(shape: str) -> ModelStream:
    """The model of that name, a layer or a block of rows at a time; the same at every call."""
    config = SHAPES[shape]

    def embedding() -> Iterator[NDArray[np.float32]]:
        rng = np.random.default_rng([SEED, 0])
        for start in range(0, config.vocab_size, BLOCK):
            rows = min(BLOCK, config.vocab_size - start)
            yield to_bfloat16(
                rng.standard_normal((rows, config.hidden_size), dtype=np.float32) * np.float32(0.05)
            )

    def layers() -> Iterator[Layer]:
        return (_layer(config, index) for index in range(config.num_layers))

    return ModelStream(config, embedding, np.ones(config.hidden_size, dtype=np.float32), layers)


def cache_directory() -> Path:
    """Where synthetic models are kept: $XDG_CACHE_HOME/halo/bench, or the same in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "halo" / "bench"


def expected_bytes(config: ModelConfig) -> int:
    """About what a prepared file takes: 1.7 bits a ternary weight, 22 an embedding's number, and RoPE."""
    ternary = config.num_layers * sum(rows * cols for _, rows, cols in config.projections())
    rope = 4 * config.max_seq_len * config.head_dim
    return ternary * 17 // 80 + config.vocab_size * config.hidden_size * 22 // 8 + rope


def synthetic_model(shape: str, say: Progress) -> Path:
    """The prepared file of that shape; made now if the cache has none. Raises HaloError if it cannot be."""
    from engine.formats.prepared import VERSION, prepare

    folder = cache_directory()
    path = folder / f"{shape}-v{VERSION}-{SEED}.halo"
    if path.is_file():
        return path
    size = expected_bytes(SHAPES[shape])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise HaloError(
            f"The cache directory {folder} cannot be made: {error.strerror}.",
            hint="set XDG_CACHE_HOME to a directory of yours",
            exit_code=EXIT_COULD_NOT_RUN,
        ) from error
    if free < size * 1.1:
        raise HaloError(
            f"The synthetic model takes about {size >> 20} MiB; {folder} has {free >> 20} MiB free.",
            hint=f"free some room, or set XDG_CACHE_HOME; df -h {folder}",
            exit_code=EXIT_COULD_NOT_RUN,
        )
    say(f"making a synthetic model once: about {size >> 20} MiB, {path}")
    prepare(_told(stream(shape), say), path)
    return path


def _told(model: ModelStream, say: Progress) -> ModelStream:
    """The same stream, which says how far its layers have been read."""

    def layers() -> Iterator[Layer]:
        for index, layer in enumerate(model.layers(), 1):
            say(f"layer {index} of {model.config.num_layers}")
            yield layer

    return ModelStream(model.config, model.embedding, model.final_norm, layers, model.head)
