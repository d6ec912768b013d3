"""The whole GPU engine on a simulated device beside the CPU's: every result of a session, to the last bit.

The kernels are those that a GPU runs; what this cannot see is a GPU's timing. docs/hip-proof.md says what
else is proved, and how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backend import NativeModel, Session
from engine.errors import HaloError
from engine.formats.prepared import prepare
from engine.model import Model
from tests.engine import conftest

Make = Callable[..., Model]
# Rows of several pieces in shared memory, for batches of 16: hidden and intermediate of unlike step counts.
LONG = dict(
    hidden_size=512, intermediate_size=6912, num_layers=1, num_heads=4, num_kv_heads=1, vocab_size=300
)


@contextmanager
def _session(library: Path, path: Path, slots: int, context: int, **options: Any) -> Iterator[Session]:
    with NativeModel.open(path, library) as model, model.session(slots, context, **options) as session:
        yield session


def _same(one: object, other: object) -> bool:
    if one is None or other is None:
        return one is other
    left, right = np.asarray(one), np.asarray(other)
    return bool(left.shape == right.shape and left.tobytes() == right.tobytes())


def _all_calls(session: Session, prompt: int) -> list[object]:
    """What every call of a session gives, over three slots: steps, batches, a prompt, draws, logits again."""
    vocab, token, said = session.config.vocab_size, 1, []
    results: list[object] = []
    for at in range(5):
        token = session.run_argmax([token], [0], [at], [True])[0]
        said.append(token)
    tokens = [(7 * i + 3) % vocab for i in range(prompt)]
    last = [False] * (prompt - 1) + [True]
    results += [said, session.run(tokens[:5], [1] * 5, range(5), [True] * 5)]
    results.append(session.run_argmax([1, 2, 0], [0, 1, 2], [5, 5, 0], [True] * 3))
    results.append(session.run(tokens, [2] * prompt, range(prompt), last))
    results.append(session.run_argmax([2, 1], [2, 1], [prompt, 6], [True, True]))
    noise = np.random.default_rng(5).gumbel(size=(2, vocab)).astype(np.float32)
    drawn = session.run_draw([1, 2], [2, 1], [prompt + 1, 7], [True, True], noise, 1.0, 8)
    results += [part for one in drawn for part in (one.token, one.ids, one.logits)]
    results.append(session.logits_again(1))
    return results


@pytest.mark.parametrize("packing", ["two_bits", "base_three"])
@pytest.mark.parametrize("kv", ["int8", "f16", "rotor3"])
@pytest.mark.parametrize("shape", ["plain", "odd", "wide", "least"])
def test_every_call_gives_the_cpus_bytes(
    shape: str,
    kv: str,
    packing: str,
    tiny_model: Make,
    native_library: Path,
    sim_library: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(shape, seed=3)
    size = model.config.head_dim
    prepare(model, tmp_path / "model.halo")
    monkeypatch.setenv("HALO_GPU_PACKING", packing)
    if kv == "rotor3" and (size < 32 or size & (size - 1)):
        for library in (sim_library, native_library):
            with (
                pytest.raises(HaloError, match="rotor3 needs heads of"),
                _session(library, tmp_path / "model.halo", 1, 8, kv=kv),
            ):
                pass
        return
    results = []
    for library in (sim_library, native_library):
        with _session(library, tmp_path / "model.halo", 3, 32, kv=kv) as session:
            results.append(_all_calls(session, 19))
    differing = [i for i, (one, other) in enumerate(zip(*results, strict=True)) if not _same(one, other)]
    assert not differing


@pytest.mark.parametrize("kv", ["int8", "f16"])
def test_attention_over_several_blocks_is_merged_as_the_cpu_merges_it(
    kv: str, tiny_model: Make, native_library: Path, sim_library: Path, tmp_path: Path
) -> None:
    prepare(tiny_model("plain", seed=4, max_seq_len=600), tmp_path / "model.halo")
    results = []
    for library in (sim_library, native_library):
        with _session(library, tmp_path / "model.halo", 1, 600, kv=kv) as session:
            tokens = [(11 * i + 5) % 300 for i in range(540)]
            logits = session.prefill(0, tokens)
            steps = [session.run_argmax([token], [0], [540 + token - 1], [True])[0] for token in (1, 2, 3)]
            results.append((logits, steps))
    assert _same(results[0][0], results[1][0]) and results[0][1] == results[1][1]


@pytest.mark.parametrize("count", [2, 5, 8, 16])
def test_a_batch_of_slots_gives_the_cpus_bytes(
    count: int, native_library: Path, sim_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(conftest.SHAPES, "long", LONG)
    prepare(conftest.random_model("long", seed=2), tmp_path / "model.halo")
    results = []
    for library in (sim_library, native_library):
        with _session(library, tmp_path / "model.halo", 16, 32) as session:
            ids = session.run_argmax(range(count), range(count), [0] * count, [True] * count)
            logits = session.run(range(count), range(count), [1] * count, [True] * count)
            results.append((ids, logits))
    assert results[0][0] == results[1][0] and _same(results[0][1], results[1][1])


def test_what_cannot_be_is_refused_as_the_cpu_refuses_it(
    tiny_model: Make, sim_library: Path, native_library: Path, tmp_path: Path
) -> None:
    prepare(tiny_model("plain"), tmp_path / "model.halo")
    said = []
    for library in (sim_library, native_library):
        with _session(library, tmp_path / "model.halo", 2, 8) as session:
            for entry in (([300], [0], [0]), ([1], [2], [0]), ([1], [0], [8]), ([1], [0], [3])):
                with pytest.raises(Exception) as caught:
                    session.run_argmax(*entry, [True])
                said.append(str(caught.value).partition("refused: ")[2])
    assert said[:4] == said[4:] and all(said)


@pytest.mark.parametrize("kv", ["int8", "f16", "rotor3"])
def test_a_copied_slot_goes_on_as_the_tokens_themselves_would(
    kv: str, tiny_model: Make, sim_library: Path, native_library: Path, tmp_path: Path
) -> None:
    prepare(tiny_model("wide", seed=6), tmp_path / "model.halo")
    results = []
    for library in (sim_library, native_library):
        with _session(library, tmp_path / "model.halo", 2, 64, kv=kv) as session:
            text, other = ([(7 * i + k) % 300 for i in range(50)] for k in (3, 4))
            session.prefill(0, text)
            for length in (1, 16, 31, 33, 50):
                session.prefill(1, other)
                session.copy(0, 1, length)
                results.append(session.run([1, 2], [1, 1], [length, length + 1], [True, True]))
                session.prefill(1, text[:length])
                results.append(session.run([1, 2], [1, 1], [length, length + 1], [True, True]))
            for bad in ((0, 0, 1), (0, 2, 1), (0, 1, 51), (0, 1, -1)):
                with pytest.raises(HaloError, match="refused"):
                    session.copy(*bad)
    cpu = results[len(results) // 2 :]
    assert all(_same(a, b) for a, b in zip(results[::2], results[1::2], strict=True))
    assert all(_same(a, b) for a, b in zip(results, cpu, strict=False))
