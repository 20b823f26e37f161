# SPDX-License-Identifier: MIT
"""Load a decoder, with its tokenizer, chat template and vision tower."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.assembly.heads import pooling_of
from candle_vllm.core.assembly.offload import Split, plan_split
from candle_vllm.core.assembly.opening import Opened, config_file, naming, open_model, open_tokenizer, stored_types
from candle_vllm.core.assembly.packed_cache import packed_weights
from candle_vllm.core.assembly.placement import choose_placement, computing_dtype, room_for_weights
from candle_vllm.core.assembly.shards import Shard, shard_of
from candle_vllm.core.assembly.tower import LoadedTower, load_tower
from candle_vllm.core.config import CACHE_TYPES, All2AllBackend, EngineConfig, ModelImpl, draft_error, draft_settings
from candle_vllm.core.devices import Device
from candle_vllm.core.errors import InvalidFileError, InvalidParameterError, ModelNotFoundError, refuse_settings
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.kernels.collectives import Collective
from candle_vllm.core.kernels.compressed_attention import LEAST_BLOCK
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory
from candle_vllm.core.layers.parameters import SHAPES, Placement
from candle_vllm.core.layers.rotary import Rotary
from candle_vllm.core.loading.config import EncoderConfig, ModelConfig, stretched
from candle_vllm.core.loading.imatrix import read_imatrix
from candle_vllm.core.loading.source import ModelFiles, model_files
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.vocabulary import SUPPRESSED, end_tokens
from candle_vllm.core.loading.weights import check_weights, load_weights, places
from candle_vllm.core.memory import refuse_longer
from candle_vllm.core.models.family import Decoder, DraftHead, Family
from candle_vllm.core.models.registry import check_causal, family_from_gguf, family_from_hf, tower_family_named
from candle_vllm.core.models.stack import DecoderStack
from candle_vllm.core.pooled_head import PooledHead
from candle_vllm.core.pooling import ModelPooling
from candle_vllm.core.sampling.params import MAX_TOKENS, SamplingParams
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.tokenizer import Tokenizer
from candle_vllm.core.threads import collector_paused
from candle_vllm.core.vision.prompts import VisionInput

logger = logging.getLogger(__name__)

# Keys of generation_config.json that are sampling defaults; their names are those of SamplingParams.
_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
GGUF_SAMPLING = MappingProxyType({
    "temperature": "general.sampling.temp", "top_p": "general.sampling.top_p", "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p", "repetition_penalty": "general.sampling.penalty_repeat",
})  # fmt: skip
"""The keys of sampling defaults in GGUF metadata, by their keys in generation_config.json."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """Everything that is loaded from a model's files, except the model itself.

    Attributes:
        name: the model's name as its source gives it.
        placement: device and types of the weights, and whether steps are recorded.
        dtype: types in which matrices are multiplied, the most frequent first.
        template: the chat template; None without one.
        eos_token_ids: tokens that end a sequence: config, generation config and tokenizer together.
        default_sampling: the model's sampling defaults; the maximum length of an answer is "max_tokens".
        pooling: how hidden states are pooled; None for an encoder that returns scores instead of vectors.
        head: layers after the pooling; None without such layers.
        quantization: stored tensor types with their counts, after a GGUF file's own type; None if all are unquantised.
        num_parameters: number of stored elements.
        weight_bytes: stored bytes of the weights.
        split: parts of the model that are not in GPU memory; None if everything is in one place.
        files: see `files_read`.
        memories: weight memories of its matrices in recorded steps, and those of models that were loaded with it.
    """

    name: str
    placement: Placement
    dtype: str
    config: ModelConfig | EncoderConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None = None
    eos_token_ids: tuple[int, ...] = ()
    default_sampling: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
    pooling: ModelPooling | None
    head: PooledHead | None = None
    quantization: str | None
    num_parameters: int
    weight_bytes: int
    split: Split | None = None
    files: tuple[Path, ...] = ()
    memories: tuple[WeightMemory, ...] = ()

    @property
    def vision(self) -> VisionInput | None:
        """How images become tokens of a prompt; None for a text-only model."""
        return None

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the outputs of its head; empty without a head for scores or classes."""
        return () if self.head is None else self.head.labels


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadFacts:
    """A draft head: layers that predict draft tokens from a model's hidden states.

    Attributes:
        config: its config, as if the head were a model of its own.
        vocab_size: size of its output vocabulary.
        meant: the target model's token id for each id of that vocabulary; None if the ids are the same.
    """

    name: str
    placement: Placement
    config: ModelConfig
    vocab_size: int
    meant: NDArray[np.int64] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedHead(HeadFacts):
    """A draft head with its layers, and the stored bytes of their weights."""

    head: DraftHead
    weight_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel(Loaded):
    """A decoder with its weights; the context length in `config` is limited by the settings.

    Attributes:
        draft: its draft model or draft head, if the settings have one; only on the first rank.
        tower: its vision tower, if it has one; only on the first rank.
        shard: the part of the model that this rank has; None for the whole model.
    """

    decoder: Decoder
    config: ModelConfig
    draft: LoadedModel | LoadedHead | None = None
    tower: LoadedTower | None = None
    shard: Shard | None = None

    @property
    def layers(self) -> range:
        """The numbers of the model's layers that this rank has."""
        return range(self.config.num_layers) if self.shard is None else self.shard.layers

    @property
    def vision(self) -> VisionInput | None:
        return None if self.tower is None else self.tower.vision

    def turning(self, tokens: int) -> Rotary | None:
        """Return the rotary embedding with table rows for `tokens` image tokens; None without M-RoPE or a tower.

        Ranks after the first need no tower for it. Its tables are new, so call this before a runner uses them.
        """
        elsewhere = self.shard is not None and not self.shard.is_first
        if self.config.answer_window is not None:  # positions in the cache are not those of the text
            return self.decoder.rotary if isinstance(self.decoder, DecoderStack) else None
        if not self.config.rope.axes or (self.tower is None and not elsewhere):
            return None
        assert isinstance(self.decoder, DecoderStack)
        self.decoder.rotary.make_room(tokens)
        return self.decoder.rotary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described(Loaded):
    """A decoder before its weights are read; `stored` are the tensors that will be loaded."""

    config: ModelConfig
    family: Family
    stored: Checkpoint


