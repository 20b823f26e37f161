# SPDX-License-Identifier: MIT
"""Model files made to do harm: each ends the start with one line, before memory is taken or read beyond the file."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.errors import CandleVllmError, ModelLoadError
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.toy_gguf import write_toy_gguf
from tests.live_server import COMMAND, PATIENCE, clean_environment

MAX = (1 << 64) - 1
U8, U32, STRING, ARRAY = 0, 4, 8, 9


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, dims: tuple[int, ...], kind: int = 0, offset: int = 0, rank: int | None = None) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims) if rank is None else rank, *dims, kind, offset)


def gguf(pairs: list[bytes], tensors: list[bytes], counts: tuple[int, int] | None = None, data: int = 4096) -> bytes:
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", 3, tensor_count, pair_count) + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32 + data)


LLAMA = pair(b"general.architecture", STRING, text(b"llama"))
ONE = tensor(b"a", (32,))
HOSTILE_GGUF = {
    "tensor size wraps to 0": gguf([LLAMA], [tensor(b"a", (1 << 32, 1 << 32))]),
    "tensor size wraps to 64": gguf([LLAMA], [tensor(b"a", ((1 << 62) + 16, 4))]),
    "tensor of 2^63": gguf([LLAMA], [tensor(b"a", (1 << 63,))]),
    "dimensions of 2^64-1": gguf([LLAMA], [tensor(b"a", (MAX, MAX, MAX, MAX))]),
    "dimension 0": gguf([LLAMA], [tensor(b"a", (0, 32))]),
    "row of half a block": gguf([LLAMA], [tensor(b"a", (31,), kind=8)]),
    "tensor beyond the file": gguf([LLAMA], [tensor(b"a", (1 << 20,))]),
    "offset beyond the file": gguf([LLAMA], [tensor(b"a", (32,), offset=1 << 40)]),
    "offset of 2^64-32": gguf([LLAMA], [tensor(b"a", (32,), offset=MAX - 31)]),
    "offset that wraps into the header": gguf([LLAMA], [tensor(b"a", (32,), offset=MAX - 127)]),
    "offset out of line": gguf([LLAMA], [tensor(b"a", (32,), offset=1)]),
    "tensors that overlap": gguf([LLAMA], [tensor(b"a", (32,)), tensor(b"b", (32,), offset=64)]),
    "the same tensor twice": gguf([LLAMA], [ONE, ONE]),
    "rank 0": gguf([LLAMA], [tensor(b"a", (), rank=0)]),
    "rank 2^32-1": gguf([LLAMA], [tensor(b"a", (32,), rank=(1 << 32) - 1)]),
    "unknown type": gguf([LLAMA], [tensor(b"a", (32,), kind=4_000_000_000)]),
    "2^64-1 tensors": gguf([LLAMA], [ONE], (MAX, 1)),
    "2^63 tensors": gguf([LLAMA], [ONE], (1 << 63, 1)),
    "2^64-1 pairs": gguf([LLAMA], [ONE], (1, MAX)),
    "a million pairs": gguf([LLAMA], [ONE], (1, 1_000_000)),
    "key of 2^64-1": gguf([text(b"a", MAX) + struct.pack("<I", U8) + b"\1"], [ONE]),
    "key of length 0": gguf([pair(b"", U8, b"\1")], [ONE]),
    "text of 2^64-1": gguf([pair(b"a", STRING, text(b"a", MAX))], [ONE]),
    "text of 2^63-1": gguf([pair(b"a", STRING, text(b"a", (1 << 63) - 1))], [ONE]),
    "tensor name of 2^64-1": gguf([LLAMA], [text(b"a", MAX) + ONE[9:]]),
    "array of 2^64-1": gguf([pair(b"a", ARRAY, struct.pack("<IQ", U8, MAX))], [ONE]),
    "array of 2^61 words": gguf([pair(b"a", ARRAY, struct.pack("<IQ", U32, 1 << 62))], [ONE]),
    "array of 2^61 texts": gguf([pair(b"a", ARRAY, struct.pack("<IQ", STRING, 1 << 61))], [ONE]),
    "array of 2^60 arrays": gguf([pair(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1 << 60))], [ONE]),
    "arrays in arrays": gguf([pair(b"a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 10_000)], [ONE]),
    "a key twice": gguf([LLAMA, LLAMA], [ONE]),
    "unknown kind of value": gguf([pair(b"a", 13, b"\1" * 8)], [ONE]),
    "alignment 0": gguf([LLAMA, pair(b"general.alignment", U32, struct.pack("<I", 0))], [ONE]),
    "alignment 3": gguf([LLAMA, pair(b"general.alignment", U32, struct.pack("<I", 3))], [ONE]),
    "alignment 2^31": gguf([LLAMA, pair(b"general.alignment", U32, struct.pack("<I", 1 << 31))], [ONE]),
    "alignment as text": gguf([LLAMA, pair(b"general.alignment", STRING, text(b"32"))], [ONE]),
    "version 0": b"GGUF" + struct.pack("<IQQ", 0, 1, 1) + LLAMA + ONE,
    "nothing behind the counts": b"GGUF" + struct.pack("<IQQ", 3, 1, 1),
    "magic alone": b"GGUF",
    "empty": b"",
}


def memory() -> int:
    """The most that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def refused(path: Path, kinds: type[CandleVllmError] = ModelLoadError) -> str:
    """The one line with which a model is refused, soon and without much memory."""
    before, began = memory(), time.thread_time()
    with pytest.raises(kinds) as error:
        InferenceEngine(str(path), device="cpu", kv_cache_memory=1 << 20, threads=1).close()
    assert time.thread_time() - began < 5
    assert memory() - before < 300
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", HOSTILE_GGUF)
def test_hostile_gguf(tmp_path: Path, name: str) -> None:
    """CVE-2025-53630, CVE-2026-27940 (sizes that overflow), CVE-2026-7482 (tensors beyond the file), and the other
    numbers of a header."""
    path = tmp_path / "m.gguf"
    path.write_bytes(HOSTILE_GGUF[name])
    assert str(path) in refused(path)


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "no tokens": lambda keys: keys.pop("tokenizer.ggml.tokens"),
    "types of another length": lambda keys: keys.update({"tokenizer.ggml.token_type": [1]}),
    "merges of nothing": lambda keys: keys.update({"tokenizer.ggml.merges": ["x", "", " ", "a b c"]}),
    "heads 0": lambda keys: keys.update({"llama.attention.head_count": 0}),
    "heads 2^32-1": lambda keys: keys.update({"llama.attention.head_count": 0xFFFFFFFF}),
    "layers 2^32-1": lambda keys: keys.update({"llama.block_count": 0xFFFFFFFF}),
    "width 2^32-1": lambda keys: keys.update({"llama.embedding_length": 0xFFFFFFFF}),
    "context 2^32-1": lambda keys: keys.update({"llama.context_length": 0xFFFFFFFF}),
    "head size 0": lambda keys: keys.update({"llama.attention.key_length": 0}),
    "rope NaN": lambda keys: keys.update({"llama.rope.freq_base": float("nan")}),
    "epsilon infinite": lambda keys: keys.update({"llama.attention.layer_norm_rms_epsilon": float("inf")}),
    "family by name": lambda keys: keys.update({"general.architecture": "../../os"}),
    "tokenizer by name": lambda keys: keys.update({"tokenizer.ggml.model": "__import__('os')"}),
    "template of 1 MB": lambda keys: keys.update({"tokenizer.chat_template": "{{ x }}" * 150_000}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_hostile_gguf_metadata(tmp_path: Path, name: str) -> None:
    """GHSA-7rxv-5jhh-j6xx (the tokenizer's lists), CVE-2026-42249: a header that is well formed and lies about the
    model: refused in one line, or of no effect."""
    reader = GGUFReader(write_toy_gguf(tmp_path / "good.gguf"))
    keys = {field.name: field.contents() for field in reader.fields.values() if not field.name.startswith("GGUF.")}
    CHANGES[name](keys)
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, keys.pop("general.architecture"))
    for key, value in keys.items():
        _put(writer, key, value)
    for stored in reader.tensors:
        kind = GGMLQuantizationType(stored.tensor_type)
        writer.add_tensor(stored.name, np.array(stored.data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if name == "family by name":  # transformers is asked for unknown architectures, and is large itself
        pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    refused(path, CandleVllmError)


def test_hostile_gguf_token_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GHSA-7rxv-5jhh-j6xx: ids of special tokens beyond the vocabulary are never used as such."""
    monkeypatch.setattr(
        GGUFWriter, "add_eos_token_id", lambda self, _: self.add_uint32("tokenizer.ggml.eos_token_id", 0xFFFFFFFF)
    )
    path = write_toy_gguf(tmp_path / "m.gguf")
    with InferenceEngine(str(path), device="cpu", kv_cache_memory=1 << 20, threads=1) as engine:
        info = engine.model_info
        assert all(0 <= token < info.vocab_size for token in info.eos_token_ids)
        (output,) = engine.generate("Hello", SamplingParams(max_tokens=4), use_tqdm=False)
        assert len(output.token_ids) <= 4


def test_hostile_ids_in_a_config(tmp_path: Path) -> None:
    """The same in a folder: an id without a row is ignored."""
    folder = write_toy_model(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(toy_config() | {"eos_token_id": [-1, 1 << 20]}))
    with InferenceEngine(str(folder), device="cpu", kv_cache_memory=1 << 20, threads=1) as engine:
        assert all(0 <= token < engine.model_info.vocab_size for token in engine.model_info.eos_token_ids)
        (output,) = engine.generate("Hello", SamplingParams(max_tokens=4), use_tqdm=False)
        assert len(output.token_ids) <= 4


def _put(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def safetensors(header: Any, data: int = 64, length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + b"\0" * data


HOSTILE_SAFETENSORS = {
    "header of 2^64-1": safetensors({"a": entry([16], 0, 64)}, length=MAX),
    "header of 2^63-1": safetensors({"a": entry([16], 0, 64)}, length=(1 << 63) - 1),
    "header beyond the file": safetensors({"a": entry([16], 0, 64)}, length=1 << 20),
    "header of 0": safetensors(b"", length=0),
    "no JSON": safetensors(b"\x80\x04\x95"),
    "deep JSON": safetensors(b'{"a":' + b"[" * 100_000),
    "overlap": safetensors({"a": entry([8], 0, 32), "b": entry([12], 16, 64)}),
    "hole": safetensors({"a": entry([4], 0, 16), "b": entry([8], 32, 64)}),
    "behind the end": safetensors({"a": entry([16], 64, 128)}),
    "backwards": safetensors({"a": entry([16], 64, 0)}),
    "negative offset": safetensors({"a": entry([16], -64, 0)}),
    "offset of 2^64": safetensors({"a": entry([16], 1 << 64, (1 << 64) + 64)}),
    "shape that overflows": safetensors({"a": entry([1 << 32, 1 << 32], 0, 64)}),
    "negative shape": safetensors({"a": entry([-4, -4], 0, 64)}),
    "shape of texts": safetensors({"a": entry(["16"], 0, 64)}),
    "shape of 1000 sizes": safetensors({"a": entry([1] * 1000, 0, 64)}),
    "unknown dtype": safetensors({"a": entry([16], 0, 64, "PICKLE")}),
    "name twice": safetensors(b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},'
                              b'"a":{"dtype":"F32","shape":[8],"data_offsets":[32,64]}}'),
    "name of 1 MB": safetensors({"a" * (1 << 20): entry([16], 0, 64)}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_SAFETENSORS)
def test_hostile_safetensors(tmp_path: Path, name: str) -> None:
    """The same in safetensors: sizes, overlaps and offsets of its header."""
    folder = write_toy_model(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(HOSTILE_SAFETENSORS[name])
    assert "model.safetensors" in refused(folder)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "x.bin"])
def test_hostile_index(tmp_path: Path, shard: str) -> None:
    """CVE-2026-42248: a name in an index that leads out of the model's folder."""
    folder = write_toy_model(tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    refused(folder, CandleVllmError)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 1 << 40}, {"hidden_size": -1}, {"vocab_size": 1 << 62}, {"num_attention_heads": 0},
        {"num_hidden_layers": "2"}, {"rope_theta": "NaN"}, {"max_position_embeddings": 0}, {"rms_norm_eps": -1},
        {"rope_scaling": {"rope_type": "os.system", "factor": 1}}, {"hidden_act": "__import__"},
    ],
)  # fmt: skip
def test_hostile_config(tmp_path: Path, change: dict[str, Any]) -> None:
    """Sizes and names of config.json: each is checked before it is computed with."""
    folder = write_toy_model(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(toy_config() | change))
    refused(folder, CandleVllmError)


def test_hostile_file_ends_the_start_in_one_line(tmp_path: Path) -> None:
    """CVE-2026-7482, as an operator sees it: the server's start ends with status 2 and one line, in each way to run."""
    path = tmp_path / "m.gguf"
    path.write_bytes(HOSTILE_GGUF["tensor size wraps to 0"])
    for flags in ((), ("--engine-process",)):
        done = subprocess.run(
            [COMMAND, "--p", "0", "--m", str(path), "--device", "cpu", *flags],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=clean_environment(tmp_path),
            timeout=PATIENCE,
        )
        assert done.returncode == 2, done.stderr
        *logged, last = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        assert last.startswith(f"candle-vllm: error: {path}"), done.stderr
        assert len(logged) <= 1, done.stderr  # the log's line of the model
        assert "Traceback" not in done.stderr
