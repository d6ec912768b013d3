"""Sampling: the distribution that was asked for, the same on every run of a seed; bad logits are an error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import HaloError
from engine.sampling import SamplingParams, depth_of, make_noise, sample, settled

GOLDEN = [-1.060488, 1.505482, 0.6685035, 0.0117115]
LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def draws(params: SamplingParams, count: int = 5_000) -> np.ndarray:
    noise = make_noise(1)
    return np.bincount([sample(LOGITS, params, noise, i) for i in range(count)], minlength=4) / count


def test_greedy_takes_the_lowest_id_on_a_tie():
    logits = np.array([0, 3, 1, 3], np.float32)
    assert sample(logits, SamplingParams(), make_noise(None), 0) == 1
    assert sample(logits, SamplingParams(temperature=2.0, top_k=1), make_noise(None), 0) == 1


def test_temperature_one_is_the_models_own_distribution():
    assert np.abs(draws(SamplingParams(temperature=1.0)) - [0.5, 0.3, 0.15, 0.05]).max() < 0.03


def test_temperature_sharpens_and_flattens():
    assert draws(SamplingParams(temperature=0.5))[0] > 0.6
    assert draws(SamplingParams(temperature=5.0))[3] > 0.15


def test_top_k_and_top_p_keep_the_smallest_set_and_renormalise():
    assert np.abs(draws(SamplingParams(temperature=1.0, top_k=2)) - [0.625, 0.375, 0, 0]).max() < 0.03
    assert np.abs(draws(SamplingParams(temperature=1.0, top_p=0.79)) - [0.625, 0.375, 0, 0]).max() < 0.03
    assert draws(SamplingParams(temperature=1.0, top_p=0.01), 500)[0] == 1.0


@given(
    logits=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=50),
    temperature=st.floats(1e-12, 100),
    top_p=st.floats(1e-9, 1),
    top_k=st.integers(0, 60),
    seed=st.integers(-(2**63), 2**64),
    position=st.integers(0, 2**20),
)
def test_any_finite_logits_and_parameters_give_a_token_that_repeats(
    logits, temperature, top_p, top_k, seed, position
):
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    array = np.array(logits, np.float32)
    first = sample(array, params, make_noise(seed), position)
    assert 0 <= first < len(logits)
    assert first == sample(array, params, make_noise(seed), position)


def test_a_large_vocabulary_with_equal_logits_is_drawn_from_evenly():
    noise, even = make_noise(3), np.zeros(1000, np.float32)
    tokens = [sample(even, SamplingParams(temperature=1.0), noise, i) for i in range(3000)]
    assert len(set(tokens)) > 900


def plain_order(logits, params):
    """By definition, in float64: (ids that top_k and then top_p leave, likeliest first; their shares)."""
    order = np.argsort(-logits, kind="stable")[: params.top_k or None]
    shares = np.exp((logits[order].astype(np.float64) - logits.max()) / params.temperature)
    shares /= shares.sum()
    kept = int(np.searchsorted(np.cumsum(shares), params.top_p, side="left")) + 1
    return order[:kept], shares[:kept] / shares[:kept].sum()


@pytest.mark.parametrize("spread", [0.0, 3.0, 12.0])
@pytest.mark.parametrize(
    "params",
    [{}, {"top_p": 0.9}, {"top_p": 0.3}, {"top_k": 7}, {"top_k": 300, "top_p": 0.8}, {"top_k": 10**6}],
    ids=str,
)
def test_a_large_vocabulary_is_drawn_from_by_definition(spread, params):
    """Summed in blocks and never sorted whole: the kept tokens and their shares are still the exact ones."""
    asked = SamplingParams(temperature=0.9, **params)
    rng = np.random.default_rng(2)
    logits = (rng.standard_normal(3001) * spread).astype(np.float32)
    logits[::7] = -np.inf
    order, shares = plain_order(logits, asked)
    noise, drawn = make_noise(4), np.zeros(3001)
    for position in range(800):
        drawn[sample(logits, asked, noise, position)] += 1
    kept = set(order.tolist())
    assert not (set(np.flatnonzero(drawn).tolist()) - kept) and not drawn[::7].any()
    expected = np.zeros(3001)
    expected[order] = shares * 800
    likely = expected >= 5
    error = np.abs(drawn - expected)[likely] / np.sqrt(expected[likely])
    assert error.max(initial=0.0) < 5


def test_what_is_near_the_winner_decides_as_all_logits_do():
    """`settled` may say "not certain"; it may not say "certain" of a token that top-k or top-p leave out."""
    rng = np.random.default_rng(8)
    decided = 0
    for _ in range(600):
        params = SamplingParams(
            temperature=float(rng.choice([0.3, 1, 3])),
            top_p=float(rng.choice([0.2, 0.9, 0.99, 1])),
            top_k=int(rng.choice([0, 2, 20])),
        )
        logits = np.round(rng.standard_normal(500) * 3, int(rng.integers(0, 3))).astype(np.float32)
        noise, position = make_noise(int(rng.integers(99))), int(rng.integers(99))
        token = int((logits + noise.scaled(position, 500, params.temperature)).argmax())
        near = np.flatnonzero(logits >= min(logits[token], logits.max() - depth_of(params))).astype(np.int32)
        if settled(token, near, logits[near], params):
            decided += 1
            assert sample(logits, params, noise, position) == token
    assert decided > 300


def test_choices_of_one_seed_are_different_streams():
    places = range(50)
    streams = [
        [make_noise(seed, index).at(i, 2)[0] for i in places] for seed, index in ((5, 0), (5, 1), (6, 0))
    ]
    assert len({u for stream in streams for u in stream}) == 150
    assert make_noise(5).at(7, 1) == make_noise(5, 0).at(7, 1) != make_noise(None).at(7, 1)


def test_the_noise_is_gumbels_and_its_numbers_do_not_hang_together():
    """Else a seed would favour tokens: exp(-exp(-g)) is even, and neighbours do not correlate."""
    noise = make_noise(11)
    g = np.array([noise.at(i, 200) for i in range(200)], np.float64)
    assert np.isfinite(g).all()
    u = np.exp(-np.exp(-g))
    assert abs(u.mean() - 0.5) < 0.006 and abs(u.var() - 1 / 12) < 0.002
    assert np.abs(np.bincount((u.ravel() * 10).astype(int), minlength=10) / u.size - 0.1).max() < 0.008
    for a, b in ((u[:-1], u[1:]), (u[:, :-1], u[:, 1:]), (u[:-1, 1:], u[1:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.025


def test_a_seed_gives_the_numbers_that_it_gave_before():
    """They are part of what a seed promises; a NumPy whose stream is another one shows here."""
    assert make_noise(42).at(3, 4) == pytest.approx(GOLDEN, rel=1e-5)


@pytest.mark.parametrize("bad", [[np.nan, 1], [1, np.inf], [-np.inf, -np.inf]])
def test_logits_that_are_no_numbers_are_an_error_not_a_token(bad):
    with pytest.raises(HaloError, match="no numbers"):
        sample(np.array(bad, np.float32), SamplingParams(), make_noise(None), 0)


@pytest.mark.parametrize(
    "change",
    [{"max_tokens": -1}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1},
     {"top_k": -1}, {"stop": ("",)}],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(change):
    with pytest.raises(HaloError):
        SamplingParams(**change).validate()
