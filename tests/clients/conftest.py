"""A live server for real clients: `halo serve` as a process, on a real socket, with the demo model."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.formats.h1b import read_h1b
from engine.formats.prepared import prepare
from engine.formats.store import seal, unpack
from tests.engine.conftest import built
from tests.engine.test_native_serving import DEMO, served

LOCK = Path(__file__).with_name("requirements.lock")


@pytest.fixture(scope="session")
def native_library(request: pytest.FixtureRequest) -> Path:
    """libhalo_cpu.so of this checkout."""
    return built(request, "halo_cpu", "-DHALO_HIP=OFF")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model's directory."""
    directory = unpack(DEMO, tmp_path_factory.mktemp("store"))
    prepare(read_h1b(directory / "model.h1b"), directory / "model.halo")
    seal(directory)
    return directory


@pytest.fixture(scope="session")
def live(demo: Path, native_library: Path) -> Iterator[str]:
    """The URL of a server; it must also end cleanly."""
    with served(demo, native_library) as url:
        yield url


@pytest.fixture(scope="session")
def others_python(request: pytest.FixtureRequest) -> Path:
    """A Python with the clients whose pins do not fit beside the tests' own (litellm wants openai 2.x).

    Made once for its lock, kept in $HALO_TEST_BUILD or pytest's cache.
    """
    cache = getattr(request.config, "cache", None)
    root = Path(os.environ.get("HALO_TEST_BUILD") or cache.mkdir("halo-clients"))
    key = hashlib.sha256(LOCK.read_bytes() + sys.version.encode()).hexdigest()[:16]
    venv = root / f"clients-{key}"
    python = venv / "bin" / "python"
    if not (venv / "whole").exists():
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(venv)],
            [str(python), "-m", "pip", "install", "-qq", "--require-hashes", "-r", str(LOCK)],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
        (venv / "whole").touch()
    return python
