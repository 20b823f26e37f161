# SPDX-License-Identifier: MIT
"""Load the model that a config names: an encoder, or a decoder with its draft model."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence

from candle_vllm.core.assembly.draft import find_draft, load_draft
from candle_vllm.core.assembly.heads import check_pooling, pooling_of
from candle_vllm.core.assembly.model import Loaded, LoadedModel, files_read, load_model, read_template
from candle_vllm.core.assembly.opening import Opened, config_file, naming, open_model, open_tokenizer, stored_types
from candle_vllm.core.assembly.packed_cache import packed_weights
from candle_vllm.core.assembly.placement import computing_dtype, encoder_placement, room_for_weights
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.devices import Device
from candle_vllm.core.errors import ConfigError, refuse_settings
from candle_vllm.core.fields import read_json
from candle_vllm.core.kernels.collectives import Collective, is_first
from candle_vllm.core.kernels.cpu_runtime.weight_memory import WeightMemory, loading
from candle_vllm.core.layers.parameters import SHAPES
from candle_vllm.core.loading.config import EncoderConfig
from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.loading.pooling import longest_text
from candle_vllm.core.loading.source import ModelFiles, model_files
from candle_vllm.core.loading.weights import check_weights, load_weights
from candle_vllm.core.models.family import Encoder, EncoderFamily
from candle_vllm.core.models.registry import encoder_from_gguf, encoder_from_hf
from candle_vllm.core.models.token_heads import with_token_heads
from candle_vllm.core.pooled_head import PooledHead
from candle_vllm.core.pooling import BY_TOKEN, ModelPooling
from candle_vllm.core.threads import collector_paused

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedEncoder(Loaded):
    """An encoder with its weights, and the maximum number of tokens of a text."""

    encoder: Encoder
    config: EncoderConfig
    max_model_len: int

    @property
    def labels(self) -> tuple[str, ...]:
        return self.config.labels


def load_any_model(
    config: EngineConfig,
    device: Device,
    progress: Callable[[int, int], object],
    again: Sequence[WeightMemory] = (),
    ranks: Collective | None = None,
) -> LoadedModel | LoadedEncoder:
    """Load `config.model`, a decoder or an encoder; other arguments and errors as for `load_model`.

    Matrices are loaded again into the weight memories of the same model, `again`.
    """
    with loading(again) as memories:
        files, first = model_files(config), ranks is None or is_first(ranks)
        if first:
            find_draft(config)
        found = _of_config(files)
        if found is not None and files.format == "dummy":
            raise ConfigError("load_format 'dummy' supports decoders only: leave it out for an encoder", "load_format")
        with collector_paused():
            opened = open_model(files, device, config.model_impl)
        found = found or describe_encoder(files, opened)
        if found is None:
            loaded = load_model(config, device, progress, opened, ranks)
            if first:
                loaded = dataclasses.replace(loaded, draft=load_draft(config, loaded, device, progress))
        else:
            with opened.checkpoint:
                refuse_settings(
                    ("isq", config.isq is not None,
                     f"isq {config.isq} is for models that generate text. Leave it out; --dtype bf16 halves the memory "
                     "of an fp32 encoder, and `candle-vllm quantize` writes one as a GGUF file"),
                    ("tensor_parallel_size", ranks is not None,
                     f"{files.name} is an encoder, which cannot be divided among ranks: leave tensor_parallel_size and "
                     "pipeline_parallel_size out"),
                )  # fmt: skip
                loaded = _load_encoder(config, device, progress, opened, *found)
    return dataclasses.replace(loaded, memories=tuple(memories))


def describe_encoder(files: ModelFiles, opened: Opened) -> tuple[EncoderFamily, EncoderConfig] | None:
    """Return the family and the config of an encoder's files; None if the files contain no encoder."""
    if files.format != "gguf":
        return _of_config(files)
    with naming(files.weights[0]):
        return encoder_from_gguf(opened.metadata, opened.checkpoint)


