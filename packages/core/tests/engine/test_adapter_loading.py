# SPDX-License-Identifier: MIT
"""Adapters of one kind: those that are copied have what fitting and packing give them, and are refused as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from candle_vllm.core import AdapterError, EngineConfig
from candle_vllm.core.assembly.adapter_base import adapter_base
from candle_vllm.core.assembly.adapters import fit_adapter
from candle_vllm.core.assembly.model import load_model
from candle_vllm.core.devices import CPU, Device
from candle_vllm.core.engine.adapters import adapter_loading
from candle_vllm.core.engine.adapters.adapter_loading import AdapterLoader
from candle_vllm.core.kernels.lora import NumberType, PackedAdapter, Place
from candle_vllm.core.kernels.lora.pack import pack_adapter
from candle_vllm.core.kernels.lora.repacking import repacking_of
from candle_vllm.core.layers.adapters import number_places
from candle_vllm.core.loading.adapters import AdapterLimits, read_adapter
from candle_vllm.core.loading.safetensors import open_safetensors
from candle_vllm.core.loading.source import model_files
from candle_vllm.core.testing.toy_model import save_plain, toy_config, write_toy_model
from packages.core.tests.kernels.lora_field import contents, fitted, low_rank
from packages.core.tests.toy_adapter import ATTENTION, EVERY_LINEAR, write_adapter
from packages.core.tests.toy_gguf import write_toy_gguf


class Loading:
    """A model's loader, how often it looked at tensors one by one, and how it does without copying."""

    def __init__(self, model: Path, dtype: NumberType = "BF16") -> None:
        config = EngineConfig(model=str(model), enable_lora=True)
        loaded = load_model(config, CPU, lambda *_: None)
        places = number_places(loaded.decoder)
        self.model = loaded.config
        self.places: list[Place] = [place for each in places.values() for place in each]
        self.packed = 0
        self._base = adapter_base(model_files(config), config)
        self._pack = partial(pack_adapter, places=places, dtype=dtype, compiled=True)
        self._watch = partial(repacking_of, places=places, dtype=dtype, most=adapter_loading.MOST_SEEN)
        self.renew()

    def renew(self) -> None:
        """Nothing is known of any kind."""

        def counted(fitted: Any) -> PackedAdapter:
            self.packed += 1
            return self._pack(fitted)

        self.load = AdapterLoader(self._base, AdapterLimits(), counted, self._watch)
        self.packed = 0

    def plainly(self, folder: Path) -> PackedAdapter:
        with read_adapter(folder) as stored:
            return self._pack(fit_adapter(stored, self._base))

    def check(self, folders: list[Path], packed: int) -> None:
        """Loads each, which packs so many of them, and compares."""
        self.renew()
        for folder in folders:
            found, expected = self.load(folder).packed, self.plainly(folder)
            assert isinstance(found, PackedAdapter)
            assert contents(found, self.places) == contents(expected, self.places)
            assert found.norm == pytest.approx(expected.norm, rel=1e-4)
            for name in ("digest", "alora", "rank", "modules", "apart"):
                assert getattr(found, name) == getattr(expected, name), name
        assert self.packed == packed


each_type = pytest.mark.parametrize("dtype", ["BF16", "F32", "I8"])


