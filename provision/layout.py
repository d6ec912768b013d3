"""Where an installation lives: scope, prefix, state, unit directory, launcher link. Pure paths."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from engine.errors import HaloError

Scope = Literal["user", "system"]
HOME_ROOTS: Final = (Path("/root"), Path("/home"), Path("/run/user"))


def source_root() -> Path:
    """The source that this process runs from: a clone, an unpacked bundle or a generation."""
    return Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Layout:
    """The places of one installation; `standard` unless the owner moved them with --prefix."""

    scope: Scope
    prefix: Path
    state: Path
    unit_dir: Path
    launcher: Path
    standard: bool = True

    @property
    def generations(self) -> Path:
        """All generations, complete or not."""
        return self.prefix / "generations"

    @property
    def current(self) -> Path:
        """The link whose rename is the commit point."""
        return self.prefix / "current"

    @property
    def previous(self) -> Path:
        """The link to what was current before."""
        return self.prefix / "previous"

    @property
    def models_link(self) -> Path:
        """The compatibility link: a path to the models that never changes."""
        return self.prefix / "models"

    @property
    def config(self) -> Path:
        """halo.toml, what the owner declared."""
        return self.prefix / "halo.toml"

    @property
    def api_key(self) -> Path:
        """The owner's API key, mode 0600; only where the server listens beyond loopback."""
        return self.prefix / "api-key"

    @property
    def api_keys_hashed(self) -> Path:
        """What the server is given: sha256 of each key."""
        return self.prefix / "api-keys.sha256"

    @property
    def store(self) -> Path:
        """The content-addressed model store."""
        return self.state / "models"

    @property
    def journal(self) -> Path:
        """One JSON-lines file a run."""
        return self.state / "journal"

    @property
    def receipts(self) -> Path:
        """One file a generation that proved itself."""
        return self.state / "receipts"

    @property
    def logs(self) -> Path:
        """One file a run."""
        return self.state / "logs"

    @property
    def lock(self) -> Path:
        """Held by the one run that may change things."""
        return self.state / "lock"

    def generation(self, name: str) -> Path:
        """The directory of one generation."""
        return self.generations / name


def data_home() -> Path:
    """$XDG_DATA_HOME, or what the specification says when it is unset or relative."""
    value = os.environ.get("XDG_DATA_HOME", "")
    return Path(value) if value.startswith("/") else Path.home() / ".local/share"


def config_home() -> Path:
    """$XDG_CONFIG_HOME, or what the specification says when it is unset or relative."""
    value = os.environ.get("XDG_CONFIG_HOME", "")
    return Path(value) if value.startswith("/") else Path.home() / ".config"


def default_scope() -> Scope:
    """System for root, user for anyone else."""
    return "system" if os.geteuid() == 0 else "user"


def resolve_layout(scope: Scope | None, prefix: Path | None) -> Layout:
    """The places for `scope` and an optional `prefix`; refuses a system install without root."""
    chosen: Scope = scope or default_scope()
    if chosen == "system" and os.geteuid() != 0:
        raise HaloError(
            "A system install needs root.",
            hint="sudo python3 install.py --scope system, or --scope user without root",
        )
    return places(chosen, prefix)


def places(scope: Scope, prefix: Path | None) -> Layout:
    """The places for `scope` and an optional `prefix`, for anyone to look at."""
    standard = prefix is None
    if prefix is not None:
        prefix = Path(os.path.abspath(prefix.expanduser()))  # noqa: PTH100  # links in it are the owner's
    if scope == "system":
        base = prefix or Path("/opt/halo")
        state = base / "state" if prefix else Path("/var/lib/halo")
        return Layout(scope, base, state, Path("/etc/systemd/system"), Path("/usr/local/bin/halo"), standard)
    base = prefix or data_home() / "halo"
    units, launcher = config_home() / "systemd/user", Path.home() / ".local/bin/halo"
    return Layout(scope, base, base / "state", units, launcher, standard)


def in_a_home(path: Path) -> bool:
    """Whether `path` is where a hardened system service cannot look."""
    return any(path.is_relative_to(root) for root in HOME_ROOTS)
