"""Item three of a fresh box: the ROCm check by a real compile, on a Debian with hipcc and no GPU.

The root takes two minutes and a gigabyte, so these run only with HALO_TEST_SLOW=1.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hosts import box, hosts, roots
from tests.hosts.hosts import Host
from tests.hosts.network import Bridge

pytestmark = [pytest.mark.hosts, pytest.mark.slow]


@pytest.fixture(scope="module")
def forky(bridge: Bridge) -> Iterator[Host]:
    """Debian forky with hipcc, no network, a clean clone."""
    with hosts.launch(bridge, roots.root(roots.FORKY_ROCM)) as host:
        box.carry_source(host)
        yield host


def test_rocm_passes_by_a_real_compile_and_the_absent_gpu_is_refused(
    forky: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    """With everything but the card in place the refusal names the card, and does not blame ROCm."""
    result = box.install(forky, "--profile", "strix-halo", "--dry-run", check=False)
    with capsys.disabled():
        print(f"\n{result.out}{result.err}")
    assert result.code == 1
    # The host runs on this machine's kernel, which may be older than the profile wants.
    assert [name for name in box.findings(result) if name != "kernel.too-old"] == ["gpu.absent"]


@pytest.mark.parametrize("part", ["oclc_isa_version_1151.bc", "lld"], ids=["device-library", "linker"])
def test_broken_rocm_is_a_finding_of_its_own(forky: Host, part: str) -> None:
    """A hipcc that is there and cannot make code for gfx1151 is found now, not at the first kernel."""
    found = forky.run(f"find / -xdev -name {part} -not -type d").out.split()
    assert found, f"hipcc brings {part}"
    for path in found:
        forky.run(["mv", path, f"{path}.away"])
    try:
        result = box.install(forky, "--profile", "strix-halo", "--dry-run", check=False)
    finally:
        for path in found:
            forky.run(["mv", f"{path}.away", path])
    assert result.code == 1
    assert any(name.startswith("rocm.") for name in box.findings(result))


def test_installs_for_the_cpu_on_python_3_14(bridge: Bridge, capsys: pytest.CaptureFixture[str]) -> None:
    """The newest Debian, its Python and its systemd take the whole install, and the doctor finds it well."""
    with hosts.launch(bridge, roots.root(roots.FORKY_ROCM), online=True) as host:
        box.carry_source(host)
        done = box.install(host, "--profile", "cpu")
        with capsys.disabled():
            print(f"\n  forky, Python 3.14, {done.seconds:.1f} s: {box.decoded(done.out)}")
        assert "Python 3.14" in done.out and box.has_words(box.decoded(done.out))
        examined = host.run(box.SYSTEM.halo("doctor"), check=False)
        assert examined.code == 0, examined
