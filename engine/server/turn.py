"""What any chat API asks, as queued work: the prompt with its tools, the grammar, the answer's reader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from engine.chat import Message, answer_has_leading_space, call_form
from engine.grammar import GrammarError, call_grammar, json_grammar, text_grammar
from engine.sampling import SamplingParams
from engine.sequence import Constraint
from engine.server.errors import ApiError
from engine.server.reading import ChoiceReader
from engine.server.runner import Work
from engine.server.service import Service, encode_chat
from engine.tool_parser import ToolParser
from engine.tools import CallForm, Tool, ToolChoice

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
    # A grammar of JSON or of calls allows white space before them, as models begin an answer.
    is_json = ask.schema is not None or ask.choice.mode == "required"
    strip = is_json or answer_has_leading_space(service.engine.card.chat_template)
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
    return await asyncio.to_thread(_answer, service, schema, param)


async def _constraint(service: Service, ask: Ask, tools: Sequence[Tool], names: Names) -> Constraint | None:
    """What the answer must be, where that is not any text; compiled off the event loop."""
    if ask.choice.mode == "required":
        return await asyncio.to_thread(_calls, service, ask, tools, None, names.tools)
    if ask.schema is not None:
        alone = await answer_constraint(service, ask.schema, names.schema)
        if not tools:
            return alone
        return await asyncio.to_thread(_calls, service, ask, tools, ask.schema, names.tools)
    if any(tool.strict for tool in tools):
        return await asyncio.to_thread(_text, service, ask, tools, names.tools)
    return None


def _answer(service: Service, schema: dict[str, Any], param: str) -> Constraint:
    try:
        return service.grammars.compile(json_grammar(schema))
    except GrammarError as error:
        raise _refused(error.message, param) from error


def _calls(
    service: Service, ask: Ask, tools: Sequence[Tool], answer: dict[str, Any] | None, param: str
) -> Constraint:
    """Calls, or an answer of the schema."""
    form = _form(service)
    try:
        grammar = call_grammar(tools, form, parallel=ask.choice.parallel, answer=answer)
        return service.grammars.compile(grammar)
    except GrammarError as error:
        raise _blamed(service, tools, error, param) from error


def _text(service: Service, ask: Ask, tools: Sequence[Tool], param: str) -> Constraint | None:
    """Any text in which calls obey, if this model's calls begin with a tag: else nothing tells them apart."""
    form = _form(service)
    if not form.begin:
        return None
    try:
        return service.grammars.compile(text_grammar(tools, form, parallel=ask.choice.parallel))
    except GrammarError as error:
        raise _blamed(service, tools, error, param) from error


def _form(service: Service) -> CallForm:
    return call_form(service.engine.tokenizer, service.engine.card.chat_template)


def _blamed(service: Service, tools: Sequence[Tool], error: GrammarError, param: str) -> ApiError:
    """The refusal that names the tool whose schema cannot be."""
    for tool in tools:
        try:
            service.grammars.compile(json_grammar(tool.schema(), lenient=not tool.strict))
        except GrammarError as own:
            return _refused(f"The parameters of {tool.name}: {own.message}", param)
    return _refused(error.message, param)


def _refused(why: str, param: str) -> ApiError:
    return ApiError(400, why, param=param, code="invalid_json_schema")
