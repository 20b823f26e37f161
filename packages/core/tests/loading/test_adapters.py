# SPDX-License-Identifier: MIT
"""Adapters as files: every key is honoured or refused, every tensor used or refused, and strangers may do nothing."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, quants

from candle_vllm.core import AdapterError, EngineConfig, ModelNotFoundError
from candle_vllm.core.assembly.adapter_base import AdapterBase, adapter_base
from candle_vllm.core.assembly.adapters import fit_adapter
from candle_vllm.core.kernels.lora import FittedAdapter
from candle_vllm.core.loading import adapters
from candle_vllm.core.loading.adapter_config import parse_config
from candle_vllm.core.loading.adapters import AdapterLimits, StoredAdapter, read_adapter
from candle_vllm.core.loading.name_patterns import NamePattern, first_match
from candle_vllm.core.loading.source import model_files
from packages.core.tests.toy_adapter import ATTENTION, linear_shapes, write_adapter
from packages.core.tests.toy_gguf import write_toy_gguf

Q = "model.layers.0.self_attn.q_proj"
SMALL = {Q: (64, 64)}


def base_of(source: Path) -> AdapterBase:
    config = EngineConfig(model=str(source))
    return adapter_base(model_files(config), config)


@pytest.fixture(scope="module")
def base(toy_model: Path) -> AdapterBase:
    """Two layers of 64 wide hidden states; 4 heads, 2 of keys and values."""
    return base_of(toy_model)


LIMITS = AdapterLimits()


def fitted(folder: Path, base: AdapterBase, limits: AdapterLimits = LIMITS) -> FittedAdapter:
    with read_adapter(folder, limits) as stored:
        return fit_adapter(stored, base)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The folder with another header of its weights, whose bytes stay."""
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    told = json.dumps(header).encode()
    path.write_bytes(len(told).to_bytes(8, "little") + told + data[8 + length :])
    return folder


# ---- patterns of names -----------------------------------------------------------------------------------------------

