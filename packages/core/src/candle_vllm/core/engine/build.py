"""From a loaded model to an engine: how large the cache is, how much a step holds, and what runs it."""

from __future__ import annotations

import logging

import torch

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.engine.block_manager import BlockManager
from candle_vllm.core.engine.engine import Engine
from candle_vllm.core.engine.model_runner import MAX_SCORED_ROWS, EagerRunner, ModelRunner
from candle_vllm.core.engine.scheduler import Scheduler
from candle_vllm.core.errors import ConfigError
from candle_vllm.core.loading.model import LoadedModel
from candle_vllm.core.memory import CachePlan, available_memory, physical_cores, plan_cache
from candle_vllm.core.sampling.sampler import Sampler

logger = logging.getLogger(__name__)

_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}


def build_engine(config: EngineConfig, loaded: LoadedModel) -> Engine:
    """The engine for a loaded model.

    Raises:
        ConfigError: settings that cannot work together, or not with this model and memory.
    """
    placement = loaded.placement
    budget = config.max_num_batched_tokens or max(_BATCHED_TOKENS[placement.device.type], config.max_num_seqs)
    if budget < config.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens {budget} is below max_num_seqs {config.max_num_seqs}, so not every sequence could "
            f"take a step: set --prefill-chunk-size {config.max_num_seqs} or --max-num-seqs {budget}",
            "max_num_batched_tokens",
        )
    dtype_bytes = 2 if placement.recorded else placement.dtype.itemsize  # the compiled kernels keep bfloat16
    plan = plan_cache(config, loaded.config, dtype_bytes, available_memory())
    logger.info(plan.message)
    blocks = BlockManager(plan.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching)
    scheduler = Scheduler(blocks, config.max_num_seqs, budget)
    loaded.decoder.prepare(plan.max_model_len)
    Sampler.prepare(placement.device)
    runner = _build_runner(config, loaded, plan, budget)
    return Engine(runner, scheduler, loaded.tokenizer, loaded.eos_token_ids, plan.max_model_len, config.seed)


def _build_runner(config: EngineConfig, loaded: LoadedModel, plan: CachePlan, budget: int) -> ModelRunner:
    placement = loaded.placement
    if not placement.recorded:
        return EagerRunner(loaded.decoder, plan.num_blocks, config.block_size, placement.device, placement.dtype)
    from candle_vllm.core.engine.step_graphs import RecordedRunner, StepLimits

    torch.set_num_threads(1)  # torch's own pool would take the cores from the kernels' threads
    limits = StepLimits(
        tokens=budget,
        sequences=config.max_num_seqs,
        logit_rows=max(config.max_num_seqs, MAX_SCORED_ROWS),
        table_width=-(-plan.max_model_len // config.block_size),
        block_size=config.block_size,
        threads=config.threads or physical_cores(),
    )
    return RecordedRunner(loaded.decoder, plan.num_blocks, limits)
