"""Chat completions as OpenAI's own client reads them: refusals, schemas, log probabilities, streams."""

from __future__ import annotations

import json
import math
import os
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest

from tests.engine.openai_fixtures import (
    MODEL,
    USER,
    client_of,
    demo_directory,
    demo_server,
    function,
    post,
    says,
)
from tests.engine.server_fixtures import TOKENIZER, byte_tokens
from tests.engine.test_grammar import random_schema

CHAT = {"model": MODEL, "messages": USER, "temperature": 0}
TWO_CALLS = (
    'Let me look. <tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
)
DEEP = json.loads('{"a":' * 70 + "{}" + "}" * 70)
TOOLS = [function(), function("get_time", {"type": "object", "properties": {}})]


@pytest.fixture(scope="module")
def demo(tmp_path_factory, native_library):
    with demo_server(demo_directory(tmp_path_factory.mktemp("store")), native_library) as server:
        yield server


@pytest.fixture(scope="module")
def plain():
    with says("Grüße, 🌍! The end.") as server:
        yield server


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"tools": [*TOOLS, function()]}, "tools"),
        ({"tools": [function("a b")]}, "tools[0].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [function(f"f{i}") for i in range(129)]}, "tools"),
        ({"tools": [function("f", DEEP)]}, "tools[0].function.parameters"),
        ({"tools": [function("f", {"type": "x"})], "tool_choice": "required"}, "tools"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}, {"role": "tool"}]},
         "messages[1].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}]},
         "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
         "messages[0].content"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"response_format": {"type": "json_schema"}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
         "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}},
         "response_format"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(plain, change, param):
    answer = post(plain.url, "/v1/chat/completions", {**CHAT, **change})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"].startswith(param), error
    assert error["type"] == "invalid_request_error" and error["code"] and error["message"]


# --- schemas


class Step(pydantic.BaseModel):
    title: str = pydantic.Field(max_length=12)
    minutes: int = pydantic.Field(ge=1, le=90)


class Plan(pydantic.BaseModel):
    kind: Literal["walk", "swim"]
    steps: list[Step] = pydantic.Field(max_length=2)
    note: str | None = None


def test_parse_gives_the_clients_own_objects(demo):
    client = client_of(demo.url)
    parsed = 0
    for seed in range(6):
        try:
            done = client.chat.completions.parse(
                model=demo.service.model, messages=USER, response_format=Plan, seed=seed, max_tokens=300
            )
        except openai.LengthFinishReasonError:
            continue
        plan = done.choices[0].message.parsed
        assert isinstance(plan, Plan) and len(plan.steps) <= 2
        parsed += 1
    assert parsed >= 3


def test_a_streamed_schema_is_parsed_by_the_clients_helper(demo):
    client = client_of(demo.url)
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    with client.chat.completions.stream(
        model=demo.service.model, messages=USER, response_format=form, max_tokens=60, n=2
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    for choice in final.choices:
        assert choice.finish_reason == "stop" and set(json.loads(choice.message.content)) == {"a"}


COUNT = 1000 if os.environ.get("HALO_TEST_SLOW") else 200


def test_answers_to_random_schemas_obey_them(demo):
    """The demo model at a temperature of its own choice; the judge is jsonschema."""
    checker = jsonschema.FormatChecker(["date", "uuid", "ipv4"])
    ended = 0
    with httpx.Client(timeout=120) as client:
        for seed in range(COUNT):
            schema = random_schema(random.Random(seed), depth=1)
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            body = {"messages": USER, "response_format": form, "seed": seed, "max_tokens": 150,
                    "temperature": (seed % 5) / 2}  # fmt: skip
            answer = client.post(f"{demo.url}/v1/chat/completions", json=body)
            assert answer.status_code == 200, (schema, answer.text)
            choice = answer.json()["choices"][0]
            assert choice["finish_reason"] in ("stop", "length")
            if choice["finish_reason"] == "stop":
                ended += 1
                jsonschema.validate(json.loads(choice["message"]["content"]), schema, format_checker=checker)
    assert ended > COUNT / 2


def test_a_schemas_answer_cut_by_the_limit_is_length_and_no_error(demo):
    form = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "string", "minLength": 99}},
    }
    body = {"messages": USER, "response_format": form, "max_tokens": 5}
    choice = post(demo.url, "/v1/chat/completions", body).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith('"')


