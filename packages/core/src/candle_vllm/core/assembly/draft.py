# SPDX-License-Identifier: MIT
"""Load a draft model, a draft head (EAGLE-3, Gemma 4), or the model's own layer for multi-token prediction.

The draft is loaded after the target model, and refused if it was trained for another model or has another vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from candle_vllm.core.assembly.model import (
    Described,
    HeadFacts,
    LoadedHead,
    LoadedModel,
    as_loaded,
    describe_family,
    describe_model,
    load_model,
)
from candle_vllm.core.assembly.opening import Opened, config_file, naming, open_model
from candle_vllm.core.assembly.placement import choose_placement, room_for_weights
from candle_vllm.core.config import WEIGHTS, EngineConfig, draft_error, draft_settings
from candle_vllm.core.devices import Device
from candle_vllm.core.errors import (
    ConfigError,
    InvalidFileError,
    ModelLoadError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.layers.parameters import SHAPES, Placement
from candle_vllm.core.loading.source import ModelFiles, model_files
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName, check_weights, load_weights, stored_lines
from candle_vllm.core.models.family import DraftHead
from candle_vllm.core.models.stack import DecoderStack
from candle_vllm.core.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from candle_vllm.core.models.eagle3 import Eagle3, Eagle3Config

_OF_THE_TARGET = (
    "tokenizer", "chat_template", "mmproj", "mm_processor_kwargs", "isq", "imatrix", "yarn_scaling_factor",
    "max_model_len", "speculative_config",
)  # fmt: skip
"""Settings that do not apply to the draft model's files."""
MOST_UNSHARED = 128
"""Maximum number of tokens that only one of two vocabularies has: added or unused tokens differ within a family."""


def draft_config(config: EngineConfig) -> EngineConfig | None:
    """Return the settings with which the draft model's files are loaded; None without files of a draft model."""
    drafts = draft_settings(config.speculative_config)
    if drafts is None or drafts.model is None:
        return None
    unset: dict[str, Any] = dict.fromkeys(_OF_THE_TARGET)
    own = {"model": drafts.model, "revision": drafts.revision, "weight_file": drafts.weight_file}
    return dataclasses.replace(config, max_images=0, **own, **unset)


def find_draft(config: EngineConfig) -> None:
    """Find the draft model's files, or download them, before the target model is read; errors as `load_draft`."""
    if (drafts := draft_config(config)) is not None:
        with _as_setting(drafts):
            model_files(drafts)


def describe_draft(config: EngineConfig, target: Described, device: Device) -> Described | DescribedHead | None:
    """Load a draft without its weights; None without one. A draft model's vocabulary is not compared with the target's.

    Errors as `load_draft`.
    """
    settings, drafts = draft_settings(config.speculative_config), draft_config(config)
    if settings is None or WEIGHTS not in settings.sources:
        return None
    with _as_setting(drafts):
        opened = open_draft(drafts or config, settings.method, device)
        with opened.checkpoint:
            if settings.method == "draft_model":
                return describe_model(drafts or config, device, opened)
            return describe_head(drafts or config, settings.method, target, opened, device)


def load_draft(
    config: EngineConfig, target: LoadedModel, device: Device, progress: Callable[[int, int], object]
) -> LoadedModel | LoadedHead | None:
    """Load the draft model or head of `target`; None without one, and on a GPU, where `build_engine` refuses it.

    Raises:
        ConfigError, ModelNotFoundError, ModelLoadError: it cannot be loaded, or does not fit the target model.
    """
    settings, drafts = draft_settings(config.speculative_config), draft_config(config)
    if settings is None or WEIGHTS not in settings.sources or device.type == "cuda":
        return None
    with _as_setting(drafts):
        opened = open_draft(drafts or config, settings.method, device)
        if settings.method != "draft_model":
            with opened.checkpoint:
                return load_head(drafts or config, settings.method, target, opened, device, progress, config)
        draft = load_model(drafts or config, device, progress, opened)
    if draft.config.answer_window is not None:
        raise draft_error(f"{draft.name} reads its answer through a window, and cannot draft for another model")
    _check_vocabulary(target, draft.name, draft.tokenizer, "a smaller model of the same family")
    return draft


