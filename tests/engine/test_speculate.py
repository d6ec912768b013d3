"""Speculation: it never changes a token, whatever is drafted; it is used where it pays, else let be."""

from __future__ import annotations

import itertools
import os
import random
from argparse import ArgumentParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import commands
from engine.backend import KV_FORMS
from engine.errors import HaloError
from engine.formats.prepared import prepare
from engine.generate import Engine
from engine.locate import ModelCard
from engine.sampling import SamplingParams
from engine.speculate import (
    AUTO,
    CANDIDATES,
    LONGEST,
    MOST,
    OFF,
    PROBE_FIRST,
    RENEW,
    SAMPLES,
    Acceptance,
    Costs,
    Experience,
    History,
    Speculation,
    accept,
    best_count,
    default_speculation,
    draft_together,
    fill_curve,
    least_chance,
    parse_speculation,
)
from tests.engine.server_fixtures import (
    EOS,
    EOT,
    TOKENIZER,
    HashSession,
    ScriptedSession,
    byte_tokens,
    train_vocabulary,
)

ROOT = Path(__file__).parents[2]
SLOW = os.environ.get("HALO_TEST_SLOW") == "1"
ALWAYS = [Speculation(n, adaptive=False) for n in (1, 4, MOST)]
EVERY = [AUTO, *ALWAYS]
tokens_of_few = st.lists(st.integers(0, 3), max_size=80)


def engine_over(session, speculation=OFF, context=512):
    return Engine(session, TOKENIZER, ModelCard("t", "bitnet", context), None, speculation)


class CycleSession(HashSession):
    """A model whose next token is mostly one that the last three ask for, so that its text repeats itself."""

    def run(self, tokens, slots, positions, want):
        rows = super().run(tokens, slots, positions, want)
        row = 0
        for place, wanted in enumerate(want):
            if wanted:
                tail = self.kv[max(0, positions[place] - 2) : positions[place] + 1]
                rows[row] *= 0.3
                rows[row, :2] = rows[row, 40:] = -50.0
                rows[row, 2 + sum(tail) * 7 % 23] += 3.5
                row += 1
        return rows


# -- the history: what is drafted ----------------------------------------------------------------------


def longest_match(tokens: list[int]) -> int:
    """By definition: the longest end of `tokens` that occurs earlier, 2 to LONGEST tokens long, else 0."""
    for length in range(min(len(tokens) - 1, LONGEST), 1, -1):
        end = tokens[-length:]
        if any(tokens[i : i + length] == end for i in range(len(tokens) - length)):
            return length
    return 0


@settings(deadline=None)
@given(tokens_of_few, st.integers(0, 80))
def test_a_match_is_a_real_one_and_nothing_is_missed_among_few_candidates(tokens, cut):
    history = History(tokens[:cut])
    for token in tokens[cut:]:
        history.append(token)
    assert history.tokens == tokens
    if history.source:
        kept = min(history.length, LONGEST)
        assert 2 <= kept <= history.source < len(tokens)
        assert tokens[history.source - kept : history.source] == tokens[len(tokens) - kept :]
    pairs = list(itertools.pairwise(tokens))
    if pairs and pairs.count(pairs[-1]) <= CANDIDATES and cut >= len(tokens):
        assert min(history.length, LONGEST) == longest_match(tokens)
    assert bool(history.source) == bool(longest_match(tokens))


def test_the_longest_match_wins_over_a_later_shorter_one():
    history = History([9, 1, 2, 3, 50, 8, 2, 3, 60, 9, 1, 2, 3])
    assert history.length == 4 and history.draft(2) == [50, 8]


def test_of_equal_matches_the_latest_wins():
    assert History([1, 2, 50, 1, 2, 60, 1, 2]).draft(1) == [60]


def test_a_text_that_repeats_itself_is_drafted_beyond_its_end():
    assert History([7, 1, 2, 3, 1, 2, 3]).draft(7) == [1, 2, 3, 1, 2, 3, 1]
    assert History([5, 5, 5]).draft(4) == [5, 5, 5, 5]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3, 4], [1, 2, 3, 1]])
