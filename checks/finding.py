"""A finding: one thing that is wrong with a box, as data. How it was found is for the checks."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Severity(StrEnum):
    """fail: halo cannot do its work. warn: it works, less well or not for long. info: worth knowing."""

    FAIL = "fail"
    WARN = "warn"
    INFO = "info"

    @property
    def rank(self) -> int:
        return list(Severity).index(self)


class Confidence(StrEnum):
    """How sure the check is: a value read (certain), a derived rule (likely), a report (possible)."""

    CERTAIN = "certain"
    LIKELY = "likely"
    POSSIBLE = "possible"


@dataclass(frozen=True)
class Fix:
    """What mends a finding. `argv` lists commands in order; empty when a person must act (firmware setup)."""

    summary: str
    argv: tuple[tuple[str, ...], ...] = ()
    needs_root: bool = False
    reboot: bool = False
    relogin: bool = False
    reversible: bool = True

    def command(self) -> str:
        """The commands as one line that a person can paste."""
        prefix = "sudo " if self.needs_root else ""
        return " && ".join(prefix + shlex.join(argv) for argv in self.argv)

    def describe(self) -> str:
        after = "then reboot" if self.reboot else "then log in again" if self.relogin else ""
        parts = [self.summary, self.command(), after]
        return ": ".join(part for part in parts[:2] if part) + (f" ({after})" if after else "")


@dataclass(frozen=True)
class Finding:
    """One failure with its proof and its cure. `id` is stable for ever; `depends_on` names root causes."""

    id: str
    title: str
    severity: Severity
    evidence: tuple[str, ...] = ()
    affects: str = ""
    confidence: Confidence = Confidence.CERTAIN
    depends_on: tuple[str, ...] = ()
    fix: Fix | None = None
    hint: str = ""


@dataclass(frozen=True)
class Folded:
    """Root causes in order of weight, and under each the ids of the findings that follow from it."""

    roots: tuple[Finding, ...] = ()
    consequences: dict[str, tuple[str, ...]] = field(default_factory=dict)


def fold(findings: Iterable[Finding]) -> Folded:
    """Hide each finding whose cause is present too; causes are followed through several steps.

    A dependency names a finding ("gpu.absent") or a whole group ("gpu"). The order of roots is severity, then
    the order given.
    """
    given = list(findings)
    parent: dict[str, str] = {}
    for finding in given:
        cause = _cause(finding, given)
        if cause and _top(cause, parent) != finding.id:  # a circle of dependencies keeps one of its members
            parent[finding.id] = cause
    roots = [finding for finding in given if finding.id not in parent]
    consequences: dict[str, tuple[str, ...]] = {}
    for child in parent:
        top = _top(child, parent)
        consequences[top] = (*consequences.get(top, ()), child)
    return Folded(tuple(sorted(roots, key=lambda finding: finding.severity.rank)), consequences)


def _cause(finding: Finding, given: Sequence[Finding]) -> str:
    """The first other finding of fail or warn weight that `finding` depends on, or ""."""
    for needed in finding.depends_on:
        for other in given:
            named = other.id == needed or other.id.startswith(needed + ".")
            if named and other.id != finding.id and other.severity is not Severity.INFO:
                return other.id
    return ""


def _top(child: str, parent: dict[str, str]) -> str:
    seen = {child}
    while parent.get(child) and parent[child] not in seen:
        child = parent[child]
        seen.add(child)
    return child
