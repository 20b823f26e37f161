# SPDX-License-Identifier: MIT
"""Lines from chunks, however these are cut, and never more of a long one than its ends."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from candle_vllm.responses.mcp.stdio import LineSplitter, OversizedLine

LIMIT = 20


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, *(place % (len(data) + 1) for place in cuts), len(data)})
    return [data[start:end] for start, end in pairwise(places)]


@given(
    st.lists(st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"")), max_size=8), st.lists(st.integers(0))
)
def test_any_cut_gives_the_same_lines(lines: list[bytes], cuts: list[int]) -> None:
    splitter = LineSplitter(LIMIT)
    data = b"".join(line + b"\n" for line in lines) + b"rest"
    found = [line for chunk in cut(data, cuts) for line in splitter.feed(chunk)]
    ends = [OversizedLine(line[:256], line[-256:], len(line)) for line in lines]
    assert found == [line if len(line) <= LIMIT else end for line, end in zip(lines, ends)]
    assert splitter.pending == 4


def test_the_ends_of_a_very_long_line() -> None:
    splitter = LineSplitter(LIMIT)
    for _ in range(1000):
        assert list(splitter.feed(b"x" * 100)) == []
    assert splitter.pending == 100_000
    (line,) = splitter.feed(b"the end\nnext")
    assert isinstance(line, OversizedLine)
    assert (line.size, len(line.head), len(line.tail)) == (100_007, 256, 256)
    assert line.tail.endswith(b"xxthe end")
    assert list(splitter.feed(b"\n")) == [b"next"]