@pytest.fixture(scope="module", params=["BF16", "I8"])
def loading(toy_model: Path, request: pytest.FixtureRequest) -> Loading:
    return Loading(toy_model, request.param)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows of queries and keys stand in pairs."""
    return write_toy_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", toy_config())


def written(folder: Path, loading: Loading, **given: Any) -> list[Path]:
    return [write_adapter(folder / str(seed), loading.model, seed=seed, **given) for seed in range(4)]


KINDS: list[dict[str, Any]] = [
    {"dtype": "BF16"},
    {"dtype": "F16", "rank": 3, "use_rslora": True, "alora_invocation_tokens": [3, 5]},
    {"dtype": "F32", "rank": 18, "targets": ATTENTION, "alpha_pattern": {r"layers\.1\..*": 3.0}},
    {"dtype": "BF16", "rank": 5, "targets": (*EVERY_LINEAR, "lm_head")},
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_adapter_is_what_packing_makes_of_it(kind: dict[str, Any], loading: Loading, tmp_path: Path) -> None:
    loading.check(written(tmp_path, loading, **kind), packed=1)


@each_type
def test_rows_in_pairs_are_copied_in_their_order(dtype: NumberType, gguf: Path, tmp_path: Path) -> None:
    loading = Loading(gguf, dtype)
    loading.check(written(tmp_path, loading, dtype="F32" if dtype == "F32" else "BF16", rank=6), packed=1)


@each_type
def test_fused_matrices_are_copied_in_parts(dtype: NumberType, toy_model: Path, tmp_path: Path) -> None:
    """Phi-3's files have one matrix, and one B, for queries, keys and values; one more for gate and up."""
    config = toy_config() | {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    folder = write_toy_model(tmp_path / "model", toy_config())
    with open_safetensors(toy_model) as checkpoint:
        found = {name: tensor.load() for name, tensor in checkpoint.tensors.items()}
    shapes: dict[str, tuple[int, int]] = {}
    for layer in ("model.layers.0.", "model.layers.1."):
        for fused, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
            kind = fused.partition(".")[0]
            rows = [found.pop(f"{layer}{kind}.{part}_proj.weight") for part in parts]
            found[f"{layer}{fused}_proj.weight"] = np.concatenate(rows)
            shapes[f"{layer}{fused}_proj"] = found[f"{layer}{fused}_proj.weight"].shape
    save_plain(folder / "model.safetensors", found, "F32")
    (folder / "config.json").write_text(json.dumps(config))
    folders = [write_adapter(tmp_path / str(seed), shapes, rank=7, seed=seed, dtype="F16") for seed in range(3)]
    Loading(folder, dtype).check(folders, packed=1)


def test_what_differs_in_a_key_or_a_shape_is_of_another_kind(loading: Loading, tmp_path: Path) -> None:
    """What only training needs, and the order of its lists, makes none."""
    write = partial(write_adapter, shapes=loading.model, rank=4)
    same = [
        write(tmp_path / f"same{seed}", seed=seed, lora_dropout=seed, target_modules=[str(seed)]) for seed in range(3)
    ]
    others = [
        write(tmp_path / "alpha", alpha=3.0), write(tmp_path / "rslora", use_rslora=True),
        write(tmp_path / "rank", rank=8), write(tmp_path / "type", dtype="F16"),
        write(tmp_path / "targets", targets=ATTENTION), write(tmp_path / "alora", alora_invocation_tokens=[1]),
    ]  # fmt: skip
    loading.check([*same, *others, *same], packed=1 + len(others))


def test_what_is_computed_is_packed_as_ever(loading: Loading, tmp_path: Path) -> None:
    """DoRA, biases and tables: norms of the base, sums with its biases."""
    name = "model.layers.0.self_attn.q_proj"
    table = {
        f"model.embed_tokens.lora_embedding_{half}": np.ones(size, np.float32)
        for half, size in (("A", (8, 272)), ("B", (64, 8)))
    }
    made = [
        {
            "use_dora": True,
            "tensors": {f"{name}.lora_magnitude_vector": np.ones(64, np.float32)},
            "targets": ("q_proj",),
        },
        {"bias": "all", "tensors": {f"{name}.bias": np.ones(64, np.float32)}},
        {"tensors": table},
    ]
    for number, given in enumerate(made):
        shapes = {name: (64, 64)} if number == 0 else loading.model
        folders = [write_adapter(tmp_path / f"{number}{seed}", shapes, seed=seed, **given) for seed in range(3)]
        loading.renew()
        for folder in folders:
            assert loading.load(folder).packed.digest == loading.plainly(folder).digest
        assert loading.packed == 3


def change(folder: Path, tensor: int, number: float) -> Path:
    """Puts a number into a file of float32, so many from its end."""
    path = folder / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4 * tensor : len(data) - 4 * tensor + 4] = np.float32(number).tobytes()
    path.write_bytes(data)
    return folder


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e30])
def test_numbers_that_are_not_finite_are_refused_as_of_a_first_one(
    number: float, loading: Loading, tmp_path: Path
) -> None:
    good, last = written(tmp_path, loading), tmp_path / "0"
    loading.renew()
    for folder in good:
        loading.load(folder)
    assert loading.packed == 1
    for place in (1, 1000):
        with pytest.raises(AdapterError) as expected:
            loading.plainly(change(last, place, number))
        with pytest.raises(AdapterError) as found:
            loading.load(last)
        assert str(found.value) == str(expected.value)
        change(last, place, 0.5)
    loading.load(last)


def test_large_numbers_that_may_stand_are_packed_one_by_one(loading: Loading, tmp_path: Path) -> None:
    folders = written(tmp_path, loading)
    change(folders[3], 7, 1e17)
    loading.check(folders, packed=2)


def test_a_damaged_file_of_a_known_kind_is_refused(loading: Loading, tmp_path: Path) -> None:
    folders = written(tmp_path, loading)
    loading.renew()
    for folder in folders:
        loading.load(folder)
    path = folders[0] / "adapter_model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-2], whole + b"12", whole[:7], whole[:100]):
        path.write_bytes(damaged)
        with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
            loading.load(folders[0])


def test_what_is_known_of_kinds_is_bounded(loading: Loading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_loading, "MOST_SEEN", 1)
    first, second = (written(tmp_path / str(rank), loading, rank=rank) for rank in (4, 8))
    loading.check([*first[:3], *second[:3], *first], packed=3)


def test_of_many_kinds_that_come_once_none_is_watched(loading: Loading, tmp_path: Path) -> None:
    watched: list[int] = []
    watch: Callable[..., Any] = lambda fitted, _: watched.append(fitted.rank)  # noqa: E731
    load = AdapterLoader(loading._base, AdapterLimits(), loading._pack, watch)
    for rank in (2, 3, 4, 5):
        load(write_adapter(tmp_path / str(rank), loading.model, rank=rank))
    assert watched == []
    for _ in range(3):
        load(tmp_path / "3")
    assert watched == [3]


def test_experts_of_an_encoder_on_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's kernels of experts add no adapters."""
    place = Place(0, 8, {"up.0.": (0, 0, 8)}, experts=1)
    monkeypatch.setattr(adapter_loading, "_places", lambda _: {"layers.0.mlp.experts": (place,)})
    encoder: Any = SimpleNamespace(placement=SimpleNamespace(device=Device("cuda"), recorded=False), dtype="bf16")
    pack = adapter_loading.adapter_packer(EngineConfig(model="toy"), encoder, SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match="changes experts"):
        pack(fitted({"layers.0.mlp.experts": {"up.0.": low_rank(np.random.default_rng(1), 8, 8, 2)}}))
