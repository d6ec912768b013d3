"""BitNet b1.58 in PyTorch with quantisation-aware training. It trains; `engine/` runs.

A projection takes the engine's integers: activations int8 by each token's absmax, weights ternary by the
tensor's absmean, both as whole numbers (exact in bf16, which holds every integer up to 256), scales outside.
One thing is coarser than in the engine: the product comes out of the GPU in bf16, eight significant bits,
where the engine keeps the exact sum. Attention and the head run in bf16 too. Gradients pass straight through
both roundings (Ma et al., "The Era of 1-bit LLMs").
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The shape of the demo model."""

    hidden: int = 512
    layers: int = 12
    heads: int = 8
    kv_heads: int = 2
    ffn: int = 1536
    vocabulary: int = 8192
    context: int = 1024
    theta: float = 10000.0
    eps: float = 1e-5

    def as_dict(self) -> dict[str, float]:
        """The fields by name, as they are logged and exported."""
        return asdict(self)


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """The value of `rounded` with the gradient of `exact`."""
    return exact + (rounded - exact).detach()


def absmean(weight: Tensor) -> Tensor:
    """The scale of a ternary matrix: one number for the whole tensor."""
    return weight.abs().mean().clamp(min=1e-5)


def five_bits(x: Tensor) -> Tensor:
    """Round to five significant bits (half away from zero): exact in bf16, and a byte a value once packed."""
    return ((x.contiguous().view(torch.int32) + (1 << 18)) & ~((1 << 19) - 1)).view(torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def quantise_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x as whole numbers in [-128, 127], the factor 127/absmax of each token)."""
    x = x.float()
    scale = (127.0 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)).detach()
    scaled = x * scale
    return straight_through(scaled, scaled.round().clamp(-128, 127)), scale


class Ternary(nn.Module):
    """One or more projections of the same input; each has its own absmean scale."""

    def __init__(self, inputs: int, outputs: list[int]) -> None:
        super().__init__()
        weights = [nn.Parameter(torch.randn(rows, inputs) * inputs**-0.5) for rows in outputs]
        self.weights = nn.ParameterList(weights)

    def forward(self, x: Tensor) -> list[Tensor]:
        """float32 [..., inputs] -> one float32 [..., outputs[i]] a matrix."""
        q, scale = quantise_activations(x)
        q = q.to(torch.bfloat16)
        out = []
        for weight in self.weights:
            mean = absmean(weight).detach()
            scaled = weight / mean
            ternary = straight_through(scaled, scaled.round().clamp(-1, 1)).to(torch.bfloat16)
            out.append(F.linear(q, ternary).float() * (mean / scale))
        return out


class Layer(nn.Module):
    """One block: attention and a squared-ReLU gated FFN, a sub-norm before each output projection."""

    def __init__(self, s: Shape, dropout: float) -> None:
        super().__init__()
        self.s, self.dropout = s, dropout
        hd = s.hidden // s.heads
        self.input_norm = nn.Parameter(torch.ones(s.hidden))
        self.post_attn_norm = nn.Parameter(torch.ones(s.hidden))
        self.attn_sub_norm = nn.Parameter(torch.ones(s.hidden))
        self.ffn_sub_norm = nn.Parameter(torch.ones(s.ffn))
        self.qkv = Ternary(s.hidden, [s.hidden, s.kv_heads * hd, s.kv_heads * hd])
        self.o = Ternary(s.hidden, [s.hidden])
        self.gate_up = Ternary(s.hidden, [s.ffn, s.ffn])
        self.down = Ternary(s.ffn, [s.hidden])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x float32 [batch, time, hidden], and the same shape comes out."""
        s, (b, t, _) = self.s, x.shape
        q, k, v = self.qkv(rms_norm(x, self.input_norm, s.eps))
        q, k, v = (a.view(b, t, -1, s.hidden // s.heads).transpose(1, 2) for a in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (a.to(torch.bfloat16) for a in (q, k, v))
        attn = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        attn = attn.transpose(1, 2).reshape(b, t, s.hidden)
        x = x + self.thin(self.o(rms_norm(attn, self.attn_sub_norm, s.eps))[0])
        gate, up = self.gate_up(rms_norm(x, self.post_attn_norm, s.eps))
        inner = gate.relu().square() * up
        return x + self.thin(self.down(rms_norm(inner, self.ffn_sub_norm, s.eps))[0])

    def thin(self, x: Tensor) -> Tensor:
        """Dropout while training; all of x otherwise."""
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, rotate-half: element i turns with element i + head_dim/2."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Model(nn.Module):
    """The whole model; the embedding is also the head. Master weights are float32."""

    def __init__(self, s: Shape, dropout: float = 0.0) -> None:
        super().__init__()
        self.s = s
        self.embedding = nn.Parameter(torch.randn(s.vocabulary, s.hidden) * 0.02)
        self.final_norm = nn.Parameter(torch.ones(s.hidden))
        self.layers = nn.ModuleList(Layer(s, dropout) for _ in range(s.layers))
        half = s.hidden // s.heads // 2
        frequency = s.theta ** -(torch.arange(half).double() / half)
        angle = torch.outer(torch.arange(s.context).double(), frequency)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, float32 [batch, time], as are the int64 tokens and targets."""
        logits = self.logits(tokens).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)

    def logits(self, tokens: Tensor) -> Tensor:
        """float32 [batch, time, vocabulary]; the embedding is used as it is exported, in five bits."""
        table = straight_through(self.embedding, five_bits(self.embedding))
        x = F.embedding(tokens, table)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = rms_norm(x, self.final_norm, self.s.eps)
        return F.linear(x.to(torch.bfloat16), table.to(torch.bfloat16)).float()
