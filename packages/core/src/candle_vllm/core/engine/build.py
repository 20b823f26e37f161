# SPDX-License-Identifier: MIT
"""Build an engine from a loaded model: size the cache and the largest step, and choose the runner."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from candle_vllm.core.assembly.draft import DescribedHead
from candle_vllm.core.assembly.encoder import LoadedEncoder
from candle_vllm.core.assembly.model import Described, LoadedHead, LoadedModel, fit_settings
from candle_vllm.core.assembly.placement import memory_of
from candle_vllm.core.assembly.tower import LoadedTower
from candle_vllm.core.config import (
    CACHE_TYPES,
    SETTINGS,
    WEIGHTS,
    EngineConfig,
    SpeculativeConfig,
    draft_error,
    draft_settings,
)
from candle_vllm.core.devices import Device, leave_cores_to_others
from candle_vllm.core.engine.adapters.adapter_admission import AdapterAdmission
from candle_vllm.core.engine.adapters.adapter_loading import adapter_limits, adapter_loader
from candle_vllm.core.engine.adapters.adapter_store import AdapterStore
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.cache.block_tiers import keep_blocks
from candle_vllm.core.engine.cache.states import StatePool
from candle_vllm.core.engine.cache.window_pages import WindowedBlocks
from candle_vllm.core.engine.model_info import ModelInfo
from candle_vllm.core.engine.ranks.ranks import RankedParts, RankedRunner, Ranks
from candle_vllm.core.engine.runners.images import ImageStore
from candle_vllm.core.engine.runners.key_fit import FIT_POSITIONS, fit_keys
from candle_vllm.core.engine.runners.model_runner import MAX_SCORED_ROWS, HeadRunner, ModelRunner, StepwiseRunner
from candle_vllm.core.engine.runners.sleeping import Sleeper
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.preparation import DecoderPreparation, EncoderPreparation, pooling_tasks
from candle_vllm.core.engine.step.scheduler import Scheduler, WholeTexts
from candle_vllm.core.errors import ConfigError, refuse_settings
from candle_vllm.core.kernels.attention.cpu_cache import BLOCK, PLAIN, CacheKind, number_bytes
from candle_vllm.core.kernels.collectives import Collective
from candle_vllm.core.kernels.latent_attention.layout import choice_scratch
from candle_vllm.core.layers.adapters import number_places
from candle_vllm.core.loading.cache_specs import paged, states
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.memory import (
    MIB,
    CachePlan,
    ElementBytes,
    agreed_plan,
    available_memory,
    cache_bytes,
    main_room,
    plan_cache,
    room_for,
)
from candle_vllm.core.models.stack import DecoderStack
from candle_vllm.core.quantization.plain import ELEMENTS
from candle_vllm.core.sampling.params import DEFAULT_SAMPLING
from candle_vllm.core.sampling.sampler import Sampler
from candle_vllm.core.threads import default_threads

if TYPE_CHECKING:
    from candle_vllm.core.engine.drafts.draft_model import DraftModel
    from candle_vllm.core.kernels.cpu_runtime.recorder import StepLimits
    from candle_vllm.core.layers.parameters import Placement

_COMPILER_BYTES = 256 * MIB
_DRAFT_ROWS = 16  # draft tokens of a step for all sequences, unless a draft of one sequence may be longer
_LEAST_FOR_ADAPTERS, _MOST_FOR_ADAPTERS = 64 * MIB, 4096 * MIB
_MOST_FOR_IMAGES = 256 * MIB  # see `ImageStore`

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Default settings of a device type: tokens and sequences of a step, and the share of memory for the cache."""

    tokens: int
    sequences: int
    share: float


DEFAULTS = MappingProxyType({"cpu": Defaults(512, 64, 0.4), "cuda": Defaults(8192, 256, 0.9)})

