# SPDX-License-Identifier: MIT
"""Choose how a model computes: recorded steps with compiled kernels if possible, otherwise torch; and its types."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Set
from contextlib import contextmanager, nullcontext

from candle_vllm.core.config import EngineConfig
from candle_vllm.core.devices import CPU, Device, choose_device, fitting, is_amd, means_gpus, require_torch, use_threads
from candle_vllm.core.errors import ConfigError
from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_isa
from candle_vllm.core.kernels.cpu_runtime.numa import plan_ranks
from candle_vllm.core.kernels.cpu_runtime.weight_memory import new_memory
from candle_vllm.core.kernels.packed_linear.layout import GROUP, LAYOUTS, ROWS, host_kind, packed_kind
from candle_vllm.core.kernels.packed_linear.pack import MAX_COLUMNS as MAX_PACKED_COLUMNS
from candle_vllm.core.kernels.plain_linear import MAX_COLUMNS, PlainKind, plain_kind
from candle_vllm.core.kernels.scaled_linear import LEAST_SPAN
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.cache_specs import paged
from candle_vllm.core.loading.config import ModelConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.memory import room_for
from candle_vllm.core.models.gemma_parts import TABLES
from candle_vllm.core.models.ngram_table import MAPPED
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from candle_vllm.core.quantization.plain import ELEMENTS
from candle_vllm.core.quantization.tensors import StoredTensor, Viewed
from candle_vllm.core.threads import default_threads

logger = logging.getLogger(__name__)

_SMALLER = (("q8_0", 8.5), ("q6k", 6.6), ("q5k", 5.5), ("q4k", 4.5), ("q3k", 3.5), ("q2k", 2.7))
"""Types of `--isq`, and the approximate number of bits per element of each."""

_FEWER = "use a model with fewer bits per weight"

DTYPES = {"f32": "F32", "bf16": "BF16", "f16": "F16"}
"""Values of the dtype setting, and their names in `quantization/plain.py`."""

_BEYOND_F16 = frozenset({
    "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified_text",
    "glm4",
})  # fmt: skip
"""Models whose activations exceed float16: vLLM refuses float16 for them; transformers reports Gemma 3's overflow."""


def resolve_ranks(config: EngineConfig) -> EngineConfig:
    """Return the configuration with the ranks of this machine, before anything is loaded or started.

    Without a GPU, `tensor_parallel_size` means `cpu_ranks`: compiled kernels divided among the threads of one process.
    With `op_by_op` the ranks stay processes, which compute in torch.

    Raises:
        ConfigError: `device` names one GPU for several ranks, it cannot be used, or the ranks cannot be CPU ranks.
    """
    if config.ranks == 1:
        return config
    here = config.ranks // config.nnodes
    if config.device not in ("auto", "cpu", "cuda") and "," not in config.device and here > 1:
        raise ConfigError(
            f"device names one GPU, {config.device}, but {here} ranks are configured (tensor_parallel_size, "
            "pipeline_parallel_size): name that many GPUs, or set device='cuda' for the first ones",
            "device",
        )
    replicas, ray = config.data_parallel_size, config.distributed_executor_backend == "ray"
    if replicas > 1 or config.node_rank or ray:  # other processes compute, or Ray assigns devices: open no GPU here
        on_gpu = means_gpus(config.device)
    else:
        on_gpu = choose_device(config.device).type == "cuda"
    if on_gpu:
        return config
    if config.op_by_op:
        require_torch("op_by_op is set", "leave it out")
        return dataclasses.replace(config, device="cpu")
    refused = {
        "nnodes": config.nnodes > 1,
        "distributed_executor_backend": ray,
        "pipeline_parallel_size": config.pipeline_parallel_size > 1,
        "enable_expert_parallel": config.enable_expert_parallel,
    }
    given = [name for name, is_given in refused.items() if is_given]
    if given:
        raise ConfigError(
            f"{' and '.join(f'{name}={getattr(config, name)!r}' for name in given)} would divide the model among "
            "GPUs, but no GPU is used: leave it out (docs/scaling.md)",
            given[0],
        )
    ranks, threads = config.tensor_parallel_size, config.threads or default_threads()
    obstacle = None
    if config.cpu_ranks not in (None, ranks):
        obstacle = f"cpu_ranks={config.cpu_ranks} contradicts it: leave one of them out"
    elif sys.platform != "linux":
        obstacle = "CPU ranks need Linux: leave it out"
    elif ranks * replicas > threads:
        each = "" if replicas == 1 else f" of {replicas} replicas"
        obstacle = (
            f"each rank{each} needs a thread, and there are {threads}: leave it out, or set threads={ranks * replicas} "
            "or more"
        )
    if obstacle is not None:
        raise ConfigError(
            f"without a GPU, tensor_parallel_size={ranks} means {ranks} CPU ranks, and {obstacle}",
            "tensor_parallel_size",
        )
    logger.info("no GPU is used: tensor_parallel_size=%d means cpu_ranks=%d (docs/scaling.md)", ranks, ranks)
    return dataclasses.replace(config, device="cpu", tensor_parallel_size=1, cpu_ranks=ranks)


