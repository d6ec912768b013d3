"""The openai and anthropic clients, unmodified, through suites of their own calls on the native engine."""

from __future__ import annotations

import asyncio
import json

import anthropic
import openai
import pytest
from pydantic import BaseModel

ASK = [{"role": "user", "content": "How do I list the files of a folder?"}]
MODEL = "halo-demo"
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Bern", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "weather", "description": "The weather of a city", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
WEATHER = {"name": "weather", "description": "The weather of a city", "input_schema": PARAMETERS}


class Verdict(BaseModel):
    sure: bool
    score: int


@pytest.fixture(scope="module")
def client(live: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def claude(live: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=live, api_key="none", max_retries=0, timeout=120)


# --- openai


def test_openai_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_openai_chat_greedy_and_seeded_are_repeatable_and_streams_say_the_same(client: openai.OpenAI) -> None:
    for how in (
        {"temperature": 0},
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0.8, "top_p": 0.9, "seed": 1},
    ):
        ask = {"model": MODEL, "messages": ASK, "max_tokens": 24, **how}
        whole = client.chat.completions.create(**ask)
        assert client.chat.completions.create(**ask).choices[0].message == whole.choices[0].message
        with client.chat.completions.stream(**ask) as stream:
            for _ in stream:
                pass
            final = stream.get_final_completion()
        assert final.choices[0].message.content == whole.choices[0].message.content
        assert final.choices[0].finish_reason == whole.choices[0].finish_reason


def test_openai_chat_parses_an_answer_of_a_schema(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Verdict, max_tokens=60)
    assert isinstance(found.choices[0].message.parsed, Verdict)


def test_openai_chat_calls_a_function_and_takes_its_result(client: openai.OpenAI) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    ask = {"model": MODEL, "messages": ASK, "tools": [TOOL], "max_tokens": 60}
    for choice in ("required", named):
        done = client.chat.completions.create(**ask, tool_choice=choice)
        (call, *_) = done.choices[0].message.tool_calls
        assert done.choices[0].finish_reason == "tool_calls" and call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Bern", "Rome")
    with client.chat.completions.stream(**ask, tool_choice=named) as stream:
        kinds = {event.type for event in stream}
        called = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert "tool_calls.function.arguments.delta" in kinds and called.function.name == "weather"
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    turns = [*ASK, done.choices[0].message.model_dump(exclude_none=True), result]
    assert client.chat.completions.create(**{**ask, "messages": turns}).choices[0].message.role == "assistant"


def test_openai_chat_log_probabilities_and_choices(client: openai.OpenAI) -> None:
    ask = {"model": MODEL, "messages": ASK, "max_tokens": 5, "n": 3, "seed": 2}
    done = client.chat.completions.create(**ask, logprobs=True, top_logprobs=4)
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    for choice in done.choices:
        assert "".join(t.token for t in choice.logprobs.content).strip() == choice.message.content.strip()
        assert all(len(token.top_logprobs) == 4 and token.logprob <= 0 for token in choice.logprobs.content)


def test_openai_completions_echo_and_score(client: openai.OpenAI) -> None:
    text = "Once upon a time"
    scored = client.completions.create(model=MODEL, prompt=text, max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == text and scored.choices[0].logprobs.token_logprobs[0] is None
    ids = [0, 5205, 694, 260, 581]
    done = client.completions.create(model=MODEL, prompt=[ids, ids], max_tokens=4, temperature=0)
    assert done.choices[0].text == done.choices[1].text and len(done.choices) == 2
    chunks = client.completions.create(model=MODEL, prompt=ids, max_tokens=4, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == done.choices[0].text


def test_openai_responses(client: openai.OpenAI) -> None:
    # Of an answer that a limit cuts the client's stream helper makes none, as of OpenAI's own.
    ask = {"model": MODEL, "input": ASK[0]["content"], "max_output_tokens": 400, "temperature": 0}
    whole = client.responses.create(**ask)
    with client.responses.stream(**ask) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == whole.output_text and "response.output_text.delta" in kinds
    parsed = client.responses.parse(model=MODEL, input="Sure?", text_format=Verdict, max_output_tokens=60)
    assert isinstance(parsed.output_parsed, Verdict)


def test_openai_errors_are_its_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 4000}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=ASK, temperature=3)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nothing", messages=ASK)