def test_without_a_repeated_pair_there_is_no_draft(tokens):
    assert History(tokens).draft(5) == []


def test_memory_grows_by_one_entry_a_token_and_work_is_bounded_on_hostile_text():
    """A prompt made to have long chains of almost-matches must not make a token dear."""
    history = History([1, 2] * 20_000 + [3])
    assert len(history._latest) <= 3 and len(history._earlier) == 40_000
    rng = random.Random(1)
    noise = History(rng.choices(range(3), k=20_000))
    seen = []

    class Watched(list):
        def __getitem__(self, place):
            seen.append(place)
            return super().__getitem__(place)

    noise.tokens = Watched(noise.tokens)
    noise.append(1)
    assert len(seen) <= 2 * CANDIDATES * (LONGEST + 2) + 4


# -- the policy: how many drafts, as a pure function ---------------------------------------------------


@pytest.mark.parametrize(
    ("costs", "chance", "count"),
    [
        ([1.0] * 9, 0.05, 8),  # verification is free (weights are read once): even poor drafts pay
        ([1.0] * 9, 0.02, 0),  # but not those that win less than the margin
        ([1.0 + m for m in range(9)], 0.99, 0),  # a wider step costs as much as its tokens alone: never
        ([1.0 + 0.3 * m for m in range(9)], 0.2, 0),
        ([1.0 + 0.3 * m for m in range(9)], 0.6, 1),
        ([1.0 + 0.3 * m for m in range(9)], 0.99, 8),
        ([1.0, 1.1, 1.1, 1.1, 2.2, 2.2, 2.2, 2.2, 2.2], 0.7, 3),  # a kernel of four: stop at its edge
        ([1.0, 1.1, 1.1, 1.1, 2.2, 2.2, 2.2, 2.2, 2.2], 0.99, 8),
        ([1.0, 1.9, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0], 0.95, 8),  # over a hill: one would not pay, eight do
        ([1.0], 0.99, 0),
    ],
)
def test_the_number_of_drafts_that_gives_most_tokens_a_second(costs, chance, count):
    assert best_count(costs, [chance] * 8) == count


@given(
    st.lists(st.floats(1e-6, 100), min_size=1, max_size=10),
    st.lists(st.floats(0, 1), max_size=10),
)
def test_the_choice_is_never_slower_than_a_plain_step_by_its_own_figures(costs, chances):
    count = best_count(costs, chances)
    assert 0 <= count <= min(len(costs) - 1, len(chances))
    reach, expected = 1.0, 1.0
    for chance in chances[:count]:
        reach *= chance
        expected += reach
    assert expected / costs[count] >= 1.0 / costs[0]
    if chances and chances[0] < least_chance(costs) * (1 - 1e-9):
        assert count == 0  # the short cut never cuts what pays


def test_acceptance_is_learned_by_the_length_of_the_match_and_forgets():
    acceptance = Acceptance()
    for _ in range(60):
        acceptance.learn(2, False)
        acceptance.learn(9, True)
    assert acceptance.ahead(2, 1)[0] < 0.05 and acceptance.ahead(9, 1)[0] > 0.95
    assert acceptance.ahead(2, 8)[-1] > 0.9  # should the first seven be right, the match is nine long
    for _ in range(40):
        acceptance.learn(2, True)
    assert acceptance.ahead(2, 1)[0] > 0.7
    assert all(0 < chance < 1 for chance in acceptance.ahead(2, MOST))