def choose_placement(config: EngineConfig, device: Device, checkpoint: Checkpoint, model: ModelConfig) -> Placement:
    """Choose recorded steps on the CPU, unless the settings or an obstacle (which is logged) require torch.

    Raises:
        ConfigError: the settings cannot be applied, for example a dtype in which the GPU cannot multiply the weights.
    """
    quantised = any(tensor.dtype is None for tensor in checkpoint.tensors.values())
    dtype = device_dtype(config, device)
    if device.type == "cuda" and dtype == "F16" and model.model_type in _BEYOND_F16:
        dtype = _beyond_f16(config, device, model.model_type, kept=quantised and not config.op_by_op)
    if config.deterministic and device.type == "cuda" and is_amd():
        raise ConfigError(
            "deterministic is not supported on AMD GPUs, because the order of sums in their matrix instructions was "
            "not tested: leave --deterministic out",
            "deterministic",
        )
    in_torch = Placement(device, dtype, invariant=config.deterministic and device.type == "cuda")
    if config.op_by_op:
        return _in_torch(config, in_torch, "op_by_op is set")
    if device.type == "cpu" and model.implementation != "native":
        compiled = _recorded(config, in_torch, matrix_obstacle(checkpoint))
        compiled = _in_torch(config, compiled, "the layers are transformers modules")
        if not compiled.recorded:
            return compiled
        use_threads(1)  # a pool of torch would wait for its next operation on the cores of the products' threads
        return dataclasses.replace(compiled, product_threads=config.threads or default_threads())
    if device.type == "cuda":
        if quantised and in_torch.dtype == "F32":
            raise ConfigError(
                "dtype f32 is not supported with quantised weights on a GPU: set dtype='bf16' or dtype='f16', or "
                "op_by_op=True",
                "dtype",
            )
        return _in_torch(config, dataclasses.replace(in_torch, keeps_quantised=quantised), f"{device} is a GPU")
    return _recorded(config, in_torch, recording_obstacle(checkpoint, model, config.block_size))


def encoder_placement(
    config: EngineConfig,
    device: Device,
    checkpoint: Checkpoint,
    obstacle: str | None = None,
    words: tuple[str, ...] = ("F16",),
) -> Placement:
    """Choose the placement of an encoder; in torch its matrices are dequantised. Errors as `choose_placement`.

    `obstacle` is why the model's steps cannot be recorded, None if they can. `words`, see `Placement`, are used on CPUs
    with VNNI, which multiply 16-bit integers twice as fast as floats.
    """
    in_torch = Placement(device, device_dtype(config, device))
    if config.op_by_op or device.type == "cuda":
        return _in_torch(config, in_torch, "op_by_op is set" if config.op_by_op else f"{device} is a GPU")
    # Many tokens are multiplied at a time, so compute is the limit, not memory bandwidth as in a decoder's steps.
    made = _recorded(config, in_torch, obstacle or matrix_obstacle(checkpoint))
    return dataclasses.replace(made, words=words if made.recorded and host_isa() & Isa.VNNI else ())


def _recorded(config: EngineConfig, in_torch: Placement, obstacle: str | None) -> Placement:
    """Return the placement with recorded steps on the CPU, or with torch if there is an obstacle."""
    if obstacle is None:
        return on_cpu(config)
    placement = _in_torch(config, in_torch, obstacle)
    logger.warning("weights are decoded and computed op by op in torch, which is slow: %s", obstacle)
    return placement


def on_cpu(config: EngineConfig) -> Placement:
    """Return the placement of matrices that the compiled CPU kernels multiply."""
    wanted = plain_kind(config.dtype.upper()) if config.dtype in DTYPES else None
    threads = config.threads or default_threads()
    memory = new_memory(lambda: plan_ranks(config.cpu_ranks, threads))
    return Placement(CPU, "F32", memory, wanted)


