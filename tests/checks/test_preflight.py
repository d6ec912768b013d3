"""Preflight decides whether a machine is changed: each thing that is wrong is one finding with its cure."""

from __future__ import annotations

import pytest

from checks.case import Case, CompileProbe, Request
from checks.catalogue import catalogue
from checks.doctor import preflight, resolve_profile
from checks.finding import Finding, Fix, Severity, fold
from checks.registry import CHECKS, Check, run_checks
from tests.checks.boxes import BOXES, GPU, KFD, NODE, NPU, Box, plain, python_features, strix_halo

REQUEST = Request(prefix="/opt/halo")
COMPILED = CompileProbe(("hipcc", "--offload-arch=gfx1151"), 0, "", 3.0, 20_000)


def ids(findings: list[Finding]) -> list[str]:
    return [finding.id for finding in findings if finding.severity is not Severity.INFO]


def broken(code: int, tail: str) -> CompileProbe:
    return CompileProbe(("/usr/bin/hipcc", "--offload-arch=gfx1151"), code, tail, 2.0, 0)


# box, compile probe, the root findings of profile strix-halo
STRIX_HALO_FAULTS: dict[str, tuple[Box, list[str]]] = {
    "no GPU": (BOXES["forky-hipcc-no-gpu"], ["gpu.absent"]),
    "no GPU, old kernel, no ROCm": (plain(), ["gpu.absent", "kernel.too-old", "rocm.absent"]),
    "a Strix Point": (
        strix_halo().but(
            files={f"{GPU}/device": "0x150e", NODE: KFD.replace("110501", "110500").replace("5510", "5390")}
        ),
        ["gpu.not-gfx1151"],
    ),
    "sysfs hidden": (
        plain("arch", "7.2.5").but(
            places={"/sys/bus/pci/devices": "denied --", "/opt/rocm/bin/hipcc": "file r-"},
            rocm_roots=("/opt/rocm",),
        ),
        ["gpu.unreadable"],
    ),
    "held by vfio": (
        strix_halo().but(files={f"{GPU}/uevent": "DRIVER=vfio-pci", NODE: None}),
        ["gpu.driver-unbound"],
    ),
    "no driver, no kfd device": (
        strix_halo().but(files={f"{GPU}/uevent": "PCI_ID=1002:1586", NODE: None}, places={"/dev/kfd": None}),
        ["gpu.driver-unbound"],
    ),
    "no KFD node": (strix_halo().but(files={NODE: None}), ["gpu.kfd-absent"]),
    "kernel 6.18 with the fix": (strix_halo("fedora", "6.18.9-200.fc43"), ["kernel.too-old"]),
    "kernel 6.17 without the fix": (BOXES["strix-halo-kernel-unfixed"], ["kernel.too-old"]),
    "kernel 7.0 without the fix": (
        strix_halo(kernel="7.0.0").but(files={NODE: "\n".join(KFD.split("\n")[:-2])}),
        ["kernel.cwsr-unfixed"],
    ),
    "firmware 0x83": (
        strix_halo().but(files={f"{GPU}/fw_version/mes_fw_version": "0x00000083"}),
        ["firmware.mes-bad"],
    ),
    "kfd denied": (strix_halo().but(places={"/dev/kfd": "char --"}), ["access.kfd-denied"]),
    "render node absent": (
        strix_halo().but(places={"/dev/dri/renderD128": None}),
        ["access.render-absent"],
    ),
    "amdxdna not loaded": (
        strix_halo().but(files={f"{NPU}/uevent": "PCI_ID=1022:17F0"}, places={"/sys/module/amdxdna": None}),
        ["npu.module-absent"],
    ),
    "NPU off in the firmware": (
        strix_halo().but(
            files={f"{NPU}/{name}": None for name in ("vendor", "device", "revision", "class", "uevent")}
        ),
        ["npu.absent"],
    ),
    "IOMMU off": (
        strix_halo().but(files={f"{NPU}/uevent": "X=1", "/proc/cmdline": "quiet amd_iommu=off"}),
        ["npu.driver-unbound"],
    ),
    "a Krackan NPU": (strix_halo().but(files={f"{NPU}/revision": "0x20"}), ["npu.not-strix-halo"]),
    "no ROCm": (strix_halo().but(places={"/opt/rocm/bin/hipcc": None}), ["rocm.absent"]),
    "ROCm 5.2": (strix_halo().but(files={"/opt/rocm/.info/version": "5.2.3-1"}), ["rocm.too-old"]),
    "big carve-out": (
        strix_halo().but(files={f"{GPU}/mem_info_vram_total": "103079215104"}),
        ["memory.carve-out"],
    ),
    "override": (strix_halo().but(env={"HSA_OVERRIDE_GFX_VERSION": "11.0.0"}), ["environment.hsa-override"]),
}