def test_a_request_begins_with_what_the_engine_learned_and_does_not_carry_its_own_text_over():
    """A server that was asked for prose all day does not try its drafts anew at each request; and what one
    request said is never drafted in the next."""
    learned = Experience(AUTO)
    first = learned.drafter([1, 2, 3])
    rng = random.Random(1)
    for _ in range(400):
        first.observe(rng.choice((5, 6, 7)))
    second = learned.drafter([1, 2])
    assert second.acceptance.ahead(2, 1)[0] == pytest.approx(first.acceptance.ahead(2, 1)[0], abs=0.1)
    assert second.history.tokens == [1, 2]
    for token in (5, 6, 7, 5):
        second.observe(token)
    assert draft_together([second], [9], ALWAYS[1], learned.costs(1)) == [[]]


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e3)), min_size=1, max_size=20))
def test_a_curve_is_whole_and_rises_and_no_measurement_raises_it(measured):
    curve = fill_curve(measured)
    if not measured[0]:
        assert curve == []
        return
    assert len(curve) == len(measured)
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(curve))
    assert all(c <= m * (1 + 1e-9) for c, m in zip(curve, measured, strict=True) if m)


def test_a_curve_goes_through_what_was_measured_and_hopes_beyond():
    assert fill_curve([1.0, 0.0, 2.0, 0.0, 0.0]) == pytest.approx([1.0, 1.05, 2.0, 2.05, 2.1])
    assert fill_curve([3.0, 9.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])


def test_one_disturbed_step_does_not_change_the_policy():
    """Another process has the CPU for a second: the median stays where it was."""
    costs = Costs(4)
    for _ in range(5):
        costs.record(0, 1.0)
        costs.record(4, 1.2)
    for _ in range(RENEW):
        costs.record(0, 1.0)
    costs.record(4, 1000.0)
    costs.record(0, 1000.0)
    for _ in range(RENEW):
        costs.record(0, 1.0)
    assert costs.curve()[0] == 1.0 and costs.curve()[4] == 1.2


def test_before_anything_was_measured_nothing_is_drafted():
    assert Costs(4).count([0.99] * 4) == 0


def simulate(chance: float, cost, steps: int = 4000, limit: int = 8, seed: int = 1) -> tuple[float, float]:
    """(tokens a second against plain steps, share of steps with drafts) where a step costs cost(drafts)."""
    rng = random.Random(seed)
    costs = Costs(limit)
    seconds, tokens, used = 0.0, 0, 0
    for _ in range(steps):
        count = costs.count([chance] * limit)
        took = cost(count) * rng.uniform(0.97, 1.03)
        costs.record(count, took)
        seconds += took
        used += count > 0
        tokens += 1
        for _ in range(count):
            if rng.random() >= chance:
                break
            tokens += 1
    return tokens / seconds * cost(0), used / steps


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
def test_where_a_wider_step_costs_as_much_as_its_tokens_the_loss_is_below_a_percent(chance):
    rate, used = simulate(chance, lambda drafts: 1.0 + drafts)
    assert rate > 0.99 and used < 0.02


@pytest.mark.parametrize(
    ("chance", "cost", "least"),
    [
        (0.9, lambda drafts: 1.0 + 0.05 * drafts, 4.0),
        (0.9, lambda drafts: 1.0 + 0.3 * drafts, 1.6),
        (0.6, lambda drafts: 1.0 + 0.1 * drafts, 1.6),
        (0.8, lambda drafts: 1.0 if drafts < 8 else 3.0, 3.9),  # cheap as far as the kernel goes
        (0.95, lambda drafts: 2.0 if drafts else 1.0, 2.5),  # a dear second path
    ],
)
def test_where_it_pays_it_is_found_and_used(chance, cost, least):
    rate, used = simulate(chance, cost)
    assert rate > least and used > 0.9