@collector_paused()
def load_model(
    config: EngineConfig,
    device: Device,
    progress: Callable[[int, int], object],
    opened: Opened | None = None,
    ranks: Collective | None = None,
) -> LoadedModel:
    """Resolve `config.model` as a decoder, download it if needed, and load it.

    Args:
        progress: called with the loaded bytes and the total.
        opened: the model from `open_model`, if that was called already; it is closed.
        ranks: the ranks among which the model is divided; None for a whole model.

    Raises:
        ConfigError: the settings cannot be applied to this model, or it cannot be divided among these ranks.
        ModelNotFoundError: no model has this name.
        ModelLoadError: its files cannot be used; the message names the file.
    """
    opened = opened or open_model(model_files(config), device, config.model_impl)
    files, started = opened.files, time.perf_counter()
    with opened.checkpoint as checkpoint:
        model = describe_model(config, device, opened)
        placement, stored, split = model.placement, model.stored, model.split
        family, full = model.family, model.config
        shard, cut, part = None, None, list[object]()
        if ranks is not None:
            apart, exchanges = config.enable_expert_parallel, _exchanges(config, placement)
            shard = shard_of(files.name, family, full, stored, ranks, apart=apart, exchanges=exchanges)
            stored, cut = shard.stored(stored), shard.cut
            part = [ranks.rank, ranks.size, shard.layers.start, shard.layers.stop, apart]
        elsewhere, size = (frozenset[str](), 0) if split is None else (split.names, split.host_bytes)
        room = room_for_weights(files.name, placement, stored, elsewhere, size)
        with naming(config_file(files), checkpoint.path), room:
            decoder = family.build(full if shard is None else shard.config, placement, checkpoint)
            if split is not None:
                logger.info(split.message)
                split.place(decoder)
            if shard is not None and shard.stage is not None:
                shard.stage.keep(decoder, placement)
            on_cpu = placement.recorded or (split is not None and split.host is not None)
            with packed_weights(config, files_read(config, files) if on_cpu else (), stored, family.build, *part):
                ignored = family.ignored(full)
                load_weights(decoder, family.weights, stored, full, ignored=ignored, progress=progress, cut=cut)
            if shard is not None:
                shard.join(decoder)
            if (cache := CACHE_TYPES[config.kv_cache_dtype]).element and not cache.row_scales:
                from candle_vllm.core.assembly.cache_scales import give_cache_scales

                give_cache_scales(decoder, opened.cache_scales, model.config, placement)
        tower = None
        if shard is None or shard.is_first:
            tower = load_tower(config, opened, model.tokenizer, model.config.hidden_size, placement)
        if tower is not None:
            _check_tower(tower, model.config, config_file(files))
    said = {field.name: getattr(model, field.name) for field in dataclasses.fields(Loaded)}
    said["files"] = files_read(config, files)
    if tower is not None:
        said["template"] = tower_family_named(tower.vision.parts.family).with_mark(model.template, model.tokenizer)
    seconds = time.perf_counter() - started
    logger.info("loaded %s: %.1f MB in %.2f s", files.name, model.weight_bytes / 1e6, seconds)
    return LoadedModel(decoder=decoder, tower=tower, shard=shard, **said)


