"""A checkpoint's tokenizer and ours give the same ids and texts; what halo cannot encode alike is refused.

HALO_TEST_WIKITEXT names WikiText-2's test text (plain or .xz), HALO_TEST_TOKENIZER a large tokenizer.json of
Llama-3's kind; HALO_TEST_SLOW=1 runs every line and 100,000 fuzzed texts instead of a sample.
"""

from __future__ import annotations

import json
import lzma
import os
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import HaloError
from engine.formats.hf_tokenizer import read_tokenizer
from engine.formats.tokenizer_files import tokenizer_files, vocabulary_files
from engine.tokenizer import Tokenizer, load_tokenizer
from engine.tokenizer_facts import TokenizerFacts
from engine.tokenizer_library import JsonTokenizer
from tests.engine.chat_templates import BITNET, CHATML, INST
from tests.engine.tokenizer_fixtures import (
    KINDS,
    LOOK_ALIKES,
    TEXT,
    byte_level,
    falcon,
    fuzzed,
    llama2,
    size_of,
    write_checkpoint,
)

SLOW = os.environ.get("HALO_TEST_SLOW") == "1"
WIKITEXT = os.environ.get("HALO_TEST_WIKITEXT")
LARGE = os.environ.get("HALO_TEST_TOKENIZER")


def config(size: int, bos: int | None = None, eos: int | None = None):
    """The part of HfConfig that the tokenizer's import needs."""
    return SimpleNamespace(model=SimpleNamespace(vocab_size=size), bos=bos, eos=eos)


def opened(folder: Path, data: dict, *, padding: int = 3, size: int | None = None, **said: object):
    """The tokenizer as it comes out of a model directory that was imported from a checkpoint."""
    write_checkpoint(folder / "from", data, **(said or {"bos_token": first(data), "eos_token": last(data)}))
    files = tokenizer_files(folder / "from", config(size or size_of(data) + padding))
    made = folder / "made"
    made.mkdir()
    names = files.write(made)
    facts = {"tokenizer": files.facts.to_json(), "chat_template": files.chat_template}
    (made / "model.json").write_text(json.dumps(facts))
    return load_tokenizer(made), names, files


def first(data: dict) -> str:
    return data["added_tokens"][0 if len(data["added_tokens"]) > 3 else 1]["content"]


def last(data: dict) -> str:
    return data["added_tokens"][1 if len(data["added_tokens"]) > 3 else 2]["content"]


def library(data: dict):
    """Hugging Face's own; text that looks special is text to it too."""
    tokenizers = pytest.importorskip("tokenizers", reason="Hugging Face tokenizers is not installed")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
    theirs.encode_special_tokens = True
    return theirs


def same_both_ways(ours, theirs, texts) -> int:
    """Compare ids, and the text of the ids, whole and by a stream; returns how many texts there were."""
    count = 0
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        back = ours.decode(ids)
        assert back == theirs.decode(ids), repr(text)
        # SentencePiece's newer form puts no space before one, and takes one away all the same.
        assert back == text or (ours.adds_space and text == " " + back), repr(text)
        stream = ours.decode_stream()
        assert "".join([stream.feed(i) for i in ids]) + stream.finish() == back, repr(text)
        assert not any(map(ours.is_special, ids)), repr(text)
        count += 1
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_hugging_faces_on_fuzzed_text(tmp_path, kind):
    """Otherwise the model reads other tokens than it was trained on, and answers fluent nonsense."""
    data = KINDS[kind]()
    theirs = library(data)
    ours, names, _ = opened(tmp_path, data)
    assert names[0] == ("tokenizer.htok" if kind == "llama3" else "tokenizer.json")
    rng = random.Random(20)
    assert same_both_ways(ours, theirs, (fuzzed(rng) for _ in range(100_000 if SLOW else 1500)))
    assert same_both_ways(ours, theirs, (*LOOK_ALIKES, TEXT[:20000], "", "a" * 5000, "\n" * 5000))


@pytest.mark.parametrize("kind", ["llama3", "falcon", "llama2"])
def test_ids_are_hugging_faces_on_every_line_of_wikitext(tmp_path, kind):
    if not WIKITEXT:
        pytest.skip("HALO_TEST_WIKITEXT does not name WikiText-2's test text")
    raw = Path(WIKITEXT).read_bytes()
    text = (lzma.decompress(raw) if WIKITEXT.endswith(".xz") else raw).decode()
    lines = text.splitlines(keepends=True)
    data = json.loads(Path(LARGE).read_text("utf-8")) if LARGE and kind == "llama3" else KINDS[kind]()
    theirs = library(data)
    ours, _, _ = opened(tmp_path, data)
    assert same_both_ways(ours, theirs, lines if SLOW else lines[::40])
    if SLOW:
        assert same_both_ways(ours, theirs, [text])