def test_what_was_too_dear_is_tried_again_and_taken_up_when_it_is_cheap():
    """The machine was busy when the first drafts were verified; an hour later it is not."""
    costs = Costs(4)
    for _ in range(5):
        costs.record(0, 1.0)
    for count in (1, 2, 3, 4):
        costs.record(count, 50.0)
    found = []
    for _ in range(PROBE_FIRST * 20):
        count = costs.count([0.9] * 4)
        costs.record(count, 1.0 + 0.1 * count)
        found.append(count)
    assert max(found[: PROBE_FIRST // 2]) == 0 and found[-1] == 4


# -- exactness -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), min_size=7, max_size=7))
def test_what_is_kept_is_what_one_at_a_time_would_give(drafts, model):
    kept = accept(drafts, iter(model[: len(drafts) + 1]))
    assert kept == model[: len(kept)] and drafts[: len(kept) - 1] == kept[:-1]
    assert len(kept) == len(drafts) + 1 or drafts[len(kept) - 1] != kept[-1]


PARAMS = [
    {},
    {"temperature": 0.7, "seed": 1},
    {"temperature": 1.3, "top_p": 0.8, "seed": -5},
    {"temperature": 0.9, "top_k": 5, "seed": 2**63},
    {"stop": ("a", "th", "\x02")},
    {"temperature": 0.5, "seed": 3, "stop": ("e",), "max_tokens": 7},
    {"max_tokens": 1},
    {"max_tokens": 2},
]


@pytest.mark.parametrize("speculation", EVERY, ids=str)
@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_steps_are_the_same_with_and_without(speculation, params):
    """Tokens, text, stops and their reasons: of greedy and of seeded requests, up to the context's end."""
    rng = random.Random(0)
    asked = SamplingParams(**params)
    plain, fast = engine_over(CycleSession(), context=200), engine_over(CycleSession(), speculation, 200)
    for _ in range(4):
        prompt = [EOS, *(rng.choices(range(2, 9), k=rng.randrange(40)) * 3)]
        assert list(plain.generate(prompt, asked)) == list(fast.generate(prompt, asked))
    assert plain.tally.drafted == 0


def test_the_stand_in_really_repeats_itself_so_that_drafts_are_right_and_wrong():
    fast = engine_over(CycleSession(), ALWAYS[1])
    fast.complete([EOS, 5, 6], SamplingParams(max_tokens=200))
    fast.complete([EOS, 5, 6], SamplingParams(max_tokens=200, temperature=1.0, seed=1))
    assert 0 < fast.tally.accepted < fast.tally.drafted and fast.tally.steps < 398


@pytest.mark.parametrize("end", [EOS, EOT])
@pytest.mark.parametrize("after", range(8))
def test_an_end_inside_an_accepted_draft_ends_there(end, after):
    """The prompt holds the very answer, so its end is drafted too; what follows it must not come out."""
    answer = byte_tokens(b"abcdefgh"[: after + 1])
    session = ScriptedSession([*answer, end, *byte_tokens(b"xyz")] * 3)
    engine = engine_over(session, ALWAYS[2])
    prompt = [EOS, 9, 9, *answer, end, *byte_tokens(b"xyz"), 9, 9]
    done = engine.complete(prompt, SamplingParams(max_tokens=50))
    assert done.token_ids == [*answer, end] and done.finish_reason == "stop"


@pytest.mark.parametrize("context", range(12, 24))
def test_drafts_never_reach_beyond_the_context(context):
    """A position outside the context would be refused by the engine, and the request with it."""

    class Bounded(CycleSession):
        def run(self, tokens, slots, positions, want):
            assert max(positions) < context
            return super().run(tokens, slots, positions, want)

    engine = engine_over(Bounded(), ALWAYS[2], context)
    done = engine.complete([EOS, 5, 5, 5, 5, 5, 5, 5], SamplingParams())
    assert len(done.token_ids) + 8 <= context


def test_no_more_is_drafted_than_max_tokens_can_use():
    engine = engine_over(ScriptedSession([5]), ALWAYS[2])
    done = engine.complete([EOS, 5, 5, 5, 5], SamplingParams(max_tokens=6))
    assert len(done.token_ids) == 6 and engine.tally.drafted == 4


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(0, 6)), max_size=6)
)
def test_whatever_was_abandoned_before_the_slot_is_never_stale(requests):
    """Wrong drafts leave keys behind: the next request must not read them as its own."""
    veteran = engine_over(CycleSession(), ALWAYS[1])
    for prompt, count in requests:
        steps = veteran.generate(prompt * 3, SamplingParams(max_tokens=12))
        for _ in range(count):
            next(steps, None)
        steps.close()
        fresh = engine_over(CycleSession())
        params = SamplingParams(max_tokens=6)
        assert veteran.complete(prompt * 3, params) == fresh.complete(prompt * 3, params)


