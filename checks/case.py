"""All that a check may look at: facts, what was asked for, and what probes saw. It runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from checks.facts import Facts

Profile = Literal["cpu", "strix-halo"]
Scope = Literal["user", "system"]

INSTALL_BYTES: Final = 600_000_000  # venv, native library, model and its prepared form, and room
RUN_BYTES: Final = 50_000_000


@dataclass(frozen=True)
class Request:
    """What an install intends, as far as preflight must know it.

    `prefix` is where it goes ("" when not decided yet); `compiler` says whether one must be on the machine:
    "required", "optional" (a wheel's toolchain can serve) or "unneeded" (a bundle brings the libraries).
    `port_ours` is True when the caller knows that halo itself holds the port. `units` False leaves systemd
    alone. `disk_bytes` is what must be free at the prefix.
    """

    prefix: str = ""
    scope: Scope = "user"
    listen: str = "127.0.0.1:8180"
    disk_bytes: int = INSTALL_BYTES
    compiler: Literal["required", "optional", "unneeded"] = "optional"
    units: bool = True
    port_ours: bool = False


@dataclass(frozen=True)
class CompileProbe:
    """One `--offload-arch` compile: what ran, its code (-1 timed out, -2 not started), its last words."""

    command: tuple[str, ...]
    code: int
    tail: str
    seconds: float
    bytes_made: int

    @property
    def ok(self) -> bool:
        return self.code == 0 and self.bytes_made > 0


@dataclass(frozen=True)
class Installed:
    """What lies under a prefix: the current generation, its manifest, and how its files compare with it.

    `problem` is "" for a sound manifest, else why there is none to judge by. `wrong_files` maps a relative
    path to what is wrong: missing, denied, or the sha256 that was found. `model_problems` are sentences.
    """

    prefix: str
    generation: str = ""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    exists: bool = False
    problem: str = ""
    files_checked: int = 0
    wrong_files: Mapping[str, str] = field(default_factory=dict)
    model_problems: tuple[str, ...] = ()
    unit_links: Mapping[str, str] = field(default_factory=dict)

    @property
    def scope(self) -> Scope:
        return "system" if self.manifest.get("scope") == "system" else "user"

    @property
    def units_wanted(self) -> bool:
        """False when the install left systemd alone (--no-units)."""
        return bool(self.manifest.get("systemd", True))

    def served(self, *, systemd: bool) -> bool:
        """Whether a server is expected to answer: there are units, and a `systemd` to run them."""
        return self.units_wanted and systemd

    @property
    def golden(self) -> tuple[Mapping[str, Any], ...]:
        model = self.manifest.get("model")
        golden = model.get("golden") if isinstance(model, Mapping) else None
        return tuple(each for each in golden if isinstance(each, Mapping)) if isinstance(golden, list) else ()


@dataclass(frozen=True)
class Decoded:
    """What the running server answered. `health` and `ids` are None when the call failed; `error` says why.

    `code` is the HTTP status of the failing call, 0 when there was no answer at all. `by_engine` is True when
    no server was expected and the generation's own engine decoded instead; `asked` when
    the address was named by the asker, so that silence is a failure.
    """

    url: str
    health: Mapping[str, Any] | None = None
    prompt: str = ""
    wanted: tuple[int, ...] = ()
    ids: tuple[int, ...] | None = None
    seconds: float = 0.0
    error: str = ""
    code: int = 0
    by_engine: bool = False
    asked: bool = False


@dataclass(frozen=True)
class Case:
    """One box and one question. A probe's field is None when that probe was not asked for."""

    facts: Facts
    profile: Profile
    request: Request = field(default_factory=Request)
    compile_probe: CompileProbe | None = None
    installed: Installed | None = None
    decoded: Decoded | None = None
