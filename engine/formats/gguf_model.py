"""A GGUF file as a model: its architecture, its tensors, the order of q's and k's rows. Not its tokenizer.

Four architectures: `bitnet-b1.58` and `bitnet-25` (microsoft/BitNet: squared ReLU, sub-norms), `bitnet`
(ggml-org/llama.cpp: sub-norms, SiLU or squared ReLU) and `llama` with ternary projections (SiLU, no
sub-norms). llama.cpp turns neighbouring elements in `llama`'s RoPE, and its converter orders the rows of q
and k for that; the engine turns element i with i + head_dim / 2, so the rows are put back. The bitnet
architectures turn halves, and their rows are as the checkpoint has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from engine.errors import HaloError
from engine.formats.gguf import GgufFile, GgufTensor, read_gguf
from engine.formats.gguf_types import FLOATS, Q6_K, Q8_0, float_blocks
from engine.formats.gguf_weights import Forms, ternary
from engine.model import Layer, ModelConfig, ModelStream, Ternary

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from engine.formats.gguf import Value

    Activation = Literal["relu2", "silu"]

ARCHITECTURES: Final = ("bitnet-b1.58", "bitnet-25", "bitnet", "llama")
EMBEDDING, OUTPUT, FINAL_NORM = "token_embd.weight", "output.weight", "output_norm.weight"
PARTS: Final = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
NORMS: Final = {
    "input_norm": "attn_norm",
    "post_attn_norm": "ffn_norm",
    "attn_sub_norm": "attn_sub_norm",
    "ffn_sub_norm": "ffn_sub_norm",
}
_USE: Final = "use a GGUF of BitNet-b1.58-2B-4T or of another family that halo runs: see docs/formats.md"
# Looked for in general.name and its kin: models whose weights read well and whose graph is another.
_FAMILIES: Final = (
    ("trilm", "TriLM: it has several scales in a matrix and activations in floating point"),
    ("spectra", "TriLM: it has several scales in a matrix and activations in floating point"),
    ("bonsai", "Bonsai: it has a scale for each 128 weights and activations in floating point"),
    ("bitcpm", "BitCPM4: it is a MiniCPM graph with scales for groups of weights"),
    ("maple", "Maple: it is a mixture of experts with sliding windows"),
)
# Keys of llama.cpp's graph that change what is computed, and the values at which they change nothing.
_NEUTRAL: Final = {
    "expert_count": (0,), "attention.sliding_window": (0,), "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0), "attention.scale": (0.0,),
    "attn_logit_softcapping": (0.0,), "final_logit_softcapping": (0.0,), "attention.causal": (True,),
    "rope.scaling.type": ("none", "linear"), "rope.scaling.factor": (0.0, 1.0), "rope.scale_linear": (1.0,),
    "use_parallel_residual": (False,), "attention.clamp_kqv": (0.0,),
}  # fmt: skip
_FORMS: Final = {
    "ternary": "were floats and ternary already: taken as they are with max|w| as scale, not quantised again",
    "masters": "were float masters: quantised by absmean",
}


@dataclass
class GgufModel:
    """An opened model: its stream, the file, and sentences that the person should read.

    `form_notes()` says in which forms the matrices came; it is complete after one pass over the layers.
    """

    file: GgufFile
    stream: ModelStream
    notes: list[str]
    forms: Forms = field(default_factory=Forms)

    def form_notes(self) -> list[str]:
        """A sentence for each form that the matrices of the last pass had."""
        return [
            f"{count} matrices {_FORMS.get(form, f'were {form} and are taken as they are')}."
            for form, count in self.forms.counts.items()
        ]


def open_gguf(path: Path, activation: Activation | None = None) -> GgufModel:
    """Open a GGUF file as a model. `activation` overrides what the file says or implies.

    Raises HaloError with the reason where the file is damaged or is of a model that the engine does not run.
    """
    file = read_gguf(Path(path))
    weights = _Weights(file, activation)
    forms = weights.forms
    head = weights.head if weights.untied else None
    stream = ModelStream(weights.config, weights.embedding, weights.final_norm, weights.layers, head)
    return GgufModel(file, stream, weights.notes, forms)


def refused(path: Path, why: str, hint: str = _USE) -> HaloError:
    """The error of a file that is sound, but not of a model that halo runs."""
    return HaloError(f"halo does not run the model of {path}: {why}.", hint=hint)


class _Keys:
    """The file's metadata under its architecture, typed."""

    def __init__(self, file: GgufFile) -> None:
        self.path, self.metadata = file.path, file.metadata
        if str(file.metadata.get("split.count", 1)) not in ("0", "1"):
            raise refused(
                self.path, "it is one of several parts", hint="join them: llama-gguf-split --merge PART OUT"
            )
        architecture = file.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise refused(self.path, f"its architecture is {str(architecture)[:64]!r}; halo has {known}")
        self.architecture = str(architecture)

    def value(self, name: str) -> Value | None:
        return self.metadata.get(f"{self.architecture}.{name}")

    def count(self, name: str, default: int | None = None) -> int:
        value = self.value(name)
        if value is None and default is not None:
            return default
        if type(value) is not int:
            kind = "nothing" if value is None else "a list" if hasattr(value, "__len__") else repr(value)
            raise refused(self.path, f"its {self.architecture}.{name} is {kind:.64}, no whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.value(name)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 <= value <= 1e30:
            raise refused(self.path, f"its {self.architecture}.{name} is no usable number")
        return float(value)

    def check_neutral(self) -> None:
        """Refuse what would make another graph of the architecture."""
        for name, neutral in _NEUTRAL.items():
            value = self.value(name)
            if value is not None and (
                hasattr(value, "__len__") != isinstance(value, str) or value not in neutral
            ):
                raise refused(self.path, f"it has {self.architecture}.{name}, which the engine does not have")
        named = ("name", "basename", "finetune", "description")
        names = [self.metadata.get(f"general.{key}") for key in named]
        text = " ".join(name for name in names if isinstance(name, str)).lower()
        for word, why in _FAMILIES:
            if word in text:
                raise refused(self.path, why)


def _activation(keys: _Keys, given: Activation | None) -> tuple[Activation, str]:
    """(activation, a sentence on where it is known from)."""
    said = keys.value("hidden_activation")
    if given is not None:
        note = f"The activation is {given}, as --activation says"
        return given, f"{note}; the file says {said}." if said not in (None, given) else f"{note}."
    if said is not None:
        if said not in ("relu2", "silu"):
            raise refused(keys.path, f"its activation is {str(said)[:40]}, neither relu2 nor silu")
        return ("silu" if said == "silu" else "relu2"), f"The activation is {said}, as the file says."
    if keys.architecture == "llama":
        return "silu", "The activation is silu: the architecture llama has no other."
    tokenizer = keys.metadata.get("tokenizer.ggml.model")
    if keys.architecture == "bitnet-25" or (keys.architecture == "bitnet-b1.58" and tokenizer == "gpt2"):
        why = f"{keys.architecture} is what BitNet's converter calls BitNet-b1.58-2B-4T, which has it"
        return "relu2", f"The activation is relu2 (squared ReLU): {why}."
    if keys.architecture == "bitnet" and tokenizer == "llama":
        why = "bitnet with a SentencePiece tokenizer is 1bitLLM's bitnet_b1_58, which has it"
        return "silu", f"The activation is silu: {why}."
    raise refused(
        keys.path,
        f"it does not say its activation, and {keys.architecture} is used with both",
        hint="say it: --activation relu2 for BitNet-b1.58-2B-4T, --activation silu for bitnet_b1_58",
    )


def _config(keys: _Keys, file: GgufFile, given: Activation | None) -> tuple[ModelConfig, str]:
    activation, note = _activation(keys, given)
    embedding = file.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise refused(file.path, f"it has no matrix {EMBEDDING}")
    heads, hidden = keys.count("attention.head_count"), keys.count("embedding_length")
    if not 1 <= heads <= hidden:
        raise refused(file.path, f"it says {heads} heads of {hidden} elements")
    head_dim = keys.count("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.count(name, head_dim) != head_dim:
            raise refused(file.path, f"its {name} is {keys.count(name)}, and a head has {head_dim} elements")
    config = ModelConfig(
        hidden,
        keys.count("feed_forward_length"),
        keys.count("block_count"),
        heads,
        keys.count("attention.head_count_kv", heads),
        embedding.shape[0],
        keys.count("context_length"),
        OUTPUT not in file.tensors,
        keys.number("rope.freq_base", 10000.0),
        keys.number("attention.layer_norm_rms_epsilon"),
        activation,
        keys.architecture != "llama",
        head_dim,
    )
    config.validate()
    return config, note


class _Weights:
    """The tensors of a file under the names and in the form that the engine has."""

    def __init__(self, file: GgufFile, activation: Activation | None) -> None:
        self.path, self.tensors, self.forms = file.path, file.tensors, Forms()
        keys = _Keys(file)
        keys.check_neutral()
        self.config, note = _config(keys, file, activation)
        self.llama = keys.architecture == "llama"
        self.notes = [note]
        if self.llama:
            self.notes.append("The file does not say that activations are int8; the engine makes them so.")
        self.check_names()
        self.untied = OUTPUT in self.tensors
        self.untie()
        self.final_norm = self.vector(FINAL_NORM, self.config.hidden_size)

    def check_names(self) -> None:
        """Exactly the architecture's tensors, in their shapes; a projection may have a scale beside it."""
        c = self.config
        wanted: dict[str, tuple[int, ...]] = {
            EMBEDDING: (c.vocab_size, c.hidden_size),
            FINAL_NORM: (c.hidden_size,),
        }
        optional: dict[str, tuple[int, ...]] = {OUTPUT: (c.vocab_size, c.hidden_size)}
        for index in range(c.num_layers):
            for part, rows, cols in c.projections():
                wanted[f"blk.{index}.{PARTS[part]}.weight"] = rows, cols
                optional[f"blk.{index}.{PARTS[part]}.scale"] = (1,)
            for norm, size in self.norm_sizes().items():
                wanted[f"blk.{index}.{NORMS[norm]}.weight"] = (size,)
        self.check_rope_factors()
        missing = sorted(wanted.keys() - self.tensors.keys())
        extra = sorted(self.tensors.keys() - wanted.keys() - optional.keys() - {"rope_freqs.weight"})
        if missing:
            raise refused(self.path, f"{len(missing)} tensors are missing, the first is {missing[0]}")
        if extra:
            raise refused(self.path, f"{len(extra)} tensors are not of its model, the first is {extra[0]}")
        for name, shape in (wanted | optional).items():
            if name in self.tensors and self.tensors[name].shape != shape:
                found = list(self.tensors[name].shape)
                raise refused(self.path, f"the tensor {name} is {found}, and its keys ask for {list(shape)}")

    def norm_sizes(self) -> dict[str, int]:
        c = self.config
        sizes = {"input_norm": c.hidden_size, "post_attn_norm": c.hidden_size}
        sub_norms = {"attn_sub_norm": c.q_size, "ffn_sub_norm": c.intermediate_size}
        return sizes | sub_norms if c.sub_norms else sizes

    def check_rope_factors(self) -> None:
        tensor = self.tensors.get("rope_freqs.weight")
        if tensor is not None:
            factors = np.concatenate(list(self.blocks(tensor)), axis=None)
            if (factors != 1).any():
                raise refused(self.path, "it scales RoPE (rope_freqs), and the engine has plain RoPE only")

    def untie(self) -> None:
        """An output that is the embedding again, as some writers leave it, is no head of its own."""
        if self.untied:
            one, other = self.tensors[EMBEDDING], self.tensors[OUTPUT]
            if one.type is other.type and _equal(one.raw, other.raw):
                self.untied = False
                self.config = replace(self.config, tie_embeddings=True)
                self.notes.append(f"{OUTPUT} is {EMBEDDING} again: the head is tied.")

    def blocks(self, tensor: GgufTensor) -> Iterator[NDArray[np.float32]]:
        """A tensor of floats as blocks of rows, [some, cols]; a vector is one row."""
        rows, cols = (1, *tensor.shape) if len(tensor.shape) == 1 else tensor.shape
        if tensor.type not in (*FLOATS, Q8_0, Q6_K):
            raise refused(self.path, f"the tensor {tensor.name} is {tensor.type.name}, not of floats")
        for block in float_blocks(tensor.type, tensor.raw, rows, cols):
            if not np.isfinite(block).all():
                raise refused(self.path, f"the tensor {tensor.name} holds a number that is not finite")
            yield block

    def embedding(self) -> Iterator[NDArray[np.float32]]:
        return self.blocks(self.tensors[EMBEDDING])

    def head(self) -> Iterator[NDArray[np.float32]]:
        return self.blocks(self.tensors[OUTPUT])

    def vector(self, name: str, size: int) -> NDArray[np.float32]:
        return np.concatenate(list(self.blocks(self.tensors[name])), axis=None)

    def layers(self) -> Iterator[Layer]:
        self.forms.counts.clear()
        for index in range(self.config.num_layers):
            sizes = self.norm_sizes()
            parts: dict[str, Any] = {
                norm: self.vector(f"blk.{index}.{name}.weight", sizes[norm]) if norm in sizes else None
                for norm, name in NORMS.items()
            }
            parts |= {part: self.matrix(f"blk.{index}.{name}", part) for part, name in PARTS.items()}
            yield Layer(**parts)

    def matrix(self, name: str, part: str) -> Ternary:
        factor = np.float32(1)
        if f"{name}.scale" in self.tensors:
            factor = np.float32(self.vector(f"{name}.scale", 1)[0])
            if not factor > 0:
                raise refused(self.path, f"the scale {name}.scale is {factor}, which must be above zero")
        form, matrix = ternary(self.path, self.tensors[f"{name}.weight"], factor, not self.llama)
        self.forms.add(form)
        heads = {"q": self.config.num_heads, "k": self.config.num_kv_heads}.get(part)
        return matrix if heads is None or not self.llama else halves_from_pairs(matrix, heads)


def halves_from_pairs(matrix: Ternary, heads: int) -> Ternary:
    """Rows that turn as neighbours (2 j, 2 j + 1), as ones that turn as (j, j + head_dim / 2)."""
    return _rows(matrix, np.arange(matrix.rows).reshape(heads, -1, 2))


def pairs_from_halves(matrix: Ternary, heads: int) -> Ternary:
    """The inverse of `halves_from_pairs`: what llama.cpp's converter does to q and k of `llama`."""
    return _rows(matrix, np.arange(matrix.rows).reshape(heads, 2, -1))


def _rows(matrix: Ternary, order: NDArray[np.int64]) -> Ternary:
    order = order.swapaxes(1, 2).reshape(-1)
    return Ternary(matrix.packed[order], matrix.scales[order], matrix.cols)


def _equal(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    step = 1 << 24
    return len(one) == len(other) and all(
        np.array_equal(one[start : start + step], other[start : start + step])
        for start in range(0, len(one), step)
    )
