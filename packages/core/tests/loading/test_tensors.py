# SPDX-License-Identifier: MIT
"""Mapped files, and the copy of plain elements out of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from candle_vllm.core.errors import InvalidFileError, ModelLoadError, ModelNotFoundError
from candle_vllm.core.kernels import torch_numbers
from candle_vllm.core.kernels.torch_numbers import DTYPES, load_plain, tensor_of
from candle_vllm.core.loading.tensors import MappedFile
from candle_vllm.core.quantization import plain
from candle_vllm.core.quantization.plain import ELEMENTS, read_plain


def test_a_mapped_file_gives_views(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"hello")
    file = MappedFile(tmp_path / "f")
    assert file.size == 5
    assert file.view(1, 3).tobytes() == b"ell"
    assert file.view(5, 0).tobytes() == b""
    file.close()
    with pytest.raises(ModelLoadError, match="closed"):
        file.view(0, 1)


def test_released_pages_leave_memory_and_can_be_read_again(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 256, 8 << 20, dtype=np.uint8).tobytes()
    (tmp_path / "f").write_bytes(data)
    file = MappedFile(tmp_path / "f")

    def resident() -> int:
        return int(Path("/proc/self/smaps_rollup").read_text().split("Rss:")[1].split()[0])

    assert file.view(0, len(data)).tobytes() == data
    before = resident()
    for start, count in ((0, 0), (1, 100), (100, (8 << 20) - 200)):
        file.release(start, count)
    assert resident() < before - (7 << 10)
    assert file.view(0, len(data)).tobytes() == data
    file.close()


def test_a_file_that_cannot_be_mapped(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="absent"):
        MappedFile(tmp_path / "absent")
    (tmp_path / "empty").touch()
    with pytest.raises(InvalidFileError, match="empty"):
        MappedFile(tmp_path / "empty")


WANTED = [name for name in ELEMENTS if not name.startswith("F8")]


@pytest.mark.one_of_each(11)
@pytest.mark.parametrize("stored", ELEMENTS)
@pytest.mark.parametrize("read", ["numpy", "torch"])
def test_every_type_loads_as_itself_and_as_what_torch_makes_of_it(
    stored: str, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "_CHUNK", 5)
    monkeypatch.setattr(torch_numbers, "COPY_CHUNK", 5)
    size = 4096 * ELEMENTS[stored].itemsize
    raw = np.random.default_rng(0).integers(0, 2 if stored == "BOOL" else 256, size, dtype=np.uint8)
    raw.flags.writeable = False
    own = read_plain(raw, stored, (64, 64), stored)
    assert own.dtype == ELEMENTS[stored]
    assert own.tobytes() == raw.tobytes()
    for name in WANTED if ELEMENTS[stored].kind != "f" else ("F64", "F32", "F16", "BF16"):
        wanted = tensor_of(own, stored).to(DTYPES[name])
        if read == "numpy":
            found = tensor_of(read_plain(raw, stored, (64, 64), name), name)
        else:
            found = load_plain(raw, stored, (64, 64), DTYPES[name])
        if not wanted.is_floating_point() and stored in ("BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0"):
            continue  # floats as whole numbers mean nothing beyond their range
        assert torch.equal(found.double().nan_to_num(7, -1, -2), wanted.double().nan_to_num(7, -1, -2)), name


@pytest.mark.parametrize("shape", [(), (1,), (0, 4)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    raw = np.ones(2 * int(np.prod(shape)), np.uint8)
    for name in ("F32", "BF16"):
        assert read_plain(raw, "F16", shape, name).shape == shape
        assert load_plain(raw, "F16", shape, DTYPES[name]).shape == shape


@pytest.mark.parametrize("name", ["F8_E4M3", "F8_E5M2"])
def test_floats_are_rounded_to_eight_bits_as_torch_does(name: str) -> None:
    """Every number of the type, the middles between them, and their neighbours, with what lies beyond the largest."""
    codes = read_plain(np.arange(256, dtype=np.uint8), name, (256,), "F32")
    finite = np.unique(codes[np.isfinite(codes)])
    beyond = np.array([464, 480, 500, 61440, 65536, 1e9, np.inf, 1e-30, 0], np.float32)
    edges = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2, beyond, -beyond])
    infinite = np.float32(np.inf)
    numbers = np.concatenate(
        [edges, np.nextafter(edges, infinite), np.nextafter(edges, -infinite), [np.float32(np.nan)]]
    )
    found = read_plain(numbers.view(np.uint8), "F32", numbers.shape, name)
    wanted = torch.from_numpy(numbers).to(DTYPES[name])
    inside = np.abs(numbers) <= (464 if name == "F8_E4M3" else np.inf)  # versions of torch differ beyond
    assert (found == wanted.view(torch.uint8).numpy())[inside].all()
    assert {*found[~inside & ~np.isnan(numbers)] & 0x7F} <= {0x7E}
    assert np.isnan(read_plain(found, name, found.shape, "F32")[np.isnan(numbers)]).all()
