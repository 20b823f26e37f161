# SPDX-License-Identifier: MIT
"""Adapters of embedding tables on the CPU: look up rows of B, and replace rows of the model's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit, types

from candle_vllm.core.kernels.cpu_runtime.primitives import (
    float32_at,
    float_from_bits,
    int64_at,
    pointers,
    read,
    step_number,
)
from candle_vllm.core.kernels.lora.layout import (
    BLOCK_BYTES,
    COUNT,
    HEAD,
    IDS,
    NEW,
    RANK,
    ExpandArguments,
    NumberForm,
    ShrinkArguments,
)

_uint16_at = pointers(types.uint16, "uint16")


def _reader(form: int) -> Any:
    """Return a function (address, index) that reads an element as a float."""

    @njit
    def number_at(address, index):
        if form == 0:
            return float_from_bits(types.int64(_uint16_at(address)[index]) << 16)
        return float32_at(address)[index]

    return number_at


def make_lookup(FORM: int) -> Callable[..., None]:
    """Return the operation that writes each entry's row of B as sums, where `shrink` would write them."""
    ITEM = NumberForm(FORM).bytes
    number_at = _reader(FORM)

    def lookup(row, thread, threads):
        given = read(ShrinkArguments, row)
        starts, tables = int64_at(given.starts), int64_at(given.tables)
        for group in range(step_number(row, given.groups_from)):
            about = int64_at(tables[group])[given.place]
            if about == 0:
                continue
            begin, count = starts[group], starts[group + 1] - starts[group]
            ranks, rank = int64_at(about)[1], int64_at(about + 8 * HEAD)[RANK]
            blocks = (ranks >> 4) + (ranks >> 3 & 1) + (ranks >> 2 & 1)
            for entry in range(count * thread // threads, count * (thread + 1) // threads):
                token = int64_at(given.x)[int64_at(given.rows)[begin + entry]]
                target = float32_at(given.h + begin * given.h_bytes + entry * blocks * BLOCK_BYTES)
                for place in range(blocks * BLOCK_BYTES >> 2):
                    target[place] = 0.0
                source = int64_at(about)[0] + token * rank * ITEM
                for number in range(rank):
                    value = number_at(source, number)
                    block, lane, share = number >> 4, number & 15, 1
                    if block == ranks >> 4:  # the last block may have 8 or 4 ranks
                        if ranks & 8 and lane < 8:
                            share = 2
                        else:
                            block += 1 if ranks & 8 else 0
                            lane &= 3
                            share = 4
                    target[block * 64 + lane * share] = value

    return lookup


@njit
def _first_from(ids: Any, count: int, least: int) -> int:
    """Return the index of the first of `count` sorted ids that is at least `least`."""
    low, high = 0, count
    while low < high:
        middle = (low + high) >> 1
        if ids[middle] < least:
            low = middle + 1
        else:
            high = middle
    return low


@njit
def _replace_row(given, part, at, first, last, scale):
    token = int64_at(given.numbers)[at]
    count, place = int64_at(part)[COUNT], token
    if int64_at(part)[IDS] != 0:
        ids = int64_at(int64_at(part)[IDS])
        place = _first_from(ids, count, token)
        if place == count or ids[place] != token:
            return
    new = float32_at(int64_at(part)[NEW] + 4 * place * given.columns)
    out, base = float32_at(given.out + at * given.row_bytes), float32_at(given.base + at * given.base_bytes)
    for column in range(first, last):
        out[column] += scale * (new[column] - base[column])


@njit
def _replace_products(given, part, at, first, last, scale):
    ids, count = int64_at(int64_at(part)[IDS]), int64_at(part)[COUNT]
    width = given.x_bytes >> 2
    out, base = float32_at(given.out + at * given.row_bytes), float32_at(given.base + at * given.base_bytes)
    x = given.x + at * given.x_bytes
    columns = given.inputs
    for place in range(_first_from(ids, count, first), _first_from(ids, count, last)):
        new = float32_at(int64_at(part)[NEW] + 4 * place * columns)
        total = 0.0
        for column in range(min(columns, width)):
            total += float32_at(x)[column] * new[column]
        out[ids[place]] += scale * (total - base[ids[place]])


def replace(row, thread, threads):
    """Replace the model's rows of a table, or products with these rows, by those of an adapter."""
    given = read(ExpandArguments, row)
    first, last = given.columns * thread // threads, given.columns * (thread + 1) // threads
    starts, tables = int64_at(given.starts), int64_at(given.tables)
    for group in range(step_number(row, given.groups_from)):
        about = int64_at(tables[group])[given.place]
        if about == 0 or int64_at(about + 8 * HEAD)[COUNT] == 0:
            continue
        for entry in range(starts[group], starts[group + 1]):
            at, scale = int64_at(given.rows)[entry], float32_at(given.scales)[entry]
            if given.numbers != 0:
                _replace_row(given, about + 8 * HEAD, at, first, last, scale)
            else:
                _replace_products(given, about + 8 * HEAD, at, first, last, scale)