def test_a_backend_error_in_a_verification_passes_through_and_the_slot_recovers():
    session = ScriptedSession(byte_tokens(b"ababababab"))
    engine = engine_over(session, ALWAYS[1])
    prompt = [EOS, *byte_tokens(b"abab")]
    steps = engine.generate(prompt, SamplingParams(max_tokens=9))
    next(steps)
    session.fail = True
    with pytest.raises(RuntimeError):
        list(steps)
    assert engine.complete(prompt, SamplingParams(max_tokens=9)).text == "ababababa"


def test_a_cancelled_request_stops_within_the_step_that_runs():
    session = ScriptedSession([5])
    engine = engine_over(session, ALWAYS[2])
    steps = engine.generate([EOS, 5, 5, 5], SamplingParams(), cancelled=lambda: session.runs >= 3)
    assert len(list(steps)) < 2 * (MOST + 1) and session.runs == 3


# -- the native engine ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_model, tmp_path_factory, native_library):
    """open(speculation, form of the KV cache): engines over one small random model of the native backend."""
    from engine.backend import NativeModel
    from engine.tokenizer import Tokenizer

    model = tiny_model("wide", seed=5, max_seq_len=256)  # its heads are large enough for every form
    path = tmp_path_factory.mktemp("speculate") / "model.halo"
    prepare(model, path)
    tokenizer = Tokenizer(train_vocabulary(515 - 258))
    native = NativeModel.open(path, native_library)
    card = ModelCard("t", "bitnet", 256)
    yield lambda how, kv: Engine(
        native.session(slots=1, context=256, threads=2, kv=kv), tokenizer, card, None, how
    )
    native.close()


@pytest.mark.parametrize("kv", KV_FORMS)
@pytest.mark.parametrize("speculation", [AUTO, ALWAYS[1], ALWAYS[2]], ids=str)
def test_the_native_engine_gives_the_same_tokens(tiny, speculation, kv):
    """In every form of the KV cache: in some, positions share bytes, and a wrong draft's are written over."""
    rng = random.Random(3)
    for params in PARAMS[:4]:
        asked = SamplingParams(**{"max_tokens": 48, **params})
        with tiny(OFF, kv) as plain, tiny(speculation, kv) as fast:
            for _ in range(4):
                prompt = [EOS, *(rng.choices(range(2, 300), k=rng.randrange(1, 30)) * 3)]
                assert fast.complete(prompt, asked) == plain.complete(prompt, asked)
            assert fast.tally.drafted or speculation == AUTO


@pytest.fixture(scope="module")
def demo(tmp_path_factory, native_library):
    """open(speculation): engines over the bundled model."""
    from engine.backend import NativeModel
    from engine.formats.h1b import read_h1b
    from engine.formats.store import unpack
    from engine.tokenizer import Tokenizer

    store = tmp_path_factory.mktemp("demo")
    unpack(ROOT / "engine" / "models" / "demo", store)
    (directory,) = store.glob("sha256-*")
    prepare(read_h1b(directory / "model.h1b"), directory / "model.halo")
    tokenizer = Tokenizer.from_htok(directory / "tokenizer.htok")
    native = NativeModel.open(directory / "model.halo", native_library)
    yield lambda how: Engine(
        native.session(slots=1, context=1024), tokenizer, ModelCard("d", "halo-demo", 1024), None, how
    )
    native.close()


