"""The tables of the fields beside OpenAI's are true, and docs/api-fields.md is what the tables say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_params

from engine.server.fields import FIELDS, Field
from engine.server.other_fields import (
    COUNT,
    LEMONADE_CHAT,
    LEMONADE_COMPLETIONS,
    MESSAGES,
    OTHER_FIELDS,
    PPL,
)
from tests import api_fields
from tests.engine.server_fixtures import EOT, ScriptedSession, byte_tokens, make_engine, running

PAGE = Path(__file__).parents[2] / "docs" / "api-fields.md"
TURNS = [{"role": "user", "content": "hi"}]
BASES: dict[str, dict[str, Any]] = {
    MESSAGES: {"model": "halo-test", "messages": TURNS, "max_tokens": 20, "temperature": 0},
    COUNT: {"model": "halo-test", "messages": TURNS},
    PPL: {"text": "A text that is scored, word after word."},
    LEMONADE_CHAT: {"messages": TURNS, "max_tokens": 2},
    LEMONADE_COMPLETIONS: {"prompt": "hi", "max_tokens": 2},
}
TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {}}}
FORMAT = {
    "type": "json_schema",
    "schema": {"type": "object", "properties": {}, "additionalProperties": False},
}
SAMPLES: dict[str, Any] = {
    "model": "claude-x", "messages": [*TURNS, {"role": "assistant", "content": "So"}],
    "messages.content": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    "system": [{"type": "text", "text": "x"}], "tools": [TOOL], "tool_choice": {"type": "auto"},
    "output_config.format": {"format": FORMAT}, "output_format": FORMAT, "max_tokens": 3, "temperature": 0.5,
    "top_p": 0.5, "top_k": 3, "stop_sequences": ["zz"], "stream": False, "repeat_penalty": 1.2,
    "text": "another text", "stride": 7, "window": 9,
}  # fmt: skip
WRONG: dict[str, Any] = {"model": 5, "messages.content": [{"role": "user", "content": [{"type": "image"}]}]}
CLIENT = httpx.Client(verify=False, timeout=60)  # one, for certificates take their time to load
ANY: tuple[Any, ...] = ("x", 1, True, {"a": 1}, [1], ["x"], {})


@pytest.fixture(scope="module")
def server():
    session = ScriptedSession([*byte_tokens(b"{}"), EOT])
    with running(make_engine(session)) as running_server:
        yield running_server


def ask(server, endpoint: str, more: dict[str, Any]) -> httpx.Response:
    return CLIENT.post(server.url + endpoint, json=BASES[endpoint] | more)


def of(*fates: str) -> list[Field]:
    return [field for field in OTHER_FIELDS if field.fate in fates]


def known_to(kind: Any) -> set[str]:
    return set(kind.__required_keys__) | set(kind.__optional_keys__)


def test_every_field_that_anthropics_client_knows_is_in_the_table():
    tables = {
        MESSAGES: (
            message_create_params.MessageCreateParamsNonStreaming,
            beta_params.MessageCreateParamsNonStreaming,
        ),
        COUNT: (message_count_tokens_params.MessageCountTokensParams,),
    }
    for endpoint, kinds in tables.items():
        known = {field.name.split(".")[0] for field in OTHER_FIELDS if field.endpoint == endpoint}
        assert set().union(*(known_to(kind) for kind in kinds)) - known == set()


def test_no_field_is_told_twice():
    names = [(field.endpoint, field.name) for field in OTHER_FIELDS]
    assert len(names) == len(set(names))
    assert all(field.note and not field.note.endswith(".") for field in OTHER_FIELDS)


def test_the_page_is_what_the_tables_say():
    """Each row of the page is read back: its field, its fate."""
    text = PAGE.read_text("utf-8")
    assert text == api_fields.page(), "python3 -m tests.api_fields > docs/api-fields.md"
    found: list[tuple[str, str, str]] = []
    endpoint = ""
    for line in text.splitlines():
        if line.startswith("## "):
            endpoint = line.removeprefix("## ")
        elif row := re.match(r"\| `([^`]+)` \| (honoured|refused|ignored) \| .+ \|$", line):
            found.append((endpoint, row[1], row[2]))
    assert sorted(found) == sorted((f.endpoint, f.name, f.fate) for f in (*FIELDS, *OTHER_FIELDS))


@pytest.mark.parametrize("field", of("refused"), ids=lambda field: f"{field.endpoint} {field.name}")
def test_what_is_refused_is_refused_by_its_name(server, field):
    for value in ANY:
        answer = ask(server, field.endpoint, {field.name: value})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["message"].startswith(f"{field.name}: ")
    for value in field.harmless:
        assert ask(server, field.endpoint, {field.name: value}).status_code == 200


@pytest.mark.parametrize("field", of("ignored"), ids=lambda field: f"{field.endpoint} {field.name}")
def test_what_is_ignored_changes_nothing(server, field):
    head, _, rest = field.name.partition(".")
    plain = ask(server, field.endpoint, {}).json()
    for value in ANY:
        answer = ask(server, field.endpoint, {head: {rest: value} if rest else value})
        assert answer.status_code == 200, answer.text
        assert answer.json().get("content") == plain.get("content")
        assert answer.json().get("input_tokens") == plain.get("input_tokens")


@pytest.mark.parametrize("field", of("honoured"), ids=lambda field: f"{field.endpoint} {field.name}")
def test_what_is_honoured_is_taken_and_looked_at(server, field):
    head, _, rest = field.name.partition(".")
    more = {"tools": [TOOL]} if head == "tool_choice" else {}
    if field.endpoint != PPL:  # the session behind this server is a script, which scores nothing
        taken = ask(server, field.endpoint, more | {head: SAMPLES[field.name]})
        assert taken.status_code == 200, taken.text
    wrong = WRONG.get(field.name, {"format": 5} if rest == "format" else {"no": []})
    refused = ask(server, field.endpoint, more | {head: wrong})
    assert refused.status_code == 400, refused.text
    assert head.removeprefix("repeat") in refused.json()["error"]["message"] or head == "repeat_penalty"
