"""A model as a GGUF file in TQ2_0 or I2_S, which llama.cpp and bitnet.cpp load. Reading: gguf_model.py.

What the two formats cannot hold is refused, what they round is said: a TQ2_0 block has a float16 scale, an
I2_S matrix one scale. q's and k's rows of a `llama` are put in the order that llama.cpp's RoPE turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from engine.atomic import replacing
from engine.errors import HaloError
from engine.formats.codes import unpack_codes
from engine.formats.gguf import TensorPlan, write_gguf
from engine.formats.gguf_model import EMBEDDING, FINAL_NORM, NORMS, OUTPUT, PARTS, pairs_from_halves
from engine.formats.gguf_tokenizer import vocabulary_metadata
from engine.formats.gguf_types import (
    BF16,
    F16,
    F32,
    I2_S,
    TQ2_0,
    TensorType,
    i2_s_tail,
    to_i2_s,
    to_tq2_0,
)
from engine.formats.htok import Vocabulary
from engine.model import ModelConfig, ModelStream, Ternary

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Parts = Iterator[tuple[str, NDArray[np.generic]]]

KINDS: Final = {"tq2_0": TQ2_0, "i2_s": I2_S}
FLOATS: Final = {"f16": F16, "bf16": BF16, "f32": F32}
# general.file_type: llama.cpp's LLAMA_FTYPE_MOSTLY_TQ2_0, and bitnet.cpp's of I2_S.
_FILE_TYPE: Final = {"tq2_0": 37, "i2_s": 40}
_STEP: Final = 1 << 22  # weights that are packed at a time
_TAKE: Final = "export to another format: halo model export --help lists them"


@dataclass(frozen=True)
class GgufOptions:
    """How to write: `kind` of the ternary tensors, `embedding` type, `architecture` ("" for the kind's own).

    With `exact`, what would be rounded is written in a form that holds it, or refused.
    """

    kind: str
    embedding: str = "f16"
    architecture: str = ""
    exact: bool = False
    name: str = "model"
    chat_template: str = ""


@dataclass
class _Rounding:
    """What writing rounded: the worst relative error of a scale, and the values of the embedding changed."""

    scale: float = 0.0
    changed: int = 0
    embedding: float = 0.0


def export_gguf(path: Path, stream: ModelStream, vocabulary: Vocabulary, options: GgufOptions) -> list[str]:
    """Write `stream` as GGUF version 3 at `path`, atomically; sentences on what was rounded or assumed.

    Raises HaloError where the format, or the architecture in it, cannot hold the model.
    """
    writer = _Writer(stream, vocabulary, options)
    with replacing(Path(path)) as file:
        write_gguf(file, writer.metadata(), writer.plans(), writer.parts())
    return writer.notes()


class _Writer:
    def __init__(self, stream: ModelStream, vocabulary: Vocabulary, options: GgufOptions) -> None:
        self.stream, self.vocabulary, self.options = stream, vocabulary, options
        self.config = stream.config
        self.config.validate()
        self.kind = KINDS[options.kind]
        self.architecture = _architecture(self.config, options)
        self.scales_apart = options.exact and options.kind == "tq2_0" and self.architecture == "bitnet"
        _check_shape(self.config, options.kind)
        if len(vocabulary.tokens) != self.config.vocab_size:
            raise HaloError(
                f"The tokenizer has {len(vocabulary.tokens)} tokens, and the model {self.config.vocab_size}.",
                hint="give the model's own tokenizer with --tokenizer",
            )
        self.rounding = _Rounding()
        self.floats = self.float_type()

    def float_type(self) -> TensorType:
        """The type of embedding and head: as asked, or with `exact` the smallest that holds them."""
        wanted = FLOATS[self.options.embedding]
        if not self.options.exact:
            return wanted
        fits = {kind.name: True for kind in (F16, BF16)}
        for block in self.matrices_of_floats():
            with np.errstate(over="ignore"):
                fits["F16"] = fits["F16"] and bool((block.astype("<f2").astype(np.float32) == block).all())
            bits = np.ascontiguousarray(block).view(np.uint32)
            fits["BF16"] = fits["BF16"] and not (bits & 0xFFFF).any()
        order = [wanted, *(kind for kind in (F16, BF16) if kind is not wanted), F32]
        return next(kind for kind in order if fits.get(kind.name, True))

    def matrices_of_floats(self) -> Iterator[NDArray[np.float32]]:
        yield from self.stream.embedding()
        if self.stream.head is not None:
            yield from self.stream.head()

    def metadata(self) -> dict[str, tuple[str, object]]:
        c, a = self.config, self.architecture
        general: dict[str, tuple[str, object]] = {
            "general.architecture": ("str", a),
            "general.type": ("str", "model"),
            "general.name": ("str", self.options.name),
            "general.file_type": ("u32", _FILE_TYPE[self.options.kind]),
            "general.quantization_version": ("u32", 2),
            f"{a}.context_length": ("u32", c.max_seq_len),
            f"{a}.embedding_length": ("u32", c.hidden_size),
            f"{a}.block_count": ("u32", c.num_layers),
            f"{a}.feed_forward_length": ("u32", c.intermediate_size),
            f"{a}.attention.head_count": ("u32", c.num_heads),
            f"{a}.attention.head_count_kv": ("u32", c.num_kv_heads),
            f"{a}.attention.key_length": ("u32", c.head_dim),
            f"{a}.attention.value_length": ("u32", c.head_dim),
            f"{a}.attention.layer_norm_rms_epsilon": ("f32", c.rms_norm_eps),
            f"{a}.rope.freq_base": ("f32", c.rope_theta),
            f"{a}.rope.dimension_count": ("u32", c.head_dim),
            f"{a}.vocab_size": ("u32", c.vocab_size),
            f"{a}.hidden_activation": ("str", c.activation),
        }
        template = self.options.chat_template
        extra = {"tokenizer.chat_template": ("str", template)} if template else {}
        return general | vocabulary_metadata(self.vocabulary) | extra

    def plans(self) -> list[TensorPlan]:
        c = self.config
        plans = [
            TensorPlan(EMBEDDING, self.floats, (c.vocab_size, c.hidden_size)),
            TensorPlan(FINAL_NORM, F32, (c.hidden_size,)),
        ]
        if self.stream.head is not None:
            plans.append(TensorPlan(OUTPUT, self.floats, (c.vocab_size, c.hidden_size)))
        sizes = {"attn_sub_norm": c.q_size, "ffn_sub_norm": c.intermediate_size}
        for index in range(c.num_layers):
            for norm, name in NORMS.items():
                if c.sub_norms or norm not in sizes:
                    size = sizes.get(norm, c.hidden_size)
                    plans.append(TensorPlan(f"blk.{index}.{name}.weight", F32, (size,)))
            for part, rows, cols in c.projections():
                plans.append(TensorPlan(f"blk.{index}.{PARTS[part]}.weight", self.kind, (rows, cols)))
                if self.scales_apart:
                    plans.append(TensorPlan(f"blk.{index}.{PARTS[part]}.scale", F32, (1,)))
        return plans

    def parts(self) -> Parts:
        """(name, piece) of every tensor, in the order of `plans`."""
        yield from self.floats_of(EMBEDDING, self.stream.embedding())
        yield FINAL_NORM, _f32(self.stream.final_norm)
        if self.stream.head is not None:
            yield from self.floats_of(OUTPUT, self.stream.head())
        for index, layer in enumerate(self.stream.layers()):
            for norm, name in NORMS.items():
                values = getattr(layer, norm)
                if values is not None:
                    yield f"blk.{index}.{name}.weight", _f32(values)
            for part, _, _ in self.config.projections():
                yield from self.matrix(f"blk.{index}.{PARTS[part]}", part, getattr(layer, part))

    def floats_of(self, name: str, blocks: Iterator[NDArray[np.float32]]) -> Parts:
        for block in blocks:
            if self.floats is F32:
                yield name, _f32(block)
                continue
            stored, back = _narrowed(block, self.floats)
            error = np.abs(back - block)
            if not np.isfinite(error).all():
                raise HaloError(
                    f"{name} has values beyond {self.floats.name}.", hint="take a wider one: --embedding bf16"
                )
            self.rounding.changed += int(np.count_nonzero(error))
            self.rounding.embedding = max(self.rounding.embedding, float(error.max()))
            yield name, stored

    def matrix(self, name: str, part: str, matrix: Ternary) -> Parts:
        heads = {"q": self.config.num_heads, "k": self.config.num_kv_heads}.get(part)
        if heads is not None and self.architecture == "llama":
            matrix = pairs_from_halves(matrix, heads)
        if self.kind is I2_S:
            yield from self.as_i2_s(f"{name}.weight", matrix)
            return
        apart = self.scales_apart and _one_scale(matrix)
        scales = np.ones(matrix.rows, np.float32) if apart else matrix.scales
        yield from self.as_tq2_0(f"{name}.weight", matrix, scales)
        if self.scales_apart:
            yield f"{name}.scale", _f32(matrix.scales[:1] if apart else np.ones(1))

    def as_i2_s(self, name: str, matrix: Ternary) -> Parts:
        if not _one_scale(matrix):
            raise HaloError(
                f"{name} has a scale a row, and an I2_S matrix has one.", hint="export to tq2_0 instead"
            )
        for rows in _pieces(matrix):
            yield name, to_i2_s(unpack_codes(rows).reshape(-1, 128))
        yield name, i2_s_tail(matrix.scales[0])

    def as_tq2_0(self, name: str, matrix: Ternary, scales: NDArray[np.float32]) -> Parts:
        with np.errstate(over="ignore"):
            halves = scales.astype("<f2").astype(np.float32)
        error = float((np.abs(halves - scales) / scales).max())
        if error and self.options.exact:
            raise HaloError(
                f"{name} has scales that float16 does not hold, and TQ2_0 has no other.",
                hint="export to h1b4 or i2_s, or leave --exact out",
            )
        # Beyond float16, or so small that it has hardly a digit left there.
        if not error <= 2**-8:
            raise HaloError(f"{name} has a scale that float16 cannot hold even roughly.", hint=_TAKE)
        self.rounding.scale = max(self.rounding.scale, error)
        for rows in _pieces(Ternary(matrix.packed, scales, matrix.cols)):
            blocks = unpack_codes(rows).reshape(-1, 256)
            yield name, to_tq2_0(blocks, np.repeat(rows.scales, rows.cols // 256))

    def notes(self) -> list[str]:
        notes = []
        if self.rounding.scale:
            worst = f"{self.rounding.scale:.1e}"
            notes.append(f"TQ2_0 has float16 scales: they are rounded by up to {worst} of their value.")
        if self.rounding.changed:
            what = f"{self.rounding.changed} values of the embedding do not fit {self.floats.name}"
            notes.append(f"{what}: they are rounded by up to {self.rounding.embedding:.1e}.")
        if self.config.sub_norms and self.config.activation == "relu2":
            notes.append(
                f"The architecture is {self.architecture}, the activation squared ReLU; some releases of"
                " llama.cpp and bitnet.cpp run SiLU for it and write nonsense: see docs/formats.md."
            )
        return notes


def _architecture(c: ModelConfig, options: GgufOptions) -> str:
    """The architecture of the file; HaloError where GGUF's readers have none for the model."""
    if not c.sub_norms:
        if c.activation != "silu":
            raise _cannot("squared ReLU without sub-norms")
        if options.architecture not in ("", "llama"):
            raise _cannot(f"a model without sub-norms as {options.architecture}")
        return "llama"
    own = "bitnet-b1.58" if options.kind == "i2_s" and c.activation == "relu2" else "bitnet"
    name = options.architecture or own
    if name == "llama":
        raise _cannot("sub-norms as llama")
    if name == "bitnet-b1.58" and c.activation != "relu2":
        raise _cannot("SiLU as bitnet-b1.58")
    if c.q_size != c.hidden_size:
        raise _cannot(f"sub-norms with a head size of {c.head_dim}")
    if not c.tie_embeddings and name == "bitnet":
        raise _cannot("sub-norms with an untied head as bitnet")
    return name


def _cannot(what: str) -> HaloError:
    return HaloError(f"The readers of GGUF have no architecture for {what}.", hint=_TAKE)


def _check_shape(c: ModelConfig, kind: str) -> None:
    group = {"tq2_0": 256, "i2_s": 128}[kind]
    for part, _, cols in c.projections():
        if cols % group:
            raise HaloError(
                f"{kind.upper()} has groups of {group} weights, and a row of {part} has {cols}.", hint=_TAKE
            )


def _one_scale(matrix: Ternary) -> bool:
    return bool((matrix.scales == matrix.scales[0]).all())


def _pieces(matrix: Ternary) -> Iterator[Ternary]:
    """The matrix some rows at a time."""
    step = max(1, _STEP // matrix.cols)
    for row in range(0, matrix.rows, step):
        yield Ternary(matrix.packed[row : row + step], matrix.scales[row : row + step], matrix.cols)


def _f32(values: NDArray[np.floating]) -> NDArray[np.float32]:
    return np.ascontiguousarray(values, dtype="<f4")


def _narrowed(
    block: NDArray[np.float32], kind: TensorType
) -> tuple[NDArray[np.generic], NDArray[np.float32]]:
    """(as stored, widened again) in F16 or BF16, rounded to nearest, ties to even."""
    if kind is F16:
        with np.errstate(over="ignore"):
            stored = block.astype("<f2")
        return stored, stored.astype(np.float32)
    bits = np.ascontiguousarray(block).view(np.uint32)
    rounded = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
    back = (rounded & np.uint32(0xFFFF0000)).view(np.float32)
    return (rounded >> np.uint32(16)).astype("<u2"), back
