"""The Jinja environment of chat templates: a sandbox with a budget. What is special is in chat_template.py.

Set up as transformers does (utils/chat_template_utils.py: ImmutableSandboxedEnvironment, trim_blocks,
lstrip_blocks, loop controls, tojson, raise_exception, strftime_now). That keeps a template from Python's
insides. It can still loop for hours or ask for a terabyte; so here each loop turn, call and filter is a step
of a budget, each operation that makes a longer text is measured before it is done, and what cannot be
measured (padding, lipsum) is left out. A list of itself twice, a few dozen times over, is small and endless
to print, compare or hash: so each list, tuple and dict is weighed when it is made, and none ever becomes one.
Imported only when a template is rendered: jinja2 takes 60 ms.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, MappingView
from contextvars import ContextVar
from functools import wraps
from typing import Any, Final, NoReturn, cast

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TEXT: Final = 4 << 20  # characters of any text that it makes, or of a list written out
MAX_MADE: Final = 16 * MAX_TEXT  # characters of all texts that it makes, and 8 an item of all lists
MAX_STEPS: Final = 200_000  # turns of a loop and calls
MAX_SECONDS: Final = 10.0
_MAX_BITS: Final = 4096  # of a whole number
_MAX_INDENT: Final = 16
# What a text weighs beside its characters, and anything else: so no more than 65,536 lists hold each other.
_TEXT_WEIGHT, _WEIGHT = 16, 64
_STEP: Final = "__halo_step__"
_CONCAT: Final = "__halo_concat__"
_MADE: Final = "__halo_made__"
# Methods of str that a template may not use, for their result has any length: padding and formats.
_UNMEASURED: Final = frozenset(
    ("ljust", "rjust", "center", "zfill", "expandtabs", "format", "format_map", "translate", "encode")
)
_FILTERS: Final = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "reverse", "safe", "select", "selectattr", "sort", "title", "trim", "truncate", "unique", "upper",
    "wordcount",
)  # fmt: skip
_GLOBALS: Final = ("range", "dict", "namespace", "cycler", "joiner")
_WIDE: Final = re.compile(r"%[^a-zA-Z%]*(?:\d{4,}|\*)")


class _Budget:
    def __init__(self, now: datetime.datetime) -> None:
        self.now = now
        self.steps = MAX_STEPS
        self.left = MAX_MADE
        self.until = time.monotonic() + MAX_SECONDS


_budget: ContextVar[_Budget] = ContextVar("budget")


def render(template: Template, variables: Mapping[str, Any], now: datetime.datetime) -> str:
    """The template's text. Raises any Exception that the template causes."""
    _budget.set(_Budget(now))
    pieces: list[str] = []
    length = 0
    for piece in template.generate(**variables):
        length += len(piece)
        _check(length)
        pieces.append(piece)
    return "".join(pieces)


def compile_template(source: str, mark: Callable[[str], str]) -> Template:
    """A template with `mark` applied to every text that it spells out itself."""
    environment = _Sandbox()
    tree = environment.parse(source)
    return environment.from_string(cast(nodes.Template, _Rewrite(mark).visit(tree)))


def reads(source: str) -> set[str]:
    """The variables that a template takes from outside."""
    return find_undeclared_variables(_Sandbox().parse(source))


class _Rewrite(NodeTransformer):
    """Marks a template's own texts, counts the turns of its loops, measures what `~` joins and [] holds."""

    def __init__(self, mark: Callable[[str], str]) -> None:
        self._mark = mark

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, str):
            node.value = self._mark(node.value)
        return node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        node.data = self._mark(node.data)
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        step = nodes.Call(nodes.Name(_STEP, "load"), [], [], None, None, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.Name(_CONCAT, "load"), node.nodes, [], None, None, lineno=node.lineno)

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.Name(_MADE, "load"), [node], [], None, None, lineno=node.lineno)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        if node.ctx == "load":
            return self.visit_List(node)
        self.generic_visit(node)  # `for a, b in`: names, not a value
        return node


def _check(length: int) -> None:
    if length > MAX_TEXT:
        raise SecurityError(f"it makes a text or list of more than {MAX_TEXT}")


def _step() -> str:
    budget = _budget.get(None)
    if budget is None:  # a constant is being folded
        return ""
    budget.steps -= 1
    if budget.steps < 0:
        raise SecurityError(f"it takes more than {MAX_STEPS} steps")
    if time.monotonic() > budget.until:
        raise SecurityError(f"it takes more than {MAX_SECONDS:g} seconds")
    return ""


def _weigh(value: object, left: int = MAX_TEXT) -> int:
    """What a value holds, in characters; raises above MAX_TEXT, for lists in lists can be exponential."""
    if isinstance(value, str):
        return len(value) + _TEXT_WEIGHT
    total = _WEIGHT
    if isinstance(value, Context):  # a mapping too, that some filters are given; no template holds it
        return total
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    if isinstance(value, Mapping):
        value = [each for item in value.items() for each in item]
    if isinstance(value, list | tuple | set | frozenset | MappingView):
        for each in cast(Iterable[object], value):
            total += _weigh(each, left - total)
            if total > left:
                _check(MAX_TEXT + 1)
    return total


