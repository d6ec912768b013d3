"""/v1/completions: echo and log probabilities in the endpoint's own shape, as lm-eval reads them; best_of."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.sampling import SamplingParams
from tests.engine.openai_fixtures import MODEL, client_of, demo_directory, demo_server, post, says
from tests.engine.server_fixtures import HashSession, make_engine, running


@pytest.fixture(scope="module")
def demo(tmp_path_factory, native_library):
    with demo_server(demo_directory(tmp_path_factory.mktemp("store")), native_library) as server:
        yield server


@pytest.fixture(scope="module")
def hashed():
    with running(make_engine(HashSession())) as server:
        yield server


def ask(server, **body):
    answer = post(server.url, "/v1/completions", {"temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def test_a_prompts_logprobs_are_the_models_own(demo):
    """What lm-eval's loglikelihood sums: token_logprobs[ctxlen:-1] of a prompt of ids, echoed."""
    engine = demo.service.engine
    ids = engine.encode_prompt("Once upon a time there was a box")
    shape = ask(demo, prompt=ids, max_tokens=1, logprobs=1, echo=True)["choices"][0]["logprobs"]
    assert len(shape["tokens"]) == len(shape["token_logprobs"]) == len(ids) + 1
    assert len(shape["top_logprobs"]) == len(shape["text_offset"]) == len(ids) + 1
    assert shape["token_logprobs"][0] is None and shape["top_logprobs"][0] is None
    for at in range(1, len(ids)):
        alone = ask(demo, prompt=ids[:at], max_tokens=1, logprobs=3)["choices"][0]["logprobs"]
        # The likeliest after the prefix is the same by both ways.
        best = max(shape["top_logprobs"][at].values())
        assert math.isclose(best, alone["token_logprobs"][0], abs_tol=1e-6)
        greedy = shape["token_logprobs"][at] == best
        assert greedy == (shape["tokens"][at] == alone["tokens"][0])


@pytest.mark.parametrize("size", [1, 16, 200])
def test_batches_of_prompts_score_as_each_alone(demo, size):
    ids = demo.service.engine.encode_prompt("word " * size)
    prompts = [ids, [*ids, 70], ids[: len(ids) // 2 + 1]]
    many = ask(demo, prompt=prompts, max_tokens=1, logprobs=1, echo=True)["choices"]
    for prompt, choice in zip(prompts, many, strict=True):
        alone = ask(demo, prompt=prompt, max_tokens=1, logprobs=1, echo=True)["choices"][0]
        assert choice["logprobs"] == alone["logprobs"]


def test_an_echo_of_the_prompt_alone(demo):
    done = ask(demo, prompt="Once upon", max_tokens=0, echo=True, logprobs=0)
    choice = done["choices"][0]
    assert choice["text"] == "Once upon" and choice["finish_reason"] == "length"
    assert done["usage"]["completion_tokens"] == 0
    shape = choice["logprobs"]
    assert "".join(shape["tokens"][1:]) == "Once upon" and shape["text_offset"][-1] < len("Once upon")
    assert shape["top_logprobs"][1] == {}


def test_no_token_without_an_echo_is_an_empty_answer(demo):
    choice = ask(demo, prompt="Once", max_tokens=0)["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")


def test_echo_and_offsets_are_of_the_text(demo):
    choice = ask(demo, prompt="Grüße", max_tokens=8, echo=True, logprobs=2)["choices"][0]
    shape = choice["logprobs"]
    assert choice["text"].startswith("Grüße")
    for token, offset in zip(shape["tokens"][1:], shape["text_offset"][1:], strict=True):
        if not token.startswith(("bytes:", "<|")):
            assert choice["text"][offset:].startswith(token), (token, offset)
    assert shape["text_offset"] == sorted(shape["text_offset"])


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_says_what_the_whole_answer_says(demo, echo, n):
    client = client_of(demo.url)
    asked = dict(
        model=demo.service.model, prompt=["Once", "A box"], n=n, max_tokens=6, logprobs=2, echo=echo, seed=5
    )
    whole = client.completions.create(**asked)
    texts = dict.fromkeys(range(2 * n), "")
    shapes: dict[int, dict[str, list]] = {i: {} for i in range(2 * n)}
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.logprobs:
                for name, values in choice.logprobs.to_dict().items():
                    shapes[choice.index].setdefault(name, []).extend(values)
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert shapes[choice.index] == choice.logprobs.to_dict()


def test_the_end_token_has_a_logprob_as_lm_eval_counts_on_it():
    """It drops the last entry, which is the one generated token, whatever that was."""
    with says(b"") as server:
        shape = ask(server, prompt=[5, 6, 7], max_tokens=1, logprobs=1, echo=True)["choices"][0]["logprobs"]
    assert len(shape["tokens"]) == 4 and shape["tokens"][-1] == "<|eot_id|>"


def test_half_a_character_is_spelled_in_bytes():
    with says("é") as server:
        shape = ask(server, prompt="x", max_tokens=4, logprobs=1)["choices"][0]["logprobs"]
    assert shape["tokens"][:2] == ["bytes:\\xc3", "bytes:\\xa9"]


def test_best_of_gives_the_likeliest(hashed):
    asked = dict(prompt="Once", max_tokens=8, temperature=1.0, seed=4, logprobs=0)
    all_of_them = ask(hashed, **asked, n=5)["choices"]
    best = ask(hashed, **asked, n=2, best_of=5)
    means = {c["text"]: np.mean(c["logprobs"]["token_logprobs"]) for c in all_of_them}
    assert [c["index"] for c in best["choices"]] == [0, 1]
    assert [c["text"] for c in best["choices"]] == sorted(means, key=means.get, reverse=True)[:2]
    plain = ask(hashed, **{**asked, "logprobs": None}, n=1, best_of=5)["choices"][0]
    assert plain["text"] == best["choices"][0]["text"] and plain["logprobs"] is None


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"prompt": [[1], "x"], "n": 100}, "prompt"),
        ({"prompt": [1, "x"]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"prompt": ["a"] * 129}, "prompt"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "response_format",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(hashed, change, param):
    answer = post(hashed.url, "/v1/completions", {"prompt": "x", **change})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_a_schema_constrains_completions_too(demo):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["left", "right"]}}}
    text = ask(demo, prompt="Turn", response_format=form, max_tokens=20)["choices"][0]["text"]
    assert text.strip() in ('"left"', '"right"')


