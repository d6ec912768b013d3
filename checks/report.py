"""How findings look: lines for a person, one versioned object for a machine. It decides nothing."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final

from checks.case import Case
from checks.finding import Finding, Folded, Severity
from checks.registry import Outcome

SCHEMA: Final = 1
MARKS: Final = {Severity.FAIL: "✗", Severity.WARN: "⚠", Severity.INFO: "·"}
_COLOURS: Final = {"✓": "green", "✗": "red", "⚠": "yellow", "·": "cyan"}


def as_json(case: Case, outcomes: Sequence[Outcome], folded: Folded, exit_code: int) -> dict[str, Any]:
    """The report as data; `schema` changes when a field changes its meaning."""
    findings = []
    for finding in folded.roots:
        plain = asdict(finding)
        if finding.fix is not None:
            plain["fix"]["command"] = finding.fix.command()
        findings.append({**plain, "consequences": list(folded.consequences.get(finding.id, ()))})
    return {
        "schema": SCHEMA,
        "exit_code": exit_code,
        "profile": case.profile,
        "findings": findings,
        "checks": [
            {
                "id": outcome.check.id,
                "ok": all(each.severity is Severity.INFO for each in outcome.findings),
                "seconds": round(outcome.seconds, 4),
            }
            for outcome in outcomes
        ],
        "decode": asdict(case.decoded) if case.decoded else None,
        "facts": case.facts.summary(),
    }


def print_json(report: dict[str, Any]) -> None:
    print(json.dumps(report, indent=2, ensure_ascii=False, default=str))


def print_table(outcomes: Sequence[Outcome], folded: Folded, details: dict[str, str]) -> None:
    """One line a check; under it each root finding with its evidence, fix and hint."""
    paint = _painter()
    roots = {id(finding) for finding in folded.roots}
    for outcome in outcomes:
        shown = [finding for finding in outcome.findings if id(finding) in roots]
        hidden = [finding for finding in outcome.findings if id(finding) not in roots]
        if hidden and not shown:
            print(paint("·"), f"{outcome.check.title:<27} follows from what is named above or below")
            continue
        mark = MARKS[min((finding.severity for finding in shown), key=lambda s: s.rank)] if shown else "✓"
        detail = details.get(outcome.check.id, "") if not shown else ""
        print(paint(mark), f"{outcome.check.title:<27} {detail}".rstrip())
        for finding in shown:
            for line in finding_lines(finding, folded.consequences.get(finding.id, ())):
                print(printable(line))


def finding_lines(finding: Finding, consequences: Sequence[str] = ()) -> Iterator[str]:
    """A finding as aligned lines: title and id, evidence, what follows from it, fix, hint."""
    yield f"    {MARKS[finding.severity]} {finding.title}  [{finding.id}]"
    rows = [("seen", line) for line in finding.evidence if line]
    if consequences:
        rows.append(("so also", ", ".join(consequences)))
    if finding.fix:
        rows.append(("fix", finding.fix.describe()))
    if finding.hint:
        rows.append(("hint", finding.hint))
    width = max(40, min(shutil.get_terminal_size((110, 24)).columns, 140) - 17)
    for name, text in rows:
        # A command is never broken: a person pastes it.
        lines = [text] if name == "fix" else textwrap.wrap(text, width) or [""]
        yield f"      {name + ':':<9} {lines[0]}"
        yield from (f"{'':<17}{line}" for line in lines[1:])


def printable(text: str) -> str:
    """`text` without control characters: evidence comes from files that anyone may have written."""
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _painter() -> Callable[[str], str]:
    """Marks in colour where a terminal and rich are there, else as they are."""
    if not sys.stdout.isatty():
        return lambda mark: mark
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        return lambda mark: mark
    console = Console()

    def paint(mark: str) -> str:
        with console.capture() as capture:
            console.print(Text(mark, style=_COLOURS.get(mark, "")), end="")
        return capture.get()

    return paint
