"""Constrained decoding: JSON schemas and calls of functions as masks over the vocabulary, through llguidance.

What may come is bytes of ordinary tokens, and an end token where the text may end: no other special token
ever. llguidance takes 90 ms to import and its tables of 128,256 tokens 0.6 s and 90 MB, so both come with the
first grammar, in a thread (`Grammars.compile` is called in one). White space between JSON's parts is one
space, or a line end and an indentation, so that no model can go on with it for ever.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Sequence
from time import sleep
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from engine.errors import HaloError
from engine.tools import MAX_DEPTH, CallForm, Tool, deeper_than

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from engine.tokenizer import TextTokenizer

MAX_GRAMMAR: Final = 1 << 18  # characters of a schema
_WHITESPACE: Final = r"[ ]|\n[ \t]{0,32}"
_OPTIONS: Final = {"whitespace_pattern": _WHITESPACE}
_KEPT: Final = 32  # compiled grammars


class GrammarError(HaloError):
    """A schema that cannot be enforced; the sentence says why."""

    def __init__(self, why: str) -> None:
        super().__init__(f"The schema cannot be enforced: {why}.", hint="leave that out, or ask for any JSON")


class GrammarConstraint:
    """engine.sequence.Constraint over a compiled grammar. One thread at a time."""

    def __init__(self, matcher: LLMatcher, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab

    def mask(self) -> NDArray[np.uint8]:
        """uint8 [vocab], not 0 where a token may come."""
        row = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)
        if self._matcher.is_error():
            raise _failed(self._matcher)
        if len(row) < self._vocab:
            row = np.pad(row, (0, self._vocab - len(row)))
        return row[: self._vocab]

    def accept(self, token: int) -> None:
        """A token that the mask allowed."""
        if not self._matcher.consume_token(token):
            raise _failed(self._matcher)

    def finished(self) -> bool:
        """Whether nothing but an end token may follow."""
        return bool(self._matcher.is_stopped())

    def may_end(self) -> bool:
        """Whether the text is whole as it stands."""
        return bool(self._matcher.is_accepting())

    def fork(self) -> GrammarConstraint:
        """The same state, going its own way."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab)


class Grammars:
    """What compiles grammars for one tokenizer. Slow at first use: call from a thread, of any number."""

    def __init__(self, tokenizer: TextTokenizer, ends: Iterable[int]) -> None:
        self._tokenizer, self._ends = tokenizer, sorted(ends)
        self._lock = threading.Lock()
        self._tables: LLTokenizer | None = None
        self._compiled: dict[str, LLMatcher] = {}

    def compile(self, lark: str) -> GrammarConstraint:
        """A grammar in llguidance's form of Lark; raises GrammarError where it cannot be kept."""
        from llguidance import LLMatcher

        with self._lock:
            tables = self._tables = self._tables or self._open()
            matcher = self._compiled.pop(lark, None)
        if matcher is None:
            grammar = LLMatcher.grammar_from_lark(lark)
            matcher = LLMatcher(tables, grammar, log_level=0, limits=_limits())
            if matcher.is_error():
                raise GrammarError(_reason(matcher.get_error()))
        with self._lock:
            self._compiled[lark] = matcher
            while len(self._compiled) > _KEPT:
                del self._compiled[next(iter(self._compiled))]
        return GrammarConstraint(matcher.deep_copy(), self._tokenizer.size)

    def _open(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        wrapper: Any = _Vocabulary(self._tokenizer, self._ends)
        # In two steps: the library holds the interpreter during each, and other threads run in between.
        tables = LLTokenizer(wrapper, self._tokenizer.size, self._ends, slices=[])
        sleep(0.001)
        return tables.with_slices(LLTokenizer.general_slices())


def _limits() -> LLParserLimits:
    """Some 30 ms for a mask and 64 MB for a lexer at most, in llguidance's own units."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=2_000_000,
        step_lexer_fuel=400_000,
        step_max_items=100_000,
        max_lexer_states=32_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


class _Vocabulary:
    """A tokenizer as llguidance takes it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: TextTokenizer, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = ends[0]
        # An id without bytes (of the template, or of padding) is special: no text has it.
        tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.size)]
        self.special_token_ids = [i for i, token in enumerate(tokens) if not token]
        self.tokens = [token or b"<|%d|>" % i for i, token in enumerate(tokens)]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, first=False)


