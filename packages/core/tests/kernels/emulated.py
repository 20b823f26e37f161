# SPDX-License-Identifier: MIT
"""Compiled kernels run by QEMU, as on a processor that this machine is not: an ARM64, or an x86-64 with less.

The program that QEMU runs is written here: it maps memory that it shares with Python at a place of its own, and calls
functions in it as Python asks. It needs no C library; what kernels call of one (`memset` and the like) is here too.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import binding

from candle_vllm.core.kernels.cpu_runtime import machine_code
from candle_vllm.core.kernels.cpu_runtime.compiler import compile_function, target_machine
from candle_vllm.core.kernels.cpu_runtime.level import Level
from candle_vllm.core.kernels.cpu_runtime.operation import address_of

BYTES = 64 << 20
PLACE = 0x10_0000_0000  # of the shared memory, for the program: where QEMU puts nothing
_BASE = 0x40_0000  # of the program itself
_HEAD = 0x1000

_MAIN = f"""
declare i64 @system(i64, i64, i64, i64, i64, i64, i64)

define void @candle_entry() {{
  %order = alloca [4 x i64], align 16
  %at = ptrtoint ptr %order to i64
  call i64 @system(i64 MMAP, i64 {PLACE}, i64 {BYTES}, i64 7, i64 17, i64 FILE, i64 0)
  br label %wait
wait:
  %got = call i64 @system(i64 READ, i64 0, i64 %at, i64 32, i64 0, i64 0, i64 0)
  %whole = icmp eq i64 %got, 32
  br i1 %whole, label %work, label %end
work:
  %function = load volatile i64, ptr %order
  %p1 = getelementptr i64, ptr %order, i64 1
  %p2 = getelementptr i64, ptr %order, i64 2
  %p3 = getelementptr i64, ptr %order, i64 3
  %a1 = load volatile i64, ptr %p1
  %a2 = load volatile i64, ptr %p2
  %a3 = load volatile i64, ptr %p3
  %callee = inttoptr i64 %function to ptr
  call void %callee(i64 %a1, i64 %a2, i64 %a3)
  call i64 @system(i64 WRITE, i64 1, i64 %at, i64 8, i64 0, i64 0, i64 0)
  br label %wait
end:
  call i64 @system(i64 EXIT, i64 0, i64 0, i64 0, i64 0, i64 0, i64 0)
  unreachable
}}
"""
# Loops over volatile bytes, so that LLVM makes no calls of them to what they are.
_FILL = """
define i64 @candle_entry(i64 %to, i32 %value, i64 %count) {
  %byte = trunc i32 %value to i8
  br label %head
head:
  %i = phi i64 [0, %0], [%next, %body]
  %more = icmp ult i64 %i, %count
  br i1 %more, label %body, label %end
body:
  %at = add i64 %to, %i
  %p = inttoptr i64 %at to ptr
  store volatile i8 %byte, ptr %p
  %next = add i64 %i, 1
  br label %head
end:
  ret i64 %to
}
"""
_COPY = """
define i64 @candle_entry(i64 %to, i64 %from, i64 %count) {
  br label %head
head:
  %i = phi i64 [0, %0], [%next, %body]
  %more = icmp ult i64 %i, %count
  br i1 %more, label %body, label %end
body:
  %source = add i64 %from, %i
  %target = add i64 %to, %i
  %p = inttoptr i64 %source to ptr
  %q = inttoptr i64 %target to ptr
  %byte = load volatile i8, ptr %p
  store volatile i8 %byte, ptr %q
  %next = add i64 %i, 1
  br label %head
end:
  ret i64 %to
}
"""
_CALLS = {"x86_64": (9, 0, 1, 60), "aarch64": (222, 63, 64, 93)}  # mmap, read, write, exit
# system(number, six arguments) in the registers that Linux wants; on x86-64 the last stands on the stack.
_SYSTEM = {
    "x86_64": bytes.fromhex("4889f84889f74889d64889ca4d89c24d89c84c8b4c24080f05c3"),
    "aarch64": struct.pack(
        "<9I", 0xAA0003E8, *(0xAA0003E0 | (n + 1) << 16 | n for n in range(6)), 0xD4000001, 0xD65F03C0
    ),
}
_MACHINES = {"x86_64": 62, "aarch64": 183}


def emulator(level: Level) -> str | None:
    """The program that runs a level's machine code, where it is installed."""
    return shutil.which(f"qemu-{level.machine}") or shutil.which(f"qemu-{level.machine}-static")


