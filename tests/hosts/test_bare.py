"""Item one of a fresh box: bare Debian 12, Python and a network, a clean clone, the README's command."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.hosts import box, hosts, roots
from tests.hosts.box import STEPS, SYSTEM
from tests.hosts.hosts import Host
from tests.hosts.network import Bridge
from tests.hosts.shell import Result

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module")
def fresh(bridge: Bridge) -> Iterator[Host]:
    """A bare Debian 12 that reaches package registries, with a clean clone in root's home."""
    with hosts.launch(bridge, roots.root(roots.BOOKWORM), online=True) as host:
        box.carry_source(host)
        yield host


@pytest.fixture(scope="module")
def installed(fresh: Host) -> Result:
    """What the README's first command printed there, with no terminal and no answer to a question."""
    assert fresh.run("command -v g++ cmake pip3", check=False).out == "", "this root is not bare"
    return box.install(fresh)


def test_first_command_ends_green_with_a_sentence(
    installed: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    """A newcomer's first minute: every step is shown with its time, and the model has said something."""
    seconds = box.step_seconds(installed.out)
    with capsys.disabled():
        shown = "  ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        print(
            f"\n  bare Debian 12, {installed.seconds:.1f} s in all: {shown}\n  {box.decoded(installed.out)}"
        )
    assert tuple(seconds) == STEPS
    assert box.has_words(box.decoded(installed.out))
    assert "\u2717" not in installed.out
    # The one warning that belongs there: profile auto found no Strix Halo, and says that it uses the CPU.
    assert re.findall(r"\u26a0 .*\[(.+)\]$", installed.out, re.MULTILINE) == ["gpu.absent"]


def test_second_run_changes_nothing_and_says_so(
    fresh: Host, installed: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever is unsure whether it went through runs it again; that must be harmless, and quick."""
    before = box.snapshot(fresh)
    again = box.install(fresh)
    with capsys.disabled():
        print(f"\n  second run: {again.seconds:.1f} s")
    assert "no change" in again.out
    changed = {line for line in before ^ box.snapshot(fresh) if not re.search(r"/(journal|log|lock)", line)}
    assert not changed


def test_fresh_install_has_no_findings(fresh: Host, installed: Result) -> None:
    """A doctor that finds fault with a fresh install is a doctor that nobody believes later."""
    examined = fresh.run(SYSTEM.halo("doctor"), check=False)
    assert examined.code == 0, examined


def test_launcher_is_on_the_path(fresh: Host, installed: Result) -> None:
    """The next command of the README works as it is printed: `halo`, in a new login shell."""
    said = fresh.run("halo generate --temperature 0 --max-tokens 16 'Once upon a time'").out
    assert box.has_words(said)


def test_removed_server_file_is_noticed_and_mended(fresh: Host, installed: Result) -> None:
    """A library that somebody deleted is a finding, and running the first command again brings it back."""
    fresh.run(f"rm {SYSTEM.prefix}/current/lib/libhalo_cpu.so")
    assert fresh.run(SYSTEM.halo("doctor"), check=False).code == 1
    box.install(fresh)
    assert box.check_current(fresh, SYSTEM)
    assert fresh.run(SYSTEM.halo("doctor"), check=False).code == 0
