"""A vocabulary is given to tiktoken only where it provably encodes as its own library does.

HALO_TEST_TOKENIZER may name Llama-3's tokenizer.json, or one of its kind.
"""

from __future__ import annotations

import json
import os
import random
from itertools import pairwise, product
from pathlib import Path

import pytest

from engine.formats.htok import BYTE_OF, LETTER_OF, Vocabulary
from engine.formats.merges import difference
from engine.tokenizer import Tokenizer

SLOW = os.environ.get("HALO_TEST_SLOW") == "1"
LARGE = os.environ.get("HALO_TEST_TOKENIZER")
BYTES = [bytes([value]) for value in range(256)]
WORDS = ["".join(letters) for length in range(1, 8) for letters in product("ab", repeat=length)]

Merges = list[tuple[int, int, int]]


def random_vocabulary(rng: random.Random) -> tuple[list[bytes], Merges]:
    """Tokens of a and b in any order, with some or all of the pairs that make them, in about their order."""
    made = {rng.choice(WORDS).encode()[: rng.randint(2, 5)] for _ in range(rng.randint(2, 9))}
    tokens = [*BYTES, *rng.sample(sorted(t for t in made if len(t) > 1), sum(len(t) > 1 for t in made))]
    ids = {token: index for index, token in enumerate(tokens)}
    merges = [
        (ids[token[:at]], ids[token[at:]], index)
        for token, index in ids.items()
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    ]
    if rng.random() < 0.3:
        merges = [merge for merge in merges if rng.random() < 0.8]
    if rng.random() < 0.3 and len(merges) > 1:
        at = rng.randrange(len(merges) - 1)
        merges[at], merges[at + 1] = merges[at + 1], merges[at]
    return tokens, merges


def by_the_merges(word: str, tokens: list[bytes], merges: Merges, ignore_merges: bool) -> list[int]:
    """Byte-pair encoding as the library does it: the pair that is listed first, the leftmost of equals."""
    if ignore_merges and word.encode() in tokens:
        return [tokens.index(word.encode())]
    ranks = {(left, right): (rank, merged) for rank, (left, right, merged) in enumerate(merges)}
    ids = list(word.encode())
    while found := [(ranks[pair][0], at) for at, pair in enumerate(pairwise(ids)) if pair in ranks]:
        at = min(found)[1]
        ids[at : at + 2] = [ranks[ids[at], ids[at + 1]][1]]
    return ids


def by_tiktoken(word: str, tokens: list[bytes]) -> list[int]:
    """tiktoken's rule: a whole word first, then any two tokens that make a third, the least id first."""
    ids = {token: index for index, token in enumerate(tokens)}
    parts = [word[at : at + 1].encode() for at in range(len(word))]
    if word.encode() in ids:
        return [ids[word.encode()]]
    while found := [(ids[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ids]:
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ids[part] for part in parts]


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_where_no_difference_is_found_there_is_none(ignore_merges: bool) -> None:
    """Every word of up to seven letters, in thousands of vocabularies, most of them odd ones."""
    rng = random.Random(60)
    alike = refused = 0
    for _ in range(5000 if SLOW else 250):
        tokens, merges = random_vocabulary(rng)
        if difference(tokens, (), merges, ignore_merges=ignore_merges):
            refused += 1
            continue
        alike += 1
        for word in WORDS:
            wanted = by_the_merges(word, tokens, merges, ignore_merges)
            assert by_tiktoken(word, tokens) == wanted, (word, tokens[256:], merges)
    assert min(alike, refused) > 3


def test_the_rules_above_are_those_of_the_programs() -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="Hugging Face tokenizers is not installed")
    rng = random.Random(61)
    for _ in range(100):
        tokens, merges = random_vocabulary(rng)
        names = ["".join(LETTER_OF[value] for value in token) for token in tokens]
        whole = rng.random() < 0.5
        theirs = tokenizers.models.BPE(
            {name: index for index, name in enumerate(names)},
            [(names[left], names[right]) for left, right, _ in merges],
            ignore_merges=whole,
        )
        for word in rng.sample(WORDS, 40):
            assert [token.id for token in theirs.tokenize(word)] == by_the_merges(word, tokens, merges, whole)
        in_order = [merged for _, _, merged in merges]
        if difference(tokens, (), merges, ignore_merges=whole) or in_order != sorted(in_order):
            continue
        ours = Tokenizer(Vocabulary([*tokens, b"<s>"], merges, len(tokens), len(tokens), [len(tokens)]))
        for word in WORDS[::7]:
            assert ours.encode(word) == by_tiktoken(word, tokens)


def test_tokens_that_are_only_whole_words_are_no_difference_where_those_are_looked_up() -> None:
    """Llama-3 has hundreds of tokens that its merges never come to: "abab" here, for "ba" is joined first."""
    tokens = [*BYTES, b"ba", b"ab", b"abab"]
    merges = [(98, 97, 256), (97, 98, 257), (257, 257, 258)]
    assert difference(tokens, (), merges, ignore_merges=True) == ""
    assert "never come to token 258" in difference(tokens, (), merges, ignore_merges=False)


def test_a_token_of_less_rank_than_its_parts_is_no_difference() -> None:
    """Llama-3 has ninety: a join makes two neighbours whose bytes are a token of lesser id."""
    tokens = [*BYTES, b"abc", b"bc"]
    assert difference(tokens, (), [(97, 257, 256), (98, 99, 257)], ignore_merges=False) == ""
    assert "do not list the parts" in difference(tokens, (), [(98, 99, 257)], ignore_merges=True)


def test_long_tokens_do_not_take_an_hour() -> None:
    tokens = [*BYTES, *(b"a" * length for length in range(2, 800))]
    assert "longer than" in difference(tokens, (), [], ignore_merges=True)


def test_llama_3_is_left_to_tiktoken() -> None:
    if not LARGE:
        pytest.skip("HALO_TEST_TOKENIZER names no large tokenizer.json")
    data = json.loads(Path(LARGE).read_text("utf-8"))
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    tokens = [b""] * (max(vocab.values()) + 1)
    for text, index in vocab.items():
        tokens[index] = bytes(BYTE_OF[letter] for letter in text)
    pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in merges)
    listed = [(vocab[left], vocab[right], vocab[left + right]) for left, right in pairs]
    assert difference(tokens, (), listed, ignore_merges=True) == ""
