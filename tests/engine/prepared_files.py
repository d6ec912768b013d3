"""Prepared files that lie: any change, with checksums that fit it. For tests of what believes them."""

from __future__ import annotations

import struct
import zlib

PAGE, ENTRY, PIECE = 4096, 128, 1 << 20
HEADER = 92  # bytes before the header's own CRC


def sealed(data: bytearray) -> bytearray:
    """The same bytes with checksums of directory and header that fit: a lie, rather than damage."""
    (count,) = struct.unpack_from("<I", data, 12)
    directory = bytes(data[PAGE : PAGE + ENTRY * min(count, 4096)])
    struct.pack_into("<I", data, 32, zlib.crc32(directory))
    struct.pack_into("<I", data, HEADER, zlib.crc32(bytes(data[:HEADER])))
    return data


def resealed(data: bytearray) -> bytearray:
    """As `sealed`, with the tensors' own checksums made anew too."""
    (count,) = struct.unpack_from("<I", data, 12)
    for place in range(PAGE, PAGE + ENTRY * count, ENTRY):
        offset, size = struct.unpack_from("<QQ", data, place + 64)
        pieces = [data[at : min(at + PIECE, offset + size)] for at in range(offset, offset + size, PIECE)]
        checks = b"".join(struct.pack("<I", zlib.crc32(piece)) for piece in pieces)
        struct.pack_into("<I", data, place + 112, zlib.crc32(checks))
    return sealed(data)
