"""Generation over the engine's seam: every token, every character, every stop; the KV slot never lies."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.choosing import AGAIN
from engine.errors import HaloError
from engine.generate import ContextOverflow
from engine.sampling import SamplingParams, make_noise, sample
from tests.engine.server_fixtures import (
    EOS,
    EOT,
    FIRST_BYTE,
    TOKENIZER,
    HashSession,
    ScriptedSession,
    byte_tokens,
    make_engine,
)

PROMPT = [EOS, *byte_tokens(b"once")]


def text_and_reason(script, **params):
    engine = make_engine(ScriptedSession(script))
    completion = engine.complete(PROMPT, SamplingParams(**params))
    return completion.text, completion.finish_reason


def test_the_first_token_is_not_dropped():
    assert text_and_reason(byte_tokens(b"abc"), max_tokens=3) == ("abc", "length")


@pytest.mark.parametrize("end", [EOS, EOT])
def test_the_models_end_is_a_stop_and_makes_no_text(end):
    engine = make_engine(ScriptedSession([*byte_tokens(b"ab"), end]))
    completion = engine.complete(PROMPT, SamplingParams(max_tokens=9))
    assert completion.token_ids == [*byte_tokens(b"ab"), end]
    assert (completion.text, completion.finish_reason) == ("ab", "stop")


def test_an_end_right_at_the_limit_is_length_since_it_was_never_decoded():
    assert text_and_reason([*byte_tokens(b"ab"), EOS], max_tokens=2) == ("ab", "length")


def test_steps_hold_back_half_characters_but_never_tokens():
    steps = list(
        make_engine(ScriptedSession(byte_tokens("é!".encode()))).generate(
            PROMPT, SamplingParams(max_tokens=3)
        )
    )
    assert [step.text for step in steps] == ["", "é", "!"]
    assert [step.token_id for step in steps] == byte_tokens("é!".encode())


@settings(deadline=None)
@given(
    text=st.text(alphabet="abé", max_size=30),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(1, 4), max_size=30),
)
def test_stop_strings_cut_where_a_search_of_the_whole_text_would(text, stop, cuts):
    engine = make_engine(ScriptedSession([*byte_tokens(text.encode()), EOS]))
    steps = list(engine.generate(PROMPT, SamplingParams(stop=tuple(stop))))
    places = [text.find(word) for word in stop if word in text]
    out = "".join(step.text for step in steps)
    # The stream stops at the first stop string to be complete; none may be in what came out.
    assert text.startswith(out)
    assert not any(word in out for word in stop)
    assert out == text if not places else len(out) <= max(places)
    assert steps[-1].finish_reason == "stop"
    assert [step.finish_reason for step in steps[:-1]] == [None] * (len(steps) - 1)


def test_a_stop_string_beginning_is_flushed_at_the_length_limit():
    assert text_and_reason(byte_tokens(b"aEN"), max_tokens=3, stop=("END",)) == ("aEN", "length")


def test_a_stop_completed_by_the_last_token_is_a_stop():
    assert text_and_reason(byte_tokens(b"aEND"), max_tokens=4, stop=("END",)) == ("a", "stop")


def test_leading_space_is_stripped_once_and_before_stop_strings_are_looked_for():
    engine = make_engine(ScriptedSession([*byte_tokens(b" \n a b"), EOS]))
    assert engine.complete(PROMPT, SamplingParams(stop=(" ",)), strip_leading=True).text == "a"


def test_generation_ends_where_the_context_does():
    engine = make_engine(ScriptedSession(byte_tokens(b"x")), context=16)
    completion = engine.complete(PROMPT, SamplingParams(max_tokens=100))
    assert len(PROMPT) + len(completion.token_ids) == 16 and completion.finish_reason == "length"


def test_prompts_that_cannot_run_are_refused():
    engine = make_engine(ScriptedSession(byte_tokens(b"x")), context=16)
    for ids in ([2] * 16, [2] * 10_000):
        with pytest.raises(ContextOverflow) as info:
            engine.check_prompt(ids)
        assert info.value.hint
    engine.check_prompt([2] * 15)
    for bad in ([], [-1], [TOKENIZER.size]):
        with pytest.raises(HaloError):
            list(engine.generate(bad, SamplingParams()))
    with pytest.raises(ContextOverflow, match="at least"):
        engine.encode_prompt("word " * 1_000_000)


def test_the_kv_slot_is_reused_and_never_stale():
    """The same answers from an engine with a past as from a fresh one, and less work."""
    session = HashSession()
    veteran = make_engine(session)
    params = SamplingParams(max_tokens=8)
    base = [EOS, *byte_tokens(b"the quick brown fox jumps over the lazy dog")] * 4
    for prompt in (base, base[:50], base, [*base, 7], base[:20] + [9] * 30, [EOS], base):
        assert veteran.complete(prompt, params) == make_engine(HashSession()).complete(prompt, params)
    before = session.prefilled
    veteran.complete(base, SamplingParams(max_tokens=1))
    assert session.prefilled - before == 1


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), max_size=8))
def test_any_order_of_prompts_gives_what_a_fresh_engine_gives(prompts):
    veteran = make_engine(HashSession())
    for prompt in prompts:
        params = SamplingParams(max_tokens=3)
        assert veteran.complete(prompt, params) == make_engine(HashSession()).complete(prompt, params)


@pytest.mark.parametrize(
    "chosen",
    [{}, {"top_p": 0.9}, {"top_p": 0.05}, {"top_k": 3}, {"top_k": 40, "top_p": 0.5, "temperature": 9.0}],
    ids=str,
)
def test_a_sampled_text_is_what_all_logits_give(chosen):
    """However few of the logits were looked at."""
    params = SamplingParams(**{"max_tokens": 60, "temperature": 0.8, "seed": 3, **chosen})
    plain, noise, ids = HashSession(), make_noise(3), list(PROMPT)
    engine = make_engine(HashSession())
    got = [step.token_id for step in engine.generate(PROMPT, params)]
    for _ in got:
        logits = plain.run(ids, [0] * len(ids), range(len(ids)), [False] * (len(ids) - 1) + [True])
        ids.append(sample(logits[0], params, noise, len(ids)))
    assert got == ids[len(PROMPT) :]


def test_an_abandoned_generation_leaves_a_good_slot():
    veteran = make_engine(HashSession())
    for count in range(5):
        steps = veteran.generate(PROMPT, SamplingParams(max_tokens=9, temperature=1.0, seed=count))
        for _ in range(count):
            next(steps)
        steps.close()
    params = SamplingParams(max_tokens=9)
    assert veteran.complete(PROMPT, params) == make_engine(HashSession()).complete(PROMPT, params)


def test_a_backend_error_passes_through_and_the_slot_recovers():
    session = ScriptedSession(byte_tokens(b"ok"))
    engine = make_engine(session)
    session.fail = True
    with pytest.raises(RuntimeError):
        engine.complete(PROMPT, SamplingParams(max_tokens=2))
    assert engine.complete(PROMPT, SamplingParams(max_tokens=2)).text == "ok"


def test_cancel_is_noticed_between_prefill_chunks_and_between_steps():
    session = ScriptedSession(byte_tokens(b"x"))
    engine = make_engine(session)
    long_prompt = [FIRST_BYTE] * (AGAIN * 5)
    assert list(engine.generate(long_prompt, SamplingParams(), cancelled=lambda: session.runs >= 2)) == []
    assert session.runs == 2
    steps = list(engine.generate([5], SamplingParams(), cancelled=lambda: session.runs >= 6))
    assert 0 < len(steps) < 6 and steps[-1].finish_reason is None


def test_seeded_sampling_repeats_and_varies_with_the_index():
    def ids(**kwargs):
        engine = make_engine(HashSession())
        params = SamplingParams(max_tokens=10, temperature=1.0, seed=kwargs.pop("seed"))
        return [step.token_id for step in engine.generate(PROMPT, params, **kwargs)]

    assert ids(seed=1) == ids(seed=1) != ids(seed=2)
    assert ids(seed=1, index=1) == ids(seed=1, index=1) != ids(seed=1)


def test_close_frees_the_session_once():
    session = ScriptedSession([EOS])
    with make_engine(session) as engine:
        pass
    assert session.closed
    engine.close()
