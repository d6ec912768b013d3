"""The trainer: the record in docs/demo-model.md can be made again, and nothing held out is learned.

What needs PyTorch or the tokenizers library is left out where they are absent, as in the test environment.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from engine.formats.h1b import pack_codes, read_h1b, unpack_codes, write_h1b
from engine.model import Model, Ternary
from engine.reference import quantize
from engine.train import data, export

ROOT = Path(__file__).parents[2]
TINY = dict(
    hidden=64, layers=2, heads=2, kv_heads=1, ffn=96, vocabulary=300, context=32, theta=10000.0, eps=1e-5
)


# --- what it learns from -------------------------------------------------------------------------------


def test_documents_are_parted_and_empty_ones_left_out() -> None:
    text = "One.\n\nStill one.\n<|endoftext|>\n\n<|endoftext|>\nTwo.\n<|endoftext|>"
    assert data.split(text) == ["One.\n\nStill one.", "Two."]
    assert data.split(" \n") == []


def test_an_answer_keeps_its_lines_and_its_own_marks() -> None:
    text = "Q: How do I list with ls?\nA: ls -a\nA: no\n<|endoftext|>\nQ: What?\nA: B"
    assert data.pairs(text) == [("How do I list with ls?", "ls -a\nA: no"), ("What?", "B")]


def test_the_command_of_a_question() -> None:
    assert data.command_of("What does the command git-log do?") == "git-log"
    assert data.command_of("How do I pack files with care with tar?") == "tar"


@pytest.mark.parametrize("seed", range(40))
def test_a_paraphrase_asks_the_same_and_only_a_common_command_goes_unnamed(seed: int) -> None:
    rng = random.Random(seed)
    for name in ("tar", "rare-tool"):
        what = data.paraphrase(f"What does the command {name} do?", rng)
        assert name in what and what.endswith("?")
        how = data.paraphrase(f"How do I unpack a file with {name}?", rng)
        assert "unpack a file" in how
        assert name in how or name == "tar"
    assert data.paraphrase("Who wrote it?", rng) == "Who wrote it?"


def corpus(stories: int = 5, questions: int = 60) -> data.Corpus:
    texts = [f"Story {i}: a hare ran." for i in range(stories)]
    asked = [(f"How do I do job {i} with tool{i}?", f"tool{i} --job {i}") for i in range(questions)]
    asked.append(("What does the command tar do?", "Packs files."))
    return data.Corpus(["A book."], texts, asked, ["Another."], [], [])


def test_every_answer_stays_with_its_command_in_the_talks() -> None:
    answers = {answer: data.command_of(question) for question, answer in corpus().pairs}
    about = dict(data.ABOUT)
    talks = data.dialogue_text(corpus(), random.Random(3))
    turns = [turn for talk in talks for turn in talk]
    for question, answer in turns:
        if answer in answers and answer != "Packs files.":
            assert answers[answer] in question
        else:
            assert answer == "Packs files." or question in about or question in data.STORY_REQUESTS
    assert {answer for _, answer in turns} >= set(answers) | set(corpus().stories)
    assert sum(answer == "Packs files." for _, answer in turns) == 4  # a common command, four times
    assert all(1 <= len(talk) <= 3 for talk in talks)


def test_talks_without_stories_ask_for_none() -> None:
    """Each story once a pass was 63 times in the record; it learned them by heart."""
    talks = data.dialogue_text(corpus(), random.Random(3), stories=False)
    turns = [turn for talk in talks for turn in talk]
    assert not {answer for _, answer in turns} & set(corpus().stories)
    assert {answer for _, answer in turns} >= {answer for _, answer in corpus().pairs}


def test_the_talks_of_a_seed_are_always_the_same() -> None:
    """The record names a seed: another order would be another model."""
    first, again, other = (data.dialogue_text(corpus(), random.Random(seed)) for seed in (7, 7, 8))
    assert first == again != other
    digest = hashlib.sha256(json.dumps(first).encode()).hexdigest()
    assert digest[:16] == "ce430fa5cb1a181c"  # made by the program that trained the bundled model


def test_held_out_is_apart_from_training_and_both_keep_the_order() -> None:
    items = [f"item {i}" for i in range(100)]
    kept, held = data.hold_out(items, 30, seed=1)
    assert len(held) == 30 and set(kept).isdisjoint(held) and set(kept) | set(held) == set(items)
    assert kept == sorted(kept, key=items.index) and held == sorted(held, key=items.index)
    assert data.hold_out(items, 30, seed=1) == (kept, held) != data.hold_out(items, 30, seed=2)


def write_corpus(folder: Path, **texts: str) -> None:
    for name in data.FILES:
        (folder / name).write_bytes(lzma.compress(texts[name.split("_")[0]].encode()))


def made_up_corpus(folder: Path, count: int = 560) -> None:
    mark = "\n<|endoftext|>\n"
    write_corpus(
        folder,
        gutenberg=mark.join(f"Book {i}. The sea was calm." for i in range(count)),
        ccby=mark.join(f"Story {i}." for i in range(40)),
        tldr=mark.join(f"Q: How do I do {i} with tool{i}?\nA: tool{i}" for i in range(600)),
    )


def test_load_holds_out_what_the_record_says(tmp_path: Path) -> None:
    made_up_corpus(tmp_path)
    loaded = data.load(tmp_path)
    parts: list[tuple[list[Any], list[Any], int]] = [
        (loaded.books, loaded.held_books, 12),
        (loaded.stories, loaded.held_stories, 30),
        (loaded.pairs, loaded.held_pairs, 500),
    ]
    for kept, held, count in parts:
        assert len(held) == count and set(kept).isdisjoint(held)
    assert loaded.held_books[0].startswith("Book 45.")
    raw = (tmp_path / data.FILES[0]).read_bytes()
    assert loaded.sha256[data.FILES[0]] == hashlib.sha256(raw).hexdigest()


def test_a_book_that_stands_twice_is_never_held_out() -> None:
    """Held out and yet learned from under another title, it would flatter the model."""
    rng = random.Random(0)
    books = ["".join(rng.choices("abcdefgh ", k=400)) for _ in range(80)]
    books[45] = books[3]
    held = data.choose_held_books(books)
    assert held and 45 not in held and 52 in held


@pytest.mark.parametrize("broken", [b"", b"not xz at all", lzma.compress(b"\xff\xfe\xff")])
def test_a_broken_data_file_is_an_error_and_not_a_smaller_corpus(tmp_path: Path, broken: bytes) -> None:
    made_up_corpus(tmp_path)
    (tmp_path / data.FILES[1]).write_bytes(broken)
    with pytest.raises((lzma.LZMAError, EOFError, UnicodeDecodeError)):
        data.load(tmp_path)


def test_too_few_books_are_an_error(tmp_path: Path) -> None:
    made_up_corpus(tmp_path, count=300)
    with pytest.raises(IndexError):
        data.load(tmp_path)


def test_data_and_export_need_neither_torch_nor_tokenizers() -> None:
    """The bundle is made, and these tests run, where neither is installed."""
    code = "import sys; sys.modules.update(torch=None, tokenizers=None)\nimport engine.train.export"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- from the export to .h1b ---------------------------------------------------------------------------


def digits(codes: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    padded = np.pad(codes.reshape(-1), (0, -codes.size % 5)).reshape(-1, 5).astype(np.int64)
    return (padded @ np.array([1, 3, 9, 27, 81])).astype(np.uint8)


def write_export(folder: Path, seed: int = 0) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """A random export of shape TINY, as the trainer writes it; (codes by name, embedding bits)."""
    rng = np.random.default_rng(seed)
    rows = {"q": 64, "k": 32, "v": 32, "o": 64, "gate": 96, "up": 96, "down": 64}
    arrays: dict[str, Any] = {"final_norm": rng.normal(1, 0.1, 64).astype(np.float32)}
    codes: dict[str, Any] = {}
    for i in range(TINY["layers"]):
        for norm in ("input_norm", "post_attn_norm", "attn_sub_norm", "ffn_sub_norm"):
            size = 96 if norm == "ffn_sub_norm" else 64
            arrays[f"{i}.{norm}"] = rng.normal(1, 0.1, size).astype(np.float32)
        for name, count in rows.items():
            codes[f"{i}.{name}"] = rng.integers(0, 3, (count, 96 if name == "down" else 64), dtype=np.uint8)
            arrays[f"{i}.{name}"] = digits(codes[f"{i}.{name}"])
            arrays[f"{i}.{name}.scale"] = np.float32(rng.uniform(0.01, 0.1))
    bits = (rng.normal(0, 1, (300, 64)).astype(np.float32).view(np.uint32) >> 19 << 3).astype(np.uint16)
    np.save(folder / "embedding.npy", bits)
    np.savez(folder / "weights.npz", shape=json.dumps(TINY), **arrays)
    return codes | arrays_of_norms(arrays), bits


def arrays_of_norms(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arrays.items() if "norm" in name or "scale" in name}


def test_an_export_comes_back_whole_from_the_h1b(tmp_path: Path) -> None:
    """A weight that changed on the way would make another model than the one that was measured."""
    wanted, bits = write_export(tmp_path)
    write_h1b(tmp_path / "model.h1b", export.build_model(tmp_path))
    model = read_h1b(tmp_path / "model.h1b")
    assert (model.config.hidden_size, model.config.num_kv_heads, model.config.max_seq_len) == (64, 1, 32)
    assert np.array_equal(model.embedding.view(np.uint32), bits.astype(np.uint32) << 16)
    assert np.array_equal(model.final_norm, wanted["final_norm"])
    for i, layer in enumerate(model.layers):
        assert np.array_equal(layer.ffn_sub_norm, wanted[f"{i}.ffn_sub_norm"])
        assert np.array_equal(layer.input_norm, wanted[f"{i}.input_norm"])
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            matrix = getattr(layer, name)
            assert np.array_equal(unpack_codes(matrix), wanted[f"{i}.{name}"])
            assert (matrix.scales == wanted[f"{i}.{name}.scale"]).all()


@pytest.mark.parametrize("missing", ["0.q", "1.down.scale", "final_norm", "shape"])
def test_an_export_that_lacks_a_tensor_is_an_error(tmp_path: Path, missing: str) -> None:
    write_export(tmp_path)
    arrays = dict(np.load(tmp_path / "weights.npz"))
    del arrays[missing]
    np.savez(tmp_path / "weights.npz", **arrays)
    with pytest.raises(KeyError):
        export.build_model(tmp_path)


def test_an_export_cut_short_is_an_error(tmp_path: Path) -> None:
    write_export(tmp_path)
    arrays = dict(np.load(tmp_path / "weights.npz"))
    arrays["0.q"] = arrays["0.q"][:-3]
    np.savez(tmp_path / "weights.npz", **arrays)
    with pytest.raises(ValueError, match="reshape"):
        export.build_model(tmp_path)


def tokenizer_json(path: Path, merges: list[Any]) -> None:
    vocabulary = {"<|endoftext|>": 0, "<|eot_id|>": 1, "a": 2, "Ġ": 3, "Ã": 4, "Ġa": 5}
    path.write_text(json.dumps({"model": {"vocab": vocabulary, "merges": merges}}))


@pytest.mark.parametrize("merges", [["Ġ a"], [["Ġ", "a"]]])
def test_both_forms_of_a_tokenizer_json_give_real_bytes(tmp_path: Path, merges: list[Any]) -> None:
    tokenizer_json(tmp_path / "t.json", merges)
    vocabulary = export.build_vocabulary(tmp_path / "t.json")
    assert vocabulary.tokens == [b"<|endoftext|>", b"<|eot_id|>", b"a", b" ", b"\xc3", b" a"]
    assert vocabulary.merges == [(3, 2, 5)] and vocabulary.special == [0, 1]


def test_the_bundled_embedding_has_five_significant_bits(tmp_path: Path) -> None:
    """It is what the .xz is small by, and what makes it exact in bf16."""
    packed = (ROOT / "engine/models/demo/model.h1b.xz").read_bytes()
    (tmp_path / "model.h1b").write_bytes(lzma.decompress(packed))
    bits = np.ascontiguousarray(read_h1b(tmp_path / "model.h1b").embedding).view(np.uint32)
    assert not (bits & np.uint32((1 << 19) - 1)).any()


# --- with PyTorch --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    pytest.importorskip("tokenizers", reason="the training environment has it")
    module: ModuleType = pytest.importorskip("torch", reason="the training environment has it")
    return module


def test_five_bit_values_are_exact_in_bf16_and_near(torch: ModuleType) -> None:
    from engine.train.model import five_bits

    torch.manual_seed(0)
    x = torch.cat([torch.randn(4096), torch.tensor([0.0, -0.0, 1.0, -1.5, 33.0, 1e-30])])
    y = five_bits(x)
    assert torch.equal(y.to(torch.bfloat16).float(), y)
    assert ((y - x).abs() <= x.abs() / 32).all()
    assert torch.equal(five_bits(y), y)
    assert float(five_bits(torch.tensor([33.0]))) == 34.0  # half away from zero


def test_a_projection_is_the_oracles_but_for_bf16_of_the_exact_sum(torch: ModuleType) -> None:
    """Otherwise the engine would run another model than the one that was trained."""
    from engine.train.model import Ternary as Projection
    from engine.train.snapshot import pack_digits

    torch.manual_seed(1)
    layer, x = Projection(160, [48, 31]), torch.randn(7, 160) * 3
    for weight, got in zip(layer.weights, layer(x), strict=True):
        packed, scale = pack_digits(weight.detach())
        codes = export._digits(packed, *weight.shape)
        q, s = quantize(x.numpy())
        sums = torch.from_numpy(q @ (codes.astype(np.float32) - 1).T)
        exact = sums.numpy() * scale / s[:, None]
        rounded = sums.to(torch.bfloat16).float().numpy() * scale / s[:, None]
        np.testing.assert_allclose(got.detach().numpy(), rounded, rtol=5e-7)
        np.testing.assert_allclose(got.detach().numpy(), exact, rtol=2**-8)


def trainer(folder: Path, resume: Path | None = None, steps: int = 12, recipe: str = "record") -> Any:
    """A tiny run on random tokens that are already in its cache."""
    from engine.train.recipe import RECIPES
    from engine.train.train import Options, Trainer

    cache, rng = folder / "cache", np.random.default_rng(5)
    if not cache.exists():
        cache.mkdir()
        for name in ("books", "stories", "talks", "held_books", "held_stories", "held_talks"):
            np.save(cache / f"{name}.npy", rng.integers(2, 300, 500, dtype=np.uint16))
        np.save(cache / "paragraphs.npy", np.array([1, 100, 250], dtype=np.uint32))
        (cache / "counts.json").write_text(json.dumps({"story_passes": RECIPES[recipe].story_passes}))
    shape = {k: TINY[k] for k in ("hidden", "layers", "heads", "kv_heads", "ffn", "vocabulary", "context")}
    options = Options(
        folder,
        folder,
        cache,
        folder,
        steps,
        tokens=128,
        optimiser="adamw",
        recipe=recipe,
        resume=resume,
        shape=shape,
        device="cpu",
    )
    return Trainer.start(options)


def short_long_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe `long` with windows of 16 and, in the last five steps of 12, 32 tokens."""
    from engine.train import recipe

    short = dataclasses.replace(recipe.RECIPES["long"], windows=((0.0, 16), (0.6, 32)))
    monkeypatch.setitem(recipe.RECIPES, "long", short)


