# SPDX-License-Identifier: MIT
"""The table of all settings, which defines flags, variables, models.yaml keys, help and the fields of `Settings`.

Read before step 1 of a request's life. A setting called `block_size` is the field `Settings.block_size`, the variable
`CANDLE_VLLM_BLOCK_SIZE`, the flag `--block-size` unless `flags` names others, and, with `in_yaml`, a key of `params` in
models.yaml. The short names with two dashes (`--m`, `--p`) come from the Rust candle-vllm, the long ones from other
servers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from candle_vllm.core.config import CACHE_ALIASES, ISQ_NAMES
from candle_vllm.core.pooling import TextPooling
from candle_vllm.core.sampling.params import BOUNDS, DEFAULT_SAMPLING, SamplingParams
from candle_vllm.core.sampling.thoughts import MAX_MESSAGE
from candle_vllm.core.setting_kinds import (
    Boolean,
    Choice,
    FilePath,
    Integer,
    JsonObject,
    Number,
    Seconds,
    Secret,
    TemplateFile,
    Text,
)
from candle_vllm.core.shown import LOG_STYLES
from candle_vllm.core.targets import is_loopback
from candle_vllm.responses.store.backend import MAX_DAYS, MAX_MB, MAX_RECORDS, SHORT_URLS
from candle_vllm.server.settings.adapters import AdapterText
from candle_vllm.server.settings.options import (
    ADAPTERS,
    BATCHES,
    CALLS,
    DEVICE,
    HTTP,
    LIMITS,
    LOGGING,
    MAILBOX,
    MODEL,
    MODELS,
    RESPONSES,
    REUSES,
    SAMPLING,
    SERVES,
    TOOLS,
    Address,
    Option,
    Rate,
    Told,
    UsageError,
    engine,
    own,
    parse_address,
    shown,
)  # fmt: skip

_LEVELS = Choice(("debug", "info", "warning", "error"), {"warn": "warning"})
_CACHE = {"aliases": CACHE_ALIASES}
_ISQ_ALIASES = {name[:-1] + "_k": name for name in ISQ_NAMES if name.endswith("k")}
SAMPLED = SamplingParams().filled(DEFAULT_SAMPLING)  # where neither the settings nor the model say else


def _sampler(name: str, text: str, metavar: str = "X") -> Told:
    """Return a maker of a default for requests; if it is not set, the model's files decide, else llama.cpp's value."""
    unset = f"the model's, else {getattr(SAMPLED, name):g}"
    return own(SAMPLING, BOUNDS[name], text, metavar, in_yaml=True, unset=unset)


# fmt: off
@dataclass(frozen=True, kw_only=True, repr=False)
class _Checked:
    """Base of the options of one part; each value is checked when the object is created (UsageError)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            option, value = BY_NAME[field.name], getattr(self, field.name)
            if value is None or value == option.default:
                continue
            try:
                for single in value if option.repeat else (value,):
                    option.kind.check(single)
            except ValueError as error:
                raise UsageError(f"{option.name} {error}") from None

    def __repr__(self) -> str:
        """Show the values that differ from the defaults, without secrets."""
        given = [(BY_NAME[field.name], getattr(self, field.name)) for field in dataclasses.fields(self)]
        told = [f"{each.name}={shown(each, value)!r:.200}" for each, value in given if value != each.default]
        return f"{type(self).__name__}({', '.join(told)})"


@dataclass(frozen=True, kw_only=True, repr=False)
class SourceOptions(_Checked):
    """Which model, and which of its files."""

    model: Annotated[str | None, own(MODEL,
        Text(), "Hugging Face id, folder, .gguf file, address, name in models.yaml, or demo", "MODEL",
        flags=("--m", "--model"), rivals="model source", unset="the default of models.yaml, else demo")] = None
    weight_path: Annotated[Path | None, own(MODEL,
        FilePath(), "folder with the model's files", "DIR", flags=("--w", "--weight-path"),
        rivals="model source")] = None
    weight_file: Annotated[str | None, own(MODEL,
        Text(), "weight file inside the model's folder or repository; alone, a .gguf file", "FILE",
        flags=("--f", "--weight-file"), unset="the model's only one")] = None
    revision: Annotated[str | None, engine(MODEL, "REV", unset="the repository's main branch")] = None


