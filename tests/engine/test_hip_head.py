"""The GPU head on the simulated device: the ids, near tokens and logits of the CPU's, to the last bit.

Hidden states are given, so that nothing but the head runs. It says nothing of speed, nor of a real GPU.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.arithmetic import dot
from engine.formats.prepared import prepare
from engine.formats.tiles import coarse_head
from engine.model import Layer, Model, ModelConfig
from engine.reference import rmsnorm
from tests.engine.conftest import NATIVE, native_digest, random_ternary
from tests.engine.test_head import FINAL_NORMS, HEADS, VOCAB, bf16, gaussian

DRIVER = Path(__file__).with_name("hip_head_driver.cpp")
SOURCES = ["hip/head.cpp", "hip/runtime.cpp", "hip/sim.cpp"] + [
    f"cpu/{name}.cpp" for name in ("model", "checksum", "head", "pool", "scalar")
]
EPS = 1e-5
UNSUPPORTED = -4

Array = np.ndarray[Any, np.dtype[np.float32]]
Ints = np.ndarray[Any, np.dtype[np.int32]]


@pytest.fixture(scope="module", params=["HALO_SIM_WMMA", "HALO_SIM_MMA_SYNC"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The driver with the simulated device and the CPU's head, built once for its sources and each kind of
    matrix unit."""
    cache = getattr(request.config, "cache", None)
    kept = os.environ.get("HALO_TEST_BUILD") or (cache.mkdir("halo-native") if cache else None)
    folder = Path(kept or tmp_path_factory.mktemp("head")) / native_digest()
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"head-{request.param}-{os.getpid()}.so"
    flags = f"-std=c++17 -O1 -DHALO_SIM -D{request.param} -ffp-contract=off -U_FORTIFY_SOURCE".split()
    flags += ["-fPIC", "-shared"]
    if platform.machine() == "x86_64":
        flags.append("-mfma")
    files = [str(DRIVER), *(str(NATIVE / name) for name in SOURCES)]
    command = ["c++", *flags, f"-I{NATIVE}", *files, "-pthread", "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    loaded = ctypes.CDLL(str(built))
    built.unlink()
    loaded.driver_message.restype = ctypes.c_char_p
    loaded.driver_close.argtypes = [ctypes.c_void_p]
    loaded.driver_draw.argtypes = [
        *[ctypes.c_void_p] * 2, ctypes.c_int, ctypes.c_void_p, ctypes.c_float, ctypes.c_int,
        *[ctypes.c_void_p] * 9,
    ]  # fmt: skip
    return loaded


def head_model(head: Array, final_norm: Array | None = None) -> Model:
    """A model of one least layer around an output head of its own."""
    vocab, hidden = head.shape
    config = ModelConfig(hidden, 1, 1, 1, 1, vocab, 4, False, 10000.0, EPS, head_dim=2)
    rng = np.random.default_rng(0)
    one = np.ones(hidden, np.float32)
    matrices = [random_ternary(rng, rows, cols) for _, rows, cols in config.projections()]
    layer = Layer(one, one, one[:2], one[:1], *matrices)
    embedding = np.zeros((vocab, hidden), np.float32)
    norm = rng.uniform(0.5, 1.5, hidden).astype(np.float32) if final_norm is None else final_norm
    return Model(config, embedding, norm, [layer], head=head)


class Head:
    """Both heads over one prepared file; every call compares them and gives the GPU's."""

    def __init__(self, library: ctypes.CDLL, path: Path, model: Model) -> None:
        self.library, self.model = library, model
        with np.errstate(all="ignore"):
            prepare(model, path)
        self.handle = ctypes.c_void_p()
        self.status = library.driver_open(str(path).encode(), ctypes.byref(self.handle))

    def close(self) -> None:
        self.library.driver_close(self.handle)

    def message(self) -> str:
        return str(self.library.driver_message().decode())

    def rows(self, x: Array) -> Array:
        """x with room to a multiple of 16, and one row more that nobody asks for."""
        filled = np.zeros((len(x) + 1, -(-x.shape[1] // 16) * 16), np.float32)
        filled[:-1, : x.shape[1]] = x
        filled[-1, : x.shape[1]] = 7
        return filled

    def argmax(self, x: Array, wanted: Ints | None = None, graph: bool = False) -> tuple[int, Ints]:
        count = len(x) if wanted is None else len(wanted)
        ids, cpu = np.full((2, count), -9, np.int32)
        finite, rows = ctypes.c_int(), self.rows(x)
        which = None if wanted is None else wanted.ctypes.data_as(ctypes.c_void_p)
        done = self.library.driver_argmax(
            self.handle, at(rows), which, count, int(graph), at(ids), at(cpu), ctypes.byref(finite)
        )
        assert done == finite.value, self.message()
        assert not done or np.array_equal(ids, cpu)
        return done, ids

    def draw(
        self, x: Array, noise: Array, depth: float, room: int
    ) -> tuple[int, Ints, list[tuple[Ints, Array]]]:
        count = len(x)
        ours, cpu = drawn_room(count, room), drawn_room(count, room)
        finite, rows = ctypes.c_int(), self.rows(x)
        done = self.library.driver_draw(
            self.handle,
            at(rows),
            count,
            at(noise),
            depth,
            room,
            *map(at, (*ours, *cpu)),
            ctypes.byref(finite),
        )
        assert done == finite.value, self.message()
        near: list[tuple[Ints, Array]] = []
        if done:
            assert np.array_equal(ours[0], cpu[0])
            assert np.array_equal(ours[1], cpu[1])
            for k, found in enumerate(ours[1]):
                near.append((ours[2][k, : max(found, 0)], ours[3][k, : max(found, 0)]))
                assert np.array_equal(near[-1][0], cpu[2][k, : max(found, 0)])
                assert same_bits(near[-1][1], cpu[3][k, : max(found, 0)])
        return done, ours[0], near

    def logits(self, x: Array, wanted: Ints | None = None) -> Array:
        count = len(x) if wanted is None else len(wanted)
        ours: Array
        ours, cpu = (np.full((count, self.model.config.vocab_size), np.nan, np.float32) for _ in range(2))
        rows = self.rows(x)
        which = None if wanted is None else wanted.ctypes.data_as(ctypes.c_void_p)
        done = self.library.driver_logits(self.handle, at(rows), which, count, at(ours), at(cpu))
        assert done == 1, self.message()
        assert same_bits(ours, cpu)
        for k in (0, count - 1):
            again = np.full(ours.shape[1], np.nan, np.float32)
            assert self.library.driver_logits_again(self.handle, k, at(again)) == 1, self.message()
            assert same_bits(again, ours[k])
        return ours

    def oracle(self, x: Array) -> Array:
        normed = rmsnorm(x, self.model.final_norm, EPS)
        assert self.model.head is not None
        return np.stack([dot(self.model.head, row) for row in normed])


def at(array: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return array.ctypes.data_as(ctypes.c_void_p)


def drawn_room(count: int, room: int) -> tuple[Ints, Ints, Ints, Array]:
    """Winners, how many are near, their ids and their logits, each to be written over."""
    winners, found = (np.full(count, -9, np.int32) for _ in range(2))
    return winners, found, np.full((count, room), -9, np.int32), np.full((count, room), -9, np.float32)


def same_bits(a: Array, b: Array) -> bool:
    return np.array_equal(np.ascontiguousarray(a).view(np.int32), np.ascontiguousarray(b).view(np.int32))


Opener = Callable[..., Head]
WMMA = pytest.mark.parametrize("library", ["HALO_SIM_WMMA"], indirect=True)  # for what is the same on either


@pytest.fixture
def opened(library: ctypes.CDLL, tmp_path: Path) -> Iterator[Opener]:
    heads: list[Head] = []

    def make(head: Array, final_norm: Array | None = None) -> Head:
        heads.append(Head(library, tmp_path / f"m{len(heads)}", head_model(head, final_norm)))
        return heads[-1]

    yield make
    for head in heads:
        head.close()


def states(count: int, hidden: int, seed: int = 5) -> Array:
    return np.random.default_rng(seed).standard_normal((count, hidden)).astype(np.float32)


def gumbel(count: int, vocab: int, scale: float = 1.0) -> Array:
    return (np.random.default_rng(6).gumbel(size=(count, vocab)) * scale).astype(np.float32)


@pytest.mark.parametrize("vocab, hidden", [(97, 90), (3, 2), (515, 256), (1030, 600), (10007, 34)])
@pytest.mark.parametrize("whole", [True, False], ids=["bf16", "f32"])
def test_odd_shapes_give_the_oracles_tokens_and_logits(
    opened: Opener, vocab: int, hidden: int, whole: bool
) -> None:
    head = states(vocab, hidden, seed=1)
    both = opened(bf16(head) if whole else head)
    x = states(3, hidden)
    expected = both.oracle(x)
    assert same_bits(both.logits(x), expected)
    assert both.argmax(x)[1].tolist() == expected.argmax(axis=1).tolist()
    noise = gumbel(3, vocab)
    _, winners, near = both.draw(x, noise, 2.0, vocab)
    assert winners.tolist() == (expected + noise).argmax(axis=1).tolist()
    for row, winner, (ids, logits) in zip(expected, winners, near, strict=True):
        assert set(np.flatnonzero(row >= row[winner])) <= set(ids.tolist())
        assert same_bits(logits, row[ids])


@WMMA
def test_the_coarse_head_is_repacked_level_by_level(library: ctypes.CDLL, opened: Opener) -> None:
    """Also what fills it up: columns and rows that are not there have level 0."""
    head = states(37, 300, seed=2)
    both = opened(head)
    levels = np.zeros((48, 512), np.uint8)
    levels[:37, :300] = coarse_head(head)[0]
    held = [[library.driver_level(both.handle, row, col) for col in range(512)] for row in range(48)]
    assert np.array_equal(held, levels)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 8, 9, 16, 17, 96])
def test_any_number_of_rows_is_the_rows_one_by_one(opened: Opener, count: int) -> None:
    both = opened(states(130, 64, seed=3))
    x = states(count, 64)
    one_by_one = [int(both.argmax(row[None])[1][0]) for row in x]
    assert both.argmax(x)[1].tolist() == one_by_one
    wanted = np.random.default_rng(7).permutation(count).astype(np.int32)
    assert both.argmax(x, wanted)[1].tolist() == [one_by_one[row] for row in wanted]
    assert both.argmax(x, graph=True)[1].tolist() == one_by_one
    if count < 96:
        both.logits(x, wanted)
        both.draw(x, gumbel(count, 130), 1.0, 130)


@WMMA
@pytest.mark.parametrize(
    "kind, norm",
    [*itertools.product(HEADS, ("even", "one outlier")), ("gaussian", "tiny"), ("gaussian", "nothing")],
)
def test_no_head_misleads_the_two_stages(opened: Opener, kind: str, norm: str) -> None:
    final_norm, x = FINAL_NORMS[norm](64), states(2, 64)
    head = HEADS[kind](rmsnorm(x, final_norm, EPS), np.random.default_rng(2))
    if not kind.startswith(("of_", "one_ulp")):
        head = bf16(head)
    both = opened(head, final_norm)
    both.argmax(x)
    both.argmax(x[:1])
    for scale, depth, room in ((1.0, 0.5, 2048), (0.1, 6.0, 0)):
        both.draw(x, gumbel(2, VOCAB, scale), depth, room)


@WMMA
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 3e38])
def test_a_head_whose_logits_are_no_numbers_is_an_error_not_a_token(
    opened: Opener, bad: float, count: int
) -> None:
    """And no more than that: the next step, whose head is whole, finds its state as it should be."""
    x = states(count, 64)
    head = gaussian(x, np.random.default_rng(3))
    head[77] = bad
    both = opened(head)
    assert both.argmax(x)[0] == 0
    assert both.draw(x, gumbel(count, VOCAB), 1.0, 16)[0] == 0
    out = np.zeros((2, count, VOCAB), np.float32)
    assert both.library.driver_logits(both.handle, at(both.rows(x)), None, count, at(out[0]), at(out[1])) == 0


@WMMA
@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("count", [1, 5])
def test_a_hidden_state_that_is_no_number_is_an_error_and_then_forgotten(
    opened: Opener, bad: float, count: int
) -> None:
    both = opened(states(300, 64, seed=3))
    x = states(count, 64)
    damaged = x.copy()
    damaged[count // 2, 5] = bad
    assert both.argmax(damaged)[0] == 0
    assert both.draw(damaged, gumbel(count, 300), 1.0, 16)[0] == 0
    assert both.argmax(x)[1].tolist() == both.oracle(x).argmax(axis=1).tolist()


@WMMA
def test_zeros_of_either_sign_tie_and_the_lowest_id_wins(opened: Opener) -> None:
    head = -np.abs(states(40, 16, seed=4))
    head[11], head[12], head[30] = -0.0, 0.0, -0.0
    both = opened(head)
    x = np.abs(states(2, 16))
    assert both.argmax(x)[1].tolist() == [11, 11]
    assert both.draw(x, np.zeros((2, 40), np.float32), 0.0, 40)[2][0][0].tolist() == [11, 12, 30]


@WMMA
def test_noise_that_forbids_a_token_is_obeyed(opened: Opener) -> None:
    both = opened(states(300, 64, seed=3))
    x = states(1, 64)
    best = int(both.argmax(x)[1][0])
    noise = np.zeros((1, 300), np.float32)
    noise[0, best] = -np.inf
    done, winners, _ = both.draw(x, noise, 0.0, 300)
    assert done == 1
    assert winners[0] == np.argsort(-both.oracle(x)[0], kind="stable")[1]


@WMMA
@pytest.mark.parametrize("room", [1, 2, 255, 256, 599, 600, 601, 5000])
def test_more_near_tokens_than_room_are_said_to_be_so(opened: Opener, room: int) -> None:
    """All 600 are near: the list is whole or there is none, and nothing is written beside it."""
    both = opened(np.repeat(states(1, 64), 600, axis=0))
    x = states(3, 64)
    near = both.draw(x, gumbel(3, 600), 1.0, room)[2]
    assert [len(ids) for ids, _ in near] == [600 if room >= 600 else 0] * 3


@WMMA
def test_a_hidden_size_that_no_block_can_hold_is_refused_when_it_is_loaded(opened: Opener) -> None:
    both = opened(np.zeros((3, 40000), np.float32))
    assert both.status == UNSUPPORTED
    assert "hidden size of 40000 needs" in both.message()