@pytest.mark.parametrize("name", STRIX_HALO_FAULTS)
def test_a_fault_of_a_strix_halo_is_named_once_and_nothing_else_is(name: str) -> None:
    box, wanted = STRIX_HALO_FAULTS[name]
    probe = None if any(each.startswith("rocm") for each in wanted) else COMPILED
    found = preflight(box.facts(), "strix-halo", REQUEST, compile_probe=probe)
    assert sorted(ids(found)) == sorted(wanted)
    for finding in found:
        assert finding.evidence, finding.id
        assert finding.fix or finding.hint, finding.id


@pytest.mark.parametrize("distribution", ["arch", "cachyos", "ubuntu", "fedora", "bazzite", "forky"])
def test_a_healthy_strix_halo_is_let_through(distribution: str) -> None:
    found = preflight(strix_halo(distribution).facts(), "strix-halo", REQUEST, compile_probe=COMPILED)
    assert found == []


@pytest.mark.parametrize(
    ("code", "tail", "wanted"),
    [
        (1, "clang: error: cannot find device library oclc_isa_version_1151.bc", "rocm.no-gfx1151"),
        # Word for word what Debian forky's hipcc says when its gfx1151 device library is moved away.
        (
            1,
            "clang++: error: cannot find ROCm device library for gfx1151; provide its path",
            "rocm.no-gfx1151",
        ),
        (1, "clang: error: invalid target ID 'gfx1151'", "rocm.no-gfx1151"),
        (1, "fatal error: 'cmath' file not found", "rocm.compile-failed"),
        (-1, "", "rocm.compile-failed"),
        (-2, "hipcc: Permission denied", "rocm.compile-failed"),
    ],
)
def test_a_compile_that_fails_says_why_in_the_compilers_words(code: int, tail: str, wanted: str) -> None:
    found = preflight(strix_halo().facts(), "strix-halo", REQUEST, compile_probe=broken(code, tail))
    assert ids(found) == [wanted]
    assert tail.split("\n")[-1] in found[0].evidence


def test_an_old_rocm_and_its_failed_compile_are_one_finding() -> None:
    box = strix_halo().but(files={"/opt/rocm/.info/version": "5.2.3"})
    probe = broken(1, "clang: error: cannot find device library oclc_isa_version_1151.bc")
    assert ids(preflight(box.facts(), "strix-halo", REQUEST, compile_probe=probe)) == ["rocm.too-old"]


def test_a_fixed_kernel_below_seven_is_refused_but_told_that_it_has_the_fix() -> None:
    found = preflight(
        strix_halo("fedora", "6.18.9-200.fc43").facts(), "strix-halo", REQUEST, compile_probe=COMPILED
    )
    assert "19185664" in " ".join(found[0].evidence)


# The fix for the same fault must be the right one where it is read.
@pytest.mark.parametrize(
    ("distribution", "words"),
    [
        ("arch", "pacman -S --needed --noconfirm rocm-hip-sdk"),
        ("cachyos", "pacman -S --needed --noconfirm rocm-hip-sdk"),
        ("fedora", "dnf install --assumeyes hipcc"),
        ("ubuntu", "apt-get install --yes hipcc"),
        ("bazzite", "toolbox"),
    ],
)
def test_the_fix_for_no_rocm_is_this_distributions(distribution: str, words: str) -> None:
    box = strix_halo(distribution).but(places={"/opt/rocm/bin/hipcc": None})
    if distribution == "bazzite":
        box = box.but(places={"/run/ostree-booted": "file r-"})
    (finding,) = preflight(box.facts(), "strix-halo", REQUEST)
    assert finding.fix is not None
    assert words in finding.fix.command()


def test_bookworm_is_not_told_to_install_its_own_rocm_which_is_too_old() -> None:
    found = {f.id: f for f in preflight(plain().facts(), "strix-halo", REQUEST)}
    assert found["rocm.absent"].fix is None
    assert "no ROCm for gfx1151" in found["rocm.absent"].hint