_NOT_FOR_ENCODERS = (
    "yarn_scaling_factor", "attention_backend", "kv_cache_dtype", "key_cache_dtype", "value_cache_dtype",
    "max_cudagraph_capture_size", "kv_cache_memory", "kv_fraction", "state_cache_gb", "deterministic", "open_objects",
    "prompt_cache_path", "prompt_cache_url", "kv_offloading_size", "speculative_config", "mm_processor_kwargs",
    "cpu_experts", "cpu_offload_gb", "gpu_layers", "gpu_memory_utilization",
)  # fmt: skip
_OF_A_CACHE = ("kv_cache_memory", "gpu_memory_utilization", "kv_cache_dtype", "key_cache_dtype", "value_cache_dtype")
"""Settings of `_NOT_FOR_ENCODERS` that only cause a warning: a server may have them for decoders, too."""


def build_engine(config: EngineConfig, loaded: LoadedModel | LoadedEncoder, ranks: Ranks | None = None) -> Engine:
    """Build the engine for a loaded model; `ranks` runs the other ranks' parts of a divided model. Raises ConfigError
    if the settings do not fit each other, this model or the memory."""
    config = fit_settings(config, loaded.config)
    collective = None if ranks is None else ranks.collective
    sleeper = Sleeper(config, loaded, collective)  # first: runners change the loaded model
    if isinstance(loaded, LoadedEncoder):
        return _build_encoder(config, loaded, sleeper)
    placement = loaded.placement
    sequences, budget, drafts, rows = _step(config, loaded)
    _require_room_for_images(config, loaded, sequences, budget)
    runner, draft, plan = _build_runner(config, loaded, collective)
    sequences, own = plan.states.running or sequences, runner
    if placement.device.type == "cuda":
        from candle_vllm.core.engine.runners.device_build import adapter_slots

        most_adapters = adapter_slots(config)
    else:
        most_adapters = config.max_loras or sequences
    others: RankedParts | None = None
    if ranks is not None:
        runner = RankedRunner(runner, ranks)
        sleeper.broadcast, others = runner.sleep, RankedParts(ranks, runner.broadcast_pages)
    size, caching = config.block_size, config.enable_prefix_caching
    blocks = BlockManager(plan.num_blocks, size, enable_prefix_caching=caching)
    if plan.windows:
        page_of = [pages.data for pages in own.page_of]
        blocks = WindowedBlocks(plan.windows, page_of, size, enable_prefix_caching=caching)
    reproducible = config.deterministic and placement.device.type == "cuda"
    store, admission = None, None
    if config.enable_lora:
        most = min(most_adapters, config.max_cpu_loras or most_adapters)
        store = adapter_store(config, loaded, runner, most, plan)
        admission = AdapterAdmission(store, most, patience=sequences)
    images = None if loaded.tower is None else _image_store(loaded.tower, runner)
    pool = None
    if plan.states.running:
        pool = StatePool(plan.states.running, plan.states.checkpoints, size)
    elif config.state_cache_gb is not None:
        logger.warning("state_cache_gb has no effect: no layer of this model has a recurrent state")
    offloaded = keep_blocks(config, loaded, own, blocks, draft is not None, others, pool)
    scheduler = Scheduler(
        blocks,
        sequences,
        budget,
        reproducible=reproducible,
        draft_rows=rows,
        adapters=admission,
        images=images,
        offloaded=offloaded,
        in_flight=runner.in_flight,
        states=pool,
    )
    drafter = None
    if drafts is not None:
        from candle_vllm.core.engine.drafts.drafting import Drafter

        model = None if draft is None else _draft_model(drafts, loaded, runner, draft, scheduler)
        drafter = Drafter(drafts, rows, model)
    preparation = preparation_for(loaded, plan.max_model_len, config.seed, store, open_objects=config.open_objects)
    preparation.room = budget - sequences - rows
    sleeper.runners = [runner] if draft is None else [runner, draft]
    engine = Engine(runner, scheduler, preparation, drafter, images, offloaded, sleeper)
    engine.cache_bytes, engine.state_bytes = plan.num_bytes, plan.states.num_bytes
    engine.index_bytes = plan.index_bytes
    return engine


def build_rank(config: EngineConfig, loaded: LoadedModel, ranks: Collective) -> tuple[ModelRunner, Sleeper]:
    """Build the runner and the sleeper of a rank after the first; raises as `build_engine`."""
    sleeper = Sleeper(config, loaded, ranks)
    runner = _build_runner(config, loaded, ranks)[0]
    sleeper.runners = [runner]
    return runner, sleeper


