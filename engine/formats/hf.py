"""Read a Hugging Face checkpoint of a ternary model as a stream of layers. Not a downloader.

Weights come as float masters (quantised here as transformers does online: absmean over the tensor), as
floats that are ternary already, or packed in U8 by row quarters. Formulas and packing:
transformers `integrations/bitnet.py`. One tensor is held at a time. Which models: hf_config.py.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from engine.errors import HaloError
from engine.formats.codes import pack_codes
from engine.formats.hf_config import Family, HfConfig, read_config, read_object, refused
from engine.formats.safetensors import Tensor, read_safetensors
from engine.model import Layer, ModelConfig, ModelStream, Ternary

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_INDEX: Final = 64 << 20
SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
FINAL_NORM: Final = "model.norm.weight"
_FETCH: Final = "fetch the checkpoint again, or ask its publisher"
_FORMS: Final = {
    "packed": "were packed in U8 and are taken as they are",
    "ternary": "were ternary already: taken as they are with max|w| as scale, not quantised a second time",
    "masters": "were float masters: quantised by absmean",
}
_MASTERS_OF_A_LLAMA: Final = (
    "fetch the packed revision; of masters, such as Falcon-E's revision prequantized, add to config.json "
    '"quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear", '
    '"quantization_mode": "online"}'
)


@dataclass
class HfCheckpoint:
    """A checkpoint that the engine runs, opened: its configuration, and its tensors as a stream.

    The stream may be read as often as wanted; it raises HaloError where a tensor is damaged.
    """

    directory: Path
    config: HfConfig
    stream: ModelStream
    files: list[str]
    forms: dict[str, str]

    @property
    def notes(self) -> list[str]:
        """Sentences for the person: what became of the weights. Complete once the layers were read."""
        count = Counter(self.forms.values())
        notes = [f"{count[form]} matrices {what}." for form, what in _FORMS.items() if count[form]]
        if self.config.mode == "none" and not self.config.family.masters:
            notes.append("config.json does not say that activations are int8; the engine makes them so.")
        return notes

    @cached_property
    def source(self) -> dict[str, str]:
        """The sha256 of each file that the stream comes from, read once more for it; by name."""
        return {file: _sha256(self.directory / file) for file in self.files}


def open_checkpoint(directory: Path) -> HfCheckpoint:
    """Open the checkpoint in `directory`: config.json, and model.safetensors or an index with its shards.

    All names and the form of the first matrix are checked here; shapes, numbers and codes as the stream is
    read. Raises HaloError where it is damaged or, by name, of a model that the engine does not run.
    """
    directory = Path(directory)
    config = read_config(directory)
    tensors, shards = open_tensors(directory)
    weights = _Weights(directory, config, tensors)
    model = config.model
    weights.matrix(projection(0, "q"), model.q_size, model.hidden_size)
    shape = (model.vocab_size, model.hidden_size)
    stream = ModelStream(
        model,
        lambda: weights.blocks(EMBEDDING, *shape),
        weights.vector(FINAL_NORM, model.hidden_size),
        weights.layers,
        None if model.tie_embeddings else lambda: weights.blocks(HEAD, *shape),
    )
    return HfCheckpoint(directory, config, stream, ["config.json", *shards], weights.forms)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_tensors(directory: Path) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors of a checkpoint, mapped, and the names of its files: one, or an index with shards."""
    if (directory / SINGLE).exists() or not (directory / INDEX).exists():
        if not (directory / SINGLE).exists() and any(directory.glob("pytorch_model*.bin")):
            raise HaloError(
                f"{directory} has its weights as pickles (pytorch_model.bin), which halo does not run.",
                hint="fetch the revision with model.safetensors, or save it as one with transformers",
            )
        return read_safetensors(directory / SINGLE), [SINGLE]
    index = directory / INDEX
    placed = read_object(index, MAX_INDEX).get("weight_map")
    if not isinstance(placed, dict) or not all(_is_shard(file) for file in placed.values()):
        raise HaloError(f"{index} does not name the file of each tensor.", hint=_FETCH)
    shards = sorted(set(placed.values()))
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        held = read_safetensors(directory / shard)
        named = {name for name, file in placed.items() if file == shard}
        if held.keys() != named:
            odd = min(held.keys() ^ named)
            what = "holds" if odd in held else "lacks"
            raise HaloError(f"{directory / shard} {what} the tensor {odd}, against the index.", hint=_FETCH)
        tensors |= held
    return tensors, shards


def _is_shard(file: object) -> bool:
    """A plain file name: an index must not lead out of its own directory."""
    return isinstance(file, str) and file.endswith(".safetensors") and Path(file).name == file


