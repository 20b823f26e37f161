# SPDX-License-Identifier: MIT
"""The safetensors reader: one file, shards and folders; damaged headers and indexes are errors of the tree."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from candle_vllm.core.errors import InvalidFileError, ModelLoadError, ModelNotFoundError, UnsupportedModelError
from candle_vllm.core.kernels.torch_numbers import DTYPES, NAMES
from candle_vllm.core.loading import safetensors
from candle_vllm.core.loading.safetensors import open_safetensors, safetensors_files
from candle_vllm.core.quantization.plain import ELEMENTS


def build(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SMALL = build({"__metadata__": {"format": "pt"}, "a": entry([2], 0, 8), "b": entry([1, 3], 8, 11, "I8")}, b"\0" * 11)


def write(folder: Path, name: str, **tensors: torch.Tensor) -> None:
    save_file(tensors, folder / name, {"format": "pt"})


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_what_the_library_writes_is_read_back(tmp_path: Path) -> None:
    dtypes = [dtype for name, dtype in DTYPES.items() if name not in ("BOOL", "F8_E8M0")]
    tensors = {f"t{i}": torch.arange(6).reshape(2, 3).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"flags": torch.tensor([True, False]), "scalar": torch.tensor(2.5), "none": torch.empty(0, 4)}
    write(tmp_path, "model.safetensors", **tensors)
    with open_safetensors(tmp_path) as checkpoint:
        assert checkpoint.format == "safetensors"
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            stored = checkpoint.tensors[name]
            assert (stored.shape, stored.dtype) == (tuple(tensor.shape), NAMES[tensor.dtype])
            own = stored.load(None)
            assert own.dtype == ELEMENTS[NAMES[tensor.dtype]]
            assert own.tobytes() == tensor.view(-1).view(torch.uint8).numpy().tobytes()
            assert torch.equal(torch.from_numpy(stored.load()), tensor.float())
            assert stored.raw().size == stored.nbytes == tensor.nbytes
        assert checkpoint.tensors["t0"].type_name == "F64"
        assert checkpoint.tensors["t0"].raw().shape == (2, 24)


def test_a_single_file_wins_over_an_index_and_stands_for_itself(tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors", a=torch.ones(2))
    write(tmp_path, "other.safetensors", b=torch.ones(2))
    write_index(tmp_path, {"b": "other.safetensors"})
    assert list(open_safetensors(tmp_path).tensors) == ["a"]
    assert list(open_safetensors(tmp_path / "other.safetensors").tensors) == ["b"]
    assert list(open_safetensors(tmp_path / "model.safetensors.index.json").tensors) == ["b"]


def test_shards(tmp_path: Path) -> None:
    write(tmp_path, "model-00001-of-00002.safetensors", a=torch.ones(2))
    write(tmp_path, "model-00002-of-00002.safetensors", b=torch.zeros(3))
    write(tmp_path, "consolidated.safetensors", a=torch.ones(2))  # not in the index: not read
    write_index(tmp_path, {"b": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"})
    with open_safetensors(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["a", "b"]
        assert checkpoint.tensors["b"].load().tolist() == [0, 0, 0]


def test_any_other_name_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "y.safetensors", y=torch.ones(1))
    write(tmp_path, "x.safetensors", x=torch.ones(1))
    assert list(open_safetensors(tmp_path).tensors) == ["x", "y"]
    write(tmp_path, "z.safetensors", x=torch.ones(1))
    with pytest.raises(InvalidFileError, match=r"'x' is both in .*x\.safetensors and in .*z\.safetensors"):
        open_safetensors(tmp_path)


def test_a_shard_may_be_a_link_out_of_the_folder(tmp_path: Path) -> None:
    """The hub's cache keeps contents in `blobs` and links to them from `snapshots/<commit>`."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write(blobs, "0123", a=torch.ones(2))
    (snapshot / "part.safetensors").symlink_to("../../blobs/0123")
    write_index(snapshot, {"a": "part.safetensors"})
    assert open_safetensors(snapshot).tensors["a"].load().tolist() == [1, 1]


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "c:x.safetensors",
        "x.bin",
        "",
    ],
)
def test_an_index_may_not_name_files_elsewhere(tmp_path: Path, shard: str) -> None:
    write_index(tmp_path, {"a": shard})
    with pytest.raises(InvalidFileError, match="beside the index"):
        safetensors_files(tmp_path)