def _step(config: EngineConfig, loaded: LoadedModel) -> tuple[int, int, SpeculativeConfig | None, int]:
    """Return the maximum sequences and tokens of a step, the drafting settings, and the step's maximum draft tokens."""
    placement = loaded.placement
    defaults = DEFAULTS[placement.device.type]
    longest = config.max_model_len or loaded.config.max_position
    if config.max_num_batched_tokens == 0 and placement.device.type == "cpu":  # the cache may limit the context
        longest = _plan_on_cpu(config, loaded, config.max_num_seqs or defaults.sequences, defaults.share).max_model_len
    sequences, budget = step_size(config, placement.device, longest)
    drafts = _drafts(config, placement.recorded and budget > sequences)
    return sequences, budget, drafts, 0 if drafts is None else _draft_rows(drafts, sequences, budget)


def _build_runner(
    config: EngineConfig, loaded: LoadedModel, ranks: Collective | None
) -> tuple[Any, StepwiseRunner | HeadRunner | None, CachePlan]:
    """Build the runner of the model or of this rank's part, the runner of the draft model, and the cache's plan."""
    sequences, budget, drafts, rows = _step(config, loaded)
    if loaded.placement.device.type == "cpu":
        return _build_on_cpu(config, loaded, budget, sequences, rows, ranks)
    if drafts is not None and WEIGHTS in drafts.sources:
        raise draft_error("draft models and draft heads run on the CPU only: on a GPU use the method suffix or ngram")
    from candle_vllm.core.engine.runners.device_build import build_on_gpu

    runner, plan = build_on_gpu(config, loaded, budget, sequences, DEFAULTS["cuda"].share, rows, ranks)
    return runner, None, plan


def _require_room_for_images(config: EngineConfig, loaded: LoadedModel, sequences: int, budget: int) -> None:
    """Raise ConfigError if a step cannot hold an undivided image tile beside other sequences and their drafts."""
    if loaded.tower is None or not loaded.tower.vision.parts.whole:
        return
    tower, drafts = loaded.tower.tower.config, _drafts(config, loaded.placement.recorded)
    others = sequences + (0 if drafts is None else max(_DRAFT_ROWS, drafts.num_speculative_tokens))
    needed = others + tower.most_whole
    if budget < needed:
        raise ConfigError(
            f"max_num_batched_tokens {budget} is too small: {loaded.name} needs {needed - others} tokens for an "
            f"image in one step, beside {others} tokens of other sequences: set max_num_batched_tokens={needed}, or "
            "max_images=0",
            "max_num_batched_tokens",
        )


def _image_store(tower: LoadedTower, runner: ModelRunner) -> ImageStore:
    if tower.placement.recorded:
        from candle_vllm.core.engine.runners.recorded_runner import RecordedRunner
        from candle_vllm.core.engine.runners.recorded_tower import RecordedTower

        assert isinstance(runner, RecordedRunner)
        size = tower.tower.config.step_bytes(runner.team.threads)
        logger.info("the largest image takes at most %.0f MB while it is encoded", size / 1e6)
        way = "make images smaller with mm_processor_kwargs, or set max_images=0"
        with room_for("the patches of the largest image", size, "mm_processor_kwargs", lambda _: way):
            return ImageStore(RecordedTower(tower.tower, runner.team), _MOST_FOR_IMAGES)
    from candle_vllm.core.engine.runners.eager_runner import EagerTower

    return ImageStore(EagerTower(tower.tower, tower.placement.device), _MOST_FOR_IMAGES)


def _draft_rows(drafts: SpeculativeConfig, sequences: int, budget: int) -> int:
    """Return the maximum number of draft tokens of a step beside one row for each sequence; raise ConfigError for 0."""
    if budget == sequences:
        raise draft_error(
            f"max_num_batched_tokens {budget} leaves no room for draft tokens beside max_num_seqs "
            f"{sequences}: set max_num_batched_tokens={sequences + drafts.num_speculative_tokens}"
        )
    return min(max(_DRAFT_ROWS, drafts.num_speculative_tokens), budget - sequences)