def _in_torch(config: EngineConfig, placement: Placement, reason: str) -> Placement:
    """Return the placement, after setting torch's threads by `config`; `reason` is why torch is used.

    Raises ConfigError if torch is not installed, or CPU ranks are requested.
    """
    with_experts = placement.device.type == "cuda" and config.cpu_experts != 0  # the CPU may compute experts
    if config.cpu_ranks is not None and config.cpu_ranks > 1 and not with_experts:
        raise ConfigError(
            f"cpu_ranks={config.cpu_ranks} needs the compiled CPU kernels, but {reason}: leave out cpu_ranks, or "
            "tensor_parallel_size where it sets cpu_ranks",
            "cpu_ranks",
        )
    require_torch(reason, "leave it out" if config.op_by_op else "")
    use_threads(config.threads or default_threads())
    return placement


def device_dtype(config: EngineConfig, device: Device) -> str:
    """Return the type of weights and activations in torch; "auto" is F32 on the CPU, else BF16 if supported, or F16.

    Raises ConfigError if the dtype is bfloat16, and the GPU does not support it.
    """
    wanted = DTYPES.get(config.dtype)
    if device.type == "cpu" or wanted in ("F32", "F16"):
        return wanted or "F32"
    from candle_vllm.core.kernels.triton_build import TENSOR_CORES, capability

    found = capability(device)
    if found >= TENSOR_CORES:
        return "BF16"
    if wanted is not None:
        raise ConfigError(
            f"dtype {config.dtype} needs compute capability 8.0 and {device} has {found // 10}.{found % 10}: leave "
            "--dtype out, or set f16 or f32",
            "dtype",
        )
    return "F16"


def _beyond_f16(config: EngineConfig, device: Device, model: str, *, kept: bool) -> str:
    """Return the type for a model that would get float16, but whose activations exceed its range."""
    known = f"activations of {model} are known to exceed the range of float16"
    if config.dtype == "f16":
        logger.warning(
            "%s, and a request whose activations do ends with an error: leave dtype out, or set bf16 or f32", known
        )
        return "F16"
    if kept:
        raise ConfigError(
            f"{known}, {device} does not support bfloat16, and f32 is not supported with quantised weights: set "
            "device='cpu', or dtype='f16' to try it anyway",
            "dtype",
        )
    logger.warning("%s, and %s does not support bfloat16: the model runs in f32", known, device)
    return "F32"


def recording_obstacle(checkpoint: Checkpoint, model: ModelConfig, block_size: int) -> str | None:
    """Return why the compiled CPU kernels cannot run a decoder's checkpoint; None if they can."""
    obstacle = matrix_obstacle(checkpoint)
    if obstacle is not None:
        return obstacle
    if model.stream_count and model.hidden_size % 16:
        return f"residual streams of {model.hidden_size} elements have no kernel"
    if model.compresses:
        sizes = model.head_dim, 0 if model.index is None else model.index.rope + model.index.latent
        return f"compressed entries of {sizes} elements have no kernel" if any(n % 16 for n in sizes) else None
    from candle_vllm.core.kernels.attention.cpu_cache import supported
    from candle_vllm.core.kernels.latent_attention import layout

    if model.latent is not None:
        if not layout.supported(model.latent, block_size):
            return f"latent attention of {model.latent} with blocks of {block_size} tokens (`block_size`) has no kernel"
        has_kernel = model.index is None or layout.choice_supported(model.index)
        return None if has_kernel else f"the sparse-attention indexer {model.index} has no kernel"
    for dim in {spec.key_dim for spec in paged(model.cache_specs)}:
        if not supported(dim, block_size):
            return f"head size {dim} with blocks of {block_size} tokens (`block_size`) has no kernel"
    return None


def matrix_obstacle(checkpoint: Checkpoint) -> str | None:
    """Return why the compiled CPU kernels cannot multiply a checkpoint's matrices; None if they can."""
    from candle_vllm.core.kernels.cpu_runtime.kernel_cache import NO_KERNELS, can_compile

    if not can_compile():
        return NO_KERNELS
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) >= 2 and not _has_kernel(tensor):
            return f"{tensor.name} is {tensor.type_name} {list(tensor.shape)}, which has no kernel"
    return None


def computing_dtype(placement: Placement, checkpoint: Checkpoint) -> str:
    """Return the types in which matrices are multiplied, by number of elements: "bf16", or "int8, f16" if mixed."""
    if placement.weight_memory is None:
        return placement.dtype.lower()
    counts: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if len(tensor.shape) >= 2:
            counts[_matrix_dtype(tensor, placement.plain_kind)] += tensor.numel
    return ", ".join(name for name, _ in counts.most_common())