def json_grammar(schema: dict[str, Any] | None, *, lenient: bool = False) -> str:
    """An answer that is one JSON value of a schema; None is any object. Raises GrammarError.

    `lenient` leaves out what cannot be enforced.
    """
    rule = _json({"type": "object"} if schema is None else schema, lenient=lenient)
    return f"start: /[ \\n]/? answer\nanswer: {rule}\n"


def call_grammar(
    tools: Sequence[Tool], form: CallForm, *, parallel: bool, answer: dict[str, Any] | None = None
) -> str:
    """An answer that is a call of one of `tools`, or several; or JSON of the schema `answer`."""
    more = f" ({_quoted(form.between)} call)*" if parallel else ""
    opening, closing = (_quoted(each) + " " if each else "" for each in (form.open, form.close))
    rules = [*_calls(tools, form, form.begin), f"calls: {opening}call{more} {closing}"]
    if answer is not None:
        rules.append(f"answer: {_json(answer)}")
    start = "calls" if answer is None else "(calls | answer)"
    return "\n".join([f"start: /[ \\n]/? {start}", *rules]) + "\n"


def text_grammar(tools: Sequence[Tool], form: CallForm, *, parallel: bool) -> str:
    """Any text, in which what begins like a call is one of `tools`, or several, with arguments that obey.

    For forms that begin with a tag.
    """
    tag = form.begin.rstrip()
    start = "start: called* TEXT" if parallel else "start: TEXT | called"
    rules = [start, f"begun[lazy]: TEXT {_quoted(tag)}", "called: begun call", "TEXT: /(.|\\n)*/"]
    return "\n".join([*rules, *_calls(tools, form, form.begin[len(tag) :])]) + "\n"


def _calls(tools: Sequence[Tool], form: CallForm, begin: str) -> list[str]:
    """Rules of `call`: one of the tools. The name is text, so that a schema's references keep their root."""
    rules = []
    for number, tool in enumerate(tools):
        head = json.dumps({"name": tool.name, form.arguments: 0}, ensure_ascii=False)[:-2]
        rules.append(f"call{number}: {_quoted(begin + head)} args{number} {_quoted('}' + form.end)}")
        rules.append(f"args{number}: {_json(tool.schema(), lenient=not tool.strict)}")
    return [*rules, "call: " + " | ".join(f"call{number}" for number in range(len(tools)))]


def _json(schema: dict[str, Any], *, lenient: bool = False) -> str:
    """A schema in llguidance's Lark."""
    if deeper_than(schema, MAX_DEPTH):
        raise GrammarError(f"it is nested deeper than {MAX_DEPTH}")
    text = json.dumps(schema | {"x-guidance": _OPTIONS | {"lenient": lenient}}, ensure_ascii=True)
    if len(text) > MAX_GRAMMAR:
        raise GrammarError(f"it is longer than {MAX_GRAMMAR} characters")
    return f"%json {text}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=True)


def _failed(matcher: LLMatcher) -> HaloError:
    return HaloError(
        f"The grammar of this answer became too complex: {_reason(matcher.get_error())}.",
        hint="ask for a simpler schema: fewer alternatives, shorter patterns.",
    )


def _reason(error: str) -> str:
    """llguidance's own words, in one line, without the grammar that it quotes."""
    error = error.split("failed to compile JSON schema: ")[-1]
    lines = [line for line in error.splitlines() if not re.match(r"\s*(\d+ \||\^)", line)]
    return " ".join(" ".join(lines).split())[:300].rstrip(".") or "of an unknown reason"
