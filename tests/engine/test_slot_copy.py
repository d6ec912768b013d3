"""Keys and values copied between slots are those that the same tokens make, to the last bit and form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.backend import KV_FORMS, NativeModel, Session
from engine.errors import HaloError
from engine.formats.prepared import prepare
from engine.model import Model

CONTEXT = 600  # three blocks of 256 positions, the last one cut
LENGTHS = [1, 15, 16, 17, 31, 32, 33, 255, 256, 257, 530]


@pytest.fixture(scope="module")
def path(tiny_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    at = tmp_path_factory.mktemp("copy") / "model.halo"
    prepare(tiny_model("wide", seed=11, max_seq_len=CONTEXT), at)
    return at


@pytest.fixture(params=KV_FORMS)
def session(request: pytest.FixtureRequest, path: Path, native_library: Path) -> Iterator[Session]:
    with (
        NativeModel.open(path, native_library) as model,
        model.session(3, CONTEXT, threads=2, kv=request.param) as session,
    ):
        yield session


def tokens(seed: int, count: int, vocab: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocab, count)]


def test_what_follows_a_copy_is_what_follows_the_tokens_themselves(session: Session) -> None:
    vocab = session.config.vocab_size
    text, other = tokens(1, 540, vocab), tokens(2, 590, vocab)
    session.prefill(0, text)
    session.prefill(2, other)  # what the target held before
    for length in LENGTHS:
        tail = tokens(3 + length, 9, vocab)
        session.copy(0, 2, length)
        copied = session.run(tail, [2] * 9, range(length, length + 9), [True] * 9)
        session.prefill(1, text[:length])
        computed = session.run(tail, [1] * 9, range(length, length + 9), [True] * 9)
        assert copied.tobytes() == computed.tobytes(), length
    after = session.run([5], [0], [540], [True])
    session.prefill(1, text)
    assert after.tobytes() == session.run([5], [1], [540], [True]).tobytes()  # the source is as it was


def test_a_copy_of_a_copy_and_of_a_rewound_slot(session: Session) -> None:
    vocab = session.config.vocab_size
    text = tokens(7, 300, vocab)
    session.prefill(0, text)
    session.prefill(0, text[40:43], start=40)  # rewound: it holds 43 tokens now
    with pytest.raises(HaloError, match="slot 0 holds 43 tokens"):
        session.copy(0, 1, 44)
    session.copy(0, 1, 43)
    session.copy(1, 2, 21)
    got = session.run([9], [2], [21], [True])
    session.prefill(0, text[:21])
    assert got.tobytes() == session.run([9], [0], [21], [True]).tobytes()


def test_logits_may_still_be_asked_for_after_a_copy(session: Session) -> None:
    first = session.run([3, 4], [0, 0], [0, 1], [True, True])
    session.copy(0, 1, 2)
    assert session.logits_again(1).tobytes() == first[1].tobytes()


def test_a_copy_that_cannot_be_is_refused_and_changes_nothing(session: Session) -> None:
    vocab = session.config.vocab_size
    session.prefill(0, tokens(1, 10, vocab))
    session.prefill(1, tokens(2, 6, vocab))
    for source, target, length, sentence in (
        (0, 1, 11, "length = 11; slot 0 holds 10 tokens"),
        (0, 1, -1, "length = -1"),
        (2, 1, 1, "slot 2 holds 0 tokens"),
        (0, 0, 5, "slot 0 cannot be copied to itself"),
        (0, 3, 5, "slot 3 is outside the session's 3 slots"),
        (-1, 1, 5, "slot -1 is outside"),
        (4096, -7, 5, "slot 4096 is outside"),
    ):
        with pytest.raises(HaloError, match=sentence):
            session.copy(source, target, length)
    session.run([1, 1], [0, 1], [10, 6], [True, True])  # no gap: both hold what they held
    session.copy(0, 1, 0)
    with pytest.raises(HaloError, match="would leave a gap"):
        session.run([1], [1], [1], [True])


def test_a_closed_session_copies_nothing(session: Session) -> None:
    session.close()
    with pytest.raises(HaloError, match="closed"):
        session.copy(0, 1, 0)
