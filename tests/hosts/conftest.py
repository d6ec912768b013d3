"""Fixtures of the test hosts: the bridge of this run, and a bare host that tests may share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import box, hosts, roots
from tests.hosts.hosts import Host
from tests.hosts.network import Bridge


@pytest.fixture(scope="session")
def bridge() -> Iterator[Bridge]:
    """This run's bridge; left-overs of runs that were killed go first."""
    hosts.sweep()
    made = Bridge()
    made.up()
    yield made
    made.down()


@pytest.fixture(scope="module")
def bare(bridge: Bridge) -> Iterator[Host]:
    """A bare Debian 12 with no network beyond the bridge, and a user `ada`; shared by a module's tests."""
    with hosts.launch(bridge, roots.root(roots.BOOKWORM), users=["ada"]) as host:
        yield host


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The offline bundle of this checkout, made once."""
    return box.make_bundle(tmp_path_factory.mktemp("bundle") / "halo.bundle")
