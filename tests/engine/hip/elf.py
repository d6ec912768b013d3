"""Reads what a gfx11 code object says about itself: segments, symbols, notes, kernel descriptors.

Sources: the ELF specification, and LLVM's "User Guide for AMDGPU Backend" (code object version 5: the note
NT_AMDGPU_METADATA, the kernel descriptor `NAME.kd`). Not the disassembly: that is codeobject.py.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

_NOTE_METADATA = 32
_BUNDLE_MAGIC = b"__CLANG_OFFLOAD_BUNDLE__"


class NotACodeObject(ValueError):
    """The bytes are not an ELF for AMD GPUs; the message says what they are."""


@dataclass(frozen=True)
class Descriptor:
    """A kernel descriptor (64 bytes), as the command processor reads it."""

    lds_bytes: int
    private_bytes: int
    kernarg_bytes: int
    entry: int  # virtual address of the first instruction
    rsrc1: int
    rsrc2: int
    properties: int

    @property
    def rounds_to_nearest(self) -> bool:
        return (self.rsrc1 >> 12) & 3 == 0

    @property
    def keeps_denormals(self) -> bool:
        """Whether float32 subnormals are neither read nor written as zero."""
        return (self.rsrc1 >> 16) & 3 == 3

    @property
    def wave32(self) -> bool:
        return bool(self.properties & (1 << 10))


@dataclass(frozen=True)
class CodeObject:
    """A linked AMD GPU ELF in memory."""

    data: bytes

    def __post_init__(self) -> None:
        if self.data[:4] != b"\x7fELF":
            raise NotACodeObject(f"not an ELF: begins with {self.data[:8]!r}")
        (machine,) = struct.unpack_from("<H", self.data, 18)
        if machine != 0xE0:
            raise NotACodeObject(f"an ELF for machine {machine:#x}, not for AMD GPUs (0xe0)")

    @cached_property
    def target(self) -> str:
        """Such as amdgcn-amd-amdhsa--gfx1151."""
        return str(self.metadata["amdhsa.target"])

    @cached_property
    def _sections(self) -> dict[str, tuple[int, ...]]:
        (at,) = struct.unpack_from("<Q", self.data, 0x28)
        size, count, names = struct.unpack_from("<HHH", self.data, 0x3A)
        raw = [struct.unpack_from("<IIQQQQIIQQ", self.data, at + i * size) for i in range(count)]
        return {self._string(raw[names][4] + entry[0]): entry for entry in raw}

    def _string(self, at: int) -> str:
        return self.data[at : self.data.index(b"\0", at)].decode()

    def section(self, name: str) -> tuple[int, bytes]:
        """(virtual address, bytes) of a section."""
        entry = self._sections[name]
        return entry[3], self.data[entry[4] : entry[4] + entry[5]]

    def loads(self) -> list[tuple[int, bytes, int]]:
        """The loadable segments: (virtual address, bytes in the file, size in memory)."""
        (at,) = struct.unpack_from("<Q", self.data, 0x20)
        size, count = struct.unpack_from("<HH", self.data, 0x36)
        headers = [struct.unpack_from("<IIQQQQQQ", self.data, at + i * size) for i in range(count)]
        return [(h[3], self.data[h[2] : h[2] + h[5]], h[6]) for h in headers if h[0] == 1]

    @cached_property
    def symbols(self) -> dict[str, tuple[int, int]]:
        """name -> (virtual address, size) of the dynamic symbols."""
        table, strings = self._sections[".dynsym"], self._sections[".dynstr"]
        found = {}
        for at in range(table[4], table[4] + table[5], 24):
            name, _, _, _, value, size = struct.unpack_from("<IBBHQQ", self.data, at)
            found[self._string(strings[4] + name)] = (value, size)
        return found

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The msgpack map of the note NT_AMDGPU_METADATA."""
        _, note = self.section(".note")
        at = 0
        while at + 12 <= len(note):
            name_size, size, kind = struct.unpack_from("<III", note, at)
            start = at + 12 + -(-name_size // 4) * 4
            if kind == _NOTE_METADATA:
                decoded: dict[str, Any] = msgspec.msgpack.decode(note[start : start + size])
                return decoded
            at = start + -(-size // 4) * 4
        raise NotACodeObject("no note NT_AMDGPU_METADATA")

    @cached_property
    def kernels(self) -> dict[str, dict[str, Any]]:
        """name -> the metadata of that kernel."""
        return {kernel[".name"]: kernel for kernel in self.metadata["amdhsa.kernels"]}

    def descriptor(self, kernel: str) -> Descriptor:
        at, _ = self.symbols[f"{kernel}.kd"]
        raw = next(
            data[at - base : at - base + 64] for base, data, _ in self.loads() if 0 <= at - base < len(data)
        )
        lds, private, kernarg = struct.unpack_from("<III", raw, 0)
        (entry,) = struct.unpack_from("<q", raw, 16)
        rsrc1, rsrc2, properties = struct.unpack_from("<IIH", raw, 48)
        return Descriptor(lds, private, kernarg, at + entry, rsrc1, rsrc2, properties)


def unbundle(data: bytes, target: str) -> bytes:
    """The code object for `target` in a clang offload bundle, in a host library with one, or itself."""
    if data[:4] == b"\x7fELF" and struct.unpack_from("<H", data, 18)[0] == 0xE0:
        return data
    start = data.find(_BUNDLE_MAGIC)
    if start < 0:
        raise NotACodeObject("neither a code object nor anything with an offload bundle in it")
    at = start + len(_BUNDLE_MAGIC)
    (count,) = struct.unpack_from("<Q", data, at)
    at += 8
    found = []
    for _ in range(count):
        offset, size, name_size = struct.unpack_from("<QQQ", data, at)
        name = data[at + 24 : at + 24 + name_size].decode()
        at += 24 + name_size
        found.append(name)
        if name.startswith("hip") and name.split("--")[-1].split(":")[0] == target:
            return data[start + offset : start + offset + size]
    raise NotACodeObject(f"nothing for {target}; the bundle holds {', '.join(found)}")
