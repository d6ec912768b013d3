"""What halo exports, run by the programs that it is for; and what those programs' own tools make, imported.

HALO_PEER_LLAMA and HALO_PEER_BITNET name the folders that have llama-simple and llama-quantize of llama.cpp
(b11434 was used) and of bitnet.cpp (January 2026). Neither is part of halo nor fetched by it.

Random weights leave the best token only a small margin, and these programs round otherwise (llama.cpp
quantises activations by blocks of 256): so their tokens are followed, and at most of them the oracle must
have the same best one. With one mistake in the graph it must not.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.formats.codes import pack_codes
from engine.formats.gguf_export import GgufOptions, export_gguf
from engine.formats.gguf_model import halves_from_pairs, open_gguf
from engine.formats.htok import Vocabulary
from engine.model import Layer, Model, ModelConfig, Ternary
from engine.reference import Reference
from tests.engine import formats_fixtures as make

# One token a byte, so that what a program prints says which tokens it chose.
TOKENS = [*(bytes([value]) for value in range(256)), b"\xf5\xf6", b"<|begin_of_text|>", b"<|end_of_text|>"]
VOCABULARY = Vocabulary(TOKENS, [(0xF5, 0xF6, 256)], 257, 258, [257, 258])
LLAMA = ModelConfig(256, 512, 2, 4, 2, len(TOKENS), 256, False, 10000.0, 2.0**-17, "silu", False)
WIDE_HEADS = replace(LLAMA, head_dim=128)
ONE_BIT = replace(LLAMA, sub_norms=True, tie_embeddings=True, num_kv_heads=4)
BITNET = replace(ONE_BIT, activation="relu2", num_kv_heads=2, rope_theta=500000.0)
PROMPTS = (
    "Once upon a time",
    "42 is",
    "The quick brown fox jumps",
    "~!@",
    "zzzzzzzz",
    "How do I list files?",
)
COUNT = 24


def program(variable: str, name: str) -> str:
    """The path of another engine's program; the test is skipped where it is not there."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{variable} does not name the folder of that engine's programs")
    return str(Path(folder) / name)


LLAMA_CPP = partial(program, "HALO_PEER_LLAMA")
BITNET_CPP = partial(program, "HALO_PEER_BITNET")


def run(*words: str) -> bytes:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:].decode(errors="replace")
    return done.stdout


def model_of(config: ModelConfig, scales: type[np.floating[Any]] = np.float16) -> Model:
    """Random weights that keep the size of what comes in. All is exact in float16, scales in `scales`."""
    rng = np.random.default_rng(7)

    def table(deviation: float) -> np.ndarray[Any, Any]:
        values = rng.normal(0, deviation, (config.vocab_size, config.hidden_size))
        values[[0, 257, 258]] = 0  # neither the byte that ends a text in C nor an end is ever chosen
        return values.astype(np.float16).astype(np.float32)

    def ternary(rows: int, cols: int) -> Ternary:
        scale = np.float32(scales(rng.uniform(0.9, 1.1) * (2 / 3 * cols) ** -0.5))
        codes = rng.integers(0, 3, (rows, cols), dtype=np.uint8)
        return Ternary(pack_codes(codes), np.full(rows, scale), cols)

    def norm(size: int) -> np.ndarray[Any, Any]:
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    def layer() -> Layer:
        sub = (norm(config.q_size), norm(config.intermediate_size)) if config.sub_norms else (None, None)
        matrices = [ternary(rows, cols) for _, rows, cols in config.projections()]
        return Layer(norm(config.hidden_size), norm(config.hidden_size), *sub, *matrices)

    layers = [layer() for _ in range(config.num_layers)]
    embedding = table(0.02)  # less than what the layers add, or the last token would decide alone
    head = None if config.tie_embeddings else table(0.1)
    return Model(config, embedding, norm(config.hidden_size), layers, head)


def export(path: Path, model: Model, **options: Any) -> Path:
    export_gguf(path, model.stream(), VOCABULARY, GgufOptions(**options))
    return path


def continued(simple: str, path: Path) -> list[tuple[int, list[int]]]:
    """What llama-simple says after each prompt: (tokens of bos and prompt, all tokens)."""
    found = []
    for prompt in PROMPTS:
        said = run(simple, "-m", str(path), "-n", str(COUNT), "-ngl", "0", prompt)
        before = TOKENS[257] + prompt.encode()
        text = said[said.index(before) + len(TOKENS[257]) :].removesuffix(b"\n")
        ids = list(text.replace(b"\xf5\xf6", b"\x00"))  # that pair is one token, 256
        found.append((1 + len(prompt), [257, *(each or 256 for each in ids)]))
    return found


