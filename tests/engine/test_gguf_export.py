"""GGUF out: what is written reads back the same, here and byte for byte by the format's own words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import HaloError
from engine.formats import gguf_types
from engine.formats.gguf import TensorPlan, read_gguf, write_gguf
from engine.formats.gguf_export import GgufOptions, export_gguf
from engine.formats.gguf_model import open_gguf
from engine.formats.gguf_tokenizer import gguf_vocabulary
from engine.formats.gguf_types import F32
from engine.model import Model
from engine.reference import Reference
from tests.engine import formats_fixtures as make


@pytest.fixture(scope="module")
def truth() -> Model:
    return make.random_model()


def export(path: Path, model: Model, **options: Any) -> list[str]:
    return export_gguf(path, model.stream(), make.vocabulary(), GgufOptions(**options))


def with_scales(model: Model, value: float) -> Model:
    """The model with another scale in layers.0.q."""
    layer = model.layers[0]
    q = replace(layer.q, scales=np.full_like(layer.q.scales, value))
    return replace(model, layers=[replace(layer, q=q), *model.layers[1:]])


@pytest.mark.parametrize("kind", ["tq2_0", "i2_s"])
def test_a_bitnet_comes_back_to_the_bit(tmp_path: Path, truth: Model, kind: str) -> None:
    notes = export(tmp_path / "m.gguf", truth, kind=kind)
    model = open_gguf(tmp_path / "m.gguf")
    assert make.same_model(truth, model.stream)
    assert gguf_vocabulary(model.file, 272) == (make.vocabulary(), [])
    assert not any("rounded" in note for note in notes)


def test_a_llama_comes_back_to_the_bit(tmp_path: Path) -> None:
    """Untied head, a head size of its own, a scale a row, q and k turned and turned back."""
    model = make.random_model(make.LLAMA, one_scale=False)
    export(tmp_path / "m.gguf", model, kind="tq2_0")
    assert make.same_model(model, open_gguf(tmp_path / "m.gguf").stream)
    assert read_gguf(tmp_path / "m.gguf").metadata["general.architecture"] == "llama"


@pytest.mark.parametrize(("kind", "number"), [("tq2_0", make.TQ2_0), ("i2_s", make.I2_S)])
def test_the_tensors_are_the_bytes_that_the_formats_words_give(
    tmp_path: Path, truth: Model, kind: str, number: int
) -> None:
    """Reader and writer that share a mistake agree with each other, and with nobody else."""
    export(tmp_path / "m.gguf", truth, kind=kind)
    wanted = make.tensors_of(truth, number)
    found = read_gguf(tmp_path / "m.gguf").tensors
    assert found.keys() == wanted.keys()
    for name, (shape, tensor_type, raw) in wanted.items():
        assert (found[name].shape, found[name].type.number) == (shape, tensor_type)
        assert found[name].raw.tobytes() == raw


def test_a_llamas_rows_are_in_llama_cpps_order(tmp_path: Path) -> None:
    model = make.random_model(make.LLAMA)
    export(tmp_path / "m.gguf", model, kind="tq2_0")
    found = read_gguf(tmp_path / "m.gguf").tensors
    for name, (_, _, raw) in make.tensors_of(model, make.TQ2_0, "llama").items():
        assert found[name].raw.tobytes() == raw


def test_the_logits_of_the_oracle_are_the_same(tmp_path: Path, truth: Model) -> None:
    from engine.formats.importer import in_memory

    tokens = [262, 5, 9, 77, 258]
    wanted = Reference(truth)
    logits = wanted.forward(tokens, wanted.new_cache())
    for kind in ("tq2_0", "i2_s"):
        export(tmp_path / f"{kind}.gguf", truth, kind=kind)
        again = Reference(in_memory(open_gguf(tmp_path / f"{kind}.gguf").stream))
        assert np.array_equal(again.forward(tokens, again.new_cache()), logits)


def test_a_scale_that_float16_does_not_hold_is_rounded_and_said(tmp_path: Path, truth: Model) -> None:
    model = with_scales(truth, 0.0123456789)
    notes = export(tmp_path / "m.gguf", model, kind="tq2_0")
    scale = next(iter(open_gguf(tmp_path / "m.gguf").stream.layers())).q.scales[0]
    error = abs(scale - np.float32(0.0123456789)) / np.float32(0.0123456789)
    assert 0 < error < 2**-11
    assert any(f"rounded by up to {error:.1e}" in note for note in notes)


def test_exact_keeps_such_a_scale_or_refuses(tmp_path: Path, truth: Model) -> None:
    model = with_scales(truth, 0.0123456789)
    notes = export(tmp_path / "m.gguf", model, kind="tq2_0", exact=True)
    assert make.same_model(model, open_gguf(tmp_path / "m.gguf").stream)
    assert not any("rounded" in note for note in notes)
    export(tmp_path / "s.gguf", model, kind="i2_s", exact=True)
    assert make.same_model(model, open_gguf(tmp_path / "s.gguf").stream)
    with pytest.raises(HaloError, match="float16 does not hold"):
        export(tmp_path / "b.gguf", model, kind="tq2_0", exact=True, architecture="bitnet-b1.58")
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize("scale", [1e-9, 1e5])
def test_a_scale_that_float16_cannot_hold_at_all_is_refused(
    tmp_path: Path, truth: Model, scale: float
) -> None:
    with pytest.raises(HaloError, match="even roughly"):
        export(tmp_path / "m.gguf", with_scales(truth, scale), kind="tq2_0")
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_that_does_not_fit_is_rounded_and_said_or_kept(tmp_path: Path, truth: Model) -> None:
    """2^-20 + 2^-27 is a bfloat16, and half-way between float16's subnormals or beyond them."""
    table = truth.embedding.copy()
    table[3, 4] = 2.0**-20 + 2.0**-27
    model = replace(truth, embedding=table)
    notes = export(tmp_path / "a.gguf", model, kind="i2_s")
    assert any(note.startswith("1 values of the embedding do not fit F16") for note in notes)
    assert not make.same_model(model, open_gguf(tmp_path / "a.gguf").stream)
    for name, options in (("b", {"embedding": "bf16"}), ("c", {"embedding": "f32"}), ("d", {"exact": True})):
        notes = export(tmp_path / f"{name}.gguf", model, kind="i2_s", **options)
        assert make.same_model(model, open_gguf(tmp_path / f"{name}.gguf").stream)
        assert not any("do not fit" in note for note in notes)
    assert read_gguf(tmp_path / "d.gguf").tensors["token_embd.weight"].type.name == "BF16"