def _draft_model(
    drafts: SpeculativeConfig,
    loaded: LoadedModel,
    target: ModelRunner,
    runner: StepwiseRunner | HeadRunner,
    scheduler: Scheduler,
) -> DraftModel:
    """Build the drafter of the draft model or draft head that `runner` runs."""
    from candle_vllm.core.engine.drafts.draft_head import DraftingHead
    from candle_vllm.core.engine.drafts.draft_model import DraftModel

    draft = loaded.draft
    assert draft is not None
    words, longest = (loaded.config.vocab_size, draft.config.vocab_size), draft.config.max_position
    rows, cost = scheduler.max_num_batched_tokens, draft.weight_bytes / max(1, loaded.weight_bytes)
    if isinstance(draft, LoadedModel):
        assert isinstance(runner, StepwiseRunner)
        return DraftModel(runner, drafts, scheduler, words, longest, rows, cost)
    assert isinstance(target, (StepwiseRunner, RankedRunner))
    head: Any = runner
    shares, size = not draft.config.cache_specs, draft.vocab_size
    return DraftingHead(head, target, draft.meant, drafts, scheduler, words, longest, rows, cost, size, shares)


def step_size(config: EngineConfig, device: Device, longest: int = 0) -> tuple[int, int]:
    """Return the maximum sequences and tokens of a decoder's step; raise ConfigError for fewer tokens than sequences.

    `longest` is the length of the longest prompt: with `max_num_batched_tokens=0`, a step can run all of it.
    """
    defaults = DEFAULTS[device.type]
    sequences = config.max_num_seqs or defaults.sequences
    whole = longest if config.max_num_batched_tokens == 0 else 0
    budget = config.max_num_batched_tokens or max(whole or defaults.tokens, sequences)
    if budget < sequences:
        raise ConfigError(
            f"max_num_batched_tokens {budget} is below max_num_seqs {sequences}, so not every sequence could take a "
            f"step: set max_num_batched_tokens={sequences} or max_num_seqs={budget}",
            "max_num_batched_tokens",
        )
    return sequences, budget


def foreseen_cache(
    config: EngineConfig, model: Described, draft: Described | DescribedHead | None = None, tower: int = 0
) -> CachePlan:
    """Plan the cache of a model on the CPU before it is loaded, from the free memory; raises as `build_engine`.

    `draft` is the draft model, if there will be one, and `tower` the bytes of the vision tower.
    """
    sequences, _ = step_size(config, model.placement.device)
    share = DEFAULTS[model.placement.device.type].share
    weights = sum(memory_of(each.placement, each.stored) for each in (model, draft) if each is not None)
    return _plan_on_cpu(config, model, sequences, share, weights + tower, draft)


def preparation_for(
    loaded: LoadedModel,
    max_model_len: int,
    seed: int | None = None,
    adapters: AdapterStore | None = None,
    *,
    open_objects: bool = False,
) -> DecoderPreparation:
    """Build the `DecoderPreparation` of a loaded model."""
    tokenizer, vocab_size = loaded.tokenizer, loaded.config.vocab_size
    return DecoderPreparation(
        tokenizer,
        loaded.eos_token_ids,
        vocab_size,
        max_model_len,
        pooling=loaded.pooling,
        head=loaded.head,
        seed=seed,
        adapters=adapters,
        images=None if loaded.tower is None else loaded.tower.vision,
        open_objects=open_objects,
        answer_window=loaded.config.answer_window,
    )


