# SPDX-License-Identifier: MIT
"""Build an engine's runner on a GPU, and plan its memory.

The largest steps run over a cache of one block: first without their kernels, which are compiled in parallel during this
run, then with them. Their peak memory is reserved; the cache gets its share of the memory that is still free.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.config import CACHE_TYPES, EngineConfig, draft_settings
from candle_vllm.core.devices import Device, give_back, leave_cores_to_others
from candle_vllm.core.engine.runners.device_inputs import DeviceLimits
from candle_vllm.core.engine.runners.device_runner import MOST_CAPTURED, DeviceRunner
from candle_vllm.core.errors import ConfigError, NoMemoryError, refuse_settings
from candle_vllm.core.kernels.attention.backend import AttentionNeeds
from candle_vllm.core.kernels.attention.backends import choose, choose_latent
from candle_vllm.core.kernels.collectives import Collective
from candle_vllm.core.kernels.device_stream import CudaStream, DeviceStream, Work
from candle_vllm.core.kernels.latent_attention.reference import score_bytes
from candle_vllm.core.kernels.moe.host import HostExperts
from candle_vllm.core.kernels.torch_numbers import NAMES
from candle_vllm.core.kernels.triton_build import capability, compile_together
from candle_vllm.core.layers.adapters import number_places
from candle_vllm.core.layers.moe import mixtures_of
from candle_vllm.core.loading.cache_specs import paged
from candle_vllm.core.memory import MIB, CachePlan, Room, agreed_plan, device_element_bytes, plan_cache
from candle_vllm.core.threads import default_threads

if TYPE_CHECKING:
    from candle_vllm.core.kernels.lora.device import DeviceAdapters

logger = logging.getLogger(__name__)

_SLOTS = 8  # default number of LoRA slots
_USUAL_RANK = 64  # memory is reserved for adapters of at most this rank in all slots
_GRAPH_BYTES = 8 * MIB  # upper estimate of the memory of a captured step without its tensors
_SLACK = 128 * MIB  # memory for kernel modules, a cuBLAS workspace for each thread, and fragmentation


def build_on_gpu(
    config: EngineConfig,
    loaded: LoadedModel,
    budget: int,
    sequences: int,
    share: float,
    draft_rows: int = 0,
    ranks: Collective | None = None,
) -> tuple[DeviceRunner, CachePlan]:
    """Build the runner, allocate its cache and capture its steps; return it with the plan of the cache.

    `share` is the default of `kv_fraction`, `draft_rows` the maximum number of draft tokens of a step. All `ranks` call
    this at the same time. It raises ConfigError if the settings do not fit this model, GPU or memory.
    """
    device, model = loaded.placement.device, loaded.decoder.config
    _refuse_unsupported(config, loaded)
    select = choose if model.latent is None else choose_latent
    backend = select(config.attention_backend, _needs(config, loaded))
    if model.index is not None:  # the host waits for chosen positions, so such a step cannot be captured
        backend = dataclasses.replace(backend, capturable=False, note="an index chooses positions in torch")
    if backend.note:
        logger.info("attention by %s: %s", backend.name, backend.note)
    graphs = config.cuda_graphs and backend.capturable and not config.op_by_op
    if config.cuda_graphs and not backend.capturable:
        logger.warning(
            "steps are not captured as CUDA graphs with attention by %s: %s",
            backend.name,
            backend.note or "it does not support them",
        )
    if config.max_cudagraph_capture_size and not (graphs and backend.mixed):
        raise ConfigError(
            "max_cudagraph_capture_size needs CUDA graphs and the attention backend triton: leave it at 0, or leave "
            "out the setting that excludes them (cuda_graphs=False, op_by_op=True, attention_backend)",
            "max_cudagraph_capture_size",
        )
    dtype, row_scales = _cache_type(config, loaded)
    rows = sequences + draft_rows
    width, chunks = -(-model.max_position // config.block_size), not config.deterministic
    limits = DeviceLimits(budget, rows, width, config.block_size, chunks=chunks)
    stream = CudaStream(device)
    give_back()
    try:
        loaded.decoder.prepare(model.max_position)
        turning = loaded.turning(budget)
        host = host_experts(config, loaded, stream, budget)
        adapters, adapter_bytes = _adapters(config, loaded, stream, rows) if config.enable_lora else (None, 0)
        runner = DeviceRunner(
            loaded.decoder,
            limits,
            stream,
            dtype,
            attend=backend.attend,
            graphs=graphs,
            finite_cache=backend.finite_cache,
            captured_prompts=config.max_cudagraph_capture_size,
            # ranks that do not sample need the sampled tokens; a host that computes experts is busy within a step
            overlaps=not draft_rows and ranks is None and host is None,
            adapters=adapters,
            host=host,
            row_scales=row_scales,
            turning=turning,
            state_dtype=loaded.placement.torch_dtype,
        )
        steps = runner.largest_steps()
        compile_together(lambda: _pass(steps, stream), device)
        _, *peaks = [_peak(work, stream) for work in steps]
    except torch.OutOfMemoryError as error:
        raise _too_little(budget, sequences, device) from error
    aside = sum(peaks) + runner.edit_bytes + runner.num_graphs * _GRAPH_BYTES + _SLACK + adapter_bytes
    # The measured prompt has one query at the end of the longest context; more queries take more memory for scores.
    scores = 0 if model.index is None else score_bytes(model.index.heads, model.max_position // model.index_pool)
    aside += scores
    if loaded.tower is not None:
        aside += loaded.tower.tower.config.step_bytes(1)  # encoding the largest image
    free, total = torch.cuda.mem_get_info(device)
    if aside >= free:
        raise _too_little(budget, sequences, device)
    kept = f" beside {torch.cuda.memory_allocated(device) // MIB} MiB of weights and {aside // MIB} MiB for steps"
    room = Room(free - aside, share, kept, total=total)
    element_bytes = device_element_bytes(config, loaded.placement.torch_dtype.itemsize)
    drafts = draft_settings(config.speculative_config) if draft_rows else None
    most = 0 if drafts is None else drafts.num_speculative_tokens
    flying = max(runner.in_flight, 1 + runner.overlaps)  # maximum number of steps whose blocks are not published yet
    beside: dict[str, Any] = {"layers": loaded.layers, "drafts": most, "rows": budget * flying}
    plan = agreed_plan(
        lambda pools: plan_cache(config, model, element_bytes, sequences, room, pools=pools, **beside), ranks
    )
    plan = dataclasses.replace(plan, index_bytes=scores)
    logger.info(plan.message)
    if plan.warning:
        logger.warning(plan.warning)
    try:
        runner.allocate(plan.num_blocks, plan.states, plan.windows)
    except torch.OutOfMemoryError as error:
        size = plan.num_bytes // MIB
        raise NoMemoryError(
            f"a KV cache of {size} MiB leaves too little of the GPU's memory for captured steps: set "
            f"kv_cache_memory={size * 3 // 4 * MIB} (bytes), or a smaller `kv_fraction`, or cuda_graphs=False",
            "kv_cache_memory",
        ) from error
    return runner, plan


def _refuse_unsupported(config: EngineConfig, loaded: LoadedModel) -> None:
    """Refuse cache types of the CPU, and `deterministic` for a model whose sums on a GPU depend on the step."""
    refuse_settings(
        ("kv_cache_dtype", CACHE_TYPES[config.kv_cache_dtype].device == "cpu",
         f"kv_cache_dtype={config.kv_cache_dtype!r} is for the CPU: on a GPU set 'int8_per_token_head', which has the "
         "size of q8_0, or leave it out"),
        ("kv_cache_dtype", config.kv_cache_dtype != "auto" and loaded.decoder.config.compresses,
         f"kv_cache_dtype={config.kv_cache_dtype!r} is not supported with compressed entries or chosen blocks: leave "
         "it out"),
        *((name, getattr(config, name) is not None,
           f"on a GPU keys and values have one type: leave {name} out, or set kv_cache_dtype for both")
          for name in ("key_cache_dtype", "value_cache_dtype")),
        ("deterministic", config.deterministic and loaded.decoder.config.index is not None,
         f"deterministic: on a GPU, the indexer of {loaded.name} depends on the prompt's chunks; leave it out"),
        ("deterministic", config.deterministic and loaded.vision is not None and loaded.vision.parts.whole,
         f"deterministic: tokens of an image attend to each other in {loaded.name}, and their sums on a GPU depend on "
         "the rest of the step: set max_images=0, or leave 'deterministic' out"),
    )  # fmt: skip


def _cache_type(config: EngineConfig, loaded: LoadedModel) -> tuple[torch.dtype, bool]:
    """Return the element type of the cache, and whether each row has its own scales."""
    kind = CACHE_TYPES[config.kv_cache_dtype]
    dtype = getattr(torch, kind.element) if kind.element else loaded.placement.torch_dtype
    if kind.row_scales and dtype == torch.float8_e4m3fn and capability(loaded.placement.device) < 89:
        dtype = torch.uint8  # the bits of the floats, because the GPU has no float8 type
    return dtype, kind.row_scales


def adapter_slots(config: EngineConfig) -> int:
    """Return the number of LoRA slots on a GPU, which is the maximum number of adapters of a step."""
    return config.max_loras or _SLOTS


def _adapters(config: EngineConfig, loaded: LoadedModel, stream: DeviceStream, rows: int) -> tuple[DeviceAdapters, int]:
    """Build the adapters' slots on the device; return them with the bytes reserved for them."""
    from candle_vllm.core.kernels.lora.device import DeviceAdapters

    dtype, slots, rank = loaded.placement.torch_dtype, adapter_slots(config), config.max_lora_rank
    if config.lora_dtype not in ("auto", NAMES[dtype].lower()):
        raise ConfigError(
            f"lora_dtype {config.lora_dtype!r}: on a GPU adapters are multiplied in the type of activations, here "
            f"{NAMES[dtype].lower()}: leave it out, or set dtype",
            "lora_dtype",
        )
    places = [place for of in number_places(loaded.decoder).values() for place in of]
    products = [place for place in places if not (place.lookup or place.experts)]
    sizes = sum(place.columns * len(place.parts) + max(end for _, _, end in place.parts.values()) for place in products)
    room = slots * min(rank, _USUAL_RANK) * sizes * dtype.itemsize
    most, flying = min(rows, MOST_CAPTURED), config.pipeline_parallel_size
    adapters = DeviceAdapters(stream, places, dtype, slots=slots, rank=rank, rows=most, memory=room, in_flight=flying)
    number_places(loaded.decoder, adapters)
    return adapters, room