@dataclass(frozen=True, kw_only=True, repr=False)
class FormatOptions(_Checked):
    """Names of a model, and the format of its conversations and images."""

    tokenizer: Annotated[Path | None, engine(MODEL, "DIR", unset="the model's")] = None
    chat_template: Annotated[Path | str | None, own(MODEL,
        TemplateFile(), "Jinja chat template to use instead: a file, its text, or chatml", "FILE", in_yaml=True,
        needs=SAMPLING, unset="the model's")] = None
    pooling: Annotated[TextPooling | None, engine(MODEL, "KIND", needs=SERVES)] = None
    mmproj: Annotated[Path | None, engine(MODEL, "FILE", flags=("--mmproj", "--vision-model-path"),
        needs=SAMPLING)] = None
    max_images: Annotated[int | None, engine(MODEL, "N", needs=SAMPLING)] = None
    mm_processor_kwargs: Annotated[Mapping[str, Any] | None, engine(MODEL, "JSON", needs=SAMPLING)] = None
    default_chat_template_kwargs: Annotated[dict[str, Any] | None, own(MODEL,
        JsonObject(), "variables of the chat template, as JSON, where a request does not set them "
        """(chat_template_kwargs): '{"enable_thinking": false}'""", "JSON", in_yaml=True, needs=SAMPLING)] = None
    tool_parser: Annotated[str | None, own(MODEL,
        Text(128), "format of the model's tool calls (docs/tool-calling.md)", "NAME", in_yaml=True, needs=CALLS,
        flags=("--tool-parser", "--tool-call-parser", "--enforce-parser"), unset="chosen by the model's files")] = None
    open_objects: Annotated[bool, engine(MODEL, needs=CALLS)] = False
    reasoning_parser: Annotated[str | None, own(MODEL,
        Text(128), "format of the model's reasoning", "NAME", in_yaml=True, needs=SAMPLING,
        unset="chosen by the model's files")] = None
    reasoning_budget: Annotated[int | None, own(MODEL,
        BOUNDS["thinking_token_budget"], "default limit of reasoning tokens; -1 is no limit", "N",
        in_yaml=True, needs=SAMPLING, unset="no limit")] = None
    reasoning_budget_message: Annotated[str | None, own(MODEL,
        Text(MAX_MESSAGE), "text that ends the reasoning when its budget is used up", "TEXT", in_yaml=True,
        needs=SAMPLING, unset="the model makers'")] = None
    served_model_name: Annotated[tuple[str, ...], own(MODEL,
        Text(512), "name of the model for clients; repeatable, the first is reported", "NAME", in_yaml=True,
        needs=SERVES, unset="the model's own name")] = ()
    strict_model_names: Annotated[bool, own(MODEL,
        Boolean(), "refuse requests that name another model, even if only one model is served", needs=SERVES)] = False
    models_config: Annotated[Path | None, own(MODEL,
        FilePath(), "file with models and their settings", "FILE",
        unset="~/.candle-vllm/models.yaml, else ./models.yaml")] = None