def _build_encoder(config: EngineConfig, loaded: LoadedEncoder, sleeper: Sleeper) -> Engine:
    """Build the engine for an encoder; refuse settings that would have no effect, or warn of them."""
    for name in _NOT_FOR_ENCODERS:
        if getattr(config, name) != SETTINGS[name].default:
            said = f"{loaded.name} is an encoder and generates no text, so {name} has no effect"
            if name not in _OF_A_CACHE:
                raise ConfigError(f"{said}: leave it out", name)
            logger.warning("%s", said)
    placement, defaults = loaded.placement, DEFAULTS[loaded.placement.device.type]
    sequences, budget = config.max_num_seqs or defaults.sequences, config.max_num_batched_tokens or defaults.tokens
    adapters = adapter_limits(config, loaded) if config.enable_lora else {}
    if placement.recorded:
        from candle_vllm.core.engine.runners.recorded_runner import RecordedEncoderRunner, StepLimits

        leave_cores_to_others()
        limits = StepLimits(
            tokens=max(budget, loaded.max_model_len),
            sequences=sequences,
            logit_rows=sequences,
            table_width=0,
            block_size=1,
            **_threads(config, placement),
            **adapters,
        )
        if adapters:
            number_places(loaded.encoder)
        with _room_for_rows(limits):
            runner = RecordedEncoderRunner(loaded.encoder, limits)
    else:
        from candle_vllm.core.engine.runners.eager_runner import EagerEncoderRunner

        joined = None
        if adapters:
            from candle_vllm.core.kernels.lora.reference import EagerAdapters

            number_places(loaded.encoder, joined := EagerAdapters())
        runner = EagerEncoderRunner(loaded.encoder, placement.device, joined)
    store, admission = None, None
    if config.enable_lora:
        most = min(config.max_loras or sequences, config.max_cpu_loras or sequences)
        store = adapter_store(config, loaded, runner, most)
        admission = AdapterAdmission(store, most, patience=sequences)
    return Engine(
        runner,
        WholeTexts(sequences, budget, admission),
        EncoderPreparation(loaded.name, loaded.config, loaded.pooling, loaded.max_model_len, store, loaded.head),
        sleeper=sleeper,
    )


def _plan_on_cpu(
    config: EngineConfig,
    model: LoadedModel | Described,
    sequences: int,
    share: float,
    weights: int = 0,
    draft: LoadedModel | LoadedHead | Described | DescribedHead | None = None,
    ranks: Collective | None = None,
) -> CachePlan:
    """Plan the cache on the CPU; refuse settings for a GPU, but only warn of `gpu_memory_utilization`.

    Memory stays free for an indexer, for the image encoding of a loaded vision tower, and for `weights` bytes that are
    loaded later. With `ranks`, the plan fits the memory of every rank.
    """
    placement = model.placement
    kinds = cache_kinds(config, model)
    if config.max_cudagraph_capture_size:
        raise ConfigError("`max_cudagraph_capture_size` needs a GPU: leave it out", "max_cudagraph_capture_size")
    if config.attention_backend != "auto" and (placement.recorded or config.attention_backend != "torch"):
        raise ConfigError(
            f"attention_backend={config.attention_backend!r} needs a GPU: on the CPU leave it out, or set torch "
            "together with op_by_op=True",
            "attention_backend",
        )
    if config.gpu_memory_utilization is not None:
        logger.warning("gpu_memory_utilization is for GPUs only; on the CPU set `kv_fraction`")
    threads = config.threads or default_threads()
    if isinstance(model, LoadedModel) and model.tower is not None:
        weights += model.tower.tower.config.step_bytes(threads)
    # With pipeline parallelism, each stage runs another step, and each step has its own rows.
    rows = step_size(config, placement.device, model.config.max_position)[1] * config.pipeline_parallel_size
    index = _index_bytes(model.config, rows, threads, placement.recorded)
    room = main_room(threads, share, weights + index)
    if index:
        room = dataclasses.replace(room, kept=f"{room.kept} beside {-(-index // MIB)} MiB for the indexer")
    draft = model.draft if isinstance(model, LoadedModel) else draft
    beside = 0 if draft is None else cache_bytes(draft.config.cache_specs, 1, _element_bytes(draft, PLAIN))
    layers = model.layers if isinstance(model, LoadedModel) else None
    drafts = _drafts(config, placement.recorded)
    most_drafts = 0 if drafts is None else drafts.num_speculative_tokens
    sizes = _element_bytes(model, kinds), sequences, room, beside, layers, most_drafts, rows
    plan = agreed_plan(lambda pools: plan_cache(config, model.config, *sizes, pools), ranks)
    return dataclasses.replace(plan, index_bytes=index)


