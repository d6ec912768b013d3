"""What a training run leaves on disk: its state, a compact snapshot, the export. Not `.h1b`: see export.py.

`state.pt` holds all that a run needs to go on as if it had not stopped. A compact snapshot (int8 master
weights, a few files of under 16 MB) can be carried to another machine; it lacks the optimiser's moments.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.train.model import Layer, Model, absmean, five_bits

COMPACT_PART = 13_000_000  # bytes, about; a tensor is not divided
PLACES = np.array([1, 3, 9, 27, 81], np.uint8)  # of five base-3 digits in a byte
NORMS = ("input_norm", "post_attn_norm", "attn_sub_norm", "ffn_sub_norm")


def save_state(
    path: Path, model: Model, optimisers: list[torch.optim.Optimizer], step: int, steps: int
) -> None:
    """Write the whole state to `path`, atomically."""
    state = {
        "model": model.state_dict(),
        "optimisers": [o.state_dict() for o in optimisers],
        "step": step,
        "steps": steps,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def load_state(path: Path, model: Model, optimisers: list[torch.optim.Optimizer]) -> tuple[int, int]:
    """(step, steps) of a `state.pt`, whose weights and moments are put in place."""
    state = torch.load(path)
    model.load_state_dict(state["model"])
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    return state["step"], state["steps"]


def save_compact(folder: Path, model: Model, step: int, steps: int) -> None:
    """Write matrices as int8 with a scale a row, and norms as they are, to compact-0.pt and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    part: dict[str, object] = {"step": step, "steps": steps}
    size, index = 0, 0
    for name, p in model.state_dict().items():
        part[name] = _in_bytes(p) if p.dim() == 2 else p.cpu()
        size += p.numel()
        if size > COMPACT_PART:
            torch.save(part, folder / f"compact-{index}.pt")
            part, size, index = {}, 0, index + 1
    torch.save(part, folder / f"compact-{index}.pt")


def _in_bytes(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 [rows, cols], float32 scale [rows, 1])."""
    rows = matrix.float()
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (rows / scale).round().to(torch.int8).cpu(), scale.cpu()


def load_compact(folder: Path, model: Model) -> tuple[int, int]:
    """(step, steps) of a compact snapshot, whose weights are put in place."""
    state: dict[str, Any] = {}
    for path in sorted(folder.glob("compact-*.pt")):
        state |= torch.load(path)
    step, steps = int(state.pop("step")), int(state.pop("steps"))
    model.load_state_dict({n: (v[0].float() * v[1] if isinstance(v, tuple) else v) for n, v in state.items()})
    return step, steps


@torch.no_grad()
def export_weights(folder: Path, model: Model) -> None:
    """Write weights.npz and embedding.npy, all that a `.h1b` needs.

    A ternary matrix is five base-3 digits a byte (code = weight + 1, the first in the lowest place) and one
    scale; norms are float32; the embedding is the upper 16 bits of its float32, rounded to five significant
    bits.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, NDArray[Any]] = {"final_norm": model.final_norm.detach().float().cpu().numpy()}
    for i, layer in enumerate(model.layers):
        for norm in NORMS:
            arrays[f"{i}.{norm}"] = getattr(layer, norm).detach().float().cpu().numpy()
        for name, weight in matrices(layer).items():
            arrays[f"{i}.{name}"], arrays[f"{i}.{name}.scale"] = pack_digits(weight)
    table = five_bits(model.embedding.detach().float()).cpu()
    bits = (table.view(torch.int32) >> 16).to(torch.int16).numpy().view(np.uint16)
    np.save(folder / "embedding.npy", bits)
    np.savez(folder / "weights.npz", shape=json.dumps(model.s.as_dict()), **arrays)


def matrices(layer: Layer) -> dict[str, Tensor]:
    """The seven ternary matrices of a layer by their names in `.h1b`."""
    names = ("q", "k", "v", "o", "gate", "up", "down")
    groups = (layer.qkv, layer.o, layer.gate_up, layer.down)
    return dict(zip(names, (w for group in groups for w in group.weights), strict=True))


def pack_digits(weight: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(base-3 digits of the ternary form of `weight`, five a byte; its scale)."""
    mean = absmean(weight.float())
    codes = (weight / mean).round().clamp(-1, 1).to(torch.int8).cpu().numpy()
    digits = np.pad(codes.reshape(-1) + 1, (0, -codes.size % 5)).reshape(-1, 5).astype(np.uint8)
    return (digits @ PLACES).astype(np.uint8), mean.cpu().numpy()