@dataclass(frozen=True, kw_only=True, repr=False)
class HubOptions(SourceOptions):
    """Which model, and how it is downloaded."""

    hf_token: Annotated[str | None, own(MODEL,
        Secret(), "name of the environment variable that holds the Hugging Face token, or the token itself (hf_...)",
        "NAME|TOKEN", engine="hf_token", rivals="Hugging Face token",
        unset="HF_TOKEN, else the token of `hf auth login`")] = None
    hf_token_path: Annotated[Path | None, own(MODEL,
        FilePath(), "file that holds the Hugging Face token", "FILE", rivals="Hugging Face token")] = None
    download_dir: Annotated[Path | None, engine(MODEL, "DIR", unset="Hugging Face's cache")] = None
    offline: Annotated[bool, engine(MODEL, in_yaml=False)] = False


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelOptions(HubOptions, FormatOptions, SourceOptions):
    """Options of an engine and its model, and the sampling defaults."""

    isq: Annotated[str | None, engine(MODEL, "TYPE", reading={"aliases": _ISQ_ALIASES}, unset="off")] = None
    imatrix: Annotated[Path | None, engine(MODEL, "FILE")] = None
    packed_cache: Annotated[str | None, engine(MODEL, "DIR", needs=DEVICE)] = None
    load_format: Annotated[str | None, engine(MODEL, "FORMAT", needs=DEVICE)] = None
    model_impl: Annotated[str | None, engine(MODEL, "LAYERS", needs=DEVICE)] = None
    enable_lora: Annotated[bool, engine(MODEL, needs=ADAPTERS)] = False
    device: Annotated[str | None, engine(DEVICE,
        "DEVICE", text="auto, cpu, cuda, cuda:N, or just N for a GPU; a model is divided among several (0,1); --cpu is "
        "--device cpu", reading={"several": True}, flags=("--d", "--device"), constants={"--cpu": "cpu"})] = None
    tensor_parallel_size: Annotated[int | None, engine(DEVICE, "N")] = None
    pipeline_parallel_size: Annotated[int | None, engine(DEVICE, "N")] = None
    nnodes: Annotated[int | None, engine(DEVICE, "N")] = None
    node_rank: Annotated[int | None, engine(DEVICE, ""
        "K", more="; the others have no HTTP server", needs=SERVES)] = None
    master_addr: Annotated[str | None, engine(DEVICE, "HOST")] = None
    master_port: Annotated[int | None, engine(DEVICE, "PORT")] = None
    cluster_key: Annotated[str | None, own(DEVICE,
        Secret(), "shared secret of all machines, 16 characters or more; a machine without it is refused", "KEY",
        engine="cluster_key")] = None
    distributed_executor_backend: Annotated[str | None, engine(DEVICE,
        "NAME", reading={"aliases": {"uni": "mp"}})] = None
    enable_expert_parallel: Annotated[bool, engine(DEVICE)] = False
    all2all_backend: Annotated[str | None, engine(DEVICE, "NAME")] = None
    data_parallel_size: Annotated[int | None, engine(DEVICE, "N",
        text="replicas of the model behind one address, each in its own process, on its own GPU or share of the CPU "
        "threads (docs/scaling.md)", needs=SERVES)] = None
    cpu_experts: Annotated[int | None, engine(DEVICE, "N", more="; auto: the default; all: all layers",
        reading={"auto": True, "whole": True}, unset="as many as do not fit")] = None
    cpu_offload_gb: Annotated[float | None, engine(DEVICE, "GIB", unset="as much as does not fit")] = None
    gpu_layers: Annotated[int | None, engine(DEVICE, "N", more="; auto: the default; all: the model must fit",
        reading={"auto": True, "whole": True}, flags=("--gpu-layers", "--n-gpu-layers"), unset="as many as fit")] = None
    dtype: Annotated[str | None, engine(DEVICE, "TYPE")] = None
    op_by_op: Annotated[bool, engine(DEVICE, on="--op-by-op")] = False
    attention_backend: Annotated[str | None, engine(DEVICE, "NAME")] = None
    kv_cache_dtype: Annotated[str | None, engine(DEVICE,
        "TYPE", more="; --fp8-kvcache is fp8", reading=_CACHE,
        flags=("--kv-cache-dtype", "--kvcache-dtype"), constants={"--fp8-kvcache": "fp8"})] = None
    key_cache_dtype: Annotated[str | None, engine(DEVICE, "TYPE", reading=_CACHE)] = None
    value_cache_dtype: Annotated[str | None, engine(DEVICE, "TYPE", reading=_CACHE)] = None
    cuda_graphs: Annotated[bool | None, engine(DEVICE, off=("--disable-cuda-graph", "--no-cuda-graphs"))] = None
    max_cudagraph_capture_size: Annotated[int | None, engine(DEVICE, "N")] = None
    deterministic: Annotated[bool, engine(DEVICE)] = False
    mem: Annotated[int | None, own(DEVICE,
        Integer(1, 1 << 30), "memory of the KV cache, in MB of 2^20 bytes", "MB", in_yaml=True,
        rivals="KV cache size")] = None
    kv_cache_memory_bytes: Annotated[int | None, engine(DEVICE,
        "BYTES", text="memory of the KV cache in bytes, instead of --mem; 4G is 4 * 2^30", name="kv_cache_memory",
        rivals="KV cache size")] = None
    kv_fraction: Annotated[float | None, engine(DEVICE, "SHARE", rivals="KV cache size")] = None
    gpu_memory_utilization: Annotated[float | None, engine(DEVICE, "SHARE", rivals="KV cache size",
        unset="unused: kv_fraction applies")] = None
    block_size: Annotated[int | None, engine(DEVICE, "N")] = None
    engine_process: Annotated[bool, own(DEVICE,
        Boolean(), "run the engine in its own process, which is restarted when it dies", in_yaml=True,
        needs=SERVES)] = False
    threads: Annotated[int | None, engine(DEVICE, "N",
        unset="one for each usable physical core, within the CPU quota")] = None
    cpu_ranks: Annotated[int | None, engine(DEVICE,
        "N", more="; auto: the default", reading={"auto": True}, unset="one for each NUMA node")] = None
    cpu_level: Annotated[str | None, engine(DEVICE, "LEVEL", unset="the best of this CPU")] = None
    max_model_len: Annotated[int | None, engine(LIMITS,
        "N", more="; auto: the default", reading={"auto": True}, unset="as many as the model and memory allow")] = None
    yarn_scaling_factor: Annotated[float | None, engine(LIMITS, "FACTOR", unset="off")] = None
    max_num_seqs: Annotated[int | None, engine(LIMITS, "N", needs=BATCHES)] = None
    prefill_chunk_size: Annotated[int | None, engine(LIMITS,
        "N", name="max_num_batched_tokens", flags=("--prefill-chunk-size", "--max-num-batched-tokens"))] = None
    enable_prefix_caching: Annotated[bool | None, engine(LIMITS,
        off=("--disable-prefix-cache", "--no-enable-prefix-caching"), needs=REUSES)] = None
    state_cache_gb: Annotated[float | None, engine(LIMITS, "GIB", needs=REUSES,
        unset="a quarter of the cache's memory, if layers have a state")] = None
    kv_offloading_size: Annotated[float | None, engine(LIMITS, "GIB", needs=REUSES)] = None
    prompt_cache_path: Annotated[Path | None, engine(LIMITS, "DIR", needs=REUSES)] = None
    prompt_cache_url: Annotated[str | None, own(LIMITS,
        Secret(), "Redis to which full KV blocks are written, shared by all servers of a model: "
        "redis://user:password@host:port/db, or rediss:// for TLS", "URL", in_yaml=True,
        engine="prompt_cache_url", needs=REUSES)] = None
    prompt_cache_bytes: Annotated[int | None, engine(LIMITS, "BYTES", more="; 4G is 4 * 2^30", needs=REUSES)] = None
    speculative_config: Annotated[Mapping[str, Any] | None, engine(LIMITS, "JSON", unset="suffix on the CPU")] = None
    max_loras: Annotated[int | None, engine(LIMITS, "N", needs=ADAPTERS, unset="max_num_seqs, on a GPU 8")] = None
    max_lora_rank: Annotated[int | None, engine(LIMITS, "N", needs=ADAPTERS)] = None
    max_cpu_loras: Annotated[int | None, engine(LIMITS, "N", needs=ADAPTERS, unset="what lora_memory holds")] = None
    lora_memory: Annotated[int | None, engine(LIMITS, "BYTES", more="; 4G is 4 * 2^30", needs=ADAPTERS,
        unset="a quarter of what is free after loading, 64 MiB to 4 GiB")] = None
    lora_dtype: Annotated[str | None, engine(LIMITS, "TYPE", needs=ADAPTERS)] = None
    max_queued_requests: Annotated[int | None, engine(LIMITS, "N", more=" with 503", needs=SERVES)] = None
    stream_interval: Annotated[int | None, engine(LIMITS, "N", needs=SERVES)] = None
    seed: Annotated[int | None, engine(LIMITS, "N", reading={"units": False}, needs=SAMPLING,
        unset="random for each request")] = None
    temperature: Annotated[float | None, _sampler("temperature", "0 is greedy")] = None
    top_p: Annotated[float | None, _sampler(
        "top_p", "keep the most likely tokens up to this sum of probabilities")] = None
    top_k: Annotated[int | None, _sampler("top_k", "keep the K most likely tokens; 0 or -1 keeps all", "K")] = None
    min_p: Annotated[float | None, _sampler(
        "min_p", "drop tokens whose probability is below this share of the most likely token's")] = None
    frequency_penalty: Annotated[float | None, _sampler(
        "frequency_penalty", "penalty for each earlier occurrence of a token")] = None
    presence_penalty: Annotated[float | None, _sampler(
        "presence_penalty", "penalty for tokens that have occurred")] = None
    repetition_penalty: Annotated[float | None, _sampler("repetition_penalty",
        "divides positive and multiplies negative logits of tokens that have occurred; 1 turns it off")] = None

    @property
    def has_own_process(self) -> bool:
        """Whether the model's engine, or each replica, runs in its own process and is restarted automatically."""
        return self.engine_process or (self.data_parallel_size or 1) > 1

    @functools.cached_property
    def default_sampling(self) -> Mapping[str, float | int]:
        """The sampling settings that are set, by their names in requests."""
        names = [option.name for option in OPTIONS if option.group == SAMPLING]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True, kw_only=True, repr=False)
