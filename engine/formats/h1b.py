"""Read and write `.h1b` models, versions 1 and 2. Not for running them: see `engine.formats.prepared`.

The layout is sequential and little-endian, with no alignment and no checksum: a 44-byte header (version 1)
or a 52-byte one (version 2 adds rope_theta and rms_norm_eps), the float32 embedding, the final norm, then
the layers. Of each layer's sub-norms the format holds copies that a reader has no use for (attn_sub_norm
four times, two cuttings of ffn_sub_norm); they must agree, since where they do not, the layout has been
misread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from engine.atomic import replacing
from engine.errors import HaloError
from engine.model import Layer, Model, ModelConfig, Ternary

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Layer",
    "Model",
    "ModelConfig",
    "Ternary",
    "h1b_bytes",
    "pack_codes",
    "read_h1b",
    "unpack_codes",
    "write_h1b",
    "write_h1b_stream",
]

MAGIC: Final = b"H1B\0"
_HEADER: Final = struct.Struct("<4s10i")
_TAIL: Final = struct.Struct("<2f")
_DEFAULT_THETA: Final = 500000.0
_DEFAULT_EPS: Final = 1e-5
_FETCH: Final = "fetch the model again, or convert it again from its source"
_REFUSED: Final = {
    3: "Sherry (1.25 bits, lossy)",
    4: "TQ1 (base-3, 1.6 bits)",
    5: "WMMA_I8 (plain int8)",
}
_FLAGS: Final = {1: "Hadamard-rotated", 2: "Sherry fp16", 4: "Bonsai Q1", 8: "Bonsai TQ2"}


def h1b_bytes(config: ModelConfig, version: int = 2) -> int:
    """The exact size in bytes of the `.h1b` file of a model of this shape."""
    hidden = config.hidden_size
    layer = 4 * (8 * hidden + config.intermediate_size)
    layer += sum(rows * ((cols + 3) // 4 + 4) for _, rows, cols in config.projections())
    header = _HEADER.size + (_TAIL.size if version >= 2 else 0)
    return header + 4 * hidden * (config.vocab_size + 1) + config.num_layers * layer


def pack_codes(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack codes 0, 1, 2 (uint8 [rows, cols]) four to a byte, the first in the lowest bits."""
    rows, cols = codes.shape
    padded = np.zeros((rows, (cols + 3) // 4 * 4), dtype=np.uint8)
    padded[:, :cols] = codes
    quads = padded.reshape(rows, -1, 4)
    packed: NDArray[np.uint8] = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6
    return packed


def unpack_codes(matrix: Ternary) -> NDArray[np.uint8]:
    """The codes 0, 1, 2 of a ternary matrix as uint8 [rows, cols]; weight = (code - 1) * row scale."""
    packed = np.asarray(matrix.packed)
    quads = np.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    return quads.reshape(packed.shape[0], -1)[:, : matrix.cols]


def read_h1b(path: Path) -> Model:
    """Read a version 1 or 2 file; its large arrays are views of the mapped file.

    Raises HaloError for a wrong magic, another version or flag, an impossible shape, a size that is not
    exactly what the header asks for, an unused weight code, or a number that is not finite.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER.size + _TAIL.size)
    except OSError as error:
        raise HaloError(
            f"The model {path} cannot be read: {error.strerror}.", hint=f"ls -l {path}"
        ) from error
    config, version = _parse_header(path, head)
    expected = h1b_bytes(config, version)
    if size != expected:
        what = "cut short" if size < expected else "too long"
        raise HaloError(
            f"The model {path} is {what}: {size} bytes, and its header asks for {expected}.", hint=_FETCH
        )
    data = np.memmap(path, dtype=np.uint8, mode="r")
    offset = _HEADER.size + (_TAIL.size if version >= 2 else 0)
    return _Reader(path, data, offset).model(config)


def _parse_header(path: Path, head: bytes) -> tuple[ModelConfig, int]:
    if len(head) < _HEADER.size or head[:4] != MAGIC:
        raise HaloError(f"{path} is no .h1b model: its first bytes are not 'H1B\\0'.", hint=_FETCH)
    _, version, hidden, inter, layers, heads, kv_heads, vocab, context, tie, flags = _HEADER.unpack_from(head)
    if version in _REFUSED:
        raise HaloError(
            f"{path} is .h1b version {version}, {_REFUSED[version]}, which halo does not read.",
            hint="convert the model to .h1b version 2",
        )
    if version not in (1, 2):
        raise HaloError(f"{path} says .h1b version {version}, which does not exist.", hint=_FETCH)
    if flags:
        names = ", ".join(name for bit, name in _FLAGS.items() if flags & bit) or "unknown"
        raise HaloError(
            f"{path} has .h1b flags {flags & 0xFFFFFFFF:#x} ({names}), which halo does not read.",
            hint="convert the model to plain .h1b version 2",
        )
    if tie not in (0, 1):
        raise HaloError(f"{path} says tie_embeddings = {tie}; it is 0 or 1.", hint=_FETCH)
    theta, eps = 0.0, 0.0
    if version >= 2:
        if len(head) < _HEADER.size + _TAIL.size:
            raise HaloError(f"The model {path} ends inside its header.", hint=_FETCH)
        theta, eps = _TAIL.unpack_from(head, _HEADER.size)
    # NaN is kept, so that validate() refuses it; the format says that zero and below mean the default.
    config = ModelConfig(
        hidden, inter, layers, heads, kv_heads, vocab, context, bool(tie),
        _DEFAULT_THETA if theta <= 0 else theta,
        _DEFAULT_EPS if eps <= 0 else eps,
    )  # fmt: skip
    config.validate()
    return config, version


class _Reader:
    """A cursor over a mapped file whose size is already known to be right."""

    def __init__(self, path: Path, data: NDArray[np.uint8], offset: int) -> None:
        self.path, self.data, self.offset = path, data, offset

    def take(self, count: int) -> NDArray[np.uint8]:
        chunk = self.data[self.offset : self.offset + count]
        self.offset += count
        return chunk

    def floats(self, name: str, *shape: int) -> NDArray[np.float32]:
        values = np.frombuffer(self.take(4 * int(np.prod(shape))), dtype="<f4").reshape(shape)
        if not values.flags.aligned:
            values = values.copy()
        if not np.isfinite(values).all():
            raise HaloError(
                f"The model {self.path} holds a number that is not finite in {name}.", hint=_FETCH
            )
        return values

    def ternary(self, name: str, rows: int, cols: int) -> Ternary:
        packed = self.take(rows * ((cols + 3) // 4)).reshape(rows, -1)
        if (packed & packed >> 1 & 0x55).any():
            raise HaloError(f"The model {self.path} has the unused weight code 3 in {name}.", hint=_FETCH)
        return Ternary(packed, self.floats(f"{name}.scales", rows), cols)

    def copies(self, name: str, value: NDArray[np.float32], count: int) -> None:
        for _ in range(count):
            if not np.array_equal(self.floats(name, len(value)), value):
                raise HaloError(f"The copies of {name} in {self.path} disagree.", hint=_FETCH)

    def layer(self, config: ModelConfig, name: str) -> Layer:
        hidden, inter = config.hidden_size, config.intermediate_size
        input_norm = self.floats(f"{name}.input_norm", hidden)
        post_attn_norm = self.floats(f"{name}.post_attn_norm", hidden)
        attn_sub_norm = self.floats(f"{name}.attn_sub_norm", hidden)
        self.copies(f"{name}.attn_sub_norm", attn_sub_norm, 3)
        cuttings = [self.floats(f"{name}.ffn_sub_norm", hidden) for _ in range(2)]
        ffn_sub_norm = self.floats(f"{name}.ffn_sub_norm", inter)
        if any(not np.array_equal(cut, _cutting(ffn_sub_norm, hidden)) for cut in cuttings):
            raise HaloError(f"The copies of {name}.ffn_sub_norm in {self.path} disagree.", hint=_FETCH)
        matrices = [self.ternary(f"{name}.{part}", rows, cols) for part, rows, cols in config.projections()]
        return Layer(input_norm, post_attn_norm, attn_sub_norm, ffn_sub_norm, *matrices)

    def model(self, config: ModelConfig) -> Model:
        embedding = self.floats("embedding", config.vocab_size, config.hidden_size)
        final_norm = self.floats("final_norm", config.hidden_size)
        layers = [self.layer(config, f"layers.{index}") for index in range(config.num_layers)]
        return Model(config, embedding, final_norm, layers)


def _cutting(values: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """`values` cut, or filled up with zeros, to `length`."""
    result = np.zeros(length, dtype=np.float32)
    result[: min(length, len(values))] = values[:length]
    return result


def write_h1b(path: Path, model: Model, version: int = 2) -> None:
    """Write a model as `.h1b` version 2 (or 1), atomically. HaloError if a tensor has the wrong shape."""
    path, config = Path(path), model.config
    config.validate()
    _check_shapes(model)
    if version not in (1, 2):
        raise HaloError(f"halo writes .h1b versions 1 and 2, not {version}.", hint="leave the version out")
    write_h1b_stream(path, config, [model.embedding], model.final_norm, model.layers, version)


def write_h1b_stream(
    path: Path,
    config: ModelConfig,
    embedding: Iterable[NDArray[np.float32]],
    final_norm: NDArray[np.float32],
    layers: Iterable[Layer],
    version: int = 2,
) -> None:
    """Write a model atomically: the embedding as blocks of rows [n, hidden], the layers one after the other.

    Never more than one block and one layer are held, so a model may be larger than memory. Raises HaloError
    for an impossible config, or when what was given does not add up to the size that the config asks for.
    """
    config.validate()
    c = config
    with replacing(path) as file:
        file.write(
            _HEADER.pack(
                MAGIC, version, c.hidden_size, c.intermediate_size, c.num_layers, c.num_heads, c.num_kv_heads,
                c.vocab_size, c.max_seq_len, int(c.tie_embeddings), 0,
            )
        )  # fmt: skip
        if version >= 2:
            file.write(_TAIL.pack(c.rope_theta, c.rms_norm_eps))
        for block in embedding:
            file.write(_floats(block))
        file.write(_floats(final_norm))
        for layer in layers:
            for part in _layer_parts(layer, c):
                file.write(part)
        written, wanted = file.tell(), h1b_bytes(config, version)
        if written != wanted:
            raise HaloError(
                f"The model does not have the shape it says: {written} bytes, not {wanted}.",
                hint="check what built it",
            )


def _layer_parts(layer: Layer, config: ModelConfig) -> Iterator[memoryview]:
    """The bytes of one layer in the file's order."""
    cut = _cutting(layer.ffn_sub_norm, config.hidden_size)
    for norm in (layer.input_norm, layer.post_attn_norm, *[layer.attn_sub_norm] * 4, cut, cut):
        yield _floats(norm)
    yield _floats(layer.ffn_sub_norm)
    for name, _, _ in config.projections():
        matrix: Ternary = getattr(layer, name)
        yield np.ascontiguousarray(matrix.packed, dtype=np.uint8).data
        yield _floats(matrix.scales)


def _floats(array: NDArray[np.float32]) -> memoryview:
    return np.ascontiguousarray(array, dtype="<f4").data


def _check_shapes(model: Model) -> None:
    """Raise HaloError unless every tensor of `model` has the shape that its config asks for."""
    c = model.config
    shapes: list[tuple[str, NDArray[np.generic], tuple[int, ...]]] = [
        ("embedding", model.embedding, (c.vocab_size, c.hidden_size)),
        ("final_norm", model.final_norm, (c.hidden_size,)),
    ]
    for index, layer in enumerate(model.layers):
        name = f"layers.{index}"
        for norm in ("input_norm", "post_attn_norm", "attn_sub_norm"):
            shapes.append((f"{name}.{norm}", getattr(layer, norm), (c.hidden_size,)))
        shapes.append((f"{name}.ffn_sub_norm", layer.ffn_sub_norm, (c.intermediate_size,)))
        for part, rows, cols in c.projections():
            matrix: Ternary = getattr(layer, part)
            shapes.append((f"{name}.{part}", matrix.packed, (rows, (cols + 3) // 4)))
            shapes.append((f"{name}.{part}.scales", matrix.scales, (rows,)))
    wrong = [f"{name} is {array.shape}, not {shape}" for name, array, shape in shapes if array.shape != shape]
    if len(model.layers) != c.num_layers:
        wrong.append(f"{len(model.layers)} layers, not {c.num_layers}")
    if wrong:
        raise HaloError(f"The model does not have the shape it says: {wrong[0]}.", hint="check what built it")
