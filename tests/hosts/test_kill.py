"""Item five: SIGKILL at random moments. `current` is never half-made, the next run completes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import box, hosts, roots
from tests.hosts.box import PORT, SYSTEM
from tests.hosts.hosts import Host
from tests.hosts.network import Bridge

pytestmark = pytest.mark.hosts

KILLS = 5


@pytest.fixture(scope="module")
def host(bridge: Bridge, bundle: Path) -> Iterator[Host]:
    """A bare host without a network, with the bundle; how long an install takes there is measured first."""
    with hosts.launch(bridge, roots.root(roots.BOOKWORM)) as made:
        box.carry_bundle(made, bundle)
        yield made


@pytest.fixture(scope="module")
def seconds(host: Host) -> float:
    """The seconds of one whole install, elsewhere on the same host."""
    return box.install_from_bundle(host, "--no-units", "--prefix", "/srv/measure").seconds


def killed(host: Host, after: float, listen: str, *, whole_group: bool) -> int:
    """Install for `after` seconds, then SIGKILL: the installer with its children, or it alone."""
    # Killed alone, it leaves a pip or a compiler that goes on writing; the next run must cope with that.
    line = box.install_line("--bundle", "bundle", "--scope", "system", "--listen", listen)
    which = "" if whole_group else "--foreground "
    return host.run(
        line.replace("python3 ", f"timeout {which}-s KILL {after:.2f} python3 ", 1), check=False
    ).code


@pytest.mark.parametrize("first", [True, False], ids=["first-install", "upgrade"])
def test_killed_installer(
    host: Host, seconds: float, first: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A person who presses reset in the middle has the old box or the new one, after one more run."""
    assert (box.check_current(host, SYSTEM) == "") is first
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    moments: list[float] = []
    longest = seconds
    port = PORT if first else PORT + 100
    while len(moments) < KILLS:
        # Another address is another generation: each attempt has all of the work before it.
        port += 1
        moment = chance.uniform(0.02, 1.0) * longest
        code = killed(host, moment, f"127.0.0.1:{port}", whole_group=len(moments) % 2 == 0)
        if code == 0:
            longest = moment  # it had completed: this machine is quicker now than when it was measured
        else:
            moments.append(moment)
        box.check_current(host, SYSTEM)
    with capsys.disabled():
        shown = ", ".join(f"{moment:.1f}" for moment in moments)
        print(f"\n  an install of {seconds:.1f} s, seed {seed}, killed after {shown} s")
    box.install_from_bundle(host, "--scope", "system", "--listen", f"127.0.0.1:{port}")
    assert box.check_current(host, SYSTEM)
    assert box.manifest(host, SYSTEM)["listen"] == f"127.0.0.1:{port}"
    assert box.completion(host, SYSTEM, port=port)
    examined = host.run(SYSTEM.halo("doctor"), check=False)
    assert examined.code == 0, examined


def test_nothing_half_made_is_left(host: Host) -> None:
    """What the killed runs left behind is gone or complete: every generation directory has its manifest."""
    line = f"for d in {SYSTEM.prefix}/generations/*/; do test -f $d/manifest.json || echo $d; done"
    assert host.run(line).out == ""
