"""Write `.h1b` version 2 one tensor at a time, for models larger than memory. Reading is in h1b.py.

The layout is that of `engine.formats.h1b`; a test compares the two writers byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engine.atomic import replacing
from engine.errors import HaloError
from engine.formats.h1b import _HEADER, _TAIL, MAGIC, _cutting, h1b_bytes
from engine.model import Layer, ModelConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray


def write_h1b_stream(
    path: Path,
    config: ModelConfig,
    embedding: Iterable[NDArray[np.float32]],
    final_norm: NDArray[np.float32],
    layers: Iterable[Layer],
) -> None:
    """Write a model atomically: the embedding as blocks of rows [n, hidden], the layers one after the other.

    Never more than one block and one layer are held. Raises HaloError for an impossible config, or when what
    was given does not add up to the size that the config asks for.
    """
    config.validate()
    c = config
    with replacing(path) as file:
        file.write(
            _HEADER.pack(
                MAGIC, 2, c.hidden_size, c.intermediate_size, c.num_layers, c.num_heads, c.num_kv_heads,
                c.vocab_size, c.max_seq_len, int(c.tie_embeddings), 0,
            )
        )  # fmt: skip
        file.write(_TAIL.pack(c.rope_theta, c.rms_norm_eps))
        for block in embedding:
            file.write(_floats(block))
        file.write(_floats(final_norm))
        for layer in layers:
            for part in _layer(layer, c):
                file.write(part)
        written, wanted = file.tell(), h1b_bytes(config)
        if written != wanted:
            raise HaloError(
                f"The model does not have the shape it says: {written} bytes, not {wanted}.",
                hint="check what built it",
            )


def _layer(layer: Layer, config: ModelConfig) -> Iterable[memoryview]:
    cut = _cutting(layer.ffn_sub_norm, config.hidden_size)
    for norm in (layer.input_norm, layer.post_attn_norm, *[layer.attn_sub_norm] * 4, cut, cut):
        yield _floats(norm)
    yield _floats(layer.ffn_sub_norm)
    for name, _, _ in config.projections():
        matrix = getattr(layer, name)
        yield np.ascontiguousarray(matrix.packed, dtype=np.uint8).data
        yield _floats(matrix.scales)


def _floats(array: NDArray[np.float32]) -> memoryview:
    return np.ascontiguousarray(array, dtype="<f4").data
