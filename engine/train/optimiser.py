"""Muon for the ternary matrices, AdamW for the rest. Muon is after Jordan et al. 2024; its step is scaled as in
"Muon is Scalable for LLM Training" (Liu et al. 2025), so that one learning rate serves both."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.compile(dynamic=False)
def _orthogonalise(g: Tensor) -> Tensor:
    """Newton-Schulz iteration on a stack [n, rows, cols]; quintic coefficients of Jordan et al."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.to(torch.bfloat16)
    transposed = x.size(-2) > x.size(-1)
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for _ in range(5):
        xx = x @ x.mT
        x = a * x + (b * xx + c * xx @ xx) @ x
    return (x.mT if transposed else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; matrices of one shape are stepped together."""

    def __init__(self, params: list[dict[str, object]], lr: float, momentum: float = 0.95, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                buffers = []
                for p in params:
                    state = self.state[p]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(p)
                    buffers.append(state["momentum"])
                grads = [p.grad for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                looked_ahead = torch._foreach_lerp(grads, buffers, group["momentum"])
                updates = _orthogonalise(torch.stack(looked_ahead)).unbind(0)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, list(updates), alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)
