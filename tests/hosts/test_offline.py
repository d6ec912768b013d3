"""Item two of a fresh box: from the bundle, with no network, under a real systemd, for root and for a person.

The client outside is `openai`'s own, on this machine, which reaches the host over the bridge.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.hosts import box, hosts, roots
from tests.hosts.box import PORT, SYSTEM, USER, Owner
from tests.hosts.hosts import Host
from tests.hosts.network import Bridge

pytestmark = pytest.mark.hosts

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def system(bridge: Bridge, bundle: Path) -> Iterator[Host]:
    """A host with neither network, pip nor compiler, on which root has installed from the bundle."""
    with hosts.launch(bridge, roots.root(roots.BOOKWORM)) as host:
        box.carry_bundle(host, bundle)
        box.install_from_bundle(host, "--scope", "system")
        yield host


@pytest.fixture(scope="module")
def user(bridge: Bridge, bundle: Path) -> Iterator[Host]:
    """The same for an ordinary user, whom the administrator lets linger."""
    with hosts.launch(bridge, roots.root(roots.BOOKWORM), users=["ada"]) as host:
        host.run("loginctl enable-linger ada")
        box.carry_bundle(host, bundle, "ada")
        box.install_from_bundle(host, "--scope", "user", user="ada")
        yield host


@pytest.fixture(params=[SYSTEM, USER], ids=["system", "user"])
def installed(request: pytest.FixtureRequest) -> tuple[Host, Owner]:
    """Each scope's host in turn, with who owns the installation."""
    owner: Owner = request.param
    host: Host = request.getfixturevalue(owner.scope)
    return host, owner


def test_socket_answers(installed: tuple[Host, Owner]) -> None:
    """The install is worth nothing if a client on the box gets no words."""
    host, owner = installed
    assert box.has_words(box.completion(host, owner))


def test_doctor_finds_nothing(installed: tuple[Host, Owner]) -> None:
    """Fresh install, zero findings; with the decode through the running server among the checks."""
    host, owner = installed
    examined = host.run(owner.halo("doctor"), user=owner.user, check=False)
    assert examined.code == 0, examined


def test_unit_is_hardened(installed: tuple[Host, Owner], capsys: pytest.CaptureFixture[str]) -> None:
    """A hole in the server must not become a hole in the box: exposure at most 2.5 as systemd sees it."""
    host, owner = installed
    score = box.exposure(host, owner)
    with capsys.disabled():
        print(f"\n  systemd-analyze security, {owner.scope} unit: {score}")
    assert score <= 2.5


def test_second_run_changes_nothing(installed: tuple[Host, Owner]) -> None:
    """Converging is the normal state: the same bundle again is no change."""
    host, owner = installed
    again = box.install_from_bundle(host, "--scope", owner.scope, user=owner.user)
    assert "no change" in again.out


def test_killed_server_comes_back(installed: tuple[Host, Owner]) -> None:
    """The kernel's out-of-memory killer must not end the service; clients wait, they do not fail."""
    host, owner = installed
    before = box.completion(host, owner)
    first = box.kill_server(host, owner)
    assert box.completion(host, owner) == before
    assert box.kill_server(host, owner) != first
    assert box.completion(host, owner) == before


def test_a_server_that_hangs_is_started_anew(installed: tuple[Host, Owner]) -> None:
    """A server that stands still and holds its socket would take every request and answer none."""
    host, owner = installed
    before = box.completion(host, owner)
    shown = box.unit_property(host, owner, "WatchdogUSec")
    assert shown == "2min", shown
    first = box.hang_server(host, owner, "WatchdogSec=2s")
    assert box.completion(host, owner) == before
    assert box.unit_property(host, owner, "MainPID") != first


def test_power_cut_then_boot_answers(installed: tuple[Host, Owner]) -> None:
    """After a power cut the box answers again by itself, although nobody logs in."""
    host, owner = installed
    before = box.completion(host, owner)
    host.power_cut()
    host.boot()
    # root asks: a login of the owner's own would start what has to be running already.
    assert box.completion(host, Owner("root", owner.scope, owner.prefix)) == before


def test_ordered_reboot_answers(installed: tuple[Host, Owner]) -> None:
    """An ordered shutdown does not hang on the server, and the next boot has it again."""
    host, owner = installed
    before = box.completion(host, owner)
    host.reboot()
    assert box.completion(host, Owner("root", owner.scope, owner.prefix)) == before


def listen_to_the_bridge(host: Host) -> openai.OpenAI:
    """Have the system install listen on the host's own address; a client outside with the key it made."""
    box.install_from_bundle(host, "--scope", "system", "--listen", f"{host.address}:{PORT}")
    key = host.run(f"cat {SYSTEM.prefix}/api-key").out.strip()
    return openai.OpenAI(base_url=f"http://{host.address}:{PORT}/v1", api_key=key, max_retries=0)


def test_openai_client_from_outside(system: Host) -> None:
    """Told to listen on the network, the box serves `openai`'s client there, with the key only."""
    assert box.health(f"{system.address}:{PORT}") is None, "it listens on loopback until told otherwise"
    client = listen_to_the_bridge(system)
    model = client.models.list().data[0].id
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=16, temperature=0)
    assert box.has_words(answer.choices[0].text)
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 16
    parts = client.completions.create(model=model, prompt=PROMPT, max_tokens=16, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts if part.choices) == answer.choices[0].text
    question = [{"role": "user", "content": "How do I list files by size?"}]
    reply = client.chat.completions.create(model=model, messages=question, max_tokens=16)  # type: ignore[arg-type]
    assert reply.choices[0].finish_reason in ("stop", "length")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="not-the-key").models.list()
    examined = system.run(SYSTEM.halo("doctor"), check=False)
    assert examined.code == 0, examined


def test_open_address_survives_a_power_cut(system: Host) -> None:
    """What was declared once holds: after a power cut the network address answers with the same key."""
    client = listen_to_the_bridge(system)
    system.power_cut()
    system.boot()
    model = client.models.list().data[0].id
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=4, temperature=0)
    assert answer.choices[0].text


def test_server_that_cannot_start_is_told_by_doctor(system: Host) -> None:
    """A model that lost its file ends in a finding with exit code 1, not in silence behind an open socket."""
    default = f"{SYSTEM.prefix}/current/models/default/model.halo"
    real = system.run(f"readlink -f {default}").out.strip()
    system.run(f"mv {real} {real}.away && systemctl restart halo-server.service", check=False)
    time.sleep(1)
    examined = system.run(SYSTEM.halo("doctor"), check=False)
    system.run(f"mv {real}.away {real} && systemctl reset-failed && systemctl restart halo-server.socket")
    assert examined.code == 1, examined
    assert "model" in examined.out