class ManagerOptions(_Checked):
    """Limits on several models, and whether clients may change them."""

    max_loaded_models: Annotated[int | None, own(MODELS,
        Integer(1, 1024), "most models in memory", "N", unset="as many as fit")] = None
    idle_unload_secs: Annotated[int | None, own(MODELS,
        Seconds(1, 1 << 24), "unload a model after this time without a request", "SECONDS", unset="never")] = None
    queue_size: Annotated[int, own(MODELS,
        Integer(1, 1 << 16), "most requests that may wait for a model to load, for each model", "N")] = 256
    model_wait_timeout: Annotated[int, own(MODELS,
        Seconds(1, 86400), "how long a request waits for a model to load", "SECONDS")] = 600
    model_drain_timeout: Annotated[int, own(MODELS,
        Seconds(0, 86400), "how long a model may finish its requests before it is unloaded to make "
        "room for another", "SECONDS")] = 120
    allow_model_changes: Annotated[bool, own(MODELS,
        Boolean(), "serve downloaded models, and let operators pull, copy and delete models (/api/pull, /api/copy, "
        "/api/delete), or add, remove and reload them (/v1/models/add, remove, reload)")] = False


@dataclass(frozen=True, kw_only=True, repr=False)
class AdapterOptions(ModelOptions):
    """Options of a model with its LoRA adapters, and where further adapters are downloaded from."""

    lora_modules: Annotated[tuple[str, ...], own(ADAPTERS,
        AdapterText(), "LoRA adapter to serve (docs/lora.md): name=path, or JSON with name, path, pinned and scale; "
        "repeatable", "NAME=PATH", in_yaml=True)] = ()
    lora_init_without_apply: Annotated[bool, own(ADAPTERS,
        Boolean(), "apply adapters only to requests that name them, whatever their scale",
        in_yaml=True, needs=SERVES)] = False
    lora_warmup: Annotated[tuple[str, ...], own(ADAPTERS,
        Text(512), "name of an adapter to load together with its model; repeatable", "NAME",
        in_yaml=True, needs=SERVES)] = ()
    lora_resolver: Annotated[tuple[str, ...], own(ADAPTERS,
        Text(), "where to look for an unknown adapter that a request names: local=DIR, hf=org/* (just hf is every "
        "repository), s3=BUCKET/FOLDER or tar=https://HOST/{name}.tar.gz; repeatable, asked in order",
        "SOURCE", needs=SERVES, unset="none: an unknown name is refused with 404")] = ()
    lora_allowed_bases: Annotated[tuple[str, ...], own(ADAPTERS,
        Text(512), "base model that an adapter of a resolver must name, with * for any characters; repeatable",
        "PATTERN", needs=SERVES, unset="any base")] = ()
    lora_max_mb: Annotated[int, own(ADAPTERS,
        Integer(1, 1 << 20), "largest adapter to download, in MB of 2^20 bytes", "MB", needs=SERVES)] = 1024
    lora_fetch_timeout: Annotated[int, own(ADAPTERS,
        Seconds(1, 86400), "how long the download of an adapter may take", "SECONDS", needs=SERVES)] = 120
    lora_cache_dir: Annotated[Path | None, own(ADAPTERS,
        FilePath(), "folder for downloaded adapters", "DIR", needs=SERVES,
        unset="adapters in --download-dir, or ~/.cache/candle-vllm/adapters")] = None
    lora_cache_bytes: Annotated[int, own(ADAPTERS,
        Integer(1 << 20, 1 << 50), "most bytes of downloaded adapters on disk; the least recently used are deleted; 4G "
        "is 4 * 2^30", "BYTES", needs=SERVES)] = 10 << 30
    allow_runtime_lora: Annotated[bool, own(ADAPTERS,
        Boolean(), "let operators load adapters from this machine's files, and unload them, while the server runs "
        "(/v1/load_lora_adapter, /v1/unload_lora_adapter)", needs=HTTP)] = False