def test_choices_of_one_prompt_are_those_of_each_seed(hashed):
    engine = make_engine(HashSession())
    done = ask(hashed, prompt=["Once", "Other"], n=3, max_tokens=6, temperature=1.0, seed=11)["choices"]
    for number, prompt in enumerate(("Once", "Other")):
        params = SamplingParams(max_tokens=6, temperature=1.0, seed=11)
        alone = engine.complete(engine.encode_prompt(prompt), params)
        assert done[3 * number]["text"] == alone.text
    assert [choice["index"] for choice in done] == list(range(6))


def test_the_tokenizer_is_served(demo):
    url = demo.url
    tokens = post(url, "/tokenize", {"content": "Grüße <|eot_id|>", "return_token_strs": True}).json()
    engine = demo.service.engine
    assert tokens["tokens"] == engine.encode_prompt("Grüße <|eot_id|>") and tokens["count"] == len(
        tokens["tokens"]
    )
    assert len(tokens["token_strs"]) == tokens["count"] and tokens["max_model_len"] == engine.context
    bare = post(url, "/tokenize", {"prompt": "Grüße", "add_special_tokens": False}).json()["tokens"]
    assert post(url, "/detokenize", {"tokens": bare}).json()["prompt"] == "Grüße"
    assert post(url, "/detokenize", {"tokens": [10**9]}).status_code == 400
    assert post(url, "/tokenize", {}).json()["error"]["param"] == "prompt"
    long = post(url, "/tokenize", {"prompt": "word " * 5000}).json()
    assert long["count"] > engine.context
    prompt = post(url, "/apply-template", {"messages": [{"role": "user", "content": "hi"}]}).json()["prompt"]
    assert prompt.endswith("Assistant:") and "User: hi<|eot_id|>" in prompt


def test_the_model_that_is_asked_for_must_be_served(hashed):
    for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/responses", {"input": "x"}),
                       ("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": []}),
                       ("/apply-template", {"messages": [{"role": "user", "content": "x"}]})):  # fmt: skip
        answer = post(hashed.url, path, {"model": "gpt-9", **body})
        assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
        assert post(hashed.url, path, {"model": MODEL, "max_tokens": 1, **body}).status_code == 200