def memory_of(placement: Placement, checkpoint: Checkpoint) -> int:
    """Estimate the bytes of the loaded weights; decoded weights take more bytes than stored ones."""
    return sum(_memory_of(placement, tensor) for tensor in checkpoint.tensors.values())


@contextmanager
def room_for_weights(
    name: str, placement: Placement, checkpoint: Checkpoint, elsewhere: Set[str] = frozenset(), host_bytes: int = 0
) -> Iterator[None]:
    """Context for loading weights: if memory runs out, raise NoMemoryError, which names a way to need less.

    The tensors with names in `elsewhere` take `host_bytes` of main memory, while the rest goes to a GPU.
    """
    on_host = nullcontext()
    if elsewhere:
        rest = {each: tensor for each, tensor in checkpoint.tensors.items() if each not in elsewhere}
        checkpoint, part = checkpoint.with_tensors(rest), f"the part of {name} that is in main memory"
        on_host = room_for(part, host_bytes, "cpu_experts", lambda _: "set cpu_experts or cpu_offload_gb to less")
    what, size = f"the weights of {name}", memory_of(placement, checkpoint)
    numbers = sum(tensor.numel for tensor in checkpoint.tensors.values() if _memory_of(placement, tensor))

    def way(left: int) -> str:
        smaller = [kind for kind, bits in _SMALLER if bits < 8 * size / numbers - 1 and numbers * bits / 8 < left * 0.8]
        plain = all(tensor.dtype is not None for tensor in checkpoint.tensors.values())
        return f"quantise it while it is loaded (isq={smaller[0]!r})" if plain and smaller else _FEWER

    in_main = size if placement.device.type == "cpu" else 0
    with fitting(placement.device, what, size), on_host, room_for(what, in_main, way=way):
        yield


def _memory_of(placement: Placement, tensor: StoredTensor) -> int:
    if tensor.stays_in_file:
        return 4 * tensor.numel if placement.recorded and tensor.type_name not in MAPPED else 0
    if placement.recorded and tensor.name in TABLES and not isinstance(tensor, Viewed):
        return 0  # the table stays in its mapped file
    if placement.weight_memory is None and not placement.keeps_quantised:
        return tensor.numel * ELEMENTS[placement.dtype].itemsize
    if tensor.dtype is None and not _is_decoded(placement, tensor):
        if tensor.block_type is None:
            return tensor.nbytes
        if placement.weight_memory is not None:
            layout = LAYOUTS[host_kind(tensor.block_type)]
            return tensor.numel * layout.block_bytes // (ROWS * GROUP * layout.groups)
        from candle_vllm.core.kernels.gguf_linear.layout import PLANES, gguf_kind

        kind = gguf_kind(GGMLQuantizationType.Q5_0 if tensor.type_name == "MXFP4" else tensor.block_type)
        return int(tensor.numel * PLANES[kind].bits_each / 8)
    if placement.keeps_quantised:
        return tensor.numel * ELEMENTS[placement.dtype].itemsize
    kind = placement.plain_kind
    if placement.words and kind is None and tensor.dtype == "F16":
        return tensor.numel * 17 // 8  # int8 with a scale for each 32 elements
    return tensor.numel * ELEMENTS[(tensor.dtype or "BF16") if kind is None else kind.name].itemsize


def _is_decoded(placement: Placement, tensor: StoredTensor) -> bool:
    """Return whether a matrix is decoded for lack of a kernel; tables and experts of mixed types are not recognised."""
    unit = LEAST_SPAN
    if placement.keeps_quantised:
        from candle_vllm.core.kernels.group_linear.layout import PART as unit
    return tensor.decodes(unit)


def _matrix_dtype(tensor: StoredTensor, wanted: PlainKind | None) -> str:
    if tensor.span is not None:
        return "bf16"
    if tensor.dtype is None:
        return "int8"
    return (plain_kind(tensor.dtype) if wanted is None else wanted).name.lower()


def _has_kernel(matrix: StoredTensor) -> bool:
    """Return whether the compiled kernels can multiply a matrix: rows are not too long, and consist of whole blocks."""
    columns = matrix.shape[-1]  # the last dimension, because a tensor may have all experts
    if matrix.block_type is None:
        return columns <= MAX_COLUMNS
    layout = LAYOUTS[packed_kind(matrix.block_type)]
    return columns % (GROUP * layout.groups) == 0 and columns <= MAX_PACKED_COLUMNS
