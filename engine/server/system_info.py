"""The machine in the shape of Lemonade's system-info, from /proc, /sys and what the engine says of itself."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.router import NpuReport, npu_kernel, readiness
from engine.server.service import Service

AMD_GPU = "0x1002"


def system_info(service: Service, npu: NpuReport, root: Path = Path("/")) -> dict[str, Any]:
    """The whole object. What cannot be read is left empty; it is no reason to refuse the rest."""
    processor = _processor(root)
    return {
        "OS Version": platform.platform(),
        "Processor": processor,
        "Physical Memory": f"{_memory_bytes(root) / 2**30:.1f} GB",
        "model_storage": _storage(service.home.model_dir),
        "devices": {
            "cpu": {
                "name": processor,
                "cores": _cores(root),
                "threads": os.cpu_count() or 1,
                "available": True,
                "family": platform.machine(),
            },
            **_gpus(service, root),
            "amd_npu": {
                "name": processor if npu.driver_loaded else "",
                "available": npu.ready,
                "family": "XDNA2" if npu.driver_loaded else "",
                "power_mode": "",
            },
        },
        "recipes": {"halo": _recipe(service, npu)},
    }


def _recipe(service: Service, npu: NpuReport) -> dict[str, Any]:
    """The three targets of the router's table as Lemonade's backends; action is what a person would run."""
    ready = readiness(service.engine.facts, npu, npu_kernel())
    devices = {"npu": ["amd_npu"], "gpu": ["amd_gpu"], "cpu": ["cpu"]}
    backends = {
        target: {
            "devices": devices[target] if found.ready else [],
            "state": "installed" if found.ready else "unsupported",
            "message": found.reason,
            "action": "" if found.ready else "halo doctor",
            "version": service.home.version,
        }
        for target, found in ready.items()
    }
    return {"default_backend": "gpu" if ready["gpu"].ready else "cpu", "backends": backends}


def _gpus(service: Service, root: Path) -> dict[str, Any]:
    facts = service.engine.facts
    backend, name = facts.get("backend"), str(facts.get("device") or "")
    amd = [{"name": found, "available": False, "family": ""} for found in _amd_gpus(root)]
    one = {"name": name, "available": True, "family": str(facts.get("isa") or "")}
    if backend == "cuda":
        return {"amd_gpu": amd, "nvidia_gpu": [one]}
    return {"amd_gpu": [one] if backend == "hip" else amd, "nvidia_gpu": []}


def _amd_gpus(root: Path) -> Iterator[str]:
    for card in sorted((root / "sys/class/drm").glob("card[0-9]*")):
        if _text(card / "device/vendor") == AMD_GPU:
            yield f"PCI {AMD_GPU}:{_text(card / 'device/device')}"


def _storage(folder: Path) -> dict[str, Any]:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return {"path": str(folder), "used_bytes": 0, "total_bytes": 0, "free_bytes": 0}
    return {
        "path": str(folder),
        "used_bytes": usage.used,
        "total_bytes": usage.total,
        "free_bytes": usage.free,
    }


def _processor(root: Path) -> str:
    return _field(_text(root / "proc/cpuinfo"), "model name") or platform.processor() or platform.machine()


def _cores(root: Path) -> int:
    """Physical cores: pairs of package and core; the threads where the kernel does not tell."""
    seen = set()
    for entry in _text(root / "proc/cpuinfo").split("\n\n"):
        if core := _field(entry, "core id"):
            seen.add((_field(entry, "physical id"), core))
    return len(seen) or os.cpu_count() or 1


def _memory_bytes(root: Path) -> int:
    words = _field(_text(root / "proc/meminfo"), "MemTotal").split()
    return int(words[0]) * 1024 if words and words[0].isdigit() else 0


def _field(text: str, name: str) -> str:
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
