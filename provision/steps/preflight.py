"""Step 1: look at the box, choose profile and Python, name the generation, refuse early. Changes nothing."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Final

from engine.errors import HaloError
from engine.formats.store import read_description, store_name
from provision import endpoint, generations, services, toolchain
from provision.bundle import prebuilt_library
from provision.context import Action, Context
from provision.distro import detect_manager, distribution, install_command
from provision.files import nearest_existing
from provision.layout import in_a_home
from provision.model_source import model_source
from provision.render import CROSS
from provision.venv import choose_interpreter, pip_command
from units.render import SOCKET, UnitContext, render_units

if TYPE_CHECKING:
    from checks.finding import Finding

NEEDED_BYTES: Final = 450 << 20


def plan(ctx: Context) -> list[Action]:
    """Nothing is changed here, so there is nothing to plan."""
    return []


def apply(ctx: Context) -> str:
    """Judge the box; returns a line about it. Raises HaloError on the first thing that forbids an install."""
    check_places(ctx)
    ctx.python = choose_interpreter(ctx.layout.scope, ctx.log)
    judge(ctx)
    render_units(UnitContext(ctx.layout.scope, ctx.profile, ctx.layout.prefix, ctx.desired.listen))
    if not ctx.in_place:
        find_toolchain(ctx)
    return f"{distribution()}, profile {ctx.profile}, Python {ctx.interpreter().tag}"


def identify(ctx: Context) -> None:
    """Name the generation that this source, profile and machine make, and see whether it is there."""
    description = read_description(model_source(ctx.source))
    desired, layout = ctx.desired, ctx.layout
    ctx.version = generations.version_of(ctx.source)
    ctx.source_sha256 = generations.source_sha256(ctx.source)
    units = "units" if desired.units else "no units"
    ctx.namespaces = not desired.units or services.makes_namespaces(layout.scope)
    if not ctx.namespaces:
        units = "units without namespaces"
    declared = (
        ctx.profile,
        layout.scope,
        desired.listen,
        units,
        store_name(description),
        ctx.interpreter().tag,
    )
    ctx.name = generations.choose_name(
        layout, generations.generation_id(ctx.version, ctx.source_sha256, declared)
    )
    ctx.in_place = generations.is_sound(ctx.directory)


def has_prebuilt(ctx: Context) -> bool:
    """Whether the bundle brings all libraries for this machine."""
    return ctx.bundle is not None and prebuilt_library(ctx.bundle, hip=ctx.hip) is not None


def judge(ctx: Context) -> None:
    """Let the checks judge the facts of the box: print each finding, refuse on a failing one."""
    from checks.case import RUN_BYTES, Request
    from checks.doctor import preflight_folded, resolve_profile
    from checks.facts import gather
    from checks.probes import probe_compile

    layout = ctx.layout
    facts = gather([layout.prefix])
    profile, notes = resolve_profile(ctx.desired.profile, facts)
    ctx.profile = profile
    identify(ctx)
    request = Request(
        prefix=str(layout.prefix),
        scope=layout.scope,
        listen=ctx.desired.listen,
        disk_bytes=RUN_BYTES if ctx.in_place else NEEDED_BYTES,
        compiler="unneeded" if ctx.in_place or has_prebuilt(ctx) else "optional",
        units=ctx.desired.units,
        port_ours=own_server(ctx),
    )
    probed = probe_compile(facts) if profile == "strix-halo" else None
    folded = preflight_folded(facts, profile, request, compile_probe=probed)
    findings = [finding for finding in (*notes, *folded.roots) if not cured(ctx, finding.id)]
    refuse(ctx, findings, folded.consequences)


def refuse(ctx: Context, findings: list[Finding], consequences: dict[str, tuple[str, ...]]) -> None:
    """Print each finding with its cure and what follows from it; raise HaloError when one is a failure."""
    refusals = []
    for finding in findings:
        hint = finding.fix.describe() if finding.fix is not None else finding.hint
        follows = ", ".join(consequences.get(finding.id, ()))
        evidence = f"{list(finding.evidence)} so also: {follows or 'nothing'}"
        ctx.log.write(f"FINDING {finding.id} {finding.severity}: {finding.title} {evidence}")
        if finding.severity == "fail":
            refusals.append(finding)
            ctx.screen.note(CROSS, f"{finding.title} [{finding.id}]", hint, follows)
        elif finding.severity == "warn":
            ctx.warn(f"{finding.title} [{finding.id}]", hint)
    if refusals:
        what = "; ".join(f"{finding.title} [{finding.id}]" for finding in refusals)
        first = refusals[0]
        hint = (
            first.fix.describe() if first.fix is not None else first.hint
        ) or "mend that, then run it again"
        if ctx.profile != "cpu":
            hint = "mend what is named above, then run it again; or install for the CPU: --profile cpu"
        raise HaloError(f"Preflight refuses: {what}.", hint=hint)


def cured(ctx: Context, identity: str) -> bool:
    """Whether the packages step, or a pip from elsewhere, supplies what the finding says is missing."""
    if identity not in ("python.feature-missing", "python.unsupported", "system.distribution-unknown"):
        return False
    if ctx.in_place:
        return True  # nothing has to be made, so nothing is missing
    python = ctx.interpreter()
    pip = pip_command(python, ctx.directory / "venv", ctx.wheels)
    supplied = pip is not None or (os.geteuid() == 0 and detect_manager() is not None)
    if identity == "system.distribution-unknown":
        return pip is not None and ctx.tools is None and not ctx.missing
    return python.has_venv and supplied


def check_places(ctx: Context) -> None:
    """What the checks do not know: a system service sees no homes; every place must be a directory."""
    layout = ctx.layout
    if layout.scope == "system" and (in_a_home(layout.prefix) or in_a_home(layout.state)):
        raise HaloError(
            f"A system service cannot read {layout.prefix}: it is in a home directory.",
            hint="leave --prefix away (/opt/halo), or use --scope user",
        )
    for path in (layout.prefix, layout.state):
        here = nearest_existing(path)
        if not here.is_dir():
            raise HaloError(f"{here} is not a directory.", hint="choose another --prefix DIR")
        if os.statvfs(here).f_flag & os.ST_RDONLY:
            raise HaloError(f"{path} is on a read-only file system.", hint="choose another: --prefix DIR")
        if not os.access(here, os.W_OK | os.X_OK):
            raise HaloError(f"{path} cannot be written by you.", hint="choose another place: --prefix DIR")


def own_server(ctx: Context) -> bool:
    """Whether the server at the wanted address is a generation of this prefix."""
    name = generations.current_id(ctx.layout)
    if name is None:
        return False
    manifest = generations.read_manifest(ctx.layout.generation(name)) or {}
    if manifest.get("listen") != ctx.desired.listen:
        return False
    if shutil.which("systemctl") and services.is_active(ctx.layout.scope, SOCKET):
        return True
    answer = endpoint.health(ctx.desired.listen)
    return answer is not None and ctx.layout.generation(str(answer["generation"])).is_dir()


def find_toolchain(ctx: Context) -> None:
    """Decide what builds the native library: the bundle did, an installed compiler, or one to be supplied."""
    if has_prebuilt(ctx):
        return
    ctx.tools, ctx.missing = toolchain.system_toolchain()
    if ctx.missing and not (os.geteuid() == 0 and detect_manager()) and not toolchain.wheels_fit():
        raise HaloError(
            f"There is no {', no '.join(ctx.missing)}, and no compiler wheel for this machine.",
            hint=install_command(ctx.missing, detect_manager()),
        )
