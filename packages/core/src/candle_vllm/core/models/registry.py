# SPDX-License-Identifier: MIT
"""Which family serves which architecture.

A new family is a file in this folder and a name in `FAMILIES`: see "Adding a dense family" in docs/architecture.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

from candle_vllm.core.config import ModelImpl
from candle_vllm.core.errors import ConfigError, InvalidFileError, UnsupportedModelError, with_extra
from candle_vllm.core.fields import Fields
from candle_vllm.core.loading.config import MAX_LAYERS, EncoderConfig, ModelConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.models.family import EncoderFamily, Family
from candle_vllm.core.models.token_heads import base_class, with_head
from candle_vllm.core.models.tower_family import TowerFamily
from candle_vllm.core.models.towers import TOWERS, text_fields
from candle_vllm.core.models.trunks import SCORES, decoder_class, head_as_stored, is_headed, without_head
from candle_vllm.core.quantization.tensors import StoredTensor

Row = TypeVar("Row", Family, EncoderFamily)

_INSTALL = with_extra("transformers")

FAMILIES = (
    "llama",
    "bert",
    "deepseek",
    "deepseek_v4",
    "axk2",
    "deepseek_ocr",
    "gemma",
    "glm4",
    "chatglm",
    "mixtral",
    "llama4",
    "qwen_moe",
    "glm4_moe",
    "qwen3_next",
    "qwen4_exp",
    "olmo_hybrid",
    "gpt_oss",
    "phi",
    "phi3",
    "stablelm",
    "smollm3",
    "lfm2",
    "granite",
    "granite_hybrid",
    "falcon_h1",
    "nemotron_h",
    "codestral_mamba",
    "mamba",
    "jamba",
    "kimi_linear",
    "glm5_next",
    "inkling",
    "olmo",
    "olmo2",
    "olmoe",
    "minimax_m2",
    "minimax_m3",
    "cohere",
    "cohere2_moe",
    "ernie4_5",
    "exaone",
    "exaone_moe",
    "bailing_moe",
    "bailing_hybrid",
    "internlm2",
    "qwen",
    "nemotron_nas",
    "pico_decoder",
    "hy_v3",
    "hunyuan",
    "apertus",
    "laguna",
    "afmoe",
    "arcee",
    "nemotron",
    "gemma3n",
    "muse_glimmer",
    "phimoe",
    "mimo_v2",
    "step3p5",
    "gemma4",
    "gpt2",
    "gpt_neox",
    "opt",
    "falcon",
    "starcoder2",
    "gptj",
    "bloom",
    "nomic_bert",
    "mpnet",
    "modernbert",
    "gemma_embedding",
    "jina_bert",
    "deberta",
)
"""The files of this folder with a `Family` or `EncoderFamily` as `FAMILY`. They are imported in this order until one
serves the requested name, so the most common families come first."""


NOT_BUILT = frozenset(
    {"deepseek4"}
    | {"KimiK3ForConditionalGeneration", "kimi-k3"}
    | {"RWKV7ForCausalLM", "rwkv7"}
    | {"BailingMoeV2_5ForCausalLM"}
    | {"Inkling2ForCausalLM", "Inkling2ForConditionalGeneration"}
)
"""Architectures for which docs/models.md lists what is missing."""


class ByName(Mapping[str, Row]):
    """Families of one kind by the names of one format; a lookup imports families until it finds the name."""

    def __init__(self, kind: type[Row], format: Literal["hf", "gguf"]) -> None:
        self._kind = kind
        self._format = format

    def __getitem__(self, name: str) -> Row:
        family = next((family for family in _families() if name in getattr(family, self._format)), None)
        if not isinstance(family, self._kind):
            raise KeyError(name)
        return family

    def __iter__(self) -> Iterator[str]:
        for family in _families():
            if isinstance(family, self._kind):
                yield from getattr(family, self._format)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _families() -> Iterator[Family | EncoderFamily]:
    for name in FAMILIES:
        yield import_module(f"{__package__}.{name}").FAMILY
    yield from _installed()


@functools.cache
def _installed() -> tuple[Family | EncoderFamily, ...]:
    """The families of other installed packages, by their entry points in the group `candle_vllm.models`."""
    from importlib.metadata import entry_points

    return tuple(point.load() for point in entry_points(group="candle_vllm.models"))


TOWER_FAMILIES = (
    "siglip", "pixtral", "lighton_tower", "gemma_tower", "gemma4_tower", "gemma4_unified_tower", "qwen_vl",
    "llama4_tower", "glm4v_tower", "paddleocr_tower", "internvl_tower", "dots_ocr_tower", "clip_tower", "lfm2_vl_tower",
    "llava_onevision_tower", "llava_next_tower", "hunyuan_tower", "minicpmv_tower", "kimi_tower", "deepseek_ocr2_tower",
    "paligemma_tower", "minicpmv_canvas", "cohere2_vision_tower", "aya_vision_tower", "deepseek_ocr_tower",
    "granite4_vision_tower", "phi3v_tower", "got_ocr2_tower", "got_tower", "glm5_next_tower",
    "exaone4_5_tower", "inkling_tower", "unlimited_ocr_tower", "kimi_vl_tower",
)  # fmt: skip
"""The files of this folder with a `TowerFamily` as `FAMILY`."""


def tower_family(config: Mapping[str, Any]) -> TowerFamily | None:
    """The vision family for a `config.json`; None if it has no supported vision encoder."""
    names = config.get("architectures")
    named = names[0] if isinstance(names, list) and len(names) == 1 else None
    vision = config.get("vision_config")
    seen = vision.get("model_type") if isinstance(vision, dict) else None
    return next((each for each in _towers() if named in each.hf and (not each.seen or seen in each.seen)), None)


def tower_family_from_gguf(metadata: Mapping[str, Any], path: Path) -> TowerFamily:
    """The vision family for a GGUF file.

    Raises:
        UnsupportedModelError: the file is not a vision encoder, or its family is not supported.
    """
    fields = Fields(metadata, path)
    if metadata.get("general.architecture") != "clip":
        raise UnsupportedModelError(f"{path}: this is not a vision encoder file (mmproj)")
    kind = fields.get("clip.projector_type", str, fields.get("clip.vision.projector_type", str, ""))
    found = next((family for family in _towers() if kind in family.gguf), None)
    if found is None:
        known = ", ".join(name for family in _towers() for name in family.gguf)
        raise UnsupportedModelError(f"{path}: clip.projector_type is {kind!r:.60}; implemented: {known}")
    return found


def tower_family_named(name: str) -> TowerFamily:
    """The vision family with this name, one of `TOWER_FAMILIES`."""
    return next(family for family in _towers() if family.name == name)


def _towers() -> Iterator[TowerFamily]:
    for file in TOWER_FAMILIES:
        yield import_module(f"{__package__}.{file}").FAMILY


HF_FAMILIES = ByName(Family, "hf")
GGUF_FAMILIES = ByName(Family, "gguf")
HF_ENCODERS = ByName(EncoderFamily, "hf")
GGUF_ENCODERS = ByName(EncoderFamily, "gguf")


def encoder_from_hf(config: Mapping[str, Any], path: Path) -> tuple[EncoderFamily, EncoderConfig] | None:
    """The family and config for a `config.json`; None if it does not describe an encoder."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    base = base_class(name, config, HF_ENCODERS) if isinstance(name, str) else None
    family = None if base is None else HF_ENCODERS.get(base)
    if family is None or base is None or name is None:
        return None
    model_type, scores = family.hf[base]
    if model_type == "gemma3_text" and config.get("use_bidirectional_attention") is not True:
        return None  # Gemma 3 itself: a decoder that is stored without its head
    fields = Fields(config, path)
    return with_head(name, family, family.config_from_hf(fields, model_type, scores=scores), fields)