def test_a_user_who_joined_the_group_after_login_is_told_to_log_in_again() -> None:
    box = strix_halo().but(
        places={"/dev/kfd": "char --"}, commands={"id": (0, "uid=1000(ada) gid=1000(ada) groups=1000(ada)")}
    )
    (finding,) = preflight(box.facts(), "strix-halo", REQUEST, compile_probe=COMPILED)
    assert finding.fix is None
    assert "Log out" in finding.hint


# box, request, the root findings of profile cpu
CPU_FAULTS: dict[str, tuple[Box, Request, list[str]]] = {
    "no compiler, one needed": (
        plain().but(tools={"c++": ""}),
        Request("/opt/halo", compiler="required"),
        ["toolchain.no-compiler"],
    ),
    "compiler does not start": (
        plain().but(commands={"c++ --version": (127, "cc1plus: not found")}),
        Request("/opt/halo", compiler="required"),
        ["toolchain.no-compiler"],
    ),
    "old cmake": (
        plain().but(commands={"cmake --version": (0, "cmake version 3.16.3")}),
        Request("/opt/halo", compiler="required"),
        ["toolchain.no-cmake"],
    ),
    "no compiler, wheels will do": (plain().but(tools={"c++": ""}), REQUEST, []),
    "no compiler, a bundle": (plain().but(tools={"c++": ""}), Request("/opt/halo", compiler="unneeded"), []),
    "no venv": (
        plain().but(commands={"python3 features": python_features("ensurepip")}),
        REQUEST,
        ["python.feature-missing"],
    ),
    "no python": (plain().but(tools={"python3": ""}), REQUEST, ["python.absent"]),
    "old python": (
        plain().but(commands={"python3 features": (0, "version 3.9.2\nvenv yes")}),
        REQUEST,
        ["python.unsupported"],
    ),
    "full disk": (plain().but(disks={"/opt/halo": (100_000_000, "rw", "/opt")}), REQUEST, ["disk.full"]),
    "read-only": (
        plain().but(
            files={
                "/proc/self/mountinfo": "27 1 254:0 / / rw - ext4 /dev/vda rw\n"
                "28 27 254:1 / /opt ro - ext4 /dev/vdb ro"
            },
            disks={"/opt/halo": (50_000_000_000, "r-", "/opt")},
        ),
        REQUEST,
        ["prefix.read-only"],
    ),
    "not my directory": (
        plain().but(disks={"/opt/halo": (50_000_000_000, "r-", "/opt")}),
        REQUEST,
        ["prefix.denied"],
    ),
    "port taken": (
        plain().but(
            commands={"/proc/net/tcp": (0, "   0: 0100007F:1FF4 00000000:0000 0A 0:0 00:0 0 33 0 582")}
        ),
        REQUEST,
        ["port.taken"],
    ),
    "port taken on every address": (
        plain().but(
            commands={"/proc/net/tcp6": (0, f"   0: {'0' * 32}:1FF4 {'0' * 32}:0000 0A 0:0 00:0 0 33 0 582")}
        ),
        REQUEST,
        ["port.taken"],
    ),
    "port taken on another address": (
        plain().but(
            commands={"/proc/net/tcp": (0, "   0: 0200007F:1FF4 00000000:0000 0A 0:0 00:0 0 33 0 582")}
        ),
        REQUEST,
        [],
    ),
    "port ours": (
        plain().but(
            commands={
                "/proc/net/tcp": (0, "   0: 0100007F:1FF4 00000000:0000 0A 0:0 00:0 0 0 0 582"),
                "systemctl --user show": (
                    0,
                    "Id=halo-server.socket\nActiveState=active\nListen=127.0.0.1:8180 (Stream)",
                ),
            }
        ),
        REQUEST,
        [],
    ),
    "no port": (plain(), Request("/opt/halo", listen="localhost"), ["port.invalid"]),
    "unknown distribution, nothing needed": (plain("unknown"), REQUEST, ["system.distribution-unknown"]),
    "unknown distribution, compiler needed": (
        plain("unknown").but(tools={"c++": ""}),
        Request("/opt/halo", compiler="required"),
        ["toolchain.no-compiler", "system.distribution-unknown"],
    ),
    "no user manager": (
        plain().but(places={"/run/user/1000/systemd/private": None}),
        REQUEST,
        ["system.no-user-manager"],
    ),
    "no systemd": (plain().but(places={"/run/systemd/system": None}), REQUEST, []),
}


