"""Read and write `.h1b` models, versions 1, 2 and 4. Not for running them: see `engine.formats.prepared`.

The layout is sequential and little-endian, with no alignment and no checksum: a 44-byte header (version 1)
or a 52-byte one (from version 2 on, with rope_theta and rms_norm_eps), the float32 embedding, the final
norm, then the layers. Versions 1 and 2 have four weights in a byte, version 4 five, in base 3 (see
`engine.formats.codes`). Of each layer's sub-norms the format holds copies that a reader has no use for
(attn_sub_norm four times, two cuttings of ffn_sub_norm); they must agree, since where they do not, the
layout has been misread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from engine.atomic import replacing
from engine.errors import HaloError
from engine.formats.codes import (
    BASE3_BYTES,
    base3_row_bytes,
    pack_base3,
    pack_codes,
    unpack_base3,
    unpack_codes,
)
from engine.model import Layer, Model, ModelConfig, ModelStream, Ternary

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
    "stream_h1b",
    "unpack_codes",
    "write_h1b",
    "write_h1b_stream",
]

MAGIC: Final = b"H1B\0"
VERSIONS: Final = (1, 2, 4)
_HEADER: Final = struct.Struct("<4s10i")
_TAIL: Final = struct.Struct("<2f")
_DEFAULT_THETA: Final = 500000.0
_DEFAULT_EPS: Final = 1e-5
_BLOCK: Final = 1 << 20  # elements of the embedding that are checked and given at a time
_FETCH: Final = "fetch the model again, or convert it again from its source"
_OTHER: Final = "export the model to GGUF, which can say it: halo model export MODEL FILE.gguf --format tq2_0"
_REFUSED: Final = {
    3: "Sherry (1.25 bits), which drops one weight of four",
    5: "WMMA_I8 (plain int8 in a rotated basis), which no ternary engine runs",
}
_FLAGS: Final = {
    1: "Hadamard-rotated: the activations would have to be rotated too",
    2: "Sherry fp16, which drops one weight of four",
    4: "Bonsai Q1: a scale for each 128 weights, and a Qwen3 graph",
    8: "Bonsai TQ2: a scale for each 128 weights, and a Qwen3 graph",
}


def h1b_bytes(config: ModelConfig, version: int = 2) -> int:
    """The exact size in bytes of the `.h1b` file of a model of this shape."""
    hidden = config.hidden_size
    layer = 4 * (8 * hidden + config.intermediate_size)
    layer += sum(rows * (_row_bytes(cols, version) + 4) for _, rows, cols in config.projections())
    return _header_bytes(version) + 4 * hidden * (config.vocab_size + 1) + config.num_layers * layer


def _row_bytes(cols: int, version: int) -> int:
    return base3_row_bytes(cols) if version == 4 else (cols + 3) // 4


def _header_bytes(version: int) -> int:
    return _HEADER.size + (_TAIL.size if version >= 2 else 0)


def read_h1b(path: Path) -> Model:
    """Read a version 1, 2 or 4 file; the large arrays of 1 and 2 are views of the mapped file.

    Raises HaloError for a wrong magic, another version or flag, an untied head, an impossible shape, a size
    that is not exactly what the header asks for, an unused weight code, or a number that is not finite.
    """
    reader = _open(Path(path))
    return Model(reader.config, reader.embedding(), reader.final_norm(), list(reader.layers()))


def stream_h1b(path: Path) -> ModelStream:
    """The same file as a stream: what is wrong in a tensor is said when its turn comes.

    Only one block of the embedding and one layer are held; every pass reads and checks the file anew.
    """
    reader = _open(Path(path))
    return ModelStream(reader.config, reader.blocks, reader.final_norm(), reader.layers)


def _open(path: Path) -> _Reader:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER.size + _TAIL.size)
        config, version = _parse_header(path, head)
        expected = h1b_bytes(config, version)
        if size != expected:
            what = "cut short" if size < expected else "too long"
            raise HaloError(
                f"The model {path} is {what}: {size} bytes, and its header asks for {expected}.", hint=_FETCH
            )
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it changed while it was opened"
        raise HaloError(f"The model {path} cannot be read: {why}.", hint=f"ls -l {path}") from error
    return _Reader(path, data, config, version)


def _parse_header(path: Path, head: bytes) -> tuple[ModelConfig, int]:
    if len(head) < _HEADER.size or head[:4] != MAGIC:
        raise HaloError(f"{path} is no .h1b model: its first bytes are not 'H1B\\0'.", hint=_FETCH)
    _, version, hidden, inter, layers, heads, kv_heads, vocab, context, tie, flags = _HEADER.unpack_from(head)
    _check_version(path, version, flags)
    if tie == 0:
        raise HaloError(
            f"{path} says that its output head is untied, and .h1b does not hold one.",
            hint="import the checkpoint that it was made from: halo model import SRC DEST",
        )
    if tie != 1:
        raise HaloError(f"{path} says tie_embeddings = {tie}; it is 0 or 1.", hint=_FETCH)
    theta, eps = 0.0, 0.0
    if version >= 2:
        if len(head) < _HEADER.size + _TAIL.size:
            raise HaloError(f"The model {path} ends inside its header.", hint=_FETCH)
        theta, eps = _TAIL.unpack_from(head, _HEADER.size)
    # NaN is kept, so that validate() refuses it; the format says that zero and below mean the default.
    config = ModelConfig(
        hidden, inter, layers, heads, kv_heads, vocab, context, True,
        _DEFAULT_THETA if theta <= 0 else theta,
        _DEFAULT_EPS if eps <= 0 else eps,
    )  # fmt: skip
    config.validate()
    if config.q_size != hidden:
        raise HaloError(f"{path} says {heads} heads, which do not divide {hidden}.", hint=_FETCH)
    return config, version


def _check_version(path: Path, version: int, flags: int) -> None:
    if version in _REFUSED:
        raise HaloError(
            f"{path} is .h1b version {version}, {_REFUSED[version]}: halo does not read it.",
            hint="take the version 1, 2 or 4 file of the model, or convert it anew from its checkpoint",
        )
    if version not in VERSIONS:
        raise HaloError(f"{path} says .h1b version {version}, which does not exist.", hint=_FETCH)
    if flags:
        names = "; ".join(name for bit, name in _FLAGS.items() if flags & bit) or "unknown"
        raise HaloError(
            f"{path} has .h1b flags {flags & 0xFFFFFFFF:#x} ({names}), which halo does not read.",
            hint="take the plain version 1, 2 or 4 file of the model",
        )


class _Reader:
    """The tensors of a mapped file whose size is already known to be right."""

    def __init__(self, path: Path, data: NDArray[np.uint8], config: ModelConfig, version: int) -> None:
        self.path, self.data, self.config, self.version = path, data, config, version
        self.offset = 0

    def embedding(self) -> NDArray[np.float32]:
        self.offset = _header_bytes(self.version)
        return self.floats("embedding", self.config.vocab_size, self.config.hidden_size)

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        hidden, vocab = self.config.hidden_size, self.config.vocab_size
        step = max(1, _BLOCK // hidden)
        start = _header_bytes(self.version)
        for row in range(0, vocab, step):
            at = _Reader(self.path, self.data, self.config, self.version)
            at.offset = start + 4 * hidden * row
            yield at.floats("embedding", min(step, vocab - row), hidden)

    def final_norm(self) -> NDArray[np.float32]:
        self.offset = _header_bytes(self.version) + 4 * self.config.vocab_size * self.config.hidden_size
        return self.floats("final_norm", self.config.hidden_size)

    def layers(self) -> Iterator[Layer]:
        # A cursor of its own: two passes over one stream may run at once.
        at = _Reader(self.path, self.data, self.config, self.version)
        at.offset = _header_bytes(self.version) + 4 * self.config.hidden_size * (self.config.vocab_size + 1)
        for index in range(self.config.num_layers):
            yield at.layer(f"layers.{index}")

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
        packed = self.take(rows * _row_bytes(cols, self.version)).reshape(rows, -1)
        if self.version == 4:
            if (packed >= BASE3_BYTES).any():
                raise HaloError(
                    f"The model {self.path} has a byte that is no five digits in {name}.", hint=_FETCH
                )
            packed = pack_codes(unpack_base3(packed, cols))
        elif (packed & packed >> 1 & 0x55).any():
            raise HaloError(f"The model {self.path} has the unused weight code 3 in {name}.", hint=_FETCH)
        return Ternary(packed, self.floats(f"{name}.scales", rows), cols)

    def copies(self, name: str, value: NDArray[np.float32], count: int) -> None:
        for _ in range(count):
            if not np.array_equal(self.floats(name, len(value)), value):
                raise HaloError(f"The copies of {name} in {self.path} disagree.", hint=_FETCH)

    def layer(self, name: str) -> Layer:
        hidden, inter = self.config.hidden_size, self.config.intermediate_size
        input_norm = self.floats(f"{name}.input_norm", hidden)
        post_attn_norm = self.floats(f"{name}.post_attn_norm", hidden)
        attn_sub_norm = self.floats(f"{name}.attn_sub_norm", hidden)
        self.copies(f"{name}.attn_sub_norm", attn_sub_norm, 3)
        cuttings = [self.floats(f"{name}.ffn_sub_norm", hidden) for _ in range(2)]
        ffn_sub_norm = self.floats(f"{name}.ffn_sub_norm", inter)
        if any(not np.array_equal(cut, _cutting(ffn_sub_norm, hidden)) for cut in cuttings):
            raise HaloError(f"The copies of {name}.ffn_sub_norm in {self.path} disagree.", hint=_FETCH)
        matrices = [
            self.ternary(f"{name}.{part}", rows, cols) for part, rows, cols in self.config.projections()
        ]
        return Layer(input_norm, post_attn_norm, attn_sub_norm, ffn_sub_norm, *matrices)


def _cutting(values: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """`values` cut, or filled up with zeros, to `length`."""
    result = np.zeros(length, dtype=np.float32)
    result[: min(length, len(values))] = values[:length]
    return result


def write_h1b(path: Path, model: Model | ModelStream, version: int = 2) -> None:
    """Write a model as `.h1b` version 1, 2 or 4, atomically and a layer at a time.

    Raises HaloError where a tensor has the wrong shape, or where the format cannot say what the model is.
    """
    stream = model.stream() if isinstance(model, Model) else model
    if stream.head is not None:
        raise _cannot("an output head of its own")
    write_h1b_stream(path, stream.config, stream.embedding(), stream.final_norm, stream.layers(), version)


def write_h1b_stream(
    path: Path,
    config: ModelConfig,
    embedding: Iterable[NDArray[np.float32]],
    final_norm: NDArray[np.float32],
    layers: Iterable[Layer],
    version: int = 2,
) -> None:
    """`write_h1b` of the parts: the embedding as blocks of rows [n, hidden], the layers in order."""
    config.validate()
    if version not in VERSIONS:
        raise HaloError(f"halo writes .h1b versions 1, 2 and 4, not {version}.", hint="leave the version out")
    _check_expressible(config, version)
    c = config
    with replacing(Path(path)) as file:
        file.write(
            _HEADER.pack(
                MAGIC, version, c.hidden_size, c.intermediate_size, c.num_layers, c.num_heads, c.num_kv_heads,
                c.vocab_size, c.max_seq_len, int(c.tie_embeddings), 0,
            )
        )  # fmt: skip
        if version >= 2:
            file.write(_TAIL.pack(c.rope_theta, c.rms_norm_eps))
        for part in _parts(c, embedding, final_norm, layers, version):
            file.write(part)


def _cannot(what: str) -> HaloError:
    return HaloError(f"A .h1b file cannot hold {what}.", hint=_OTHER)


def _check_expressible(config: ModelConfig, version: int) -> None:
    """Raise HaloError for what the format has no field for: a reader would run another model."""
    if config.activation != "relu2":
        raise _cannot("a model with SiLU: its readers run squared ReLU")
    if not config.sub_norms:
        raise _cannot("a model without sub-norms")
    if not config.tie_embeddings:
        raise _cannot("an output head of its own")
    if config.q_size != config.hidden_size:
        raise _cannot(f"a head size of {config.head_dim}, which is not hidden size / heads")
    theta, eps = np.float32(config.rope_theta), np.float32(config.rms_norm_eps)
    if version == 1 and (theta, eps) != (np.float32(_DEFAULT_THETA), np.float32(_DEFAULT_EPS)):
        raise HaloError(
            f"A .h1b file of version 1 cannot say rope_theta {theta:g} and rms_norm_eps {eps:g}.",
            hint="write version 2",
        )


def _parts(
    c: ModelConfig,
    embedding: Iterable[NDArray[np.float32]],
    final_norm: NDArray[np.float32],
    layers: Iterable[Layer],
    version: int,
) -> Iterator[memoryview]:
    """The bytes after the header in the file's order, each array's shape checked first."""
    rows = 0
    for block in embedding:
        _check("embedding", block, (len(block), c.hidden_size))
        rows += len(block)
        yield _floats(block)
    if rows != c.vocab_size:
        raise _wrong(f"embedding has {rows} rows, not {c.vocab_size}")
    _check("final_norm", final_norm, (c.hidden_size,))
    yield _floats(final_norm)
    count = 0
    for layer in layers:
        yield from _layer_parts(layer, c, f"layers.{count}", version)
        count += 1
    if count != c.num_layers:
        raise _wrong(f"{count} layers, not {c.num_layers}")


def _layer_parts(layer: Layer, c: ModelConfig, name: str, version: int) -> Iterator[memoryview]:
    attn_sub_norm, ffn_sub_norm = layer.attn_sub_norm, layer.ffn_sub_norm
    if attn_sub_norm is None or ffn_sub_norm is None:
        raise _wrong(f"{name} has no sub-norms")
    for norm in ("input_norm", "post_attn_norm", "attn_sub_norm"):
        _check(f"{name}.{norm}", getattr(layer, norm), (c.hidden_size,))
    _check(f"{name}.ffn_sub_norm", ffn_sub_norm, (c.intermediate_size,))
    cut = _cutting(ffn_sub_norm, c.hidden_size)
    for values in (layer.input_norm, layer.post_attn_norm, *[attn_sub_norm] * 4, cut, cut, ffn_sub_norm):
        yield _floats(values)
    for part, rows, cols in c.projections():
        matrix: Ternary = getattr(layer, part)
        _check(f"{name}.{part}", matrix.packed, (rows, (cols + 3) // 4))
        _check(f"{name}.{part}.scales", matrix.scales, (rows,))
        packed = pack_base3(unpack_codes(matrix)) if version == 4 else matrix.packed
        yield np.ascontiguousarray(packed, dtype=np.uint8).data
        yield _floats(matrix.scales)


def _floats(array: NDArray[np.float32]) -> memoryview:
    return np.ascontiguousarray(array, dtype="<f4").data


def _check(name: str, array: NDArray[np.generic], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise _wrong(f"{name} is {array.shape}, not {shape}")


def _wrong(why: str) -> HaloError:
    return HaloError(f"The model does not have the shape it says: {why}.", hint="check what built it")
