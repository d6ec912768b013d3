"""How many sequences there is memory for at once; nothing is taken here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from engine.backend import DEFAULT_KV
from engine.model import ModelConfig

MOST_SLOTS: Final = 8
SHARE: Final = 0.25  # of the memory that is available: the rest is the model's, and other programs'
_BYTES: Final = {"f32": 4.0, "f16": 2.0, "int8": 1.0, "rotor3": 0.375}  # an element of the KV cache


def slot_bytes(config: ModelConfig, context: int, kv: str | None = None) -> int:
    """About what the keys and values of one sequence of `context` tokens take."""
    form = kv or os.environ.get("HALO_KV") or DEFAULT_KV
    heads = 2 * config.num_layers * config.num_kv_heads
    scale = 4 if form in ("int8", "rotor3") else 0
    return int(heads * context * (config.head_dim * _BYTES.get(form, 4.0) + scale))


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """What the kernel says can be had without swapping; 0 where it does not say."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def default_slots(config: ModelConfig, context: int, available: int | None = None) -> int:
    """As many slots as a quarter of the available memory holds, at least one and at most MOST_SLOTS."""
    room = available_bytes() if available is None else available
    return max(1, min(MOST_SLOTS, int(SHARE * room) // slot_bytes(config, context)))
