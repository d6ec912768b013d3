"""What every finding means, read from catalogue.toml; the checks themselves do not need it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

_FILE: Final = Path(__file__).with_name("catalogue.toml")


@dataclass(frozen=True)
class Entry:
    """One finding's explanation. `check` is the id of the check that makes it; "" means nothing to say."""

    check: str
    what: str
    why: str
    found: str
    mended: str = ""
    source: str = ""


@cache
def catalogue() -> Mapping[str, Entry]:
    """Every finding id with its entry, in the order of the file."""
    return {identity: Entry(**values) for identity, values in tomllib.loads(_FILE.read_text()).items()}


def explain(identity: str) -> str:
    """The entry of one finding as lines for a person; "" for an unknown id."""
    entry = catalogue().get(identity)
    if entry is None:
        return ""
    rows = {
        "what": entry.what,
        "why": entry.why,
        "found by": entry.found,
        "mended by": entry.mended,
        "known from": entry.source,
    }
    return "\n".join([identity, *(f"  {name:<11}{text}" for name, text in rows.items() if text)])