@dataclass(frozen=True, kw_only=True, repr=False)
class StorageOptions(_Checked):
    """Where answers, responses, conversations and files are stored, and for how long."""

    mailbox: Annotated[str | None, own(MAILBOX,
        Secret(), "store answers for clients that ask for it: sqlite (in ~/.candle-vllm), " + " or ".join(SHORT_URLS),
        "URL", unset="off: nothing is stored")] = None
    mailbox_retention_secs: Annotated[int, own(MAILBOX,
        Seconds(1, 30 * 86400), "how long a finished answer is stored", "SECONDS")] = 3600
    webhook_allowed_hosts: Annotated[tuple[str, ...], own(MAILBOX,
        Text(512), "host to which answers may be pushed (webhooks), or *.example.com; repeatable", "HOST",
        unset="none: clients may name no webhook")] = ()
    webhook_allow_private: Annotated[bool, own(MAILBOX,
        Boolean(), "allow private addresses for hosts that are listed by name")] = False
    responses_store: Annotated[str, own(RESPONSES,
        Secret(), "where responses and conversations are stored: memory (until the server ends), sqlite (in "
        f"~/.candle-vllm), {', '.join(SHORT_URLS)}, or off", "URL")] = "memory"
    responses_retention_days: Annotated[int, own(RESPONSES,
        Integer(1, MAX_DAYS), "how long responses, files and batches are stored", "DAYS")] = 30
    responses_max_records: Annotated[int, own(RESPONSES,
        Integer(1, MAX_RECORDS), "most stored responses and conversations of all keys; the "
        "least recently used are deleted", "N")] = 10_000
    responses_max_mb: Annotated[int, own(RESPONSES,
        Integer(1, MAX_MB), "most stored data of responses and conversations, in MB of 2^20 bytes; the least recently "
        "used are deleted", "MB")] = 256
    files_max_mb: Annotated[int, own(RESPONSES,
        Integer(1, MAX_MB), "most stored files (docs/batches.md), in MB of 2^20 bytes; the least recently used are "
        "deleted; with several keys, one key may have half", "MB")] = 256
    file_max_mb: Annotated[int, own(RESPONSES,
        Integer(1, MAX_MB), "largest stored file, in MB of 2^20 bytes", "MB")] = 100