def _exchanges(config: EngineConfig, placement: Placement) -> All2AllBackend:
    """Return how tokens are sent to whole experts; "auto" sums outputs if `invariant`, and on the CPU."""
    asked = config.all2all_backend
    refuse_settings(
        ("all2all_backend", asked == "all_to_all" and placement.invariant,
         "all2all_backend='all_to_all' divides steps with prompts but not captured steps, so the order of sums differs "
         "between them: leave it out, or leave 'deterministic' out"),
    )  # fmt: skip
    if asked == "auto" and (placement.invariant or placement.device.type == "cpu"):
        return "allgather_reducescatter"
    return asked


def files_read(config: EngineConfig, files: ModelFiles) -> tuple[Path, ...]:
    """Return the files of weights, config, `mmproj` and `imatrix`; () for random weights. Raises ModelNotFoundError."""
    for path in (config.mmproj, config.imatrix):
        if path is not None and not path.is_file():
            raise ModelNotFoundError(f"{path} is not a file; check the spelling of the path")
    beside = (files.config, config.mmproj, config.imatrix)
    return (*files.weights, *(path for path in beside if path is not None)) if files.weights else ()


def _check_tower(tower: LoadedTower, model: ModelConfig, described: Path) -> None:
    """Raise InvalidFileError if a tower and its text model do not fit: rotary sections, or layers that it adds to."""
    if tower.vision.parts.turned and not model.rope.axes:
        keys = "(mrope_section, in GGUF files rope.dimension_sections), which the positions of image tokens need"
        raise InvalidFileError(f"{described}: the sections of rotary positions are missing {keys}")
    said, deep = getattr(model, "deep", 0), tower.tower.config.vectors - 1
    if deep > model.num_layers:
        raise InvalidFileError(
            f"{described}: the vision tower adds to {deep} layers, but the text model has {model.num_layers}"
        )
    if said not in (0, deep):
        raise InvalidFileError(f"{described}: n_deepstack_layers is {said}; the vision tower adds to {deep} layers")