def _index_bytes(model: ModelConfig, tokens: int, threads: int, recorded: bool) -> int:
    """Return the bytes that an indexer's scores and chosen positions take in a step of `tokens` tokens."""
    context, index = model.max_position, model.index
    if index is None or context <= model.index_top:
        return 0
    if recorded:
        pooled = index.nope if model.index_pool > 1 else 0
        scores = 4 * tokens * index.heads * -(-context // model.index_block) if model.index_block else 0
        return scores + choice_scratch(context, threads, pooled) + 4 * tokens * model.index_top
    from candle_vllm.core.kernels.latent_attention.reference import score_bytes

    return score_bytes(index.heads, context // model.index_pool) + 8 * tokens * model.index_top


def _drafts(config: EngineConfig, recorded: bool) -> SpeculativeConfig | None:
    """Return the drafting settings; recorded steps draft by default, because drafts do not change answers."""
    if config.speculative_config is None and recorded:
        return SpeculativeConfig()
    return draft_settings(config.speculative_config)


def _element_bytes(
    model: LoadedModel | LoadedHead | Described | DescribedHead, kinds: tuple[CacheKind, CacheKind]
) -> ElementBytes:
    """Return the `ElementBytes` of a cache on the CPU; plain elements are bfloat16 with the compiled kernels."""
    if kinds != PLAIN:
        return lambda key_dim: number_bytes(key_dim, kinds)
    compiled = 4 if model.config.compresses else 2
    size = compiled if model.placement.recorded else ELEMENTS[model.placement.dtype].itemsize
    return lambda _: size


def cache_kinds(config: EngineConfig, model: LoadedModel | Described) -> tuple[CacheKind, CacheKind]:
    """Return the types of cached keys and values on a CPU; raises ConfigError for a type that the model cannot have."""
    found: list[CacheKind] = []
    for name in ("key_cache_dtype", "value_cache_dtype"):
        given = getattr(config, name)
        name, dtype = (name, given) if given is not None else ("kv_cache_dtype", config.kv_cache_dtype)
        asked = f"{name}={dtype!r}"
        row = CACHE_TYPES[dtype]
        if row.device == "cuda":
            raise ConfigError(f"{asked} needs a GPU: on the CPU set 'q8_0', or leave it out", name)
        kind = CacheKind.of(row.bits, row.minima, row.levels)
        change = "leave out op_by_op, or key and value types" if config.op_by_op else "leave it out"
        refuse_settings(
            (name, dtype != "auto" and not model.placement.recorded,
             f"{asked} needs the compiled kernels, which do not run this model: {change}"),
            (name, kind.is_quantised and (model.config.latent is not None or model.config.compresses),
             f"{asked} is not supported with latent attention, compressed entries or chosen blocks: "
             "leave it out"),
            *((name, not kind.fits(dim), f"{asked} stores blocks of {BLOCK} elements, and the head size of this model, "
               f"{dim}, is not a multiple of that: leave it out")
              for dim in {spec.key_dim for spec in paged(model.config.cache_specs) if not spec.exact}),
        )  # fmt: skip
        found.append(kind)
    keys, values = found
    return keys, values


def _build_on_cpu(
    config: EngineConfig,
    loaded: LoadedModel,
    budget: int,
    sequences: int,
    draft_rows: int,
    ranks: Collective | None = None,
) -> tuple[StepwiseRunner, StepwiseRunner | HeadRunner | None, CachePlan]:
    """Build the runner of the model, the runner of its draft model or draft head if any, and the plan of the cache."""
    plan = _plan_on_cpu(config, loaded, sequences, DEFAULTS["cpu"].share, ranks=ranks)
    logger.info(plan.message)
    if plan.warning:
        logger.warning(plan.warning)
    rows = max(sequences + draft_rows, MAX_SCORED_ROWS)
    kinds = cache_kinds(config, loaded)
    adapters = adapter_limits(config, loaded) if config.enable_lora else {}
    taps = loaded.draft.head.taps if isinstance(loaded.draft, LoadedHead) else None
    runner = _runner_on_cpu(config, loaded, plan, budget, sequences, rows, adapters=adapters, taps=taps, kinds=kinds)
    assert isinstance(runner, StepwiseRunner)
    Sampler.prepare(loaded.placement.device)  # after the runner, which compiles all kernels in parallel at first start
    draft = None
    if loaded.draft is not None:
        if states(loaded.draft.config.cache_specs):
            raise draft_error(
                f"{loaded.draft.name} cannot draft, because its layers have a recurrent state: "
                "use another model, or leave speculative_config out"
            )
        draft = _runner_on_cpu(config, loaded.draft, plan, budget, sequences, sequences, runner)
    return runner, draft, plan


def _runner_on_cpu(
    config: EngineConfig,
    loaded: LoadedModel | LoadedHead,
    plan: CachePlan,
    budget: int,
    sequences: int,
    rows: int,
    beside: StepwiseRunner | None = None,
    adapters: Mapping[str, Any] = MappingProxyType({}),
    taps: tuple[int, ...] | None = None,
    kinds: tuple[CacheKind, CacheKind] = PLAIN,
) -> StepwiseRunner | HeadRunner:
    """Build the runner of a model or a draft head; at most `rows` rows of a step have logits.

    `adapters` are fields of `StepLimits`; `beside` is the target model's runner if `loaded` drafts for it.
    """
    placement, blocks = loaded.placement, plan.num_blocks
    # A draft model has a page for each block, also outside its windows, unless it reads the target's caches.
    windows = plan.windows if beside is None or not loaded.config.cache_specs else ()
    model = loaded.head if isinstance(loaded, LoadedHead) else loaded.decoder
    positions = min(loaded.config.max_position, FIT_POSITIONS) if kinds[0].is_quantised else 0
    model.prepare(max(min(plan.max_model_len, loaded.config.max_position), positions))
    turning = loaded.turning(budget) if isinstance(loaded, LoadedModel) else None
    if not placement.recorded:
        from candle_vllm.core.engine.runners.eager_runner import EagerHead, EagerRunner, StageRunner

        memory = blocks, config.block_size, placement.device, placement.torch_dtype
        room = plan.states, windows
        if isinstance(loaded, LoadedHead):
            assert isinstance(beside, EagerRunner)
            return EagerHead(loaded.head, *memory, beside.adapters, beside)
        joined = None
        if adapters:
            from candle_vllm.core.kernels.lora.reference import EagerAdapters

            number_places(loaded.decoder, joined := EagerAdapters())
        if isinstance(loaded.decoder, DecoderStack) and loaded.decoder.stage is not None:
            return StageRunner(loaded.decoder, *memory, joined, taps, turning, *room)
        return EagerRunner(loaded.decoder, *memory, joined, taps, turning, *room)
    if adapters and isinstance(loaded, LoadedModel):
        number_places(loaded.decoder)
    from candle_vllm.core.engine.runners.recorded_runner import RecordedHead, RecordedRunner, StepLimits

    leave_cores_to_others()
    limits = StepLimits(
        tokens=budget if loaded.config.cache_specs else sequences,  # without a cache: one token of each sequence
        sequences=sequences,
        logit_rows=rows,
        table_width=-(-plan.max_model_len // config.block_size),
        block_size=config.block_size,
        **_threads(config, loaded.placement),
        ahead=isinstance(loaded, LoadedModel) and loaded.vision is not None and loaded.vision.parts.whole,
        **adapters,
    )
    team = beside.team if isinstance(beside, RecordedRunner) else None
    with _room_for_rows(limits):
        if isinstance(loaded, LoadedHead):
            assert beside is None or isinstance(beside, RecordedRunner)
            return RecordedHead(loaded.head, blocks, limits, team=team, windows=windows, beside=beside)
        vectors = 0 if loaded.tower is None else loaded.tower.tower.config.vectors
        sees: dict[str, Any] = {"images": vectors, "turning": turning, "whole": isinstance(loaded.draft, LoadedHead)}
        keeps: dict[str, Any] = {"kinds": kinds, "room": plan.states, "windows": windows}
        runner = RecordedRunner(loaded.decoder, blocks, limits, team=team, taps=taps, **keeps, **sees)
        if kinds[0].is_quantised and runner.caches:
            fit_keys(runner, plan, limits, loaded, kinds, positions)
        return runner


def adapter_store(
    config: EngineConfig,
    loaded: LoadedModel | LoadedEncoder,
    runner: ModelRunner,
    most: int,
    plan: CachePlan | None = None,
) -> AdapterStore:
    """Build the adapter store for `most` adapters in a step; by default, it leaves memory for a cache on the CPU."""
    in_main_memory = 0 if plan is None or loaded.placement.device.type == "cuda" else plan.num_bytes
    left = max(0, available_memory() - in_main_memory)
    memory = config.lora_memory or max(_LEAST_FOR_ADAPTERS, min(_MOST_FOR_ADAPTERS, left // 4))
    logger.info("adapters may take %.0f MB of memory", memory / 1e6)
    return AdapterStore(
        adapter_loader(config, loaded, runner, memory), most=config.max_cpu_loras, most_bytes=memory, most_at_once=most
    )


def _threads(config: EngineConfig, placement: Placement) -> dict[str, Any]:
    """Return `threads` of `StepLimits`, and `ranks` if the weights are divided among ranks (groups of threads)."""
    memory = placement.weight_memory
    assert memory is not None
    if memory.ranks is not None:
        return {"threads": memory.ranks.threads, "ranks": memory.ranks}
    return {"threads": config.threads or default_threads()}


def _room_for_rows(limits: StepLimits) -> AbstractContextManager[None]:
    """Return a context for building a runner; it converts lack of memory to a ConfigError."""
    from candle_vllm.core.kernels.cpu_runtime.kernel_cache import is_first_start

    fewer = max(limits.sequences, limits.tokens // 4)
    way = f"set max_num_batched_tokens={fewer}" if fewer < limits.tokens else "take fewer `threads`"
    with room_for("the engine", 0):
        compiler = _COMPILER_BYTES if is_first_start() else 0  # the compiler ends the process if memory runs out
    what = f"the rows of a step of {limits.tokens} tokens" + (", and for compiling its kernels" if compiler else "")
    return room_for(what, compiler, "max_num_batched_tokens", lambda _: way)


def model_info(loaded: LoadedModel | LoadedEncoder, engine: Engine) -> ModelInfo:
    """Return the `ModelInfo` of a model that an engine serves."""
    beside = (loaded.draft, loaded.tower) if isinstance(loaded, LoadedModel) else ()
    labels = loaded.labels
    pooling = "" if loaded.pooling is None else loaded.pooling.pooling
    vectors = pooling_tasks(labels, pooling) if isinstance(loaded, LoadedEncoder) or labels else ("embed", "score")
    generates = isinstance(loaded, LoadedModel) and loaded.config.has_head
    sampling = {**DEFAULT_SAMPLING, **loaded.default_sampling}
    sampling.pop("max_tokens", None)  # a chat without max_tokens ends with its turn, see `EngineFront.chat`
    return ModelInfo(
        name=loaded.name,
        architecture=loaded.config.model_type,
        num_parameters=loaded.num_parameters,
        max_model_len=engine.max_model_len,
        vocab_size=loaded.config.vocab_size,
        dtype=loaded.dtype,
        device=str(loaded.placement.device),
        quantization=loaded.quantization,
        weight_bytes=loaded.weight_bytes + sum(each.weight_bytes for each in beside if each is not None),
        eos_token_ids=loaded.eos_token_ids,
        has_chat_template=loaded.template is not None,
        default_sampling=sampling if generates else {},
        model_sampling=loaded.default_sampling if generates else {},
        tasks=("generate", *vectors) if generates else vectors,
        modalities=("text",) if loaded.vision is None else ("text", "image"),
        max_images=0 if loaded.vision is None else loaded.vision.limits.max_images,
        image_text="" if loaded.vision is None else loaded.vision.parts.written,
        labels=labels,
        embedding_size=0 if loaded.pooling is None or labels else loaded.pooling.length(loaded.pooling.pooling),
        pooling=pooling,
        pair_marks=len(loaded.tokenizer.encode_pair("", "")[0]) if "score" in vectors and labels else 0,
        prompts={} if loaded.pooling is None else loaded.pooling.prompts,
        implementation=loaded.config.implementation,
        max_num_seqs=engine.max_num_seqs,
        kv_cache_bytes=engine.cache_bytes,
        state_bytes=engine.state_bytes,
        index_bytes=engine.index_bytes,
        answer_window=loaded.config.answer_window if isinstance(loaded, LoadedModel) else None,
    )
