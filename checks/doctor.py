"""`halo doctor` and preflight: choose checks, run probes, fold consequences, report. It mends nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from checks import client, collect, facts, probes, report
from checks.case import RUN_BYTES, Case, CompileProbe, Decoded, Installed, Profile, Request
from checks.catalogue import catalogue, explain
from checks.facts import Facts
from checks.finding import Finding, Fix, Folded, Severity, fold
from checks.host import dotted
from checks.registry import CHECKS, Check, Outcome, keep_finding, run_checks, select
from engine.errors import EXIT_COULD_NOT_RUN, EXIT_DEGRADED, EXIT_ERROR, EXIT_WELL, HaloError


def preflight(
    seen: Facts,
    profile: Profile,
    request: Request | None = None,
    *,
    compile_probe: CompileProbe | None = None,
) -> list[Finding]:
    """What stands in the way of an install: root causes only, the gravest first. Pure.

    See `preflight_folded`, which also says what follows from each.
    """
    return list(preflight_folded(seen, profile, request, compile_probe=compile_probe).roots)


def preflight_folded(
    seen: Facts,
    profile: Profile,
    request: Request | None = None,
    *,
    compile_probe: CompileProbe | None = None,
) -> Folded:
    """What stands in the way of an install, with the consequences of each root cause under it. Pure.

    A finding of severity fail means refuse; warn means say and go on. For strix-halo, pass the result of
    `probes.probe_compile(seen)` so that ROCm is judged by a compile and not by a version.
    """
    case = Case(seen, profile, request or Request(), compile_probe=compile_probe)
    outcomes = run_checks(case, (check for check in CHECKS if check.preflight))
    return fold(finding for outcome in outcomes for finding in outcome.findings)


def resolve_profile(wanted: str, seen: Facts) -> tuple[Profile, list[Finding]]:
    """The profile that `auto` means on this box, with one warning where it is not the GPU's."""
    if wanted in ("cpu", "strix-halo"):
        return cast(Profile, wanted), []
    if wanted != "auto":
        raise HaloError(f"There is no profile {wanted!r}.", hint="Choose one of: auto, cpu, strix-halo")
    if seen.strix_halo_gpu is not None or seen.gfx1151_node is not None:
        return "strix-halo", []
    gpus = [f"{gpu.address}: {gpu.pci_id}" for gpu in seen.amd_gpus]
    return "cpu", [
        Finding(
            "gpu.absent" if not gpus else "gpu.not-gfx1151",
            "There is no Strix Halo GPU here: halo uses the CPU",
            Severity.WARN,
            evidence=tuple(gpus) or ("/sys/bus/pci/devices: no AMD display controller",),
            affects="speed",
            fix=Fix("choose the CPU and silence this", (("halo", "install", "--profile", "cpu"),)),
        )
    ]


def exit_code(findings: Sequence[Finding]) -> int:
    """0 well, 1 something fails, 2 degraded, 3 not installed or not runnable."""
    if any(finding.id == "install.absent" for finding in findings):
        return EXIT_COULD_NOT_RUN
    severities = {finding.severity for finding in findings}
    if Severity.FAIL in severities:
        return EXIT_ERROR
    return EXIT_DEGRADED if Severity.WARN in severities else EXIT_WELL


def examine(
    *,
    prefix: Path,
    active: bool = True,
    url: str = "",
    compile_gpu: bool = False,
    profile: Profile | None = None,
) -> Case:
    """Collect all that the doctor judges: facts, the install, and, when active, what the server decodes.

    The only effects are reading files, one decode through the server on this machine (through a child process
    where no server is expected), and with `compile_gpu` a compile in a temporary directory.
    """
    seen = facts.gather([prefix])
    installed = collect.read_installed(prefix, hashes=active)
    listen = str(installed.manifest.get("listen") or Request().listen)
    chosen = profile or _profile_of(installed, seen)
    request = Request(str(prefix), installed.scope, listen, disk_bytes=RUN_BYTES, compiler="unneeded")
    case = Case(seen, chosen, request, installed=installed)
    if compile_gpu and chosen == "strix-halo":
        case = replace(case, compile_probe=probes.probe_compile(seen))
    if active and installed.exists and not installed.problem:
        decoded = _decode(installed, url or client.base_url(listen))
        if not url and decoded.health is None and not installed.served(systemd=seen.systemd.running):
            decoded = probes.probe_engine(installed)
        case = replace(case, decoded=replace(decoded, asked=bool(url)))
    return case


def _profile_of(installed: Installed, seen: Facts) -> Profile:
    named = installed.manifest.get("profile")
    return cast(Profile, named) if named in ("cpu", "strix-halo") else resolve_profile("auto", seen)[0]


def _decode(installed: Installed, url: str) -> Decoded:
    """A server that is known to be damaged may never answer; it is not waited for as a sound one is."""
    damaged = installed.wrong_files or installed.model_problems
    timeout = 5.0 if damaged else client.TIMEOUT_SECONDS
    return client.decode_golden(url, installed.golden, key=client.read_key(installed.prefix), timeout=timeout)


def judge(
    case: Case, *, active: bool = True, only: Sequence[str] = (), skip: Sequence[str] = ()
) -> tuple[list[Outcome], Folded]:
    """Run the chosen checks on a case: every outcome, and the root causes among all findings. Pure."""
    eligible = [c for c in CHECKS if c.doctor and (active or c.level == "passive")]
    outcomes = [
        replace(outcome, findings=tuple(f for f in outcome.findings if keep_finding(f, only, skip)))
        for outcome in run_checks(case, select(eligible, only, skip))
    ]
    return outcomes, fold(finding for outcome in outcomes for finding in outcome.findings)


