"""Functions that a model may call, and how calls are spelled in a prompt; no answer is read here.

Model families spell a call in few ways, all of them a JSON object with a name and arguments: between
<tool_call> tags (Hermes, Qwen), alone (Llama 3: `parameters`), in a list (Mistral, Phi). A template that
takes `tools` says which; halo's own templates use the tags. engine/tool_parser.py reads all of them.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

MAX_DEPTH: Final = 64  # of lists and objects of JSON within each other


@dataclass(frozen=True)
class Tool:
    """A function: its name, what it does, the JSON schema of its arguments (None: it takes none)."""

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool = False

    def schema(self) -> dict[str, Any]:
        """The schema of its arguments, also where it takes none."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return self.parameters

    def told(self) -> dict[str, Any]:
        """The schema as templates count on it: an object's, with properties."""
        schema = self.schema()
        return schema if "properties" in schema else {"type": "object", "properties": {}} | schema

    def function(self) -> dict[str, Any]:
        """As chat templates take it: {"type": "function", "function": {...}}."""
        function = {"name": self.name, "description": self.description, "parameters": self.told()}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolCall:
    """A call that a model made; `arguments` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str

    def values(self) -> dict[str, Any] | str:
        """The arguments as an object, or as they stand where they are none, or too deep."""
        try:
            values = json.loads(self.arguments)
        except (ValueError, RecursionError):
            return self.arguments
        sound = isinstance(values, dict) and not deeper_than(values, MAX_DEPTH)
        return values if sound else self.arguments


@dataclass(frozen=True)
class ToolChoice:
    """Whether functions are called: auto, none, or required; `names` are those allowed (None: all)."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] | None = None
    parallel: bool = True

    def allowed(self, tools: Sequence[Tool]) -> list[Tool]:
        """The tools that may be called."""
        if self.mode == "none":
            return []
        return [tool for tool in tools if self.names is None or tool.name in self.names]


@dataclass(frozen=True)
class CallForm:
    """How a model spells calls: `open`, then each as `begin`, JSON, `end`, with `between`, then `close`."""

    arguments: str = "arguments"
    begin: str = ""
    end: str = ""
    between: str = "\n"
    open: str = ""
    close: str = ""
    markers: tuple[str, ...] = field(default=(), repr=False)  # of a template that uses it

    def spell(self, calls: Sequence[ToolCall]) -> str:
        """Calls as the model would have written them."""
        spelled = (
            json.dumps({"name": call.name, self.arguments: call.values()}, ensure_ascii=False)
            for call in calls
        )
        return self.open + self.between.join(self.begin + each + self.end for each in spelled) + self.close


TAGGED: Final = CallForm(begin="<tool_call>\n", end="\n</tool_call>", markers=("<tool_call>",))
LISTED: Final = CallForm(open="[", close="]", between=", ", markers=("[TOOL_CALLS]", "<|tool_call|>"))
BARE: Final = CallForm(arguments="parameters", between="; ", markers=("python_tag", '"parameters"'))
FORMS: Final = (TAGGED, LISTED, BARE)


def form_of(template: str | None) -> CallForm:
    """The form that a chat template's source asks for; the tags where it says nothing."""
    for form in FORMS:
        if template and any(marker in template for marker in form.markers):
            return form
    return TAGGED


def new_call_id() -> str:
    """An id for a call, as OpenAI's look."""
    return "call_" + secrets.token_hex(12)


def describe(tools: Sequence[Tool]) -> str:
    """What a model is told of its tools where its template has no place for them."""
    lines = "\n".join(json.dumps(tool.function()["function"], ensure_ascii=False) for tool in tools)
    return (
        "You can call these functions, each described by a JSON object:\n"
        f"{lines}\n"
        "To call a function, answer with its name and arguments in this form, once for each call:\n"
        f'{TAGGED.begin}{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}{TAGGED.end}'
    )


def result(content: str) -> str:
    """What a function gave, where a template has no role for it."""
    return f"<tool_response>\n{content}\n</tool_response>"


def deeper_than(value: object, depth: int) -> bool:
    """Whether lists and objects of JSON are nested deeper; without recursion."""
    level: list[object] = [value]
    for _ in range(depth + 1):
        inner = [list(each.values()) if isinstance(each, dict) else each for each in level]
        level = [each for values in inner if isinstance(values, list) for each in values]
        if not level:
            return False
    return True