def demo_prompts(tokenizer, count: int) -> list[list[int]]:
    """Openings, and passages of this project's documents with their own beginning again, to be copied."""
    text = "".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    ids = tokenizer.encode(text)
    rng = random.Random(7)
    prompts = []
    for number in range(count):
        start = rng.randrange(len(ids) - 400)
        body = ids[start : start + rng.choice((4, 20, 200))]
        prompts.append([tokenizer.bos, *body, *(body[: len(body) // 4] if number % 2 else [])])
    return prompts


def test_the_bundled_model_says_the_same_with_and_without(demo):
    """What a person sees: 100 prompts of 128 tokens with HALO_TEST_SLOW=1, a few shorter ones without."""
    count, length = (100, 128) if SLOW else (3, 24)
    ways = [AUTO, Speculation(7, adaptive=False)]
    with demo(OFF) as plain, demo(ways[0]) as adaptive, demo(ways[1]) as fixed:
        for number, prompt in enumerate(demo_prompts(plain.tokenizer, count)):
            for params in ({}, {"temperature": 0.8, "top_p": 0.95, "seed": number, "stop": ("\n\n\n",)}):
                asked = SamplingParams(max_tokens=length, **params)
                expected = plain.complete(prompt, asked)
                assert adaptive.complete(prompt, asked) == expected
                assert fixed.complete(prompt, asked) == expected
        assert fixed.tally.drafted > 0 and (fixed.tally.accepted or not SLOW)
        print(f"adaptive {adaptive.tally}, always 7 {fixed.tally}, plain {plain.tally}")


# -- the setting ---------------------------------------------------------------------------------------


def test_the_setting_is_read_from_the_flag_and_the_environment(monkeypatch):
    monkeypatch.delenv("HALO_SPECULATE", raising=False)
    assert default_speculation() == parse_speculation("auto") == AUTO
    monkeypatch.setenv("HALO_SPECULATE", "off")
    assert default_speculation() == OFF
    monkeypatch.setenv("HALO_SPECULATE", "")
    assert default_speculation() == AUTO
    assert parse_speculation("6") == Speculation(6, adaptive=False)
    assert parse_speculation("0").limit == 0


@pytest.mark.parametrize("text", ["", "on", "-1", "32", "1.5", "٣", "1e1", "9" * 5000, "auto "])
def test_a_setting_that_means_nothing_is_refused_with_what_can_be_said(text):
    with pytest.raises(HaloError) as info:
        parse_speculation(text)
    assert "auto" in info.value.hint and len(str(info.value)) < 400


def test_a_drafter_without_room_drafts_nothing():
    drafter = Experience(AUTO).drafter([1, 2, 3, 1, 2])
    costs = Costs(7)
    assert draft_together([drafter, None], [0, 9], Speculation(7, False), costs) == [[], []]
    assert draft_together([drafter], [2], Speculation(7, False), costs) == [[3, 1]]


def test_sequences_that_share_a_step_share_the_drafts_that_pay():
    """The likelier drafts are taken, whosever they are, and none where a wider step costs its tokens."""
    sure = Experience(AUTO).drafter([*range(20), *range(15)])
    doubtful = Experience(AUTO).drafter([1, 2, 3, 1, 2])
    for _ in range(60):
        sure.acceptance.learn(16, True)
        doubtful.acceptance.learn(2, False)
    few, free, dear = Speculation(9), Costs(9), Costs(9)
    for drafts in range(10):
        for _ in range(SAMPLES):
            free.record(drafts, 1.0)
            dear.record(drafts, 1.0 + drafts)
    found = draft_together([doubtful, None, sure], [9, 9, 9], few, free)
    assert found == [[], [], [*range(15, 20), *range(4)]]
    assert len(draft_together([doubtful, None, sure], [9, 9, 5], few, free)[0]) == 4
    assert draft_together([doubtful, None, sure], [9, 9, 9], few, dear) == [[], [], []]
    assert sum(map(len, draft_together([sure] * 4, [9] * 4, Speculation(7, False), free))) == 7


def test_a_bad_setting_is_refused_by_the_command_and_from_the_environment(tmp_path, monkeypatch):
    """Before a model is opened: a typing error must not cost a minute, nor silently mean automatic."""
    monkeypatch.setenv("HALO_SPECULATE", "fast")
    with pytest.raises(HaloError, match="'fast'"):
        Engine.open(tmp_path / "no-model")
    monkeypatch.delenv("HALO_SPECULATE")
    parser = ArgumentParser()
    commands.configure_generate(parser)
    args = parser.parse_args(["--speculate", "often", "--model", str(tmp_path), "Once"])
    with pytest.raises(HaloError, match="'often'") as info:
        commands.run_generate(args)
    assert info.value.exit_code == 3