@dataclass(frozen=True, kw_only=True, repr=False)
class ToolOptions(_Checked):
    """MCP servers, and the limits on their tools."""

    mcp_config: Annotated[Path | None, own(TOOLS,
        FilePath(), "file with the MCP servers (docs/mcp.md)", "FILE",
        unset="~/.candle-vllm/mcp.json, else ./mcp.json")] = None
    mcp_command: Annotated[str | None, own(TOOLS,
        Text(), "program of an additional MCP server, called default", "PROGRAM", needs=SERVES)] = None
    mcp_args: Annotated[str | None, own(TOOLS,
        Text(), "arguments of --mcp-command, as in a shell, or separated by commas: --mcp-args=--port,80", "ARGS",
        needs=SERVES, secret=True)] = None
    mcp_execute: Annotated[bool, own(TOOLS,
        Boolean(), "in chat requests without tools, run the calls of tools that mcp.json approves",
        needs=SERVES)] = False
    mcp_max_turns: Annotated[int, own(TOOLS,
        Integer(1, 1000), "most model turns in a chat request whose tools the server runs", "N", needs=SERVES)] = 8
    mcp_max_tool_calls: Annotated[int, own(TOOLS,
        Integer(0, 10000), "most tool calls that the server runs in one chat request", "N", needs=SERVES)] = 32
    mcp_tool_timeout: Annotated[float | None, own(TOOLS,
        Number(0, 3600, open_low=True), "most seconds for one tool call, even if mcp.json allows more", "SECONDS",
        needs=SERVES, unset="the timeout in mcp.json, or 60")] = None
    mcp_allow_urls: Annotated[tuple[str, ...], own(TOOLS,
        Text(2048), "MCP server that requests to /v1/responses may name: https://host/path, * for any characters; "
        "repeatable", "PATTERN", needs=SERVES)] = ()


