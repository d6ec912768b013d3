"""docs/api-fields.md, from the tables in engine/server: python3 -m tests.api_fields > docs/api-fields.md"""

from __future__ import annotations

import sys

from engine.server.fields import FIELDS, Field
from engine.server.other_fields import OTHER_FIELDS

HEAD = """# The fields of the APIs

Every field that the APIs document, and what becomes of it here. **honoured**: it does what its API says.
**refused**: a request with it is answered 400, naming the field; the values in brackets ask for nothing and
are let pass. **ignored**: it is tolerated and changes nothing. A field that no table has is ignored too.

The tables are made from engine/server/fields.py and other_fields.py by
`python3 -m tests.api_fields > docs/api-fields.md`; tests hold them to the official clients' own lists of
fields, and send each field to a live server (tests/engine/test_api_fields.py, test_other_fields.py).
"""


def page() -> str:
    """The whole page."""
    fields = [*FIELDS, *OTHER_FIELDS]
    endpoints = dict.fromkeys(field.endpoint for field in fields)
    tables = (_table(endpoint, [f for f in fields if f.endpoint == endpoint]) for endpoint in endpoints)
    return "\n".join([HEAD, *tables])


def _table(endpoint: str, fields: list[Field]) -> str:
    rows = (f"| `{field.name}` | {field.fate} | {_note(field)} |" for field in fields)
    return "\n".join([f"## {endpoint}", "", "| field | | |", "|---|---|---|", *rows, ""])


def _note(field: Field) -> str:
    harmless = [value for value in field.harmless if value is not None]
    shown = ", ".join(f"`{value!r}`" for value in harmless)
    return f"{field.note} ({shown})" if field.fate == "refused" and harmless else field.note


if __name__ == "__main__":
    sys.stdout.write(page())
