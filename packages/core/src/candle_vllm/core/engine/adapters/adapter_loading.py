# SPDX-License-Identifier: MIT
"""Load adapters from files and pack them for a model's steps, in the adapter store's thread.

An adapter is read, matched with the base model's matrices (fitted), and packed. Adapters of one kind, such as all from
one training script, differ only in the values of elements: with compiled kernels, the packing of the second adapter of
a kind is recorded, and replayed for it and for later ones (`Repacking`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from candle_vllm.core.assembly.adapter_base import AdapterBase, adapter_base
from candle_vllm.core.assembly.adapters import fit_adapter
from candle_vllm.core.assembly.encoder import LoadedEncoder
from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.adapters.adapter_store import LoadedAdapter
from candle_vllm.core.engine.ranks.ranks import RankedRunner
from candle_vllm.core.engine.requests import MAX_ADAPTERS
from candle_vllm.core.engine.runners.model_runner import ModelRunner
from candle_vllm.core.errors import ConfigError
from candle_vllm.core.layers.adapters import number_places
from candle_vllm.core.loading.adapters import AdapterLimits, StoredAdapter, open_adapter
from candle_vllm.core.loading.source import model_files
from candle_vllm.core.models.jina_tasks import task_adapter

if TYPE_CHECKING:
    from candle_vllm.core.kernels.lora import FittedAdapter, PackedAdapter, Place
    from candle_vllm.core.kernels.lora.pack import Changes
    from candle_vllm.core.kernels.lora.repacking import Repacking
    from candle_vllm.core.quantization.tensors import StoredTensor

_MOST_PACKED = {"F32": 2, "BF16": 2, "I8": 4}  # maximum file bytes for each byte of adapter memory, by packed dtype
MOST_SEEN = 1 << 23  # maximum number of recorded element positions of all kinds
_MOST_MET = 256  # maximum number of kinds whose adapters are counted

Watch = Callable[["FittedAdapter", Collection["StoredTensor"]], "Repacking | None"]


def adapter_limits(config: EngineConfig, loaded: LoadedModel | LoadedEncoder) -> dict[str, Any]:
    """Return the fields of `StepLimits` for adapters on the CPU or of an encoder; raise ConfigError for lora_dtype f16.

    "auto" means int8 if the base model's compiled kernels use int8 products too, because the error of these products is
    many times larger than an int8 adapter's; float32 if the model's matrices are float32; else bfloat16.
    """
    dtype = config.lora_dtype.upper()
    if dtype == "F16":
        raise ConfigError("lora_dtype 'f16' is for decoders on a GPU: set bf16, f32 or int8", "lora_dtype")
    if dtype == "AUTO" and loaded.placement.recorded and loaded.dtype.startswith("int8"):
        dtype = "I8"
    elif dtype == "AUTO":
        dtype = "F32" if loaded.dtype.startswith("f32") else "BF16"
    dtype = "I8" if dtype == "INT8" else dtype
    return {"adapter_rank": config.max_lora_rank, "adapter_dtype": dtype, "row_adapters": MAX_ADAPTERS}


def _places(loaded: LoadedModel | LoadedEncoder) -> Mapping[str, tuple[Place, ...]]:
    return number_places(loaded.encoder if isinstance(loaded, LoadedEncoder) else loaded.decoder)


def adapter_packer(
    config: EngineConfig, loaded: LoadedModel | LoadedEncoder, runner: ModelRunner
) -> Callable[[FittedAdapter], PackedAdapter]:
    """Return a function that packs fitted adapters for a model's steps, in any thread; see `pack_adapter`."""
    from candle_vllm.core.kernels.lora.pack import pack_adapter

    places, on_gpu = _places(loaded), loaded.placement.device.type == "cuda"
    if on_gpu and isinstance(loaded, LoadedModel):
        from candle_vllm.core.engine.runners.device_runner import DeviceRunner

        assert isinstance(runner, DeviceRunner)
        assert runner.adapters is not None
        return partial(pack_adapter, places=places, dtype="BF16", compiled=False, packed=runner.adapters.packed)
    dtype = adapter_limits(config, loaded)["adapter_dtype"]
    if on_gpu:  # an encoder is not captured: torch runs its operations one by one
        from candle_vllm.core.kernels.lora.device import refuse_experts
        from candle_vllm.core.kernels.lora.reference import TorchAdapter

        def packed(found: Changes) -> TorchAdapter:
            refuse_experts(found)
            return TorchAdapter(found, dtype, loaded.placement.device)

        return partial(pack_adapter, places=places, dtype=dtype, compiled=False, packed=packed)
    return partial(pack_adapter, places=places, dtype=dtype, compiled=loaded.placement.recorded)


