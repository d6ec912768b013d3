"""The bundled model on the native engine: on every CPU path its greedy tokens are the oracle's."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backend import NativeModel
from engine.formats.h1b import read_h1b
from engine.formats.htok import read_htok
from engine.formats.prepared import prepare, verify_prepared
from engine.model import Model
from engine.reference import Reference

DEMO = Path(__file__).parents[2] / "engine" / "models" / "demo"
PROMPTS = 20
TOKENS = 64


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "model.h1b").write_bytes(lzma.decompress((DEMO / "model.h1b.xz").read_bytes()))
    model = read_h1b(folder / "model.h1b")
    prepare(model, folder / "model.halo")
    return model, folder / "model.halo"


@pytest.fixture(scope="module")
def native(demo: tuple[Model, Path], native_library: Path) -> Iterator[NativeModel]:
    with NativeModel.open(demo[1], native_library) as opened:
        yield opened


def goldens() -> list[dict[str, Any]]:
    """The prompts of model.json with the ids that the oracle gave when the model was made."""
    described: dict[str, Any] = json.loads((DEMO / "model.json").read_text())
    return list(described["golden"])


def greedy(native: NativeModel, path: str, prompt: list[int], count: int) -> list[int]:
    with native.session(path=path, context=len(prompt) + count) as session:
        want = [False] * (len(prompt) - 1) + [True]
        ids = session.run_argmax(prompt, [0] * len(prompt), range(len(prompt)), want)
        while len(ids) < count:
            ids += session.run_argmax(ids[-1:], [0], [len(prompt) + len(ids) - 1], [True])
    return ids


def test_the_bundled_files_are_whole(demo: tuple[Model, Path]) -> None:
    config = verify_prepared(demo[1])
    assert config == demo[0].config
    assert len(read_htok(DEMO / "tokenizer.htok").tokens) == config.vocab_size


def test_the_golden_ids_come_out_on_every_path(native: NativeModel, cpu_paths: list[str]) -> None:
    """These ids are what `halo doctor` and the installer's last step compare with on a user's box."""
    for golden in goldens():
        for path in cpu_paths:
            assert greedy(native, path, golden["prompt_ids"], len(golden["ids"])) == golden["ids"], path


def test_greedy_tokens_and_logits_are_the_oracles(
    demo: tuple[Model, Path], native: NativeModel, cpu_paths: list[str]
) -> None:
    """One prompt and 64 tokens; HALO_TEST_SLOW=1 takes twenty prompts.

    The oracle runs each finished sequence at once: its arg max after each token must be the token that came
    next, which is what greedy means, and its logits must be the native ones, to the last bit.
    """
    oracle = Reference(demo[0])
    rng = np.random.default_rng(2)
    bos = read_htok(DEMO / "tokenizer.htok").bos
    for _ in range(PROMPTS if os.environ.get("HALO_TEST_SLOW") else 1):
        prompt = [bos, *rng.integers(2, demo[0].config.vocab_size, rng.integers(1, 12)).tolist()]
        ids = {path: greedy(native, path, prompt, TOKENS) for path in cpu_paths}
        fed = prompt + ids["scalar"][:-1]
        logits = oracle.forward(fed, oracle.new_cache())
        assert all(found == ids["scalar"] for found in ids.values())
        assert logits[len(prompt) - 1 :].argmax(axis=1).tolist() == ids["scalar"]
        with native.session() as session:
            rows = session.run(fed, [0] * len(fed), range(len(fed)), [True] * len(fed))
        assert np.array_equal(rows, logits)
