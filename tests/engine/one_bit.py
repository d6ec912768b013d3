"""1bitLLM's graph (bitnet_b1_58-large, -3B) on torch's own norms, attention and SiLU. Not a fast model.

transformers does not have it. 1bitLLM's own modeling code could not be had: this is written from an MLX port
of it, which was read, not copied. So what both got wrong, no test here sees.
"""

from __future__ import annotations

from typing import Any

import torch


class OneBitLinear(torch.nn.Module):
    """W1.58A8: absmean ternary weights of the whole tensor, absmax int8 activations of each token."""

    def __init__(self, cols: int, rows: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(rows, cols))

    def forward(self, x: Any) -> Any:
        wide, weight = x.float(), self.weight.float()
        step = wide.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127
        mean = weight.abs().mean().clamp(min=1e-5)
        ternary = torch.clamp(torch.round(weight / mean), -1, 1) * mean
        activations = torch.clamp(torch.round(wide / step), -128, 127) * step
        return torch.nn.functional.linear(activations.to(x.dtype), ternary.to(x.dtype))


class OneBitAttention(torch.nn.Module):
    """Multi-head attention, RoPE as complex numbers, a norm over all heads before the output projection."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.heads, self.theta = c.num_attention_heads, c.rope_parameters["rope_theta"]
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            OneBitLinear(c.hidden_size, c.hidden_size) for _ in range(4)
        )
        self.inner_attn_ln = torch.nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Any) -> Any:
        n, hidden = x.shape
        q, k, v = (
            p(x).reshape(n, self.heads, -1).transpose(0, 1) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(
            self.turned(q), self.turned(k), v, is_causal=True
        )
        return self.o_proj(self.inner_attn_ln(mixed.transpose(0, 1).reshape(n, hidden)))

    def turned(self, x: Any) -> Any:
        half = x.shape[-1] // 2
        angle = torch.outer(torch.arange(x.shape[1]), self.theta ** (-torch.arange(half) / half))
        z = torch.complex(x[..., :half].float(), x[..., half:].float()) * torch.polar(torch.ones(()), angle)
        return torch.cat([z.real, z.imag], -1).to(x.dtype)


class OneBitFeedForward(torch.nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (OneBitLinear(c.hidden_size, c.intermediate_size) for _ in range(2))
        self.down_proj = OneBitLinear(c.intermediate_size, c.hidden_size)
        self.ffn_layernorm = torch.nn.RMSNorm(c.intermediate_size, c.rms_norm_eps)

    def forward(self, x: Any) -> Any:
        hidden = torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(self.ffn_layernorm(hidden))


class OneBitLayer(torch.nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = OneBitAttention(c), OneBitFeedForward(c)
        self.input_layernorm = torch.nn.RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = torch.nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Any) -> Any:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class OneBit(torch.nn.Module):
    """1bitLLM's BitnetForCausalLM from its formulas: LLaMA with sub-norms, SiLU, a tied head."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(c.vocab_size, c.hidden_size)
        self.model.layers = torch.nn.ModuleList(OneBitLayer(c) for _ in range(c.num_hidden_layers))
        self.model.norm = torch.nn.RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, tokens: Any) -> Any:
        x = self.model.embed_tokens(tokens[0])
        for layer in self.model.layers:
            x = layer(x)
        return self.model.norm(x)[None] @ self.model.embed_tokens.weight.T
