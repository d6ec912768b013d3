#!/usr/bin/env python3
"""The one test command: its own environment, linters, types, then pytest with the arguments given here.

Standard library only. It installs into `.venv` of this checkout, and, as root on a Debian-like machine, the
Debian packages that the native build and the test hosts need. It is not the installer of halo.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "tests" / "requirements.lock"
VENV = ROOT / ".venv"
STAMP = VENV / "halo-tests.stamp"

NATIVE_TOOLS = {"c++": "g++", "cmake": "cmake"}
HOST_TOOLS = {
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "ip": "iproute2",
    "ssh": "openssh-client",
    "slirp4netns": "slirp4netns",
    "git": "git",
}
# What single tests look with; each says that it is left out where its tool is not.
OTHER_TOOLS = {"strace": "strace", "busybox": "busybox"}
TYPED = ("provision", "checks", "engine", "units", "tests.hosts")


class CannotRun(Exception):
    """The tests cannot start on this machine; the message says what is missing and the command that helps."""


def say(text: str) -> None:
    """One line of progress, at once (pytest's own output follows on the same stream)."""
    print(f"tests: {text}", flush=True)


def call(*argv: str | Path) -> int:
    """Run argv in the checkout with its output shown; return its exit code."""
    return subprocess.run([str(word) for word in argv], cwd=ROOT, check=False).returncode


def can_install() -> bool:
    """Whether this is root on a machine with apt."""
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


def apt_install(packages: list[str]) -> bool:
    """Install Debian packages; refresh the package lists once when the first try does not find them."""
    say(f"apt-get install {' '.join(packages)}")
    argv = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages]
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for refresh in (False, True):
        if refresh:
            subprocess.run(["apt-get", "update", "-q"], env=env, check=False, stdout=subprocess.DEVNULL)
        done = subprocess.run(argv, env=env, check=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        if done.returncode == 0:
            return True
    return False


def lacking(tools: dict[str, str]) -> list[str]:
    """The packages of those tools that are not on the path."""
    return sorted({package for tool, package in tools.items() if shutil.which(tool) is None})


def need_python() -> None:
    """Refuse an old Python, and a Python without venv unless it can be installed here."""
    if sys.version_info < (3, 11):  # noqa: UP036 (whoever runs this may have an older one)
        raise CannotRun("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ".")
    if importlib.util.find_spec("ensurepip") and importlib.util.find_spec("venv"):
        return
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
    if not (can_install() and (apt_install([package]) or apt_install(["python3-venv"]))):
        raise CannotRun(f"This Python lacks venv and ensurepip: run `apt-get install {package}` as root.")


def need_native_tools() -> None:
    """A C++ compiler and CMake, for the native engine's tests."""
    packages = lacking(NATIVE_TOOLS)
    if not packages or (can_install() and apt_install(packages)):
        return
    raise CannotRun(
        "The native engine needs a C++ compiler and CMake (missing: " + ", ".join(packages) + "): run"
        " `apt-get install g++ cmake`, `dnf install gcc-c++ cmake` or `pacman -S gcc cmake` as root."
    )


def make_venv() -> Path:
    """The environment of the lock file, made anew when the lock or this Python is another; its python."""
    python = VENV / "bin" / "python"
    key = hashlib.sha256(LOCK.read_bytes() + sys.version.encode() + sys.prefix.encode()).hexdigest()
    if python.exists() and STAMP.exists() and STAMP.read_text() == key:
        return python
    say(f"making {VENV.name} from {LOCK.relative_to(ROOT)}")
    if call(sys.executable, "-m", "venv", "--clear", VENV) != 0:
        raise CannotRun(f"`{sys.executable} -m venv` failed; its message is above.")
    if call(python, "-m", "pip", "install", "-qq", "--require-hashes", "-r", LOCK) != 0:
        raise CannotRun(f"The packages of {LOCK.name} could not be installed; pip's message is above.")
    STAMP.write_text(key)
    return python


def hosts_missing() -> str:
    """Why the test hosts cannot run here, or an empty string; installs what root can install."""
    if os.geteuid() != 0:
        return "needs root"
    packages = lacking(HOST_TOOLS)
    if packages and not (can_install() and apt_install(packages)):
        return "not installed: " + ", ".join(packages)
    return ""


def lint(python: Path) -> int:
    """ruff, then mypy --strict; the first failure's exit code."""
    say("ruff check")
    if code := call(python, "-m", "ruff", "check", "."):
        return code
    say("mypy --strict")
    packages = [word for package in TYPED for word in ("-p", package)]
    return call(python, "-m", "mypy", "--strict", *packages)


def main(arguments: list[str]) -> int:
    """Everything in order; pytest's summary comes last. The exit code is pytest's, or else the linters'."""
    try:
        need_python()
        need_native_tools()
        python = make_venv()
    except CannotRun as error:
        print(f"tests: {error}", file=sys.stderr)
        return 3
    missing = hosts_missing()
    if (others := lacking(OTHER_TOOLS)) and can_install():
        apt_install(others)
    linted = lint(python)
    if linted:
        say("the linters fail (above), and so will this run; the tests follow all the same")
    argv = ["-m", "pytest", "--timeout", "1200"]
    if missing:
        say(f"the test hosts are left out ({missing})")
        argv += ["-m", "not hosts"]
    say("pytest")
    return call(python, *argv, *arguments) or linted


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
