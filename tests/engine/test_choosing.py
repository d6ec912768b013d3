"""The tokens of a mixed batch are those of the plain definition, whichever way they are found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.choosing import LARGE, Chooser, Sampler, token_logprob
from engine.edits import Edits
from engine.errors import HaloError
from engine.sampling import Noise, SamplingParams, make_noise, sample
from tests.engine.server_fixtures import FullLogits

VOCAB = 211


class Rows(FullLogits):
    """A session that gives the rows it is told; it counts how it was asked."""

    def __init__(self, rows: np.ndarray) -> None:
        self.given = rows
        self.calls: list[str] = []

    def run(self, tokens, slots, positions, want) -> np.ndarray:  # type: ignore[no-untyped-def]
        self.calls.append("run")
        return self.given

    def run_argmax(self, *entries) -> list[int]:  # type: ignore[no-untyped-def]
        self.calls.append("argmax")
        return [int(row.argmax()) for row in self.given]

    def run_draw(self, *arguments):  # type: ignore[no-untyped-def]
        drawn = super().run_draw(*arguments)
        self.calls[-1] = "draw"
        return drawn

    def logits_again(self, index: int) -> np.ndarray:
        self.calls.append("again")
        return self.given[index]


class Fixed:
    """Allows the same tokens always."""

    def __init__(self, allowed: np.ndarray) -> None:
        self.allowed = allowed

    def mask(self) -> np.ndarray:
        return self.allowed

    def accept(self, token: int) -> None:
        assert self.allowed[token]

    def finished(self) -> bool:
        return False

    def fork(self) -> Fixed:
        return self


def plain(
    logits: np.ndarray,
    params: SamplingParams,
    noise: Noise | None,
    position: int,
    prompt: list[int],
    answer: list[int],
    allowed: np.ndarray | None,
) -> int:
    """The definition, token by token, in float32 where it says so: docs/engine.md."""
    f = np.float32
    bias = dict(params.logit_bias)
    row = noise.at(position, len(logits)) if noise is not None else None
    found: list[tuple[np.float32, np.float32, int]] = []  # changed logit, value, id
    for token, logit in enumerate(logits):
        if params.repetition_penalty != 1.0 and (token in prompt or token in answer):
            factor = f(params.repetition_penalty)
            logit = logit / factor if logit > 0 else logit * factor
        count = answer.count(token)
        shift = f(
            bias.get(token, 0.0) - params.frequency_penalty * count - params.presence_penalty * (count > 0)
        )
        if allowed is not None and not allowed[token]:
            continue
        drawn = f(0) if row is None else row[token] * f(max(params.temperature, 1e-6))
        found.append((f(logit + shift), f(logit + f(drawn + shift)), token))
    if params.temperature == 0.0 or params.top_k == 1 or noise is None:
        return max(found, key=lambda one: (one[0], -one[2]))[2]
    found.sort(key=lambda one: (-one[0], one[2]))
    best = found[0][0]
    weights = [float(np.exp(f((one[0] - best) / f(params.temperature)))) for one in found]
    kept = (
        [i for i, weight in enumerate(weights) if f(weight) >= f(params.min_p)]
        if params.min_p
        else list(range(len(found)))
    )
    if params.top_k:
        kept = kept[: params.top_k]
    if params.top_p < 1.0:
        total, running = math.fsum(weights[i] for i in kept), 0.0
        for place, i in enumerate(kept):
            running += weights[i]
            if running >= params.top_p * total:
                kept = kept[: place + 1]
                break
    return max((found[i] for i in kept), key=lambda one: (one[1], -one[2]))[2]


def penalties() -> st.SearchStrategy[float]:
    return st.sampled_from([0.0, 0.0, 0.4, -0.7, 2.0])


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.1]),
    top_k=st.sampled_from([0, 0, 1, 2, 20]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 50),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    presence_penalty=penalties(),
    frequency_penalty=penalties(),
    logit_bias=st.sampled_from([(), (), ((3, 100.0),), ((5, -100.0), (7, 2.5), (8, -1.0))]),
    logprobs=st.sampled_from([None, None, 2]),
)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.tuples(PARAMS, st.booleans(), st.lists(st.integers(0, VOCAB - 1), max_size=6)),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_every_row_of_a_mixed_batch_is_the_definitions(
    asked: list[tuple[SamplingParams, bool, list[int]]], seed: int, ties: bool
) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((len(asked), VOCAB)) * 3).astype(np.float32)
    if ties:
        logits = np.round(logits)
    rows, expected = [], []
    for at, (params, constrained, answer) in enumerate(asked):
        allowed = rng.random(VOCAB) < 0.2 if constrained else None
        prompt = [int(token) for token in rng.integers(0, VOCAB, 5)]
        if allowed is not None:
            allowed[[*answer, 9]] = True
        sampler = Sampler(
            params, np.array(prompt, np.int32), VOCAB, at, Fixed(allowed) if allowed is not None else None
        )
        for token in answer:
            sampler.take(token)
        sampler.prepare()
        rows.append((sampler, 40 + at))
        noise = None if params.temperature == 0.0 else make_noise(params.seed, at)
        expected.append(plain(logits[at], params, noise, 40 + at, prompt, answer, allowed))
    entries = ([1] * len(rows), list(range(len(rows))), [40] * len(rows), [True] * len(rows))
    choices = Chooser(Rows(logits), VOCAB).run(entries, rows)
    assert [choices.token(row) for row in range(len(rows))] == expected


def chosen(
    params: list[SamplingParams], logits: np.ndarray, entries: int | None = None
) -> tuple[list[int], list[str]]:
    """The tokens of a batch, and the session's calls for them."""
    session = Rows(logits)
    rows = [(Sampler(one, np.array([1], np.int32), VOCAB), 1) for one in params]
    n = entries or len(rows)
    want = [False] * (n - len(rows)) + [True] * len(rows)
    choices = Chooser(session, VOCAB).run(([1] * n, [0] * n, list(range(n)), want), rows)
    return [choices.token(row) for row in range(len(rows))], session.calls


