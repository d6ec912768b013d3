"""A tiny real model in the bundled model's form, so that installer tests need not carry the trained one."""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path

import numpy as np

from engine.formats.h1b import pack_codes, write_h1b
from engine.formats.htok import Vocabulary, write_htok
from engine.model import Layer, Model, ModelConfig, Ternary

CONFIG = ModelConfig(64, 128, 2, 4, 2, 258, 128, True, 10000.0, 1e-5)


def random_model(seed: int = 7) -> Model:
    """Random ternary weights: what it says is noise, and the same noise everywhere."""
    rng = np.random.Generator(np.random.PCG64(seed))

    def ternary(rows: int, cols: int) -> Ternary:
        codes = rng.integers(0, 3, (rows, cols)).astype(np.uint8)
        return Ternary(pack_codes(codes), np.full(rows, 0.08, np.float32), cols)

    def norm(size: int) -> np.ndarray:
        return np.ones(size, np.float32)

    hidden, ffn, kv = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.kv_size
    layers = [
        Layer(
            norm(hidden), norm(hidden), norm(hidden), norm(ffn),
            ternary(hidden, hidden), ternary(kv, hidden), ternary(kv, hidden), ternary(hidden, hidden),
            ternary(ffn, hidden), ternary(ffn, hidden), ternary(hidden, ffn),
        )
        for _ in range(CONFIG.num_layers)
    ]  # fmt: skip
    embedding = rng.standard_normal((CONFIG.vocab_size, hidden)).astype(np.float32)
    return Model(CONFIG, embedding, norm(hidden), layers)


def make_demo(directory: Path, prompt: str = "Once upon a time") -> Path:
    """Write model.h1b.xz, tokenizer.htok, NOTICE and model.json with the oracle's golden ids."""
    from engine.reference import Reference

    directory.mkdir(parents=True, exist_ok=True)
    model = random_model()
    tokens = [b"<|endoftext|>", b"<|eot_id|>", *(bytes([value]) for value in range(256))]
    write_htok(directory / "tokenizer.htok", Vocabulary(tokens, [], 0, 0, [0, 1], 2))
    write_h1b(directory / "model.h1b", model)
    prompt_ids = [0, *(byte + 2 for byte in prompt.encode())]
    ids = Reference(model).greedy(prompt_ids, 16)
    ids = ids[: next((i for i, token in enumerate(ids) if token < 2), len(ids))]
    files = {}
    for name in ("model.h1b", "tokenizer.htok"):
        data = (directory / name).read_bytes()
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (directory / "model.h1b.xz").write_bytes(lzma.compress((directory / "model.h1b").read_bytes()))
    (directory / "model.h1b").unlink()
    (directory / "NOTICE").write_text("Random weights, made by tests/provision/demo.py.\n")
    description = {
        "schema": 1, "name": "halo-tiny", "files": files, "chat_template": "halo-demo", "context": 128,
        "golden": [{"prompt": prompt, "prompt_ids": prompt_ids, "ids": [int(token) for token in ids]}],
        "licence": "MIT",
    }  # fmt: skip
    (directory / "model.json").write_text(json.dumps(description))
    return directory