@pytest.mark.parametrize("name", CPU_FAULTS)
def test_a_fault_of_any_machine_is_named_once_and_nothing_else_is(name: str) -> None:
    box, request, wanted = CPU_FAULTS[name]
    found = preflight(box.facts(), "cpu", request)
    assert sorted(ids(found)) == sorted(wanted)


def test_an_unknown_distribution_refuses_only_where_something_must_be_installed() -> None:
    calm = preflight(plain("unknown").facts(), "cpu", REQUEST)
    stuck = preflight(
        plain("unknown").but(tools={"c++": ""}).facts(), "cpu", Request("/opt/halo", compiler="required")
    )
    severity = {
        "calm": calm[0].severity,
        "stuck": {f.id: f.severity for f in stuck}["system.distribution-unknown"],
    }
    assert severity == {"calm": Severity.WARN, "stuck": Severity.FAIL}


def test_auto_takes_the_gpu_where_it_is_and_says_once_where_it_is_not() -> None:
    assert resolve_profile("auto", strix_halo().facts()) == ("strix-halo", [])
    profile, findings = resolve_profile("auto", plain().facts())
    assert profile == "cpu"
    assert [(f.id, f.severity) for f in findings] == [("gpu.absent", Severity.WARN)]
    assert resolve_profile("cpu", strix_halo().facts()) == ("cpu", [])


def test_every_finding_that_a_test_box_yields_is_explained() -> None:
    boxes = [box for box, _ in STRIX_HALO_FAULTS.values()] + [box for box, _, _ in CPU_FAULTS.values()]
    for box in boxes:
        for profile in ("cpu", "strix-halo"):
            case = Case(box.facts(), profile, Request("/opt/halo", compiler="required"))
            for outcome in run_checks(case, CHECKS):
                for finding in outcome.findings:
                    assert catalogue()[finding.id].check == outcome.check.id


def test_a_check_that_crashes_is_a_finding_and_stops_no_other() -> None:
    def explode(case: Case):
        raise ValueError("no such luck")
        yield

    outcomes = run_checks(Case(plain().facts(), "cpu", REQUEST), [Check("odd", "Odd", explode), *CHECKS])
    assert [finding.id for finding in outcomes[0].findings] == ["check.crashed"]
    assert "ValueError: no such luck" in outcomes[0].findings[0].evidence[0]
    assert len(outcomes) > 5


def test_folding_follows_causes_through_steps_and_survives_a_circle() -> None:
    def one(identity: str, *causes: str, severity: Severity = Severity.FAIL) -> Finding:
        return Finding(identity, identity, severity, depends_on=causes)

    folded = fold([one("c.z", "b.y"), one("b.y", "a"), one("a.x")])
    assert [f.id for f in folded.roots] == ["a.x"]
    assert sorted(folded.consequences["a.x"]) == ["b.y", "c.z"]
    assert len(fold([one("a.x", "b.y"), one("b.y", "a.x")]).roots) == 1
    info = fold([one("a.x", severity=Severity.INFO), one("b.y", "a.x")])
    assert [f.id for f in info.roots] == ["b.y", "a.x"], "a mere info explains nothing away"


def test_a_fix_is_a_line_that_a_person_can_paste() -> None:
    fix = Fix("do it", (("apt-get", "update"), ("apt-get", "install", "a b")), needs_root=True)
    assert fix.command() == "sudo apt-get update && sudo apt-get install 'a b'"


def test_a_users_own_rights_say_nothing_about_a_system_service() -> None:
    box = strix_halo().but(places={"/dev/kfd": "char --"})
    request = Request("/opt/halo", scope="system")
    assert preflight(box.facts(), "strix-halo", request, compile_probe=COMPILED) == []


def test_another_scopes_server_on_the_port_is_in_the_way() -> None:
    box = plain().but(
        commands={
            "/proc/net/tcp": (0, "   0: 0100007F:1FF4 00000000:0000 0A 0:0 00:0 0 0 0 582"),
            "systemctl show": (
                0,
                "Id=halo-server.socket\nActiveState=active\nListen=127.0.0.1:8180 (Stream)",
            ),
        }
    )
    assert ids(preflight(box.facts(), "cpu", Request("/home/ada/halo", scope="user"))) == ["port.taken"]
    assert ids(preflight(box.facts(), "cpu", Request("/opt/halo", scope="system"))) == []
