"""What the tests of the gfx1151 code share: the compiled code object, and the emulator where it is at hand.

Without the root that has hipcc these tests are skipped with the reason, but fail in CI (CI=true).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.hip import codeobject, emulator, toolchain

Program = Callable[[Path], emulator.Program]


def _without(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI has to compile for gfx1151, and cannot: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def hipcc() -> None:
    """ROCm's compiler can be run."""
    if reason := toolchain.missing():
        _without(reason)


@pytest.fixture(scope="session")
def kernels_code(hipcc: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine's kernels, compiled for gfx1151; HALO_CODE_OBJECT names one that is there already."""
    named = os.environ.get("HALO_CODE_OBJECT")
    return Path(named) if named else codeobject.compiled(tmp_path_factory.mktemp("code"))


@pytest.fixture(scope="session")
def emulated() -> None:
    """tinygrad's checkout is at hand. It is not in CI: a run of these takes many minutes."""
    if emulator.checkout() is None:
        pytest.skip("HALO_TINYGRAD does not name a checkout of tinygrad")


@pytest.fixture(scope="session")
def engine(kernels_code: Path, emulated: None) -> emulator.Program:
    """The engine's kernels, ready to be launched in the emulator."""
    return emulator.load(kernels_code)


@pytest.fixture(scope="session")
def probes(hipcc: None, emulated: None, tmp_path_factory: pytest.TempPathFactory) -> emulator.Program:
    """Small kernels that each use one thing of the machine."""
    source = Path(__file__).with_name("probes.cpp")
    return emulator.load(toolchain.genco(source, tmp_path_factory.mktemp("probes") / "probes.co"))