def open_draft(config: EngineConfig, method: str, device: Device) -> Opened:
    """Open the draft's files, or the target's for its MTP layer; a safetensors head's tensors keep their names."""
    files = model_files(config)
    if method == "draft_model" and (right := _head_method(files)) is not None:
        raise draft_error(
            f"{files.name} is a head, which drafts from the model's hidden states, and no "
            f'model of its own: set "method": "{right}"'
        )
    if method == "draft_model" or not _is_for_head(config) or files.format == "gguf":
        return open_model(files, device)
    if files.format != "safetensors" or files.config is None:
        raise InvalidFileError(
            f"{files.folder}: a draft head must be a folder with config.json and safetensors files, or a GGUF file"
        )
    return open_model(files, device, is_draft_head=True)


def _is_for_head(config: EngineConfig) -> bool:
    """Return whether settings are from `draft_config`, for a head with files of its own, not the target model's."""
    return config.speculative_config is None


def _head_method(files: ModelFiles) -> str | None:
    """Return the method of a draft head by its architecture; None if the files contain no head."""
    names: list[Any] = []
    if files.format == "gguf":
        from candle_vllm.core.loading.gguf import open_gguf

        with naming(files.weights[0]), open_gguf(files.weights[0]) as checkpoint:
            names = [checkpoint.metadata.get("general.architecture")]
    elif files.config is not None:
        with naming(files.config):
            names = Fields(read_json(files.config), files.config).get("architectures", list, [])
    methods = {"eagle": "eagle3", "assistant": "mtp"}
    return next((methods[part] for part in methods for name in names if part in str(name).lower()), None)


# ---- heads -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescribedHead(HeadFacts):
    """A draft head before its weights are read.

    Attributes:
        weights, ignored: its table of weight names, and patterns of names that are not loaded.
        build: builds the head, for a placement and a target model.
    """

    stored: Checkpoint
    weights: Sequence[WeightName]
    ignored: Sequence[str]
    build: Callable[[Placement, Any], DraftHead]


def describe_head(
    config: EngineConfig, method: str, target: Described | LoadedModel, opened: Opened, device: Device
) -> DescribedHead:
    """Load a draft head without its weights, which are only checked; errors as `load_draft`."""
    described = config_file(opened.files)
    with naming(described, opened.checkpoint.path):
        mtp = _describe_assistant if _is_for_head(config) else _describe_next_tokens
        found = (_describe_eagle3 if method == "eagle3" else mtp)(target, opened)
        placement = choose_placement(config, device, found.stored, found.config)
    if placement.recorded != target.placement.recorded:
        raise ConfigError(
            f"{found.name} and {target.name} must both run on the compiled kernels or both in torch, and one of them "
            "has no compiled kernels (see the warning above); set op_by_op=True or leave speculative_config out",
            "speculative_config",
        )
    return dataclasses.replace(found, placement=placement)


def load_head(
    config: EngineConfig,
    method: str,
    target: LoadedModel,
    opened: Opened,
    device: Device,
    progress: Callable[[int, int], object],
    whole: EngineConfig,
) -> LoadedHead:
    """Load a draft head; `config` are the settings for its files, `whole` the target's. Errors as `load_draft`."""
    if not isinstance(target.decoder, DecoderStack):
        raise draft_error(
            f"{target.config.model_type} does not provide the hidden states that the method {method} needs"
        )
    found = describe_head(config, method, target, opened, device)
    stored = found.stored
    if target.shard is not None and not found.config.cache_specs:
        raise draft_error(
            f"{found.name} reads the whole KV cache of {target.name}, but each rank has only a part of it"
        )
    tables = None if target.shard is None else _whole_tables(whole, target, found, device)
    with naming(config_file(opened.files), stored.path), room_for_weights(found.name, found.placement, stored):
        head = found.build(found.placement, tables or target.decoder)
        load_weights(head, found.weights, stored, found.config, ignored=found.ignored, progress=progress)
    facts = {field.name: getattr(found, field.name) for field in dataclasses.fields(HeadFacts)}
    return LoadedHead(**facts, head=head, weight_bytes=sum(tensor.nbytes for tensor in stored.tensors.values()))