def _made(value: Any) -> Any:  # noqa: ANN401
    """A value that was just made, paid for from the budget; refused where it is too large."""
    if isinstance(value, str | list | tuple | Mapping | Namespace):
        _check(_weigh(value))
        budget = _budget.get(None)
        if budget is not None:
            size = 1 if isinstance(value, Namespace) else len(value)
            budget.left -= size if isinstance(value, str) else 8 * size
            if budget.left < 0:
                raise SecurityError(f"it makes texts and lists of more than {MAX_MADE}")
    return value


def _measured(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that takes and gives nothing too large, and is a step."""

    @wraps(function)
    def measured(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        _step()
        for value in (*args, *kwargs.values()):
            _check(_weigh(value))
        return _made(function(*args, **kwargs))

    return measured


def _text(value: Any) -> str:  # noqa: ANN401  (whatever a template has)
    _check(_weigh(value))
    return value if type(value) is str else str(_made(str(value)))


def _concat(*values: Any) -> str:  # noqa: ANN401
    return _joined([_text(value) for value in values])


def _joined(pieces: Iterable[str]) -> str:
    pieces = list(pieces)
    _check(sum(map(len, pieces)))
    return str(_made("".join(pieces)))


def _finalize(value: Any) -> Any:  # noqa: ANN401
    _check(_weigh(value))
    return value


def _replace(value: Any, old: Any, new: Any, count: int | None = None) -> str:  # noqa: ANN401
    text, before, after = _text(value), _text(old), _text(new)
    _check(len(text) + text.count(before) * len(after))
    return text.replace(before, after, -1 if count is None else count)


def _join(values: Iterable[Any], separator: Any = "", attribute: str | None = None) -> str:  # noqa: ANN401
    listed = list(values)
    if attribute is not None:
        listed = [each.get(attribute, "") if isinstance(each, Mapping) else "" for each in listed]
    between = _text(separator)
    pieces = [_text(each) for each in listed]
    _check(sum(map(len, pieces)) + len(pieces) * len(between))
    return between.join(pieces)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:  # noqa: ANN401
    pad = width if isinstance(width, str) else " " * min(max(width, 0), _MAX_INDENT)
    text = _text(value)
    lines = text.split("\n")
    _check(len(text) + len(lines) * len(pad))
    rest = [pad + line if line or blank else line for line in lines[1:]]
    return "\n".join([(pad if first else "") + lines[0], *rest])


def _tojson(
    value: Any,  # noqa: ANN401
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: no escapes for HTML, and letters as they are."""
    _check(_weigh(value))
    if indent is not None:
        indent = min(indent, _MAX_INDENT)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    pieces, length = [], 0
    for piece in encoder.iterencode(value):  # a deep list indented is longer than what it holds
        _step()
        length += len(piece)
        _check(length)
        pieces.append(piece)
    return "".join(pieces)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message)[:500])


def _strftime_now(form: str) -> str:
    budget = _budget.get(None)
    return budget.now.strftime(str(form)[:100]) if budget else ""


class _Generation(Extension):
    """`{% generation %}` marks an answer for training; its body is all that matters here."""

    tags: set[str] = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, as transformers sets it up, with everything that grows measured."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(_joined)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            finalize=_finalize,
            extensions=[_Generation, loopcontrols],
        )
        own = {"tojson": _tojson, "replace": _replace, "join": _join, "indent": _indent, "string": _text}
        filters = {name: FILTERS[name] for name in _FILTERS} | own
        self.filters = {name: _measured(function) for name, function in filters.items()}
        self.globals = {name: self.globals[name] for name in _GLOBALS}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self.globals |= {_STEP: _step, _CONCAT: _concat, _MADE: _made}

    def wrap_str_format(self, value: Any) -> None:  # noqa: ANN401
        """Nothing: str.format is refused below like the others."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:  # noqa: ANN401
        """Not the methods of text whose result cannot be measured before."""
        return not (isinstance(obj, str) and attr in _UNMEASURED) and super().is_safe_attribute(
            obj, attr, value
        )

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """A call is a step; the methods of text that make it longer are measured."""
        _step()
        if obj is _step or obj is _made:
            return obj(*args)
        for value in (*args, *kwargs.values()):
            _check(_weigh(value))
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and not isinstance(obj, Undefined):
            if name == "replace":
                return _made(_replace(owner, *args, **kwargs))
            if name == "join":
                return _made(_join(args[0] if args else (), owner))
        return _made(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401
        """An operation whose result may be longer than what it is made from."""
        _check_operation(operator, left, right)
        return _made(super().call_binop(context, operator, left, right))


def _check_operation(operator: str, left: Any, right: Any) -> None:  # noqa: ANN401
    long = [each for each in (left, right) if isinstance(each, str | list | tuple)]
    whole = [abs(each) for each in (left, right) if isinstance(each, int)]
    if operator == "+" and len(long) == 2:
        _check(len(left) + len(right))
    elif operator == "*" and long and whole:
        _check(len(long[0]) * whole[0])
    elif operator == "%" and isinstance(left, str):
        if _WIDE.search(left):
            raise SecurityError("it pads a text")
        _check(len(left) + _weigh(right) * max(1, left.count("%")))
    elif operator in ("*", "**") and len(whole) == 2:
        bits = whole[0].bit_length()
        if (bits * whole[1] if operator == "**" else bits + whole[1].bit_length()) > _MAX_BITS:
            raise SecurityError("it makes a number too large")
