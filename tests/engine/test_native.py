"""The native engine against the oracle, to the last bit: every CPU path, any threads, any cutting of a batch.

No tolerance is needed here. The integer sums are exact, and the order of the float operations is defined
(engine/reference.py), so equal is what the bytes must be. A tolerance would hide the flips of an int8
activation that a changed order causes, and with them tokens that differ from machine to machine. How close
that defined arithmetic is to the textbook model is argued in test_reference.py.
"""

from __future__ import annotations

import ctypes
import random
import struct
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.backend import NativeModel, Session
from engine.device import check, device_facts, find_library, load_library
from engine.errors import EXIT_COULD_NOT_RUN, HaloError
from engine.formats.prepared import prepare, read_directory
from engine.formats.tiles import ternary_tiles
from engine.model import Model
from engine.reference import Reference
from tests.engine.conftest import SHAPES
from tests.engine.prepared_files import resealed

LENGTH = 61  # no multiple of a tile of 12


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HALO_CPU_PATH", "HALO_THREADS", "HALO_LIB_DIR", "HALO_GENERATION_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Model]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prepared")
    for shape in SHAPES:
        prepare(tiny_model(shape, bf16=shape != "odd"), folder / shape)
    return {shape: folder / shape for shape in SHAPES}


@pytest.fixture(scope="module")
def expected(tiny_model: Callable[..., Model]) -> dict[str, Any]:
    """Tokens and the oracle's logits for each shape."""
    result = {}
    for shape in SHAPES:
        model = tiny_model(shape, bf16=shape != "odd")
        oracle = Reference(model)
        tokens = np.random.default_rng(9).integers(0, model.config.vocab_size, LENGTH).tolist()
        result[shape] = tokens, oracle.forward(tokens, oracle.new_cache())
    return result


@pytest.fixture
def plain(files: dict[str, Path], native_library: Path) -> Iterator[NativeModel]:
    with NativeModel.open(files["plain"], native_library) as model:
        yield model


def all_logits(session: Session, tokens: list[int], slot: int = 0) -> Any:
    count = len(tokens)
    return session.run(tokens, [slot] * count, range(count), [True] * count)


def sums(library: Path, path: str, codes: Any, x: Any) -> Any:
    """The library's int32 sums [tokens, rows] for codes 0, 1, 2 [rows, cols] and int8 x [tokens, cols]."""
    rows, cols = codes.shape
    out = np.zeros((len(x), rows), np.int32)
    native = load_library(library)
    pointers = [np.ascontiguousarray(a) for a in (ternary_tiles(codes), x)]
    check(
        native,
        native.halo_ternary_sums(
            path.encode(),
            pointers[0].ctypes.data,
            rows,
            cols,
            pointers[1].ctypes.data,
            len(x),
            out.ctypes.data,
        ),
    )
    return out


def test_sums_are_exact_for_odd_shapes(native_library: Path, cpu_paths: list[str]) -> None:
    rng = np.random.default_rng(1)
    shapes = [
        (1, 1, 1),
        (3, 63, 2),
        (5, 65, 5),
        (7, 127, 1),
        (4, 256, 4),
        (9, 1000, 3),
        (2, 6912, 9),
        (13, 577, 6),
        (49, 6912, 1),
    ]
    for rows, cols, tokens in shapes:
        codes = rng.integers(0, 3, (rows, cols), dtype=np.uint8)
        x = rng.integers(-128, 128, (tokens, cols)).astype(np.int8)
        want = x.astype(np.int64) @ (codes.astype(np.int64) - 1).T
        for path in cpu_paths:
            assert np.array_equal(sums(native_library, path, codes, x), want), (path, rows, cols, tokens)


@pytest.mark.parametrize("code", [0, 1, 2])
@pytest.mark.parametrize("value", [-128, -127, 0, 127])
def test_sums_are_exact_at_the_extremes(
    native_library: Path, cpu_paths: list[str], code: int, value: int
) -> None:
    """All weights and activations alike and as large as they get: where an int16 sum would saturate."""
    for cols in (64, 1024, 6912, 20_000):
        codes = np.full((5, cols), code, np.uint8)
        for tokens in (1, 3):
            x = np.full((tokens, cols), value, np.int8)
            for path in cpu_paths:
                assert (sums(native_library, path, codes, x) == (code - 1) * value * cols).all(), (path, cols)