def _of_config(files: ModelFiles) -> tuple[EncoderFamily, EncoderConfig] | None:
    if files.config is None or files.format == "gguf":
        return None
    with naming(files.config):
        return encoder_from_hf(read_json(files.config), files.config)


def is_encoder(files: ModelFiles) -> bool:
    """Return whether the files contain an encoder, by their config or metadata."""
    with naming(config_file(files)):
        if files.format != "gguf":
            return _of_config(files) is not None
        with open_gguf(files.weights[0]) as checkpoint:
            return encoder_from_gguf(checkpoint.metadata, checkpoint) is not None


@collector_paused()
def _load_encoder(
    config: EngineConfig,
    device: Device,
    progress: Callable[[int, int], object],
    opened: Opened,
    family: EncoderFamily,
    model: EncoderConfig,
) -> LoadedEncoder:
    started = time.perf_counter()
    files, checkpoint = opened.files, opened.checkpoint
    paths, described = files_read(config, files), config_file(files)
    limit = _longest(config, files, model)
    tokenizer = open_tokenizer(config, files, opened.metadata, model.vocab_size)
    pooling, head = None, None
    if model.labels and not model.scores:
        pooling = ModelPooling(len(model.labels), model.head_pooling or "cls", normalize=False)
        assert family.behind is not None
        head = PooledHead(family.behind(model, checkpoint), model.labels, model.likelihood)
    elif not model.scores:
        size, chosen = model.hidden_size, config.pooling
        pooling, head = pooling_of(files, checkpoint, opened.metadata, size, "mean", tokenizer, chosen)
        pooling, head = with_token_heads(files.folder, checkpoint, model, tokenizer, pooling, head)
    check_pooling(pooling, config.pooling)
    # For one vector a text, F16 and F32 weights are multiplied as 14-bit integers (`kernels/word_linear`); the cosine
    # with the fp32 vector is above 0.99999. Scores, classes and vectors of tokens are computed in floats.
    is_vector = pooling is not None and not model.labels and pooling.pooling not in BY_TOKEN and not pooling.sizes
    word_types = ("F16", "F32") if is_vector else ()
    placement = encoder_placement(config, device, checkpoint, family.in_torch, word_types)
    table, ignored = family.weights(model, checkpoint.tensors), family.ignored(model)
    tensors = checkpoint.tensors.values()
    weight_bytes = sum(tensor.nbytes for tensor in tensors)
    with naming(described, checkpoint.path):
        check_weights(lambda: family.build(model, SHAPES), table, checkpoint, model, ignored=ignored)
        with room_for_weights(files.name, placement, checkpoint):
            encoder = family.build(model, placement)
            with packed_weights(config, paths if placement.recorded else (), checkpoint, family.build):
                load_weights(encoder, table, checkpoint, model, ignored=ignored, progress=progress)
    logger.info("loaded %s: %.1f MB in %.2f s", files.name, weight_bytes / 1e6, time.perf_counter() - started)
    return LoadedEncoder(
        name=files.name,
        encoder=encoder,
        placement=placement,
        dtype=computing_dtype(placement, checkpoint),
        config=model,
        tokenizer=tokenizer,
        template=read_template(config, tokenizer, described) if config.chat_template else None,
        pooling=pooling,
        head=head,
        max_model_len=limit,
        quantization=stored_types(checkpoint, opened.metadata),
        num_parameters=sum(tensor.numel for tensor in tensors),
        weight_bytes=weight_bytes,
        files=paths,
    )


def _longest(config: EngineConfig, files: ModelFiles, model: EncoderConfig) -> int:
    """Return the maximum tokens of a text: the setting, else the folder's limit; neither exceeds the positions."""
    if config.max_model_len is None:
        tuned = longest_text(files.folder) if files.format != "gguf" else None
        return min(model.max_position, tuned or model.max_position)
    if config.max_model_len > model.max_position:
        raise ConfigError(
            f"max_model_len {config.max_model_len} is beyond the model's {model.max_position} positions: set "
            f"max_model_len={model.max_position} or leave it out",
            "max_model_len",
        )
    return config.max_model_len