@pytest.mark.parametrize("recipe", ["record", "long"])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    torch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    short_long_recipe(monkeypatch)
    whole = trainer(tmp_path, recipe=recipe)
    whole.run()
    half = trainer(tmp_path, recipe=recipe)
    for _ in range(5):
        half.train_step()
    half.save()
    rest = trainer(tmp_path, resume=tmp_path, recipe=recipe)
    assert (rest.step, rest.steps) == (5, 12)
    rest.run()
    losses = [float(loss) for loss in half.losses + rest.losses]
    assert losses == [float(loss) for loss in whole.losses]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, rest.model.state_dict()[name]), name


def test_a_compact_snapshot_keeps_the_weights_to_a_byte_and_warms_up(
    torch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.train import snapshot

    monkeypatch.setattr(snapshot, "COMPACT_PART", 10_000)  # so that there are several files
    run = trainer(tmp_path)
    for _ in range(3):
        run.train_step()
    run.save()
    assert len(list((tmp_path / "compact").glob("compact-*.pt"))) > 2
    back = trainer(tmp_path, resume=tmp_path / "compact")
    assert (back.step, back.steps, back.warm_from) == (3, 12, 3)
    for name, tensor in run.model.state_dict().items():
        near = back.model.state_dict()[name]
        bound = tensor.abs().amax(-1, keepdim=True) / 127 * 0.51 if tensor.dim() == 2 else 0
        assert ((near - tensor).abs() <= bound).all(), name


def test_a_torn_state_is_an_error_and_not_a_fresh_start(torch: ModuleType, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train_step()
    run.save()
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:-2000])
    with pytest.raises(Exception, match=r"(?i)zip|archive|central directory"):
        trainer(tmp_path, resume=tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(
    torch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.train import train

    monkeypatch.setattr(train, "LOG_EVERY", 3)
    run = trainer(tmp_path)
    with torch.no_grad():
        run.model.final_norm.fill_(float("nan"))
    with pytest.raises(SystemExit, match="not finite"):
        run.run()


def test_the_exported_model_has_the_trainers_loss(torch: ModuleType, tmp_path: Path) -> None:
    """Export, .h1b, and back into the trainer's model: the same loss, so nothing was lost on the way."""
    from engine.train.evaluate import nats_a_token, rebuild
    from engine.train.snapshot import export_weights

    run = trainer(tmp_path)
    export_weights(tmp_path / "export", run.model)
    exported: Model = export.build_model(tmp_path / "export")
    ours, tokens = nats_a_token(run.model, run.streams["held_books"], "cpu")
    again, _ = nats_a_token(rebuild(exported), run.streams["held_books"], "cpu")
    assert tokens == 480 and again == pytest.approx(ours, abs=2e-3)


def test_the_rebuilt_masters_have_the_exported_scale_and_signs(torch: ModuleType) -> None:
    from engine.train.evaluate import _masters
    from engine.train.snapshot import pack_digits

    codes = np.random.default_rng(2).integers(0, 3, (33, 40), dtype=np.uint8)
    matrix = Ternary(pack_codes(codes), np.full(33, 0.0371, np.float32), 40)
    packed, scale = pack_digits(torch.from_numpy(_masters(matrix)))
    assert np.array_equal(export._digits(packed, 33, 40), codes)
    assert float(scale) == pytest.approx(0.0371, rel=1e-6)


# --- recipes and batches -------------------------------------------------------------------------------


def test_the_record_is_the_recipe_that_the_page_tells(torch: ModuleType) -> None:
    """docs/demo-model.md has these numbers, and says that the bundled model can be trained again by them."""
    from engine.train.recipe import RECIPES

    record, long = RECIPES["record"], RECIPES["long"]
    assert (record.shape.context, record.shape.theta, record.dropout, record.book_bos) == (1024, 1e4, 0, 0)
    assert record.window(0.0) == record.window(0.99) == 1024
    assert record.shares_at(0.349) == (0.88, 0.02, 0.10)
    assert record.shares_at(0.351) == (0.84, 0.03, 0.13)
    assert [long.window(p) for p in (0.0, 0.79, 0.8, 1.0)] == [1024, 1024, 4096, 4096]
    for recipe in RECIPES.values():
        assert max(length for _, length in recipe.windows) <= recipe.shape.context
        assert all(sum(parts) == pytest.approx(1) for _, parts in recipe.shares)


@pytest.mark.parametrize("places", [1, 7, 1000, 44_704_133, (1 << 32) - 1])
def test_spread_windows_stay_in_the_text_and_reach_all_of_it_equally(torch: ModuleType, places: int) -> None:
    from engine.train.streams import spread

    for first in (0, 12_345, 1 << 40):
        got = spread(first, 20_000, places)
        assert got.min() >= 0 and got.max() < places
        tenths = np.histogram(got, bins=10, range=(0, places))[0]
        if places >= 1000:
            assert abs(tenths - 2000).max() <= 10  # anywhere at random: 100 and more
    joined = np.concatenate([spread(0, 7, places), spread(7, 13, places)])
    assert np.array_equal(joined, spread(0, 20, places))


def batches(**changes: Any) -> Any:
    from engine.train.recipe import RECIPES
    from engine.train.streams import Batches

    streams = {
        "books": np.arange(10, 5010, dtype=np.uint16),
        "stories": np.arange(10_000, 10_500, dtype=np.uint16),
        "talks": np.arange(20_000, 20_500, dtype=np.uint16),
        "paragraphs": np.array([1, 40, 900, 4000], dtype=np.uint32),
    }
    return Batches(streams, 640, "cpu", dataclasses.replace(RECIPES["record"], **changes))


@pytest.mark.parametrize("even", [False, True])
def test_a_batch_is_of_the_shares_and_each_target_is_the_next_token(torch: ModuleType, even: bool) -> None:
    drawn = np.zeros(3)
    for step in range(50):
        x, y, counts = batches(spread=even)(step, 20, (0.5, 0.2, 0.3))
        assert x.shape == y.shape == (32, 20) and sum(counts) == 32
        assert torch.equal(x[:, 1:], y[:, :-1]) and torch.equal(y - x, torch.ones_like(x))
        assert [int((x[:, 0] // 10_000 == i).sum()) for i in range(3)] == counts
        drawn += counts
    assert np.abs(drawn / drawn.sum() - [0.5, 0.2, 0.3]).max() < 0.05


def test_opened_windows_begin_with_bos_and_then_a_paragraph(torch: ModuleType) -> None:
    """The record saw BOS before talks almost alone, so after BOS it expects a talk."""
    opened = 0
    for step in range(20):
        x, y, counts = batches(book_bos=0.5)(step, 20, (0.9, 0.05, 0.05))
        assert torch.equal(x[:, 1:], y[:, :-1])
        with_bos = x[:, 0] == data.BOS
        assert not with_bos[counts[0] :].any()
        assert set((x[with_bos, 1] - 10).tolist()) <= {1, 40, 900, 4000}
        opened += int(with_bos.sum()) / counts[0] / 20
    assert 0.35 < opened < 0.65


@pytest.mark.parametrize("even", [False, True])
def test_a_window_longer_than_its_text_is_an_error(torch: ModuleType, even: bool) -> None:
    with pytest.raises(ValueError, match="500 tokens is too short for windows of 600"):
        batches(spread=even)(0, 600, (0.0, 0.5, 0.5))


def test_paragraphs_begin_after_an_empty_line_and_after_bos(torch: ModuleType) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from engine.train.streams import paragraph_starts

    vocabulary = {"<|endoftext|>": 0, "a": 1, "\u010a": 2, ".\u010a\u010a": 3, "b\u010a": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    stream = np.array([0, 1, 2, 1, 3, 1, 4, 1], dtype=np.uint16)
    assert paragraph_starts(stream, tokenizer).tolist() == [1, 5]


def test_a_cache_of_another_recipe_is_refused(torch: ModuleType, tmp_path: Path) -> None:
    trainer(tmp_path)
    with pytest.raises(SystemExit, match="another recipe"):
        trainer(tmp_path, recipe="long")


def test_held_out_losses_are_without_dropout_and_by_place_have_the_same_mean(
    torch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.train.evaluate import nats_a_token, nats_by_place

    short_long_recipe(monkeypatch)
    run = trainer(tmp_path, recipe="long")
    run.train_step()
    held = run.streams["held_books"]
    places, windows = nats_by_place(run.model, held, "cpu", 32)
    assert (len(places), windows) == (32, 15)
    assert nats_a_token(run.model, held, "cpu", 32) == (pytest.approx(places.mean()), 480)
    assert np.array_equal(places, nats_by_place(run.model, held, "cpu", 32)[0])
    assert run.model.training
    x, y, _ = run.batches(1, 32, (1.0, 0.0, 0.0))
    assert not torch.equal(run.model(x, y), run.model(x, y))  # and in training it is there


def test_a_run_logs_the_loss_of_each_text_and_where_a_long_context_helps(
    torch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.train import train

    short_long_recipe(monkeypatch)
    monkeypatch.setattr(train, "LOG_EVERY", 6)
    run = trainer(tmp_path, recipe="long")
    run.run()
    run.log_places()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows[:2]] == [6, 12]
    for row in rows[:2]:
        low, high = min(row["by_stream"].values()), max(row["by_stream"].values())
        assert "books" in row["by_stream"] and low - 1e-3 <= row["loss"] <= high + 1e-3
    assert rows[2]["event"] == "by-place" and list(rows[2]["nats_up_to"]) == ["32"]


def test_a_run_of_so_many_seconds_plans_its_steps_and_trains_on_nothing_meanwhile(
    torch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To time the long windows it takes gradients; were they kept, the next step would be of two batches."""
    from engine.train import train

    short_long_recipe(monkeypatch)
    monkeypatch.setattr(train, "PLAN_FROM", 1)
    monkeypatch.setattr(train, "PLAN_AT", 2)
    run = trainer(tmp_path, steps=0, recipe="long")
    run.options = dataclasses.replace(run.options, seconds=1e9)
    for done in (1, 2):
        run.train_step()
        before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
        run.plan(done)
    assert run.steps > 1000 and run.step == len(run.losses) == len(run.by_stream) == 2
    assert all(p.grad is None for p in run.model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())
