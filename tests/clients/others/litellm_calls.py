"""litellm's own calls against a server, through its OpenAI and its Anthropic provider, unmodified."""

from __future__ import annotations

import asyncio
import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices

import litellm
from calls import run

litellm.suppress_debug_info = True
ASK = [{"role": "user", "content": "How do I list the files of a folder?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Bern", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def to(url: str, model: str) -> dict:
    return {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none", "max_retries": 0}


def to_anthropic(url: str, model: str) -> dict:
    return {"model": f"anthropic/{model}", "api_base": url, "api_key": "none", "max_retries": 0}


def check_a_completion(url: str, model: str) -> None:
    done = litellm.completion(**to(url, model), messages=ASK, max_tokens=20, temperature=0)
    assert done.choices[0].message.content and done.choices[0].finish_reason in ("stop", "length")
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    again = litellm.completion(**to(url, model), messages=ASK, max_tokens=20, temperature=0)
    assert again.choices[0].message.content == done.choices[0].message.content


def check_a_stream_says_the_same(url: str, model: str) -> None:
    ask = {**to(url, model), "messages": ASK, "max_tokens": 20, "temperature": 0}
    whole = litellm.completion(**ask)
    chunks = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    built = litellm.stream_chunk_builder(chunks, messages=ASK)
    assert built.usage.completion_tokens == whole.usage.completion_tokens


def check_asynchronous_side_by_side(url: str, model: str) -> None:
    async def all_of_them() -> list:
        ask = {**to(url, model), "messages": ASK, "max_tokens": 12, "temperature": 0.7, "seed": 3}
        return await asyncio.gather(*(litellm.acompletion(**ask) for _ in range(4)))

    texts = {done.choices[0].message.content for done in asyncio.run(all_of_them())}
    assert len(texts) == 1


def check_n_and_stop(url: str, model: str) -> None:
    ask = {**to(url, model), "messages": ASK, "max_tokens": 16, "n": 3, "temperature": 1.0, "seed": 1}
    done = litellm.completion(**ask)
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    stopped = litellm.completion(**to(url, model), messages=ASK, temperature=0, stop=[" "], max_tokens=16)
    assert " " not in stopped.choices[0].message.content.strip()


def check_log_probabilities(url: str, model: str) -> None:
    ask = {**to(url, model), "messages": ASK, "max_tokens": 4, "temperature": 0}
    done = litellm.completion(**ask, logprobs=True, top_logprobs=3)
    for token in done.choices[0].logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.logprob == max(top.logprob for top in token.top_logprobs)


def check_an_answer_of_a_schema(url: str, model: str) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "string", "maxLength": 12}, "sure": {"type": "boolean"}},
        "required": ["answer", "sure"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
    done = litellm.completion(**to(url, model), messages=ASK, response_format=wanted, max_tokens=80)
    found = json.loads(done.choices[0].message.content)
    assert set(found) == {"answer", "sure"} and isinstance(found["sure"], bool)


def check_a_forced_call(url: str, model: str) -> None:
    forced = {"type": "function", "function": {"name": "weather"}}
    ask = {**to(url, model), "messages": ASK, "tools": [WEATHER], "tool_choice": forced, "max_tokens": 60}
    done = litellm.completion(**ask)
    call = done.choices[0].message.tool_calls[0]
    assert call.function.name == "weather" and done.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["city"] in ("Bern", "Rome")
    chunks = list(litellm.completion(**ask, stream=True))
    built = litellm.stream_chunk_builder(chunks, messages=ASK)
    assert json.loads(built.choices[0].message.tool_calls[0].function.arguments)["city"] in ("Bern", "Rome")
    turns = [
        *ASK,
        done.choices[0].message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert litellm.completion(**{**ask, "messages": turns, "tool_choice": "none"}, stream=False).choices


def check_text_completions(url: str, model: str) -> None:
    ask = {**to(url, model), "model": f"text-completion-openai/{model}", "prompt": "Once upon a time"}
    done = litellm.text_completion(**ask, max_tokens=8, temperature=0, logprobs=2)
    assert done.choices[0].text
    stream = litellm.text_completion(**ask, max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text or "" for chunk in stream) == done.choices[0].text


def check_errors_are_its_own(url: str, model: str) -> None:
    long = [{"role": "user", "content": "word " * 4000}]
    for name, ask, kind in (
        ("too long", {**to(url, model), "messages": long}, litellm.ContextWindowExceededError),
        ("too long", {**to_anthropic(url, model), "messages": long}, litellm.ContextWindowExceededError),
        ("no model", {**to(url, "nothing"), "messages": ASK}, litellm.NotFoundError),
        ("no model", {**to_anthropic(url, "nothing"), "messages": ASK}, litellm.NotFoundError),
        ("bad value", {**to(url, model), "messages": ASK, "temperature": 9.0}, litellm.BadRequestError),
    ):
        try:
            litellm.completion(**ask, max_tokens=5)
        except kind:
            continue
        raise AssertionError(f"{name}: no {kind.__name__}")


def check_the_anthropic_provider(url: str, model: str) -> None:
    ask = {**to_anthropic(url, model), "messages": ASK, "max_tokens": 16, "temperature": 0}
    done = litellm.completion(**ask)
    assert done.choices[0].message.content and done.usage.prompt_tokens > 0
    chunks = list(litellm.completion(**ask, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == done.choices[0].message.content
    forced = {"type": "function", "function": {"name": "weather"}}
    called = litellm.completion(**{**ask, "max_tokens": 60}, tools=[WEATHER], tool_choice=forced)
    call = called.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments)["city"] in ("Bern", "Rome")
    stream = list(
        litellm.completion(**{**ask, "max_tokens": 60}, tools=[WEATHER], tool_choice=forced, stream=True)
    )
    built = litellm.stream_chunk_builder(stream, messages=ASK)
    assert json.loads(built.choices[0].message.tool_calls[0].function.arguments)["city"] in ("Bern", "Rome")


def check_the_responses_api(url: str, model: str) -> None:
    done = litellm.responses(**to(url, model), input="Hello", max_output_tokens=16, temperature=0)
    assert done.output[0].content[0].text
    events = list(litellm.responses(**to(url, model), input="Hello", max_output_tokens=16, stream=True))
    assert events[-1].type in ("response.completed", "response.incomplete")


if __name__ == "__main__":
    run(globals())
