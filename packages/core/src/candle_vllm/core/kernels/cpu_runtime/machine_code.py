# SPDX-License-Identifier: MIT
"""Linking and loading of machine code on Linux without LLVM (x86-64, ARM64): from an object file to an image.

An **image** is linked code and constants that can be mapped at any page. Calls to the C library go through 8-byte
**slots** at the image's end, which are filled when the image is loaded. Sources: the System V ABI's ELF-64 object
files, its AMD64 supplement, and ELF for the Arm 64-bit Architecture (AAELF64).
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import struct
import sys
from functools import cache
from typing import NamedTuple

from candle_vllm.core.kernels.cpu_runtime.level import machine

ENTRY = "candle_entry"
"""Symbol of an object file's entry function."""

_PROGBITS, _SYMTAB, _RELA = 1, 2, 4
_WRITABLE = 1
_X86, _ARM = 62, 183  # machine numbers of ELF
_STUB_BYTES, _SLOT_BYTES, _PAGE = 16, 8, 4096

# Kinds of relocations. x86-64: distance to a symbol, or to an external function. ARM64: distance of a call or jump,
# counted in instructions; distance to an address's page, in pages; offset in this page, in units of the access size.
_PC32, _PLT32 = 2, 4
_JUMP26, _CALL26, _PAGE21 = 282, 283, 275
_PLACES = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4}
_CALLS = {_X86: (_PLT32,), _ARM: (_JUMP26, _CALL26)}


class Image(NamedTuple):
    """Position-independent code.

    Attributes:
        entry: offset of the entry function.
        slots: offset of the slot of each function of the C library, by the function's name.
    """

    code: bytes
    entry: int
    slots: dict[str, int]


class _Section(NamedTuple):
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int


class LinkError(ValueError):
    """An object file cannot be linked, or the C library lacks a function of an image."""


# ---- from an object file to an image ---------------------------------------------------------------------------------


def link(made: bytes) -> Image:
    """Link an object file of LLVM, position-independent code of the small code model, to an image.

    Raises:
        LinkError: the file is no x86-64 or ARM64 object, needs writable memory, or has an unsupported relocation.
    """
    kind_of_cpu, sections = _sections(made)
    symbols = _symbols(made, sections)
    entry = next(symbol for symbol in symbols if symbol[0] == ENTRY)
    relocations = {part.info: _relocations(made, part) for part in sections if part.kind == _RELA}
    code, starts = bytearray(), dict[int, int]()
    wanted = [entry[1]]
    for number in wanted:  # the list grows in the loop: sections that the code refers to, directly or indirectly
        section = sections[number] if number < len(sections) else None  # higher numbers are reserved by ELF
        if section is None or section.kind != _PROGBITS or section.flags & _WRITABLE:
            raise LinkError("the code needs writable memory, as raising a Python error does (range() with step 0)")
        code += bytes(-len(code) % max(section.align, 1))
        starts[number] = len(code)
        code += made[section.offset : section.offset + section.size]
        named = (symbols[symbol][1] for _, _, symbol, _ in relocations.get(number, ()))
        wanted += [other for other in dict.fromkeys(named) if other and other not in wanted]
    code += bytes(-len(code) % _STUB_BYTES)
    patches = [
        (start + at, kind, symbol, addend)
        for number, start in starts.items()
        for at, kind, symbol, addend in relocations.get(number, ())
    ]
    outside = sorted({symbols[number][0] for _, _, number, _ in patches if symbols[number][1] == 0})
    stubs = {name: len(code) + place * _STUB_BYTES for place, name in enumerate(outside)}
    slots = {name: len(code) + len(outside) * _STUB_BYTES + place * _SLOT_BYTES for place, name in enumerate(outside)}
    for name in outside:
        code += _stub(kind_of_cpu, slots[name] - stubs[name])
    code += bytes(_SLOT_BYTES * len(outside))
    for at, kind, number, addend in patches:
        name, section, value = symbols[number]
        target = (starts[section] + value if section else stubs[name]) + addend
        if (section == 0 and kind not in _CALLS[kind_of_cpu]) or not _patch(kind_of_cpu, code, at, kind, target):
            raise LinkError(f"unsupported relocation {kind} to {name!r}")
    return Image(bytes(code), starts[entry[1]] + entry[2], slots)


def _stub(machine: int, distance: int) -> bytes:
    """Return a jump to the address in a slot; `distance` is the distance from the jump to the slot."""
    if machine == _X86:
        return (b"\xff\x25" + struct.pack("<i", distance - 6)).ljust(_STUB_BYTES, b"\xcc")  # jmp *distance(%rip)
    return struct.pack("<II8x", 0x58000010 | distance >> 2 << 5, 0xD61F0200)  # ldr x16, distance; br x16


