"""The device's prefill kernels, simulated, against NumPy: products and attention equal to the last bit.

What the simulation runs are the fragment maps of gfx11's matrix units and of NVIDIA's, spelled out
(hip/mma.h). Speed and the real matrix units are not its business.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.arithmetic import exp
from engine.kv_forms import LEVELS, Cache, append, attend, new_cache
from engine.reference import gated
from tests.engine.conftest import NATIVE, native_digest

DRIVER = Path(__file__).with_name("hip_prefill_driver.cpp")
SOURCES = ["hip/runtime.cpp", "hip/sim.cpp"]
TWO_BITS, BASE_THREE = 0, 1
STORE, ADD, GATED = 0, 1, 2
WIDE, MIDDLE, SMALL, NARROW, CHOSEN = 0, 1, 2, 3, -2
STEP = (256, 320)  # columns of a step of either packing
FORMS = ("f16", "int8", "rotor3")
UNSUPPORTED = 4
SLOW = pytest.mark.skipif(not os.environ.get("HALO_SLOW_TESTS"), reason="set HALO_SLOW_TESTS=1")

F32 = np.ndarray[Any, np.dtype[np.float32]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@pytest.fixture(scope="module", params=["HALO_SIM_WMMA", "HALO_SIM_MMA_SYNC"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The driver with the simulated device, built once for its sources."""
    cache = getattr(request.config, "cache", None)
    kept = os.environ.get("HALO_TEST_BUILD") or (cache.mkdir("halo-native") if cache else None)
    folder = Path(kept or tmp_path_factory.mktemp("prefill")) / native_digest()
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"prefill-{request.param}-{os.getpid()}.so"
    flags = [
        "-std=c++17",
        "-O2",
        "-DHALO_SIM",
        f"-D{request.param}",
        "-ffp-contract=off",
        "-U_FORTIFY_SOURCE",
        "-fPIC",
        "-shared",
    ]
    if platform.machine() == "x86_64":
        flags.append("-mfma")
    files = [str(DRIVER), *(str(NATIVE / name) for name in SOURCES)]
    command = ["c++", *flags, f"-I{NATIVE}", *files, "-pthread", "-o", str(built)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
    loaded = ctypes.CDLL(str(built))
    built.unlink()
    loaded.driver_message.restype = ctypes.c_char_p
    return loaded


def address(array: np.ndarray) -> ctypes.c_void_p:
    """It keeps the array alive, which may be a temporary one."""
    return array.ctypes.data_as(ctypes.c_void_p)


def up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def device_tiles(codes: Bytes, packing: int) -> tuple[Bytes, int, int]:
    """Codes [rows, cols] as layout.h has them: the bytes, tiles, steps."""
    rows, cols = codes.shape
    step = STEP[packing]
    padded = np.ones((up(rows, 8), up(cols, step)), np.uint8)
    padded[:rows, :cols] = codes
    padded[rows:] = 0
    tiles, steps = len(padded) // 8, padded.shape[1] // step
    each = 4 if packing == TWO_BITS else 5
    # [tile, row, step, part, word, digit, byte] -> [tile, step, part, row, word, byte, digit]
    split = padded.reshape(tiles, 8, steps, 4, 4, each, 4).transpose(0, 2, 3, 1, 4, 6, 5).astype(np.uint32)
    if packing == TWO_BITS:
        packed = (split << 2 * np.arange(4, dtype=np.uint32)).sum(axis=-1)
    else:
        value = (split * 3 ** np.arange(4, -1, -1, dtype=np.uint32)).sum(axis=-1)
        packed = (value * 256 + 242) // 243
    return np.ascontiguousarray(packed.astype(np.uint8)).reshape(-1), tiles, steps


def test_base_three_bytes_give_their_digits_back() -> None:
    for value in range(243):
        byte, digits = (value * 256 + 242) // 243, []
        for _ in range(5):
            byte *= 3
            digits.append(byte >> 8)
            byte &= 255
        assert digits == [value // 3**k % 3 for k in range(4, -1, -1)]


class Product:
    """A matrix and activations, and what NumPy makes of them."""

    def __init__(
        self, seed: int, tokens: int, rows: int, cols: int, *, codes: Bytes | None = None, q: Any = None
    ) -> None:
        rng = np.random.default_rng(seed)
        self.tokens, self.rows, self.cols = tokens, rows, cols
        drawn = rng.integers(0, 3, (rows, cols)) if codes is None else codes
        self.codes = drawn.astype(np.uint8)
        self.q = (rng.integers(-128, 128, (tokens, cols)) if q is None else q).astype(np.int8)
        self.weight_scale = rng.uniform(0.01, 2, rows).astype(np.float32)
        self.scale = rng.uniform(0.5, 300, tokens).astype(np.float32)
        self.before = rng.standard_normal((tokens, rows + 2)).astype(np.float32)

    def expected(self, epilogue: int, activation: int) -> F32:
        sums = self.q.astype(np.float64) @ (self.codes.astype(np.float64) - 1).T
        y = sums.astype(np.float32) * self.weight_scale / self.scale[:, None]
        if epilogue == ADD:
            y = self.before[:, : self.rows] + y
        if epilogue == GATED:
            y = gated(y[:, 0::2], y[:, 1::2], ("relu2", "silu")[activation])
        return y

    def run(self, library: ctypes.CDLL, packing: int, epilogue: int, shape: int, activation: int = 0) -> F32:
        tiles, count, steps = device_tiles(self.codes, packing)
        stride = up(steps * STEP[packing], 64)
        q = np.zeros((self.tokens, stride), np.int8)
        q[:, : self.cols] = self.q
        sums = self.q.sum(axis=1, dtype=np.int32)
        out = np.ascontiguousarray(self.before[:, : up(self.rows, 2)])
        ints = [
            self.rows,
            count,
            steps,
            stride,
            self.tokens,
            out.shape[1],
            epilogue,
            activation,
            packing,
            shape,
        ]
        status = library.driver_gemm(
            address(tiles), address(self.weight_scale), address(q), address(self.scale), address(sums),
            address(out), address(np.array(ints, np.int32)),
        )  # fmt: skip
        assert status == 0, library.driver_message()
        used = self.rows // 2 if epilogue == GATED else self.rows
        # Nothing beside the results is written.
        assert (out[:, used:] == self.before[:, used : out.shape[1]]).all()
        return out[:, :used]


@pytest.mark.parametrize("packing", [TWO_BITS, BASE_THREE])
@pytest.mark.parametrize("shape", [WIDE, MIDDLE, SMALL, NARROW])
@pytest.mark.parametrize(
    ("tokens", "rows", "cols", "epilogues"),
    [
        (17, 40, 100, (STORE, ADD, GATED)),
        (33, 130, 256, (ADD,)),
        (100, 66, 640, (GATED,)),
        (129, 259, 321, (STORE,)),
    ],
)
def test_products_equal_numpy(
    library: ctypes.CDLL,
    packing: int,
    shape: int,
    tokens: int,
    rows: int,
    cols: int,
    epilogues: tuple[int, ...],
) -> None:
    product = Product(tokens, tokens, rows, cols)
    for epilogue in epilogues:
        got = product.run(library, packing, epilogue, shape)
        assert (got == product.expected(epilogue, 0)).all()


def test_the_gate_may_be_silu(library: ctypes.CDLL) -> None:
    product = Product(3, 20, 64, 256)
    assert (product.run(library, TWO_BITS, GATED, CHOSEN, 1) == product.expected(GATED, 1)).all()


@pytest.mark.parametrize("packing", [TWO_BITS, BASE_THREE])
@pytest.mark.parametrize(("code", "level"), [(2, -128), (2, 127), (0, -128), (0, 127)])
def test_the_largest_sums_do_not_overflow(library: ctypes.CDLL, packing: int, code: int, level: int) -> None:
    tokens, rows, cols = 17, 9, 6912
    product = Product(
        0, tokens, rows, cols, codes=np.full((rows, cols), code), q=np.full((tokens, cols), level)
    )
    got = product.run(library, packing, STORE, CHOSEN)
    assert (got == product.expected(STORE, 0)).all()


def test_activations_beyond_the_columns_count_only_as_zeros(library: ctypes.CDLL) -> None:
    """The columns are filled up with code 1: only zeros there give the right sums, and zeros do."""
    product = Product(5, 18, 16, 1)
    assert (product.run(library, TWO_BITS, STORE, NARROW) == product.expected(STORE, 0)).all()
    assert (product.run(library, BASE_THREE, STORE, WIDE) == product.expected(STORE, 0)).all()


@SLOW
@pytest.mark.parametrize(("rows", "cols"), [(3840, 2560), (2560, 6912)])
def test_products_of_a_model_equal_numpy(library: ctypes.CDLL, rows: int, cols: int) -> None:
    product = Product(7, 70, rows, cols)
    for packing, shape in ((TWO_BITS, MIDDLE), (BASE_THREE, NARROW)):
        assert (product.run(library, packing, STORE, shape) == product.expected(STORE, 0)).all()


class Batch:
    """A KV cache of some slots with their queries, and what NumPy makes of them."""

    def __init__(self, seed: int, form: str, heads: int, kv_heads: int, head_dim: int, room: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.form, self.heads, self.kv_heads, self.head_dim = form, heads, kv_heads, head_dim
        self.room, self.layers, self.layer = up(room, 256), 2, 1
        self.width = up(head_dim, 16)
        angle = self.rng.uniform(-np.pi, np.pi, (self.room, head_dim // 2)).astype(np.float32)
        self.cosine, self.sine = np.cos(angle), np.sin(angle)
        self.caches: list[Cache] = []
        self.slots: list[int] = []
        self.positions: list[int] = []
        self.queries: list[F32] = []
        self.spread = np.float32(1.0)

    def add(self, length: int, tokens: int, large: float = 1.0) -> None:
        """A slot with `length` positions, of which the last `tokens` are asked for."""
        rng, slot = self.rng, len(self.caches)
        cache = new_cache((self.layers, self.kv_heads, self.room, self.head_dim), self.form)
        keys = rng.standard_normal((length, self.kv_heads, self.head_dim)) * large
        values = rng.standard_normal(keys.shape) * rng.uniform(0.1, 3, (length, self.kv_heads, 1))
        append(cache, self.layer, np.arange(length), keys.astype(np.float32), values.astype(np.float32))
        self.caches.append(cache)
        self.slots += [slot] * tokens
        self.positions += range(length - tokens, length)
        self.queries.append(rng.standard_normal((tokens, self.heads, self.head_dim)).astype(np.float32))

    def expected(self) -> F32:
        rows, group = [], self.heads // self.kv_heads
        for slot, cache in enumerate(self.caches):
            own = np.array([p for p, s in zip(self.positions, self.slots, strict=True) if s == slot])
            cosine, sine = self.cosine[own][:, None], self.sine[own][:, None]
            first, second = np.split(self.queries[slot], 2, axis=-1)
            q = np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
            q = q.reshape(len(own), self.kv_heads, group, self.head_dim)
            rows.append(attend(cache, self.layer, own, q).reshape(len(own), -1))
        return np.concatenate(rows)

    def half(self, x: np.ndarray) -> tuple[Bytes, Bytes]:
        """Keys and values [room, width] are laid out by these two: layout.h."""
        wide = np.zeros((self.room, self.width), x.dtype)
        wide[:, : self.head_dim] = x
        each = 8 if self.form == "f16" else 16
        keys = wide.reshape(self.room // 32, 32, self.width // each, each).transpose(0, 2, 1, 3)
        values = wide.reshape(self.room // each, each, self.width).transpose(0, 2, 1)
        return self.packed(keys), self.packed(values)

    def packed(self, elements: np.ndarray) -> Bytes:
        flat = np.ascontiguousarray(elements).reshape(-1)
        if self.form != "rotor3":
            return flat.view(np.uint8)
        size = np.searchsorted(LEVELS, np.abs(flat.astype(np.int32))) % 4
        low = (size.reshape(-1, 16).astype(np.uint64) << 2 * np.arange(16, dtype=np.uint64)).sum(axis=1)
        high = ((flat < 0).reshape(-1, 16).astype(np.uint64) << np.arange(16, dtype=np.uint64)).sum(axis=1)
        return np.concatenate([low.astype(np.uint32).view(np.uint8), high.astype(np.uint16).view(np.uint8)])

    def run(self, library: ctypes.CDLL, status: int = 0) -> F32:
        data, scales = [], []
        for cache in self.caches:
            for layer in range(self.layers):
                for head in range(self.kv_heads):
                    data += [
                        self.half(cache.keys[layer, head])[0],
                        self.half(cache.values[layer, head])[1],
                    ]
                    scales += [cache.key_scales[layer, head], cache.value_scales[layer, head]]
        qkv = np.full((len(self.slots), (self.heads + 2 * self.kv_heads) * self.head_dim), 7, np.float32)
        qkv[:, : self.heads * self.head_dim] = np.concatenate(self.queries).reshape(len(self.slots), -1)
        out = np.full((len(self.slots), self.heads * self.head_dim + 4), np.nan, np.float32)
        kv, said = np.concatenate(data), np.zeros(1, np.uint32)
        ints = [
            qkv.shape[1], len(self.slots), self.layer, self.heads, self.kv_heads, self.head_dim, self.width,
            self.room, self.layers, self.head_dim // 2, out.shape[1], FORMS.index(self.form),
        ]  # fmt: skip
        scale = np.float32(1 / np.sqrt(np.float64(self.head_dim)))
        where = [address(np.array(numbers, np.int32)) for numbers in (self.slots, self.positions)]
        failed = library.driver_attention(
            address(qkv), *where, address(kv), address(np.concatenate(scales)),
            ctypes.c_size_t(len(data[0])), address(self.cosine), address(self.sine),
            ctypes.c_float(float(scale)), address(out), address(said), address(np.array(ints, np.int32)),
        )  # fmt: skip
        assert failed == status, library.driver_message()
        self.said = int(said[0])
        assert np.isnan(out[:, -4:]).all()
        return out[:, :-4]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 1, 128), (3, 3, 64), (3, 1, 64), (8, 1, 32), (2, 1, 256)]
)
def test_attention_equals_numpy(
    library: ctypes.CDLL, form: str, heads: int, kv_heads: int, head_dim: int
) -> None:
    batch = Batch(heads, form, heads, kv_heads, head_dim, 300)
    batch.add(33, 33)
    batch.add(275, 21)  # over the border of a block
    assert (batch.run(library) == batch.expected()).all()


@pytest.mark.parametrize("form", ["f16", "int8"])
@pytest.mark.parametrize("head_dim", [80, 48, 20, 6])
def test_heads_that_fill_no_fragment(library: ctypes.CDLL, form: str, head_dim: int) -> None:
    batch = Batch(head_dim, form, 4, 2, head_dim, 64)
    batch.add(50, 50)
    assert (batch.run(library) == batch.expected()).all()


@pytest.mark.parametrize("form", FORMS)
def test_several_blocks_are_merged_in_order(library: ctypes.CDLL, form: str) -> None:
    batch = Batch(1, form, 2, 1, 64, 800)
    batch.add(790, 17)
    batch.add(513, 3)
    batch.add(1, 1)
    batch.add(256, 2)
    assert (batch.run(library) == batch.expected()).all()


@pytest.mark.parametrize("form", FORMS)
def test_large_scores_and_values(library: ctypes.CDLL, form: str) -> None:
    """One weight is 1 and the others nothing: what is rounded to 15 bits has its extremes."""
    batch = Batch(2, form, 2, 1, 32, 600)
    batch.add(530, 18, large=1e4)
    batch.queries[0] *= np.float32(1e6)
    assert (batch.run(library) == batch.expected()).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0**40])
def test_a_query_out_of_range_is_told(library: ctypes.CDLL, form: str, bad: float) -> None:
    batch = Batch(4, form, 2, 1, 32, 32)
    batch.add(20, 20)
    batch.run(library)
    assert batch.said == 0
    batch.queries[0][11, 1, 31] = bad
    batch.run(library)
    assert batch.said == 1


@pytest.mark.parametrize("form", FORMS)
def test_heads_too_wide_are_an_error(library: ctypes.CDLL, form: str) -> None:
    batch = Batch(0, form, 1, 1, 512, 32)
    batch.add(17, 17)
    batch.run(library, status=UNSUPPORTED)
    assert b"at most 256 elements, not 512" in library.driver_message()


def test_a_batch_is_cut_at_slots_gaps_and_blocks(library: ctypes.CDLL) -> None:
    slots = np.array([0] * 40 + [2] * 5 + [1] * 3 + [1] * 2, np.int32)
    positions = np.array([*range(240, 280), *range(5), *range(700, 703), *range(900, 902)], np.int32)
    out = np.zeros((20, 4), np.int32)
    count = library.driver_plan(address(slots), address(positions), len(slots), 4, address(out), len(out))
    tiles = out[:count].tolist()
    assert tiles == [
        [48, 2, 1, 900], [45, 3, 1, 700], [16, 16, 0, 256], [32, 8, 0, 272], [0, 16, 0, 240], [40, 5, 2, 0]
    ]  # fmt: skip


def test_exp_of_a_hidden_position_is_not_zero() -> None:
    """Why the kernels must choose: the polynomial stays at e^-86 below."""
    assert exp(np.array([-np.inf], np.float32))[0] > 0