def test_a_grammar_that_fails_midway_fails_its_request_alone(demo, monkeypatch):
    """llguidance has limits of its own: what goes beyond them is an error with a reason, and no more."""
    from engine.errors import HaloError
    from engine.grammar import GrammarConstraint

    masks, real = [], GrammarConstraint.mask

    def mask(self):
        masks.append(1)
        if len(masks) > 3:
            raise HaloError("The grammar of this answer became too complex.", hint="ask for less")
        return real(self)

    form = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "string", "minLength": 99}},
    }
    body = {"messages": USER, "response_format": form, "max_tokens": 30}
    with monkeypatch.context() as patch:
        patch.setattr(GrammarConstraint, "mask", mask)
        whole = post(demo.url, "/v1/chat/completions", body)
        stream = post(demo.url, "/v1/chat/completions", body | {"stream": True})
    assert whole.status_code == 500 and "too complex" in whole.json()["error"]["message"]
    assert stream.status_code == 200 and "too complex" in stream.text
    assert stream.text.endswith("data: [DONE]\n\n")
    assert post(demo.url, "/v1/chat/completions", body).status_code == 200


def test_json_object_is_json(demo):
    for seed in range(5):
        body = {"messages": USER, "response_format": {"type": "json_object"}, "max_tokens": 120, "seed": seed}
        choice = post(demo.url, "/v1/chat/completions", body).json()["choices"][0]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)


# --- log probabilities


def test_logprobs_are_the_models_own_and_their_bytes_are_the_text(demo):
    client = client_of(demo.url)
    create = client.chat.completions.create
    asked = dict(model=demo.service.model, messages=USER, max_tokens=12, logprobs=True, seed=3)
    done = create(**asked, top_logprobs=4, temperature=0)
    content = done.choices[0].logprobs.content
    assert len(content) == done.usage.completion_tokens
    text = b"".join(bytes(token.bytes) for token in content).decode()
    assert text.strip() == done.choices[0].message.content.strip()
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 4
        values = [top.logprob for top in token.top_logprobs]
        assert values == sorted(values, reverse=True) and math.isclose(values[0], token.logprob)
        assert sum(math.exp(value) for value in values) <= 1 + 1e-6
    none = create(**asked, temperature=0)
    assert [t.logprob for t in none.choices[0].logprobs.content] == [t.logprob for t in content]
    assert all(t.top_logprobs == [] for t in none.choices[0].logprobs.content)
    # Of the model itself: a bias changes what is chosen and not what it is worth.
    biased = create(**asked, temperature=0, logit_bias={str(TOKENIZER.encode("x")[0]): -100})
    assert biased.choices[0].logprobs.content[0].logprob <= 0
    assert create(model=demo.service.model, messages=USER, max_tokens=2).choices[0].logprobs is None