def test_a_batch_takes_one_call_of_the_cheapest_kind() -> None:
    logits = np.random.default_rng(1).standard_normal((2, VOCAB)).astype(np.float32)
    logits[:, 17] += 20.0
    greedy, drawn = SamplingParams(), SamplingParams(temperature=1.0, seed=1)
    narrow = SamplingParams(temperature=1.0, top_p=0.9, seed=1)
    scored, repeats = SamplingParams(logprobs=1), SamplingParams(repetition_penalty=1.1)
    for params, calls in (
        ([greedy, greedy], ["argmax"]),
        ([greedy, drawn], ["draw"]),
        ([greedy, narrow], ["draw"]),
        ([greedy, SamplingParams(logit_bias=((3, -1.0),))], ["draw"]),
        ([greedy, scored], ["draw", "again"]),
        ([repeats, scored], ["run"]),
    ):
        assert chosen(params, logits) == ([17, 17], calls)
    assert chosen([greedy, scored], logits, entries=97)[1] == ["run"]  # logits cannot be asked for after it
    assert chosen([greedy, narrow], logits, entries=97)[1] == ["run"]
    assert chosen([greedy, drawn], logits, entries=97)[1] == ["draw"]


def test_a_log_probability_is_the_models_own_with_the_likeliest_beside_it() -> None:
    logits = np.array([1.0, 3.0, 3.0, -2.0, 0.5], np.float32)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    got = token_logprob(logits, 3, 3)
    assert got.token_id == 3 and abs(got.logprob - exact[3]) < 1e-6
    assert [token for token, _ in got.top] == [1, 2, 0]  # the lower id first where they are equal
    assert all(abs(value - exact[token]) < 1e-6 for token, value in got.top)
    assert token_logprob(logits, 0, 0).top == () and len(token_logprob(logits, 0, 99).top) == 5
    huge = token_logprob(np.array([1e4, -1e4], np.float32), 0, 2)
    assert huge.logprob == 0.0 and huge.top[1][1] == -2e4


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 1000, 5003])
@pytest.mark.parametrize("top", [1, 2, 20])
def test_the_likeliest_are_those_of_a_whole_sort(vocab: int, top: int) -> None:
    rng = np.random.default_rng(vocab)
    for digits in (0, 5):  # with many ties, and with few
        logits = np.round(rng.standard_normal(vocab) * 3, digits).astype(np.float32)
        order = np.lexsort((np.arange(vocab), -logits))[:top]
        assert [token for token, _ in token_logprob(logits, 0, top).top] == order.tolist()


def test_a_mask_that_allows_nothing_and_one_of_another_size_are_refused() -> None:
    edits = Edits(SamplingParams(), [1], VOCAB)
    with pytest.raises(HaloError, match="no token"):
        edits.mask(np.zeros(VOCAB, np.uint8))
    with pytest.raises(HaloError, match="A mask of 3 tokens"):
        edits.mask(np.ones(3, np.uint8))


@pytest.mark.parametrize("token", [-1, VOCAB, 2**40])
def test_a_bias_of_a_token_that_is_none_is_refused(token: int) -> None:
    with pytest.raises(HaloError, match="outside the vocabulary"):
        Edits(SamplingParams(logit_bias=((token, 1.0),)), [1], VOCAB)


def test_numbers_that_are_none_end_a_sequence_with_an_error() -> None:
    logits = np.full((1, VOCAB), np.nan, np.float32)
    with pytest.raises(HaloError, match="no numbers"):
        chosen([SamplingParams(logprobs=1)], logits)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.8, seed=4),
        SamplingParams(temperature=0.8, seed=4, top_p=0.99999),  # never settled: all logits
        SamplingParams(temperature=0.8, seed=4, top_k=3),
        SamplingParams(temperature=0.8, seed=4, logit_bias=((7, 3.0),), logprobs=0),
    ],
)
def test_noise_that_is_made_ahead_is_that_of_its_position(params: SamplingParams) -> None:
    """Also where drafts were wrong, and the next position is not the one it was made for."""
    vocab = LARGE + 5
    session = Rows(np.zeros((0, vocab), np.float32))
    chooser, rng = Chooser(session, vocab), np.random.default_rng(3)
    samplers = [Sampler(params, np.array([1], np.int32), vocab, index) for index in range(2)]
    for first, drafts in ((5, 0), (6, 2), (7, 0), (8, 3), (12, 0), (13, 0)):
        rows = [(sampler, first + k) for sampler in samplers for k in range(drafts + 1)]
        session.given = rng.standard_normal((len(rows), vocab)).astype(np.float32)
        n = len(rows)
        choices = chooser.run(([1] * n, [0] * n, list(range(n)), [True] * n), rows)
        for k, (sampler, position) in enumerate(rows):
            noise = make_noise(params.seed, samplers.index(sampler))
            expected = sample(session.given[k], params, noise, position, sampler.edits)
            assert choices.token(k) == expected, (position, k)
