"""Streams of real machines: what preflight says of a bare Debian 12 and of a forky with hipcc."""

from __future__ import annotations

import pytest

from checks.case import Request
from checks.doctor import preflight
from checks.facts import Facts, parse
from checks.finding import Severity
from tests.checks.boxes import FIXTURES


def captured(name: str) -> Facts:
    return parse((FIXTURES / "captured" / f"{name}.facts").read_bytes())


def test_forky_is_read_as_it_was() -> None:
    facts = captured("debian-forky-hipcc")
    assert (facts.os.id, facts.os.codename, facts.os.version_id) == ("debian", "forky", "")
    (root,) = facts.rocm
    assert (root.path, root.hipcc, root.version) == ("/usr", "/usr/bin/hipcc", (6, 4))
    assert root.hip_cmake
    assert facts.tools["cmake"].version >= (4,)
    assert facts.disks["/opt/halo"].free > 0


@pytest.mark.parametrize(
    ("name", "profile", "wanted"),
    [
        # Without a compile there is nothing against this ROCm; with one, test_preflight has the failures.
        ("debian-forky-hipcc", "strix-halo", ["gpu.absent", "kernel.too-old", "python.feature-missing"]),
        (
            "debian-12-bare",
            "strix-halo",
            ["gpu.absent", "kernel.too-old", "python.feature-missing", "rocm.absent"],
        ),
        ("debian-12-bare", "cpu", ["python.feature-missing"]),
    ],
)
def test_each_failing_thing_is_named_once(name: str, profile: str, wanted: list[str]) -> None:
    found = preflight(captured(name), profile, Request("/opt/halo"))  # type: ignore[arg-type]
    assert sorted(f.id for f in found if f.severity is Severity.FAIL) == wanted


def test_the_bare_debian_is_told_the_package_that_it_lacks() -> None:
    found = {
        f.id: f
        for f in preflight(captured("debian-12-bare"), "cpu", Request("/opt/halo", compiler="required"))
    }
    assert found["python.feature-missing"].fix is not None
    assert found["python.feature-missing"].fix.command().endswith("apt-get install --yes python3-venv")
    assert found["toolchain.no-compiler"].fix is not None
    assert found["toolchain.no-compiler"].fix.command().endswith("apt-get install --yes g++ cmake make")