@dataclass(frozen=True, kw_only=True, repr=False)
class AccessOptions(_Checked):
    """Where the server listens, who may call it, and how often."""

    host: Annotated[str, own(HTTP,
        Text(512), "address to listen on: host, host:port, [v6]:port, tcp://, http:// or unix:///path", "HOST",
        flags=("--h", "--host"))] = "127.0.0.1"
    port: Annotated[int, own(HTTP,
        Integer(0, 65535, units=False), "TCP port; 0 takes a free one", "PORT", flags=("--p", "--port"))] = 2000
    ollama_port: Annotated[int | None, own(HTTP,
        Integer(1, 65535, units=False), "second TCP port for Ollama's clients, which expect 11434", "PORT",
        unset="off")] = None
    ui_server: Annotated[bool, own(HTTP, Boolean(), "serve the web UI at /")] = False
    api_key: Annotated[tuple[str, ...], own(HTTP,
        Secret(), "key that clients must send as `Authorization: Bearer`; repeatable", "KEY",
        unset="none: clients need no key")] = ()
    api_key_file: Annotated[Path | None, own(HTTP, FilePath(), "file with one API key per line", "FILE")] = None
    api_keys_file: Annotated[Path | None, own(HTTP,
        FilePath(), "YAML file of API keys with names, expiry and limits; it is read again when it changes",
        "FILE")] = None
    management_key: Annotated[tuple[str, ...], own(HTTP,
        Secret(), "key for operators' routes, such as /metrics, which API keys then do not open; repeatable",
        "KEY", unset="the API keys are accepted")] = ()
    max_queued_per_key: Annotated[int | None, own(HTTP,
        Integer(1, 1 << 20), "most unfinished sequences of one API key; further requests are "
        "refused with 429", "N", unset="half of max_queued_requests if there are several keys")] = None
    requests_per_minute: Annotated[int | None, own(HTTP,
        Integer(1, 1 << 30), "most requests of one API key in a minute; further requests are refused with 429; without "
        "keys, of all clients together", "N", rate=Rate("requests", "minute", 60.0), unset="no limit")] = None
    tokens_per_minute: Annotated[int | None, own(HTTP,
        Integer(1, 1 << 40), "most tokens (prompts and answers) of one API key in a minute; further requests are "
        "refused with 429; without keys, of all clients together", "N",
        rate=Rate("tokens", "minute", 60.0), unset="no limit")] = None
    request_timeout: Annotated[int, own(HTTP,
        Seconds(1, 1 << 20), "seconds after which a request is aborted, its time in the "
        "queue included", "SECONDS")] = 3600
    cors_origin: Annotated[tuple[str, ...], own(HTTP,
        Text(512), "web origin whose pages may call this server, or *; * in it is any host; repeatable", "ORIGIN")] = ()
    root_path: Annotated[str | None, own(HTTP,
        Text(256), "prefix that paths may have, where a proxy passes it on: /models/a", "PATH")] = None

    @property
    def rates(self) -> dict[str, int]:
        """The limits of API keys without limits of their own, by setting name (`RATES`)."""
        return {name: value for name in RATES if (value := getattr(self, name)) is not None}

    @property
    def has_api_keys(self) -> bool:
        """Whether clients need a key."""
        return bool(self.api_key or self.api_key_file or self.api_keys_file)

    @property
    def is_local(self) -> bool:
        """Whether clients can connect only from this machine."""
        address = parse_address(self.host, self.port)
        return address.unix_path is not None or is_loopback(address.host)

    @property
    def is_guarded(self) -> bool:
        """Whether clients may change models: only if they need keys, or can connect only from this machine."""
        return self.has_api_keys or bool(self.management_key) or self.is_local


@dataclass(frozen=True, kw_only=True, repr=False)
class ListenerOptions(AccessOptions):
    """Access to the server, over HTTP or HTTPS."""

    ssl_certfile: Annotated[Path | None, own(HTTP,
        FilePath(), "certificate chain in PEM, for HTTPS", "FILE")] = None
    ssl_keyfile: Annotated[Path | None, own(HTTP,
        FilePath(), "private key in PEM, without a password; may stand in the file of the certificate", "FILE")] = None
    ssl_ca_certs: Annotated[Path | None, own(HTTP,
        FilePath(), "CA certificates in PEM that sign the certificates of clients", "FILE")] = None
    ssl_cert_reqs: Annotated[int, own(HTTP,
        Integer(0, 2, units=False), "whether clients need certificates: 0 no, 1 optional, 2 required", "N")] = 0
    ssl_ciphers: Annotated[str | None, own(HTTP,
        Text(), "ciphers of TLS 1.2, as OpenSSL writes them", "CIPHERS")] = None
    enable_ssl_refresh: Annotated[bool, own(HTTP,
        Boolean(), "reload certificate and key when their files change")] = False

    @property
    def address(self) -> Address:
        """Address to listen on, from `host` and `port`."""
        return dataclasses.replace(parse_address(self.host, self.port), tls=self.ssl_certfile is not None)