def test_ids_are_hugging_faces_with_a_large_vocabulary(tmp_path):
    if not LARGE:
        pytest.skip("HALO_TEST_TOKENIZER names no large tokenizer.json")
    data = json.loads(Path(LARGE).read_text("utf-8"))
    theirs = library(data)
    ours, names, _ = opened(tmp_path, data, padding=0)
    assert names[0] == "tokenizer.htok"
    rng = random.Random(21)
    assert same_both_ways(ours, theirs, (fuzzed(rng) for _ in range(100_000 if SLOW else 1000)))


@pytest.mark.parametrize("kind", ["llama3", "falcon"])
def test_any_ids_are_decoded_as_hugging_face_decodes_them(tmp_path, kind):
    """Ids that a model makes are often half a character; each side says U+FFFD as often."""
    data = KINDS[kind]()
    theirs = library(data)
    ours, _, _ = opened(tmp_path, data, padding=0)
    rng = random.Random(22)
    for _ in range(20_000 if SLOW else 1500):
        ids = [rng.randrange(ours.size) for _ in range(rng.randint(0, 12))]
        stream = ours.decode_stream()
        pieces = "".join([stream.feed(i) for i in ids]) + stream.finish()
        assert ours.decode(ids) == pieces == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("metaspace", [False, True])
def test_what_follows_a_special_token_begins_as_hugging_face_has_it(tmp_path, metaspace):
    """The older form puts a space before each stretch of text, the newer before the first alone."""
    data = llama2(metaspace=metaspace)
    theirs = library(data)
    theirs.encode_special_tokens = False
    ours, _, _ = opened(tmp_path, data)
    for text in ("the text", "</s>the text", "the</s>text</s> text"):
        ids: list[int] = []
        for i, part in enumerate(text.split("</s>")):
            ids += [2] * bool(i)
            ids += ours.encode(part, first=not i) if part else []
        assert ids == theirs.encode(text, add_special_tokens=False).ids


def test_a_special_token_that_is_a_word_of_the_vocabulary_is_spelled_out(tmp_path):
    """With ignore_merges the library looks words up first: a user's word must not end the turn."""
    data = falcon()
    data["model"]["ignore_merges"] = True
    data["model"]["vocab"]["end"] = size_of(data)
    data["added_tokens"].append(
        {**data["added_tokens"][0], "id": data["model"]["vocab"]["end"], "content": "end"}
    )
    library(data)
    ours, _, _ = opened(tmp_path, data)
    ids = ours.encode("end of")
    assert ours.special["end"] not in ids and ours.decode(ids) == "end of"


def test_two_special_tokens_of_one_text_are_both_spelled_out(tmp_path):
    """Found by fuzzing: the texts of special tokens are no key to their ids."""
    data = falcon()
    data["model"]["ignore_merges"] = True
    data["model"]["vocab"]["end"] = size_of(data)
    for number in (data["model"]["vocab"]["end"], data["model"]["vocab"]["end"] + 1):
        data["added_tokens"].append({**data["added_tokens"][0], "id": number, "content": "end"})
    library(data)
    ours, _, _ = opened(tmp_path, data)
    ids = ours.encode("end of")
    assert not any(map(ours.is_special, ids)) and ours.decode(ids) == "end of"


@pytest.mark.parametrize("make", [falcon, llama2])
def test_an_added_token_in_the_place_of_a_byte_is_refused(tmp_path, make):
    """Found by fuzzing: text with that byte would come out as the token's name."""
    data = make()
    taken = data["model"]["vocab"]["<0x82>" if make is llama2 else "\u0142"]
    data["added_tokens"].append({**data["added_tokens"][0], "id": taken, "content": "<gone>"})
    with pytest.raises(HaloError, match="1 of the 256 bytes have no token"):
        opened(tmp_path, data)


@pytest.mark.parametrize("library_name", ["tokenizers", "sentencepiece"])
def test_without_its_library_a_tokenizer_is_one_sentence_and_a_command(tmp_path, monkeypatch, library_name):
    monkeypatch.setitem(sys.modules, library_name, None)
    folder = tmp_path
    if library_name == "tokenizers":
        write_checkpoint(folder, falcon(), bos_token="<|end_of_text|>", eos_token="<|end_of_text|>")
    else:
        (folder / "tokenizer.model").write_bytes(b"\n")
    with pytest.raises(HaloError, match=f"library {library_name},? which .*is not installed") as info:
        tokenizer_files(folder, config(1000, 1, 2))
    assert info.value.hint == f"{sys.executable} -m pip install --no-deps {library_name}"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # as in an installed box, without pip
    with pytest.raises(HaloError) as info:
        tokenizer_files(folder, config(1000, 1, 2))
    wanted = f"python3 -m pip --python {sys.executable} install --no-deps {library_name}"
    assert info.value.hint == wanted


