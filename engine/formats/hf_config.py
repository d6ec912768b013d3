"""What a Hugging Face `config.json` says of a model, and which models halo refuses by name. No tensors here.

Three architectures run. `BitNetForCausalLM` (transformers `models/bitnet`: BitNet-b1.58-2B-4T), squared ReLU
and sub-norms. `BitnetForCausalLM` (1bitLLM's own code: bitnet_b1_58-large, -xl, -3B), SiLU and sub-norms of
other names. `LlamaForCausalLM` with ternary projections (Falcon-E, Falcon3-1.58bit, Llama3-8B-1.58), SiLU and
no sub-norms. Everything else is refused with its reason, before a tensor is read.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from engine.errors import HaloError
from engine.model import ModelConfig

MAX_CONFIG: Final = 4 << 20
_USE: Final = "use one that runs, such as microsoft/bitnet-b1.58-2B-4T or tiiuae/Falcon-E-3B-Instruct"
_GROUPS: Final = "it has a scale for each group of weights, and activations in floating point"
# Looked for in names unless config.json itself says that the model is one that runs.
_OTHERS: Final = (
    ("bitnet-embedding", "BitNet-embedding", "it has a norm before each projection"),
    ("trilm", "TriLM", "it has several scales in a matrix, and activations in floating point"),
    ("spectrasuite", "TriLM", "it has several scales in a matrix, and activations in floating point"),
    ("bonsai", "Bonsai", _GROUPS),
    ("maple", "Maple", "it is a mixture of experts with sliding windows"),
    ("bitcpm", "BitCPM4", f"it is a MiniCPM graph, and {_GROUPS}"),
    ("minicpm", "BitCPM4", f"it is a MiniCPM graph, and {_GROUPS}"),
)
_ARCHITECTURES: Final = {
    "Qwen3ForCausalLM": "it is a Qwen3 graph (norms of queries and keys)",
    "FalconForCausalLM": "it is the graph of the first Falcon, not of Falcon-E or Falcon3",
}
# What the engine has nothing for, where it is set to anything but nothing.
_LACKING: Final = ("attention_bias", "mlp_bias", "sliding_window", "qk_norm", "yoco_u_stages")
# Kept out of quantisation by every publisher; none of them is a projection.
_NO_PROJECTIONS: Final = {"lm_head", "embed_tokens", "model.embed_tokens", "norm", "model.norm"}


@dataclass(frozen=True)
class Family:
    """What an architecture leaves unsaid in config.json.

    `sub_norms` are the tensors before the output and down projections, without layer and `.weight`.
    `masters`: floats without a quantization_config are masters to quantise; of a LLaMA they need not be.
    """

    activation: Literal["relu2", "silu"]
    sub_norms: tuple[str, str] | None
    theta: float
    eps: float
    masters: bool


FAMILIES: Final = {
    "BitNetForCausalLM": Family(
        "relu2", ("self_attn.attn_sub_norm", "mlp.ffn_sub_norm"), 500000.0, 1e-5, masters=True
    ),
    "BitnetForCausalLM": Family(
        "silu", ("self_attn.inner_attn_ln", "mlp.ffn_layernorm"), 10000.0, 1e-6, masters=True
    ),
    "LlamaForCausalLM": Family("silu", None, 10000.0, 1e-6, masters=False),
}


@dataclass(frozen=True)
class HfConfig:
    """What the import needs of config.json. `bos` and `eos` are None where it does not say.

    `mode` is "none" (no quantization_config), "online" or "offline"; `inverse` says that a weight_scale
    divides (linear_class bitlinear) instead of multiplying (autobitlinear).
    """

    model: ModelConfig
    mode: str
    inverse: bool
    bos: int | None
    eos: int | None
    family: Family


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes. Raises HaloError for anything else."""
    try:
        with path.open("rb") as file:
            # Not read(limit + 1) alone: that takes as much memory before it reads.
            raw = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
    except OSError as error:
        raise HaloError(
            f"{path} cannot be read: {error.strerror}.", hint="give the folder of a complete checkpoint"
        ) from error
    if len(raw) > limit:
        raise HaloError(f"{path} is larger than {limit} bytes.", hint="fetch the checkpoint again")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise HaloError(f"{path} is not valid JSON.", hint="fetch the checkpoint again") from error
    if not isinstance(data, dict):
        raise HaloError(f"{path} is no JSON object.", hint="fetch the checkpoint again")
    return data


