# SPDX-License-Identifier: MIT
"""Write a model's folder or GGUF file as one GGUF file, its matrices quantised or plain, tensor by tensor."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gguf import LlamaFileType

from candle_vllm.core.assembly.isq import check_plain, check_used, chosen_type, in_situ, stays_plain
from candle_vllm.core.assembly.model import GGUF_SAMPLING, generation_config, sampling_defaults
from candle_vllm.core.assembly.opening import config_file, naming, open_model, open_tokenizer
from candle_vllm.core.assembly.placement import DTYPES
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.conversion.adapters import AdapterFactors, merge
from candle_vllm.core.conversion.gguf_file import PlannedTensor, Progress, write_file
from candle_vllm.core.conversion.gguf_metadata import (
    architecture,
    check_description,
    computed_tensors,
    describe,
    pooling_keys,
    sizes,
)
from candle_vllm.core.conversion.gguf_tensors import gguf_tensors
from candle_vllm.core.conversion.gguf_tokenizer import phi3_name, tokenizer_metadata
from candle_vllm.core.devices import CPU
from candle_vllm.core.errors import AdapterError, ConfigError, ModelLoadError, UnsupportedModelError, refuse_settings
from candle_vllm.core.fields import read_json
from candle_vllm.core.kernels.weight_quant.rows import BY_ROW, ISQ_TYPES
from candle_vllm.core.kernels.weight_quant.searches import SIMPLE, TYPES
from candle_vllm.core.layers.parameters import SHAPES
from candle_vllm.core.loading.config import EncoderConfig, ModelConfig, stretched
from candle_vllm.core.loading.gguf import GgufFile, split_names
from candle_vllm.core.loading.imatrix import read_imatrix
from candle_vllm.core.loading.source import ModelFiles, model_files
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.views import computed, constant
from candle_vllm.core.loading.vocabulary import SUPPRESSED, end_tokens
from candle_vllm.core.loading.weights import check_weights, places, stored_lines
from candle_vllm.core.models.family import EncoderFamily
from candle_vllm.core.models.registry import encoder_from_gguf, encoder_from_hf, family_from_gguf, family_from_hf
from candle_vllm.core.models.trunks import is_headed
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from candle_vllm.core.quantization.stored import QuantisedTensor
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.text.chat_template import ChatTemplate

logger = logging.getLogger(__name__)

_SPLIT = ("attend.keys:weight", "attend.values:weight")  # stay plain, as in llama.cpp's own files of quantised models
_FULL = ("_norm.weight", "ssm_conv1d.weight", "position_embd.weight", "token_types.weight")
_TABLES = ("token_embd.", "output.", "per_layer_token_embd.")
_TEMPLATE = "tokenizer.chat_template"
_SLACK = 64 << 20  # bytes beyond the tensors: metadata, and overhead of the file system


@dataclasses.dataclass(frozen=True)
class WrittenFile:
    """A GGUF file that was written; `types` is the number of tensors of each type."""

    path: Path
    nbytes: int
    types: Mapping[str, int]


def write_gguf(
    config: EngineConfig,
    out: Path | str,
    *,
    adapters: AdapterFactors = (),
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> WrittenFile:
    """Write the model of `config` as a GGUF file.

    The file has another name until it is complete. The memory needed is one tensor and its blocks.

    Args:
        config: `model`, a GGUF file or safetensors; `isq` is the type of matrices, as when a model is loaded; without
            it they stay in their stored type, or are converted to `dtype`. `tokenizer` and `chat_template` replace the
            model's. Tensors of a GGUF file that already have the type are copied, and so is its metadata.
        out: the path of the file, which ends in .gguf.
        adapters: adapters that are merged into the model in float32 before its matrices are converted.

    Raises:
        ConfigError: the file cannot be written at this path; the weights are random, or safetensors not plain or
            MXFP4; a tokenizer or adapters are given for a GGUF file.
        ModelNotFoundError: the model does not exist.
        ModelLoadError: its files cannot be used, or GGUF cannot represent the model; AdapterError for an adapter.
    """
    out = Path(out)
    check_target(out, overwrite)
    if config.chat_template is not None:
        with naming("the chat_template setting"):
            ChatTemplate(config.chat_template, {})  # refuses a template with errors
    files = model_files(config)
    if files.format == "dummy":
        raise ConfigError(f"{files.name} has no weights to write (load_format='dummy')", "load_format")
    with ExitStack() as opened:
        checkpoint = opened.enter_context(open_model(files, CPU).checkpoint)
        beside = filter(None, (config.imatrix, *(path for path, _ in adapters)))
        opened.enter_context(naming(config_file(files), *beside))
        types: Mapping[str, tuple[int, int]] = {}
        if files.format == "gguf":
            refuse_settings(
                ("lora", adapters,
                 "adapters are merged into safetensors weights, not into a GGUF file: name the folder"),
                ("tokenizer", config.tokenizer is not None,
                 "a GGUF file's tokenizer is copied with it: leave --tokenizer out"),
            )  # fmt: skip
            plans, metadata, types = _plan_of_gguf(config, files, checkpoint)
        else:
            # MXFP4, the type of gpt-oss, is a type of GGUF too and stays unchanged.
            plain = {name: each for name, each in checkpoint.tensors.items() if each.type_name != "MXFP4"}
            check_plain(config.isq, checkpoint.with_tensors(plain))
            plans, metadata = _plan(config, files, checkpoint, adapters, opened)
        if config.isq == BY_ROW:
            plans = [_by_row(plan) for plan in plans]
        _check_room(out, sum(plan.nbytes for plan in plans))
        return write_plans(plans, metadata, out, progress, types)


def _by_row(plan: PlannedTensor) -> PlannedTensor:
    """Plan one scale for each row of a Q8_0 matrix; tables keep a scale for each block."""
    if plan.kind != GGMLQuantizationType.Q8_0 or plan.stored.dtype is None or plan.name.startswith(_TABLES):
        return plan
    return dataclasses.replace(plan, stored=in_situ(plan.stored, plan.kind, by_row=True))


def check_target(out: Path, overwrite: bool) -> None:
    """Raise ConfigError if a file cannot be written at this path."""
    refuse_settings(
        ("out", out.suffix != ".gguf", f"{out} does not end in .gguf: name the file that is to be written"),
        ("out", split_names(out.name) != (out.name,),
         f"{out} is named like one part of a split model, but one whole file is written: choose another name"),
        ("out", not out.parent.is_dir(), f"{out.parent} is not a folder: create it first"),
        ("out", out.is_dir(), f"{out} is a folder: name a file in it"),
        ("out", out.exists() and not overwrite,
         f"{out} exists: name another file, or pass --force to replace it"),
    )  # fmt: skip


def _check_room(out: Path, count: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < count + _SLACK:
        raise ConfigError(
            f"{out} takes about {(count + _SLACK) / 1e6:,.0f} MB and {out.parent} has {free / 1e6:,.0f} MB left: free "
            "some space, name a file elsewhere, or choose a smaller type",
            "out",
        )


# ---- what is written -------------------------------------------------------------------------------------------------


def _plan(
    config: EngineConfig, files: ModelFiles, checkpoint: Checkpoint, adapters: AdapterFactors, opened: ExitStack
) -> tuple[list[PlannedTensor], dict[str, Any]]:
    if files.config is None:
        raise UnsupportedModelError(f"{files.folder}: there is no config.json beside the safetensors files")
    described = read_json(files.config)
    encoder = encoder_from_hf(described, files.config)
    if encoder is not None:
        if adapters:
            raise AdapterError(f"{files.name} is an encoder, and adapters are merged into decoders")
        return _plan_of_encoder(config, files, files.config, checkpoint, *encoder)
    family, model = family_from_hf(described, files.config, checkpoint.tensors)
    checkpoint = checkpoint if family.prepared is None else family.prepared(checkpoint)
    if is_headed(described.get("architectures")):
        raise UnsupportedModelError(f"{files.config}: GGUF files are not written for heads of scores and classes")
    if adapters:
        model, checkpoint = merge(config, files, family, model, checkpoint, adapters, opened)
    model = stretched(model, config.yarn_scaling_factor, checkpoint)
    row, ignored = architecture(family, model, files.config), family.ignored(model)
    check_weights(lambda: family.build(model, SHAPES, checkpoint), family.weights, checkpoint, model, ignored=ignored)
    has_place = places(family.build(model, SHAPES, checkpoint))
    other = row.stored(model)
    found = list(gguf_tensors(family.weights, checkpoint, model, other, has_place, row.names(model)))
    if model.tie_embeddings and not other.tie_embeddings:
        found += [("output.weight", "head:weight", stored) for _, target, stored in found if target == "embed:weight"]
    for name, divisors in computed_tensors(model).items():
        found.append((name, "rotary:factors", constant(name, divisors, files.config)))
    plans = [PlannedTensor(name, stored, _kind(config, name, target, stored)) for name, target, stored in found]
    plans = _by_importance(plans, config.imatrix)
    metadata = describe(model, row) | _general(config, files, plans) | _words(config, files, model)
    if not model.has_head or (files.folder / "modules.json").is_file():
        keys = pooling_keys(files, model.hidden_size, "last")
        metadata |= {f"{row.name}.{key}": value for key, value in keys.items()}
    if row.name in ("phi3", "phimoe"):
        metadata["general.name"] = phi3_name(metadata)
    written = {plan.name: plan.stored for plan in plans}
    check_description(other, Checkpoint(files.config, "gguf", (), written, metadata))
    row.check(model, written, files.config)
    return plans, metadata


def _plan_of_gguf(
    config: EngineConfig, files: ModelFiles, checkpoint: Checkpoint
) -> tuple[list[PlannedTensor], dict[str, Any], Mapping[str, tuple[int, int]]]:
    """Return the tensors of a GGUF file in the requested types, its metadata, and the types of the metadata."""
    if (encoder := encoder_from_gguf(checkpoint.metadata, checkpoint)) is not None:
        model, table = encoder[1], encoder[0].weights(encoder[1], checkpoint.tensors)
    else:
        family, model = family_from_gguf(checkpoint.metadata, checkpoint)
        table = family.weights
    targets: dict[str, str] = {}
    for line, name in stored_lines(table, model, checkpoint):
        targets.setdefault(name, line.target)
    made = (_requantised(config, name, targets.get(name), stored) for name, stored in checkpoint.tensors.items())
    plans = [part for plan in made for part in _parts(plan)]
    if (again := sum(plan.stored.quantised and plan.stored.dtype is not None for plan in plans)) > 0:
        logger.warning(
            "%s: %d matrices are quantised already and are quantised or rounded again: convert the unquantised model "
            "for better results",
            checkpoint.path,
            again,
        )
    plans = _by_importance(plans, config.imatrix)
    split = ("general.alignment", "split.")  # one file is written, with the usual alignment
    metadata = {key: value for key, value in checkpoint.metadata.items() if not key.startswith(split)}
    changed: dict[str, Any] = {}
    if config.isq is not None or config.dtype != "auto":
        general = _general(config, files, plans)
        changed = {key: general[key] for key in ("general.file_type", "general.quantization_version")}
    if config.chat_template is not None:
        metadata = {key: value for key, value in metadata.items() if not key.startswith(_TEMPLATE)}
        changed[_TEMPLATE] = config.chat_template
    source = GgufFile(checkpoint.path)
    source.close()
    return plans, metadata | changed, {key: kind for key, kind in source.types.items() if key not in changed}


def _requantised(config: EngineConfig, name: str, target: str | None, stored: StoredTensor) -> PlannedTensor:
    """Plan a tensor of a GGUF file: unchanged, unless it is a matrix of the model and another type is requested."""
    own = GGMLQuantizationType[stored.type_name]
    plain = stored if stored.dtype is not None else computed(stored, stored.shape, lambda values: values)
    if target is None or name.endswith(_FULL) or stays_plain(target, plain):
        return PlannedTensor(name, stored, own)
    if config.isq is not None:
        kind = chosen_type(ISQ_TYPES[config.isq], target, plain) or own
    else:
        kind = GGMLQuantizationType[DTYPES.get(config.dtype, own.name)]
    same = kind == own and (config.isq != BY_ROW or name.startswith(_TABLES))
    return PlannedTensor(name, stored if same else plain, kind)


def _parts(plan: PlannedTensor) -> list[PlannedTensor]:
    """Return the tensors that are written for a plan: a copied NVFP4 tensor is followed by its scale."""
    if not isinstance(plan.stored, QuantisedTensor):
        return [plan]
    return [PlannedTensor(each.name, each, GGMLQuantizationType[each.type_name]) for each in plan.stored.source.parts]


def _by_importance(plans: list[PlannedTensor], path: Path | None) -> list[PlannedTensor]:
    """Return the same tensors; those whose scales are searched get their importance from the file, if there is one."""
    if path is None:
        return plans
    imatrix, found = read_imatrix(path), list[PlannedTensor]()
    for plan in plans:
        importance = None
        if plan.kind.name in TYPES and plan.kind.name not in SIMPLE and plan.stored.dtype is not None:
            experts = plan.stored.shape[0] if len(plan.stored.shape) == 3 else 1
            importance = imatrix.of(plan.name, plan.stored.shape[-1], experts)
        found.append(dataclasses.replace(plan, importance=importance))
    check_used(imatrix, any(plan.importance is not None for plan in found))
    return found


def _words(config: EngineConfig, files: ModelFiles, model: ModelConfig) -> dict[str, Any]:
    """Return the keys of tokenizer, chat template and sampling defaults."""
    tokenizer = open_tokenizer(config, files, {}, model.vocab_size)
    ending = generation_config(files, {})
    ends = end_tokens(model, ending, tokenizer, files.config or files.folder)
    metadata = tokenizer_metadata(tokenizer, model.vocab_size, ends)
    if banned := ending.token_ids("suppress_tokens"):
        metadata[SUPPRESSED] = list(banned)
    chosen = sampling_defaults(ending)  # top_k -1 keeps all tokens, as 0 does
    metadata |= {name: max(chosen[key], 0) for key, name in GGUF_SAMPLING.items() if key in chosen}
    if config.chat_template is None:
        return metadata
    kept = {key: value for key, value in metadata.items() if not key.startswith(_TEMPLATE)}  # without named templates
    return kept | {_TEMPLATE: config.chat_template}


def _kind(config: EngineConfig, name: str, target: str, stored: StoredTensor) -> GGMLQuantizationType:
    """Return the type of a tensor: norms, biases and routers in full precision, which llama.cpp requires."""
    if stored.dtype is None:
        return GGMLQuantizationType.MXFP4
    split = target.endswith(_SPLIT)
    if name.endswith(_FULL) or (stays_plain(target, stored) and not split):
        return GGMLQuantizationType.F32
    chosen = None if config.isq is None or split else chosen_type(ISQ_TYPES[config.isq], target, stored)
    if chosen is not None:
        return chosen
    wanted = "auto" if config.isq is not None else config.dtype
    return GGMLQuantizationType[DTYPES.get(wanted, stored.dtype if stored.dtype in ("F16", "BF16") else "F32")]


def _general(config: EngineConfig, files: ModelFiles, plans: list[PlannedTensor]) -> dict[str, Any]:
    most = max(plans, key=lambda plan: plan.nbytes).kind.name if config.isq is None else ISQ_TYPES[config.isq].name
    names = {f"ALL_{most}", f"MOSTLY_{most}", f"MOSTLY_{most}_S", f"MOSTLY_{most}_MOE"}
    file_type = next((kind for kind in LlamaFileType if kind.name in names), LlamaFileType.GUESSED)
    return {
        "general.type": "model",
        "general.name": Path(files.name).name,
        "general.file_type": int(file_type),
        "general.quantization_version": 2,
    }


def write_plans(
    plans: list[PlannedTensor],
    metadata: Mapping[str, Any],
    out: Path,
    progress: Progress,
    types: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> WrittenFile:
    """Write the file, under another name until it is complete; as `write_file`, with ModelLoadError for OSError."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        write_file(partial, plans, metadata, progress, types)
        os.replace(partial, out)
    except OSError as error:
        raise ModelLoadError(f"{out} cannot be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return WrittenFile(out, out.stat().st_size, dict(Counter(plan.kind.name for plan in plans)))


# ---- encoders --------------------------------------------------------------------------------------------------------


_BERT = "bert"


def _plan_of_encoder(
    config: EngineConfig,
    files: ModelFiles,
    source: Path,
    checkpoint: Checkpoint,
    family: EncoderFamily,
    model: EncoderConfig,
) -> tuple[list[PlannedTensor], dict[str, Any]]:
    """Plan an encoder of BERT's family, with its pooling, as a BERT, whose first position is 0.

    RoBERTa's table of positions begins with rows that no text uses. The planned metadata and tensors are read again,
    and must describe the same model.
    """
    if model.labels or _BERT not in family.gguf:
        raise UnsupportedModelError(
            f"{source}: GGUF files are not written for cross-encoders and classifiers, but for encoders of BERT's "
            "family that give vectors; use the folder as it is"
        )
    table, ignored = family.weights(model, checkpoint.tensors), family.ignored(model)
    check_weights(lambda: family.build(model, SHAPES), table, checkpoint, model, ignored=ignored)
    described = dataclasses.replace(model, model_type=_BERT, first_position=0)
    first, last = model.first_position, model.first_position + model.max_position
    plans: list[PlannedTensor] = []
    for name, target, stored in gguf_tensors(table, checkpoint, model, described, places(family.build(model, SHAPES))):
        stored = stored.rows(first, last) if name == "position_embd.weight" else stored
        plans.append(PlannedTensor(name, stored, _kind(config, name, target, stored)))
    plans = _by_importance(plans, config.imatrix)
    keys = {
        **sizes(model),
        "attention.layer_norm_epsilon": float(model.norm_eps),
        "attention.causal": False,
        **pooling_keys(files, model.hidden_size, "mean"),
    }
    metadata = {"general.architecture": _BERT, "tokenizer.ggml.token_type_count": model.token_types}
    metadata |= {f"{_BERT}.{key}": value for key, value in keys.items()} | _general(config, files, plans)
    metadata |= tokenizer_metadata(open_tokenizer(config, files, {}, model.vocab_size), model.vocab_size, ())
    written = Checkpoint(source, "gguf", (), {plan.name: plan.stored for plan in plans}, metadata)
    check_description(described, written)
    return plans, metadata