def test_logits_are_the_oracles_on_every_path_and_thread_count(
    files: dict[str, Path], expected: dict[str, Any], native_library: Path, cpu_paths: list[str]
) -> None:
    for shape, file in files.items():
        tokens, logits = expected[shape]
        with NativeModel.open(file, native_library) as model:
            for path in cpu_paths:
                for threads in (1, 2, 3, 4):
                    with model.session(threads=threads, path=path) as session:
                        assert np.array_equal(all_logits(session, tokens), logits), (shape, path, threads)


@pytest.mark.parametrize("shape", ["plain", "odd", "wide"])
def test_greedy_tokens_are_the_oracles(
    files: dict[str, Path],
    native_library: Path,
    tiny_model: Callable[..., Model],
    shape: str,
    cpu_paths: list[str],
) -> None:
    model = tiny_model(shape, bf16=shape != "odd")
    want = Reference(model).greedy([1, 2, 3], 24)
    with NativeModel.open(files[shape], native_library) as native:
        for path in cpu_paths:
            with native.session(threads=2, path=path) as session:
                ids = session.run_argmax([1, 2, 3], [0] * 3, range(3), [False, False, True])
                while len(ids) < 24:
                    ids += session.run_argmax(ids[-1:], [0], [2 + len(ids)], [True])
            assert ids == want, path


@pytest.mark.parametrize("seed", range(6))
def test_any_cutting_of_the_prefill_gives_the_same_bytes(
    plain: NativeModel, expected: dict[str, Any], seed: int
) -> None:
    """Else a prompt that was cached in part would be answered differently."""
    tokens, logits = expected["plain"]
    rng = random.Random(seed)
    cuts = [0, *(range(1, LENGTH) if seed == 0 else sorted(rng.sample(range(1, LENGTH), 5))), LENGTH]
    with plain.session(threads=2) as session:
        for a, b in pairwise(cuts):
            part = session.run(tokens[a:b], [0] * (b - a), range(a, b), [True] * (b - a))
            assert np.array_equal(part, logits[a:b])


def test_slots_do_not_see_each_other(plain: NativeModel, expected: dict[str, Any]) -> None:
    """Two conversations, their tokens mixed at random in every batch, are each as if alone."""
    tokens, logits = expected["plain"]
    others = tokens[::-1]
    with plain.session(slots=3, threads=2) as session:
        alone = all_logits(session, others, slot=1)
        rng = random.Random(4)
        queue = {0: list(enumerate(tokens)), 2: list(enumerate(others))}
        got: dict[int, list[Any]] = {0: [], 2: []}
        while any(queue.values()):
            order = [s for s in rng.choices([0, 2], k=rng.randint(1, 20)) if queue[s]]
            batch = [(queue[s].pop(0), s) for s in order if queue[s]]
            if not batch:
                continue
            entries, slots = [entry for entry, _ in batch], [slot for _, slot in batch]
            rows = session.run([t for _, t in entries], slots, [p for p, _ in entries], [True] * len(batch))
            for slot, row in zip(slots, rows, strict=True):
                got[slot].append(row)
    assert np.array_equal(np.stack(got[0]), logits) and np.array_equal(np.stack(got[2]), alone)


def test_a_batch_of_more_than_one_chunk_is_as_if_it_were_cut(
    plain: NativeModel, expected: dict[str, Any]
) -> None:
    tokens, logits = expected["plain"]
    with plain.session(slots=4, threads=2) as session:
        slots = [slot for slot in range(4) for _ in tokens]
        rows = session.run(tokens * 4, slots, [*range(LENGTH)] * 4, [True] * len(slots))
    assert np.array_equal(rows.reshape(4, LENGTH, -1), np.stack([logits] * 4))


