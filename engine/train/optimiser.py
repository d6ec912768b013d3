"""The optimisers of the demo model: AdamW for all, or Muon for the ternary matrices and AdamW for the rest.

Muon is after Jordan et al. 2024; its step is scaled as in "Muon is Scalable for LLM Training" (Liu et al.
2025), so that one learning rate serves both. No schedule: that is `engine.train.train`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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

    def __init__(
        self,
        params: list[dict[str, object]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():
                self._step_stack(params, group["lr"], group["momentum"], group["weight_decay"])

    def _step_stack(self, params: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        buffers = []
        for p in params:
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            buffers.append(state["momentum"])
        grads = [p.grad for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        looked_ahead = torch._foreach_lerp(grads, buffers, momentum)
        updates = _orthogonalise(torch.stack(looked_ahead)).unbind(0)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        torch._foreach_add_(params, list(updates), alpha=-lr * 0.2 * max(params[0].shape) ** 0.5)


def make_optimisers(model: nn.Module, kind: str, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW alone (kind "adamw"), or Muon for the ternary matrices beside it ("muon").

    A group's `decay` is the weight decay of the first half of the run: 0.1 on ternary matrices, else none.
    """
    matrices = [p for n, p in model.named_parameters() if ".weights." in n]
    others = [p for n, p in model.named_parameters() if ".weights." not in n]
    groups = [{"params": others, "decay": 0.0}]
    first: list[torch.optim.Optimizer] = []
    if kind == "muon":
        first = [Muon([{"params": matrices, "decay": 0.1}], lr)]
    else:
        groups.append({"params": matrices, "decay": 0.1})
    fused = next(model.parameters()).is_cuda
    return [*first, torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-10, fused=fused)]
