"""A model's answer, piece by piece, to text and calls of functions; prompts are written in engine/tools.py.

Known are a JSON object or list of objects with name and arguments (or parameters) that begins the answer,
plain, fenced, or after <|python_tag|>, [TOOL_CALLS], functools or <|tool_call|>; <function=NAME>{...}; and
objects between <tool_call> tags anywhere. Only names of given tools make a call: anything else stays text.
Arguments are given out as they come.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from engine.tool_scanner import Begun, Piece, Rejected, Scanner
from engine.tools import new_call_id

TAG: Final = "<tool_call>"
_OPENERS: Final = ("<|python_tag|>", "[TOOL_CALLS]", "<|tool_call|>", "functools", "```json", "```")
_CLOSERS: Final = ("</tool_call>", "</function>", "<|/tool_call|>", "```", "]", ",", ";")
_NAMED: Final = "<function="


@dataclass(frozen=True)
class CallDelta:
    """A part of a call: the first of one has its id and name; `arguments` is the next piece of JSON text."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


Event = str | CallDelta  # text, or a part of a call


class ToolParser:
    """Reads one answer. What is given out, put together, is the answer without its calls, and the calls."""

    def __init__(self, names: frozenset[str], *, parallel: bool = True) -> None:
        self._names, self._parallel = names, parallel
        self._held = ""  # not decided yet
        self._candidate = ""  # all that was read since a call may have begun
        self._scanner: Scanner | None = None
        self._in_text = False
        self._opened = False  # what comes now may be a call: nothing, or a call or opener, was before
        self.calls = 0

    def feed(self, text: str) -> list[Event]:
        """What is sure after this text."""
        self._held += text
        events: list[Event] = []
        while self._held and (self._scan(events) if self._scanner else self._seek(events)):
            pass
        return events

    def finish(self) -> list[Event]:
        """The rest, at the end of the answer. A call that was cut stays as it is."""
        events: list[Event] = []
        if self._scanner and not self._scanner.begun:
            self._reject(events)
        rest = self._take_candidate() + self._held
        begins = not rest.strip() or any(each.startswith(rest.strip()) for each in (TAG, _NAMED))
        if not self._dropping() and self._scanner is None and not (self.calls and begins):
            self._say(events, rest)
        self._held = ""
        return events

    def _dropping(self) -> bool:
        return self.calls > 0 and not self._parallel and self._scanner is None

    def _seek(self, events: list[Event]) -> bool:
        """Look for where a call begins; False where more text is needed to know."""
        if self._dropping():
            self._held = ""
            return False
        if self._in_text:
            return self._seek_tag(events)
        body = self._held.lstrip()
        if not body:
            return False
        if self.calls and (closer := _first(body, _CLOSERS)):
            self._held = body[len(closer) :]
            return bool(self._held)
        opener = _first(body, (TAG, _NAMED, *_OPENERS))
        known = (TAG, _NAMED, *_OPENERS, *(_CLOSERS if self.calls else ()))
        # A longer one may still come of what is there ("``" of "```json").
        if any(len(each) > len(body) and each.startswith(body) for each in known):
            return False
        if opener == _NAMED:
            return self._named(body, events)
        if opener:
            self._candidate += self._held[: len(self._held) - len(body)] + opener
            self._held = body[len(opener) :]
            return bool(self._held)
        if body[0] in "{[":
            self._candidate += self._held[: len(self._held) - len(body)]
            if body[0] == "[":
                self._candidate += "["
                self._held = body[1:]
                return self._listed(events)
            self._held = body
            self._scanner = Scanner(self._names)
            return True
        self._in_text = True
        self._say(events, self._take_candidate())
        return True

    def _listed(self, events: list[Event]) -> bool:
        """After "[": an object, or it is no list of calls."""
        body = self._held.lstrip()
        if body and body[0] != "{":
            self._in_text = True
            self._say(events, self._take_candidate())
        return bool(body)

    def _named(self, body: str, events: list[Event]) -> bool:
        """<function=NAME> and its arguments."""
        name, end, rest = body[len(_NAMED) :].partition(">")
        if not end and len(name) < 200:
            return False
        if name not in self._names:
            self._in_text = True
            self._say(events, self._take_candidate())
            return True
        self._candidate = body[: len(body) - len(rest)]
        self._held = rest
        self._scanner = Scanner(self._names, name)
        return bool(rest)

    def _seek_tag(self, events: list[Event]) -> bool:
        at = self._held.find(TAG)
        if at >= 0:
            self._say(events, self._held[:at].rstrip())
            self._candidate, self._held = TAG, self._held[at + len(TAG) :]
            self._in_text = False
            return bool(self._held)
        keep = next((n for n in range(len(TAG) - 1, 0, -1) if self._held.endswith(TAG[:n])), 0)
        shown = self._held[: len(self._held) - keep].rstrip()  # white space before a call is no text
        self._held = self._held[len(shown) :]
        self._say(events, shown)
        return False

    def _scan(self, events: list[Event]) -> bool:
        scanner = self._scanner
        assert scanner is not None
        used, found = scanner.feed(self._held)
        self._candidate += self._held[:used]
        self._held = self._held[used:]
        for each in found:
            if isinstance(each, Rejected):
                self._reject(events)
                return bool(self._held)
            self._tell(events, each)
        if scanner.done:
            self._scanner, self._candidate = None, ""
        return bool(self._held)

    def _tell(self, events: list[Event], found: Begun | Piece) -> None:
        if isinstance(found, Begun):
            events.append(CallDelta(self.calls, new_call_id(), found.name))
            self.calls += 1
        elif found.text:
            events.append(CallDelta(self.calls - 1, arguments=found.text))

    def _reject(self, events: list[Event]) -> None:
        """It was no call: what was read is text."""
        self._scanner, self._in_text = None, True
        self._say(events, self._take_candidate())

    def _take_candidate(self) -> str:
        taken, self._candidate = self._candidate, ""
        return taken

    def _say(self, events: list[Event], text: str) -> None:
        if text:
            events.append(text)


def _first(body: str, words: tuple[str, ...]) -> str:
    return next((word for word in words if body.startswith(word)), "")