@pytest.mark.parametrize("index", [b"", b"[]", b"{}", b'{"weight_map": {"a": 1}}', b'{"weight_map": {}}', b"[" * 99999])
def test_a_broken_index(tmp_path: Path, index: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(InvalidFileError, match=r"index\.json"):
        open_safetensors(tmp_path)


def test_an_index_of_unreasonable_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "MAX_INDEX_BYTES", 10)
    write_index(tmp_path, {"a": "x.safetensors"})
    with pytest.raises(InvalidFileError, match="at most 10"):
        open_safetensors(tmp_path)


def test_an_index_of_too_many_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "MAX_INDEX_ENTRIES", 4)
    write_index(tmp_path, dict.fromkeys("abcde", "x.safetensors"))
    with pytest.raises(InvalidFileError, match=r"index\.json names more than 4 tensors"):
        open_safetensors(tmp_path)
    (tmp_path / safetensors.INDEX_FILE).unlink()
    for shard in ("abc", "de"):
        write(tmp_path, f"{shard}.safetensors", **{name: torch.ones(1) for name in shard})
    with pytest.raises(InvalidFileError, match="holds more than 4 tensors"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        json.dumps({format(number, "x"): entry([0], 0, 0) for number in range(5)}).encode(),
        b"{" + b",".join(b'"%d":1' % number for number in range(13)) + b"}",
        b'{"__metadata__":{' + b",".join(b'"%d":"x"' % number for number in range(12)) + b"}}",
    ],
    ids=["tensors", "numbers", "notes"],
)
def test_a_header_of_too_many_entries_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: bytes
) -> None:
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 3)
    decoded = list[bytes]()
    monkeypatch.setattr(safetensors.msgspec.json, "decode", lambda data, **_: decoded.append(data))
    (tmp_path / "x.safetensors").write_bytes(build(header))
    with pytest.raises(InvalidFileError, match="more than 3 tensors"):
        open_safetensors(tmp_path / "x.safetensors")
    assert not decoded


@pytest.mark.parametrize(
    "header",
    [
        {"a": {**entry([], 0, 4), "note": "x" * safetensors.MAX_ENTRY_BYTES}},
        {"a": entry([1] * safetensors.MAX_ENTRY_BYTES, 0, 4)},
        {"__metadata__": {"a": "x" * (safetensors.MAX_NOTES_BYTES + 1)}},
    ],
    ids=["field", "shape", "notes"],
)
def test_an_entry_has_a_length(tmp_path: Path, header: dict[str, Any]) -> None:
    (tmp_path / "x.safetensors").write_bytes(build(header, bytes(4)))
    with pytest.raises(InvalidFileError, match="an entry of the header has more than"):
        open_safetensors(tmp_path / "x.safetensors")


def test_a_missing_shard_and_a_missing_tensor(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "1.safetensors", a=torch.ones(2))
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(ModelNotFoundError, match=r"2\.safetensors is missing"):
        open_safetensors(tmp_path)
    write(tmp_path, "2.safetensors", c=torch.ones(2))
    assert list(open_safetensors(tmp_path).tensors) == ["a", "c"]
    assert "index.json names wrong files for 1 tensors, such as 'b'" in caplog.text


@pytest.mark.parametrize("named", [1, 2])
def test_of_a_tensor_in_two_shards_the_index_chooses_one(tmp_path: Path, named: int) -> None:
    shards = {str(number): f"{number}.safetensors" for number in (1, 2)}
    for number, shard in shards.items():
        write(tmp_path, shard, **{number: torch.ones(1), "a": torch.full((1,), int(number))})
    write_index(tmp_path, shards | {"a": f"{named}.safetensors"})
    assert open_safetensors(tmp_path).tensors["a"].load().tolist() == [named]
    write_index(tmp_path, shards)
    with pytest.raises(InvalidFileError, match=r"'a' is both in .*1\.safetensors and in .*2\.safetensors"):
        open_safetensors(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "x.safetensors", tmp_path / "model.safetensors.index.json"):
        with pytest.raises(ModelNotFoundError):
            open_safetensors(source)


BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "too short": (b"\0" * 7, "7 bytes"),
    "header beyond the file": (struct.pack("<Q", 100) + b"{}", "header of 100 bytes"),
    "header huge": (struct.pack("<Q", 2**63) + b"{}", "at most 100000000"),
    "not json": (build(b"{x}"), "not that of a safetensors file"),
    "not an object": (build([1]), "not that of a safetensors file"),
    "not utf-8": (build(b'{"\xff": 1}'), "not that of a safetensors file"),
    "deep": (build(b'{"a":' + b"[" * 99999), "not that of a safetensors file"),
    "metadata": (build({"__metadata__": {"a": 1}}), "not that of a safetensors file"),
    "name not text": (build(b'{"\\ud800":' + json.dumps(entry([1], 0, 4)).encode() + b"}", b"\0" * 4), "m.safetensors"),
    "no shape": (build({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "shape"),
    "offsets of three": (build({"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4, 8]}}), "not that of"),
    "name empty": (build({"": entry([1], 0, 4)}, b"\0" * 4), "name of 0 characters"),
    "name long": (build({"n" * 2000: entry([1], 0, 4)}, b"\0" * 4), "name of 2000 characters"),
    "negative size": (build({"a": entry([-1, -1], 0, 4)}, b"\0" * 4), "sizes of at least 0"),
    "sizes overflow": (build({"a": entry([0, 2**40, 2**40], 0, 0)}), "sizes of at least 0"),
    "many sizes": (build({"a": entry([1] * 17, 0, 4)}, b"\0" * 4), "up to 16"),
    "offsets reversed": (build({"a": entry([1], 4, 0)}, b"\0" * 4), "data offsets 4 to 0"),
    "offsets negative": (build({"a": entry([1], -4, 0)}, b"\0" * 4), "data offsets -4 to 0"),
    "data beyond the file": (build({"a": entry([2], 0, 8)}, b"\0" * 4), "data offsets 0 to 8"),
    "shape and length": (build({"a": entry([2], 0, 4)}, b"\0" * 4), "2 x 4 bytes"),
    "overlap": (build({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, b"\0" * 8), "overlaps"),
    "hole": (build({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12), "hole"),
    "hole at the start": (build({"a": entry([1], 4, 8)}, b"\0" * 8), "hole"),
    "bytes left over": (build({"a": entry([1], 0, 4)}, b"\0" * 8), "the tensors end at byte"),
    "name twice": (
        build(f'{{"a":{json.dumps(entry([1], 0, 4))},"a":{json.dumps(entry([1], 4, 8))}}}'.encode(), b"\0" * 8),
        "hole",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_damage_is_named_with_the_file(tmp_path: Path, name: str) -> None:
    data, message = BROKEN[name]
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(InvalidFileError) as error:
        open_safetensors(tmp_path)
    assert message in str(error.value)
    assert "m.safetensors" in str(error.value)


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(build({"layer.w": entry([2], 0, 1, "F4")}, b"\0"))
    with pytest.raises(UnsupportedModelError, match=r"'layer\.w' has the dtype 'F4'"):
        open_safetensors(tmp_path)


def test_cut_at_every_byte(tmp_path: Path) -> None:
    for length in range(len(SMALL)):
        (tmp_path / "m.safetensors").write_bytes(SMALL[:length])
        with pytest.raises(InvalidFileError):
            open_safetensors(tmp_path)


def check_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(data)
    message = "fuzz.safetensors"
    tracemalloc.start()
    try:
        with open_safetensors(path) as checkpoint:
            for stored in checkpoint.tensors.values():
                assert stored.raw().nbytes == stored.nbytes <= len(data)
                assert stored.load(None).shape == stored.shape
    except ModelLoadError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "fuzz.safetensors" in message
    assert peak < 1 << 20


FUZZ = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 2**31, 2**62, 2**63, 2**64, 10**30]) | st.integers()
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "I8", "BF16", "F8_E4M3", "F4", "", "f32"]) | st.none(),
        "shape": st.lists(SIZES, max_size=3) | st.floats(),
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2),
    }
)


@FUZZ
@given(place=st.integers(0, len(SMALL)), cut=st.integers(0, 9), new=st.binary(max_size=9))
def test_mutated_files_parse_or_fail_by_the_tree(tmp_path: Path, place: int, cut: int, new: bytes) -> None:
    check_bytes(tmp_path, SMALL[:place] + new + SMALL[place + cut :])


@FUZZ
@given(header=st.dictionaries(st.text(max_size=9), ENTRY | st.integers(), max_size=4), data=st.binary(max_size=16))
def test_any_header_parses_or_fails_by_the_tree(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    check_bytes(tmp_path, build(header, data))