def _whole_tables(config: EngineConfig, target: LoadedModel, found: DescribedHead, device: Device) -> DecoderStack:
    """Load the target's whole tables for a draft head that shares them, if ranks have only parts of the tables.

    The result is the target without layers: last norm, rotary embedding, and the tables that the head does not have.
    """
    head: Any = found.build(SHAPES, target.decoder)
    opened = open_model(model_files(config), device)
    with opened.checkpoint as checkpoint, naming(config_file(opened.files), checkpoint.path):
        family, _ = describe_family(opened.files, checkpoint, opened.metadata)
        model, stored = target.config, as_loaded(config, family, target.config, checkpoint)
        whole: Any = family.build(model, target.placement, checkpoint)
        whole.layers = [None] * model.num_layers
        scores = "embed" if whole.head is None else "head"
        lacking = {name for name, own in (("embed", head.own_embed), (scores, head.own_head)) if own is None}
        for name in {"embed", "head"} - lacking:
            setattr(whole, name, None)
        names = {
            name
            for line, name in stored_lines(family.weights, model, stored)
            if line.target.partition(":")[0] in {*lacking, "norm", "rotary"}
        }
        part = stored.with_tensors({name: stored.tensors[name] for name in names})
        with room_for_weights(f"the tables that {found.name} shares with {target.name}", target.placement, part):
            load_weights(whole, family.weights, part, model, ignored=family.ignored(model))
    return whole


def _checked(
    opened: Opened, build: Callable[[Placement, Any], DraftHead], whole: object = None, **facts: Any
) -> DescribedHead:
    """Describe a head after its weights are checked; `whole` is the target's decoder, if `build` needs it."""
    found = DescribedHead(name=opened.files.name, placement=SHAPES, build=build, **facts)
    check_weights(lambda: build(SHAPES, whole), found.weights, found.stored, found.config, ignored=found.ignored)
    return found


def _describe_eagle3(target: Described | LoadedModel, opened: Opened) -> DescribedHead:
    from candle_vllm.core.models import eagle3

    files, stored, model = opened.files, opened.checkpoint, target.config
    if files.format == "gguf":
        name = Fields(opened.metadata, stored.path).get("general.architecture", str)
        if name != eagle3.GGUF_ARCHITECTURE:
            raise UnsupportedModelError(f"{stored.path}: the architecture {name!r:.80} is not an EAGLE-3 head")
        config = eagle3.config_from_gguf(Fields(opened.metadata, stored.path, f"{name}."), stored, model)
    else:
        assert files.config is not None
        config = eagle3.config_from_hf(Fields(read_json(files.config), files.config), model)
    if not eagle3.has_embedding(stored):
        config = dataclasses.replace(config, vocab_size=model.vocab_size)

    build = cast("Callable[[Placement, Any], eagle3.Eagle3]", partial(eagle3.Eagle3, config, stored))
    _check_fit(target, files.name, config, build(SHAPES, None))
    facts = {"vocab_size": config.draft_vocab_size, "weights": eagle3.WEIGHTS, "ignored": eagle3.IGNORED}
    found = _checked(opened, build, config=config, stored=stored, **facts)
    if (words := _tokenizer_of(opened)) is not None:
        _check_vocabulary(target, files.name, words, "a head that was trained for this model")
    return dataclasses.replace(found, meant=eagle3.draft_token_ids(config, stored, model.vocab_size))


def _check_fit(target: Described | LoadedModel, name: str, config: Eagle3Config, head: Eagle3) -> None:
    """Raise ConfigError if the sizes of an EAGLE-3 head show that it was trained for another model."""
    model, own = target.config, config.hidden_size
    wrong = None
    if config.target_size != model.hidden_size:
        wrong = f"it reads hidden states of {config.target_size} elements, and the model's have {model.hidden_size}"
    elif (head.own_embed is None or head.own_head is None) and own != model.hidden_size:
        wrong = (
            f"its hidden size is {own}, without an embedding or a head of its own; the model's is {model.hidden_size}"
        )
    elif head.own_embed is not None and abs(config.vocab_size - model.vocab_size) > MOST_UNSHARED:
        wrong = f"it knows {config.vocab_size} tokens, and the model {model.vocab_size}"
    elif head.own_head is None and config.draft_vocab_size != model.vocab_size:
        wrong = f"it has {config.draft_vocab_size} tokens and no head; the model's head has {model.vocab_size}"
    if wrong is not None:
        raise draft_error(f"{name} cannot draft for {target.name}: {wrong}; use a head that was trained for it")