def host_experts(config: EngineConfig, loaded: LoadedModel, stream: DeviceStream, tokens: int) -> HostExperts | None:
    """Build the computation of experts in main memory, and connect their layers to it; None without such experts."""
    if loaded.split is None or loaded.split.host is None:
        return None
    decoder: Any = loaded.decoder
    there = [each for number, each in mixtures_of(decoder.layers).items() if number < loaded.split.experts]
    memory = loaded.split.host.weight_memory
    ranks = None if memory is None else memory.ranks
    leave_cores_to_others()
    size, experts = there[0].sizes
    host = HostExperts(
        stream,
        [each.record_experts for each in there],
        size=size,
        experts=experts,
        tokens=tokens,
        dtype=loaded.placement.torch_dtype,
        threads=(config.threads or default_threads()) if ranks is None else ranks.threads,
        ranks=ranks,
    )
    for each, layer in zip(there, host.layers, strict=True):
        each.elsewhere = layer
    return host


def _needs(config: EngineConfig, loaded: LoadedModel) -> AttentionNeeds:
    model, placement = loaded.config, loaded.placement
    return AttentionNeeds(
        capability=(capability(placement.device) // 10, capability(placement.device) % 10),
        dtype=placement.torch_dtype,
        head_dim=max((spec.key_dim for spec in paged(model.cache_specs)), default=model.head_dim),
        block_size=config.block_size,
        chunks=getattr(model, "chunked", False),
        soft_caps=model.attention_softcap is not None,
        sinks=model.attention_sinks,
        slopes=bool(model.slopes) or model.relative_logits,
        cache_dtype=config.kv_cache_dtype,
        deterministic=config.deterministic,
    )


def _pass(steps: Sequence[Work], stream: DeviceStream) -> None:
    for work in steps:
        work()
    stream.mark().wait()


def _peak(work: Work, stream: DeviceStream) -> int:
    """Return the peak bytes that work allocates in addition to earlier allocations."""
    device = stream.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    work()
    stream.mark().wait()
    peak = torch.cuda.max_memory_reserved(device) - before
    torch.cuda.empty_cache()
    return max(0, peak)


def _too_little(budget: int, sequences: int, device: Device) -> NoMemoryError:
    free, total = (size // MIB for size in torch.cuda.mem_get_info(device))
    ways = []
    if budget > sequences:
        ways.append(f"max_num_batched_tokens={max(sequences, budget // 4)}")
    if sequences > 1:
        ways.append(f"max_num_seqs={max(1, sequences // 4)}")
    ways.append("a smaller model, or one with fewer bits")
    return NoMemoryError(
        f"the GPU's memory is too small for steps of {budget} tokens and {sequences} sequences beside the weights: "
        f"{free} of {total} MiB are free; try {' or '.join(ways)}",
        "max_num_batched_tokens",
    )
