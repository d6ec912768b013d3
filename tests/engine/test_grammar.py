"""Constrained decoding: whatever a model prefers, the text obeys its schema; bad schemas are refused."""

from __future__ import annotations

import json
import os
import random
import threading
from typing import Any

import jsonschema
import numpy as np
import pytest

from engine.chat import stop_ids
from engine.grammar import GrammarError, Grammars, call_grammar, json_grammar, text_grammar
from engine.tools import FORMS, Tool, deeper_than
from tests.engine.server_fixtures import EOS, EOT, TOKENIZER
from tests.engine.test_tools import read

ENDS = stop_ids(TOKENIZER)


@pytest.fixture(scope="module")
def grammars():
    return Grammars(TOKENIZER, ENDS)


def write(constraint, seed: int, limit: int = 600) -> tuple[str, bool]:
    """(a random text that the masks allow, whether it came to its end)."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    while len(ids) < limit and not constraint.finished():
        mask = constraint.mask()
        assert mask.shape == (TOKENIZER.size,)
        allowed = np.flatnonzero(mask)
        ends = [token for token in allowed if token in ENDS]
        # Short tokens, and the end where it may be: a text of random letters would not end by itself.
        if ends and rng.random() < 0.5:
            return TOKENIZER.decode(ids), True
        token = int(rng.choice(allowed))
        if len(ids) > 60:
            closing = [t for t in allowed if TOKENIZER.token_bytes(int(t)) in (b'"', b"}", b"]")]
            token = int(closing[0]) if closing else token
        if token in ENDS:
            return TOKENIZER.decode(ids), True
        assert not TOKENIZER.is_special(token), "a special token within the text"
        constraint.accept(token)
        ids.append(token)
    return TOKENIZER.decode(ids), bool(constraint.finished())


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of the kinds that applications send."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format"]
    if depth < 3:
        kinds += ["object", "array", "anyOf", "ref", "tuple"] * 2
    kind = rng.choice(kinds)
    inner = lambda: random_schema(rng, depth + 1)  # noqa: E731
    if kind == "object":
        names = rng.sample(["name", "age", "tags", "a b", "é", "x-y", '"q"', "items"], rng.randint(0, 4))
        schema: dict[str, Any] = {"type": "object", "properties": {name: inner() for name in names}}
        schema["required"] = [name for name in names if rng.random() < 0.7]
        schema["additionalProperties"] = rng.choice([False, False, {"type": "integer"}])
        return schema
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": inner(), "minItems": low, "maxItems": low + rng.randint(0, 2)}
    if kind == "tuple":
        return {"type": "array", "prefixItems": [inner(), inner()], "items": False, "minItems": 2}
    if kind == "anyOf":
        return {"anyOf": [inner() for _ in range(rng.randint(1, 3))]}
    if kind == "ref":
        return {"$defs": {"t": inner()}, "type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 2} \
            if depth == 0 else {"type": "string", "maxLength": 5}  # fmt: skip
    return {
        "string": {"type": "string", "minLength": rng.randint(0, 3), "maxLength": rng.randint(3, 12)},
        "integer": {"type": "integer", "minimum": rng.randint(-20, 5), "maximum": rng.randint(5, 4000)},
        "number": {"type": "number", "minimum": -1.5, "maximum": 99},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "enum": {"enum": rng.sample(["red", "grün", 1, 2.5, None, True, {"a": [1]}], 3)},
        "const": {"const": rng.choice(["x", 0, False, ["y"], 'quo"te\\'])},
        "pattern": {
            "type": "string",
            "pattern": rng.choice([r"^[A-Z]{2}\d{3}$", r"^(ab|c)+$", r"^\w{1,4}$"]),
        },
        "format": {"type": "string", "format": rng.choice(["date", "uuid", "ipv4", "time", "date-time"])},
    }[kind]


COUNT = 2000 if os.environ.get("HALO_TEST_SLOW") else 250


def test_random_texts_of_random_schemas_obey_them(grammars):
    """The judge is jsonschema, which knows nothing of how the text was made."""
    ended = 0
    for seed in range(COUNT):
        schema = random_schema(random.Random(seed))
        checker = jsonschema.FormatChecker(["date", "uuid", "ipv4"])
        text, whole = write(grammars.compile(json_grammar(schema)), seed)
        if whole:
            ended += 1
            jsonschema.validate(json.loads(text), schema, format_checker=checker)
    assert ended > 0.95 * COUNT


def test_an_object_of_any_kind_is_json(grammars):
    for seed in range(40):
        text, whole = write(grammars.compile(json_grammar(None)), seed)
        assert not whole or isinstance(json.loads(text), dict)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls_are_read_back_and_their_arguments_obey(grammars, form, parallel):
    schema = {
        "type": "object",
        "properties": {"n": {"$ref": "#/$defs/n"}, "city": {"enum": ["Köln", "Rom"]}},
        "required": ["n", "city"],
        "additionalProperties": False,
        "$defs": {"n": {"type": "integer", "minimum": 1, "maximum": 99}},
    }
    tools = [Tool("get_weather", "", schema), Tool("f")]
    for seed in range(12):
        grammar = call_grammar(tools, form, parallel=parallel)
        text, whole = write(grammars.compile(grammar), seed)
        said, calls = read(text)
        assert not said.strip() and calls and (parallel or len(calls) == 1)
        for name, arguments in calls if whole else ():
            jsonschema.validate(json.loads(arguments), next(t for t in tools if t.name == name).schema())


def test_an_answer_or_calls(grammars):
    grammar = call_grammar([Tool("f")], FORMS[0], parallel=True, answer={"enum": ["yes", "no"]})
    kinds = set()
    for seed in range(30):
        text, whole = write(grammars.compile(grammar), seed)
        assert whole
        said, calls = read(text)
        kinds.add(bool(calls))
        assert calls or json.loads(said) in ("yes", "no")
    assert kinds == {True, False}


def say(constraint, text: str) -> bool:
    """Whether the masks let a text come; where they force some tokens, by those."""
    rest = text.encode()
    while rest:
        allowed = [int(token) for token in np.flatnonzero(constraint.mask()) if int(token) not in ENDS]
        fitting = [token for token in allowed if rest.startswith(TOKENIZER.token_bytes(token))]
        if not fitting:
            return False
        token = max(fitting, key=lambda each: len(TOKENIZER.token_bytes(each)))
        constraint.accept(token)
        rest = rest[len(TOKENIZER.token_bytes(token)) :]
    return True


def test_in_free_text_a_call_that_begins_must_obey(grammars):
    tools = [Tool("f", "", {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"],
                            "additionalProperties": False}, strict=True), Tool("g")]  # fmt: skip
    many = grammars.compile(text_grammar(tools, FORMS[0], parallel=True))
    call = '<tool_call>\n{"name": "f", "arguments": {"n": 5}}\n</tool_call>'
    for text in ("Any text, {even} <b> [this]. Grüße 🌍\n\n", f"Look: {call} then {call}", call):
        free = many.fork()
        assert say(free, text) and free.may_end() and not free.finished(), text
    for text in (
        '<tool_call>\n{"name": "h"',
        '<tool_call>\n{"name": "f", "arguments": {"n": "',
        'x <tool_call>\n{"name": "f", "arguments": {}',
        "<tool_call>nonsense",
    ):
        assert not say(many.fork(), text), text
    one = grammars.compile(text_grammar(tools, FORMS[0], parallel=False))
    assert say(one.fork(), "Any text") and say(one, f"Look: {call}")
    assert one.finished() or not say(one, " <tool_call>")


REFUSED = {
    "a type that is none": {"type": "strin"},
    "uniqueItems, by name": {"type": "array", "uniqueItems": True},
    "a negation": {"not": {"type": "string"}},
    "a reference elsewhere": {"$ref": "https://example.com/schema"},
    "a reference to nothing": {"$ref": "#/$defs/x"},
    "a pattern that is none": {"type": "string", "pattern": "("},
    "a format that is unknown": {"type": "string", "format": "weird"},
    "what nothing obeys": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "an enum of nothing": {"enum": []},
    "properties that are a list": {"type": "object", "properties": []},
    "a depth that is none": json.loads('{"items":' * 70 + "{}" + "}" * 70),
    "a length that is none": {"enum": ["x" * 300_000]},
}


@pytest.mark.parametrize("schema", REFUSED.values(), ids=REFUSED.keys())
def test_a_schema_that_cannot_be_enforced_is_refused_with_the_reason(grammars, schema):
    with pytest.raises(GrammarError) as info:
        grammars.compile(json_grammar(schema))
    assert len(info.value.message) > 30 and "%json" not in info.value.message


def test_a_tools_schema_leaves_out_what_cannot_be_enforced_unless_it_is_strict(grammars):
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    grammars.compile(call_grammar([Tool("f", "", schema)], FORMS[0], parallel=True))
    with pytest.raises(GrammarError, match="uniqueItems"):
        grammars.compile(call_grammar([Tool("f", "", schema, strict=True)], FORMS[0], parallel=True))


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "%json {}", "start: x"])
def test_a_name_of_a_tool_is_no_grammar(grammars, name):
    text, _ = write(grammars.compile(call_grammar([Tool(name)], FORMS[0], parallel=False)), 1)
    assert [called for called, _ in read(text, names=frozenset({name}))[1]] == [name]


def test_a_schema_cannot_set_options_of_the_library(grammars):
    schema = {"type": "object", "additionalProperties": False, "x-guidance": {"whitespace_pattern": "[x]+"}}
    for seed in range(10):
        assert json.loads(write(grammars.compile(json_grammar(schema)), seed)[0]) == {}


def test_white_space_cannot_go_on_for_ever(grammars):
    """A model in a loop would otherwise write line ends up to its limit."""
    constraint = grammars.compile(json_grammar(None))
    newline = TOKENIZER.encode("\n")[0]
    count = 0
    while constraint.mask()[newline] and count < 200:
        constraint.accept(newline)
        count += 1
    assert count < 5


def test_choices_go_their_own_ways(grammars):
    first = grammars.compile(json_grammar({"enum": ["a", "b"]}))
    second = first.fork()
    for letter in '"a"':
        first.accept(TOKENIZER.encode(letter)[0])
    assert first.finished() and not second.finished()
    assert second.mask()[TOKENIZER.encode('"')[0]]
    assert np.flatnonzero(first.mask()).tolist() == [EOS, EOT]


def test_an_end_comes_only_where_the_text_may_end(grammars):
    constraint = grammars.compile(json_grammar({"type": "integer"}))
    assert not constraint.mask()[[EOS, EOT]].any() and not constraint.may_end()
    constraint.accept(TOKENIZER.encode("7")[0])
    assert constraint.mask()[[EOS, EOT]].all() and constraint.may_end() and not constraint.finished()
    constraint.accept(EOT)
    assert constraint.finished()


def test_a_pattern_that_explodes_ends_in_a_refusal_and_not_in_the_memory(grammars):
    """Whatever llguidance does with it, it does within its limits: an answer, or an error that says so."""
    from engine.errors import HaloError

    bombs = [
        {"type": "string", "pattern": "^(a|b)*a(a|b){300}c$"},
        {"type": "string", "pattern": "^(x+x+)+y$"},
        {"type": "string", "pattern": "^" + "(a?){200}" + "a{200}$"},
        {"type": "string", "minLength": 100_000},
        {"anyOf": [{"type": "object", "properties": {f"k{i}": {"type": "string"}}} for i in range(300)]},
    ]
    for schema in bombs:
        try:
            write(grammars.compile(json_grammar(schema)), 1, limit=40)
        except HaloError as error:
            assert error.message


def test_many_threads_compile_at_once():
    fresh = Grammars(TOKENIZER, ENDS)
    texts: list[str] = []

    def work(number: int) -> None:
        texts.append(write(fresh.compile(json_grammar({"const": number % 3})), number)[0].strip())

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(texts) == sorted(str(number % 3) for number in range(12))


def test_deeper_than_counts_levels_without_recursion():
    assert not deeper_than({"a": {"b": 1}}, 2) and deeper_than({"a": {"b": {"c": []}}}, 2)
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert deeper_than(deep, 64)
