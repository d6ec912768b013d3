"""What a Hugging Face `config.json` says of a model, and which models halo refuses by name. No tensors here.

The one architecture that the engine runs is `BitNetForCausalLM` (transformers `models/bitnet`): squared
ReLU, sub-norms, a tied head, plain RoPE. Everything else is refused with its reason, before a tensor is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.errors import HaloError
from engine.model import ModelConfig

ARCHITECTURE: Final = "BitNetForCausalLM"
MAX_CONFIG: Final = 4 << 20
_USE: Final = "use a BitNetForCausalLM checkpoint, such as microsoft/bitnet-b1.58-2B-4T"
_DEFAULT_THETA: Final = 500000.0  # transformers' BitNetConfig.default_theta
_LLAMA: Final = "it is a LLaMA graph with SiLU and without sub-norms, which the engine does not have yet"
# Looked for in names only when the architecture is not the one that runs.
_FAMILIES: Final = (
    ("trilm", "TriLM", "it has several scales in a matrix and activations in floating point"),
    ("bonsai", "Bonsai", "it has a scale for each 128 weights and activations in floating point"),
    ("maple", "Maple", "it is a mixture of experts with sliding windows"),
    ("bitcpm", "BitCPM4", "it is a MiniCPM graph with scales for groups of weights"),
    ("minicpm", "BitCPM4", "it is a MiniCPM graph with scales for groups of weights"),
    ("falcon3", "Falcon3", _LLAMA),
    ("falcon-e", "Falcon-E", _LLAMA),
    ("llama3-8b-1.58", "Llama3-8B-1.58", _LLAMA),
    ("bitnet_b1_58", "bitnet_b1_58", "it has SiLU and a SentencePiece tokenizer"),
)
_ARCHITECTURES: Final = {
    "LlamaForCausalLM": _LLAMA,
    "FalconForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": "it is a Qwen3 graph (SiLU, norms of queries and keys)",
    "BitnetForCausalLM": "it has SiLU",
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


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes. Raises HaloError for anything else."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
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
    _check_architecture(directory, data)
    mode, inverse = _quantization(path, data)
    heads = _count(path, data, "num_attention_heads")
    hidden = _count(path, data, "hidden_size")
    kv_heads = heads if data.get("num_key_value_heads") is None else _count(path, data, "num_key_value_heads")
    head_dim = data.get("head_dim")
    if head_dim is not None and (type(head_dim) is not int or head_dim * heads != hidden):
        raise refused(path, f"its head_dim is {head_dim}, not hidden_size / num_attention_heads")
    model = ModelConfig(
        hidden,
        _count(path, data, "intermediate_size"),
        _count(path, data, "num_hidden_layers"),
        heads,
        kv_heads,
        _count(path, data, "vocab_size"),
        _count(path, data, "max_position_embeddings"),
        True,
        _theta(path, data),
        _number(path, data.get("rms_norm_eps", 1e-5), "rms_norm_eps"),
    )
    model.validate()
    return HfConfig(model, mode, inverse, _token(path, data, "bos"), _token(path, data, "eos"))


def refused(path: Path, why: str) -> HaloError:
    """The error of a checkpoint that is sound, but not one that halo runs."""
    return HaloError(f"halo does not run the checkpoint of {path}: {why}.", hint=_USE)


def shown(value: object) -> str:
    """A JSON value for a sentence: short, and of a list or object only that it is one."""
    return type(value).__name__ if isinstance(value, list | dict) else str(value)[:80]


def _check_architecture(directory: Path, data: dict[str, Any]) -> None:
    path = directory / "config.json"
    listed = data.get("architectures")
    architectures = [shown(each) for each in listed] if isinstance(listed, list) else []
    if architectures != [ARCHITECTURE]:
        names = (directory.resolve().name, data.get("_name_or_path"), data.get("model_type"), *architectures)
        text = " ".join(shown(name) for name in names).lower()
        for word, family, why in _FAMILIES:
            if word in text:
                raise refused(path, f"{family}: {why}")
        name = architectures[0] if architectures else "one that config.json does not name"
        why = _ARCHITECTURES.get(name, f"the engine runs {ARCHITECTURE} only")
        raise refused(path, f"its architecture is {name}: {why}")
    activation = data.get("hidden_act", "relu2")
    if activation != "relu2":
        what = "SiLU" if activation in ("silu", "swish") else shown(activation)
        raise refused(path, f"its activation is {what}, and the engine has squared ReLU (relu2) only")
    if data.get("tie_word_embeddings", False) is not True:
        raise refused(path, "its output head is untied (tie_word_embeddings is not true)")
    for key in ("attention_bias", "mlp_bias", "sliding_window"):
        if data.get(key):
            raise refused(path, f"it has {key}, which the engine does not have")


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
        raise refused(path, "it has a norm before each projection (use_rms_norm)")
    kept = config.get("modules_to_not_convert") or []
    if not isinstance(kept, list) or set(map(shown, kept)) - {"lm_head"}:
        raise refused(path, "some of its projections are not ternary (modules_to_not_convert)")
    return str(mode), linear == "bitlinear"


def _theta(path: Path, data: dict[str, Any]) -> float:
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
        if not plain or extra or rope.get("partial_rotary_factor", 1) != 1:
            raise refused(path, f"it scales RoPE ({key}), and the engine has plain RoPE only")
        found += [rope["rope_theta"]] if rope.get("rope_theta") is not None else []
    thetas = {_number(path, value, "rope_theta") for value in found}
    if len(thetas) > 1:
        raise refused(path, "it says rope_theta twice, differently")
    return thetas.pop() if thetas else _DEFAULT_THETA


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
