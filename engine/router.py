"""Which backend runs which phase, from an explicit table; it opens no device and runs nothing.

Prefill is where an NPU would help: many tokens for one pass over the weights. Decode reads all the weights
for one token, which is the memory's speed and so the GPU's. halo has no kernel for the NPU: `npu_kernel` is
where one plugs in, and until then the table's first column is passed over with that reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Phase = Literal["prefill", "decode"]
Target = Literal["npu", "gpu", "cpu"]

TABLE: Final[Mapping[Phase, tuple[Target, ...]]] = {
    "prefill": ("npu", "gpu", "cpu"),
    "decode": ("gpu", "cpu"),
}
GPU_BACKENDS: Final = ("hip", "cuda", "sim")


@dataclass(frozen=True)
class NpuReport:
    """What the checks know of the NPU. `reason` is why it is not ready, "" where it is."""

    ready: bool
    reason: str
    device_node_present: bool = False
    memlock_unlimited: bool = False
    driver_loaded: bool = False
    tool_installed: bool = False
    firmware_version: str | None = None
    advisories: tuple[str, ...] = ()


NpuProbe = Callable[[], NpuReport]
UNCHECKED: Final = NpuReport(
    ready=False, reason="this server was started without the checks that know the NPU"
)


@dataclass(frozen=True)
class Readiness:
    """Whether a target can take a phase now; `reason` says why not."""

    ready: bool
    reason: str = ""


@dataclass(frozen=True)
class Route:
    """The backend of a phase, and the better ones that were passed over, each with its reason."""

    phase: Phase
    target: Target
    passed_over: tuple[tuple[Target, str], ...]


def npu_kernel() -> str | None:
    """The name of the AIE kernel that prefills on the NPU: there is none. A future one is named here."""
    return None


def readiness(facts: Mapping[str, Any], npu: NpuReport, kernel: str | None) -> dict[Target, Readiness]:
    """What each target can do, from the engine's facts (backend, backend_reason) and the NPU's report."""
    backend, reason = str(facts.get("backend") or "cpu"), str(facts.get("backend_reason") or "")
    on_gpu = backend in GPU_BACKENDS
    missing = npu.reason if not npu.ready else "" if kernel else "halo has no kernel for the NPU"
    return {
        "npu": Readiness(not missing, missing),
        "gpu": Readiness(on_gpu, "" if on_gpu else reason or f"this server runs on {backend}"),
        "cpu": Readiness(True),
    }


def route(phase: Phase, ready: Mapping[Target, Readiness]) -> Route:
    """The first target of the table's row that is ready. The CPU, last in every row, always is."""
    passed: list[tuple[Target, str]] = []
    for target in TABLE[phase]:
        if ready[target].ready:
            return Route(phase, target, tuple(passed))
        passed.append((target, ready[target].reason))
    raise AssertionError("the last target of a row is always ready")


def routes(facts: Mapping[str, Any], npu: NpuReport) -> list[Route]:
    """The route of every phase, as the engine with these facts runs it."""
    ready = readiness(facts, npu, npu_kernel())
    return [route(phase, ready) for phase in TABLE]