def adapter_loader(
    config: EngineConfig, loaded: LoadedModel | LoadedEncoder, runner: ModelRunner, memory: int
) -> Callable[[Path], LoadedAdapter]:
    """Return a function for one thread that loads an adapter; the bytes of all adapters, `memory`, limit its file."""
    dtype = "BF16" if loaded.placement.device.type == "cuda" else adapter_limits(config, loaded)["adapter_dtype"]
    limits = AdapterLimits(max_rank=config.max_lora_rank, max_bytes=_MOST_PACKED[dtype] * memory)
    watch: Watch | None = None
    if loaded.placement.recorded:
        from candle_vllm.core.kernels.lora.repacking import repacking_of

        watch = partial(repacking_of, places=_places(loaded), dtype=dtype, most=MOST_SEEN)
    ranks = runner if isinstance(runner, RankedRunner) else None
    pack = adapter_packer(config, loaded, runner if ranks is None else ranks.own)
    if isinstance(loaded, LoadedModel) and (shard := loaded.shard) is not None:
        whole = pack
        pack = lambda fitted: whole(shard.cut_adapter(fitted))  # noqa: E731
    load = AdapterLoader(adapter_base(model_files(config), config), limits, pack, watch)
    return load if ranks is None else partial(_on_all, load, ranks)


def _on_all(load: Callable[[Path], LoadedAdapter], ranks: RankedRunner, path: Path) -> LoadedAdapter:
    """Load an adapter's parts on every rank; raises the errors of `AdapterLoader`."""
    number = ranks.load_adapter(path)
    try:
        found = load(path)
    except BaseException:
        ranks.adapter_is_loaded(number, None)
        raise
    ranks.adapter_is_loaded(number, found.packed)
    return found


class AdapterLoader:
    """Loads adapters one after the other.

    `pack` packs a fitted adapter for steps. `watch` records how adapters of a kind are packed; without it, each adapter
    is packed without a record.
    """

    def __init__(
        self,
        base: AdapterBase,
        limits: AdapterLimits,
        pack: Callable[[FittedAdapter], PackedAdapter],
        watch: Watch | None,
    ) -> None:
        self._base, self._limits, self._pack, self._watch = base, limits, pack, watch
        self._known: dict[bytes, Repacking] = {}  # by kind, least recently used first
        self._met: dict[bytes, int] = {}  # number of adapters of each kind that were fitted without a `Repacking`

    def __call__(self, path: Path) -> LoadedAdapter:
        """Load the adapter at a path; raises the errors of `open_adapter`, `fit_adapter` and `pack_adapter`."""
        with task_adapter(path, self._limits) or open_adapter(path, self._limits) as stored:
            copied = self._copied(stored)
            packed, notes = self._packed(stored) if copied is None else (copied, ())
            return LoadedAdapter(packed, stored.config.base, (*stored.config.notes, *notes))

    def _copied(self, stored: StoredAdapter) -> PackedAdapter | None:
        """Pack an adapter of a known kind; return None for an unknown kind, or if its elements are not valid."""
        known = self._known.pop(stored.kind, None) if stored.kind is not None else None
        if known is None or stored.kind is None:
            return None
        self._known[stored.kind] = known
        return known.pack(stored.data, stored.digest)

    def _packed(self, stored: StoredAdapter) -> tuple[PackedAdapter, tuple[str, ...]]:
        fitted, kind = fit_adapter(stored, self._base), stored.kind
        if self._watch is not None and kind is not None and kind not in self._known:
            met = self._met.pop(kind, 0) + 1
            self._met[kind] = met
            if len(self._met) > _MOST_MET:
                del self._met[next(iter(self._met))]
            if met == 2 and (seen := self._watch(fitted, stored.tensors.values())) is not None:
                self._keep(kind, seen)
                return self._copied(stored) or self._pack(fitted), fitted.notes
        return self._pack(fitted), fitted.notes

    def _keep(self, kind: bytes, seen: Repacking) -> None:
        self._known[kind] = seen
        while len(self._known) > 1 and sum(each.size for each in self._known.values()) > MOST_SEEN:
            gone = next(iter(self._known))
            del self._known[gone]
            self._met.pop(gone, None)  # recorded again with the second adapter from now on