def run_doctor(
    *,
    prefix: Path | None = None,
    scope: str | None = None,
    level: str = "active",
    url: str = "",
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    as_json: bool = False,
) -> int:
    """Examine this box, print the report and return the exit code. HaloError (3) when it cannot be."""
    select(CHECKS, only, skip)  # a wrong name is refused before anything runs
    place = prefix or collect.default_prefix(cast(Any, scope))
    active = level == "active"
    case = examine(prefix=Path(place).expanduser().absolute(), active=active, url=url, compile_gpu=active)
    outcomes, folded = judge(case, active=active, only=only, skip=skip)
    code = exit_code(folded.roots)
    if as_json:
        report.print_json(report.as_json(case, outcomes, folded, code))
        return code
    report.print_table(outcomes, folded, _details(case))
    print()
    print(_verdict(folded.roots, code))
    return code


def _verdict(roots: Sequence[Finding], code: int) -> str:
    if code == EXIT_COULD_NOT_RUN:
        return "halo is not installed here.\nhint: halo install"
    count = {severity: sum(finding.severity is severity for finding in roots) for severity in Severity}
    if code == EXIT_WELL:
        return "This box is well."
    words = {Severity.FAIL: "to mend", Severity.WARN: "to look at"}
    parts = [f"{count[severity]} {word}" for severity, word in words.items() if count[severity]]
    return f"This box has {' and '.join(parts)}.\nhint: halo doctor --explain {roots[0].id}"


def _details(case: Case) -> dict[str, str]:
    """What a check that found nothing wrong has seen, in a few words."""
    seen, node = case.facts, case.facts.gfx1151_node
    details = {}
    if node is not None:
        details["gpu"] = f"{node.gfx} {node.sku}, {node.compute_units} CUs, {node.address}"
    if case.profile == "strix-halo":
        details["kernel"] = seen.kernel.release
        details["rocm"] = f"{seen.rocm[0].path} {dotted(seen.rocm[0].version)}" if seen.rocm else ""
    disk = seen.disks.get(case.request.prefix)
    if disk is not None and disk.free >= 0:
        details["disk"] = f"{disk.free / 1e9:.1f} GB free at {disk.nearest}"
    if case.installed is not None and case.installed.exists:
        details["install"] = f"{case.installed.files_checked} files of {_generation(case)} as listed"
        details["services"] = _service_detail(case, case.installed)
    if case.decoded is not None and case.decoded.ids is not None:
        health = case.decoded.health or {}
        device = f" on {health['device']}" if health.get("device") else ""
        backend = f"{health.get('backend', '?')}{device}"
        how = f"by the engine itself ({backend})" if case.decoded.by_engine else f"served by {backend}"
        count = len(case.decoded.ids)
        details["decode"] = f"{count} golden tokens, exact, {case.decoded.seconds:.2f} s, {how}"
    return details


def _generation(case: Case) -> str:
    return Path(case.installed.generation).name if case.installed else ""


def _service_detail(case: Case, installed: Installed) -> str:
    if not case.facts.systemd.running:
        return "no systemd here"
    if not installed.units_wanted:
        return "left alone (units = false)"
    return f"halo-server.socket active, {installed.scope} scope"


def configure_doctor(parser: argparse.ArgumentParser) -> None:
    """Add the doctor's arguments to a subparser."""
    parser.add_argument("--json", action="store_true", help="print one JSON object, schema 1")
    parser.add_argument(
        "--level",
        choices=("passive", "active"),
        default="active",
        help="passive: read only, no network; active: also hash every file, compile, decode",
    )
    parser.add_argument(
        "--only", metavar="ID,..", default="", help="only these checks (gpu) or findings (gpu.absent)"
    )
    parser.add_argument("--skip", metavar="ID,..", default="", help="leave these out")
    parser.add_argument("--list", action="store_true", help="list every check and finding, and end")
    parser.add_argument("--explain", metavar="ID", help="say what a finding means and how it is mended")
    parser.add_argument(
        "--url", default="", help="where the server answers (default: what the manifest says)"
    )
    parser.add_argument("--prefix", type=Path, help="where halo is installed")
    parser.add_argument(
        "--scope", choices=("user", "system"), help="look at the user's or the system's install"
    )


def run_doctor_command(args: argparse.Namespace) -> int:
    """Run `halo doctor` as parsed by `configure_doctor`."""
    if args.list:
        _print_list(CHECKS)
        return EXIT_WELL
    if args.explain:
        text = explain(args.explain)
        if not text:
            message = f"There is no finding {args.explain!r}."
            raise HaloError(message, hint="See them all: halo doctor --list", exit_code=EXIT_COULD_NOT_RUN)
        print(text)
        return EXIT_WELL
    return run_doctor(
        prefix=args.prefix,
        scope=args.scope,
        level=args.level,
        url=args.url,
        only=_names(args.only),
        skip=_names(args.skip),
        as_json=args.json,
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _print_list(checks: Sequence[Check]) -> None:
    for check in checks:
        print(f"{check.id:<14} {check.level:<8} {check.title}")
        for identity, entry in catalogue().items():
            if entry.check == check.id:
                print(f"    {identity:<28} {entry.what}")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m checks.doctor`: the doctor without the rest of halo, for a box that is half broken."""
    parser = argparse.ArgumentParser(
        prog="halo doctor", description="Say what is wrong with this box, and its cure."
    )
    configure_doctor(parser)
    try:
        return run_doctor_command(parser.parse_args(argv))
    except HaloError as error:
        print(f"✗ {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