def describe_model(config: EngineConfig, device: Device, opened: Opened) -> Described:
    """Load a decoder without its weights, so that an unsupported model is refused early; errors as `load_model`."""
    files, checkpoint, metadata = opened.files, opened.checkpoint, opened.metadata
    described = config_file(files)
    with naming(described):
        family, model_config = describe_family(files, checkpoint, metadata, config.model_impl)
        checkpoint = checkpoint if family.prepared is None else family.prepared(checkpoint)
    config = fit_settings(config, model_config)
    model_config = stretched(model_config, config.yarn_scaling_factor, checkpoint)
    refuse_longer(config, model_config)
    if model_config.one_at_a_time is not None:
        logger.warning(
            "%s runs one sequence at a time on a KV cache of transformers, without prefix caching or speculation: %s",
            files.name,
            model_config.one_at_a_time,
        )
    limit = min(model_config.max_position, config.max_model_len or model_config.max_position)
    model_config = dataclasses.replace(model_config, max_position=limit)
    generation = generation_config(files, metadata)
    default_sampling = sampling_defaults(generation)
    tokenizer = open_tokenizer(config, files, metadata, model_config.vocab_size)
    banned = generation.token_ids("suppress_tokens") or Fields(metadata, described).token_ids(SUPPRESSED)
    tokenizer.suppressed_token_ids = tuple(token for token in banned if token < model_config.vocab_size)
    template = read_template(config, tokenizer, described)
    pooling, head = pooling_of(files, checkpoint, metadata, model_config.hidden_size, "last", tokenizer, config.pooling)
    eos_token_ids = end_tokens(model_config, generation, tokenizer, described)
    with naming(described, checkpoint.path, config.imatrix or described):
        ignored = family.ignored(model_config)
        built = functools.partial(family.build, model_config, SHAPES, checkpoint)
        check_weights(built, family.weights, checkpoint, model_config, ignored=ignored)
        stored = as_loaded(config, family, model_config, checkpoint)
        placement = choose_placement(config, device, stored, model_config)
        split = plan_split(config, device, placement, family, model_config, stored)
    return Described(
        name=files.name,
        placement=placement,
        dtype=computing_dtype(placement, stored),
        config=model_config,
        family=family,
        stored=stored,
        tokenizer=tokenizer,
        template=template,
        eos_token_ids=eos_token_ids,
        default_sampling=default_sampling,
        pooling=pooling,
        head=head,
        quantization=stored_types(stored, opened.metadata if config.isq is None else {}),
        num_parameters=sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()),
        weight_bytes=sum(tensor.nbytes for tensor in stored.tensors.values()),
        split=split,
    )


def fit_settings(config: EngineConfig, model: ModelConfig | EncoderConfig) -> EngineConfig:
    """Adapt the settings to a model: layers of transformers have no CUDA graphs, and some run one sequence at a time.

    Raises:
        ConfigError: the settings divide a model of transformers, or enable drafts or LoRA for one with its own cache;
            they enable drafts for a model with an `answer_window`; a block would divide a group of pooled index keys.
    """
    if not isinstance(model, ModelConfig):
        return config
    refuse_settings(
        ("block_size", config.block_size % model.index_pool,
         f"{model.model_type} pools the index keys of {model.index_pool} tokens, which must be in one block: set "
         f"block_size to {model.index_pool} or more"),
        ("block_size", model.index_block % config.block_size,
         f"{model.model_type} chooses blocks of {model.index_block} tokens, which block_size must divide: set "
         f"block_size to {model.index_block} or less"),
        ("block_size", model.compresses and config.block_size < LEAST_BLOCK,
         f"block_size={config.block_size}: attention to compressed entries or chosen blocks needs blocks of "
         f"{LEAST_BLOCK} tokens or more"),
    )  # fmt: skip
    if model.answer_window is not None:
        if draft_settings(config.speculative_config) is not None:
            raise draft_error(
                f"{model.model_type} reads its answer through a window, whose cache a rejected draft token would "
                'overwrite: leave speculative_config out, or set "method": "none"'
            )
        return dataclasses.replace(config, speculative_config={"method": "none"})
    if model.implementation == "native":
        return config
    refuse_settings(
        ("tensor_parallel_size", config.ranks > 1,
         f"{model.model_type} runs on transformers, which cannot divide it among ranks: leave tensor_parallel_size "
         "and pipeline_parallel_size out, or set model_impl='native'"),
    )  # fmt: skip
    config = dataclasses.replace(config, cuda_graphs=False)
    if not model.one_at_a_time:
        return config
    refuse_settings(
        ("speculative_config", config.speculative_config is not None, f"{model.model_type} does not support "
         f"speculative decoding ({model.one_at_a_time}): leave speculative_config out"),
        ("enable_lora", config.enable_lora,
         f"{model.model_type} does not support LoRA adapters ({model.one_at_a_time}): leave enable_lora out"),
    )  # fmt: skip
    return dataclasses.replace(config, max_num_seqs=1, max_num_batched_tokens=0, enable_prefix_caching=False)


