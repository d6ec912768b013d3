"""A generation's Python environment: which interpreter, which pip, which hashed wheels."""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from engine.errors import HaloError
from provision.distro import detect_manager, install_command
from provision.layout import in_a_home
from provision.run import Log, Result, failure, run

VERSIONS: Final = ((3, 11), (3, 12), (3, 13), (3, 14))
COMPILED_SOURCES: Final = ("engine", "provision", "checks", "units")
COMPILED_PACKAGES: Final = (
    "anyio", "h11", "idna", "jinja2", "llguidance", "markupsafe", "msgspec", "numpy", "prometheus_client",
    "starlette", "tiktoken", "uvicorn",
)  # fmt: skip
_PROBE: Final = """
import importlib.util as u, json, os, sys, sysconfig
found = u.find_spec("ensurepip")
bundled = os.path.join(os.path.dirname(found.origin), "_bundled") if found and found.origin else ""
print(json.dumps({"version": list(sys.version_info[:2]), "base": sys.base_prefix,
  "venv": all(u.find_spec(n) for n in ("venv", "ctypes", "lzma", "zlib")),
  "pip": u.find_spec("pip") is not None,
  "wheels": [bundled, sysconfig.get_config_var("WHEEL_PKG_DIR") or "", "/usr/share/python-wheels"]}))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python that a venv can be made from."""

    path: Path
    version: tuple[int, int]
    base: Path
    has_venv: bool
    has_pip: bool
    wheel_dirs: tuple[Path, ...]

    @property
    def tag(self) -> str:
        """Major and minor, as in 3.11."""
        return f"{self.version[0]}.{self.version[1]}"

    def pip_wheel(self) -> Path | None:
        """The pip wheel that came with this interpreter, or with its distribution."""
        return next((wheel for place in self.wheel_dirs for wheel in sorted(place.glob("pip-*.whl"))), None)


def probe(path: Path, log: Log | None = None) -> Interpreter | None:
    """What the interpreter at `path` has, or None if it does not run or is not one of 3.11 to 3.14."""
    result = run([path, "-I", "-c", _PROBE], log=log, timeout=30, check=False)
    if not result.ok:
        return None
    try:
        facts = json.loads(result.stdout)
    except ValueError:
        return None
    version = (int(facts["version"][0]), int(facts["version"][1]))
    if version not in VERSIONS:
        return None
    wheels = tuple(Path(place) for place in facts["wheels"] if place)
    return Interpreter(path, version, Path(facts["base"]), facts["venv"], facts["pip"], wheels)


def base_interpreter() -> Path:
    """The interpreter behind the running one, also when that is a venv's."""
    return Path(getattr(sys, "_base_executable", None) or sys.executable)


def choose_interpreter(scope: str, log: Log | None = None) -> Interpreter:
    """The interpreter for a generation's venv: the running one, unless the service could not reach it.

    A hardened system service does not see /root and /home, so a system install needs a Python elsewhere.
    """
    running = probe(base_interpreter(), log)
    if running is not None and (scope == "user" or not in_a_home(running.base)):
        return running
    for directory in ("/usr/bin", "/usr/local/bin"):
        for name in ("python3", *(f"python3.{minor}" for _, minor in reversed(VERSIONS))):
            candidate = probe(Path(directory) / name, log) if (Path(directory) / name).exists() else None
            if candidate is not None and not in_a_home(candidate.base):
                return candidate
    where = running.base if running is not None else base_interpreter()
    raise HaloError(
        f"The only Python from 3.11 to 3.14 here lives at {where}, where a system service cannot read it.",
        hint=f"{install_command(('venv',), detect_manager())}; or use --scope user",
    )


def pip_command(python: Interpreter, venv: Path, wheels: Path | None) -> list[str] | None:
    """The argv that runs a pip for the venv: the bundle's, the interpreter's, the distribution's; or None."""
    bundled = sorted(wheels.glob("pip-*.whl")) if wheels is not None else []
    wheel = bundled[-1] if bundled else None
    if wheel is None and python.has_pip:
        return [str(python.path), "-m", "pip", "--python", str(venv / "bin/python")]
    wheel = wheel or python.pip_wheel()
    return [str(venv / "bin/python"), "-I", f"{wheel}/pip"] if wheel is not None else None


def create(python: Interpreter, venv: Path, log: Log) -> None:
    """Make an empty venv, without pip: every tool that fills it runs from outside."""
    run(
        [python.path, "-I", "-m", "venv", "--without-pip", venv],
        log=log,
        timeout=60,
        what="The virtual environment cannot be made",
        hint=install_command(("venv",), detect_manager()),
    )


def site_packages(venv: Path, python: Interpreter) -> Path:
    """Where the venv's packages are."""
    return venv / "lib" / f"python{python.tag}" / "site-packages"


def install(
    pip: Sequence[str],
    lock: Path,
    log: Log,
    *,
    wheels: Path | None = None,
    target: Path | None = None,
    tick: Callable[[], None] | None = None,
) -> Result:
    """Install every line of `lock` by its hash, from `wheels` alone when given. Raises HaloError."""
    argv = [*pip, "--disable-pip-version-check", "--no-input", "install", "--require-hashes", "--no-deps"]
    argv += ["--no-compile", "--only-binary", ":all:", "--root-user-action", "ignore", "-r", str(lock)]
    argv += ["--no-index", "--find-links", str(wheels)] if wheels is not None else []
    argv += ["--target", str(target)] if target is not None else []
    # A bundle decides alone: no index or wheel directory of the user's settings may add to it.
    env = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""} if wheels else {}
    result = run(argv, log=log, env=env, check=False, timeout=1800, tick=tick)
    if result.ok:
        return result
    said = result.stderr + result.stdout
    if "THESE PACKAGES DO NOT MATCH THE HASHES" in said:
        raise HaloError(
            "A package does not have the hash that the lock names.",
            hint="nothing was installed; get the bundle anew, or mend the mirror that pip is set to",
        )
    what = "The Python packages cannot be installed"
    if any(
        sign in said
        for sign in ("NewConnectionError", "Temporary failure in name resolution", "No matching dist")
    ):
        raise HaloError(
            f"{what}: no package index answers with what the lock names.",
            hint="check the network and pip's settings (pip config list), or use a bundle: --bundle FILE",
        )
    raise failure(result, what=what)


def compile_modules(venv: Path, python: Interpreter, source: Path, log: Log) -> None:
    """Write the bytecode of what the service imports: it may write nowhere, and would compile each time."""
    packages = site_packages(venv, python)
    folders = [
        *(source / name for name in COMPILED_SOURCES),
        *(packages / name for name in COMPILED_PACKAGES),
    ]
    found = [folder for folder in folders if folder.is_dir()]
    # A package may carry a file of another Python's syntax; what is not compiled is compiled when imported.
    run([venv / "bin/python", "-I", "-m", "compileall", "-q", *found], log=log, check=False, timeout=300)


def has_feature(name: str) -> bool:
    """Whether a program is on PATH."""
    return shutil.which(name) is not None


def wheel_platform() -> str:
    """The platform tag of this interpreter, for a bundle's manifest."""
    return sysconfig.get_platform()