class _Weights:
    """The tensors of a checkpoint under the names and in the form that the engine has."""

    def __init__(self, source: Path, config: HfConfig, tensors: dict[str, Tensor]) -> None:
        self.source, self.config, self.tensors = source, config, tensors
        self.forms: dict[str, str] = {}
        _check_names(source / "config.json", config, tensors)
        if config.model.tie_embeddings and HEAD in tensors:
            self.check_tied()

    def check_tied(self) -> None:
        """Some publishers write the tied head out; the library then unties it where it differs."""
        shape = (self.config.model.vocab_size, self.config.model.hidden_size)
        pairs = zip(self.blocks(EMBEDDING, *shape), self.blocks(HEAD, *shape), strict=False)
        if not all(np.array_equal(embedding, head) for embedding, head in pairs):
            raise HaloError(
                f"{HEAD} is not the embedding, but config.json says that it is (tie_word_embeddings).",
                hint=_FETCH,
            )

    def shaped(self, name: str, *shape: int) -> Tensor:
        tensor = self.tensors[name]
        if tensor.shape != shape:
            raise HaloError(
                f"The tensor {name} is {list(tensor.shape)}; config.json asks for {list(shape)}.", hint=_FETCH
            )
        return tensor

    def blocks(self, name: str, *shape: int) -> Iterator[NDArray[np.float32]]:
        for block in self.shaped(name, *shape).blocks():
            if not np.isfinite(block).all():
                raise HaloError(f"The tensor {name} holds a number that is not finite.", hint=_FETCH)
            yield block

    def vector(self, name: str, size: int) -> NDArray[np.float32]:
        return np.concatenate([np.zeros(0, np.float32), *self.blocks(name, size)])

    def layers(self) -> Iterator[Layer]:
        model = self.config.model
        for index in range(model.num_layers):
            prefix = f"model.layers.{index}"
            parts: dict[str, Any] = {"attn_sub_norm": None, "ffn_sub_norm": None}
            parts |= {
                field: self.vector(f"{prefix}.{name}.weight", size)
                for field, name, size in norms(self.config.family, model)
            }
            parts |= {
                part: self.matrix(projection(index, part), rows, cols)
                for part, rows, cols in model.projections()
            }
            yield Layer(**parts)

    def matrix(self, name: str, rows: int, cols: int) -> Ternary:
        tensor, scale = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.weight_scale")
        if tensor.dtype == "U8":
            form, packed, value = "packed", *self.packed(name, rows, cols)
        elif scale is not None:
            form, packed, value = "ternary", *self.unpacked(name, rows, cols)
        elif self.config.mode == "offline":
            raise HaloError(
                f"{name}.weight has no weight_scale, and the checkpoint says that it is quantised (offline).",
                hint=_FETCH,
            )
        else:
            form, packed, value = self.quantised(name, rows, cols)
        self.forms[name] = form
        return Ternary(packed, np.full(rows, value, dtype=np.float32), cols)

    def scale(self, name: str) -> np.float32:
        """The factor of a matrix from its weight_scale, which linear_class bitlinear stores as an inverse."""
        tensor = self.tensors[f"{name}.weight_scale"]
        if tensor.shape not in ((1,), ()):
            raise refused(
                self.source / "config.json",
                f"{tensor.name} is {list(tensor.shape)}, and the engine takes one scale for a matrix",
            )
        stored = tensor.floats().reshape(1)[0]
        with np.errstate(divide="ignore", over="ignore"):
            value = np.float32(1) / stored if self.config.inverse else stored
        if not (np.isfinite(value) and value > 0):
            raise HaloError(f"The scale {name}.weight_scale is {stored}; it must be above zero.", hint=_FETCH)
        return np.float32(value)

    def packed(self, name: str, rows: int, cols: int) -> tuple[NDArray[np.uint8], np.float32]:
        """Row R is in packed row R mod (rows / 4), bits 2 (R div (rows / 4)); codes 0, 1, 2."""
        if f"{name}.weight_scale" not in self.tensors:
            raise HaloError(f"The packed {name}.weight has no weight_scale.", hint=_FETCH)
        if rows % 4:
            raise HaloError(f"{name} has {rows} rows, which do not pack by quarters.", hint=_FETCH)
        raw = self.shaped(f"{name}.weight", rows // 4, cols).codes()
        threes = raw & raw >> 1 & 0x55
        quarters = []
        for quarter, shift in enumerate(np.arange(0, 8, 2, dtype=np.uint8)):
            unused = np.flatnonzero((threes >> shift & 1).any(axis=1))
            if len(unused):
                row = quarter * len(raw) + unused[0]
                raise HaloError(f"{name}.weight has the unused weight code 3 in row {row}.", hint=_FETCH)
            quarters.append(pack_codes(raw >> shift & np.uint8(3)))
        return np.concatenate(quarters), self.scale(name)

    def unpacked(self, name: str, rows: int, cols: int) -> tuple[NDArray[np.uint8], np.float32]:
        """Floats beside a weight_scale: what transformers saves of a packed model that it has unpacked."""
        if self.config.inverse:
            raise HaloError(
                f"{name}.weight is of floats beside a weight_scale, which linear_class bitlinear never is.",
                hint=_FETCH,
            )
        peak, least, _ = self.magnitudes(name, rows, cols)
        if peak not in (least, 0):
            raise HaloError(f"{name}.weight has a weight_scale, but is not ternary.", hint=_FETCH)
        return self.signs(name, rows, cols), np.float32((peak or 1) * self.scale(name))

    def quantised(self, name: str, rows: int, cols: int) -> tuple[str, NDArray[np.uint8], np.float32]:
        """s = 1 / max(mean|W|, 1e-5); q = clamp(round_half_even(W s), -1, 1); scale max(mean|W|, 1e-5).

        The mean is summed in float64 and rounded once. On weights that are ternary already the formula would
        shrink the scale by the share of non-zeros, so of those the largest magnitude is the scale.
        """
        peak, least, total = self.magnitudes(name, rows, cols)
        if peak == least:
            return "ternary", self.signs(name, rows, cols), peak
        if peak > 0 and self.config.mode == "none" and not self.config.family.masters:
            raise HaloError(self.why_not_ternary(name, rows, cols), hint=_MASTERS_OF_A_LLAMA)
        mean = np.maximum(np.float32(total / (rows * cols)), np.float32(1e-5))
        s = np.float32(1) / mean
        quantised = [
            pack_codes((np.clip(np.rint(block * s), -1, 1) + 1).astype(np.uint8))
            for block in self.blocks(f"{name}.weight", rows, cols)
        ]
        return "masters", np.concatenate(quantised), mean

    def why_not_ternary(self, name: str, rows: int, cols: int) -> str:
        """Of a LLaMA whose config.json does not say that it is ternary: why its weights are not, either."""
        by_row = True
        for block in self.blocks(f"{name}.weight", rows, cols):
            size = np.abs(block)
            peak = size.max(axis=1, keepdims=True)
            by_row = by_row and bool(((size == peak) | (size == 0)).all())
        if by_row:
            return f"{name}.weight has several scales, as TriLM has: the engine takes one for a matrix."
        return (
            f"{name}.weight is not ternary, and {self.source / 'config.json'} has no quantization_config: "
            "this is an ordinary LLaMA, or the masters of a ternary one."
        )

    def magnitudes(self, name: str, rows: int, cols: int) -> tuple[np.float32, np.float32, float]:
        """(the largest |w|, the least |w| above zero, the sum of all |w|)."""
        peak, least, total = np.float32(0), np.float32(np.inf), 0.0
        for block in self.blocks(f"{name}.weight", rows, cols):
            size = np.abs(block)
            peak = max(peak, size.max())
            least = min(least, np.min(size, where=size > 0, initial=np.float32(np.inf)))
            total += float(size.sum(dtype=np.float64))
        return peak, least, total

    def signs(self, name: str, rows: int, cols: int) -> NDArray[np.uint8]:
        blocks = self.blocks(f"{name}.weight", rows, cols)
        return np.concatenate([pack_codes((np.sign(block) + 1).astype(np.uint8)) for block in blocks])


def projection(layer: int, part: str) -> str:
    """The checkpoint's name of a projection, without `.weight`."""
    return f"model.layers.{layer}.{'self_attn' if part in 'qkvo' else 'mlp'}.{part}_proj"


def norms(family: Family, model: ModelConfig) -> list[tuple[str, str, int]]:
    """The norms of a layer: (field of Layer, name in the layer without `.weight`, size)."""
    found = [
        ("input_norm", "input_layernorm", model.hidden_size),
        ("post_attn_norm", "post_attention_layernorm", model.hidden_size),
    ]
    if family.sub_norms is not None:
        before_o, before_down = family.sub_norms
        found += [
            ("attn_sub_norm", before_o, model.q_size),
            ("ffn_sub_norm", before_down, model.intermediate_size),
        ]
    return found


def _check_names(path: Path, config: HfConfig, tensors: dict[str, Tensor]) -> None:
    """Exactly the tensors of the architecture; a matrix may have a weight_scale beside it.

    A head that is tied may be there all the same, and so may what old LLaMA code saved of RoPE.
    """
    model = config.model
    layers = range(model.num_layers)
    matrices = [projection(i, part) for i in layers for part, _, _ in model.projections()]
    wanted = {EMBEDDING, FINAL_NORM, *(f"{name}.weight" for name in matrices)}
    wanted |= {
        f"model.layers.{i}.{name}.weight" for i in layers for _, name, _ in norms(config.family, model)
    }
    wanted |= set() if model.tie_embeddings else {HEAD}
    allowed = {HEAD, *(f"{name}.weight_scale" for name in matrices)}
    missing = sorted(wanted - tensors.keys())
    extra = sorted(
        name for name in tensors.keys() - wanted - allowed if not name.endswith(".rotary_emb.inv_freq")
    )
    if any(name.endswith(("_proj.norm.weight", "_proj.rms_norm.weight")) for name in extra):
        raise refused(path, "it has a norm before each projection, as BitNet-embedding has")
    if missing:
        why = "it is incomplete"
        if HEAD in missing:
            why = "its output head is untied and is not there"
        elif all(
            name.endswith(("sub_norm.weight", "inner_attn_ln.weight", "ffn_layernorm.weight"))
            for name in missing
        ):
            why = "it lacks the sub-norms of its architecture"
        raise refused(path, f"{why}; {len(missing)} tensors are missing, the first is {missing[0]}")
    if extra:
        raise refused(path, f"{len(extra)} tensors are not of {path.name}'s model, the first is {extra[0]}")
