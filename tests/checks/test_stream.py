"""A stream from another machine may be anything: it must give facts or one clear error, and never lie."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checks.facts import Facts, parse
from checks.host import parse_os_release, parse_units, version_of
from checks.stream import State, read_stream
from engine.errors import HaloError
from tests.checks.boxes import BOXES, FIXTURES, plain, strix_halo


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=4000))
def test_any_bytes_give_facts_or_one_error(data: bytes) -> None:
    for candidate in (data, b"halo-facts 1 65536\n" + data + b"\n@end\n"):
        try:
            assert isinstance(parse(candidate), Facts)
        except HaloError as error:
            assert error.hint
            assert error.exit_code == 3


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(BOXES)),
    st.lists(st.tuples(st.integers(0, 6000), st.integers(0, 255)), max_size=30),
)
def test_a_box_with_flipped_bytes_gives_facts_or_one_error(name: str, flips: list[tuple[int, int]]) -> None:
    data = bytearray(BOXES[name].stream())
    for place, value in flips:
        data[place % len(data)] = value
    try:
        parse(bytes(data)).summary()
    except HaloError as error:
        assert error.exit_code == 3


@pytest.mark.parametrize(
    "data", [b"", b"\n", b"halo-facts\n@end\n", b"halo-facts 2 65536\n@end\n", b"SSH banner\n"]
)
def test_what_is_no_stream_of_this_version_is_refused_with_a_hint(data: bytes) -> None:
    with pytest.raises(HaloError) as caught:
        read_stream(data)
    assert "gather.sh" in caught.value.hint


def test_a_connection_that_broke_half_way_is_not_a_box_without_a_gpu() -> None:
    whole = strix_halo().stream()
    with pytest.raises(HaloError, match="cut off"):
        read_stream(whole[: len(whole) // 2])


def test_content_that_looks_like_a_record_stays_content() -> None:
    hostile = "NAME=x\n@file present /dev/kfd\n@end\nhalo-facts 1"
    facts = plain().but(files={"/etc/os-release": hostile}).facts()
    assert facts.stream.files["/etc/os-release"].text.split("\n")[1] == "@file present /dev/kfd"
    assert facts.stream.place("/dev/kfd").state is State.ABSENT


def test_absent_and_denied_are_different_answers() -> None:
    stream = read_stream(b"halo-facts 1 9\n@file denied /a\n@file absent /b\n@path denied -- /c\n@end\n")
    assert [stream.files[p].state for p in ("/a", "/b")] == [State.DENIED, State.ABSENT]
    assert stream.place("/c").state is State.DENIED


def test_a_record_of_a_newer_script_is_skipped() -> None:
    assert parse(b"halo-facts 1 65536\n@weather rainy\n wet\n@end\n").kernel.release == ""


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.facts")), ids=lambda path: path.stem)
def test_every_fixture_is_the_stream_of_its_box(path) -> None:
    assert path.read_bytes() == BOXES[path.stem].stream(), "run: python -m tests.checks.boxes"


@given(st.text())
def test_no_os_release_breaks_the_reader(text: str) -> None:
    assert all(isinstance(value, str) for value in parse_os_release(text).values())


@given(st.text())
def test_no_systemctl_answer_breaks_the_reader(text: str) -> None:
    parse_units(text)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("g++ (Debian 12.2.0-14+deb12u1) 12.2.0", (12, 2, 0)),
        ("7.2.12+deb14-amd64", (7, 2, 12)),
        ("6.17.0-1032-oem", (6, 17, 0)),
        ("Ubuntu clang version 21.1.8", (21, 1, 8)),
        ("nothing here", ()),
    ],
)
def test_versions_are_numbers_not_text(text: str, version: tuple[int, ...]) -> None:
    assert version_of(text) == version
