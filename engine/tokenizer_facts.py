"""What model.json says of a tokenizer beyond its files, and the template beside them. No encoding here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from engine.errors import HaloError

if TYPE_CHECKING:
    from engine.tokenizer import TextTokenizer

TEMPLATE_FILE: Final = "chat_template.jinja"
MAX_TEMPLATE: Final = 64 << 10
MAX_DESCRIPTION: Final = 4 << 20
MAX_SIZE: Final = 1 << 20
_MAX_IDS: Final = 64
_ANEW: Final = "import or pull the model again"


@dataclass(frozen=True)
class TokenizerFacts:
    """`tokenizer` of model.json: the model's number of ids, bos and eos, what stands before a text, the ids
    that end an answer, and the variables of the chat template that are texts of tokens (bos_token)."""

    size: int
    bos: int
    eos: int
    opening: tuple[int, ...]
    stops: tuple[int, ...]
    names: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object that model.json holds."""
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return plain | {"names": dict(self.names)}

    def apply(self, tokenizer: TextTokenizer) -> None:
        """Give a tokenizer what its file does not say; raises HaloError where they contradict each other."""
        if (self.size, self.bos, self.eos) != (tokenizer.size, tokenizer.bos, tokenizer.eos):
            raise HaloError(
                f"model.json tells of a tokenizer of {self.size} tokens (bos {self.bos}, eos {self.eos}), "
                f"and the one beside it has {tokenizer.size} (bos {tokenizer.bos}, eos {tokenizer.eos}).",
                hint=f"they are of different models: {_ANEW}",
            )
        tokenizer.opening = list(self.opening)
        tokenizer.stops = frozenset((*self.stops, self.eos))
        tokenizer.names = dict(self.names)


def read_facts(description: Path) -> TokenizerFacts | None:
    """The facts in a model.json; None where it has none, or is not there."""
    try:
        with description.open("rb") as stream:
            data = json.loads(stream.read(MAX_DESCRIPTION))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise HaloError(f"{description} cannot be read: {error.strerror}.", hint=_ANEW) from error
    except (ValueError, RecursionError) as error:
        raise HaloError(f"{description} is not valid JSON.", hint=_ANEW) from error
    facts = data.get("tokenizer") if isinstance(data, dict) else None
    return None if facts is None else parse_facts(description, facts)


def parse_facts(path: Path, facts: object) -> TokenizerFacts:
    """The facts in a decoded JSON value, checked."""
    if not isinstance(facts, dict):
        raise HaloError(f"`tokenizer` in {path} is no object.", hint=_ANEW)
    size = facts.get("size")
    if type(size) is not int or not 1 <= size <= MAX_SIZE:
        raise HaloError(f"`tokenizer` in {path} has no size from 1 to {MAX_SIZE}.", hint=_ANEW)
    ids = {name: facts.get(name) for name in ("bos", "eos")}
    lists = {name: facts.get(name) for name in ("opening", "stops")}
    if not all(isinstance(each, list) and len(each) <= _MAX_IDS for each in lists.values()):
        raise HaloError(f"`tokenizer` in {path} lacks opening or stops.", hint=_ANEW)
    if not _are_ids([*ids.values(), *(lists["opening"] or []), *(lists["stops"] or [])], size):
        raise HaloError(f"`tokenizer` in {path} has an id outside its {size} tokens.", hint=_ANEW)
    names = facts.get("names", {})
    if not isinstance(names, dict) or not all(isinstance(text, str) for text in names.values()):
        raise HaloError(f"`tokenizer` in {path} has names that are no texts.", hint=_ANEW)
    return TokenizerFacts(
        size,
        int(facts["bos"]),
        int(facts["eos"]),
        tuple(facts["opening"]),
        tuple(facts["stops"]),
        tuple(sorted(names.items())),
    )


def _are_ids(values: Iterable[object], size: int) -> bool:
    return all(type(value) is int and 0 <= value < size for value in values)


def read_template(directory: Path) -> str | None:
    """chat_template.jinja of a directory, at most MAX_TEMPLATE bytes; None where there is none."""
    path = directory / TEMPLATE_FILE
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_TEMPLATE + 1)
        if len(data) > MAX_TEMPLATE:
            raise HaloError(f"{path} is larger than {MAX_TEMPLATE} bytes.", hint=_ANEW)
        return data.decode("utf-8")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise HaloError(f"{path} is not UTF-8.", hint=_ANEW) from error
    except OSError as error:
        raise HaloError(f"{path} cannot be read: {error.strerror}.", hint=_ANEW) from error