@dataclass(frozen=True, kw_only=True, repr=False)
class RequestOptions(_Checked):
    """What requests may contain, how large they may be, and how long a shutdown waits for them."""

    unknown_fields: Annotated[str, own(HTTP,
        Choice(("refuse", "warn")), "unknown fields of a request: refuse it, or warn (leave them out and name them in "
        "the header x-warning)", "HOW")] = "refuse"
    max_body_mb: Annotated[int, own(HTTP, Integer(1, 1024), "largest request body, in MB of 2^20 bytes", "MB")] = 8
    max_held_mb: Annotated[int, own(HTTP,
        Integer(1, 1 << 20), "most request bodies and messages in memory that are unparsed or whose requests wait, in "
        "MB of 2^20 bytes; one API key may have half; further requests are refused with 503", "MB")] = 512
    allowed_media_domains: Annotated[tuple[str, ...], engine(HTTP, "HOST", more="; several with commas; repeatable",
        in_yaml=False, unset="none: nothing is fetched")] = ()
    allowed_local_media_path: Annotated[Path | None, engine(HTTP, "DIR", in_yaml=False)] = None
    enable_request_priority: Annotated[bool, own(HTTP,
        Boolean(), "let clients raise the priority of their requests (`priority`)")] = False
    enable_force_include_usage: Annotated[bool, own(HTTP,
        Boolean(), "end every stream with its token counts, even if the request does not ask for it (`stream_options`)"
        )] = False
    return_tokens_as_token_ids: Annotated[bool, own(HTTP,
        Boolean(), "name tokens in log-probabilities `token_id:5` where a request does not say otherwise")] = False
    trust_request_chat_template: Annotated[bool, own(HTTP,
        Boolean(), "let clients send their own chat template (`chat_template`)")] = False
    shutdown_timeout: Annotated[int, own(HTTP,
        Seconds(0, 86400), "seconds for running requests to finish on shutdown", "SECONDS")] = 30


@dataclass(frozen=True, kw_only=True, repr=False)
class LoggingOptions(_Checked):
    """Logs and traces."""

    log_requests: Annotated[bool, own(LOGGING,
        Boolean(), "log one line per HTTP request and one per generation, without its content", needs=SERVES)] = False
    log_prompts: Annotated[bool, own(LOGGING,
        Boolean(), "also log the beginning of each prompt (needs --log-requests)", needs=SERVES)] = False
    log_format: Annotated[str, own(LOGGING,
        Choice(tuple(LOG_STYLES)), ", or ".join(style.help for style in LOG_STYLES.values()), "FORMAT",
        needs=SERVES)] = "text"
    log_file: Annotated[Path | None, own(LOGGING,
        FilePath(), "file to which the log is appended as well; --log is candle-vllm.log",
        "FILE", constants={"--log": Path("candle-vllm.log")}, needs=SERVES)] = None
    otlp_endpoint: Annotated[str | None, own(LOGGING,
        Text(2048), "OTLP/HTTP collector for traces, such as http://127.0.0.1:4318; needs "
        "candle-vllm[telemetry]", "URL", needs=SERVES, unset="off: no traces")] = None
    log_level: Annotated[str, own(LOGGING, _LEVELS, "debug, info, warning or error", "LEVEL")] = "info"
# fmt: on


@dataclass(frozen=True, kw_only=True, repr=False)
class AgentOptions(ToolOptions, ModelOptions):
    """Options of the command `agent`."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings(
    LoggingOptions, RequestOptions, ListenerOptions, AgentOptions, ToolOptions, StorageOptions, AdapterOptions,
    ManagerOptions, ModelOptions,
):  # fmt: skip
    """The settings of `docs/configuration.md`: the options of all parts, in the reverse order of these bases.

    A field whose default is None leaves the choice to the engine, the model or the machine.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log_prompts and not self.log_requests:
            raise UsageError("log_prompts adds to the request log, which is off: set log_requests as well")
        parse_address(self.host, self.port)
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise UsageError(f"root_path {self.root_path!r} must begin with a slash and end without one: /models/a")


def _options() -> tuple[Option, ...]:
    told = get_type_hints(Settings, include_extras=True)
    return tuple(told[each.name].__metadata__[0](each.name, each.default) for each in dataclasses.fields(Settings))


OPTIONS = _options()
BY_NAME: Mapping[str, Option] = {option.name: option for option in OPTIONS}
RATES: Mapping[str, Rate] = {option.name: option.rate for option in OPTIONS if option.rate is not None}
"""The limits of API keys, by their settings, which are also keys of `--api-keys-file`."""