def test_a_slot_can_be_rewound_even_within_one_batch(plain: NativeModel, expected: dict[str, Any]) -> None:
    """A new conversation starts at position 0 of a used slot; a retry goes back by some tokens."""
    tokens, logits = expected["plain"]
    wrong = [(token + 1) % 300 for token in tokens]
    with plain.session() as session:
        all_logits(session, wrong)
        assert np.array_equal(all_logits(session, tokens), logits)
        both = [*tokens[:10], *wrong[5:9], *tokens[5:]]
        positions = [*range(10), *range(5, 9), *range(5, LENGTH)]
        rows = session.run(both, [0] * len(both), positions, [True] * len(both))
        assert np.array_equal(rows[:10], logits[:10]) and np.array_equal(rows[14:], logits[5:])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_draw_is_that_of_all_logits_and_what_is_near_is_all_that_is(
    files: dict[str, Path], expected: dict[str, Any], native_library: Path, cpu_paths: list[str], shape: str
) -> None:
    """A sampler that never sees a likely token samples from another distribution than the model's."""
    tokens, logits = expected[shape]
    rng = np.random.default_rng(4)
    noise = (rng.gumbel(size=logits.shape) * rng.choice([0, 0.01, 0.3, 5], (LENGTH, 1))).astype(np.float32)
    with NativeModel.open(files[shape], native_library) as model:
        for path in cpu_paths:
            with model.session(path=path, threads=2) as session:
                entries = (tokens, [0] * LENGTH, range(LENGTH), [True] * LENGTH)
                rows = session.run_draw(*entries, noise, depth=0.2, room=4096)
                again = session.logits_again(LENGTH - 1)
                assert [row.token for row in session.run_draw(*entries, noise)] == [row.token for row in rows]
            assert np.array_equal(again, logits[-1])
            for (token, ids, near), want, own in zip(rows, logits, noise, strict=True):
                assert token == (want + own).argmax() and ids is not None
                certain = np.flatnonzero(want >= min(want[token], want.max() - 0.2))
                assert set(certain) <= set(ids) and np.array_equal(near, want[ids])
                assert np.array_equal(ids, np.flatnonzero(want >= near.min()))


def test_a_tie_between_sums_goes_to_the_lowest_id(plain: NativeModel) -> None:
    with plain.session() as session:
        logits = session.run([1], [0], [0], [True])[0]
        noise = np.float32(2.0**20) - logits  # every sum is the same number, or rounds to it
        want = int((logits + noise).argmax())
        assert [row.token for row in session.run_draw([1], [0], [0], [True], noise[None])] == [want]


def test_a_draw_says_when_there_is_no_room(plain: NativeModel) -> None:
    with plain.session() as session:
        entries = ([1], [0], [0], [True], np.zeros((1, 300), np.float32))
        assert session.run_draw(*entries, depth=1e9, room=299)[0].ids is None
        ids = session.run_draw(*entries, depth=1e9, room=300)[0].ids
        assert ids is not None and ids.tolist() == list(range(300))
        for depth in (-1.0, float("nan")):
            with pytest.raises(HaloError, match="depth"):
                session.run_draw(*entries, depth=depth)
        with pytest.raises(HaloError, match="shape"):
            session.run_draw([1], [0], [0], [True], np.zeros((1, 299), np.float32))


def test_logits_are_given_again_only_for_the_run_just_made(plain: NativeModel) -> None:
    """Those of another run, taken for this one's, would draw a token that the model did not mean."""
    with plain.session() as session:
        with pytest.raises(HaloError, match="there is no number 0"):
            session.logits_again(0)
        rows = session.run([1, 2, 3], [0] * 3, range(3), [False, True, True])
        assert np.array_equal(session.logits_again(0), rows[0])
        assert np.array_equal(session.logits_again(1), rows[1])
        for index in (-1, 2):
            with pytest.raises(HaloError, match="there is no number"):
                session.logits_again(index)
        session.run_argmax([1, 1], [0, 0], [0, 0], [True, True])  # a rewind: the first is gone
        with pytest.raises(HaloError, match="there is no number"):
            session.logits_again(0)


def test_only_wanted_rows_come_back_in_order(plain: NativeModel, expected: dict[str, Any]) -> None:
    tokens, logits = expected["plain"]
    want = [i % 7 == 3 for i in range(LENGTH)]
    with plain.session() as session:
        rows = session.run(tokens, [0] * LENGTH, range(LENGTH), want)
        assert np.array_equal(rows, logits[want])
        ids = session.run_argmax(tokens, [0] * LENGTH, range(LENGTH), want)
        assert ids == logits[want].argmax(axis=1).tolist()
        assert session.run(tokens, [0] * LENGTH, range(LENGTH), [False] * LENGTH).shape == (0, 300)
        assert np.array_equal(session.prefill(0, tokens), logits[-1])
        assert session.run([], [], [], []).shape == (0, 300)


def test_the_arg_max_of_a_tie_is_the_lowest_id(
    tmp_path: Path, tiny_model: Callable[..., Model], native_library: Path
) -> None:
    """All rows of the embedding alike: every logit ties, across all blocks of the head."""
    model = tiny_model("wide")
    model.embedding[:] = model.embedding[0]
    prepare(model, tmp_path / "m")
    with NativeModel.open(tmp_path / "m", native_library) as native, native.session() as session:
        assert session.run_argmax([5], [0], [0], [True]) == [0]


