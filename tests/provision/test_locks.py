"""The locks: every package by hash, for every Python, and from no named index."""

from __future__ import annotations

import re

import pytest

from provision.bundle import _lock_for
from tests.provision.conftest import CHECKOUT

LOCKS = ("requirements.lock", "toolchain.lock", "pip.lock")


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_is_pinned_and_hashed(name: str) -> None:
    text = (CHECKOUT / "provision" / name).read_text()
    packages = re.findall(r"^[a-z0-9-]+==\S+.*?(?=^[a-z0-9-]+==|\Z)", text, re.MULTILINE | re.DOTALL)
    assert packages
    assert all("--hash=sha256:" in package for package in packages)
    assert "://" not in text and "index" not in text


@pytest.mark.parametrize("minor", [11, 12, 13, 14])
def test_each_python_has_exactly_one_numpy(minor: int, tmp_path: object) -> None:
    """pip decides markers for the Python that runs it, so a bundle for another Python decides them itself."""
    from pathlib import Path

    lock = _lock_for(CHECKOUT / "provision/requirements.lock", Path(str(tmp_path)), minor)
    lines = [line for line in lock.read_text().splitlines() if line.startswith("numpy==")]
    assert len(lines) == 1 and lines[0].count("--hash=sha256:") > 5
