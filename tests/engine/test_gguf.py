"""GGUF in: every encoding of a model gives the same model; a file that lies is refused in one sentence."""

from __future__ import annotations

import random
import resource
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import HaloError
from engine.formats.codes import pack_codes, unpack_codes
from engine.formats.gguf import read_gguf
from engine.formats.gguf_model import GgufModel, open_gguf
from engine.formats.gguf_tokenizer import gguf_vocabulary
from engine.formats.gguf_types import Q6_K, Q8_0, widened
from engine.model import Model, Ternary
from tests.engine import formats_fixtures as make

KINDS = {
    "I2_S": make.I2_S, "TQ1_0": make.TQ1_0, "TQ2_0": make.TQ2_0, "F32": make.F32, "F16": make.F16,
    "BF16": make.BF16,
}  # fmt: skip


@pytest.fixture(scope="module")
def truth() -> Model:
    return make.random_model()


@pytest.fixture(scope="module")
def llama() -> Model:
    return make.random_model(make.LLAMA, one_scale=False)


def opened(tmp_path: Path, data: bytes, **arguments: Any) -> GgufModel:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return open_gguf(path, **arguments)


def rebuilt(
    model: Model, kind: int, edit: Callable[[dict[str, Any]], Any], architecture: str = "bitnet-b1.58"
) -> bytes:
    """A file of `model` with its tensors changed."""
    tensors = make.tensors_of(model, kind, architecture)
    edit(tensors)
    metadata = make.metadata_of(model.config, architecture)
    return make.container(metadata | make.tokenizer_metadata(make.vocabulary()), tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_every_encoding_gives_the_same_model(tmp_path: Path, truth: Model, kind: str) -> None:
    """Code maps, groups of 128, TQ1_0's rounding, the trailing scale: each mistake gives fluent nonsense."""
    model = opened(tmp_path, make.gguf_bytes(truth, KINDS[kind]))
    assert make.same_model(truth, model.stream)
    what = "ternary already" if kind in ("F32", "F16", "BF16") else f"were {kind}"
    assert len(model.form_notes()) == 1
    assert model.form_notes()[0].startswith("14 matrices") and what in model.form_notes()[0]


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", "F16"])
def test_a_llamas_q_and_k_are_put_back(tmp_path: Path, llama: Model, kind: str) -> None:
    """llama.cpp turns neighbours, the engine halves; without the way back every position is scrambled."""
    assert make.same_model(llama, opened(tmp_path, make.gguf_bytes(llama, KINDS[kind], "llama")).stream)


def test_bitnets_q_and_k_stay(tmp_path: Path, truth: Model) -> None:
    for architecture in ("bitnet", "bitnet-25", "bitnet-b1.58"):
        data = make.gguf_bytes(truth, make.TQ2_0, architecture)
        assert make.same_model(truth, opened(tmp_path, data, activation="relu2").stream)


def test_version_two_and_another_alignment_read_alike(tmp_path: Path, truth: Model) -> None:
    metadata = make.metadata_of(truth.config, "bitnet-25") | make.tokenizer_metadata(make.vocabulary())
    tensors = make.tensors_of(truth, make.I2_S)
    for version, alignment in ((2, 32), (3, 8), (3, 4096)):
        keys = metadata | {"general.alignment": alignment}
        data = make.container(keys, tensors, version, alignment)
        assert make.same_model(truth, opened(tmp_path, data).stream)


def test_every_value_of_a_tq1_0_byte_decodes_as_the_formula_says() -> None:
    """Digit i is the whole part of three times what is left: ((b 3^i mod 256) 3) >> 8."""
    from engine.formats.gguf_types import tq1_0

    for byte in range(256):
        block = np.full((1, 54), byte, np.uint8)
        codes, _ = tq1_0(block)
        digits = [(byte * 3**i % 256) * 3 >> 8 for i in range(5)]
        assert codes[0, :160:32].tolist() == digits and codes[0, 160:240:16].tolist() == digits
        assert codes[0, 240::4].tolist() == digits[:4]


def test_all_243_groups_of_digits_survive_the_rounding() -> None:
    """ceil(v 256 / 243): floor would turn some digits into their neighbours."""
    from engine.formats.gguf_types import tq1_0

    groups = np.array([[v // 3 ** (4 - i) % 3 for i in range(5)] for v in range(243)], np.uint8)
    codes = np.ones((243, 256), np.uint8)
    codes[:, 0:160:32] = groups
    raw = make.encode_tq1_0(codes, np.ones(243, np.float32))
    assert np.array_equal(tq1_0(np.frombuffer(raw, np.uint8).reshape(-1, 54))[0], codes)


def test_q8_0_and_q6_k_embeddings_are_what_their_blocks_say() -> None:
    """Written out a number at a time, from the structs of ggml-common.h."""
    rng = np.random.default_rng(4)
    d = rng.uniform(0.001, 0.1, 3).astype(np.float16)
    q = rng.integers(-128, 128, (3, 32), dtype=np.int8)
    raw = b"".join(d[i].tobytes() + q[i].tobytes() for i in range(3))
    wanted = [np.float32(d[i]) * np.float32(q[i, j]) for i in range(3) for j in range(32)]
    assert widened(Q8_0, np.frombuffer(raw, np.uint8)).tolist() == wanted

    block = rng.integers(0, 256, 210, dtype=np.uint8)
    block[208:] = np.frombuffer(d[0].tobytes(), np.uint8)
    scales = block[192:208].view(np.int8)
    expected = np.zeros(256, np.float32)
    for n in (0, 128):
        ql, qh = block[n // 2 : n // 2 + 64], block[128 + n // 4 : 128 + n // 4 + 32]
        for m in range(32):
            nibbles = ql[m] & 15, ql[m + 32] & 15, ql[m] >> 4, ql[m + 32] >> 4
            for part, low in enumerate(nibbles):
                index = n + 32 * part + m
                value = (int(low) | (int(qh[m]) >> 2 * part & 3) << 4) - 32
                expected[index] = np.float32(d[0]) * np.float32(scales[index // 16]) * np.float32(value)
    assert np.array_equal(widened(Q6_K, block), expected)


def test_the_embedding_may_be_q8_0(tmp_path: Path, truth: Model) -> None:
    rng = np.random.default_rng(0)
    shape = truth.embedding.shape
    q = rng.integers(-127, 128, (shape[0], shape[1] // 32, 32), dtype=np.int8)
    blocks = b"".join(make.half(0.5) + row.tobytes() for row in q.reshape(-1, 32))
    data = rebuilt(truth, make.I2_S, lambda t: t.update({"token_embd.weight": (shape, make.Q8_0, blocks)}))
    found = np.concatenate(list(opened(tmp_path, data).stream.embedding()))
    assert np.array_equal(found, q.reshape(shape).astype(np.float32) / 2)


def test_masters_are_quantised_by_absmean_and_dequantised_weights_are_not(
    tmp_path: Path, truth: Model
) -> None:
    """Half of the weights zero: absmean of the dequantised ones would halve the scale."""
    codes = np.ones((256, 256), np.uint8)
    codes[:, ::2] = 2
    shape = codes.shape
    masters = np.where(codes == 2, 1.75, 0.25) * 0.125
    wanted = Ternary(pack_codes(codes), np.full(256, 0.125, np.float32), 256)
    for values, form in ((masters, "quantised by absmean"), ((codes - 1.0) * 0.125, "ternary already")):
        raw = make.encode_floats(make.F32, values)
        data = rebuilt(truth, make.I2_S, lambda t, r=raw: t.update({"blk.0.attn_q.weight": (shape, 0, r)}))
        model = opened(tmp_path, data)
        found = next(iter(model.stream.layers())).q
        assert np.array_equal(found.packed, wanted.packed) and np.array_equal(found.scales, wanted.scales)
        assert any(form in note for note in [*model.form_notes()])


def test_the_floats_of_an_ordinary_llama_are_refused(tmp_path: Path, llama: Model) -> None:
    """Quantised to three values, a model that was never trained for it says nothing."""
    masters = np.random.default_rng(1).normal(0, 1, (512, 256))
    edit = {"blk.0.attn_q.weight": ((512, 256), make.F16, make.encode_floats(make.F16, masters))}
    data = rebuilt(llama, make.TQ2_0, lambda t: t.update(edit), "llama")
    with pytest.raises(HaloError, match="more than three"):
        list(opened(tmp_path, data).stream.layers())


def scaled_blocks(model: Model, scale: Callable[[int, int], float]) -> tuple[tuple[int, ...], int, bytes]:
    """layers.0.down in TQ2_0 with a scale for each block of a row."""
    codes = unpack_codes(model.layers[0].down)
    raw = b""
    for row in range(len(codes)):
        for block in range(codes.shape[1] // 256):
            part = codes[row : row + 1, 256 * block : 256 * (block + 1)]
            raw += make.encode_tq2_0(part, np.array([scale(row, block)]))
    return codes.shape, make.TQ2_0, raw


def test_scales_that_differ_within_a_row_are_refused_with_the_row(tmp_path: Path, truth: Model) -> None:
    """Group scales (Bonsai's kind) have no place in a matrix with one scale a row."""
    name = "blk.0.ffn_down.weight"
    tensor = scaled_blocks(truth, lambda row, block: 0.5 + 0.25 * (row == 37 and block == 1))
    data = rebuilt(truth, make.TQ2_0, lambda t: t.update({name: tensor}))
    with pytest.raises(HaloError, match=r"row 37 has 2 scales"):
        list(opened(tmp_path, data).stream.layers())


def test_scales_that_differ_from_row_to_row_are_rows_scales(tmp_path: Path, truth: Model) -> None:
    tensor = scaled_blocks(truth, lambda row, _: 0.5 + row / 1024)
    data = rebuilt(truth, make.TQ2_0, lambda t: t.update({"blk.0.ffn_down.weight": tensor}))
    down = next(iter(opened(tmp_path, data).stream.layers())).down
    assert np.array_equal(down.scales, 0.5 + np.arange(256, dtype=np.float32) / 1024)


def test_a_block_of_zeros_has_no_scale_to_agree_about(tmp_path: Path, truth: Model) -> None:
    """llama-quantize writes the scale 0 into a block without a weight; that is no second scale."""
    tensor = scaled_blocks(truth, lambda row, block: 0.0 if block == 0 or row == 5 else 0.5)
    data = rebuilt(truth, make.TQ2_0, lambda t: t.update({"blk.0.ffn_down.weight": tensor}))
    down = next(iter(opened(tmp_path, data).stream.layers())).down
    codes = unpack_codes(down)
    assert down.scales.tolist() == [0.5] * 256
    assert (codes[:, :256] == 1).all() and (codes[5] == 1).all()
    assert np.array_equal(codes[6, 256:], unpack_codes(truth.layers[0].down)[6, 256:])


def with_bytes(name: str, place: int, raw: bytes) -> Callable[[dict[str, Any]], Any]:
    def edit(tensors: dict[str, Any]) -> None:
        shape, kind, data = tensors[name]
        at = place % len(data)
        tensors[name] = shape, kind, data[:at] + raw + data[at + len(raw) :]

    return edit


Q = "blk.1.attn_q.weight"
DAMAGED: dict[str, tuple[int, Callable[[dict[str, Any]], Any], str]] = {
    "code 3 in I2_S": (make.I2_S, with_bytes(Q, 64 * 3, b"\xff"), "code 3 in row 3"),
    "code 3 in TQ2_0": (make.TQ2_0, with_bytes(Q, 66 * 9, b"\x03"), "code 3 in row 9"),
    "scale zero": (make.I2_S, with_bytes(Q, -32, bytes(4)), "above zero"),
    "scale NaN": (make.I2_S, with_bytes(Q, -32, struct.pack("<f", np.nan)), "above zero"),
    "scale negative": (make.TQ2_0, with_bytes(Q, 64, make.half(-1.0)), "below zero"),
    "scale infinite": (make.TQ1_0, with_bytes(Q, 52, make.half(np.inf)), "not finite"),
    "norm NaN": (make.I2_S, with_bytes("blk.0.ffn_norm.weight", 8, struct.pack("<f", np.nan)), "not finite"),
    "embedding infinite": (make.I2_S, with_bytes("token_embd.weight", 8, make.half(np.inf)), "not finite"),
    "weight NaN": (make.F16, with_bytes(Q, 8, make.half(np.nan)), "not finite"),
    "missing": (make.I2_S, lambda t: t.pop(Q), "1 tensors are missing, the first is blk.1.attn_q"),
    "bias": (make.I2_S, lambda t: t.update({"blk.0.attn_q.bias": ((4,), 0, bytes(16))}), "not of its model"),
    "shape": (make.I2_S, lambda t: t.update({Q: ((128, 512), 36, t[Q][2])}), "ask for"),
    "Q8_0 projection": (make.I2_S, lambda t: t.update({Q: ((256, 256), 8, bytes(2048 * 34))}), "not ternary"),
    "ternary embedding": (
        make.I2_S,
        lambda t: t.update({"token_embd.weight": ((272, 256), 35, bytes(272 * 66))}),
        "not of floats",
    ),
    "RoPE factors": (
        make.I2_S,
        lambda t: t.update({"rope_freqs.weight": ((32,), 0, struct.pack("<32f", *[2.0] * 32))}),
        "scales RoPE",
    ),
    "scale of zero beside": (
        make.I2_S,
        lambda t: t.update({"blk.0.attn_q.scale": ((1,), 0, bytes(4))}),
        "above zero",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_tensor_that_cannot_be_used_is_refused_by_name(tmp_path: Path, truth: Model, case: str) -> None:
    kind, edit, why = DAMAGED[case]
    with pytest.raises(HaloError, match=why):
        stream = opened(tmp_path, rebuilt(truth, kind, edit)).stream
        list(stream.embedding())
        list(stream.layers())


def test_a_scale_beside_a_matrix_multiplies(tmp_path: Path, truth: Model) -> None:
    """llama.cpp's bitnet may keep the digits at scale 1 and the scale in a tensor of its own."""
    data = rebuilt(
        truth,
        make.TQ2_0,
        lambda t: t.update({"blk.0.attn_q.scale": ((1,), 0, struct.pack("<f", 1.25))}),
    )
    q = next(iter(opened(tmp_path, data).stream.layers())).q
    assert np.array_equal(q.scales, truth.layers[0].q.scales * np.float32(1.25))


def test_an_output_that_is_the_embedding_is_no_head(tmp_path: Path, truth: Model) -> None:
    data = rebuilt(truth, make.I2_S, lambda t: t.update({"output.weight": t["token_embd.weight"]}))
    model = opened(tmp_path, data)
    assert model.stream.head is None and model.stream.config.tie_embeddings
    assert any("tied" in note for note in model.notes)


ACTIVATIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "2B-4T": ("bitnet-b1.58", {}, "relu2"),
    "2B-4T, old": ("bitnet-25", {"tokenizer__ggml__model": "llama"}, "relu2"),
    "1bitLLM": ("bitnet", {"tokenizer__ggml__model": "llama"}, "silu"),
    "said": ("bitnet", {"bitnet__hidden_activation": "relu2"}, "relu2"),
    "said against its kind": ("bitnet-b1.58", {"bitnet-b1__58__hidden_activation": "silu"}, "silu"),
}


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_the_activation_comes_from_evidence(tmp_path: Path, truth: Model, case: str) -> None:
    """SiLU in place of squared ReLU gives a perplexity of 100 in place of 17, and no error."""
    architecture, changes, wanted = ACTIVATIONS[case]
    model = opened(tmp_path, make.gguf_bytes(truth, make.I2_S, architecture, **changes))
    assert model.stream.config.activation == wanted
    assert any("activation is " + wanted in note for note in model.notes)


@pytest.mark.parametrize("architecture", ["bitnet", "bitnet-b1.58"])
def test_an_activation_that_nothing_says_is_asked_for(
    tmp_path: Path, truth: Model, architecture: str
) -> None:
    tokenizer = {"bitnet": "gpt2", "bitnet-b1.58": "llama"}[architecture]
    data = make.gguf_bytes(truth, make.I2_S, architecture, tokenizer__ggml__model=tokenizer)
    with pytest.raises(HaloError, match="does not say its activation") as caught:
        opened(tmp_path, data)
    assert "--activation" in caught.value.hint
    for given in ("relu2", "silu"):
        assert opened(tmp_path, data, activation=given).stream.config.activation == given


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general__architecture": "qwen3"}, "'qwen3'"),
    "none": ({"general__architecture": None}, "None"),
    "a part": ({"split__count": 3}, "one of several parts"),
    "parts, oddly": ({"split__count": [1, 2]}, "one of several parts"),
    "TriLM": ({"general__name": "TriLM_3.9B_Unpacked"}, "TriLM"),
    "Bonsai": ({"general__basename": "Ternary-Bonsai"}, "Bonsai"),
    "BitCPM4": ({"general__name": "BitCPM4 1B"}, "BitCPM4"),
    "Maple": ({"general__finetune": "maple-preview"}, "Maple"),
    "experts": ({"llama__expert_count": 8}, "expert_count"),
    "logit scale": ({"llama__logit_scale": 0.5}, "logit_scale"),
    "RoPE": ({"llama__rope__scaling__type": "yarn"}, "rope.scaling.type"),
    "RoPE factor": ({"llama__rope__scaling__factor": 4.0}, "rope.scaling.factor"),
    "window": ({"llama__attention__sliding_window": 512}, "sliding_window"),
    "heads": ({"llama__attention__head_count": 0}, "0 heads"),
    "head counts": ({"llama__attention__head_count_kv": [2, 2]}, "a list, no whole number"),
    "half of RoPE": ({"llama__rope__dimension_count": 64}, "rope.dimension_count is 64"),
    "no eps": ({"llama__attention__layer_norm_rms_epsilon": None}, "no usable number"),
    "text for a size": ({"llama__embedding_length": "256"}, "no whole number"),
    "layers": ({"llama__block_count": 3}, "tensors are missing"),
    "size": ({"llama__feed_forward_length": 768}, "ask for"),
    "activation": ({"llama__hidden_activation": "gelu"}, "neither relu2 nor silu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_model_is_refused_with_the_reason(tmp_path: Path, llama: Model, case: str) -> None:
    changes, why = REFUSED[case]
    with pytest.raises(HaloError, match=why):
        opened(tmp_path, make.gguf_bytes(llama, make.TQ2_0, "llama", **changes))


@pytest.mark.parametrize(
    ("kind", "name"), [(12, "Q4_K"), (38, "TL1"), (39, "TL2"), (42, "Bonsai"), (135, "IQ2_BN"), (999, "999")]
)
def test_a_type_that_is_not_read_is_refused_by_name(
    tmp_path: Path, truth: Model, kind: int, name: str
) -> None:
    data = rebuilt(truth, make.I2_S, lambda t: t.update({Q: ((256, 256), kind, bytes(65536))}))
    with pytest.raises(HaloError, match=name):
        opened(tmp_path, data)


def plain(tensors: dict[str, Any] | None = None, **metadata: Any) -> bytes:
    return make.container(metadata, tensors if tensors is not None else {"a": ((2, 4), 0, bytes(32))})


def patched(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


A = make.text("a") + struct.pack("<IQQ", 2, 4, 2)
ARRAY = struct.pack("<IIQ", 9, 5, 2)
PLACE = A + struct.pack("<IQ", 0, 0)
PAIR = {"ab": ((16,), 0, bytes(64)), "cd": ((16,), 0, bytes(64))}
LONG = struct.pack("<Q", 1 << 62)
CONTAINERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "fewer than its header"),
    "magic": (b"GGML" + plain()[4:], "first bytes"),
    "version 1": (plain()[:4] + struct.pack("<I", 1) + plain()[8:], "version 1"),
    "big-endian": (plain()[:4] + struct.pack(">I", 3) + plain()[8:], "big-endian"),
    "tensors": (plain()[:8] + LONG + plain()[16:], "tensors and"),
    "keys": (plain()[:16] + LONG + plain()[24:], "keys"),
    "key twice": (plain(ab=1, cd=2).replace(make.text("cd"), make.text("ab")), "key ab is given twice"),
    "empty key": (plain(**{"": 1}), "empty or not printable"),
    "long key": (patched(plain(abc=1), make.text("abc"), LONG + b"abc"), "bytes long"),
    "kind": (patched(plain(abc=1), b"abc\x04", b"abc\x0d"), "type 13"),
    "nested array": (patched(plain(abc=[1, 2]), ARRAY, struct.pack("<IIQ", 9, 9, 2)), "type 9"),
    "long array": (patched(plain(abc=[1, 2]), ARRAY, ARRAY[:8] + LONG), "inside abc"),
    "long list of texts": (patched(plain(abc=[1, 2]), ARRAY, struct.pack("<II", 9, 8) + LONG), "texts"),
    "long text": (patched(plain(abc="xyz"), make.text("xyz"), LONG + b"xyz"), "bytes long"),
    "alignment 0": (plain(**{"general.alignment": 0}), "alignment"),
    "alignment 24": (plain(**{"general.alignment": 24}), "alignment"),
    "alignment a text": (plain(**{"general.alignment": "32"}), "alignment"),
    "no dimensions": (patched(plain(), A, make.text("a") + bytes(20)), "0 dimensions"),
    "five dimensions": (plain({"a": ((1,) * 5, 0, bytes(4))}), "5 dimensions"),
    "size 0": (plain({"a": ((0, 4), 0, b"")}), "cannot be"),
    "overflow": (plain({"a": ((1 << 63, 4), 0, b"")}), "cannot be"),
    "huge": (plain({"a": ((1 << 39, 1 << 39, 1 << 39), 0, b"")}), "ends at byte"),
    "row of part of a block": (plain({"a": ((2, 128), 35, bytes(66))}), "cannot be"),
    "name twice": (plain(PAIR).replace(make.text("cd"), make.text("ab")), "tensor ab is given twice"),
    "name too long": (plain({"a" * 65: ((4,), 0, bytes(16))}), "bytes long"),
    "name no text": (plain(PAIR).replace(b"ab", b"\xff\xfe"), "no text"),
    "misaligned": (patched(plain(), PLACE, A + struct.pack("<IQ", 0, 4)), "aligned"),
    "out of the file": (patched(plain(), PLACE, A + struct.pack("<IQ", 0, 1 << 50)), "ends"),
    "cut": (plain()[:-1], "ends at byte"),
    "overlap": (
        patched(plain(PAIR), struct.pack("<QIQ", 16, 0, 64), struct.pack("<QIQ", 16, 0, 32)),
        "cd lies over ab",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTAINERS)
def test_a_container_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    data, why = CONTAINERS[case]
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(HaloError, match=why):
        read_gguf(tmp_path / "m.gguf")


def test_a_folder_or_nothing_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(HaloError):
            read_gguf(path)


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    data = plain(name="x", numbers=[1, 2, 3], texts=[b"ab", b"c"], flag=True, eps=0.5)
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    read_gguf(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(HaloError):
            read_gguf(path)


def test_random_damage_is_refused_or_read_but_never_anything_else(tmp_path: Path, truth: Model) -> None:
    """A parser must not raise what the command line would show as a traceback, nor ask for much memory."""
    good = make.gguf_bytes(truth, make.TQ2_0)
    head = good.index(b"token_embd.weight") + 3000
    rng = random.Random(11)
    path = tmp_path / "m.gguf"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300):
        data = bytearray(good if rng.random() < 0.7 else good[: rng.randrange(len(good))])
        for _ in range(rng.randint(1, 4)):
            if data:
                place = rng.randrange(min(len(data), rng.choice([32, 400, head, len(good)])))
                data[place] = rng.choice([0, 1, 3, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        path.write_bytes(data)
        try:
            model = open_gguf(path)
            gguf_vocabulary(model.file, model.stream.config.vocab_size)
            for _ in model.stream.embedding():
                pass
            for _ in model.stream.layers():
                pass
        except HaloError:
            continue
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 << 10, f"{grown} KiB for files of {len(good)} bytes"


def test_the_tokenizer_comes_over(tmp_path: Path, truth: Model) -> None:
    file = opened(tmp_path, make.gguf_bytes(truth, make.I2_S)).file
    assert gguf_vocabulary(file, 272) == (make.vocabulary(), [])


def test_a_file_without_types_and_pre_tokeniser_is_the_official_one(tmp_path: Path, truth: Model) -> None:
    """BitNet-b1.58-2B-4T's own file names no pre-tokeniser; its special tokens are written <|...|>."""
    changes = {"tokenizer__ggml__pre": None, "tokenizer__ggml__token_type": None}
    metadata = make.tokenizer_metadata(replace(make.vocabulary(), tokens=make.vocabulary().tokens[:264]))
    changes |= {"tokenizer__ggml__tokens": metadata["tokenizer.ggml.tokens"]}
    file = opened(tmp_path, make.gguf_bytes(truth, make.I2_S, **changes)).file
    found, notes = gguf_vocabulary(file, 264)
    assert found.special == [261, 262, 263] and found.tokens == make.vocabulary().tokens[:264]
    assert len(notes) == 1 and "pre-tokeniser" in notes[0]


def other(name: str, value: Any) -> dict[str, Any]:
    return {f"tokenizer__ggml__{name}": value}


TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "SentencePiece": (other("model", "llama"), "SentencePiece"),
    "none": (other("model", None), "there is none"),
    "pattern": (other("pre", "qwen2"), "qwen2, not Llama-3"),
    "tokens": (other("tokens", [b"a"]), "1 tokens, and the model 272"),
    "no tokens": (other("tokens", 5), "no list"),
    "types": (other("token_type", [1, 1]), "not one for each"),
    "byte tokens": (other("token_type", [6] * 272), "type 6, as in SentencePiece"),
    "added text": (other("token_type", [4] * 272), "ordinary text"),
    "merges": (other("merges", [b"t h", b"zz y"]), "merge 1 names"),
    "no merges": (other("merges", None), "no list"),
    "ranks": (other("merges", [b"th e", b"t h"]), "before one of lesser id"),
    "bos": (other("bos_token_id", None), "does not say its bos"),
    "eos": (other("eos_token_id", 7), "no special token"),
    "eos beyond": (other("eos_token_id", 4000000000), "does not say its eos"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_another_tokenizer_is_refused_and_one_asked_for(tmp_path: Path, truth: Model, case: str) -> None:
    changes, why = TOKENIZERS[case]
    file = opened(tmp_path, make.gguf_bytes(truth, make.I2_S, **changes), activation="relu2").file
    with pytest.raises(HaloError, match=why) as caught:
        gguf_vocabulary(file, 272)
    assert "--tokenizer" in caught.value.hint
