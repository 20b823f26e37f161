# SPDX-License-Identifier: MIT
"""`candle-vllm config`: print every setting with its value and its source, without reading weights.

Settings that are not set get the value that applies: from the model's files, if they are on this machine, or from the
machine. Settings that `serve` refuses before it reads the weights are refused here.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from candle_vllm.core.assembly.draft import describe_draft
from candle_vllm.core.assembly.encoder import is_encoder
from candle_vllm.core.assembly.model import describe_model
from candle_vllm.core.assembly.opening import open_model
from candle_vllm.core.assembly.placement import resolve_ranks
from candle_vllm.core.assembly.tower import tower_memory
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.devices import Device, choose_device
from candle_vllm.core.engine.build import DEFAULTS, foreseen_cache, step_size
from candle_vllm.core.errors import ModelNotFoundError
from candle_vllm.core.kernels.cpu_runtime.level import best_level
from candle_vllm.core.kernels.cpu_runtime.numa import plan_ranks
from candle_vllm.core.loading.source import HUB_ID, ModelFiles, model_files
from candle_vllm.core.memory import cache_bytes, device_element_bytes
from candle_vllm.core.quantization.plain import ELEMENTS
from candle_vllm.core.threads import default_threads
from candle_vllm.server.http.keys import Keyring
from candle_vllm.server.http.tls import tls_context
from candle_vllm.server.mailbox.options import MailboxOptions
from candle_vllm.server.mcp.options import mcp_options
from candle_vllm.server.models.library import template_and_formats
from candle_vllm.server.reloading import warn_of_missing
from candle_vllm.server.routes.ollama_library import refuse_open_changes
from candle_vllm.server.serve import open_manager
from candle_vllm.server.settings.configuration import Configuration
from candle_vllm.server.settings.derived import engine_config, refuse_wrong_settings, store_options
from candle_vllm.server.settings.options import GROUPS, HIDDEN, SAMPLING, plain, shown
from candle_vllm.server.settings.sources import origins
from candle_vllm.server.settings.table import BY_NAME, OPTIONS, SAMPLED, ModelOptions

DEFAULT = "default"


class Effective(NamedTuple):
    """The effective value of one setting in JSON types; secrets are hidden.

    `source` is the source of a set value; for an unset one, "default" or a text that explains the value.
    """

    value: Any
    source: str


def config(configuration: Configuration, *, as_json: bool = False) -> int:
    """Print the server's settings with those of its default model, the names of all models, and the mailbox.

    Raises CandleVllmError for every error of `serve` that needs neither the weights nor the network to be found.
    """
    check(configuration)
    if (reading := warn_of_missing(configuration.catalogue)) is not None:
        reading.join()
    settings = effective(configuration, derived(configuration))
    models = [entry.names for entry in configuration.catalogue.entries]
    mailbox = None if configuration.mailbox is None else _mailbox(configuration.mailbox)
    if as_json:
        values = {name: {"value": each.value, "from": each.source} for name, each in settings.items()}
        content = {"settings": values, "models": [list(names) for names in models], "mailbox": mailbox}
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    else:
        names = "; ".join(map(", ".join, models))
        lines, group = [f"models.yaml: {configuration.models_file or 'none'}", f"models: {names}"], ""
        width = max(map(len, settings))
        for name, each in settings.items():
            if BY_NAME[name].group != group:
                group = BY_NAME[name].group
                lines += ["", f"{group}:"]
            value = "-" if each.value in (None, []) else json.dumps(each.value, ensure_ascii=False)
            lines.append(f"  {name:{width}}  {value:24}  {each.source}")
        if mailbox is not None:
            lines += ["", "mailbox, by flags and models.yaml:"]
            lines += [f"  {name:{width}}  {json.dumps(value, ensure_ascii=False)}" for name, value in mailbox.items()]
        sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _mailbox(options: MailboxOptions) -> dict[str, Any]:
    """Effective settings of the mailbox, including the section in models.yaml; possible secrets are hidden."""

    def shown(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            return {each.name: shown(getattr(value, each.name)) if each.repr else HIDDEN for each in fields}
        return plain(value)

    values = shown(options)
    values["webhook"]["headers"] = dict.fromkeys(options.webhook.headers, HIDDEN)
    if url := values["webhook"]["url"]:
        values["webhook"]["url"] = f"{'/'.join(url.split('/')[:3])}/{HIDDEN}"  # paths are often secret
    return values


def effective(configuration: Configuration, derived: Mapping[str, Effective] = {}) -> dict[str, Effective]:
    """Return every setting by its name, in the order of the help, with derived values for those that are not set."""
    deciding = origins(configuration.sources)
    found: dict[str, Effective] = {}
    for option in sorted(OPTIONS, key=lambda option: GROUPS.index(option.group)):
        source = deciding.get(option.name)
        if source is None and option.name in derived:
            found[option.name] = derived[option.name]
            continue
        spelled = "" if source is None else f" ({source.given_as.get(option.name, option.name)})"
        value = shown(option, getattr(configuration.settings, option.name))
        found[option.name] = Effective(value, DEFAULT if source is None else source.title + spelled)
    return found


def check(configuration: Configuration) -> None:
    """Raise errors of `serve` that are found without the weights and the network."""
    for entry in configuration.catalogue.entries:
        settings = entry.settings
        if entry is configuration.catalogue.default or settings.weight_path is None:
            engine_config(settings, fetch=False)
        refuse_wrong_settings(settings)
    settings = configuration.settings
    store_options(settings)
    mcp_options(settings)
    tls_context(settings)
    Keyring(settings)
    refuse_open_changes(settings)
    open_manager(configuration.catalogue, settings)[1].close()  # checks sources of adapters and images, and tracing


_ELSEWHERE = ("cpu_experts", "cpu_offload_gb", "gpu_layers")  # settings about weights that are not on the GPU


def derived(configuration: Configuration) -> dict[str, Effective]:
    """Return the values of settings that are not set; some are unknown if the model is not on this machine."""
    settings, names = configuration.settings, configuration.catalogue.default.names
    config = resolve_ranks(engine_config(settings, fetch=False))
    found = {option.name: Effective(option.unset, DEFAULT) for option in OPTIONS if option.unset}
    for option in OPTIONS:
        if option.engine is not None and (value := getattr(config, option.engine)) is not None:
            found[option.name] = Effective(plain(value), DEFAULT)
    device = choose_device(config.device)
    sequences, tokens = step_size(config, device)
    ranks = Effective("not used", "default on cuda")
    if device.type == "cpu":
        divided = plan_ranks(config.cpu_ranks, config.threads or default_threads())
        why = "one for each NUMA node that this process may use"
        if config.cpu_ranks is not None:
            why = "tensor_parallel_size, without a GPU"
        ranks = Effective(1 if divided is None else len(divided.each), f"derived: {why}")
    share = DEFAULTS[device.type].share
    found |= {
        "model": Effective(config.model, "default: the demo model"),
        "served_model_name": Effective(list(names), "derived: the model's name"),
        "device": Effective(str(device), "derived: " + ("a GPU" if device.type == "cuda" else "no GPU can be used")),
        "cpu_level": Effective(best_level().name, "derived: the best level of this CPU"),
        "threads": Effective(default_threads(), "derived: one for each physical core, within the CPU quota"),
        "cpu_ranks": ranks,
        "max_num_seqs": Effective(sequences, f"default on {device.type}"),
        "prefill_chunk_size": Effective(tokens, f"default on {device.type}"),
        "kv_fraction": Effective(share, f"default on {device.type}"),
        "max_loras": Effective(sequences if device.type == "cpu" else 8, f"default on {device.type}"),
    }
    if device.type == "cpu":
        found |= dict.fromkeys(_ELSEWHERE, Effective("not used", "default on cpu: all weights are in main memory"))
    sizes: dict[str, Effective] = {}
    if (size := config.kv_cache_memory) is not None:
        unused = Effective("not used", "the KV cache's size is set")
        found |= dict.fromkeys(("kv_fraction", "gpu_memory_utilization"), unused)
        sizes["mem"] = Effective(size >> 20, "MiB, derived from kv_cache_memory_bytes")
        sizes["kv_cache_memory_bytes"] = Effective(size, "derived from mem")
    elif device.type == "cuda" and config.gpu_memory_utilization is not None:
        found["kv_fraction"] = Effective("not used", "gpu_memory_utilization is set")
    if config.download_dir is None:
        from huggingface_hub.constants import HF_HUB_CACHE

        found["download_dir"] = Effective(HF_HUB_CACHE, "default: Hugging Face's own cache")
    if settings.max_num_seqs is not None and settings.prefill_chunk_size is None:
        found["prefill_chunk_size"] = Effective(tokens, "derived: at least max_num_seqs")
    try:
        files = model_files(dataclasses.replace(config, offline=True))
    except ModelNotFoundError:
        comes = HUB_ID.fullmatch(config.model.partition(":")[0]) or "://" in config.model
        if settings.offline or not comes or Path(config.model).exists():
            raise
        here = f"candle-vllm show {config.model} compares its size with the memory, candle-vllm pull fetches it"
        later = Effective("unknown", f"derived: the model is not on this machine yet; {here}")
        return found | dict.fromkeys(_OF_MODEL, later) | sizes
    return found | sizes | _of_model(settings, config, files, device)


_SAMPLING = {option.name: getattr(SAMPLED, option.name) for option in OPTIONS if option.group == SAMPLING}
_OF_MODEL = (
    "dtype", "kv_cache_dtype", "key_cache_dtype", "value_cache_dtype", "max_model_len", "mem", "kv_cache_memory_bytes",
    "tokenizer", "chat_template", "tool_parser", "reasoning_parser", *_SAMPLING,
)  # fmt: skip


def _of_model(settings: ModelOptions, config: EngineConfig, files: ModelFiles, device: Device) -> dict[str, Effective]:
    """Return values from a model's files; the weights are not read."""
    own = Effective("the model's own", f"derived from {files.name}")
    if is_encoder(files):
        none = Effective("none", f"derived: {files.name} is an encoder and generates no text")
        unused = (*_OF_MODEL, *_ELSEWHERE, "kv_fraction", "gpu_memory_utilization")
        return dict.fromkeys(unused, none) | {"tokenizer": own}
    opened = open_model(files, device, config.model_impl)
    with opened.checkpoint:
        model = describe_model(config, device, opened)
        cache = None
        if device.type == "cpu":  # foresee it, with the draft model and the vision encoder in memory
            placement, threads = model.placement, config.threads or default_threads()
            tower = tower_memory(config, opened, model.config.hidden_size, placement, threads)
            cache = foreseen_cache(config, model, describe_draft(config, model, placement.device), tower)
    template, choice = template_and_formats(model, settings)
    source = own.source
    found = {
        "dtype": Effective(model.dtype, source),
        "tokenizer": own,
        "chat_template": own if template is not None else Effective("none", source),
        "tool_parser": Effective(choice.tools.name if choice.tools else "none", f"derived: {choice.tools_reason}"),
        "reasoning_parser": Effective(
            choice.reasoning.name if choice.reasoning else "none", f"derived: {choice.reasoning_reason}"
        ),
        "max_model_len": Effective(model.config.max_position, source),
    }
    for name, value in {**_SAMPLING, **model.default_sampling}.items():
        found[name] = Effective(value, source if name in model.default_sampling else DEFAULT)
    if device.type == "cuda":
        split, layers = model.split, model.config.num_layers
        why = "derived: the GPU holds the model, or no offloading was requested" if split is None else split.message
        found["cpu_experts"] = Effective(0 if split is None else split.experts, why)
        found["gpu_layers"] = Effective(layers if split is None else split.layers, why)
        found["cpu_offload_gb"] = Effective(0 if split is None else round(split.bus_bytes / (1 << 30), 1), why)
    if cache is None:
        element_bytes = device_element_bytes(config, ELEMENTS[model.placement.dtype].itemsize)
        token = cache_bytes(model.config.cache_specs, 1, element_bytes)
        limit = "times kv_fraction" if config.gpu_memory_utilization is None else "within gpu_memory_utilization"
        words = f"what is left of the GPU after loading, {limit}; a token takes {token:,} B"
        left = Effective(words, "derived when the model is loaded")
        return found | ({} if config.kv_cache_memory else dict.fromkeys(("mem", "kv_cache_memory_bytes"), left))
    size, room = cache.num_bytes, cache.num_blocks * config.block_size
    states = cache.states
    kept = f", {states.running} states and {states.checkpoints} checkpoints of states" if states.running else ""
    for pool in cache.windows:
        kept += f", {(pool.pages - 1) * config.block_size:,} tokens in layers with a window of {pool.window:,}"
    words = f"derived: {room:,} tokens{kept}, taken as they fill"
    plain = "bf16" if model.placement.recorded else model.dtype
    both = Effective(plain if config.kv_cache_dtype == "auto" else config.kv_cache_dtype, "derived from kv_cache_dtype")
    found |= {
        "kv_cache_dtype": Effective(plain, source),
        "key_cache_dtype": both,
        "value_cache_dtype": both,
        "kv_cache_memory_bytes": Effective(size, words),
        "mem": Effective(size >> 20, f"MiB, {words}"),
    }
    if cache.max_model_len < model.config.max_position:
        found["max_model_len"] = Effective(cache.max_model_len, "derived: more tokens do not fit into the KV cache")
    return found
