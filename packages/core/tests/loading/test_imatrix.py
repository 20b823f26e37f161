# SPDX-License-Identifier: MIT
"""Importance matrices in both formats, and what is no such file."""

from __future__ import annotations

import contextlib
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from candle_vllm.core import InvalidFileError, ModelNotFoundError, WeightsError
from candle_vllm.core.loading.imatrix import LEAST, read_imatrix

SUMS = {
    "blk.0.ffn_down.weight": np.array([[4.0, 8.0, 0.0, 4.0]], np.float32),
    "blk.0.ffn_up_exps.weight": np.array([[1.0, 3.0], [0.0, 0.0], [6.0, 2.0]], np.float32),
}
WANTED = {
    "blk.0.ffn_down.weight": [[1.0, 2.0, LEAST, 1.0]],
    "blk.0.ffn_up_exps.weight": [[0.5, 1.5], [1.0, 1.0], [1.5, 0.5]],
}


def dat(entries: Mapping[str, np.ndarray], calls: int = 7) -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, sums in entries.items():
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", calls, sums.size)]
        parts.append(sums.astype("<f4").tobytes())
    return b"".join([*parts, struct.pack("<ii", 3, 4), b"wiki"])


def write_gguf_form(path: Path, entries: Mapping[str, np.ndarray], counts: float = 12.0) -> Path:
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_array("imatrix.datasets", ["wiki"])
    for name, sums in entries.items():
        writer.add_tensor(f"{name}.in_sum2", sums.astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.full((len(sums), 1), counts, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def check(path: Path) -> None:
    found = read_imatrix(path)
    assert set(found.entries) == set(SUMS)
    for name, rows in WANTED.items():
        np.testing.assert_allclose(found.of(name, len(rows[0]), len(rows)), rows, rtol=1e-6)
    assert found.of("output.weight", 4) is None
    with pytest.raises(WeightsError, match=r"ffn_down.weight has 4 elements and the tensor needs 3 times 4"):
        found.of("blk.0.ffn_down.weight", 4, 3)


def test_both_formats(tmp_path: Path) -> None:
    check(write_gguf_form(tmp_path / "imatrix.gguf", SUMS))
    (tmp_path / "imatrix.dat").write_bytes(dat(SUMS))
    check(tmp_path / "imatrix.dat")


def test_rows_that_nothing_met_know_nothing(tmp_path: Path) -> None:
    found = read_imatrix(write_gguf_form(tmp_path / "imatrix.gguf", SUMS, counts=0.0))
    assert (found.of("blk.0.ffn_down.weight", 4) == 1).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xff\xff\x7f", "the number of entries is"),
        (struct.pack("<i", -1), "the number of entries is -1"),
        (struct.pack("<i", 0), "there is no entry"),
        (b"\x01\x00", "takes 4 bytes and 2 are left"),
        (dat(SUMS)[:60], "entry 0|the length of name 1|name 1|entry 1"),
        (struct.pack("<ii", 1, 1 << 30), "the length of name 0 is"),
        (struct.pack("<ii", 1, 1) + b"\xff" + bytes(8), "no UTF-8"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, (1 << 31) - 1), "bytes and 0 are left"),
        (dat({"a": np.array([[1.0, np.nan]])}), "no sum of squares"),
        (dat({"a": np.array([[1.0, np.inf]])}), "no sum of squares"),
        (dat({"a": np.array([[1.0, -1.0]])}), "no sum of squares"),
        (struct.pack("<i", 2) + 2 * (struct.pack("<i", 1) + b"a" + struct.pack("<iif", 1, 1, 1.0)), "two entries"),
    ],
)
def test_what_is_no_such_file(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.dat").write_bytes(content)
    with pytest.raises(InvalidFileError, match=said):
        read_imatrix(tmp_path / "x.dat")


def test_gguf_files_of_other_things(tmp_path: Path) -> None:
    for columns, rows in ((4, 2), (0, 0)):
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "imatrix")
        writer.add_tensor("a.in_sum2", np.ones((2, columns), np.float32))
        writer.add_tensor("a.counts", np.ones((3, 1), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(InvalidFileError, match=f"a count for each of {rows} rows"):
            read_imatrix(tmp_path / "x.gguf")
    with pytest.raises(InvalidFileError, match="there is no entry"):
        read_imatrix(write_gguf_form(tmp_path / "none.gguf", {}))
    with pytest.raises(ModelNotFoundError):
        read_imatrix(tmp_path / "nowhere.dat")


@given(st.binary(min_size=1, max_size=64), st.integers(0, 90))
def test_damage_is_an_error_of_ours(junk: bytes, at: int) -> None:
    """Whatever is written over a file, it is read or refused."""
    whole = bytearray(dat(SUMS))
    whole[at : at + len(junk)] = junk
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.dat"
        path.write_bytes(bytes(whole))
        with contextlib.suppress(InvalidFileError):
            assert read_imatrix(path).entries