def encoder_from_gguf(
    metadata: Mapping[str, Any], checkpoint: Checkpoint
) -> tuple[EncoderFamily, EncoderConfig] | None:
    """The family and config for GGUF metadata; None if it does not describe an encoder."""
    name = metadata.get("general.architecture")
    family = GGUF_ENCODERS.get(name) if isinstance(name, str) else None
    if family is None or family.config_from_gguf is None:
        return None
    return family, family.config_from_gguf(Fields(metadata, checkpoint.path, prefix=f"{name}."), checkpoint)


def family_from_hf(
    config: Mapping[str, Any],
    path: Path,
    tensors: Mapping[str, StoredTensor] | None = None,
    impl: ModelImpl = "auto",
) -> tuple[Family, ModelConfig]:
    """The family and config for a `config.json`, or for its text model.

    Args:
        config, path: content of the file, and its path.
        tensors: tensors of the checkpoint; None if they are not available.
        impl: which layers to use; by default transformers' layers only for architectures that this folder lacks.
    """
    whole = Fields(config, path)
    for fields in (whole, whole.section("text_config")):
        check_causal(fields, "is_causal")
    if impl == "transformers":
        return _family_of_transformers(config, path, tensors)
    names = whole.get("architectures", list)
    if len(names) != 1 or not isinstance(names[0], str):
        raise InvalidFileError(f"{path}: architectures must name one model class, not {names!r:.80}")
    named, fields = text_fields(names[0], config, path, tensors)
    for key in ("num_hidden_layers", "num_layers", "n_layer", "n_layers"):  # before a list has an entry for each layer
        fields.count(key, 1, most=MAX_LAYERS)
    name = decoder_class(named, HF_FAMILIES)
    if impl == "auto" and name not in HF_FAMILIES and _has_transformers() and _is_decoder_of_transformers(name, config):
        return _family_of_transformers(config, path, tensors)
    family = _find(name, HF_FAMILIES, path, [*TOWERS, *HF_ENCODERS])
    found = family.config_from_hf(fields, family.hf[name])
    if family.completed is not None and tensors is not None:
        found = family.completed(found, tensors)
    if is_headed(names):  # `assembly/heads.py` reads the head
        own = family.ignored
        family = dataclasses.replace(family, ignored=lambda config: [*own(config), rf"({'|'.join(SCORES)})\..*"])
    return family, head_as_stored(without_head(named, found, HF_FAMILIES, tensors), tensors, path, family.weights)


