"""`.htok`: both versions are told apart, and a tokenizer that contradicts itself is refused."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import HaloError
from engine.formats.htok import BYTE_OF, LETTER_OF, Vocabulary, read_htok, write_htok


def small(version: int = 2) -> Vocabulary:
    """Two specials, the 256 bytes, two merges, an unused id: the order of the demo model's tokenizer."""
    tokens = [b"<|endoftext|>", b"<|eot_id|>", *[bytes([value]) for value in range(256)], b"th", b"the", b""]
    first = {token: index for index, token in enumerate(tokens)}
    merges = [(first[b"t"], first[b"h"], first[b"th"]), (first[b"th"], first[b"e"], first[b"the"])]
    return Vocabulary(tokens, merges, 0, 0, [0, 1], version)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.htok"
    write_htok(path, small())
    return path


def test_the_byte_mapping_is_gpt2s() -> None:
    """From openai/gpt-2: the space is Ġ, the newline is Ċ, printable letters are themselves."""
    assert (LETTER_OF[0x20], LETTER_OF[0x0A], LETTER_OF[ord("a")]) == ("Ġ", "Ċ", "a")
    assert (LETTER_OF[0x00], LETTER_OF[0x7F], LETTER_OF[0xAD]) == ("Ā", "ġ", "Ń")
    assert len(BYTE_OF) == 256


@pytest.mark.parametrize("version", [1, 2])
def test_a_round_trip_gives_the_same_vocabulary_and_bytes(tmp_path: Path, version: int) -> None:
    """Version 1 does not list its specials; those written <|...|> are found again."""
    first, second = tmp_path / "a.htok", tmp_path / "b.htok"
    write_htok(first, small(), version)
    back = read_htok(first)
    assert back == small(version)
    write_htok(second, back, version)
    assert first.read_bytes() == second.read_bytes()


def test_version_one_starts_with_its_vocabulary_size(tmp_path: Path) -> None:
    write_htok(tmp_path / "a.htok", small(), 1)
    data = (tmp_path / "a.htok").read_bytes()
    assert data[:24] == b"HTOK" + struct.pack("<4I", 261, 2, 0, 0) + struct.pack("<H", 13) + b"<|"


def test_a_version_one_file_of_two_tokens_is_not_taken_for_version_two(tmp_path: Path) -> None:
    """Its vocabulary size is 2, which is also what a version word looks like."""
    path = tmp_path / "a.htok"
    write_htok(path, Vocabulary([b"a", b"b"], [], 0, 1, []), 1)
    assert read_htok(path).version == 1
    write_htok(path, Vocabulary([b"a", b"b"], [], 0, 1, []), 2)
    assert read_htok(path).version == 2


def test_llama3_in_version_one_has_its_last_256_ids_special(tmp_path: Path) -> None:
    tokens = [b"%d" % index for index in range(128256)]
    write_htok(tmp_path / "a.htok", Vocabulary(tokens, [], 128000, 128001, []), 1)
    assert read_htok(tmp_path / "a.htok").special == list(range(128000, 128256))


@given(st.lists(st.binary(min_size=1, max_size=8), min_size=1, max_size=30, unique=True))
def test_any_bytes_survive(tmp_path_factory: pytest.TempPathFactory, tokens: list[bytes]) -> None:
    """Tokens are bytes, and often no valid UTF-8."""
    path = tmp_path_factory.getbasetemp() / "any.htok"
    write_htok(path, Vocabulary(tokens, [], 0, len(tokens) - 1, []), 2)
    assert read_htok(path).tokens == tokens


@pytest.mark.parametrize("cut", [1, 2, 7, 100])
def test_a_cut_file_is_refused(written: Path, cut: int) -> None:
    written.write_bytes(written.read_bytes()[:-cut])
    with pytest.raises(HaloError, match="damaged"):
        read_htok(written)


def test_bytes_too_many_are_refused(written: Path) -> None:
    written.write_bytes(written.read_bytes() + b"\0")
    with pytest.raises(HaloError, match="too many"):
        read_htok(written)


def test_another_magic_is_refused(written: Path) -> None:
    written.write_bytes(b"HTOX" + written.read_bytes()[4:])
    with pytest.raises(HaloError, match=r"no \.htok"):
        read_htok(written)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(HaloError, match="cannot be read"):
        read_htok(tmp_path / "none.htok")


def test_a_size_full_of_noise_allocates_nothing(written: Path) -> None:
    written.write_bytes(b"HTOK" + struct.pack("<5I", 2, 2**32 - 1, 2**32 - 1, 0, 0))
    with pytest.raises(HaloError, match="4294967295 tokens"):
        read_htok(written)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"bos": 261}, "bos 261"),
        ({"eos": 999}, "eos 999"),
        ({"special": [0, 300]}, "special"),
        ({"special": [1, 1]}, "twice"),
        ({"merges": [(2, 3, 400)]}, "merge 0 names"),
        ({"merges": [(2, 3, 4)]}, "does not join"),
        ({"tokens": [b"a", b"a"], "merges": [], "special": []}, "occurs twice"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_neither_written_nor_read(
    written: Path, tmp_path: Path, change: dict[str, object], problem: str
) -> None:
    broken = replace(small(), **change)
    with pytest.raises(HaloError, match=problem):
        write_htok(tmp_path / "b.htok", broken)
    assert not (tmp_path / "b.htok").exists()


def test_ids_on_disk_are_checked(written: Path) -> None:
    """The writer refuses them too, so this changes the file: its bos, last special id, last merge."""
    good = written.read_bytes()
    for offset, problem in ((16, "bos"), (len(good) - 4, "special"), (len(good) - 16, "merge")):
        written.write_bytes(good[:offset] + struct.pack("<I", 5000) + good[offset + 4 :])
        with pytest.raises(HaloError, match=problem):
            read_htok(written)


def test_a_letter_outside_the_mapping_is_refused(written: Path) -> None:
    written.write_bytes(written.read_bytes().replace(b"<|eot_id|>", b"<|eot id|>"))
    with pytest.raises(HaloError, match="token 1 "):
        read_htok(written)


def test_random_damage_is_refused_or_read_but_never_anything_else(written: Path) -> None:
    """A parser must not raise anything that the command line would show as a traceback."""
    rng = random.Random(11)
    good = written.read_bytes()
    for _ in range(1500):
        data = bytearray(good[: rng.choice([len(good), rng.randrange(len(good))])])
        for _ in range(rng.randint(1, 4)):
            if data:
                data[rng.randrange(min(len(data), rng.choice([24, len(good)])))] = rng.randrange(256)
        written.write_bytes(data)
        try:
            vocabulary = read_htok(written)
        except HaloError:
            continue
        assert max([vocabulary.bos, vocabulary.eos, *vocabulary.special]) < len(vocabulary.tokens)