PATTERNS = (
    "q_proj", "model.layers.(0|1|2).self_attn.q_proj", r"model\.layers\.[0-9]+\.mlp\..*", "^model.layers.1.*",
    r"layers.\d{1,2}.self_attn.(q|k)_proj", "(a|b)*c{2,3}", "x{0,2}y?z+", "[^q]_proj", "self_attn.q_proj$|down_proj",
    "(?:layers.){2,}1", "a{2,}", "(|a)b", "q{0}_proj", "((a|ab)(c|bcd)(d*))", "(a?){3}b", r"[\w.]+k_proj", "a+?b",
)  # fmt: skip
NAMES = (
    Q, "model.layers.12.mlp.down_proj", "model.layers.1.mlp.gate_proj", "layers.layers.1", "aabcc", "x.ababccc", "xyz",
    "zz", "k_proj", "self_attn.q_projx", "aaa", "b", "ab", "_proj", "abcd", "aaab", "abcddd",
    "layers.3.self_attn.k_proj",
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_peft_matches(pattern: str) -> None:
    rng = random.Random(1)
    names = [*NAMES, *("".join(rng.choice("abcd.q") for _ in range(rng.randint(1, 8))) for _ in range(200))]
    ours = NamePattern(pattern)
    found = [name for name in names if ours.matches(name)]
    assert found == [name for name in names if re.match(rf"(.*\.)?({pattern})$", name)]


NO_PATTERNS = (
    "(a", "a)", "[a", "a**", "(?=a)", r"\1", "a{3,1}", "a{99999}", "(a{1000}){1000}", "*a", "(" * 50, "a|*", "x" * 5000,
    "((){9999}){9999}a", "[z-a]",
)  # fmt: skip


@pytest.mark.parametrize("pattern", NO_PATTERNS)
def test_a_pattern_that_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        NamePattern(pattern)


@pytest.mark.parametrize("pattern", [r"(\w|\w|\w)*!", "(a+)+!", "(a*)*!", "(a?){200}a{200}!"])
def test_a_hostile_pattern_takes_linear_time(pattern: str) -> None:
    """With backtracking none of these would ever end."""
    assert not NamePattern(pattern).matches("a" * 3000)


def test_the_first_key_that_matches_wins() -> None:
    find = first_match({"k_proj": 1, "layers.0.*": 2, "q_proj": 3, "layers.1.self_attn.q_proj": 4}, 0)
    assert [find(name) for name in (Q, Q.replace("0", "1"), "layers.0.k_proj", "v_proj")] == [2, 3, 1, 0]


# ---- keys ------------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'.*only LORA"),
    ({"peft_type": None}, "peft_type is missing"),
    ({"peft_type": ["LORA"]}, "peft_type"),
    ({"r": 0}, "r is 0"),
    ({"r": -1}, "r is -1"),
    ({"r": 300}, "r is 300.*max_lora_rank"),
    ({"r": 10**30}, "r is 1000"),
    ({"r": True}, "r is True"),
    ({"rank_pattern": {"q_proj": 400}}, "rank_pattern is .*max_lora_rank"),
    ({"rank_pattern": {"(?=q)": 4}}, "rank_pattern: key .*write the module's name"),
    ({"rank_pattern": {"q_proj": 4.5}}, "q_proj is 4.5"),
    ({"lora_alpha": 0}, "lora_alpha is 0.*do nothing"),
    ({"lora_alpha": 1e300}, "its scale is 1.25e\\+299, and must be 1e-09 to 1e\\+06"),
    ({"lora_alpha": 1e-300}, "its scale is 1.25e-301, and must be 1e-09 to 1e"),
    ({"alpha_pattern": {f"q_pro[{letter}]": 8 for letter in map(chr, range(0x100, 0x141))}}, "more than 64 regular"),
    ({"alora_invocation_tokens": [1] * 257}, "alora_invocation_tokens has 257 tokens; at most 256"),
    ({"lora_alpha": "16"}, "lora_alpha is '16'"),
    ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern"),
    ({"bias": "some"}, "bias is 'some'.*none, all, lora_only"),
    *[({"init_lora_weights": name}, f"init_lora_weights is '{name}'.*path_initial_model_for_weight_conversion")
      for name in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga")],
    ({"init_lora_weights": "loftq"}, "loftq.*merge_and_unload"),
    ({"init_lora_weights": "new"}, "'new'.*gaussian"),
    ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication is"),
    ({"use_qalora": True}, "use_qalora is True"),
    *[({key: {"a": 1}}, f"{key} is") for key in
      ("use_bdlora", "kasa_config", "velora_config", "monteclora_config", "arrow_config")],
    ({"trainable_token_indices": [1, 1]}, "names a token twice"),
    ({"trainable_token_indices": [-1]}, "trainable_token_indices is"),
    ({"target_parameters": [1]}, "target_parameters"),
    ({"alora_invocation_tokens": ["a"]}, "alora_invocation_tokens"),
    ({"alora_invocation_tokens": [300]}, "300 is beyond the base's vocabulary"),
    ({"use_dora": True}, "no lora_magnitude_vector"),
    ({"use_dora": "yes"}, "use_dora is 'yes', not a bool"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_key_and_value(
    config: dict[str, Any], message: str, tmp_path: Path, base: AdapterBase
) -> None:
    with pytest.raises(AdapterError, match=message) as raised:
        fitted(write_adapter(tmp_path / "a", SMALL, **config), base)
    assert str(tmp_path) in str(raised.value)


def test_the_default_rank_is_refused_like_a_given_one(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    with pytest.raises(AdapterError, match="r is 8: ranks up to 4 are allowed: raise max_lora_rank to 8"):
        parse_config(b'{"peft_type": "LORA"}', path, 4)


def test_keys_that_are_not_known_are_told(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", SMALL, base_model_name_or_path=None, new_thing=3, newer=[], use_qalora=False)
    with read_adapter(folder) as stored:
        unknown, unnamed = stored.config.notes
    assert ("new_thing" in unknown, "newer" in unknown) == (True, False)
    assert "does not name the base" in unnamed
    strange: dict[str, Any] = {"x\r\nset-cookie: y": 1}
    with read_adapter(write_adapter(tmp_path / "b", SMALL, **strange)) as stored:
        assert r"'x\r\nset-cookie: y'" in stored.config.notes[0]
        assert stored.config.notes[0].isprintable()


def test_scales_follow_patterns(tmp_path: Path, base: AdapterBase) -> None:
    config = {"use_rslora": True, "alpha_pattern": {r"layers\.1\..*": 3.0}}
    deltas = fitted(write_adapter(tmp_path / "a", base.config, rank=4, targets=ATTENTION, **config), base).deltas
    assert deltas["layers.0.attention.qkv"]["q."].scale == 16 / math.sqrt(4)
    assert deltas["layers.1.attention.output"][""].scale == 3 / math.sqrt(4)


def test_an_adapter_is_what_its_bytes_are(tmp_path: Path, base: AdapterBase) -> None:
    folders = [
        write_adapter(tmp_path / "a", SMALL),
        write_adapter(tmp_path / "again", SMALL),
        write_adapter(tmp_path / "other", SMALL, seed=1),
        write_adapter(tmp_path / "scale", SMALL, alpha=8.0),
    ]
    digests = [fitted(folder, base).digest for folder in folders]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


# ---- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model.language_model.", "language_model.model."])
def test_names_of_trunks_and_of_larger_models_are_put_right(prefix: str, tmp_path: Path, base: AdapterBase) -> None:
    folder = write_adapter(tmp_path / "a", {Q.replace("model.", prefix): (64, 64)})
    assert list(fitted(folder, base).deltas) == ["layers.0.attention.qkv"]


TENSORS: list[tuple[dict[str, tuple[int, ...]], dict[str, Any], str]] = [
    ({"model.layers.7.self_attn.q_proj.lora_A.weight": (8, 64)}, {}, "no module 'model.layers.7"),
    ({"visual.blocks.0.attn.qkv.lora_A.weight": (8, 64)}, {}, "not part of the text model"),
    ({"model.layers.0.self_attn.k_proj.lora_A.weight": (8, 64)}, {}, "one of the two LoRA matrices"),
    ({"model.layers.0.self_attn.k_proj.lora_B.weight": (32, 8)}, {}, "one of the two LoRA matrices"),
    ({f"{Q}.lora_E": (8, 1)}, {}, "not a known part of an adapter"),
    ({"model.layers.0.input_layernorm.weight": (64,)}, {}, "norm.*quantize --lora.*merge_and_unload"),
    ({"model.layers.0.mlp.up_proj.weight": (96, 64)}, {}, "heads and embedding tables.*quantize --lora"),
    ({"model.embed_tokens.weight": (280, 64)}, {}, "vocabulary of 280 tokens.*272: resize.*merge_and_unload"),
    ({f"model.embed_tokens.lora_{end}": (8, 272) for end in ("embedding_A", "magnitude_vector")}, {}, "DoRA.*merge"),
    ({"lm_head.weight": (272, 32)}, {}, r"shape is \[272, 32\]"),
    ({f"{Q}.lora_magnitude_vector": (64,)}, {}, "use_dora is not true"),
    ({f"{Q}.bias": (64,)}, {}, "bias is 'none'"),
    ({f"{Q}.bias": (32,)}, {"bias": "all"}, "64 elements are expected"),
    ({"model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 64)}, {}, "trainable_token_indices"),
    (
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 64)},
        {"trainable_token_indices": [272]},
        "token 272 is beyond",
    ),
    (
        {"model.embed_tokens.lora_embedding_A": (8, 270), "model.embed_tokens.lora_embedding_B": (64, 8)},
        {},
        "its table",
    ),
    ({"model.embed_tokens.base_layer.weight": (272, 64)}, {}, "another base"),
]


@pytest.mark.parametrize(("tensors", "config", "message"), TENSORS, ids=[message[:30] for *_, message in TENSORS])
def test_a_tensor_that_is_not_used_is_refused_by_name(
    tensors: dict[str, tuple[int, ...]], config: dict[str, Any], message: str, tmp_path: Path, base: AdapterBase
) -> None:
    made = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    with read_adapter(write_adapter(tmp_path / "a", SMALL, tensors=made, **config)) as stored:
        with pytest.raises(AdapterError, match=message) as raised:
            fit_adapter(stored, base)
        assert any(name in str(raised.value) for name in tensors)
        if "quantize --lora" in str(raised.value):
            fit_adapter(stored, base, merging=True)  # which does not refuse it


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({Q: (48, 64)}, "has 48 rows for layers.0.attention.qkv, which has 64"),
        ({Q: (64, 32)}, "has 64 columns"),
        ({Q: (64, 64), "layers.0.self_attn.q_proj": (64, 64)}, "another tensor of the adapter"),
    ],
)
def test_wrong_shapes_are_refused(
    shapes: dict[str, tuple[int, int]], message: str, tmp_path: Path, base: AdapterBase
) -> None:
    with pytest.raises(AdapterError, match=message):
        fitted(write_adapter(tmp_path / "a", shapes), base)
    assert not any(total == 48 for *_, total, _ in base.places._orders)  # the order of refused rows takes no memory


def test_a_rank_that_is_not_the_one_that_is_said_is_refused(tmp_path: Path, base: AdapterBase) -> None:
    folder = write_adapter(tmp_path / "a", SMALL, rank=16)
    with pytest.raises(AdapterError, match=r"its rank is 16; adapter_config.json says 8"):
        fitted(write_adapter(tmp_path / "b", SMALL, rank=16, r=8), base)
    with pytest.raises(AdapterError, match="r is 16: ranks up to 8"):
        fitted(folder, base, AdapterLimits(max_rank=8))
    assert fitted(folder, base, AdapterLimits(max_rank=16)).rank == 16


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_numbers_that_are_not_finite_are_refused(
    number: float, half: str, dtype: str, tmp_path: Path, base: AdapterBase
) -> None:
    values = np.ones((8, 64) if half == "lora_A" else (64, 8), np.float32)
    values[3, 2] = number
    folder = write_adapter(tmp_path / "a", SMALL, dtype=dtype, tensors={f"{Q}.{half}.weight": values})
    with pytest.raises(AdapterError, match=rf"{half}.*not finite"):
        fitted(folder, base)


def test_a_norm_beyond_float32s_squares_is_finite(tmp_path: Path, base: AdapterBase) -> None:
    halves = {f"{Q}.lora_A.weight": (8, 64), f"{Q}.lora_B.weight": (64, 8)}
    made = {name: np.full(shape, 1e12, np.float32) for name, shape in halves.items()}
    found = fitted(write_adapter(tmp_path / "a", SMALL, tensors=made), base)
    assert found.norm == pytest.approx(found.deltas["layers.0.attention.qkv"]["q."].scale * 64 * 8e24, rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"isq": "q8_0"}])
def test_norms_of_dora_are_those_of_the_weights_that_run(
    settings: dict[str, Any], tmp_path: Path, toy_model: Path
) -> None:
    """Of a quantised model they are the quantised ones."""
    source = toy_model if settings else write_toy_gguf(tmp_path / "toy.gguf", quantization="Q4_0")
    config, down = EngineConfig(model=str(source), **settings), "model.layers.1.mlp.down_proj"
    base = adapter_base(model_files(config), config)
    magnitude = np.linspace(1, 2, 64, dtype=np.float32)
    more = {f"{down}.lora_magnitude_vector": magnitude}
    folder = write_adapter(tmp_path / "a", {down: (64, 96)}, use_dora=True, tensors=more)
    with base.weights() as weights, read_adapter(folder) as stored:
        weight = weights("layers.1.mlp.down:weight")
        assert weight is not None
        assert weight.type_name == ("Q8_0" if settings else "Q4_0")
        delta = fit_adapter(stored, base).deltas["layers.1.mlp.down"][""]
        assert delta.a is not None
        assert delta.b is not None
        whole = weight.load() + 2.0 * delta.b.load() @ delta.a.load()
    assert delta.column_scale is not None
    np.testing.assert_allclose(delta.column_scale, magnitude / np.linalg.norm(whole, axis=1), rtol=1e-6)
    more = {f"{down}.lora_magnitude_vector": np.full(64, 3e38, np.float32)}
    folder = write_adapter(tmp_path / "b", {down: (64, 96)}, use_dora=True, size=1e-6, tensors=more)
    with pytest.raises(AdapterError, match=r"magnitudes .* not finite"), read_adapter(folder) as stored:
        fit_adapter(stored, base)


# ---- hostile files ---------------------------------------------------------------------------------------------------


def test_what_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", SMALL)
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors has \d+ bytes; at most 1000 are allowed"):
        read_adapter(folder, AdapterLimits(max_bytes=1000))
    with (folder / "adapter_config.json").open("r+b") as stream:
        stream.truncate(1 << 30)  # a hole: no byte of it is on the disk
    with pytest.raises(AdapterError, match="more than the 1048576 bytes"):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickles_are_never_opened(name: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", SMALL)
    (folder / "adapter_model.safetensors").rename(folder / name)
    with pytest.raises(AdapterError, match=f"{name} is a pickle.*safe_serialization"):
        read_adapter(folder)


def test_folders_of_an_adapters_name(tmp_path: Path) -> None:
    write_adapter(tmp_path / "outer" / "mine", SMALL)
    read_adapter(tmp_path / "outer").close()
    write_adapter(tmp_path / "outer" / "other", SMALL)
    with pytest.raises(AdapterError, match=r"2 adapters \(mine, other\)"):
        read_adapter(tmp_path / "outer")
    for nothing in (tmp_path, tmp_path / "none"):
        with pytest.raises(ModelNotFoundError):
            read_adapter(nothing)
    with pytest.raises(AdapterError, match="name its folder"):
        read_adapter(tmp_path / "outer" / "mine" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON"), ("[1]", "must be a JSON object"), ("[" * 100_000, "JSON"), ("\x00\xff", "JSON"),
     ('{"peft_type": "LORA", "lora_alpha": NaN}', "lora_alpha is nan"), ('{"r": ' + "9" * 5000 + "}", "JSON")],
    ids=range(6),
)  # fmt: skip
def test_configurations_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a", SMALL)
    (folder / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(AdapterError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.popitem(), "file at byte"),
        (lambda header: header[f"base_model.model.{Q}.lora_A.weight"].update(shape=[0, 64]), "takes 0"),
        (lambda header: header[f"base_model.model.{Q}.lora_A.weight"].update(shape=[1 << 40, 1 << 40]), "elements"),
        (lambda header: header[f"base_model.model.{Q}.lora_A.weight"].update(dtype="I32"), "type I32; allowed are F32"),
        (lambda header: header.update(
            {Q + ".lora_A.weight": header.pop(f"base_model.model.{Q}.lora_B.weight"),}), "with and without"),
        (lambda header: header.clear(), "file at byte"),
    ],
)  # fmt: skip
def test_headers_that_lie(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        read_adapter(rewritten(write_adapter(tmp_path / "a", SMALL), change))


@pytest.mark.parametrize("format", ["peft", "gguf"])
def test_a_header_has_fewer_bytes_than_a_models(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_adapter(tmp_path / "a", SMALL) if format == "peft" else write_gguf_lora(tmp_path / "a.gguf")
    read_adapter(path).close()
    monkeypatch.setattr(adapters, "MAX_HEADER_BYTES", 100)
    with pytest.raises(AdapterError, match=r"at most 100 are allowed|header limit of 100 bytes"):
        read_adapter(path)


def test_an_adapter_without_tensors_does_nothing(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="holds no tensors"):
        read_adapter(write_adapter(tmp_path / "a", {}))


def test_a_link_is_followed_and_anything_but_a_file_is_not(tmp_path: Path, base: AdapterBase) -> None:
    """A hub's cache is made of links; what a folder may hold is for those who let it in."""
    folder = write_adapter(tmp_path / "a", SMALL)
    weights = folder / "adapter_model.safetensors"
    (tmp_path / "blob").write_bytes(weights.read_bytes())
    weights.unlink()
    weights.symlink_to(tmp_path / "blob")
    assert fitted(folder, base).deltas
    for target in ("/dev/zero", str(tmp_path)):
        weights.unlink()
        weights.symlink_to(target)
        with pytest.raises(ModelNotFoundError):
            read_adapter(folder)


def test_damaged_bytes_are_an_error_or_an_adapter(tmp_path: Path, base: AdapterBase) -> None:
    """Whatever a byte becomes, it stays an adapter, or an `AdapterError` names the folder."""
    folder, rng, outcomes = write_adapter(tmp_path / "a", SMALL), random.Random(3), set[type]()
    files = {name: (folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    for _ in range(150):
        name = rng.choice(list(files))
        data = bytearray(files[name])
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        (folder / name).write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            outcomes.add(type(fitted(folder, base)))
        except AdapterError as error:
            outcomes.add(AdapterError if str(folder) in str(error) else type(None))
        (folder / name).write_bytes(files[name])
    assert outcomes == {AdapterError, FittedAdapter}


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def write_gguf_lora(path: Path, architecture: str = "llama", kind: str = "F32", **more: Any) -> Path:
    """An adapter of a query matrix of the toy model, whose rows stand in pairs as in its file."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, architecture)
    for key, value in ({"general.type": "adapter", "adapter.type": "lora"} | more.pop("texts", {})).items():
        writer.add_string(key, value)
    writer.add_float32("adapter.lora.alpha", more.pop("alpha", 16.0))
    for key, values in more.pop("arrays", {}).items():
        writer.add_array(key, values)
    for name, shape in more.pop("tensors", {"blk.0.attn_q.weight": ((32, 64), (64, 32))}).items():
        for half, size in zip("ab", shape):
            values = rng.standard_normal(size, np.float32)
            quantised = quants.quantize(values, GGMLQuantizationType[kind])
            writer.add_tensor(f"{name}.lora_{half}", quantised, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_gguf_adapters_of_every_type(kind: str, tmp_path: Path, base: AdapterBase) -> None:
    path = write_gguf_lora(tmp_path / "a.gguf", kind=kind, arrays={"adapter.alora.invocation_tokens": [5, 7]})
    of_file = base_of(write_toy_gguf(tmp_path / "toy.gguf", quantization="Q8_0"))
    with read_adapter(path) as stored:
        assert isinstance(stored, StoredAdapter)
        b = stored.tensors["blk.0.attn_q.weight.lora_b"].load("F32")
        in_halves = b.reshape(4, 8, 2, 32).swapaxes(1, 2).reshape(64, 32)
        for each in (base, of_file):
            found = fit_adapter(stored, each)
            delta = found.deltas["layers.0.attention.qkv"]["q."]
            assert (found.alora, delta.scale, delta.rank) == ((5, 7), 0.5, 32)
            assert delta.b is not None
            np.testing.assert_array_equal(delta.b.load("F32"), in_halves)


def test_a_gguf_adapter_without_alpha_has_the_scale_1(tmp_path: Path, base: AdapterBase) -> None:
    with read_adapter(write_gguf_lora(tmp_path / "a.gguf", alpha=0.0)) as stored:
        assert fit_adapter(stored, base).deltas["layers.0.attention.qkv"]["q."].scale == 1
        assert stored.config.notes == ("adapter.lora.alpha is missing or 0: the scale is 1",)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"architecture": "qwen2"}, "general.architecture is 'qwen2'.*llama"),
        ({"texts": {"general.type": "model"}}, "general.type is 'model'"),
        ({"texts": {"adapter.type": "control"}}, "adapter.type is 'control'"),
        ({"kind": "Q4_0"}, "type Q4_0; allowed are"),
        ({"tensors": {"blk.9.attn_q.weight": ((32, 64), (64, 32))}}, "no module 'blk.9"),
        ({"tensors": {"blk.0.attn_q.weight": ((32, 64),)}}, "one of the two LoRA matrices"),
        ({"tensors": {"blk.0.attn_norm.weight": ((32, 64), (64, 32))}}, "norm"),
        ({"tensors": {"blk.0.attn_q.weight": ((32, 64), (32, 32))}}, "has 32 rows"),
    ],
)
def test_gguf_adapters_that_are_none(more: dict[str, Any], message: str, tmp_path: Path, base: AdapterBase) -> None:
    path = write_gguf_lora(tmp_path / "a.gguf", **more)
    with pytest.raises(AdapterError, match=message), read_adapter(path) as stored:
        fit_adapter(stored, base)


def test_a_file_that_is_written_to_while_it_is_open_is_what_it_was(tmp_path: Path) -> None:
    path = write_gguf_lora(tmp_path / "a.gguf")
    with read_adapter(path) as stored:
        before = {name: tensor.load("F32") for name, tensor in stored.tensors.items()}
        path.write_bytes(b"")  # as cp begins; a page of a mapped file would be a SIGBUS now
        for name, tensor in stored.tensors.items():
            assert np.array_equal(tensor.load("F32"), before[name])


def test_a_gguf_adapter_in_parts_is_refused(tmp_path: Path) -> None:
    path = write_gguf_lora(tmp_path / "a-00001-of-00002.gguf")
    with pytest.raises(AdapterError, match="one file"):
        read_adapter(path)


def test_every_matrix_of_the_toy_is_reached(tmp_path: Path, base: AdapterBase) -> None:
    shapes = linear_shapes(base.config) | {"lm_head": (272, 64)}
    with read_adapter(write_adapter(tmp_path / "a", shapes, dtype="BF16")) as stored:
        found, product = fit_adapter(stored, base), 0.0
        for each in found.deltas.values():
            for delta in each.values():
                assert delta.a is not None
                assert delta.b is not None
                product += float(np.linalg.norm(delta.scale * (delta.b.load() @ delta.a.load())) ** 2)
    assert found.norm == pytest.approx(math.sqrt(product), rel=1e-5)
    assert {path for path in found.deltas if path.startswith("layers.0")} == {
        f"layers.0.{name}" for name in ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")
    }
    assert len(found.deltas) == 9
    assert found.nbytes == sum(2 * 8 * sum(shape) for shape in shapes.values())