def test_an_embedding_beyond_float16_is_refused(tmp_path: Path, truth: Model) -> None:
    table = truth.embedding.copy()
    table[0, 0] = 1e6
    with pytest.raises(HaloError, match="beyond F16") as caught:
        export(tmp_path / "m.gguf", replace(truth, embedding=table), kind="tq2_0")
    assert "bf16" in caught.value.hint


def test_bfloat16_is_rounded_to_nearest_even(tmp_path: Path, truth: Model) -> None:
    table = truth.embedding.copy()
    table[0, :4] = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-9]
    export(tmp_path / "m.gguf", replace(truth, embedding=table), kind="i2_s", embedding="bf16")
    found = next(iter(open_gguf(tmp_path / "m.gguf").stream.embedding()))
    assert found[0, :4].tolist() == [1, 1 + 2**-6, 1 + 2**-7, -1]


CANNOT: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a scale a row in I2_S": ({}, {"kind": "i2_s"}, "a scale a row"),
    "short rows": ({"intermediate_size": 640}, {"kind": "tq2_0"}, "groups of 256"),
    "shorter rows": ({"hidden_size": 192, "head_dim": 48}, {"kind": "i2_s"}, "groups of 128"),
    "no architecture": ({"sub_norms": False}, {"kind": "tq2_0"}, "squared ReLU without sub-norms"),
    "sub-norms in llama": ({}, {"kind": "tq2_0", "architecture": "llama"}, "sub-norms as llama"),
    "SiLU in b1.58": ({"activation": "silu"}, {"kind": "tq2_0", "architecture": "bitnet-b1.58"}, "SiLU as"),
    "untied bitnet": ({"tie_embeddings": False}, {"kind": "tq2_0"}, "untied head"),
    "head size": ({"head_dim": 128}, {"kind": "tq2_0"}, "head size of 128"),
    "vocabulary": ({"vocab_size": 300}, {"kind": "tq2_0"}, "272 tokens, and the model 300"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_the_format_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    changes, options, why = CANNOT[case]
    with pytest.raises(HaloError, match=why):
        export(
            tmp_path / "m.gguf",
            make.random_model(replace(make.BITNET, **changes), one_scale=False),
            **options,
        )
    assert list(tmp_path.iterdir()) == []


def test_silu_with_sub_norms_says_so(tmp_path: Path) -> None:
    model = make.random_model(replace(make.BITNET, activation="silu"))
    export(tmp_path / "m.gguf", model, kind="i2_s")
    assert make.same_model(model, open_gguf(tmp_path / "m.gguf").stream)
    assert read_gguf(tmp_path / "m.gguf").metadata["bitnet.hidden_activation"] == "silu"


def test_pieces_that_do_not_add_up_are_not_a_file(tmp_path: Path) -> None:
    plans = [TensorPlan("a", F32, (2, 4)), TensorPlan("b", F32, (4,))]
    eight, four = np.zeros((2, 4), "<f4"), np.zeros(4, "<f4")
    wrong: list[list[tuple[str, Any]]] = [
        [("a", eight)],
        [("a", eight), ("b", eight)],
        [("b", four), ("a", eight)],
        [("a", four), ("b", four)],
        [("a", eight), ("b", four), ("c", four)],
    ]
    for parts in wrong:
        with (tmp_path / "m.gguf").open("wb") as file, pytest.raises(HaloError):
            write_gguf(file, {}, plans, iter(parts))
    with (tmp_path / "m.gguf").open("wb") as file:
        write_gguf(file, {}, plans, iter([("a", four), ("a", four), ("b", four)]))
    assert list(read_gguf(tmp_path / "m.gguf").tensors) == ["a", "b"]


def test_the_published_reader_sees_the_same(tmp_path: Path, truth: Model) -> None:
    """gguf-py of llama.cpp: its own parser, and its own decoding of TQ2_0."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    export(tmp_path / "m.gguf", truth, kind="tq2_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    down = tensors["blk.1.ffn_down.weight"]
    weights = gguf.dequantize(down.data, down.tensor_type)
    from engine.formats.codes import unpack_codes

    matrix = truth.layers[1].down
    assert np.array_equal(weights, (unpack_codes(matrix).astype(np.float32) - 1) * matrix.scales[:, None])
    assert reader.get_field("tokenizer.ggml.pre").contents() == "llama-bpe"
    assert reader.get_field("bitnet.hidden_activation").contents() == "relu2"


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "TQ1_0", "TQ2_0"])
def test_blocks_decode_as_the_published_code_decodes_them(name: str) -> None:
    """Any bytes whose scale is a number: gguf-py's dequantize and ours, to the bit."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    kind = getattr(gguf_types, name)
    rng = np.random.default_rng(8)
    raw = rng.integers(0, 256, (50, kind.block_bytes), dtype=np.uint8)
    at = 0 if name == "Q8_0" else kind.block_bytes - 2
    raw[:, at : at + 2] = rng.uniform(0.001, 0.1, (50, 1)).astype("<f2").view(np.uint8)
    theirs = gguf.dequantize(raw, gguf.GGMLQuantizationType[name])
    if name.startswith("TQ"):
        codes, steps = (gguf_types.tq1_0 if name == "TQ1_0" else gguf_types.tq2_0)(raw)
        ours = (codes.astype(np.float32) - 1) * steps[:, None]
    else:
        ours = gguf_types.widened(kind, raw.reshape(-1)).reshape(theirs.shape)
    assert np.array_equal(ours, theirs)