@pytest.mark.parametrize(
    ("tokens", "slots", "positions", "sentence"),
    [
        ([300], [0], [0], "token 300"),
        ([-1], [0], [0], "token -1"),
        ([1], [2], [0], "slot 2"),
        ([1], [-1], [0], "slot -1"),
        ([1], [0], [-1], "position -1"),
        ([1], [0], [1], "gap"),
        ([1, 2], [0, 1], [0, 1], "gap"),
        ([1] * 9, [0] * 9, list(range(9)), "context of 8"),
        ([2**31], [0], [0], "out of range"),
    ],
)
def test_entries_out_of_range_are_refused_and_nothing_runs(
    plain: NativeModel, tokens: list[int], slots: list[int], positions: list[int], sentence: str
) -> None:
    with plain.session(slots=2, context=8) as session:
        with pytest.raises(HaloError, match=sentence):
            session.run(tokens, slots, positions, [True] * len(tokens))
        with pytest.raises(HaloError, match="gap"):
            session.run([1], [0], [1], [True])
        assert session.run([1], [0], [0], [True]).shape == (1, 300)


def test_lists_of_different_lengths_are_refused(plain: NativeModel) -> None:
    with plain.session() as session, pytest.raises(HaloError, match="different lengths"):
        session.run([1, 2], [0], [0], [True])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"slots": 0}, "slots"),
        ({"slots": 5000}, "slots"),
        ({"context": 0}, "context"),
        ({"context": 65}, "context"),
        ({"threads": -1}, "threads"),
        ({"threads": 10_000}, "threads"),
        ({"path": "sse9"}, "sse9"),
    ],
)
def test_a_session_that_cannot_be_is_refused(
    plain: NativeModel, arguments: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(HaloError, match=sentence):
        plain.session(**arguments)


def test_the_environment_chooses_path_and_threads(
    plain: NativeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALO_CPU_PATH", "scalar")
    monkeypatch.setenv("HALO_THREADS", "3")
    with plain.session() as session:
        assert (session.facts["isa"], session.facts["threads"]) == ("scalar", 3)
    assert (plain.facts["isa"], plain.facts["threads"], plain.facts["backend"]) == ("scalar", 3, "cpu")
    monkeypatch.setenv("HALO_THREADS", "many")
    with pytest.raises(HaloError, match="HALO_THREADS"):
        plain.session()


def test_a_path_that_this_cpu_lacks_is_refused_with_those_it_has(
    plain: NativeModel, monkeypatch: pytest.MonkeyPatch, cpu_paths: list[str]
) -> None:
    lacking = next(name for name in ("neon", "avx2") if name not in cpu_paths)
    monkeypatch.setenv("HALO_CPU_PATH", lacking)
    with pytest.raises(HaloError, match=f"{lacking}.*scalar") as caught:
        plain.session()
    assert "HALO_CPU_PATH" in caught.value.hint


def test_facts_name_the_machine(native_library: Path) -> None:
    facts = device_facts(native_library)
    assert facts["backend"] == "cpu" and facts["isa"] == facts["paths"][0] and facts["paths"][-1] == "scalar"


def test_weights_that_are_not_finite_are_an_error_and_the_slot_can_go_on(
    tmp_path: Path, files: dict[str, Path], native_library: Path, cpu_paths: list[str]
) -> None:
    """Damage that passes every check of sizes must not come out as fluent nonsense."""
    data = bytearray(files["plain"].read_bytes())
    entry = next(e for e in read_directory(files["plain"])[1] if e.name == "embedding")
    data[entry.offset + 7 * entry.row_bytes : entry.offset + 7 * entry.row_bytes + 2] = (
        b"\xc0\x7f"  # NaN in row 7
    )
    (tmp_path / "m").write_bytes(resealed(data))
    with NativeModel.open(tmp_path / "m", native_library) as model:
        for path in cpu_paths:
            with model.session(path=path) as session:
                session.run([1, 2], [0, 0], [0, 1], [False, False])
                with pytest.raises(HaloError, match="not finite"):
                    session.run([1, 7], [0, 0], [1, 2], [False, False])
                with pytest.raises(HaloError, match="gap"):
                    session.run([1], [0], [2], [False])
                session.run([1], [0], [1], [False])


@pytest.mark.parametrize("table", ["rope_cos", "rope_sin"])
@pytest.mark.parametrize("number", [float("inf"), float("nan"), 3e38, -1.5])
def test_a_cosine_beyond_one_is_refused_when_the_file_is_opened(
    tmp_path: Path, files: dict[str, Path], native_library: Path, table: str, number: float
) -> None:
    """Found by fuzzing: an infinite one makes queries that are no numbers, which have no int8 form."""
    data = bytearray(files["plain"].read_bytes())
    entry = next(e for e in read_directory(files["plain"])[1] if e.name == table)
    struct.pack_into("<f", data, entry.offset + entry.row_bytes + 4, number)
    (tmp_path / "m").write_bytes(resealed(data))
    with pytest.raises(HaloError, match=f"{table} of .* has a number beyond 1"):
        NativeModel.open(tmp_path / "m", native_library)


def test_a_session_outlives_its_model_and_closing_twice_is_harmless(
    files: dict[str, Path], expected: dict[str, Any], native_library: Path
) -> None:
    tokens, logits = expected["plain"]
    model = NativeModel.open(files["plain"], native_library)
    session = model.session()
    model.close()
    model.close()
    assert np.array_equal(all_logits(session, tokens), logits)
    session.close()
    session.close()
    with pytest.raises(HaloError, match="closed"):
        session.run([1], [0], [0], [True])
    with pytest.raises(HaloError, match="closed"):
        model.session()


def test_two_threads_in_one_session_never_mix(plain: NativeModel, expected: dict[str, Any]) -> None:
    """The second caller is told that the session is busy; nobody gets the other's logits."""
    tokens, logits = expected["plain"]
    wrong: list[str] = []

    def work(session: Session) -> None:
        for _ in range(30):
            try:
                if not np.array_equal(all_logits(session, tokens), logits):
                    wrong.append("other logits")
            except HaloError as error:
                if "another thread" not in error.message:
                    wrong.append(error.message)

    with plain.session(threads=2) as session:
        threads = [threading.Thread(target=work, args=(session,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_many_sessions_at_once_agree(plain: NativeModel, expected: dict[str, Any]) -> None:
    """More threads than CPUs, all in short phases: a race in the pool would show as other bytes or a hang."""
    tokens, logits = expected["plain"]
    results: list[bool] = []

    def work() -> None:
        with plain.session(threads=4) as session:
            results.extend(np.array_equal(all_logits(session, tokens), logits) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 20


def test_the_c_abi_refuses_null_and_too_little_room(native_library: Path, plain: NativeModel) -> None:
    """Other languages call it too; a wrong call must be a status, not a crash."""
    library = load_library(native_library)
    none = ctypes.c_void_p()
    assert library.halo_model_open(None, ctypes.byref(none)) == 1
    assert library.halo_model_config(None, None) == 1
    assert library.halo_session_create(None, 1, 1, 1, None, None, ctypes.byref(none)) == 1
    assert library.halo_session_run(None, 0, None, None, None, None, 0, None, 0, None, 0) == 1
    assert b"NULL" in library.halo_last_error()
    library.halo_model_close(None)
    library.halo_session_close(None)
    needed = ctypes.c_size_t()
    assert library.halo_device_facts(None, 0, ctypes.byref(needed)) == 1 and needed.value > 40
    with plain.session() as session:
        one, out = (ctypes.c_int32 * 1)(0), (ctypes.c_float * 299)()
        want = (ctypes.c_uint8 * 1)(1)
        handle = session._handle
        assert library.halo_session_run(handle, 1, one, one, one, want, 0, out, 299, None, 0) == 1
        assert b"do not fit" in library.halo_last_error()
        assert library.halo_session_run(handle, 1, one, one, one, want, 0, None, 300, None, 0) == 1
        assert library.halo_session_run(handle, 1, one, one, one, want, 8, out, 299, None, 0) == 1
        assert library.halo_session_run(handle, -1, one, one, one, want, 0, out, 299, None, 0) == 1


def test_a_library_is_found_by_its_folder_or_generation(
    tmp_path: Path, native_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HaloError, match="not an installed halo") as caught:
        find_library()
    assert caught.value.exit_code == EXIT_COULD_NOT_RUN
    monkeypatch.setenv("HALO_GENERATION_DIR", str(tmp_path))
    with pytest.raises(HaloError, match="missing"):
        find_library()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libhalo_cpu.so").symlink_to(native_library)
    assert find_library() == tmp_path / "lib" / "libhalo_cpu.so"
    monkeypatch.setenv("HALO_LIB_DIR", str(native_library.parent))
    assert find_library() == native_library


def test_a_library_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "libhalo_cpu.so").write_bytes(b"\x7fELF" + b"\0" * 100)
    with pytest.raises(HaloError, match="cannot be loaded"):
        load_library(tmp_path / "libhalo_cpu.so")
