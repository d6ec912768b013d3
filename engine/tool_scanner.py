"""One JSON object that may be a call of a function: its name, and its arguments as they come.

No JSON is judged here beyond what finds the name and where the arguments begin and end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

_NAMES: Final = ("name", "function", "tool_name")
_ARGUMENTS: Final = ("arguments", "parameters", "args")
_OTHERS: Final = ("type", "id", "index")
_SPACE: Final = " \t\r\n"
_MAX_HEAD: Final = 4096  # letters before a name; a longer object is no call


@dataclass(frozen=True)
class Begun:
    """The name is known: it is a call."""

    name: str


@dataclass(frozen=True)
class Piece:
    """The next letters of the arguments."""

    text: str


@dataclass(frozen=True)
class Rejected:
    """It is no call of a known function."""


Found = Begun | Piece | Rejected


class Scanner:
    """Reads one object, `{` first; with `name` given, one that is the arguments themselves."""

    def __init__(self, names: frozenset[str], name: str | None = None) -> None:
        self._names = names
        self.begun = False
        self.done = False
        self._found: list[Found] = []
        self._want = "value" if name is not None else "{"  # what may come at this level
        self._key = _ARGUMENTS[0] if name is not None else ""
        self._alone = name is not None
        self._levels = 0  # objects around the keys: 2 within {"function": {...}}
        self._value: _Value | None = None
        self._arguments = ""  # that came before the name
        self._sent = 0  # letters of the arguments that were given out
        self._has_arguments = False
        self._read = 0
        if name is not None:
            self._begin(name)

    def feed(self, text: str) -> tuple[int, list[Found]]:
        """(letters used, what was found); all letters are used unless it is done or rejected."""
        used = 0
        while used < len(text) and not self.done:
            self._read += 1
            if not self._letter(text[used]) or (not self.begun and self._read > _MAX_HEAD):
                if self.begun:
                    self._end()
                else:
                    self._found = [Rejected()]
                    self.done = True
                    used += 1
                break
            used += 1
        self._flush()
        found, self._found = self._found, []
        return used, found

    def _letter(self, letter: str) -> bool:
        """Take one letter; False where it cannot be."""
        if self._value is not None:
            return self._in_value(letter)
        if letter in _SPACE:
            return True
        if self._want == "value":
            self._value = _Value(letter)
            return self._start_value(letter)
        if self._want == "key" and letter == '"':
            self._value, self._want = _Value(letter), ":"
            self._key = ""
            return True
        if letter == self._want == "{":
            self._levels, self._want = 1, "key"
            return True
        if letter == self._want == ":":
            self._want = "value"
            return True
        if self._want in (",", "key") and letter == "}":
            self._levels -= 1
            self._want = ","
            if not self._levels:
                self._end()
            return True
        if self._want == letter == ",":
            self._want = "key"
            return True
        return False

    def _start_value(self, letter: str) -> bool:
        if self._key == "function" and letter == "{":
            self._value, self._levels, self._want = None, self._levels + 1, "key"
        elif self._key in _NAMES and letter != '"':
            return False
        return True

    def _in_value(self, letter: str) -> bool:
        value = self._value
        assert value is not None
        taken = value.take(letter)
        if taken and not value.ended:
            return True
        self._value = None
        sound = self._named_key(value.text) if self._want == ":" else self._whole(value.text)
        return sound and (taken or self.done or self._letter(letter))

    def _named_key(self, text: str) -> bool:
        """A key that has ended; False where no call has such a one before its name."""
        self._key = _text(text)
        return self.begun or self._key in (*_NAMES, *_ARGUMENTS, *_OTHERS)

    def _whole(self, text: str) -> bool:
        """A value that has ended; False where it makes this no call."""
        self._want = ","
        if self._key in _NAMES and not self.begun:
            name = _text(text)
            if name not in self._names:
                return False
            self._begin(name)
        elif self._key in _ARGUMENTS and not self._has_arguments:
            self._has_arguments = True
            self._give(text)
            if self._alone:
                self._end()
        return True

    def _begin(self, name: str) -> None:
        self.begun = True
        self._found.append(Begun(name))
        if self._arguments:
            self._found.append(Piece(self._arguments))

    def _give(self, text: str) -> None:
        """Arguments that are whole: an object is given out already, if the name was known."""
        value = self._value_given(text)
        if self.begun:
            self._found.append(Piece(value))
        else:
            self._arguments = value

    def _value_given(self, text: str) -> str:
        if text.startswith("{"):
            return text[self._sent :] if self.begun else text
        if text.startswith('"'):  # JSON within JSON
            return _text(text)
        return "{}" if text == "null" else text

    def _flush(self) -> None:
        """Give out what there is of an object of arguments."""
        value = self._value
        live = value is not None and self._want == "value" and self._key in _ARGUMENTS
        if not live or value is None or not self.begun or self._has_arguments:
            return
        if value.first == "{" and value.length > self._sent:
            self._found.append(Piece(value.since(self._sent)))
            self._sent = value.length

    def _end(self) -> None:
        self.done = True
        if not self.begun:
            self._found = [Rejected()]
        elif not self._has_arguments and not self._sent:
            self._found.append(Piece("{}"))


class _Value:
    """The letters of one JSON value: to the end of a text, of nested brackets, or of a word."""

    def __init__(self, letter: str) -> None:
        self.first = letter
        self._letters = [letter]
        self._depth = int(letter in "{[")
        self._quoted = letter == '"'
        self._word = not self._depth and not self._quoted
        self._escaped = self._ended = False

    @property
    def text(self) -> str:
        return self.since(0)

    @property
    def length(self) -> int:
        return len(self._letters)

    def since(self, start: int) -> str:
        """The letters from one on."""
        return "".join(self._letters[start:])

    def take(self, letter: str) -> bool:
        """Whether the letter is a part of it."""
        if self._ended or (self._word and letter in ',}] \t\r\n"'):
            return False
        self._letters.append(letter)
        if self._quoted:
            if self._escaped:
                self._escaped = False
            elif letter == "\\":
                self._escaped = True
            elif letter == '"':
                self._quoted = False
                self._ended = not self._depth
        elif letter == '"' and not self._word:
            self._quoted = True
        elif letter in "{[":
            self._depth += 1
        elif letter in "}]" and not self._word:
            self._depth -= 1
            self._ended = not self._depth
        return True

    @property
    def ended(self) -> bool:
        """Whether nothing can follow."""
        return self._ended


def _text(quoted: str) -> str:
    try:
        return str(json.loads(quoted, strict=False))
    except ValueError:
        return quoted.strip('"')
