"""Does the running server decode the tokens that the manifest calls golden? A pure reading of `Decoded`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from checks.case import Case, Decoded, Installed
from checks.finding import Finding, Fix, Severity

_BELOW: Final = (
    "install",
    "service.no-user-manager",
    "service.unknown",
    "service.masked",
    "service.inactive",
    "service.unit-missing",
    "service.failed",
    "service.server-masked",
)


def check_decode(case: Case) -> Iterator[Finding]:
    """Green means tokens: an answer of another generation, or with other ids, is a failure like no answer."""
    decoded, installed = case.decoded, case.installed
    if decoded is None or installed is None or not installed.exists:
        return
    if decoded.by_engine and decoded.ids is None:
        yield _engine_failed(decoded)
        return
    if decoded.health is None:
        yield from _no_answer(case, decoded, installed)
        return
    if not decoded.by_engine:
        yield from _generation(decoded, installed)
    yield from _on_the_cpu(decoded, installed)
    if not decoded.wanted:
        yield Finding(
            "decode.no-golden",
            "The manifest names no golden tokens to compare with",
            Severity.WARN,
            evidence=("manifest.json: model.golden is empty",),
            affects="proving the decode",
            depends_on=("install",),
            fix=Fix("build the generation anew", (("halo", "install", "--yes"),)),
        )
    elif decoded.ids is None:
        yield _refused(decoded)
    elif decoded.ids != decoded.wanted:
        yield _wrong(decoded)


def _no_answer(case: Case, decoded: Decoded, installed: Installed) -> Iterator[Finding]:
    """Without units nobody promised that a server runs, so silence is no fault there."""
    served = decoded.asked or installed.served(systemd=case.facts.systemd.running)
    yield Finding(
        "decode.no-answer" if served else "decode.not-served",
        "The server does not answer" if served else "No server runs here, so nothing could be decoded",
        Severity.FAIL if served else Severity.INFO,
        evidence=(f"GET {decoded.url}/health: {decoded.error}",),
        affects="every client",
        depends_on=_BELOW,
        hint=f"Read its log: journalctl {'--user ' if installed.scope == 'user' else ''}-u halo-server -n 50"
        if served
        else "Start one, and ask again: halo serve",
    )


def _engine_failed(decoded: Decoded) -> Finding:
    return Finding(
        "decode.engine-failed",
        "The engine of the current generation does not decode",
        Severity.FAIL,
        evidence=(f"python -m checks.engine_probe: {decoded.error}",),
        affects="every answer",
        depends_on=("install",),
        fix=Fix("build the generation anew", (("halo", "install", "--yes"),)),
    )


def _generation(decoded: Decoded, installed: Installed) -> Iterator[Finding]:
    health = decoded.health or {}
    said, wanted = str(health.get("generation"))[:80], str(installed.manifest.get("id"))
    if said != wanted:
        user = ("--user",) if installed.scope == "user" else ()
        yield Finding(
            "decode.other-generation",
            "The server that answers is not of the current generation",
            Severity.FAIL,
            evidence=(f"GET {decoded.url}/health: generation {said!r}", f"manifest.json: id {wanted!r}"),
            affects="every client: it talks to another version",
            depends_on=("install", "service.unit-missing"),
            fix=Fix(
                "restart the server",
                (("systemctl", *user, "restart", "halo-server.service"),),
                needs_root=installed.scope == "system",
            ),
            hint="If it stays so, another halo holds the port: halo doctor --prefix DIR",
        )


def _on_the_cpu(decoded: Decoded, installed: Installed) -> Iterator[Finding]:
    """Right tokens, slowly: the GPU's library said why, unless somebody asked for the CPU."""
    health = decoded.health or {}
    if installed.manifest.get("profile") != "strix-halo" or health.get("backend") != "cpu":
        return
    reason = str(health.get("backend_reason") or "")[:200]
    asked = reason.startswith("HALO_BACKEND=")
    where = "the engine itself" if decoded.by_engine else f"GET {decoded.url}/health"
    yield Finding(
        "decode.cpu-backend",
        "The profile is strix-halo, but the CPU decodes" + (", as HALO_BACKEND asks" if asked else ""),
        Severity.INFO if asked else Severity.WARN,
        evidence=(f"{where}: backend 'cpu'{f', since {reason}' if reason else ''}",),
        affects="speed",
        depends_on=("gpu", "access", "engine", "install", "decode.other-generation"),
        hint="" if asked else "Ask the GPU's library itself: HALO_BACKEND=hip halo generate Hello",
    )


def _refused(decoded: Decoded) -> Finding:
    """The server lives and did not decode: a missing key and a fault are told apart by the status."""
    unauthorised = decoded.code in (401, 403)
    return Finding(
        "decode.unauthorised" if unauthorised else "decode.failed",
        "The server asks for an API key that the doctor cannot read"
        if unauthorised
        else "The server answers, but does not decode",
        Severity.WARN if unauthorised else Severity.FAIL,
        evidence=(f"POST {decoded.url}/v1/completions: {decoded.error}",),
        affects="proving the decode" if unauthorised else "every client",
        depends_on=("install",),
        hint="Run it as the user who owns <prefix>/api-key, or as root."
        if unauthorised
        else "Read its log: journalctl -u halo-server -n 50 (with --user in user scope)",
    )


def _wrong(decoded: Decoded) -> Finding:
    got, who = decoded.ids or (), "engine" if decoded.by_engine else "server"
    first = next((i for i, (a, b) in enumerate(zip(got, decoded.wanted, strict=False)) if a != b), len(got))
    return Finding(
        "decode.wrong-tokens",
        f"The {who} decodes other tokens than the golden ones, from position {first} on",
        Severity.FAIL,
        evidence=(
            f"prompt {decoded.prompt!r}",
            f"wanted {list(decoded.wanted[:12])}{'...' if len(decoded.wanted) > 12 else ''}",
            f"got    {list(got[:12])}{'...' if len(got) > 12 else ''}",
        ),
        affects="every answer: the engine computes wrongly",
        depends_on=("install", "decode.other-generation"),
        fix=Fix("build the generation anew", (("halo", "install", "--yes"),)),
        hint="If a reinstall does not help, try: HALO_CPU_PATH=scalar halo generate --temperature 0 PROMPT",
    )
