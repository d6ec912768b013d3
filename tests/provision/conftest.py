"""What the installer's tests share: a clean clone, a tiny model, a bundle made once, a box."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from provision.files import copy_files, source_files
from provision.generations import SOURCE_NAMES
from tests.provision.demo import make_demo

CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass
class Box:
    """A home directory to install into, and the environment of whoever installs there."""

    home: Path
    clone: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def prefix(self) -> Path:
        return self.home / "halo"

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_"))}
        temporary = self.home.parent / f"{self.home.name}-tmp"
        temporary.mkdir(exist_ok=True)
        base = {"PATH": os.environ["PATH"], "HOME": str(self.home), "TMPDIR": str(temporary)}
        return {**kept, **base, **self.env}

    def argv(self, *options: str) -> list[str]:
        places = ["--scope", "user", "--prefix", str(self.prefix), "--profile", "cpu"]
        return [sys.executable, str(self.clone / "install.py"), *places, *options]

    def install(self, *options: str, kill_after: float | None = None, signum: int = signal.SIGKILL) -> Ended:
        """Run install.py; with `kill_after` send a signal to it alone after so many seconds."""
        started = time.monotonic()
        with subprocess.Popen(
            self.argv(*options),
            env=self.environment(),
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=kill_after or 600)
            except subprocess.TimeoutExpired:
                process.send_signal(signum)
                out, err = process.communicate(timeout=60)
        return Ended(process.returncode, out, err, time.monotonic() - started)

    def halo(self, *words: str) -> Ended:
        """Run the installed halo."""
        started = time.monotonic()
        argv = [str(self.prefix / "current/bin/halo"), *words]
        done = subprocess.run(argv, env=self.environment(), capture_output=True, text=True, check=False)
        return Ended(done.returncode, done.stdout, done.stderr, time.monotonic() - started)

    def snapshot(self) -> set[str]:
        """Every path under the home directory with its size and link target.

        pip asks rustc for its version, and a rustup behind it writes its settings: that is theirs, not ours.
        """
        seen = set()
        for path in self.home.rglob("*"):
            if path.relative_to(self.home).parts[0] in (".rustup", ".cache"):
                continue
            target = os.readlink(path) if path.is_symlink() else ""  # noqa: PTH115
            size = path.stat().st_size if path.is_file() and not path.is_symlink() else 0
            seen.add(f"{path.relative_to(self.home)} {size} {target}")
        return seen


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model."""
    return make_demo(tmp_path_factory.mktemp("demo") / "model")


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory, demo: Path) -> Path:
    """A clean clone whose bundled model is the tiny one."""
    place = tmp_path_factory.mktemp("clone")
    copy_files(CHECKOUT, source_files(CHECKOUT, SOURCE_NAMES), place)
    shutil.rmtree(place / "engine/models/demo", ignore_errors=True)
    shutil.copytree(demo, place / "engine/models/demo")
    return place


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, clone: Path) -> Path:
    """A bundle of that clone for this Python, made by `halo bundle` itself."""
    target = tmp_path_factory.mktemp("bundle") / "halo.tar"
    argv = [sys.executable, "-m", "provision.cli", "bundle", "-o", str(target)]
    done = subprocess.run(argv, cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@pytest.fixture
def box(tmp_path: Path, clone: Path) -> Box:
    """A home directory with nothing in it."""
    home = tmp_path / "home"
    home.mkdir()
    return Box(home, clone)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, clone: Path, bundle: Path) -> Box:
    """A home directory with an installation from the bundle; tests of one module share it."""
    home = tmp_path_factory.mktemp("installed") / "home"
    home.mkdir()
    made = Box(home, clone)
    result = made.install("--bundle", str(bundle))
    assert result.code == 0, result.out + result.err
    return made