def _tokenizer_of(opened: Opened) -> Tokenizer | None:
    if "tokenizer.ggml.tokens" in opened.metadata:
        return Tokenizer.from_gguf(opened.metadata)
    if opened.files.format == "safetensors" and (opened.files.folder / "tokenizer.json").is_file():
        return Tokenizer.from_folder(opened.files.folder)
    return None


def _describe_assistant(target: Described | LoadedModel, opened: Opened) -> DescribedHead:
    from candle_vllm.core.models import gemma4_assistant as family

    files, stored, model = opened.files, opened.checkpoint, target.config
    read = family.config_from_gguf if files.format == "gguf" else family.config_from_hf
    config = read(Fields(opened.metadata or read_json(config_file(files)), config_file(files)), stored, model)
    build = cast("Callable[[Placement, Any], DraftHead]", partial(family.Assistant, config, stored))
    facts = {"vocab_size": config.vocab_size, "weights": family.WEIGHTS, "ignored": family.IGNORED}
    return _checked(opened, build, config=config, stored=stored, **facts)


def _describe_next_tokens(target: Described | LoadedModel, opened: Opened) -> DescribedHead:
    from candle_vllm.core.models import mtp

    family, _ = describe_family(opened.files, opened.checkpoint, opened.metadata)
    checkpoint, model = opened.checkpoint, target.config
    layout = mtp.find_layout(model, checkpoint)
    stored = mtp.layer_tensors(layout, checkpoint, family.weights)
    config, names = mtp.head_config(model, layout, stored), mtp.weight_names(layout, family.weights)

    build = cast("Callable[[Placement, Any], DraftHead]", partial(mtp.NextTokens, config, layout, stored))
    facts = {"vocab_size": model.vocab_size, "weights": names, "ignored": family.ignored(config)}
    return _checked(opened, build, family.build(model, SHAPES, checkpoint), config=config, stored=stored, **facts)


def _check_vocabulary(target: Described | LoadedModel, name: str, words: Tokenizer, instead: str) -> None:
    difference = vocabulary_difference(target.tokenizer, words)
    if difference is not None:
        raise draft_error(
            f"{name} cannot draft for {target.name}, because their vocabularies differ ({difference}): use {instead}"
        )


def vocabulary_difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """Return how two vocabularies differ, for messages; None if one can draft for the other.

    Each token id of both vocabularies must have the same text, and at most `MOST_UNSHARED` ids may be in only one.
    """
    first, second = (
        {index: text for text, index in words.backend.get_vocab(with_added_tokens=True).items()}
        for words in (one, other)
    )
    for index in sorted(first.keys() & second.keys()):
        if first[index] != second[index]:
            return f"token {index} is {first[index]!r:.40} in one and {second[index]!r:.40} in the other"
    unshared = len(first.keys() ^ second.keys())
    if unshared > MOST_UNSHARED:
        return f"{unshared} tokens are in only one of them, of {len(first)} and {len(second)}"
    return None


@contextmanager
def _as_setting(drafts: EngineConfig | None) -> Iterator[None]:
    """Prefix errors with `speculative_config`, and with the draft model's name if it has files of its own."""
    said = "speculative_config" + ("" if drafts is None else f": draft model {drafts.model!r:.200}")
    try:
        yield
    except ConfigError as error:
        if str(error).startswith("speculative_config"):
            raise
        raise ConfigError(f"{said}: {error}", "speculative_config") from error
    except (ModelNotFoundError, ModelLoadError) as error:
        raise type(error)(f"{said}: {error}") from error