def check_causal(fields: Fields, key: str) -> None:
    """Raise UnsupportedModelError if `key` is false in a decoder's config, so that its tokens attend to later ones."""
    if not fields.get(key, bool, True):
        raise UnsupportedModelError(
            f"{fields.path}: {key} is false, and attention to later tokens is implemented only for encoders, which "
            "docs/models.md lists: choose another model"
        )


def _is_decoder_of_transformers(name: str, config: Mapping[str, Any]) -> bool:
    """Whether transformers has this class as the decoder of the config's model_type."""
    known = import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = known.get(str(config.get("model_type")), ())
    return name in ((found,) if isinstance(found, str) else found)


def _has_transformers() -> bool:
    """Whether transformers and torch are installed; they are not imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("transformers", "torch"))


def _any_architecture() -> Any:
    """The module that makes families of models that run transformers' module code."""
    if not _has_transformers():
        raise ConfigError(f"model_impl='transformers' needs transformers: {_INSTALL}", "model_impl")
    return import_module(f"{__package__}.any_architecture.family")


def _family_of_transformers(
    config: Mapping[str, Any], path: Path, tensors: Mapping[str, StoredTensor] | None
) -> tuple[Family, ModelConfig]:
    """The family of a model that runs transformers' module code, or of a multimodal model's text model."""
    names = config.get("architectures")
    if isinstance(names, list) and len(names) == 1 and names[0] in TOWERS:
        name, fields = text_fields(names[0], config, path, tensors)
        text = {key.removeprefix(fields.prefix): value for key, value in fields.values.items()}
        config = text | {"architectures": [name], "model_type": text.get("model_type") or next(iter(TOWERS[names[0]]))}
    return _any_architecture().family_of(config, path, tensors)


def family_from_gguf(
    metadata: Mapping[str, Any], checkpoint: Checkpoint, impl: ModelImpl = "auto"
) -> tuple[Family, ModelConfig]:
    """The family and config for GGUF metadata; `impl` as in `family_from_hf`."""
    name = Fields(metadata, checkpoint.path).get("general.architecture", str)
    Fields(metadata, checkpoint.path, f"{name}.").count("block_count", 1, most=MAX_LAYERS)
    absent = name not in GGUF_FAMILIES and name not in GGUF_ENCODERS
    if impl == "transformers" or (impl == "auto" and absent and _has_transformers()):
        module = _any_architecture()
        if impl == "transformers" or module.gguf.reads_gguf(name):
            return module.family_of_gguf(name, checkpoint)
    if name == "llama" and Fields(metadata, checkpoint.path, "llama.").get("expert_count", int, 0):
        from candle_vllm.core.models.mixtral import FAMILY as family  # Mixtral's files have Llama's architecture
    else:
        family = _find(name, GGUF_FAMILIES, checkpoint.path, GGUF_ENCODERS)
    assert family.config_from_gguf is not None, "a family with GGUF architectures reads their metadata"
    return family, family.config_from_gguf(Fields(metadata, checkpoint.path, prefix=f"{name}."), checkpoint)


def _find(name: str, families: Mapping[str, Row], path: Path, others: Iterable[str]) -> Row:
    """The family with this name; `others` are further supported names for the error message."""
    if name in families:
        return families[name]
    known = [*families, *others]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" (the nearest is {near[0]})" if near else ""
    way = "" if path.suffix == ".gguf" else f"; transformers may have it: {_INSTALL}, or set model_impl='transformers'"
    way += "; docs/models.md lists what is missing" if name in NOT_BUILT else ""
    raise UnsupportedModelError(
        f"{path}: architecture {name!r:.80} is not implemented{hint}{way}; implemented: {', '.join(known)}"
    )
