"""The two-stage head on heads made to mislead it: the arg max and draws are still those of all logits.

docs/exact-head.md has the proof; here is what would break it first if it were wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backend import NativeModel
from engine.errors import HaloError
from engine.formats.prepared import prepare
from engine.model import Model
from engine.reference import Reference, rmsnorm

VOCAB, TOKENS = 2100, 12  # nine items of work, the last not full; more tokens than a group of vectors

Array = np.ndarray[Any, np.dtype[np.float32]]
Maker = Callable[[Array, np.random.Generator], Array]


def gaussian(x: Array, rng: np.random.Generator) -> Array:
    return rng.standard_normal((VOCAB, x.shape[1])).astype(np.float32)


def bf16(head: Array) -> Array:
    return (head.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def all_alike(x: Array, rng: np.random.Generator) -> Array:
    return np.repeat(gaussian(x, rng)[:1], VOCAB, axis=0)


def twins(x: Array, rng: np.random.Generator) -> Array:
    head = gaussian(x, rng)
    head[1::2] = head[::2]
    return head


def one_ulp_apart(x: Array, rng: np.random.Generator) -> Array:
    """Each row is the same but for the last bit of one of its elements."""
    head = all_alike(x, rng)
    for row in range(VOCAB):
        at = rng.integers(x.shape[1])
        head[row, at] = np.nextafter(head[row, at], np.float32(rng.choice([-9, 9])))
    return head


def in_line(x: Array, rng: np.random.Generator) -> Array:
    """Multiples of a hidden state: logits as large as their norms allow, a million times nearer than that."""
    return (x[0] * (1 + rng.standard_normal((VOCAB, 1)) * 1e-6)).astype(np.float32)


def against_the_levels(x: Array, rng: np.random.Generator) -> Array:
    """Rows of one and the same coarse form, each weight at the edge of its level that x likes best or least.

    The coarse pass sees no difference at all, and its error is as large as a level allows.
    """
    hidden = x.shape[1]
    level = rng.integers(1, 63, hidden)
    level[0] = 63
    step = np.float32(0.95 / 32)
    lean = rng.uniform(-0.499, 0.499, (VOCAB, 1)) * np.sign(x[0])
    head = (level - 31.5 + lean) * step
    head[:, 0] = 1.0  # the peak, which sets the scale of each
    return head.astype(np.float32)


def one_giant_weight(x: Array, rng: np.random.Generator) -> Array:
    """The scale of a row is its largest weight's: all others fall into two levels."""
    head = gaussian(x, rng) * np.float32(0.01)
    head[np.arange(VOCAB), rng.integers(0, x.shape[1], VOCAB)] = 100.0
    return head


def of_all_sizes(x: Array, rng: np.random.Generator) -> Array:
    return gaussian(x, rng) * np.float32(10) ** rng.uniform(-40, 30, (VOCAB, 1)).astype(np.float32)


def of_denormals(x: Array, rng: np.random.Generator) -> Array:
    return gaussian(x, rng) * np.float32(1e-41)


def of_zeros(x: Array, rng: np.random.Generator) -> Array:
    return np.zeros((VOCAB, x.shape[1]), np.float32)


def all_below_zero(x: Array, rng: np.random.Generator) -> Array:
    """The padding of the last block must not win."""
    return -np.abs(gaussian(x, rng)) * np.sign(x[0])


HEADS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        gaussian, all_alike, twins, one_ulp_apart, in_line, against_the_levels, one_giant_weight,
        of_all_sizes, of_denormals, of_zeros, all_below_zero,
    )
}  # fmt: skip
FINAL_NORMS: dict[str, Callable[[int], Array]] = {
    "even": lambda n: np.ones(n, np.float32),
    "one outlier": lambda n: np.array([300.0] + [1.0] * (n - 1), np.float32),
    "tiny": lambda n: np.full(n, 1e-30, np.float32),
    "nothing": lambda n: np.zeros(n, np.float32),
}
PROMPT = list(range(5, 5 + TOKENS))


def hidden_states(model: Model) -> Array:
    state = Reference(model).hidden_states(PROMPT)[-1]
    return rmsnorm(state, model.final_norm, model.config.rms_norm_eps)


@pytest.fixture(scope="module")
def body(tiny_model: Callable[..., Model]) -> Model:
    model = tiny_model("plain", seed=4)
    rng = np.random.default_rng(1)
    embedding = rng.standard_normal((VOCAB, model.config.hidden_size)).astype(np.float32)
    config = replace(model.config, vocab_size=VOCAB, tie_embeddings=False)
    return replace(model, config=config, embedding=embedding)


@pytest.mark.parametrize("norm", FINAL_NORMS)
@pytest.mark.parametrize("kind", HEADS)
def test_no_head_misleads_the_two_stages(
    tmp_path: Path, body: Model, native_library: Path, cpu_paths: list[str], kind: str, norm: str
) -> None:
    final_norm = FINAL_NORMS[norm](body.config.hidden_size)
    model = replace(body, final_norm=final_norm)
    rng = np.random.default_rng(2)
    head = HEADS[kind](hidden_states(model), rng)
    if not kind.startswith(("of_", "one_ulp")):
        head = bf16(head)
    model = replace(model, head=head)
    noise = (rng.gumbel(size=(TOKENS, VOCAB)) * rng.choice([0, 0.1, 1], (TOKENS, 1))).astype(np.float32)
    prepare(model, tmp_path / "m")
    entries = (PROMPT, [0] * TOKENS, range(TOKENS), [True] * TOKENS)
    with NativeModel.open(tmp_path / "m", native_library) as native:
        for path in cpu_paths:
            with native.session(path=path, threads=2) as session:
                logits = session.run(*entries)
                assert session.run_argmax(*entries) == logits.argmax(axis=1).tolist(), path
                drawn = session.run_draw(*entries, noise)
                assert [one.token for one in drawn] == (logits + noise).argmax(axis=1).tolist(), path
    oracle = Reference(model)
    assert np.array_equal(logits, oracle.forward(PROMPT, oracle.new_cache()))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 3e38])
def test_a_head_whose_logits_are_no_numbers_is_an_error_not_a_token(
    tmp_path: Path, body: Model, native_library: Path, bad: float
) -> None:
    head = gaussian(np.zeros((1, body.config.hidden_size), np.float32), np.random.default_rng(3))
    head[77] = bad
    with np.errstate(all="ignore"):
        prepare(replace(body, head=head), tmp_path / "m")
    with NativeModel.open(tmp_path / "m", native_library) as native, native.session() as session:
        for run in (session.run, session.run_argmax):
            with pytest.raises(HaloError, match="not finite"):
                run(PROMPT, [0] * TOKENS, range(TOKENS), [True] * TOKENS)