def test_a_padded_vocabulary_keeps_the_models_size(tmp_path):
    """1bitLLM's models have two rows more than their tokenizer: ids that make no text."""
    library(falcon())
    ours, _, files = opened(tmp_path, falcon(), padding=2)
    assert ours.size == size_of(falcon()) + 2 == files.facts.size
    assert ours.decode([ours.size - 1]) == ""


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    library(falcon())
    with pytest.raises(HaloError, match="outside the model's"):
        opened(tmp_path, falcon(), padding=-1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d["model"].update(type="WordPiece"), "WordPiece, not BPE"),
        (lambda d: d["model"].update(vocab=[]), "no vocabulary"),
        (lambda d: d["model"]["vocab"].pop("a"), "1 of the 256 bytes have no token"),
        (lambda d: d.update(decoder=None), "neither byte-level nor falls back"),
        (lambda d: d["added_tokens"].append({"id": 3}), "no id or no text"),
        (lambda d: d["added_tokens"][0].update(special=None), "neither special nor not"),
        (lambda d: d["added_tokens"][0].update(id=-1), "no id or no text"),
        (lambda d: d["model"]["vocab"].update({"\ud800": 3}), "no Unicode text"),
        (lambda d: d["model"]["merges"].append(["zz", "zz"]), "its library says"),
        (lambda d: d["pre_tokenizer"]["pretokenizers"].append({"type": "None"}), "its library says"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_used_is_refused(tmp_path, change, why):
    library(falcon())
    data = falcon()
    change(data)
    with pytest.raises(HaloError, match=why) as info:
        opened(tmp_path, data, size=700, bos_token="<|end_of_text|>", eos_token="<|end_of_text|>")
    assert info.value.hint


def test_merges_that_the_library_would_not_join_are_not_left_to_tiktoken(tmp_path):
    """tiktoken joins any two tokens that make a third: here it would make "abc" of a and bc."""
    data = byte_level()
    size = size_of(data)
    data["model"]["vocab"] |= {"qx": size, "xz": size + 1, "qxz": size + 2}
    data["model"]["merges"] += [["x", "z"], ["q", "x"], ["qx", "z"]]
    data["model"]["vocab"] |= {"xz": size, "qx": size + 1}
    write_checkpoint(tmp_path / "bare", data, bos_token=first(data), eos_token=last(data))
    with pytest.raises(HaloError, match="do not list the parts"):
        read_tokenizer(tmp_path / "bare", config(size + 3))
    theirs = library(data)
    ours, names, _ = opened(tmp_path, data)
    assert names == ["tokenizer.json"]
    assert ours.encode("qxz") == theirs.encode("qxz", add_special_tokens=False).ids


def test_bos_eos_and_what_ends_an_answer_come_from_the_files_beside_it(tmp_path):
    library(falcon())
    source = write_checkpoint(
        tmp_path, falcon(), eos_token={"content": "<|end_of_text|>"}, chat_template=CHATML
    )
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 10**9, "x"]}))
    files = tokenizer_files(source, config(size_of(falcon())))
    special = files.tokenizer.special
    assert files.facts.eos == files.facts.bos == special["<|end_of_text|>"]
    assert set(files.facts.stops) == {
        5, special["<|end_of_text|>"], special["<|im_end|>"], special["<|eot_id|>"]
    }  # fmt: skip
    assert files.facts.opening == () and files.chat_template == "jinja"
    assert set(files.write(tmp_path)) == {"tokenizer.json", "chat_template.jinja"}


def test_nothing_that_ends_a_text_is_an_error(tmp_path):
    library(falcon())
    with pytest.raises(HaloError, match="ends a text"):
        tokenizer_files(write_checkpoint(tmp_path, falcon()), config(size_of(falcon())))


def test_llama2_opens_a_text_with_bos(tmp_path):
    library(llama2())
    ours, _, _ = opened(tmp_path, llama2(), bos_token="<s>", eos_token="</s>", chat_template=INST)
    assert ours.opening == [1] and ours.names == {"bos_token": "<s>", "eos_token": "</s>"}
    assert ours.chat_template == INST


def test_a_template_that_is_bitnets_needs_no_jinja(tmp_path):
    data = byte_level()
    _, names, files = opened(
        tmp_path, data, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", chat_template=BITNET
    )
    assert files.chat_template == "bitnet" and names == ["tokenizer.htok"]
    assert files.facts.opening == (files.facts.bos,)


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ x | nosuch }}", "x" * 300_000, "\U000f0000", "a\ud800"]
)
def test_a_broken_template_is_left_out_with_a_note(tmp_path, template):
    """The model still runs; only its own form of a conversation is missing, and the person is told."""
    _, names, files = opened(
        tmp_path, byte_level(), bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>",
        chat_template=template,
    )  # fmt: skip
    assert names == ["tokenizer.htok"] and "template" in files.notes[0]


