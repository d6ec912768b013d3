"""What the steps of one run share: where, what is wanted, what was found, how to undo. No step's logic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from provision.desired import Desired
from provision.layout import Layout
from provision.render import Screen
from provision.run import Log

if TYPE_CHECKING:
    from provision.journal import Journal
    from provision.toolchain import Toolchain
    from provision.venv import Interpreter


@dataclass(frozen=True)
class Action:
    """One line of a plan: what would be done, and why."""

    what: str
    why: str = ""


@dataclass
class Context:
    """One run of `halo install`. `journal` is None in a dry run, which then has nothing to write to."""

    layout: Layout
    desired: Desired
    source: Path
    screen: Screen
    log: Log
    bundle: Path | None = None
    journal: Journal | None = None

    # found by preflight
    python: Interpreter | None = None
    profile: Literal["cpu", "strix-halo"] = "cpu"
    version: str = ""
    source_sha256: str = ""
    name: str = ""
    in_place: bool = False
    namespaces: bool = True
    begun: bool = False
    missing: tuple[str, ...] = ()
    tools: Toolchain | None = None
    warnings: int = 0

    # made on the way
    changes: list[str] = field(default_factory=list)
    undo: list[tuple[str, Callable[[], None]]] = field(default_factory=list)
    build: dict[str, Any] = field(default_factory=dict)
    served: bool = False
    restart_due: bool = False
    sentence: str = ""

    @property
    def hip(self) -> bool:
        """Whether the GPU's library belongs to this install."""
        return self.profile == "strix-halo"

    @property
    def directory(self) -> Path:
        """The generation that this run is about."""
        return self.layout.generation(self.name)

    @property
    def venv_python(self) -> Path:
        """The generation's interpreter."""
        return self.directory / "venv/bin/python"

    @property
    def wheels(self) -> Path | None:
        """The bundle's wheels, if this run is from a bundle."""
        return self.bundle / "wheels" if self.bundle is not None else None

    def interpreter(self) -> Interpreter:
        """The interpreter that preflight chose."""
        assert self.python is not None, "preflight chooses the interpreter"
        return self.python

    def warn(self, text: str, hint: str = "") -> None:
        """A ⚠ on the screen and in the log."""
        self.warnings += 1
        self.log.write(f"WARNING {text}" + (f" (hint: {hint})" if hint else ""))
        self.screen.note("\u26a0", text, hint)

    @contextmanager
    def change(self, step: str, what: str, **details: object) -> Iterator[None]:
        """A journalled mutation: the intent is durable before the block runs."""
        assert self.journal is not None, "a dry run changes nothing"
        self.changes.append(what)
        self.log.write(f"CHANGE {what}")
        with self.journal.intent(step, what, **details):
            yield
