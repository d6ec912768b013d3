"""What the owner declared the box to be (halo.toml), and the flags that change it. Not what the box is."""

from __future__ import annotations

import ipaddress
import json
import tomllib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from engine.errors import HaloError

PROFILES: Final = ("auto", "cpu", "strix-halo")
DEFAULT_LISTEN: Final = "127.0.0.1:8180"


@dataclass(frozen=True)
class Desired:
    """The declared box. `profile` may be auto; a generation always has a resolved one."""

    profile: str = "auto"
    listen: str = DEFAULT_LISTEN
    units: bool = True

    def merged(self, *, profile: str | None, listen: str | None, units: bool | None) -> Desired:
        """This with the flags that were given laid over it."""
        given = {"profile": profile, "listen": listen, "units": units}
        return replace(self, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]

    def text(self) -> str:
        """halo.toml; JSON's strings and booleans are TOML's."""
        lines = [f"{name} = {json.dumps(value)}" for name, value in asdict(self).items()]
        return "# What this box should be; `halo install` reads it.\n" + "\n".join(lines) + "\n"


def load_desired(path: Path) -> Desired:
    """Read halo.toml; a file that is not there is the default box."""
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return Desired()
    except (OSError, ValueError, RecursionError) as error:
        raise HaloError(f"{path} cannot be read: {error}.", hint=f"mend or remove {path}") from error
    known = {name: raw[name] for name in asdict(Desired()) if name in raw}
    desired = Desired(**known)
    if (
        desired.profile not in PROFILES
        or not isinstance(desired.units, bool)
        or not isinstance(desired.listen, str)
    ):
        raise HaloError(f"{path} declares something that halo does not know.", hint=f"mend or remove {path}")
    return desired


def parse_listen(text: str) -> tuple[str, int]:
    """ADDR:PORT to (address, port); the address is an IP address, [bracketed] when version 6."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    host = "127.0.0.1" if host == "localhost" else host
    try:
        address = ipaddress.ip_address(host)
        number = int(port)
    except ValueError:
        number, address = 0, ipaddress.ip_address("127.0.0.1")
    if not 1 <= number <= 65535:
        raise HaloError(f"{text!r} is not an address and port.", hint="for example --listen 127.0.0.1:8180")
    return str(address), number


def format_listen(host: str, port: int) -> str:
    """The reverse of parse_listen."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(listen: str) -> bool:
    """Whether only this machine can reach the address."""
    return ipaddress.ip_address(parse_listen(listen)[0]).is_loopback


def client_address(listen: str) -> tuple[str, int]:
    """Where a client on this box finds the server: the loopback of the family for a wildcard."""
    host, port = parse_listen(listen)
    address = ipaddress.ip_address(host)
    if address.is_unspecified:
        return ("127.0.0.1" if address.version == 4 else "::1"), port
    return host, port