def _patch(machine: int, code: bytearray, at: int, kind: int, target: int) -> bool:
    """Write the distance or offset of `target` for a relocation at `at`; return whether its kind is supported."""
    if machine == _X86:
        if kind in (_PC32, _PLT32):
            struct.pack_into("<i", code, at, target - at)
        return kind in (_PC32, _PLT32)
    (word,) = struct.unpack_from("<I", code, at)
    if kind in (_JUMP26, _CALL26):
        word |= target - at >> 2 & 0x3FFFFFF
    elif kind == _PAGE21:
        pages = target // _PAGE - at // _PAGE
        word |= (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
    elif kind in _PLACES:
        word |= (target % _PAGE >> _PLACES[kind]) << 10
    else:
        return False
    struct.pack_into("<I", code, at, word)
    return True


def _sections(made: bytes) -> tuple[int, list[_Section]]:
    """Return the machine that a file is for, and its sections."""
    kind, machine = struct.unpack_from("<HH", made, 16) if len(made) >= 64 else (0, 0)
    if made[:6] != b"\x7fELF\x02\x01" or kind != 1 or machine not in (_X86, _ARM):
        raise LinkError("not an object file of x86-64 or ARM64")
    at, (size, count) = struct.unpack_from("<Q", made, 40)[0], struct.unpack_from("<HH", made, 58)
    found = (struct.unpack_from("<IIQQQQIIQQ", made, at + number * size) for number in range(count))
    return machine, [_Section(s[1], s[2], s[4], s[5], s[6], s[7], s[8]) for s in found]


def _symbols(made: bytes, sections: list[_Section]) -> list[tuple[str, int, int]]:
    """Return name, number of the section (0: external) and offset in it of every symbol."""
    (table,) = (section for section in sections if section.kind == _SYMTAB)
    names = sections[table.link].offset
    found = []
    for at in range(table.offset, table.offset + table.size, 24):
        name, _, _, section, value, _ = struct.unpack_from("<IBBHQQ", made, at)
        end = made.index(b"\0", names + name)
        found.append((made[names + name : end].decode(), section, value))
    return found


def _relocations(made: bytes, section: _Section) -> list[tuple[int, int, int, int]]:
    """Return offset, kind, number of the symbol and addend of every relocation."""
    found = (struct.unpack_from("<QQq", made, at) for at in range(section.offset, section.offset + section.size, 24))
    return [(at, info & 0xFFFFFFFF, info >> 32, addend) for at, info, addend in found]


# ---- from an image to an address -------------------------------------------------------------------------------------


def load(image: Image) -> int:
    """Map an image for the life of the process; return the address of its entry function.

    Raises:
        OSError: the system provides no executable memory.
        LinkError: the C library lacks a function of the image.
    """
    assert sys.platform == "linux"
    code = bytearray(image.code)
    for name, slot in image.slots.items():
        struct.pack_into("<Q", code, slot, _function_address(name))
    if machine() == "aarch64":
        return _map_file(bytes(code)) + image.entry
    libc, size = ctypes.CDLL(None, use_errno=True), ctypes.c_size_t(len(code))
    at = _mapped(libc, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    ctypes.memmove(at, bytes(code), len(code))
    if libc.mprotect(ctypes.c_void_p(at), size, mmap.PROT_READ | mmap.PROT_EXEC) != 0:
        raise OSError(ctypes.get_errno(), "the system forbids executing memory that was written")
    return at + image.entry


def _map_file(code: bytes) -> int:
    """Map code from a file in memory, because the system keeps the instruction cache coherent for pages of a file."""
    assert sys.platform == "linux"
    file = os.memfd_create("kernel")
    try:
        with open(file, "wb", closefd=False) as written:
            written.write(code)
        libc, size = ctypes.CDLL(None, use_errno=True), ctypes.c_size_t(len(code))
        return _mapped(libc, size, mmap.PROT_READ | mmap.PROT_EXEC, mmap.MAP_PRIVATE, file)
    finally:
        os.close(file)


def _mapped(libc: ctypes.CDLL, size: ctypes.c_size_t, protection: int, flags: int, file: int) -> int:
    libc.mmap.restype = ctypes.c_void_p
    at = libc.mmap(None, size, protection, flags, file, ctypes.c_size_t(0))
    if at is None or at == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "no memory for machine code")
    return at


@cache
def _function_address(name: str) -> int:
    for library in (None, "libm.so.6"):  # on most systems, Python itself is linked with both
        try:
            return ctypes.cast(getattr(ctypes.CDLL(library), name), ctypes.c_void_p).value or 0
        except (AttributeError, OSError):
            continue
    raise LinkError(f"the C library has no function {name!r}")


# ---- bytes -----------------------------------------------------------------------------------------------------------


def to_bytes(image: Image) -> bytes:
    """Serialise an image for `from_bytes`."""
    head = json.dumps({"entry": image.entry, "slots": image.slots}).encode()
    return struct.pack("<Q", len(head)) + head + image.code


def from_bytes(kept: bytes) -> Image:
    """Restore an image from the bytes of `to_bytes`; callers must check their integrity first."""
    (size,) = struct.unpack_from("<Q", kept)
    head = json.loads(kept[8 : 8 + size])
    return Image(kept[8 + size :], head["entry"], head["slots"])
