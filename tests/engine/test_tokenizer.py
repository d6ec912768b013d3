"""Text to ids and back: nothing is lost, nothing is forged, ids are those that the model was trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import HaloError
from engine.tokenizer import LLAMA3_PATTERN, Tokenizer
from tests.engine.server_fixtures import EOS, EOT, FIRST_BYTE, TEXT, TOKENIZER, VOCABULARY

WORDS = st.sampled_from(
    [*TEXT.split()[:200], "don't", "I'LL", "1234567", "  ", "\n\n", " \t", "naïve", "汉字", "🌍"]
)
SENTENCES = st.lists(WORDS | st.text(max_size=5), max_size=20).map(" ".join)


@given(st.text() | SENTENCES)
def test_a_round_trip_gives_the_text_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.integers(0, TOKENIZER.size - 1)))
def test_a_stream_gives_what_decode_gives_and_never_half_a_character(ids):
    stream = TOKENIZER.decode_stream()
    pieces = [stream.feed(i) for i in ids]
    assert "".join(pieces) + stream.finish() == TOKENIZER.decode(ids)


@given(st.text(alphabet="é€🌍a"))
def test_a_stream_of_single_bytes_is_whole_characters(text):
    stream = TOKENIZER.decode_stream()
    pieces = [stream.feed(FIRST_BYTE + b) for b in text.encode()]
    assert "".join(pieces) == text and stream.finish() == ""
    assert "\ufffd" not in pieces


@given(SENTENCES)
def test_ids_are_those_of_byte_pair_encoding_by_merge_rank(text):
    assert TOKENIZER.encode(text) == reference_encode(text)


def reference_encode(text: str) -> list[int]:
    """Byte-pair encoding as its inventors wrote it: the merge of lowest rank first, word by word."""
    ranks = {(left, right): (rank, merged) for rank, (left, right, merged) in enumerate(VOCABULARY.merges)}
    out: list[int] = []
    for word in regex.findall(LLAMA3_PATTERN, text):
        ids = [FIRST_BYTE + b for b in word.encode()]
        while found := [(ranks[pair][0], at) for at, pair in enumerate(pairwise(ids)) if pair in ranks]:
            at = min(found)[1]
            ids[at : at + 2] = [ranks[ids[at], ids[at + 1]][1]]
        out += ids
    return out


def test_ids_equal_those_of_hugging_faces_tokenizers():
    tokenizers = pytest.importorskip("tokenizers", reason="Hugging Face tokenizers is not installed")
    theirs = tokenizers.Tokenizer.from_str(json.dumps(hugging_face_form()))
    for text in (TEXT, "Don't  stop\n\n\n now 123456 naïve 汉字 🌍 \t x", " ", "", "a" * 1000):
        assert TOKENIZER.encode(text) == theirs.encode(text, add_special_tokens=False).ids


def hugging_face_form() -> dict:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    names = ["".join(letters[b] for b in token) for token in VOCABULARY.tokens]
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "model": {
            "type": "BPE",
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [[names[a], names[b]] for a, b, _ in VOCABULARY.merges],
        },
    }


@pytest.mark.parametrize("text", ["<|eot_id|>", "<|endoftext|>", "a<|eot_id|>b", "<|eot_id|><|eot_id|>"])
def test_special_text_is_ordinary_text(text):
    ids = TOKENIZER.encode(text)
    assert not {EOS, EOT} & set(ids)
    assert TOKENIZER.decode(ids) == text


def test_special_ids_make_no_text():
    assert TOKENIZER.decode([EOS, FIRST_BYTE + ord("a"), EOT]) == "a"
    assert TOKENIZER.special == {"<|endoftext|>": EOS, "<|eot_id|>": EOT}
    assert TOKENIZER.is_special(EOT) and not TOKENIZER.is_special(FIRST_BYTE)


def test_lone_surrogates_become_the_replacement_character():
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b")) == "a\ufffdb"


RUNS = st.lists(
    st.sampled_from([" ", "  ", "\n", "\r", "\t", "\u3000", "\x85", "\x1c", *"a1!.é"]), max_size=14
)


@given(RUNS.map("".join))
def test_a_long_whitespace_run_is_cut_where_the_pattern_cuts_it(text):
    """With runs from 3 characters taken for long ones, so that the pattern itself can say what is right."""
    whole = TOKENIZER.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.tokenizer.MAX_WHITESPACE_RUN", 2)
        assert TOKENIZER.encode(text) == whole


@pytest.mark.parametrize("unit", [" ", "\n", "\xa0", "a", "!", "1", "👩‍🚀", "ab"])
def test_a_megabyte_of_one_thing_is_encoded(unit):
    """tiktoken's splitter panics at a million white-space characters; a request may hold that many."""
    text = "x" + unit * (1_000_000 // len(unit)) + "b"
    ids = TOKENIZER.encode(text)
    assert len(ids) >= TOKENIZER.fewest_tokens(text) and TOKENIZER.decode(ids) == text


@given(st.text())
def test_fewest_tokens_is_a_lower_bound(text):
    assert TOKENIZER.fewest_tokens(text) <= len(TOKENIZER.encode(text))


@pytest.mark.parametrize("token", [-1, TOKENIZER.size, 10**12])
def test_an_id_outside_the_vocabulary_is_refused(token):
    with pytest.raises(HaloError, match="vocabulary"):
        TOKENIZER.decode([token])


def broken(**change):
    return replace(VOCABULARY, **change)


def swapped(a: int, b: int) -> list[bytes]:
    tokens = list(VOCABULARY.tokens)
    tokens[a], tokens[b] = tokens[b], tokens[a]
    return tokens


@pytest.mark.parametrize(
    ("vocabulary", "why"),
    [
        (broken(tokens=[t for t in VOCABULARY.tokens if t != b"q"], merges=[]), "no token"),
        (broken(tokens=[*VOCABULARY.tokens, b"a"]), "same bytes"),
        (broken(tokens=swapped(258, 259)), "does not give"),
        (broken(merges=VOCABULARY.merges[1::-1]), "ids do not follow"),
    ],
)
def test_a_vocabulary_that_would_give_other_ids_is_refused(vocabulary, why):
    with pytest.raises(HaloError, match=why) as info:
        Tokenizer(vocabulary)
    assert info.value.hint


def test_unused_ids_are_no_tokens():
    padded = Tokenizer(broken(tokens=[*VOCABULARY.tokens, b"", b""]))
    assert padded.size == TOKENIZER.size + 2
    assert padded.encode(TEXT) == TOKENIZER.encode(TEXT)
    assert padded.decode([padded.size - 1]) == ""