def read_config(directory: Path) -> HfConfig:
    """config.json of a checkpoint, when the engine runs what it describes; else HaloError with the reason."""
    path = directory / "config.json"
    data = read_object(path, MAX_CONFIG)
    family = _family(directory, data)
    mode, inverse = _quantization(path, data)
    heads = _count(path, data, "num_attention_heads")
    optional = {
        name: None if data.get(name) is None else _count(path, data, name)
        for name in ("num_key_value_heads", "head_dim")
    }
    model = ModelConfig(
        hidden_size=_count(path, data, "hidden_size"),
        intermediate_size=_count(path, data, "intermediate_size"),
        num_layers=_count(path, data, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads if optional["num_key_value_heads"] is None else optional["num_key_value_heads"],
        vocab_size=_count(path, data, "vocab_size"),
        max_seq_len=_count(path, data, "max_position_embeddings"),
        tie_embeddings=_tied(path, data),
        rope_theta=_theta(path, data, family),
        rms_norm_eps=_number(path, data.get("rms_norm_eps", family.eps), "rms_norm_eps"),
        activation=_activation(path, data, family),
        sub_norms=family.sub_norms is not None,
        head_dim=_head_dim(path, data, heads, optional["head_dim"]),
    )
    model.validate()
    return HfConfig(model, mode, inverse, _token(path, data, "bos"), _token(path, data, "eos"), family)


def refused(path: Path, why: str) -> HaloError:
    """The error of a checkpoint that is sound, but not one that halo runs."""
    return HaloError(f"halo does not run the checkpoint of {path}: {why}.", hint=_USE)


def shown(value: object) -> str:
    """A JSON value for a sentence: short, and of a list or object only that it is one."""
    return type(value).__name__ if isinstance(value, list | dict) else str(value)[:80]


def _family(directory: Path, data: dict[str, Any]) -> Family:
    """The family of an architecture that runs; HaloError that names the one that does not."""
    path = directory / "config.json"
    listed = data.get("architectures")
    architectures = [shown(each) for each in listed] if isinstance(listed, list) else []
    name = architectures[0] if len(architectures) == 1 else ""
    family = FAMILIES.get(name)
    if family is None or not (family.masters or data.get("quantization_config")):
        names = (directory.resolve().name, data.get("_name_or_path"), data.get("model_type"), *architectures)
        text = " ".join(shown(each) for each in names).lower()
        for word, other, why in _OTHERS:
            if word in text:
                raise refused(path, f"{other}: {why}")
    if family is None:
        name = " and ".join(architectures) or "one that config.json does not name"
        why = _ARCHITECTURES.get(name, f"the engine runs {', '.join(FAMILIES)} only")
        raise refused(path, f"its architecture is {name}: {why}")
    for key in _LACKING:
        if data.get(key):
            raise refused(path, f"it has {key}, which the engine does not have")
    for key, runs in (("weight_bits", 1), ("input_bits", 8)):  # 1bitLLM's
        if data.get(key, runs) != runs:
            raise refused(path, f"its {key} is {shown(data[key])}, and the engine has {runs} only")
    return family


def _activation(path: Path, data: dict[str, Any], family: Family) -> Literal["relu2", "silu"]:
    match data.get("hidden_act", family.activation):
        case "relu2":
            return "relu2"
        case "silu" | "swish":
            return "silu"
        case other:
            raise refused(path, f"its activation is {shown(other)}, and the engine has relu2 and silu only")


def _tied(path: Path, data: dict[str, Any]) -> bool:
    """tie_word_embeddings; false where it is not said, as all three architectures have it."""
    tied = False if data.get("tie_word_embeddings") is None else data["tie_word_embeddings"]
    if not isinstance(tied, bool):
        raise HaloError(f"{path} says tie_word_embeddings = {shown(tied)}, not true or false.", hint=_USE)
    return tied


def _head_dim(path: Path, data: dict[str, Any], heads: int, head_dim: int | None) -> int:
    """The stated head_dim, else hidden_size / num_attention_heads, which must then be whole."""
    if head_dim is not None:
        if head_dim < 1:
            raise HaloError(f"{path} says head_dim = {head_dim}, which is no size.", hint=_USE)
        return head_dim
    hidden = _count(path, data, "hidden_size")
    if heads < 1 or hidden % heads:
        raise refused(path, f"its hidden_size of {hidden} does not divide into {heads} heads")
    return hidden // heads


def _quantization(path: Path, data: dict[str, Any]) -> tuple[str, bool]:
    """(mode, whether weight_scale is an inverse); the defaults are transformers' BitNetQuantConfig's."""
    config = data.get("quantization_config")
    if config is None:
        return "none", False
    if not isinstance(config, dict) or config.get("quant_method") != "bitnet":
        raise refused(path, "its quantization_config is not of the method bitnet")
    linear, mode = config.get("linear_class", "bitlinear"), config.get("quantization_mode", "offline")
    if linear not in ("bitlinear", "autobitlinear"):
        raise refused(path, f"its linear_class is {shown(linear)}, so the scale's direction is unknown")
    if mode not in ("online", "offline"):
        raise refused(path, f"its quantization_mode is {shown(mode)}")
    if config.get("use_rms_norm"):
        raise refused(path, "it has a norm before each projection (use_rms_norm), as BitNet-embedding has")
    kept = config.get("modules_to_not_convert") or []
    if not isinstance(kept, list) or {shown(n).removesuffix(".weight") for n in kept} - _NO_PROJECTIONS:
        raise refused(path, "some of its projections are not ternary (modules_to_not_convert)")
    return str(mode), linear == "bitlinear"


def _theta(path: Path, data: dict[str, Any], family: Family) -> float:
    """rope_theta, from where each version of transformers writes it; any scaling of RoPE is refused."""
    found = [data["rope_theta"]] if data.get("rope_theta") is not None else []
    for key in ("rope_scaling", "rope_parameters"):
        rope = data.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise refused(path, f"its {key} is no object")
        plain = all(rope.get(name, "default") == "default" for name in ("rope_type", "type"))
        extra = set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if not plain or extra or (rope | data).get("partial_rotary_factor", 1) != 1:
            raise refused(path, f"it scales RoPE ({key}), and the engine has plain RoPE only")
        found += [rope["rope_theta"]] if rope.get("rope_theta") is not None else []
    thetas = {_number(path, value, "rope_theta") for value in found}
    if len(thetas) > 1:
        raise refused(path, "it says rope_theta twice, differently")
    return thetas.pop() if thetas else family.theta


def _count(path: Path, data: dict[str, Any], name: str) -> int:
    value = data.get(name)
    if type(value) is not int:
        raise HaloError(f"{path} says {name} = {shown(value)}, no whole number.", hint=_USE)
    return value


def _number(path: Path, value: object, name: str) -> float:
    """A number that float32 holds: .h1b takes zero for "the default"."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 <= value <= 1e30:
        raise HaloError(f"{path} says {name} = {shown(value)}, no usable number.", hint=_USE)
    return float(value)


def _token(path: Path, data: dict[str, Any], which: str) -> int | None:
    """A token id; of a list, as generation configs have it, the first."""
    value = data.get(f"{which}_token_id")
    if isinstance(value, list) and value:
        value = value[0]
    if value is None:
        return None
    if type(value) is not int or value < 0:
        raise HaloError(f"{path} says {which}_token_id = {shown(value)}, no token id.", hint=_USE)
    return value
