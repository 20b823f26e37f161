"""Mapped files, and the copy of plain elements out of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from candle_vllm.core.errors import InvalidFileError, ModelLoadError, ModelNotFoundError
from candle_vllm.core.loading.safetensors import DTYPES
from candle_vllm.core.loading.tensors import MappedFile
from candle_vllm.core.quantization import tensors
from candle_vllm.core.quantization.tensors import load_plain


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


@pytest.mark.parametrize("stored", DTYPES.values(), ids=DTYPES.keys())
def test_every_dtype_loads_as_itself_and_as_float32(stored: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "COPY_CHUNK", 5)
    raw = np.random.default_rng(0).integers(0, 2 if stored == torch.bool else 256, 12 * stored.itemsize, dtype=np.uint8)
    raw.flags.writeable = False
    own = load_plain(raw, stored, (3, 4), stored)
    assert own.dtype == stored
    assert own.view(torch.uint8).numpy().tobytes() == raw.tobytes()
    floats = load_plain(raw, stored, (3, 4), torch.float32)
    assert floats.shape == (3, 4)
    assert torch.equal(floats.nan_to_num(7), own.to(torch.float32).nan_to_num(7))


@pytest.mark.parametrize("shape", [(), (1,), (0, 4)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape))
    loaded = load_plain(np.ones(2 * count, np.uint8), torch.float16, shape, torch.float32)
    assert loaded.shape == shape
