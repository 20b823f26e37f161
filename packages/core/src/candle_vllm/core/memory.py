"""How many KV-cache blocks fit, with the arithmetic in the message."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.devices import Device, gpu_memory
from candle_vllm.core.errors import ConfigError
from candle_vllm.core.loading.config import ModelConfig

MIB = 1 << 20


def _size(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / MIB:.0f} MiB" if count >= 10 * MIB else f"{count / 1024:.0f} KiB"


@dataclasses.dataclass(frozen=True)
class CachePlan:
    """Size of the KV cache.

    Attributes:
        num_blocks: blocks in the cache.
        block_bytes: bytes of one block, all layers, keys and values.
        max_model_len: longest prompt plus output, in tokens; it always fits.
        message: the arithmetic, for the log.
    """

    num_blocks: int
    block_bytes: int
    max_model_len: int
    message: str


@dataclasses.dataclass(frozen=True)
class Room:
    """The memory that there is for a KV cache.

    Attributes:
        available: bytes free on the device once the weights are there, and what a step needs is put aside.
        share: how much of it the cache may take, unless `kv_fraction` says.
        kept: what was put aside, for the message; may be empty.
    """

    available: int
    share: float
    kept: str = ""


def plan_cache(config: EngineConfig, model: ModelConfig, dtype_bytes: int, sequences: int, room: Room) -> CachePlan:
    """Divides the memory for the KV cache into blocks.

    Args:
        config: the engine's settings.
        model: the model, its context already cut to `config.max_model_len` where that is set.
        dtype_bytes: bytes of one number in the cache.
        sequences: most sequences in one step; the cache never holds more than that many of full length.
        room: what there is.

    Raises:
        ConfigError: when the asked-for context does not fit, with values that would.
    """
    if config.max_model_len is not None and config.max_model_len > model.max_position:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is beyond the model's context of {model.max_position} tokens: "
            f"set --max-model-len {model.max_position} or leave it out",
            "max_model_len",
        )
    available, share = room.available, config.kv_fraction or room.share
    if config.kv_cache_memory is not None and config.kv_cache_memory > available:
        raise ConfigError(
            f"the KV cache was given {_size(config.kv_cache_memory)} and {_size(available)} are free: "
            f"set --mem {int(available * 0.9) // MIB} or less",
            "kv_cache_memory",
        )
    token_bytes = model.num_layers * model.cache.numbers * dtype_bytes
    block_bytes = token_bytes * config.block_size
    budget = config.kv_cache_memory or int(available * share)
    per_sequence = -(-model.max_position // config.block_size)
    affordable = budget // block_bytes
    context = model.max_position
    if affordable < per_sequence:
        context = _shrunk_context(config, context, affordable, block_bytes, available, budget)
    num_blocks = min(affordable, per_sequence * sequences)
    source = "set by --mem" if config.kv_cache_memory else f"{share:g} of {_size(available)} free{room.kept}"
    message = (
        f"KV cache: {num_blocks} blocks of {config.block_size} tokens = {num_blocks * config.block_size} tokens, "
        f"{_size(num_blocks * block_bytes)} of {_size(budget)} ({source}); one token takes "
        f"{_numbers(model)} x {dtype_bytes} B = {token_bytes} B; context {context}"
    )
    return CachePlan(num_blocks, block_bytes, context, message)


def _numbers(model: ModelConfig) -> str:
    """What is kept of a token: keys and values, or only the former."""
    cache, layers = model.cache, f"{model.num_layers} layers"
    if cache.key_dim == cache.value_dim:
        return f"2 x {layers} x {cache.kv_heads} heads x {cache.key_dim}"
    return f"{layers} x {cache.kv_heads} head x {cache.key_dim + cache.value_dim}"


def _shrunk_context(
    config: EngineConfig, context: int, affordable: int, block_bytes: int, available: int, budget: int
) -> int:
    """The context that fits, where the caller left it open; otherwise a ConfigError that says what would work."""
    fits = affordable * config.block_size
    needed = -(-context // config.block_size) * block_bytes
    if config.max_model_len is None and fits >= config.block_size:
        return fits
    ways = [f"--max-model-len {fits}"] if fits else []
    ways.append(f"--mem {-(-needed // MIB)}")
    if config.kv_cache_memory is None and needed < available * 0.95:
        ways.append(f"--kv-fraction {min(0.99, needed / available + 0.01):.2f}")
    raise ConfigError(
        f"a context of {context} tokens needs {_size(needed)} of KV cache and there are {_size(budget)}: "
        f"try {' or '.join(ways)}",
        "max_model_len" if config.max_model_len is not None else "kv_cache_memory",
    )


def free_memory(device: Device) -> int:
    """Bytes that are free on a device."""
    return available_memory() if device.type == "cpu" else gpu_memory(device)


def available_memory() -> int:
    """Bytes of main memory that this process may still take: the machine's, or its control group's if that is less."""
    return min(_machine_memory(), _group_memory())


def _machine_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _group_memory() -> int:
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            return max(0, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no such group, or "max"
    return 1 << 62
