"""Is the installed generation whole: manifest, hashes, model store? A pure reading of `Installed`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from checks.case import Case, Installed
from checks.finding import Finding, Fix, Severity

GPU: Final = "gfx1151"  # that of a Strix Halo
# The installer rebuilds a generation whose files do not match its manifest.
REINSTALL: Final = Fix("build the generation anew", (("halo", "install", "--yes"),))
_TITLES: Final = {
    "install.file-missing": "Files of the installed generation are missing",
    "install.file-denied": "Files of the installed generation may not be read by this user",
    "install.hash-mismatch": "Files of the installed generation were changed after the install",
}


def check_install(case: Case) -> Iterator[Finding]:
    """One finding for each way in which what lies on disk is not what the manifest says."""
    installed = case.installed
    if installed is None:
        return
    if not installed.exists:
        yield Finding(
            "install.absent",
            "halo is not installed here",
            Severity.FAIL,
            evidence=(f"{installed.prefix}/current: {installed.problem or 'absent'}",),
            affects="everything",
            fix=Fix("install it", (("halo", "install"),)),
            hint="Installed elsewhere? Name the place: halo doctor --prefix DIR",
        )
        return
    if installed.problem:
        yield Finding(
            "install.manifest-broken",
            "The current generation has no sound manifest",
            Severity.FAIL,
            evidence=(f"{installed.generation}/manifest.json: {installed.problem}",),
            affects="knowing what should be here",
            fix=REINSTALL,
        )
        return
    yield from _files(installed)
    yield from _gpu_engine(installed)
    yield from _model(installed)


def _files(installed: Installed) -> Iterator[Finding]:
    groups: dict[str, list[str]] = {name: [] for name in _TITLES}
    for path, problem in sorted(installed.wrong_files.items()):
        if problem in ("missing", "denied"):
            groups[f"install.file-{problem}"].append(f"{path}: {problem}")
        else:
            groups["install.hash-mismatch"].append(f"{path}: sha256 is now {problem[:16]}")
    for identity, evidence in groups.items():
        if evidence:
            denied = identity == "install.file-denied"
            yield Finding(
                identity,
                _TITLES[identity],
                Severity.WARN if denied else Severity.FAIL,
                evidence=(*evidence[:8], *((f"and {len(evidence) - 8} more",) if len(evidence) > 8 else ())),
                affects="the server runs what was not installed" if not denied else "checking the install",
                fix=None if denied else REINSTALL,
                hint="Run the doctor as the user who owns the install." if denied else "",
            )


def _gpu_engine(installed: Installed) -> Iterator[Finding]:
    """Of an install for a Strix Halo: was the GPU's library built, and for this GPU?"""
    if installed.manifest.get("profile") != "strix-halo":
        return
    build = installed.manifest.get("compiler")
    hip = build.get("hip") if isinstance(build, Mapping) else None
    targets = hip.get("targets") if isinstance(hip, Mapping) else None
    if not isinstance(targets, list):
        yield Finding(
            "engine.no-gpu-library",
            "The install has no GPU engine",
            Severity.WARN,
            evidence=("lib/build.json: no entry hip",),
            affects="speed: the CPU decodes",
            depends_on=("install.manifest-broken",),
            fix=REINSTALL,
        )
    elif GPU not in targets:
        yield Finding(
            "engine.no-code-object",
            f"The GPU engine has no code for {GPU}",
            Severity.WARN,
            evidence=(f"lib/build.json: hip.targets {', '.join(map(str, targets)) or 'none'}"[:200],),
            affects="speed: the CPU decodes",
            depends_on=("install.manifest-broken",),
            fix=REINSTALL,
        )


def _model(installed: Installed) -> Iterator[Finding]:
    if installed.model_problems:
        yield Finding(
            "install.model-broken",
            "The model store of the current generation is not whole",
            Severity.FAIL,
            evidence=installed.model_problems,
            affects="every decode",
            fix=REINSTALL,
        )
