"""Seeded mutation of inputs, for the default test run. Not guided by coverage: that is __main__.py."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence

_NUMBERS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 32767, 65535, 65536, 1 << 31, (1 << 31) - 1, (1 << 32) - 1)
_LONG = (1 << 63, (1 << 63) - 1, (1 << 64) - 1, 1 << 40, 1 << 32)


def mutated(rng: random.Random, pool: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """One input of the pool, changed at one to a few places."""
    data = bytearray(rng.choice(pool))
    for _ in range(rng.choice((1, 1, 2, 4))):
        _change(rng, data, pool, words)
    return bytes(data)


def _change(rng: random.Random, data: bytearray, pool: Sequence[bytes], words: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((1, 2, 4, 8, 32, 200)))
    match rng.randrange(8):
        case 0 if at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        case 1 if at < len(data):
            data[at] = rng.randrange(256)
        case 2:
            del data[at:end]
        case 3:
            data[at:at] = data[at:end] * rng.choice((1, 2, 50))
        case 4:
            number = struct.pack("<I", rng.choice(_NUMBERS)) if rng.random() < 0.7 else _long(rng)
            data[at : at + len(number)] = number
        case 5 if words:
            data[at : rng.choice((at, end))] = rng.choice(words)
        case 6:
            other = rng.choice(pool)
            start = rng.randrange(len(other) + 1)
            data[at:end] = other[start : start + rng.choice((4, 32, 200))]
        case _:
            data[at:end] = str(rng.choice((*_NUMBERS, -1, *_LONG))).encode()


def _long(rng: random.Random) -> bytes:
    return struct.pack("<Q", rng.choice(_LONG))


def mutations(seed: int, pool: Sequence[bytes], words: Sequence[bytes]) -> Iterator[bytes]:
    """Changed inputs without an end, the same for the same seed and pool."""
    rng = random.Random(seed)
    while True:
        yield mutated(rng, pool, words)
