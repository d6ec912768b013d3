"""A checkpoint's Jinja chat template, rendered in a sandbox with limits, and which special tokens it makes.

No text is encoded here: engine/chat.py does; engine/template_sandbox.py has the limits.

Special tokens come from the template alone. Its own text of a special token is replaced, in its syntax tree,
by one private-use character; so what a user spells is not one, whatever the template does to it. A template
that puts a special token's text together (`'<|' + role + '|>'`) is rendered once more, with each character of
the contents that such a text has replaced by another: what still reads as one is the template's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from engine.errors import HaloError

if TYPE_CHECKING:
    from jinja2 import Template

MAX_SOURCE: Final = 64 << 10  # characters of a template; a syntax tree takes 4 KB for each
MAX_SPECIAL: Final = 1 << 13
# Planes 15 and 16 are for private use: the first of these blocks that no text of the conversation touches
# stands for special tokens in its first half, and for characters of the contents in its second.
_BASES: Final = range(0xF0000, 0x10C000, 0x4000)
_BLOCK: Final = 0x4000
_USE: Final = "use another model, or write one of halo's own templates into its model.json"

Part = str | int  # text, or the id of a special token


class ChatTemplate:
    """A template for a vocabulary's special tokens (their texts and ids); `render` gives text and ids."""

    def __init__(self, source: str, special: Mapping[str, int], names: Mapping[str, str]) -> None:
        """`names` are the variables such as bos_token. Raises HaloError where this is no template."""
        self._source, self._names = source, dict(names)
        self._texts = sorted((text for text in special if text), key=lambda text: (-len(text), text))
        self._ids = [special[text] for text in self._texts]
        self._number = {text: number for number, text in enumerate(self._texts)}
        # The longest that begins at a place, as huggingface/tokenizers finds added tokens.
        self._any = re.compile("|".join(map(re.escape, self._texts)) or r"(?!)")
        if len(source) > MAX_SOURCE:
            raise _bad(f"it is longer than {MAX_SOURCE} characters")
        if max(source, default="") >= chr(_BASES[0]):
            raise _bad("it has private-use characters")
        if len(self._texts) > MAX_SPECIAL:
            raise _bad(f"the vocabulary has more than {MAX_SPECIAL} special tokens")
        self._templates: dict[int | None, Template] = {}
        self._template(None)
        self.takes_tools = "tools" in source and _reads_tools(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        answer: bool = True,
    ) -> list[Part]:
        """A conversation, with `answer` up to where the assistant's begins; text and special ids.

        Messages and tools are JSON as transformers takes it. Raises HaloError where the template refuses it,
        or breaks a limit.
        """
        base = _free_base(_texts([messages, tools]))
        self._refuse_spelled([messages, tools])
        run = partial(self._run, answer=answer, now=datetime.now())
        text = run(None, messages, tools)
        marked, literal = run(base, messages, tools), True
        if self._plain(marked, base) != text:  # it measures or cuts the text of a special token
            marked, literal = text, False
        spelled = {found[0] for found in self._any.finditer(marked)}
        if not spelled or (literal and not self._puts_together(base)):
            return list(self._parts(marked, base, frozenset()))
        shadow = _Shadow(base + _BLOCK // 2, "".join(spelled))
        again = run(base if literal else None, shadow.over(messages), shadow.over(tools))
        if shadow.off(again) != marked:
            raise HaloError(
                "The chat template decides by the letters of a message that spells a control token.",
                hint=f"leave {min(spelled)!r} out of the message",
            )
        return list(self._parts(marked, base, {found.start() for found in self._any.finditer(again)}))

    def _template(self, base: int | None) -> Template:
        if base not in self._templates:
            self._templates[base] = _compile(self._source, lambda text: self._mark(text, base))
        return self._templates[base]

    def _mark(self, text: str, base: int | None) -> str:
        if base is None:
            return text
        return self._any.sub(lambda found: chr(base + self._number[found[0]]), text)

    def _refuse_spelled(self, value: object) -> None:
        """Raise HaloError where what a template may go by spells a special token: nothing can replace it."""
        for text in _names_in(value):
            if found := self._any.search(text):
                raise HaloError(
                    f"A role, a type or a key of a tool spells the control token {found[0]!r}.",
                    hint="name it otherwise",
                )

    def _run(
        self,
        base: int | None,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        answer: bool,
        now: datetime,
    ) -> str:
        from engine.template_sandbox import render

        variables: dict[str, Any] = {name: self._mark(text, base) for name, text in self._names.items()}
        variables |= {"messages": [dict(each) for each in messages], "add_generation_prompt": answer}
        try:
            variables |= {"tools": list(tools) or None, "documents": None}
            return render(self._template(base), variables, now)
        except Exception as error:
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise HaloError(
                f"The model's chat template refuses this conversation: {why}.",
                hint="change the messages (their roles, their order), or use another model",
            ) from error

    def _puts_together(self, base: int) -> bool:
        """Whether it spells special tokens bit by bit, tried on conversations that cannot spell any."""
        last = chr(base + _BLOCK - 1)
        roles = (["user"], ["user", "assistant", "user"], ["system", "user", "assistant", "user"], ["tool"])
        for each in roles:
            try:
                messages = [{"role": role, "content": last} for role in each]
                tools: list[Mapping[str, Any]] = []
                if each == ["tool"]:
                    messages, tools = _with_tools(last)
                text = self._run(base, messages, tools, answer=True, now=datetime.now())
            except HaloError:  # it does not take this order of roles
                continue
            if self._any.search(text):
                return True
        return False

    def _plain(self, marked: str, base: int) -> str:
        """The text with its marks spelled out."""
        last = chr(base + len(self._texts))
        return "".join(self._texts[ord(c) - base] if chr(base) <= c < last else c for c in marked)

    def _parts(self, marked: str, base: int, at: Iterable[int]) -> Iterator[Part]:
        """Texts and ids: of each mark, and of each special token that is spelled at one of the places."""
        places, start = set(at), 0
        marks = f"[{chr(base)}-{chr(base + MAX_SPECIAL - 1)}]"
        for found in re.finditer(f"{marks}|{self._any.pattern}", marked):
            token = found[0]
            number = self._number.get(token)
            if number is None:
                number = ord(token) - base
            elif found.start() not in places:
                continue
            if found.start() > start:
                yield marked[start : found.start()]
            yield self._ids[number]
            start = found.end()
        if start < len(marked):
            yield marked[start:]


class _Shadow:
    """Each character of `letters` (but white space) as another that nothing else in a conversation is."""

    def __init__(self, base: int, letters: str) -> None:
        distinct = sorted(letter for letter in set(letters) if not letter.isspace())
        self._on = {ord(letter): base + i for i, letter in enumerate(distinct)}
        self._off = {there: here for here, there in self._on.items()}

    def over(self, value: Any) -> Any:  # noqa: ANN401  (JSON)
        """Messages or tools with every text but keys, roles and types replaced so."""
        if isinstance(value, str):
            return value.translate(self._on)
        if isinstance(value, Mapping):
            return {name: each if _goes_by(name, each) else self.over(each) for name, each in value.items()}
        return [self.over(each) for each in value] if isinstance(value, list | tuple) else value

    def off(self, text: str) -> str:
        """The text as it was."""
        return text.translate(self._off)


def _goes_by(name: object, value: object) -> bool:
    """Whether a template may branch on this text, so that it must stay as it is."""
    return name in ("role", "type") and isinstance(value, str)


def _texts(value: object) -> Iterator[str]:
    """Every text in JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield name
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _names_in(value: object) -> Iterator[str]:
    """The texts in JSON that `_Shadow` leaves."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield name
            yield from [each] if _goes_by(name, each) else _names_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _names_in(each)


def _with_tools(text: str) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
    """A conversation with a function, its call and what it gave."""
    call = {"id": text, "type": "function", "function": {"name": text, "arguments": {text: text}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": text, "tool_call_id": text},
    ]
    schema = {"type": "object", "properties": {text: {"type": "string"}}}
    function = {"name": text, "description": text, "parameters": schema}
    return messages, [{"type": "function", "function": function}]


def _reads_tools(source: str) -> bool:
    from engine.template_sandbox import reads

    return "tools" in reads(source)


def _free_base(texts: Iterable[str]) -> int:
    high = {
        ord(c) // _BLOCK * _BLOCK for text in texts if max(text, default="") >= chr(_BASES[0]) for c in text
    }
    for base in _BASES:
        if base not in high:
            return base
    raise HaloError("The messages have private-use characters of every block.", hint="leave some of them out")


def _compile(source: str, mark: Callable[[str], str]) -> Template:
    from engine.template_sandbox import compile_template

    try:
        return compile_template(source, mark)
    except Exception as error:
        raise _bad(" ".join(str(error).split())[:300] or type(error).__name__) from error


def _bad(why: str) -> HaloError:
    return HaloError(f"The model's chat template cannot be used: {why}.", hint=_USE)
