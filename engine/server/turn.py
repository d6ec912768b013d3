"""What any chat API asks, as queued work: the prompt with its tools, the grammar, the answer's reader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from engine.chat import Message, answer_has_leading_space, call_form
from engine.grammar import GrammarConstraint, GrammarError, call_grammar, json_grammar
from engine.sampling import SamplingParams
from engine.sequence import Constraint
from engine.server.errors import ApiError
from engine.server.reading import ChoiceReader
from engine.server.runner import Work
from engine.server.service import Service, encode_chat
from engine.tool_parser import ToolParser
from engine.tools import Tool, ToolChoice

ANY_CALL: Final = ToolChoice()


@dataclass(frozen=True)
class Ask:
    """A conversation to answer. `schema` is what an answer obeys that calls no tool; None is any text."""

    turns: Sequence[Message]
    params: SamplingParams
    n: int = 1
    tools: Sequence[Tool] = ()
    choice: ToolChoice = ANY_CALL
    schema: dict[str, Any] | None = None


@dataclass(frozen=True)
class Names:
    """What the API calls the fields that may be at fault."""

    messages: str = "messages"
    tools: str = "tools"
    schema: str = "response_format"


CHAT_NAMES: Final = Names()


@dataclass(frozen=True)
class Prepared:
    """Ready to be submitted; `reader` makes a reader of one choice."""

    works: list[Work]
    prompt_tokens: int
    reader: Callable[[], ChoiceReader]


async def prepare(service: Service, ask: Ask, names: Names = Names()) -> Prepared:
    """The work of a conversation; raises ApiError where its prompt or schema cannot be."""
    tools = ask.choice.allowed(ask.tools)
    ids = await encode_chat(service, ask.turns, tools, names.messages)
    constraint = await _constraint(service, ask, tools, names)
    strip = constraint is not None or answer_has_leading_space(service.engine.card.chat_template)
    works = [
        Work(
            ids,
            ask.params,
            index=i,
            seed_index=i,
            strip_leading=strip,
            constraint=constraint,
        )
        for i in range(ask.n)
    ]
    called = frozenset(tool.name for tool in tools)

    def reader() -> ChoiceReader:
        parser = ToolParser(called, parallel=ask.choice.parallel) if called else None
        return ChoiceReader(service.engine.tokenizer, parser)

    return Prepared(works, len(ids), reader)


async def answer_constraint(
    service: Service, schema: dict[str, Any] | None, param: str = "response_format"
) -> Constraint | None:
    """The constraint of a schema; raises ApiError where it cannot be enforced."""
    if schema is None:
        return None
    try:
        return await asyncio.to_thread(service.grammars.compile, json_grammar(schema))
    except GrammarError as error:
        raise ApiError(400, error.message, param=param, code="invalid_json_schema") from error


async def _constraint(service: Service, ask: Ask, tools: Sequence[Tool], names: Names) -> Constraint | None:
    required = ask.choice.mode == "required"
    if not required and ask.schema is None:
        return None
    try:
        if ask.schema is not None and not required:
            return await asyncio.to_thread(_answer, service, ask, tools)
        return await asyncio.to_thread(_calls, service, ask, tools)
    except GrammarError as error:
        param = names.tools if required else names.schema
        raise ApiError(400, error.message, param=param, code="invalid_json_schema") from error


def _answer(service: Service, ask: Ask, tools: Sequence[Tool]) -> GrammarConstraint:
    """An answer of the schema, or calls where tools may be called."""
    alone = service.grammars.compile(json_grammar(ask.schema))
    return _calls(service, ask, tools) if tools else alone


def _calls(service: Service, ask: Ask, tools: Sequence[Tool]) -> GrammarConstraint:
    engine = service.engine
    form = call_form(engine.tokenizer, engine.card.chat_template)
    answer = None if ask.choice.mode == "required" else ask.schema
    grammar = call_grammar(tools, form, parallel=ask.choice.parallel, answer=answer)
    try:
        return service.grammars.compile(grammar)
    except GrammarError:
        _blame(service, tools)
        raise


def _blame(service: Service, tools: Sequence[Tool]) -> None:
    """Raise GrammarError naming the tool whose schema cannot be."""
    for tool in tools:
        try:
            service.grammars.compile(json_grammar(tool.schema(), lenient=not tool.strict))
        except GrammarError as error:
            raise GrammarError(f"The parameters of {tool.name}: {error.message}") from error