def describe_family(
    files: ModelFiles, checkpoint: Checkpoint, metadata: Mapping[str, Any], impl: ModelImpl = "auto"
) -> tuple[Family, ModelConfig]:
    """Return the family and the config of a decoder's files; `impl`: see `family_from_hf`."""
    if files.format == "gguf":
        check_causal(Fields(metadata, checkpoint.path), f"{metadata.get('general.architecture')}.attention.causal")
        return family_from_gguf(metadata, checkpoint, impl)
    if files.config is None:
        raise InvalidFileError(f"{files.folder}: there is no config.json beside the safetensors files")
    tensors = None if files.format == "dummy" else checkpoint.tensors
    return family_from_hf(read_json(files.config), files.config, tensors, impl)


def as_loaded(config: EngineConfig, family: Family, model: ModelConfig, checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint in the form in which it is loaded: tensors as stored, or quantised in situ (`isq`)."""
    if config.isq is None:
        return checkpoint
    from candle_vllm.core.assembly.isq import quantised_in_situ

    shapes = family.build(model, SHAPES, checkpoint)
    imatrix = None if config.imatrix is None else read_imatrix(config.imatrix)
    return quantised_in_situ(config.isq, family.weights, checkpoint, model, places(shapes), imatrix)


def read_template(config: EngineConfig, tokenizer: Tokenizer, described: Path) -> ChatTemplate | None:
    """Return the chat template of the settings or of the tokenizer; `described` is the file that errors name."""
    source = config.chat_template or tokenizer.chat_template
    with naming("the chat_template setting" if config.chat_template else config.tokenizer or described):
        return ChatTemplate(source, tokenizer.special_tokens) if source else None


def generation_config(files: ModelFiles, metadata: Mapping[str, Any]) -> Fields:
    """Return generation_config.json, with the sampling defaults of GGUF metadata for keys that it lacks."""
    path = files.generation_config
    stored = {key: metadata.get(name) for key, name in GGUF_SAMPLING.items()}
    return Fields(stored | (read_json(path) if path else {}), path or config_file(files))


def sampling_defaults(generation: Fields) -> dict[str, float | int]:
    """Return a generation config's sampling defaults; do_sample false or top_p 0 is greedy. Raises InvalidFileError."""
    values: dict[str, Any] = {}
    for key in (key for key in _SAMPLING_KEYS if key in generation):
        value = generation.get(key, float)
        # Some exporters write a count as 50.0; 50.5 is not converted and is refused below.
        values[key] = int(value) if key == "top_k" and value.is_integer() else value
    greedy = values.get("top_p") == 0  # transformers keeps the likeliest token
    if greedy:
        del values["top_p"]
    if greedy or not generation.get("do_sample", bool, True):
        values["temperature"] = 0.0
    length = generation.values.get("max_new_tokens")
    if type(length) is int and 0 < length <= MAX_TOKENS:  # other values are ignored
        values["max_tokens"] = length
    try:
        SamplingParams(**values)
    except InvalidParameterError as error:
        raise InvalidFileError(f"{generation.path}: {error}; correct the file or remove the key") from error
    return values
