"""The units: hardened in every form, tied to `current` and not to a generation."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest

from engine.errors import HaloError
from units.render import SERVICE, SOCKET, UnitContext, render_units

FORMS = list(
    product(("system", "user"), ("cpu", "strix-halo"), ("127.0.0.1:8180", "0.0.0.0:8180", "[::1]:80"))
)
needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here"
)


def form(scope: str, profile: str, listen: str) -> UnitContext:
    keys = Path("/opt/halo/api-keys.sha256") if listen.startswith("0.") else None
    return UnitContext(scope, profile, Path("/opt/halo"), listen, keys)  # type: ignore[arg-type]


@needs_analyze
@pytest.mark.parametrize(("scope", "profile", "listen"), FORMS)
def test_exposure_is_at_most_2_5(tmp_path: Path, scope: str, profile: str, listen: str) -> None:
    for name, text in render_units(form(scope, profile, listen)).items():
        (tmp_path / name).write_text(text)
    argv = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(tmp_path / SERVICE)]
    said = subprocess.run(argv, capture_output=True, text=True, check=False).stdout
    level = re.search(r"exposure level for .*: (\d+\.\d)", said)
    assert level is not None, said
    assert float(level[1]) <= 2.5


@needs_analyze
@pytest.mark.parametrize(("scope", "profile", "listen"), FORMS)
def test_systemd_knows_every_setting(tmp_path: Path, scope: str, profile: str, listen: str) -> None:
    for name, text in render_units(form(scope, profile, listen)).items():
        (tmp_path / name).write_text(text)
    argv = ["systemd-analyze", "verify", "--man=no", str(tmp_path / SOCKET), str(tmp_path / SERVICE)]
    said = subprocess.run(argv, capture_output=True, text=True, check=False).stderr
    wrong = [line for line in said.splitlines() if "Unknown" in line or "Failed to parse" in line]
    assert not wrong


@pytest.mark.parametrize(("scope", "profile", "listen"), FORMS)
def test_nothing_names_a_generation_and_nothing_is_left_to_fill_in(
    scope: str, profile: str, listen: str
) -> None:
    for text in render_units(form(scope, profile, listen)).values():
        assert "generations" not in text
        assert not re.search(r"\$|__[A-Z]+__|~/", text)
        assert "/opt/halo/current/" in text


def test_only_loopback_is_fenced_and_only_others_have_keys() -> None:
    inner = render_units(form("system", "cpu", "127.0.0.1:8180"))
    outer = render_units(form("system", "cpu", "0.0.0.0:8180"))
    for name in (SOCKET, SERVICE):
        assert "IPAddressDeny=any" in inner[name]
        assert "IPAddress" not in outer[name]
    assert "api-keys" not in inner[SERVICE]
    assert "LoadCredential=api-keys:/opt/halo/api-keys.sha256" in outer[SERVICE]
    assert "--api-keys %d/api-keys" in outer[SERVICE]


def test_devices_are_for_strix_halo_alone() -> None:
    cpu = render_units(form("system", "cpu", "127.0.0.1:1"))[SERVICE]
    strix = render_units(form("system", "strix-halo", "127.0.0.1:1"))[SERVICE]
    assert "PrivateDevices=yes" in cpu and "render" not in cpu
    assert "DeviceAllow=/dev/kfd rw" in strix and "SupplementaryGroups=render video" in strix


def test_the_gpus_runtime_gets_what_it_cannot_do_without_and_the_cpu_nothing_more() -> None:
    """Without /proc/cpuinfo, or sched_setaffinity for its threads, ROCm's runtime does not start."""
    cpu = render_units(form("system", "cpu", "127.0.0.1:1"))[SERVICE]
    strix = render_units(form("system", "strix-halo", "127.0.0.1:1"))[SERVICE]
    for settings in (
        "ProcSubset=pid",
        "MemoryDenyWriteExecute=yes",
        "SystemCallFilter=~@privileged @resources",
    ):
        assert f"\n{settings}\n" in cpu and settings not in strix
    for settings in ("ProcSubset=all", "MemoryDenyWriteExecute=no", "SystemCallFilter=~@privileged"):
        assert f"\n{settings}\n" in strix
    assert "ProtectProc=invisible" in strix and "SystemCallFilter=@system-service" in strix


@pytest.mark.parametrize("prefix", ["/with space", "/50%", "/new\nline", "/semi;colon", "/dollar$HOME"])
def test_prefix_that_a_unit_cannot_carry_is_refused(prefix: str) -> None:
    with pytest.raises(HaloError, match="letter"):
        render_units(UnitContext("user", "cpu", Path(prefix), "127.0.0.1:8180"))


def test_without_namespaces_what_needs_none_stays() -> None:
    """Where a user may make no namespaces the service must start, and keep the walls that need none."""
    context = UnitContext("user", "cpu", Path("/opt/halo"), "127.0.0.1:8180", None, namespaces=False)
    service = render_units(context)[SERVICE]
    settings = {line.partition("=")[0] for line in service.splitlines()}
    assert not {name for name in settings if name.startswith(("Private", "Protect", "Device", "ProcSubset"))}
    assert {"NoNewPrivileges", "SystemCallFilter", "RestrictNamespaces", "MemoryDenyWriteExecute"} <= settings