def agreement(model: Model, told: list[tuple[int, list[int]]]) -> float:
    """The share of their tokens that are the oracle's best ones too, after the same tokens before."""
    oracle, same, count = Reference(model, "f16"), 0, 0
    for start, ids in told:
        best = oracle.forward(ids, oracle.new_cache()).argmax(axis=-1)
        same += sum(int(best[at - 1]) == ids[at] for at in range(start, len(ids)))
        count += len(ids) - start
    assert count > len(told) * COUNT * 0.8
    return same / count


def mistaken(model: Model, mistake: str) -> Model:
    """The model with one thing of its graph or weights wrong."""
    config, layers = model.config, model.layers
    if mistake == "activation":
        return replace(
            model, config=replace(config, activation="relu2" if config.activation == "silu" else "silu")
        )
    changes: dict[str, Callable[[Layer], Layer]] = {
        "q and k unturned": lambda each: replace(
            each,
            q=halves_from_pairs(each.q, config.num_heads),
            k=halves_from_pairs(each.k, config.num_kv_heads),
        ),
        "gate and up swapped": lambda each: replace(each, gate=each.up, up=each.gate),
    }
    return replace(model, layers=[changes[mistake](each) for each in layers])


MISTAKES = ("activation", "q and k unturned", "gate and up swapped")
# (the model, how it is written) for the program whose graph is right for it.
FOR_LLAMA: dict[str, tuple[Model, dict[str, Any]]] = {
    "llama": (model_of(LLAMA), {}),
    "wide heads": (model_of(WIDE_HEADS), {}),
    "sub-norms and SiLU": (model_of(ONE_BIT), {}),
    "scales apart": (model_of(ONE_BIT, np.float32), {"exact": True}),
}


def check(simple: str, path: Path, model: Model) -> None:
    told = continued(simple, path)
    wrong = {mistake: agreement(mistaken(model, mistake), told) for mistake in MISTAKES}
    assert agreement(model, told) > 0.9 and max(wrong.values()) < 0.7, wrong


@pytest.mark.parametrize("case", FOR_LLAMA)
def test_llama_cpp_runs_what_is_exported(tmp_path: Path, case: str) -> None:
    model, options = FOR_LLAMA[case]
    check(LLAMA_CPP("llama-simple"), export(tmp_path / "m.gguf", model, kind="tq2_0", **options), model)


@pytest.mark.parametrize("config", [BITNET, LLAMA, WIDE_HEADS], ids=["bitnet-b1.58", "llama", "wide heads"])
def test_bitnet_cpp_runs_what_is_exported(tmp_path: Path, config: ModelConfig) -> None:
    model = model_of(config, np.float32)
    check(BITNET_CPP("llama-simple"), export(tmp_path / "m.gguf", model, kind="i2_s"), model)


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("config", [LLAMA, ONE_BIT], ids=["llama", "bitnet"])
def test_what_llama_cpp_quantises_is_the_model(tmp_path: Path, config: ModelConfig, kind: str) -> None:
    model, quantize = model_of(config), LLAMA_CPP("llama-quantize")
    floats = as_floats(tmp_path / "f16.gguf", model, "bitnet" if config.sub_norms else "llama", make.F16)
    keep = ("--token-embedding-type", "f16", "--output-tensor-type", "f16")
    run(quantize, *keep, str(floats), str(tmp_path / "m.gguf"), kind, "1")
    assert make.same_model(model, open_gguf(tmp_path / "m.gguf", "silu").stream)


def test_what_bitnet_cpp_quantises_is_the_model(tmp_path: Path) -> None:
    model, quantize = model_of(BITNET, np.float32), BITNET_CPP("llama-quantize")
    floats = as_floats(tmp_path / "f32.gguf", model, "bitnet-b1.58", make.F32)
    run(quantize, "--token-embedding-type", "f16", str(floats), str(tmp_path / "m.gguf"), "I2_S", "1")
    assert make.same_model(model, open_gguf(tmp_path / "m.gguf").stream)


def as_floats(path: Path, model: Model, architecture: str, kind: int) -> Path:
    """The model dequantised, as a converter writes it before the quantiser runs."""
    metadata = make.metadata_of(model.config, architecture) | make.tokenizer_metadata(VOCABULARY)
    metadata |= {f"{architecture}.vocab_size": len(TOKENS), "general.file_type": 1 if kind == make.F16 else 0}
    path.write_bytes(make.container(metadata, make.tensors_of(model, kind, architecture)))
    return path
