"""What a ternary model is: its shape and its tensors. Not how it is stored, nor how it is run.

The architecture is BitNet b1.58 (transformers `models/bitnet`): RMSNorm, grouped-query attention with
rotate-half RoPE, a sub-norm before the output and down projections, a squared-ReLU gated FFN, a tied
embedding; or LLaMA's with ternary projections: SiLU, no sub-norms, an output head of its own. Standard
library only; the arrays are NumPy's, named here for the type checker alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from engine.errors import HaloError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ACTIVATIONS: Final[tuple[Literal["relu2", "silu"], ...]] = ("relu2", "silu")  # in files, by their place
MAX_LAYERS: Final = 4096
MAX_HIDDEN: Final = 65536
MAX_INTERMEDIATE: Final = 262144
MAX_VOCAB: Final = 1 << 24
MAX_CONTEXT: Final = 1 << 20
MAX_HEAD_DIM: Final = 1024

_HINT: Final = "the file is damaged or is no BitNet model; fetch or convert it again"


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of a model. Sizes are counts of elements; `max_seq_len` is in tokens.

    `activation` is the gate's: relu(x)^2 or x * sigmoid(x). `sub_norms`: whether RMSNorms stand before the
    output and the down projection. `head_dim` 0 means hidden_size / num_heads, and is replaced by it.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_seq_len: int
    tie_embeddings: bool
    rope_theta: float
    rms_norm_eps: float
    activation: Literal["relu2", "silu"] = "relu2"
    sub_norms: bool = True
    head_dim: int = 0

    def __post_init__(self) -> None:
        if not self.head_dim and self.num_heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)

    @property
    def q_size(self) -> int:
        """Rows of the query projection, and columns of the output projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of the key and value projections."""
        return self.num_kv_heads * self.head_dim

    def validate(self) -> None:
        """Raise HaloError unless every size is one that a real model can have.

        The limits keep size arithmetic far from any overflow and refuse a header full of noise.
        """
        limits = (
            ("hidden_size", self.hidden_size, MAX_HIDDEN),
            ("intermediate_size", self.intermediate_size, MAX_INTERMEDIATE),
            ("num_layers", self.num_layers, MAX_LAYERS),
            ("num_heads", self.num_heads, MAX_HIDDEN),
            ("num_kv_heads", self.num_kv_heads, MAX_HIDDEN),
            ("vocab_size", self.vocab_size, MAX_VOCAB),
            ("max_seq_len", self.max_seq_len, MAX_CONTEXT),
            ("head_dim", self.head_dim, MAX_HEAD_DIM),
        )
        for name, value, most in limits:
            if not 1 <= value <= most:
                raise HaloError(f"The model says {name} = {value}; 1 to {most} is possible.", hint=_HINT)
        if self.head_dim % 2:
            raise HaloError(
                f"The model says head_dim = {self.head_dim}: RoPE turns pairs, so it must be even.",
                hint=_HINT,
            )
        if self.num_heads % self.num_kv_heads:
            raise HaloError(
                f"The model says {self.num_heads} heads over {self.num_kv_heads} KV heads: no whole groups.",
                hint=_HINT,
            )
        if self.activation not in ACTIVATIONS:
            raise HaloError(f"The model says activation = {self.activation!r}.", hint=_HINT)
        for name, number in (("rope_theta", self.rope_theta), ("rms_norm_eps", self.rms_norm_eps)):
            if not (math.isfinite(number) and number > 0):
                raise HaloError(f"The model says {name} = {number}; it must be above zero.", hint=_HINT)

    def projections(self) -> tuple[tuple[str, int, int], ...]:
        """The seven ternary matrices of a layer, in file order: (name, rows, cols)."""
        h, i, q, kv = self.hidden_size, self.intermediate_size, self.q_size, self.kv_size
        return (
            ("q", q, h),
            ("k", kv, h),
            ("v", kv, h),
            ("o", h, q),
            ("gate", i, h),
            ("up", i, h),
            ("down", h, i),
        )


@dataclass(frozen=True)
class Ternary:
    """A ternary matrix: weight = (code - 1) * scale of its row.

    `packed` is uint8 [rows, ceil(cols/4)]; weight j of a byte is bits 2j and 2j+1, codes 0, 1, 2.
    `scales` is float32 [rows].
    """

    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]
    cols: int

    @property
    def rows(self) -> int:
        """Output features."""
        return int(self.packed.shape[0])


@dataclass(frozen=True)
class Layer:
    """One transformer block: norms (float32) and seven ternary matrices [out, in].

    The sub-norms, of q_size and of intermediate_size elements, are None where the model has none.
    """

    input_norm: NDArray[np.float32]
    post_attn_norm: NDArray[np.float32]
    attn_sub_norm: NDArray[np.float32] | None
    ffn_sub_norm: NDArray[np.float32] | None
    q: Ternary
    k: Ternary
    v: Ternary
    o: Ternary
    gate: Ternary
    up: Ternary
    down: Ternary


@dataclass(frozen=True)
class Model:
    """A whole model in memory: embedding float32 [vocab, hidden], final_norm float32 [hidden], its layers.

    `head` is the output head [vocab, hidden] of a model whose embedding is not tied, else None.
    """

    config: ModelConfig
    embedding: NDArray[np.float32]
    final_norm: NDArray[np.float32]
    layers: list[Layer]
    head: NDArray[np.float32] | None = None

    def stream(self) -> ModelStream:
        """This model as a stream."""
        head = self.head
        return ModelStream(
            self.config,
            lambda: iter([self.embedding]),
            self.final_norm,
            lambda: iter(self.layers),
            None if head is None else lambda: iter([head]),
        )


@dataclass(frozen=True)
class ModelStream:
    """A model that is read once more each time it is asked for: what importers give and writers take.

    `embedding()` and `head()` yield blocks of rows, float32 [some, hidden], in order; `layers()` yields the
    layers. Only one block or layer need be in memory at a time. `head` is None where it is the embedding.
    """

    config: ModelConfig
    embedding: Callable[[], Iterator[NDArray[np.float32]]]
    final_norm: NDArray[np.float32]
    layers: Callable[[], Iterator[Layer]]
    head: Callable[[], Iterator[NDArray[np.float32]]] | None = None