def test_the_template_named_default_is_the_one_of_several(tmp_path):
    several = [{"name": "rag", "template": "x"}, {"name": "default", "template": CHATML}]
    files = tokenizer_files(
        write_checkpoint(
            tmp_path, byte_level(), bos_token="<|begin_of_text|>", eos_token="<|im_end|>",
            chat_template=several,
        ),
        config(size_of(byte_level())),
    )  # fmt: skip
    assert files.template == CHATML


def test_a_vocabulary_of_another_origin_gets_the_same_files(tmp_path):
    vocabulary = read_tokenizer(
        write_checkpoint(tmp_path, byte_level(), bos_token="<|im_end|>", eos_token="<|im_end|>"),
        config(size_of(byte_level())),
    )
    files = vocabulary_files(vocabulary, CHATML)
    assert files.write(tmp_path) == ["tokenizer.htok", "chat_template.jinja"]
    assert files.facts.opening == (vocabulary.bos,)


@pytest.mark.parametrize(
    "facts",
    [
        3, {}, {"size": 0}, {"size": 2**40}, {"size": 9, "bos": 1, "eos": 2},
        {"size": 9, "bos": 9, "eos": 2, "opening": [], "stops": []},
        {"size": 9, "bos": 1, "eos": True, "opening": [], "stops": []},
        {"size": 9, "bos": 1, "eos": 2, "opening": [0] * 99, "stops": []},
        {"size": 9, "bos": 1, "eos": 2, "opening": [], "stops": [], "names": {"a": 1}},
    ],
)  # fmt: skip
def test_a_damaged_description_is_refused(tmp_path, facts):
    (tmp_path / "model.json").write_text(json.dumps({"tokenizer": facts}))
    with pytest.raises(HaloError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_the_description_of_another_tokenizer_is_refused(tmp_path):
    ours, _, files = opened(tmp_path, byte_level())
    facts = files.facts.to_json() | {"size": ours.size - 1}
    (tmp_path / "made" / "model.json").write_text(json.dumps({"tokenizer": facts}))
    with pytest.raises(HaloError, match="the one beside it has"):
        load_tokenizer(tmp_path / "made")


@pytest.fixture(scope="module")
def falcon_text() -> str:
    return json.dumps(falcon())


@settings(max_examples=2000 if SLOW else 150, deadline=None)
@given(st.data())
def test_random_damage_to_a_tokenizer_json_is_refused_or_read(tmp_path_factory, falcon_text, data):
    """Nothing that the command line would show as a traceback, nor a panic of the library."""
    raw = bytearray(falcon_text.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1) | st.integers(len(raw) - 1500, len(raw) - 1))
        match data.draw(st.sampled_from(("byte", "cut", "digit"))):
            case "byte":
                raw[at] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[at : at + data.draw(st.integers(1, 40))]
            case _:
                raw[at:at] = b"%d" % data.draw(st.integers(0, 2**33))
    path = tmp_path_factory.getbasetemp() / "tokenizer.json"
    path.write_bytes(raw)
    try:
        tokenizer = JsonTokenizer(path, TokenizerFacts(size_of(falcon()), 1, 2, (), ()))
        ids = tokenizer.encode("some text, <|eot_id|> 123\n")
    except HaloError as error:
        assert error.hint
    else:
        assert all(0 <= i < tokenizer.size and not tokenizer.is_special(i) for i in ids)


@settings(max_examples=1000 if SLOW else 60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "type",
                        "vocab",
                        "merges",
                        "id",
                        "content",
                        "special",
                        "pretokenizers",
                        "decoders",
                        "pattern",
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    ),
    st.sampled_from(["added_tokens", "model", "decoder", "pre_tokenizer", "normalizer", "post_processor"]),
)
def test_odd_values_in_a_tokenizer_json_are_refused_or_read(tmp_path_factory, value, key):
    """By the import, which sees every file first."""
    folder = tmp_path_factory.getbasetemp() / "odd"
    write_checkpoint(folder, byte_level() | {key: value}, bos_token="<|im_end|>", eos_token="<|im_end|>")
    try:
        files = tokenizer_files(folder, config(size_of(byte_level())))
    except HaloError as error:
        assert error.hint
    else:
        assert isinstance(files.tokenizer.encode("text"), list)


def test_the_tokenizer_of_a_directory_without_facts_is_its_htok(tmp_path):
    ours, _, _ = opened(tmp_path, byte_level())
    (tmp_path / "made" / "model.json").unlink()
    again = load_tokenizer(tmp_path / "made")
    assert isinstance(again, Tokenizer) and again.encode(TEXT) == ours.encode(TEXT)
    assert again.opening == [again.bos] and again.stops == {again.eos}