def test_openai_asynchronous_streams_side_by_side(live: str) -> None:
    async def one(client: openai.AsyncOpenAI, seed: int) -> str:
        ask = {"model": MODEL, "messages": ASK, "max_tokens": 16, "seed": seed % 2, "stream": True}
        return "".join(
            [
                chunk.choices[0].delta.content or ""
                async for chunk in await client.chat.completions.create(**ask)
            ]
        )

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, seed) for seed in range(8)))

    texts = asyncio.run(all_of_them())
    assert len(set(texts[::2])) == 1 == len(set(texts[1::2]))


# --- anthropic


def test_anthropic_messages_and_streams_say_the_same(claude: anthropic.Anthropic) -> None:
    # The client's newest versions have no temperature any more; the ones before send it.
    ask = {"model": MODEL, "messages": ASK, "max_tokens": 24, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**ask)
    with claude.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert final.stop_reason == whole.stop_reason and final.usage.output_tokens == whole.usage.output_tokens
    raw = [event.type for event in claude.messages.create(**ask, stream=True)]
    assert raw[0] == "message_start" and raw[-1] == "message_stop"


def test_anthropic_finds_its_system_prompt_in_the_cache(claude: anthropic.Anthropic) -> None:
    text = "You answer questions about files and folders, in short sentences. " * 8
    cached = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    ask = {"model": MODEL, "system": cached, "max_tokens": 4}
    claude.messages.create(**ask, messages=ASK)
    usage = claude.messages.create(**ask, messages=[{"role": "user", "content": "And now?"}]).usage
    counted = claude.messages.count_tokens(
        model=MODEL, system=cached, messages=[{"role": "user", "content": "And now?"}]
    )
    assert usage.cache_read_input_tokens > counted.input_tokens // 2
    assert usage.input_tokens + usage.cache_read_input_tokens == counted.input_tokens


def test_anthropic_calls_a_tool_and_takes_its_result(claude: anthropic.Anthropic) -> None:
    ask = {"model": MODEL, "messages": ASK, "max_tokens": 80, "tools": [WEATHER]}
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}):
        with claude.messages.stream(**ask, tool_choice=choice) as stream:
            message = stream.get_final_message()
        call = message.content[0]
        assert message.stop_reason == "tool_use" and call.type == "tool_use"
        assert call.input["city"] in ("Bern", "Rome")
    assert len(message.content) == 1
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    turns = [*ASK, message.to_param(), {"role": "user", "content": [result]}]
    assert claude.messages.create(**{**ask, "messages": turns}).role == "assistant"


def test_anthropic_answers_of_a_schema(claude: anthropic.Anthropic) -> None:
    parsed = claude.messages.parse(model=MODEL, messages=ASK, max_tokens=60, output_format=Verdict)
    assert isinstance(parsed.parsed_output, Verdict)
    schema = {"type": "json_schema", "schema": {**Verdict.model_json_schema(), "additionalProperties": False}}
    done = claude.messages.create(
        model=MODEL, messages=ASK, max_tokens=60, extra_body={"output_config": {"format": schema}}
    )
    Verdict.model_validate_json(done.content[0].text)


def test_anthropic_beta_messages_of_the_client(claude: anthropic.Anthropic) -> None:
    done = claude.beta.messages.create(
        model=MODEL,
        messages=ASK,
        max_tokens=8,
        betas=["context-management-2025-06-27"],
        context_management={"edits": [{"type": "clear_tool_uses_20250919"}]},
    )
    assert done.content[0].text


def test_anthropic_errors_are_its_own_exceptions(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: "):
        claude.messages.create(
            model=MODEL, max_tokens=5, messages=[{"role": "user", "content": "word " * 4000}]
        )
    with pytest.raises(anthropic.NotFoundError) as missing:
        claude.messages.create(model="nothing", max_tokens=5, messages=ASK)
    assert missing.value.type == "not_found_error" and missing.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        claude.messages.create(model=MODEL, max_tokens=5, messages=ASK, extra_body={"temperature": 2})


def test_anthropic_asynchronous(live: str) -> None:
    async def ask() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=live, api_key="none", max_retries=0) as client,
            client.messages.stream(model=MODEL, max_tokens=12, messages=ASK) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(ask())
