"""Import and export from end to end: every form of one model becomes the same directory, or none at all."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import HaloError
from engine.formats.codes import unpack_codes
from engine.formats.exporter import FORMATS, ExportOptions, export_model
from engine.formats.h1b import write_h1b
from engine.formats.hf import projection
from engine.formats.htok import read_htok, write_htok
from engine.formats.importer import import_model, in_memory, prepare_directory
from engine.formats.seal import check_open
from engine.formats.sources import open_source
from engine.formats.store import read_description, store_name, unpack
from engine.model import Model, ModelConfig
from engine.reference import Reference
from tests.engine import formats_fixtures as make
from tests.engine.test_hf import (
    CONFIG,
    INVERSE,
    OFFLINE,
    ONLINE,
    Tensors,
    brain,
    edited,
    save,
    tokenizer_json,
    wide,
)

NORMS = {
    "input_norm": "input_layernorm", "post_attn_norm": "post_attention_layernorm",
    "attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm",
}  # fmt: skip


def one_model() -> Model:
    """What .h1b version 1 can say too, which has no field for eps."""
    return make.random_model(replace(make.BITNET, rms_norm_eps=1e-5))


def checkpoint(folder: Path, model: Model, form: str, quantization: dict[str, Any] | None) -> Path:
    """A Hugging Face folder of the model: packed, dequantised or masters."""
    as_type = wide if form == "masters" else brain
    tensors: Tensors = {
        "model.embed_tokens.weight": brain(model.embedding),
        "model.norm.weight": brain(model.final_norm),
    }
    for index, layer in enumerate(model.layers):
        for norm, name in NORMS.items():
            tensors[f"model.layers.{index}.{name}.weight"] = brain(getattr(layer, norm))
        for part, _, _ in model.config.projections():
            matrix, name = getattr(layer, part), projection(index, part)
            codes, scale = unpack_codes(matrix), matrix.scales[0]
            if form == "packed":
                packed = sum(quarter << 2 * i for i, quarter in enumerate(np.split(codes, 4)))
                tensors[f"{name}.weight"] = "U8", np.asarray(packed, np.uint8)
                tensors[f"{name}.weight_scale"] = brain(np.array([scale]))
                continue
            digits = codes.astype(np.float32) - 1
            values = (
                digits * scale
                if form == "dequantised"
                else np.where(digits == 0, 0.25, 1.75 * digits) * scale
            )
            tensors[f"{name}.weight"] = as_type(values)
    folder.mkdir()
    sizes = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 272,
        "max_position_embeddings": 64,
    }  # fmt: skip
    config = CONFIG | sizes | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    save(folder / "model.safetensors", tensors)
    return folder


def gguf(path: Path, model: Model, kind: int, **changes: Any) -> Path:
    path.write_bytes(make.gguf_bytes(model, kind, **changes))
    return path


def h1b(path: Path, model: Model, version: int) -> Path:
    write_h1b(path, model, version)
    write_htok(path.with_suffix(".htok"), make.vocabulary())
    return path


@pytest.fixture(autouse=True, scope="module")
def few_golden_tokens() -> Iterator[None]:
    """Each import asks the oracle, which is slow; that it is asked is what counts here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.formats.importer.GOLDEN_TOKENS", 3)
        yield


SOURCES: dict[str, Callable[[Path, Model], Path]] = {
    "packed": lambda path, model: checkpoint(path / "m", model, "packed", OFFLINE),
    "dequantised bf16": lambda path, model: checkpoint(path / "m", model, "dequantised", ONLINE),
    "masters": lambda path, model: checkpoint(path / "m", model, "masters", None),
    "I2_S": lambda path, model: gguf(path / "m.gguf", model, make.I2_S),
    "TQ2_0": lambda path, model: gguf(path / "m.gguf", model, make.TQ2_0),
    "TQ1_0": lambda path, model: gguf(path / "m.gguf", model, make.TQ1_0),
    "GGUF F16": lambda path, model: gguf(path / "m.gguf", model, make.F16),
    "GGUF BF16": lambda path, model: gguf(path / "m.gguf", model, make.BF16),
    "h1b 1": lambda path, model: h1b(path / "m.h1b", model, 1),
    "h1b 2": lambda path, model: h1b(path / "m.h1b", model, 2),
    "h1b 4": lambda path, model: h1b(path / "m.h1b", model, 4),
}


