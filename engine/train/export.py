"""From the trainer's export to the bundled model: `python -m engine.train.export --help`. Nothing is trained.

It writes model.h1b.xz (version 2), tokenizer.htok (version 2), NOTICE, the credits, and model.json with the
golden tokens, which the NumPy oracle makes. It needs neither a GPU nor PyTorch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.formats.h1b import pack_codes, read_h1b, write_h1b
from engine.formats.htok import BYTE_OF, Vocabulary, read_htok, write_htok
from engine.model import Layer, Model, ModelConfig, Ternary
from engine.reference import Reference
from engine.tokenizer import Tokenizer

PROMPTS = ["Once upon a time", "The old man looked at the sea and", "It was a dark night, and the children"]
NOTICE = """The bundled demo model (model.h1b, tokenizer.htok) was trained by the halo developers from scratch.

Its weights are offered under the MIT licence of the project, as far as rights of the developers go. It learned from:

- books for young readers in the public domain in the United States;
- 711 children's stories under CC BY 4.0 or in the public domain, by the authors and illustrators listed in
  ccby_credits.tsv (Pratham Books' StoryWeaver, African Storybook); the text was cut into tokens, some stories were
  held out, and nothing else was changed; https://creativecommons.org/licenses/by/4.0/
- questions and answers made from tldr-pages, (c) the tldr-pages team and contributors, CC BY 4.0,
  https://github.com/tldr-pages/tldr; the pages were turned into pairs of question and answer, and paraphrased;
  https://creativecommons.org/licenses/by/4.0/

The books are of their time: what the model writes can carry the attitudes of the 19th century. It is small, and it
is often wrong: it shows that a box decodes, and is no source of facts.
"""  # noqa: E501 (the file's own lines)


def _digits(packed: NDArray[np.uint8], rows: int, cols: int) -> NDArray[np.uint8]:
    """Five base-3 digits a byte, lowest first -> codes 0, 1, 2 as uint8 [rows, cols]."""
    values = packed[:, None].astype(np.int32) // np.array([1, 3, 9, 27, 81]) % 3
    return values.reshape(-1)[: rows * cols].reshape(rows, cols).astype(np.uint8)


def build_model(folder: Path) -> Model:
    """The model that the trainer left in `folder` (weights.npz, embedding.npy)."""
    arrays = np.load(folder / "weights.npz")
    shape: dict[str, Any] = json.loads(str(arrays["shape"]))
    config = ModelConfig(
        hidden_size=shape["hidden"], intermediate_size=shape["ffn"], num_layers=shape["layers"],
        num_heads=shape["heads"], num_kv_heads=shape["kv_heads"], vocab_size=shape["vocabulary"],
        max_seq_len=shape["context"], tie_embeddings=True, rope_theta=shape["theta"],
        rms_norm_eps=shape["eps"],
    )  # fmt: skip
    bits = np.load(folder / "embedding.npy").astype(np.uint32) << 16
    layers = [_layer(arrays, i, config) for i in range(config.num_layers)]
    return Model(config, bits.view(np.float32), arrays["final_norm"], layers)


def _layer(arrays: Mapping[str, NDArray[Any]], index: int, config: ModelConfig) -> Layer:
    matrices = {}
    for name, rows, cols in config.projections():
        codes = _digits(arrays[f"{index}.{name}"], rows, cols)
        scales = np.full(rows, arrays[f"{index}.{name}.scale"], dtype=np.float32)
        matrices[name] = Ternary(packed=pack_codes(codes), scales=scales, cols=cols)
    names = ("input_norm", "post_attn_norm", "attn_sub_norm", "ffn_sub_norm")
    norms = {name: arrays[f"{index}.{name}"] for name in names}
    return Layer(**norms, **matrices)


def build_vocabulary(path: Path) -> Vocabulary:
    """A `tokenizer.json` of the tokenizers library as a Vocabulary; ids 0 and 1 are the special tokens."""
    model = json.loads(path.read_text())["model"]
    ids: dict[str, int] = model["vocab"]
    special = [0, 1]
    tokens = [b""] * len(ids)
    for text, i in ids.items():
        tokens[i] = text.encode() if i in special else bytes(BYTE_OF[c] for c in text)
    pairs = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    merges = [(ids[a], ids[b], ids[a + b]) for a, b in pairs]
    return Vocabulary(tokens=tokens, merges=merges, bos=0, eos=0, special=special, version=2)


def golden(model: Model, tokenizer: Tokenizer, count: int = 32) -> list[dict[str, object]]:
    """Greedy continuations by the oracle, at least one of them through the chat form."""
    oracle = Reference(model)
    chat = [0, *tokenizer.encode("User: What does the command tar do?"), 1, *tokenizer.encode("Assistant:")]
    prompts = [(p, [0, *tokenizer.encode(p)]) for p in PROMPTS]
    rows: list[dict[str, object]] = []
    for text, ids in [*prompts, ("What does the command tar do?", chat)]:
        print(f"oracle: {text!r}", flush=True)
        rows.append({"prompt": text, "prompt_ids": ids, "ids": _until_end(oracle.greedy(ids, count))})
    return rows


def _until_end(ids: list[int]) -> list[int]:
    """Up to and with the first special token, where generation stops."""
    end = next((i for i, token in enumerate(ids) if token in (0, 1)), len(ids) - 1)
    return ids[: end + 1]


def write_bundle(weights: Path, tokenizer_json: Path, credits: Path, out: Path) -> None:
    """Write all files of the bundled model into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        h1b = Path(scratch) / "model.h1b"
        write_h1b(h1b, build_model(weights))
        raw = h1b.read_bytes()
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 2, "pb": 2}]
        (out / "model.h1b.xz").write_bytes(lzma.compress(raw, check=lzma.CHECK_CRC64, filters=filters))
        write_htok(out / "tokenizer.htok", build_vocabulary(tokenizer_json))
        read_htok(out / "tokenizer.htok")
        model = read_h1b(h1b)
        context = model.config.max_seq_len
        rows = golden(model, Tokenizer.from_htok(out / "tokenizer.htok"))
    (out / "NOTICE").write_text(NOTICE)
    shutil.copyfile(credits, out / "ccby_credits.tsv")
    about = {
        "schema": 1,
        "name": "halo-demo",
        "files": {
            "model.h1b": _facts(raw),
            "tokenizer.htok": _facts((out / "tokenizer.htok").read_bytes()),
        },
        "chat_template": "halo-demo",
        "context": context,
        "golden": rows,
        "licence": "MIT; see NOTICE for the texts it learned from",
    }
    (out / "model.json").write_text(json.dumps(about, indent=1) + "\n")


def _facts(content: bytes) -> dict[str, object]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def main() -> None:
    """Make the bundled model from an export, a tokenizer.json and the credits."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--weights", type=Path, required=True, help="a folder with weights.npz and embedding.npy")
    p.add_argument("--tokenizer", type=Path, required=True, help="the tokenizer.json of the training")
    p.add_argument("--credits", type=Path, required=True, help="ccby_credits.tsv")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args()
    write_bundle(args.weights, args.tokenizer, args.credits, args.out)


if __name__ == "__main__":
    main()
