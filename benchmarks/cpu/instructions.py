# SPDX-License-Identifier: MIT
"""Instructions per weight of the CPU's linear layers, for each level and type: a table, counted in the assembly.

    python benchmarks/cpu/instructions.py [--kinds Q4_0 Q4_K BF16] [--levels avx2 neon] [--rows 1 8]

For processors that are not at hand, where time means nothing. The kernel that multiplies a tile is compiled for a
level, and the instructions of its innermost loops are counted: they are what runs for each group of a row's weights.
Divided by their products, of a weight and an activation each. A load in an instruction counts with it. Where registers
are short, eight rows and more are multiplied after a tile was unpacked and before its sums are scaled, in loops of
their own: of quantised types the loop of products alone is counted there.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from candle_vllm.core.kernels.cpu_runtime.compiler import assembly
from candle_vllm.core.kernels.cpu_runtime.level import LEVELS, Level
from candle_vllm.core.kernels.packed_linear import PackedKind
from candle_vllm.core.kernels.packed_linear import cpu as packed
from candle_vllm.core.kernels.packed_linear.cpu_panel import blocks
from candle_vllm.core.kernels.packed_linear.layout import LAYOUTS
from candle_vllm.core.kernels.plain_linear import PlainKind
from candle_vllm.core.kernels.plain_linear import cpu as plain

KINDS = ("Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "BF16")
_JUMP = re.compile(r"\s+(?:j\w+|b(?:\.\w+)?|cbn?z\s+\w+,|tbn?z\s+\w+, #\d+,)\s+(\.?L\w+)")
_BYTES = (("vpdpbusd|vpmaddubsw|sdot", 1), ("smmla", 2), ("smull2?|smlal2?", 0.5))
_BF16 = (("vdpbf16ps|bfdot", 0.5), (r"vfmadd\w+|fmla", 0.25))
"""Instructions by name, and their products for each byte of a register."""
_LABEL = re.compile(r"(\.?L\w+):")


def loops(text: str) -> list[list[str]]:
    """The instructions of each innermost loop: from a label to a jump back to it, with no such pair in between."""
    lines = [line for line in text.splitlines() if re.match(r"\s+[a-z{]", line) or _LABEL.match(line)]
    at = {found[1]: number for number, line in enumerate(lines) if (found := _LABEL.match(line))}
    spans = [
        (at[found[1]], number)
        for number, line in enumerate(lines)
        if (found := _JUMP.match(line)) and at.get(found[1], number) < number
    ]
    inner = [span for span in spans if not any(span != o and span[0] <= o[0] and o[1] <= span[1] for o in spans)]
    return [[line for line in lines[first : last + 1] if not _LABEL.match(line)] for first, last in inner]


def products(line: str, *, plain: bool) -> float:
    """Weights times activations in one instruction."""
    size = 64 if "zmm" in line else 32 if "ymm" in line else 16
    for names, share in _BF16 if plain else _BYTES:
        if re.match(rf"\s+(?:\{{vex\}}\s+)?(?:{names})\b", line):
            return share * size
    return 0


def per_weight(kind: str, level: Level, rows: int) -> float:
    """Instructions for each weight and row of activations: however often the compiler repeats a loop's body."""
    plain = kind not in PackedKind.__members__
    if plain:
        tiles = 2 if level.isa.wide and rows == 8 else 1
        text = assembly(_plain(int(PlainKind[kind]), rows, tiles, int(level.isa)), level)
    else:
        text = assembly(_packed(int(PackedKind[kind]), rows, level), level)
    found = [[sum(products(line, plain=plain) for line in loop), len(loop)] for loop in loops(text)]
    if not plain and rows > blocks(level.isa, LAYOUTS[PackedKind[kind]])[0]:
        found = [loop for loop in found if loop[0]]
    made, lines = (sum(each) for each in zip(*found))
    return lines / made


def _packed(KIND: int, rows: int, level: Level) -> Any:
    ISA, BLOCK = int(level.isa), min(rows, blocks(level.isa, LAYOUTS[PackedKind(KIND)])[0])
    multiply, PANELS = packed.multiply, rows // BLOCK

    def kernel(weights: int, panel: int, out: int, groups: int, ahead: int, scratch: int) -> None:
        multiply(KIND, ISA, BLOCK, weights, panel, PANELS, out, groups, ahead, scratch)

    return kernel


def _plain(KIND: int, BLOCK: int, TILES: int, ISA: int) -> Any:
    multiply = plain._multiply

    def kernel(weights: int, tile_bytes: int, panel: int, out: int, runs: int) -> None:
        multiply(KIND, ISA, 0, BLOCK, TILES, weights, tile_bytes, panel, out, runs, 0)

    return kernel


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=KINDS, metavar="TYPE", help="types of weights")
    parser.add_argument("--levels", nargs="+", default=[level.name for level in LEVELS], metavar="LEVEL")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8], choices=(1, 4, 8), help="rows of activations")
    options = parser.parse_args()
    print("| level | rows |", " | ".join(options.kinds), "|")
    print("|---|---|" + "---|" * len(options.kinds))
    for level in LEVELS:
        for rows in options.rows if level.name in options.levels else ():
            found = (f"{per_weight(kind, level, rows):.3f}" for kind in options.kinds)
            print(f"| `{level.name}` | {rows} |", " | ".join(found), "|", flush=True)


if __name__ == "__main__":
    main()