@pytest.fixture(scope="module")
def model() -> Model:
    return one_model()


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory, model: Model) -> Path:
    """The model directory that every form must become."""
    folder = tmp_path_factory.mktemp("truth")
    import_model(h1b(folder / "m.h1b", model, 2), folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def logits(model: Model) -> np.ndarray[Any, Any]:
    oracle = Reference(model)
    return oracle.forward([262, 5, 9, 77, 258], oracle.new_cache())


@pytest.mark.parametrize("form", SOURCES)
def test_every_form_becomes_the_same_directory(
    tmp_path: Path, model: Model, truth: Path, logits: np.ndarray[Any, Any], form: str
) -> None:
    """Packing, scale direction, code maps, digits of zeros: one mistake anywhere is another model."""
    source = SOURCES[form](tmp_path, model)
    opened = open_source(source)
    assert make.same_layers(opened.stream.layers(), model.layers)
    oracle = Reference(in_memory(opened.stream))
    assert np.array_equal(oracle.forward([262, 5, 9, 77, 258], oracle.new_cache()), logits)
    report = import_model(source, tmp_path / "out", "m")
    for name in ("model.halo", "tokenizer.htok"):
        assert (tmp_path / "out" / name).read_bytes() == (truth / name).read_bytes()
    assert report.description["golden"] == read_description(truth)["golden"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(
        {"out", source.name} if source.is_dir() else {"out"}
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_export_and_import_again_change_nothing(tmp_path: Path, model: Model, truth: Path, kind: str) -> None:
    source = h1b(tmp_path / "m.h1b", model, 2)
    report = export_model(source, tmp_path / f"new.{kind}", kind)
    assert report.files[0].exists() and not any("rounded" in note for note in report.notes)
    import_model(report.files[0], tmp_path / "out", "m")
    assert (tmp_path / "out" / "model.halo").read_bytes() == (truth / "model.halo").read_bytes()
    assert read_htok(tmp_path / "out" / "tokenizer.htok") == make.vocabulary()


def test_a_round_trip_of_h1b_gives_the_same_bytes(tmp_path: Path, model: Model) -> None:
    source = h1b(tmp_path / "m.h1b", model, 2)
    for kind in ("h1b4", "i2_s", "tq2_0"):
        exported = export_model(source, tmp_path / f"a.{kind}", kind, ExportOptions(exact=True)).files[0]
        beside = tmp_path / "m.htok"
        back = export_model(exported, tmp_path / f"{kind}.h1b", "h1b2", tokenizer=beside).files
        assert back[0].read_bytes() == source.read_bytes()
        assert back[1].read_bytes() == beside.read_bytes()


def test_the_store_takes_what_was_imported_and_the_seal_holds(truth: Path, tmp_path: Path) -> None:
    description = read_description(truth)
    assert sorted(description["files"]) == ["model.halo", "tokenizer.htok"]
    assert unpack(truth, tmp_path / "store").name == store_name(description)
    check_open(truth)
    source = description["source"]
    assert source["format"] == "h1b" and sorted(source["files"]) == ["m.h1b", "m.htok"]
    assert all(len(facts["sha256"]) == 64 for facts in source["files"].values())


def test_progress_is_told_to_the_end(tmp_path: Path, model: Model) -> None:
    told: list[tuple[str, int, int]] = []
    import_model(
        gguf(tmp_path / "m.gguf", model, make.I2_S),
        tmp_path / "out",
        progress=lambda *each: told.append(each),
    )
    assert ("layers", 0, 2) in told and ("layers", 2, 2) in told and told[-1] == ("hashes", 1, 1)


def broken(path: Path, model: Model) -> Path:
    """A GGUF whose last matrix has the unused code."""
    tensors = make.tensors_of(model, make.I2_S)
    shape, kind, raw = tensors["blk.1.ffn_down.weight"]
    tensors["blk.1.ffn_down.weight"] = shape, kind, b"\xff" + raw[1:]
    metadata = make.metadata_of(model.config, "bitnet-25") | make.tokenizer_metadata(make.vocabulary())
    path.write_bytes(make.container(metadata, tensors))
    return path


def test_damage_in_the_last_matrix_leaves_nothing(tmp_path: Path, model: Model) -> None:
    source = broken(tmp_path / "m.gguf", model)
    with pytest.raises(HaloError, match="code 3"):
        import_model(source, tmp_path / "deep" / "out")
    for kind in FORMATS:
        with pytest.raises(HaloError, match="code 3"):
            export_model(source, tmp_path / "new", kind)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [source]


def test_what_exists_is_not_overwritten(tmp_path: Path, model: Model) -> None:
    source = h1b(tmp_path / "m.h1b", model, 2)
    (tmp_path / "out").mkdir()
    with pytest.raises(HaloError, match="exists already"):
        import_model(source, tmp_path / "out")
    for kind in FORMATS:
        with pytest.raises(HaloError, match="exists already"):
            export_model(source, source, kind)
    (tmp_path / "new.htok").write_text("mine")
    with pytest.raises(HaloError, match="exists already"):
        export_model(source, tmp_path / "new.h1b", "h1b4")
    assert (tmp_path / "new.htok").read_text() == "mine" and not (tmp_path / "new.h1b").exists()


@pytest.mark.parametrize("name", ["../x", ".hidden", "a/b", "a\nb"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, model: Model, name: str) -> None:
    with pytest.raises(HaloError, match="cannot be a model's name"):
        import_model(h1b(tmp_path / "m.h1b", model, 2), tmp_path / "out", name)


def test_a_tokenizer_may_be_given(tmp_path: Path, model: Model) -> None:
    """The file's own is of another kind, and the right one lies elsewhere: in a file, or in a folder."""
    source = gguf(tmp_path / "m.gguf", model, make.I2_S, **{"tokenizer__ggml__pre": "qwen2"})
    with pytest.raises(HaloError, match="qwen2") as caught:
        import_model(source, tmp_path / "out")
    assert "--tokenizer" in caught.value.hint
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    write_htok(tmp_path / "v.htok", make.vocabulary())
    for index, given in enumerate((folder, folder / "tokenizer.json", tmp_path / "v.htok")):
        import_model(source, tmp_path / f"out{index}", tokenizer=given)
        assert read_htok(tmp_path / f"out{index}" / "tokenizer.htok") == make.vocabulary()


def test_a_tokenizer_of_another_size_is_refused(tmp_path: Path, model: Model) -> None:
    """Ids beyond the embedding would read past it; ids short of it would never be said."""
    vocabulary = make.vocabulary(280)
    write_htok(tmp_path / "v.htok", vocabulary)
    source = h1b(tmp_path / "m.h1b", model, 2)
    with pytest.raises(HaloError, match="280 tokens, the model 272"):
        import_model(source, tmp_path / "out", tokenizer=tmp_path / "v.htok")
    with pytest.raises(HaloError, match="no tokenizer at"):
        import_model(source, tmp_path / "out", tokenizer=tmp_path)
    (tmp_path / "m.htok").unlink()
    with pytest.raises(HaloError, match="No tokenizer lies beside"):
        import_model(source, tmp_path / "out")


def test_what_is_no_model_is_one_sentence(tmp_path: Path, model: Model) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello there")
    (tmp_path / "short").write_bytes(b"GG")
    for name in ("none", "empty", "text", "short"):
        with pytest.raises(HaloError) as caught:
            import_model(tmp_path / name, tmp_path / "out")
        assert "config.json" in caught.value.hint
    two = tmp_path / "two"
    two.mkdir()
    gguf(two / "a.gguf", model, make.I2_S)
    shutil.copyfile(two / "a.gguf", two / "b.gguf")
    with pytest.raises(HaloError, match=r"several models: a\.gguf, b\.gguf"):
        import_model(two, tmp_path / "out")
    (two / "b.gguf").unlink()
    import_model(two, tmp_path / "out")


def test_an_activation_is_for_files_that_do_not_say_it(tmp_path: Path, model: Model) -> None:
    source = h1b(tmp_path / "m.h1b", model, 2)
    for path in (source, checkpoint(tmp_path / "hf", model, "packed", OFFLINE)):
        with pytest.raises(HaloError, match="activation"):
            import_model(path, tmp_path / "out", activation="silu")


def test_the_template_of_the_file_comes_over(tmp_path: Path, model: Model) -> None:
    source = gguf(tmp_path / "m.gguf", model, make.I2_S, tokenizer__chat_template="{{ messages[0].content }}")
    report = import_model(source, tmp_path / "out")
    assert report.description["chat_template"] == "jinja"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert "chat_template.jinja" in report.description["files"]
    check_open(tmp_path / "out")


def test_model_json_says_what_the_tokenizers_file_does_not(truth: Path) -> None:
    facts = read_description(truth)["tokenizer"]
    assert (facts["size"], facts["bos"], facts["eos"]) == (272, 262, 263)
    assert facts["opening"] == [262] and facts["stops"] == [261, 263]


def test_the_inverse_scale_of_a_packed_checkpoint(tmp_path: Path, model: Model) -> None:
    """linear_class bitlinear: the same file means scales of 1 / s."""
    folder = checkpoint(tmp_path / "hf", model, "packed", INVERSE)
    found = next(iter(open_source(folder).stream.layers())).q
    assert found.scales[0] == np.float32(1) / model.layers[0].q.scales[0]


def test_a_directory_is_prepared_anew_from_its_model_file(tmp_path: Path, truth: Path, model: Model) -> None:
    directory = tmp_path / "m"
    shutil.copytree(truth, directory)
    write_h1b(directory / "model.h1b", model)
    (directory / "model.halo").write_bytes(b"damaged")
    assert prepare_directory(directory) == directory / "model.halo"
    assert (directory / "model.halo").read_bytes() == (truth / "model.halo").read_bytes()
    check_open(directory)


def test_a_model_directory_is_exported_from_what_the_engine_runs(
    tmp_path: Path, truth: Path, model: Model
) -> None:
    """model.halo alone, as every import leaves it; and not when a byte of it is another."""
    export_model(truth, tmp_path / "new.h1b", "h1b2")
    assert (tmp_path / "new.h1b").read_bytes() == h1b(tmp_path / "m.h1b", model, 2).read_bytes()
    export_model(truth / "model.halo", tmp_path / "new.gguf", "i2_s")
    assert make.same_layers(open_source(tmp_path / "new.gguf").stream.layers(), model.layers)
    directory = tmp_path / "copy"
    shutil.copytree(truth, directory)
    data = bytearray((directory / "model.halo").read_bytes())
    data[len(data) // 2] ^= 1
    (directory / "model.halo").write_bytes(data)
    with pytest.raises(HaloError, match="damaged"):
        export_model(directory, tmp_path / "bad.gguf", "i2_s")
    assert not (tmp_path / "bad.gguf").exists()


def test_a_llama_goes_in_and_out(tmp_path: Path) -> None:
    """SiLU, no sub-norms, a head of its own, a head size of its own, a scale a row."""
    model = make.random_model(make.LLAMA, one_scale=False)
    source = tmp_path / "m.gguf"
    source.write_bytes(make.gguf_bytes(model, make.TQ2_0, "llama"))
    import_model(source, tmp_path / "out")
    assert make.same_model(model, open_source(tmp_path / "out").stream)
    export_model(tmp_path / "out", tmp_path / "again.gguf", "tq2_0")
    assert make.same_model(model, open_source(tmp_path / "again.gguf").stream)
    with pytest.raises(HaloError, match="cannot hold"):
        export_model(tmp_path / "out", tmp_path / "m.h1b", "h1b4")


def large_gguf(path: Path) -> Path:
    """An I2_S file of 100 MB: 340 million weights in 30 layers."""
    c = ModelConfig(1024, 2816, 30, 8, 2, 8192, 64, True, 500000.0, 1e-5)
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 3, (4, 2816 * 1024 // 4), dtype=np.uint8)
    packed = (digits[0] | digits[1] << 2 | digits[2] << 4 | digits[3] << 6).tobytes()
    tail = struct.pack("<f", 0.03) + bytes(28)
    ones = make.encode_floats(make.F32, np.ones(2816))
    tensors: dict[str, Any] = {
        "token_embd.weight": (
            (8192, 1024),
            make.F16,
            make.encode_floats(make.F16, rng.normal(0, 1, 1 << 23)),
        ),
        "output_norm.weight": ((1024,), make.F32, ones[:4096]),
    }
    for index in range(c.num_layers):
        for norm, name in make.NORMS.items():
            size = 2816 if norm == "ffn_sub_norm" else 1024
            tensors[f"blk.{index}.{name}.weight"] = (size,), make.F32, ones[: 4 * size]
        for part, rows, cols in c.projections():
            raw = packed[: rows * cols // 4] + tail
            tensors[f"blk.{index}.{make.NAMES[part]}.weight"] = (rows, cols), make.I2_S, raw
    vocabulary = make.tokenizer_metadata(make.vocabulary(8192))
    path.write_bytes(make.container(make.metadata_of(c, "bitnet-25") | vocabulary, tensors))
    return path


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("HALO_TEST_SLOW"), reason="takes a minute; HALO_TEST_SLOW=1 runs it")
@pytest.mark.parametrize("what", ["import", *FORMATS[1:]])
def test_memory_stays_small_for_a_large_model(tmp_path: Path, what: str) -> None:
    """A box imports models larger than its memory: here the kernel gives 100 MB beyond what Python has."""
    source = large_gguf(tmp_path / "m.gguf")
    code = (
        "import re, resource, sys\n"
        "from engine.formats.exporter import export_model\n"
        "from engine.formats.importer import import_model\n"
        "from pathlib import Path\n"
        "import engine.formats.tokenizer_files, engine.formats.gguf_export, tiktoken\n"
        "used = int(re.search(r'VmData:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "limit = (used << 10) + (100 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))\n"
        "source, out, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]\n"
        "import_model(source, out) if what == 'import' else export_model(source, out, what)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out"), what],
        capture_output=True, text=True, check=False,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_commands_say_what_they_did(
    tmp_path: Path, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    from provision.cli import main

    source = gguf(tmp_path / "m.gguf", model, make.TQ1_0)
    assert main(["model", "import", str(source), str(tmp_path / "out"), "--name", "mine"]) == 0
    said = capsys.readouterr().out
    assert "model.halo" in said and "TQ1_0" in said and "activation" in said and "next: halo generate" in said
    assert json.loads((tmp_path / "out" / "model.json").read_text())["name"] == "mine"
    assert main(["model", "export", str(source), str(tmp_path / "m.h1b"), "--format", "h1b4"]) == 0
    assert "m.htok" in capsys.readouterr().out
    assert main(["model", "export", str(source), str(tmp_path / "m.h1b"), "--format", "h1b4"]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    edited(tmp_path / "out" / "model.json", lambda data: data.update(name="other"))
    write_h1b(tmp_path / "out" / "model.h1b", model)
    assert main(["model", "prepare", str(tmp_path / "out")]) == 0
    check_open(tmp_path / "out")
