# SPDX-License-Identifier: MIT
"""Loads a catalogue entry: checks the free memory, starts the engine, builds the API adapters and the admission.

Runs before step 1 of a request's life, mostly in a thread that the model switcher starts. The functions import the
engine when they are called, because the import takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from candle_vllm.core.config import SETTINGS, demo_model
from candle_vllm.core.errors import NoMemoryError
from candle_vllm.openai import OpenAIAdapter
from candle_vllm.openai.anthropic import MessagesAdapter
from candle_vllm.openai.ollama import OllamaAdapter
from candle_vllm.server.adapters.registry import Adapters, BaseAdapters
from candle_vllm.server.batches.service import stored_image
from candle_vllm.server.http.routing import owned_salt
from candle_vllm.server.models.admission import Admission
from candle_vllm.server.models.slot import ServedModel
from candle_vllm.server.models.switcher import NoRoomError
from candle_vllm.server.observing.metrics import Metrics
from candle_vllm.server.observing.model_metrics import EngineWatcher, ServedEngine
from candle_vllm.server.observing.series import IMAGE_FETCHES
from candle_vllm.server.settings.catalogue import ModelEntry, source_name
from candle_vllm.server.settings.derived import engine_config, image_sources, thinking_settings, told_in_flags
from candle_vllm.server.settings.table import ModelOptions

if TYPE_CHECKING:
    from candle_vllm.core import EngineConfig
    from candle_vllm.core.devices import Device
    from candle_vllm.core.vision.fetching import ImageSources

MIB = 1 << 20
WORKSPACE = 256 * MIB  # memory that a step needs besides weights and cache
LEAST_CACHE = 256 * MIB  # smallest useful KV cache
CACHE_SHARE = 0.4  # share of a KV cache in the memory that other models, the weights and the workspace leave free
BESIDE_CAPACITY = 8  # for every 8 of `max_num_seqs`, one more sequence may be in the engine


class ModelLoader:
    """Loads models for the manager.

    `start_engine` creates an engine from its configuration; None selects one according to the settings. `images` has
    the allowed sources of images for all models; None uses each model's settings.
    """

    def __init__(
        self,
        metrics: Metrics,
        start_engine: Callable[[EngineConfig], ServedEngine] | None = None,
        adapters: Adapters | None = None,
        images: ImageSources | None = None,
    ) -> None:
        self._metrics = metrics
        self._adapters = adapters
        self._start_engine = start_engine
        self._images = images

    def check(self, entry: ModelEntry, beside: Sequence[ServedModel]) -> None:
        """Find or download the model's files, read their headers, and compare their size with the memory.

        ConfigError, ModelNotFoundError or ModelLoadError if the model cannot be served even without other models.
        """
        if self._start_engine is None:
            check_model(entry.settings, beside)

    def __call__(self, entry: ModelEntry, beside: Sequence[ServedModel]) -> ServedModel:
        config = engine_config(entry.settings, **room_beside(entry.settings, beside) if beside else {})
        start = self._start_engine or (remote_engine if entry.settings.has_own_process else local_engine)
        with told_in_flags():
            engine = start(config)
        return serve_engine(engine, entry, self._metrics, self._adapters, self._images)


def serve_engine(
    engine: ServedEngine, entry: ModelEntry, metrics: Metrics, adapters: Adapters | None = None,
    images: ImageSources | None = None,
) -> ServedModel:  # fmt: skip
    """Build the served model of an engine, which is closed if this fails; `images` as in `ModelLoader`."""
    settings, info, name = entry.settings, engine.model_info, entry.names[0]
    admission = Admission(
        # the sequences of a full step, and a few that wait in the engine, so that every step is full
        info.max_num_seqs + -(-info.max_num_seqs // BESIDE_CAPACITY),
        settings.max_queued_requests or SETTINGS["max_queued_requests"].default,
        settings.max_queued_per_key,
        lambda reason: metrics.refused(name, reason),
    )
    watcher = EngineWatcher(engine, metrics.model(name, info.max_model_len), lambda: admission.waiting)
    try:
        adapter = OpenAIAdapter(
            engine,
            served_model_names=entry.names,
            strict_model_names=settings.strict_model_names or settings.enable_lora,
            allow_priority=settings.enable_request_priority,
            allow_chat_template=settings.trust_request_chat_template,
            tool_parser=settings.tool_parser,
            reasoning_parser=settings.reasoning_parser,
            **thinking_settings(settings),
            watcher=watcher,
            salted=owned_salt,
            adapters=BaseAdapters(adapters, entry.name) if adapters is not None and settings.enable_lora else None,
            images=images or image_sources(settings, stored_image, partial(metrics.count, IMAGE_FETCHES)),
        )
    except BaseException:
        watcher.close()
        engine.close()
        raise
    return ServedModel(
        entry=entry,
        engine=engine,
        watcher=watcher,
        adapter=adapter,
        messages=MessagesAdapter(adapter, sampling_defaults=settings.default_sampling),
        ollama=OllamaAdapter(adapter, sampling_defaults=settings.default_sampling),
        admission=admission,
        memory=info.weight_bytes + info.kv_cache_bytes + info.index_bytes,
    )


def local_engine(config: EngineConfig) -> ServedEngine:
    """Start an engine in a thread of this process."""
    from candle_vllm.core import InferenceEngine

    return InferenceEngine(config)


def remote_engine(config: EngineConfig) -> ServedEngine:
    """Start an engine in its own process, or several, each in its own process."""
    from candle_vllm.core.remote import RemoteEngine, ReplicatedEngine

    return (ReplicatedEngine if config.data_parallel_size > 1 else RemoteEngine)(config)


def check_model(settings: ModelOptions, beside: Sequence[ServedModel]) -> None:
    """Raise the errors that can be found without reading the weights, before other models are unloaded for this one."""
    from candle_vllm.core.assembly.draft import find_draft
    from candle_vllm.core.assembly.opening import open_model
    from candle_vllm.core.devices import CPU, choose_device
    from candle_vllm.core.loading.source import model_files
    from candle_vllm.core.memory import free_memory

    config = engine_config(settings)
    files = model_files(config)
    find_draft(config)
    open_model(files, CPU).checkpoint.close()
    # The weights of a GPU's model are divided among GPUs, and offloaded where they do not fit.
    if not beside or (device := choose_device(config.device)).type != "cpu":
        return
    copies, weights, cache = _sizes(config, device)
    need, most = copies * (weights + WORKSPACE + cache), free_memory(device) + held_by(beside, device)
    if need > most:
        advice = "lower --mem, or " if cache and config.kv_cache_memory else ""
        raise NoMemoryError(
            f"{source_name(settings, demo_model())} needs {need // MIB} MiB, and {most // MIB} MiB would be left "
            f"without any other model: {advice}choose a smaller quantisation"
        )


def held_by(models: Sequence[ServedModel], device: Device) -> int:
    """Return the bytes that unloading these models frees on a device: on a CPU weights alone, as caches are lazy."""
    infos = [(model, model.engine.model_info) for model in models if device.type in model.engine.model_info.device]
    return sum(info.weight_bytes if device.type == "cpu" else model.memory for model, info in infos)


def room_beside(settings: ModelOptions, beside: Sequence[ServedModel]) -> dict[str, Any]:
    """Return changes of a model's configuration by which it fits beside loaded models; NoRoomError if it cannot fit.

    A CPU allocates caches only as they fill, so the full sizes of the caches of the models on it are subtracted from
    its free memory. On a GPU they are allocated already.
    """
    from candle_vllm.core.devices import choose_device
    from candle_vllm.core.memory import free_memory

    config = engine_config(settings)
    device = choose_device(config.device)
    copies, weights, cache = _sizes(config, device)
    infos = (model.engine.model_info for model in beside)
    promised = sum(info.kv_cache_bytes + info.index_bytes for info in infos if device.type == info.device == "cpu")
    free = free_memory(device) - promised
    need = copies * (weights + WORKSPACE + cache)
    if need > free:
        own = "this model or of " if cache and config.kv_cache_memory else ""
        raise NoRoomError(
            f"{source_name(settings, demo_model())} needs {need // MIB} MiB and {max(free, 0) // MIB} MiB are left "
            f"beside {len(beside)} loaded models (a smaller --mem of {own}the loaded models leaves more for this one)"
        )
    if config.kv_cache_memory is not None or device.type == "cuda" or not cache:
        return {}
    share = config.kv_fraction or CACHE_SHARE
    room = int((free / copies - weights - WORKSPACE) * share)
    return {"kv_cache_memory": max(LEAST_CACHE, room), "kv_fraction": None}


def _sizes(config: EngineConfig, device: Device) -> tuple[int, int, int]:
    """Return how many replicas share a device's memory, and the bytes of the weights and the least cache of each.

    The weights include those of a draft model. An encoder has no cache.
    """
    from candle_vllm.core.assembly.draft import draft_config
    from candle_vllm.core.assembly.encoder import is_encoder
    from candle_vllm.core.loading.source import model_files

    files, draft = model_files(config), draft_config(config)
    paths = [*files.weights, *(() if draft is None else model_files(draft).weights)]
    cache = 0 if is_encoder(files) else config.kv_cache_memory or LEAST_CACHE
    copies = config.data_parallel_size if device.type == "cpu" else 1
    return copies, sum(path.stat().st_size for path in paths), cache
