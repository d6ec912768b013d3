"""The NumPy model of gfx11's matrix instruction: where each element lies, and that the products are right."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine.hip import fragments


def _operands(seed: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    a = rng.integers(-128, 128, (16, 16)).astype(np.int8)
    b = rng.integers(low, high, (16, 16)).astype(np.int8 if low < 0 else np.uint8)
    return a, b, rng.integers(-(2**30), 2**30, (16, 16)).astype(np.int32)


def _product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    registers = fragments.wmma(
        fragments.pack_operand(a), fragments.pack_operand(b.T.copy()), fragments.pack_accumulator(c),
        signed_a=a.dtype == np.int8, signed_b=b.dtype == np.int8,
    )  # fmt: skip
    return fragments.unpack_accumulator(registers)


@pytest.mark.parametrize(("low", "high"), [(-128, 128), (0, 256), (0, 3)], ids=["int8", "uint8", "codes"])
def test_product_through_the_fragments_is_numpys(low: int, high: int) -> None:
    a, b, c = _operands(1, low, high)
    assert (_product(a, b, c) == a.astype(np.int32) @ b.astype(np.int32) + c).all()


def test_a_product_of_many_tiles_is_numpys() -> None:
    """48 x 80 by 80 x 32, accumulated tile by tile, as a prefill kernel does it."""
    rng = np.random.default_rng(2)
    a = rng.integers(-128, 128, (48, 80)).astype(np.int8)
    b = rng.integers(-1, 2, (80, 32)).astype(np.int8)
    out = np.zeros((48, 32), np.int32)
    for row in range(0, 48, 16):
        for col in range(0, 32, 16):
            tile = np.zeros((16, 16), np.int32)
            for k in range(0, 80, 16):
                tile = _product(
                    a[row : row + 16, k : k + 16].copy(), b[k : k + 16, col : col + 16].copy(), tile
                )
            out[row : row + 16, col : col + 16] = tile
    assert (out == a.astype(np.int32) @ b.astype(np.int32)).all()


def test_every_element_has_its_place() -> None:
    """AMD's statement, spelt out for single elements."""
    a = np.zeros((16, 16), np.int8)
    a[5, 14] = 77  # row 5, column 14: lanes 5 and 21, register 14 // 4, byte 14 % 4
    packed = fragments.pack_operand(a)
    assert {(int(v), int(lane)) for v, lane in np.argwhere(packed)} == {(3, 5), (3, 21)}
    assert packed[3, 5] == 77 << 16
    c = np.zeros((16, 16), np.int32)
    c[7, 9] = 1  # an odd row lies in the upper half-wave
    assert np.argwhere(fragments.pack_accumulator(c)).tolist() == [[3, 25]]
    c[7, 9], c[6, 9] = 0, 1
    assert np.argwhere(fragments.pack_accumulator(c)).tolist() == [[3, 9]]


def test_half_waves_that_differ_are_refused() -> None:
    """A kernel that fills 16 lanes alone would work in a model that reads but those, and not on the card."""
    a, b, c = _operands(3, -128, 128)
    registers = fragments.pack_operand(a)
    registers[2, 20] ^= 1
    with pytest.raises(fragments.BadFragment, match="do not repeat"):
        fragments.wmma(
            registers, fragments.pack_operand(b), fragments.pack_accumulator(c), signed_a=True, signed_b=True
        )


def test_an_operand_of_another_shape_is_refused() -> None:
    with pytest.raises(fragments.BadFragment, match="16 x 16 bytes"):
        fragments.pack_operand(np.zeros((16, 16), np.int32))