@pytest.mark.parametrize("n", [1, 2])
def test_a_streams_logprobs_are_those_of_the_whole_answer(demo, n):
    create = client_of(demo.url).chat.completions.create
    asked = dict(
        model=demo.service.model, messages=USER, max_tokens=12, logprobs=True, top_logprobs=1, seed=3, n=n
    )
    whole = create(**asked)
    tokens: dict[int, list[str]] = {index: [] for index in range(n)}
    for chunk in create(**asked, stream=True):
        for choice in chunk.choices:
            tokens[choice.index] += [t.token for t in choice.logprobs.content] if choice.logprobs else []
    for choice in whole.choices:
        assert tokens[choice.index] == [t.token for t in choice.logprobs.content]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_that_a_stop_string_took_have_no_logprobs(stream):
    with says("the EEEND of it") as server:
        create = client_of(server.url).chat.completions.create
        asked = dict(**CHAT, stop="EEND", logprobs=True)
        if stream:
            chunks = list(create(**asked, stream=True))
            tokens = [t.token for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
        else:
            tokens = [t.token for t in create(**asked).choices[0].logprobs.content]
    assert "".join(tokens) == "the E"


def test_bytes_of_half_a_character_are_its_own():
    with says("é") as server:
        content = client_of(server.url).chat.completions.create(**CHAT, logprobs=True).choices[0].logprobs
    assert [token.bytes for token in content.content] == [[0xC3], [0xA9]]


# --- sampling


def test_the_fields_of_sampling_reach_the_engine(demo):
    """A bias that forces a token, a penalty that forbids repeats, min_p that leaves the likeliest."""
    create = client_of(demo.url).chat.completions.create
    forced = TOKENIZER.size - 1 if TOKENIZER.size < demo.service.engine.tokenizer.size else 65
    asked = dict(model=demo.service.model, messages=USER, max_tokens=6, extra_body={"return_token_ids": True})
    only = create(**asked, temperature=0, logit_bias={str(forced): 100})
    assert set(only.choices[0].token_ids) == {forced}
    greedy = create(**asked, temperature=0).choices[0].token_ids
    extra = {"return_token_ids": True, "min_p": 1.0}
    assert create(**{**asked, "extra_body": extra}, temperature=1.5, seed=1).choices[0].token_ids == greedy
    penalised = create(**asked, temperature=0, logit_bias={str(forced): 60}, frequency_penalty=2)
    assert penalised.choices[0].token_ids[0] == forced
    extra = {"return_token_ids": True, "ignore_eos": True}
    long = create(**{**asked, "max_tokens": 90, "extra_body": extra}, temperature=0)
    assert long.choices[0].finish_reason == "length" and len(long.choices[0].token_ids) == 90


def test_usage_tells_what_was_cached(demo):
    messages = [{"role": "user", "content": "A text that is long enough to be found again. " * 8}]
    create = client_of(demo.url).chat.completions.create
    first = create(model=demo.service.model, messages=messages, max_tokens=2)
    again = create(model=demo.service.model, messages=messages, max_tokens=2)
    assert again.usage.prompt_tokens == first.usage.prompt_tokens
    details = again.usage.prompt_tokens_details
    assert first.usage.prompt_tokens // 2 < details.cached_tokens < again.usage.prompt_tokens


def test_a_conversation_is_the_continuation_of_its_rendered_prompt(demo):
    asked = {"temperature": 0, "max_tokens": 10, "return_token_ids": True}
    chat = post(demo.url, "/v1/chat/completions", {"messages": USER, **asked}).json()
    prompt = post(demo.url, "/tokenize", {"messages": USER}).json()["tokens"]
    text = post(demo.url, "/v1/completions", {"prompt": prompt, **asked}).json()
    assert chat["choices"][0]["token_ids"] == text["choices"][0]["token_ids"]


def test_what_is_asked_together_is_answered_as_alone(demo):
    """Schemas, forced calls, log probabilities, penalties and bias in one batch: the same to the bit."""
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": Plan.model_json_schema()}}
    kinds = (
        {"response_format": schema, "max_tokens": 60},
        {"tools": TOOLS, "tool_choice": "required", "max_tokens": 40},
        {"logprobs": True, "top_logprobs": 3, "max_tokens": 12},
        {"frequency_penalty": 1, "repetition_penalty": 1.2, "max_tokens": 20},
        {"logit_bias": {"70": 3}, "min_p": 0.05, "n": 2, "max_tokens": 20},
    )
    bodies = [
        {"messages": USER, "seed": seed, "return_token_ids": True, "temperature": (seed % 3) / 2} | kind
        for seed in range(3)
        for kind in kinds
    ]

    def ask(body: dict) -> list:
        choices = post(demo.url, "/v1/chat/completions", body).json()["choices"]
        return [(choice["token_ids"], choice["finish_reason"], choice["logprobs"]) for choice in choices]

    alone = [ask(body) for body in bodies]
    order = random.Random(1).sample(range(len(bodies)), len(bodies))
    with ThreadPoolExecutor(8) as pool:
        together = dict(zip(order, pool.map(lambda i: ask(bodies[i]), order), strict=True))
    assert [together[i] for i in range(len(bodies))] == alone


def test_a_prompt_that_is_too_long_is_told_in_openais_words(demo):
    messages = [{"role": "user", "content": "word " * 30_000}]
    with pytest.raises(openai.BadRequestError) as info:
        client_of(demo.url).chat.completions.create(model=demo.service.model, messages=messages)
    assert info.value.code == "context_length_exceeded" and info.value.param == "messages"
    assert "maximum context length is" in info.value.message


# --- streams


def test_a_stream_is_events_that_end_with_done(plain):
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    raw = post(plain.url, "/v1/chat/completions", body)
    assert raw.headers["content-type"].startswith("text/event-stream")
    events = raw.text.split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert chunks[-2]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] >= 0
    assert len({chunk["id"] for chunk in chunks}) == 1 and all(
        c["object"] == "chat.completion.chunk" for c in chunks
    )
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "Grüße, 🌍! The end."


def test_ids_of_tokens_are_lost_in_no_stream():
    ids = []
    with says(TWO_CALLS) as server:
        for chunk in client_of(server.url).chat.completions.create(
            **CHAT, tools=TOOLS, stream=True, extra_body={"return_token_ids": True}
        ):
            ids += chunk.choices[0].token_ids
    assert ids[:-1] == byte_tokens(TWO_CALLS.encode())
