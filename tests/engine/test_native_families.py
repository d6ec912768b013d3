"""From the checkpoint of each family to the native engine's logits: the oracle's, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backend import KV_FORMS, NativeModel
from engine.formats.hf import open_checkpoint
from engine.formats.importer import in_memory
from engine.formats.prepared import prepare, read_prepared
from engine.reference import Reference
from tests.engine.formats_fixtures import same_model
from tests.engine.test_families import FALCON3, FALCON_E, LLAMA3, ONE_BIT, Tensors, Truth, written

FAMILIES: dict[str, tuple[dict[str, Any], Callable[[Truth], Tensors]]] = {
    "Falcon3": (FALCON3, lambda t: t.packed()),
    "Llama3": (LLAMA3, lambda t: t.packed()),
    "Falcon-E": (FALCON_E, lambda t: t.packed()),
    "1bitLLM": (ONE_BIT, lambda t: t.masters()),
    # Sizes that fill no tile and no register, and a head size of its own.
    "odd sizes": (
        FALCON3 | {"hidden_size": 52, "intermediate_size": 148, "head_dim": 20, "vocab_size": 37},
        lambda t: t.packed(),
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Reference, list[int]]:
    """(prepared file, oracle in the default form of the cache, 29 tokens)."""
    data, make = FAMILIES[request.param]
    stream = open_checkpoint(written(tmp_path / "x", data, make(Truth(data)))).stream
    prepare(stream, tmp_path / "model.halo")
    eps = float(np.float32(stream.config.rms_norm_eps))  # of which the file, as the arithmetic, has a float32
    kept = replace(stream, config=replace(stream.config, rms_norm_eps=eps))
    assert same_model(in_memory(kept), read_prepared(tmp_path / "model.halo")), "the file loses nothing else"
    tokens = np.random.default_rng(4).integers(0, data["vocab_size"], 29).tolist()
    return tmp_path / "model.halo", Reference(in_memory(stream)), tokens


def test_every_path_gives_the_oracles_logits(
    family: tuple[Path, Reference, list[int]], native_library: Path, cpu_paths: list[str]
) -> None:
    """SiLU, no sub-norms, an own head and head size: alone, on two threads, whole and a token at a time."""
    prepared, oracle, tokens = family
    wanted = oracle.forward(tokens, oracle.new_cache())
    n = len(tokens)
    with NativeModel.open(prepared, native_library) as model:
        for path in cpu_paths:
            for threads in (1, 2):
                with model.session(threads=threads, path=path) as session:
                    whole = session.run(tokens, [0] * n, range(n), [True] * n)
                    assert np.array_equal(whole, wanted), (path, threads)
                    single = [session.run([token], [0], [i], [True])[0] for i, token in enumerate(tokens)]
                    assert np.array_equal(np.stack(single), wanted), (path, threads, "a token at a time")


def test_greedy_tokens_are_the_oracles(
    family: tuple[Path, Reference, list[int]], native_library: Path
) -> None:
    """Through the two-stage head, which is the embedding's in some families and an own one in others."""
    prepared, oracle, tokens = family
    with NativeModel.open(prepared, native_library) as model, model.session() as session:
        fed, found = tokens[:5], []
        for _ in range(20):
            start = 0 if len(found) == 0 else 4 + len(found)
            n = len(fed)
            want = [False] * (n - 1) + [True]
            found.append(int(session.run_argmax(fed, [0] * n, range(start, start + n), want)[0]))
            fed = found[-1:]
    assert found == oracle.greedy(tokens[:5], 20)


@pytest.mark.parametrize("form", KV_FORMS)
def test_every_form_of_the_cache_takes_a_head_size_of_its_own(
    tmp_path: Path, native_library: Path, form: str
) -> None:
    truth = Truth(FALCON3)
    stream = open_checkpoint(written(tmp_path / "x", FALCON3, truth.packed())).stream
    prepare(stream, tmp_path / "model.halo")
    oracle = Reference(in_memory(stream), form)
    tokens = np.random.default_rng(6).integers(0, 40, 20).tolist()
    with (
        NativeModel.open(tmp_path / "model.halo", native_library) as model,
        model.session(kv=form) as session,
    ):
        found = session.run(tokens, [0] * 20, range(20), [True] * 20)
    assert np.array_equal(found, oracle.forward(tokens, oracle.new_cache()))