class Emulated:
    """A processor with memory that Python sees.

    Args:
        level: what code is made for.
        cpu: what QEMU calls the processor.
    """

    def __init__(self, level: Level, cpu: str) -> None:
        self.level = level
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self._file.truncate(BYTES)
        self.memory = np.frombuffer(mmap.mmap(self._file.fileno(), BYTES), np.uint8)
        self._used = 0
        self._helpers: dict[str, int] = {}
        self._folder = tempfile.TemporaryDirectory()
        program = Path(self._folder.name) / "program"
        program.write_bytes(_program(level, self._file.fileno()))
        program.chmod(0o700)
        found = emulator(level)
        assert found is not None
        self._process = subprocess.Popen(
            [found, "-cpu", cpu, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[self._file.fileno()],
        )

    def close(self) -> None:
        """Ends the program."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait(30)
        self._file.close()
        self._folder.cleanup()

    def array(self, given: Any) -> np.ndarray:
        """A copy that the processor sees too."""
        values = np.ascontiguousarray(given)
        size = max(values.nbytes, 1)
        start = -(-self._used // 64) * 64
        self._used = start + size
        assert self._used <= BYTES
        view = self.memory[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
        view[...] = values
        return view

    def place(self, array: np.ndarray) -> int:
        """Where the processor finds it."""
        return PLACE + address_of(array) - address_of(self.memory)

    def load(self, function: Callable[..., None]) -> int:
        """A function, compiled for the level, as the processor finds it."""
        return self._load_image(machine_code.link(compile_function(function, self.level)))

    def _load_image(self, image: machine_code.Image) -> int:
        self._used = -(-self._used // 4096) * 4096
        code = bytearray(image.code)
        for name, slot in image.slots.items():
            struct.pack_into("<Q", code, slot, self._helper(name))
        self._used = -(-self._used // 4096) * 4096
        return self.place(self.array(np.frombuffer(bytes(code), np.uint8))) + image.entry

    def _helper(self, name: str) -> int:
        if name not in self._helpers:
            source = {"memset": _FILL, "memcpy": _COPY}[name]
            self._helpers[name] = self._load_image(_linked(source, self.level))
        return self._helpers[name]

    def call(self, function: int, *numbers: int) -> None:
        """Calls a function of up to three numbers, and waits for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(struct.pack("<4q", function, *(*numbers, 0, 0, 0)[:3]))
        self._process.stdin.flush()
        answered = self._process.stdout.read(8)
        if len(answered) != 8:
            raise RuntimeError(f"the emulated {self.level.name} ended: status {self._process.wait(30)}")


@cache
def _linked(source: str, level: Level) -> machine_code.Image:
    described = target_machine(level)
    head = f'target datalayout = "{described.target_data}"\ntarget triple = "{described.triple}"\n'
    return machine_code.link(described.emit_object(binding.parse_assembly(head + source)))


def _program(level: Level, file: int) -> bytes:
    """An ELF executable: its head, what begins it and calls the system, and the image behind them, a page for each."""
    source = _MAIN
    for name, number in zip(("MMAP", "READ", "WRITE", "EXIT", "FILE"), (*_CALLS[level.machine], file)):
        source = source.replace(name, str(number))
    image = _linked(source, level)
    code = bytearray(image.code)
    struct.pack_into("<Q", code, image.slots["system"], _BASE + _HEAD + 64)
    distance = 0x1000 + image.entry
    if level.machine == "x86_64":
        begin = b"\xe8" + struct.pack("<i", distance - 5)  # call
    else:
        begin = struct.pack("<I", 0x94000000 | distance >> 2)  # bl
    page = begin.ljust(64, b"\0") + _SYSTEM[level.machine]
    body = page.ljust(0x1000, b"\0") + code
    start, size = _BASE + _HEAD, _HEAD + len(body)
    kind = (2, _MACHINES[level.machine], 1)
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", *kind, start, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 7, 0, _BASE, _BASE, size, size, 0x1000)
    return (head + segment).ljust(_HEAD, b"\0") + body
