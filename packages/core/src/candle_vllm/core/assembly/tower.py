# SPDX-License-Identifier: MIT
"""Load a multimodal model's vision tower, and its image preprocessing, from the model's files."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from candle_vllm.core.assembly.opening import Opened, naming
from candle_vllm.core.assembly.placement import encoder_placement, memory_of, room_for_weights
from candle_vllm.core.config import EngineConfig
from candle_vllm.core.errors import ConfigError, InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.layers.parameters import SHAPES, Placement
from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import check_weights, load_weights, places
from candle_vllm.core.models.registry import tower_family, tower_family_from_gguf, tower_family_named
from candle_vllm.core.models.tower_family import Tower, TowerConfig, TowerFamily, spans_of
from candle_vllm.core.text.tokenizer import Tokenizer
from candle_vllm.core.vision.pictures import PictureLimits, require_pillow
from candle_vllm.core.vision.preprocessing import NOTHING, Rule, rule_from
from candle_vllm.core.vision.prompts import VisionDescription, VisionInput

logger = logging.getLogger(__name__)

_Found = tuple[TowerFamily, TowerConfig, Checkpoint, Path]
"""A tower's family, its config, its tensors, and the file with the config."""

_PROCESSOR = "preprocessor_config.json"
_MOST_BREAKS = 32  # maximum number of line breaks in a token: Gemma has tokens for up to 31
_PROCESSORS = "processor_config.json"  # newer models have the same settings under the key "image_processor"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedTower:
    """A vision tower with its weights; `vision` is how images are preprocessed and become tokens of a prompt."""

    tower: Tower
    placement: Placement
    vision: VisionInput
    weight_bytes: int


def load_tower(
    config: EngineConfig, opened: Opened, tokenizer: Tokenizer, text_size: int, text: Placement
) -> LoadedTower | None:
    """Load the vision tower of a model; return None for a text-only model. Errors: see `_opened`.

    Args:
        text_size: hidden size of its text model.
        text: placement of the text model; the tower runs recorded steps only if that does, and shares its threads.
    """
    with _opened(config, opened, text_size) as found:
        return None if found is None else _loaded(config, text, opened.files.name, tokenizer, *found)


def tower_memory(config: EngineConfig, opened: Opened, text_size: int, text: Placement, threads: int) -> int:
    """Return the bytes of a tower for weights and for encoding with `threads` threads; 0 without a tower.

    For the other arguments and the errors see `load_tower`; no weights are read.
    """
    with _opened(config, opened, text_size) as found:
        if found is None:
            return 0
        _, model, stored, _ = found
        placement = encoder_placement(config, text.device, stored) if text.recorded else text
        return model.step_bytes(threads) + memory_of(placement, stored)


@contextlib.contextmanager
def _opened(config: EngineConfig, opened: Opened, text_size: int) -> Iterator[_Found | None]:
    """Yield the family, config, tensors and file of a tower, while its file is open; None for a text-only model.

    Raises:
        ConfigError: `mmproj` is set for a folder or without Pillow (without `mmproj`, a missing Pillow is a warning);
            or `mm_processor_kwargs` is set without a tower, or has a setting that the tower does not accept.
        ModelLoadError: its files cannot be used.
    """
    if config.mmproj is not None and opened.files.format != "gguf":
        raise ConfigError("mmproj is for GGUF models: a safetensors folder contains its own vision encoder", "mmproj")
    if not config.max_images or (config.mmproj is None and opened.tower is None):
        if config.mm_processor_kwargs:
            said = f"mm_processor_kwargs: {opened.files.name} takes text only, so this has no effect: leave it out"
            raise ConfigError(said, "mm_processor_kwargs")
        yield None
        return
    try:
        require_pillow()
    except ConfigError as error:
        if config.mmproj is not None:
            raise ConfigError(f"mmproj: {error}, or leave it out", "mmproj") from None
        logger.warning("%s takes text only: %s", opened.files.name, error)
        yield None
        return
    if config.mmproj is None:
        found = _from_folder(opened, text_size, config.mm_processor_kwargs)
        yield found if found is None or config.isq is None else _quantised(*found)
        return
    with open_gguf(config.mmproj) as stored:
        yield _from_gguf(stored, text_size, config.mm_processor_kwargs)


def _from_folder(opened: Opened, text_size: int, said: Mapping[str, Any] | None) -> _Found | None:
    stored, files = opened.tower, opened.files
    if stored is None or files.config is None:
        return None
    values = read_json(files.config)
    family = tower_family(values)
    assert family is not None
    fields, processor = Fields(values, files.config), _processor(files.folder, family.images)
    model = _described(family, said, lambda said: family.config_from_hf(fields, processor, text_size, said))
    return family, model, stored.with_tensors(family.prepared(stored.tensors, model)), files.config


def _quantised(family: TowerFamily, model: TowerConfig, stored: Checkpoint, described: Path) -> _Found:
    """Quantise a folder's tower to Q8_0, whatever the type of `isq`, because its errors affect all tokens.

    Position embeddings stay unquantised.
    """
    from candle_vllm.core.assembly.isq import quantised_in_situ

    there = places(family.build(model, SHAPES))
    has_place: Callable[[str], bool] = lambda target: not target.startswith("positions:") and there(target)  # noqa: E731
    return family, model, quantised_in_situ("q8_0", family.weights, stored, model, has_place), described


def _from_gguf(stored: Checkpoint, text_size: int, said: Mapping[str, Any] | None) -> _Found:
    family = tower_family_from_gguf(stored.metadata, stored.path)
    fields = Fields(stored.metadata, stored.path, "clip.vision.")
    read = family.config_from_gguf
    assert read is not None, "a family with GGUF files reads their metadata"
    model = _described(family, said, lambda said: read(fields, text_size, said))
    if family.completed is not None:
        model = family.completed(model, stored.tensors)
    return family, model, stored.with_tensors(family.prepared(stored.tensors, model)), stored.path


def _described(
    family: TowerFamily, said: Mapping[str, Any] | None, read: Callable[[Mapping[str, Any]], TowerConfig]
) -> TowerConfig:
    """Return a tower's config from its files and `mm_processor_kwargs`; errors in the latter are a `ConfigError`."""
    model = read(NOTHING)  # errors in the files are raised here
    if not said:
        return model
    unknown = [name for name in _named(said) if name not in family.settings]
    if unknown:
        known = ", ".join(family.settings) or "none"
        text = f"mm_processor_kwargs: {unknown[0]!r:.60} is not a setting of this model, which has {known}"
        raise ConfigError(text, "mm_processor_kwargs")
    try:
        return read(said)
    except (InvalidFileError, UnsupportedModelError) as error:
        raise ConfigError(str(error), "mm_processor_kwargs") from None


def _named(said: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of settings; nested names have a dot."""
    for name, value in said.items():
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in value)
        else:
            yield name


def _loaded(
    config: EngineConfig,
    text: Placement,
    name: str,
    tokenizer: Tokenizer,
    family: TowerFamily,
    model: TowerConfig,
    stored: Checkpoint,
    described: Path,
) -> LoadedTower:
    started, family = time.perf_counter(), family.known_to(tokenizer.encode)
    placement = encoder_placement(config, text.device, stored) if text.recorded else text
    with naming(described, stored.path):
        check_weights(lambda: family.build(model, SHAPES), family.weights, stored, model)
        with room_for_weights(f"the tower of {name}", placement, stored):
            tower = family.build(model, placement)
            load_weights(tower, family.weights, stored, model)
    nbytes = sum(tensor.nbytes for tensor in stored.tensors.values())
    logger.info("loaded the tower of %s: %.1f MB in %.2f s", name, nbytes / 1e6, time.perf_counter() - started)
    mark, asks = (_token(token, tokenizer, described) for token in (family.mark, family.asks or family.mark))
    seen: dict[str, Any] = {"whole": model.whole, "turned": family.turned is not None, "blank": model.blank}
    seen |= {"written": family.written or family.asks or family.mark, "prefix": model.prefix}
    parts = VisionDescription(family=family.name, rule=model.rule, mark=mark, asks=asks, cell=model.cell_pixels, **seen)
    vision = vision_input_of(parts, tokenizer, config)
    return LoadedTower(tower=tower, placement=placement, vision=vision, weight_bytes=nbytes)


def vision_input_of(parts: VisionDescription, tokenizer: Tokenizer, config: EngineConfig) -> VisionInput:
    """Make the image preprocessing of a model from the `parts` of its tower; the settings have the limits of images."""
    family = tower_family_named(parts.family).known_to(tokenizer.encode)
    if not isinstance(parts.rule, Rule):
        parts = msgspec.structs.replace(parts, rule=rule_from(parts.rule))
    encode = functools.partial(tokenizer.encode, add_special_tokens=False, parse_special=True)
    words, turned = (lambda cut: encode(family.words_around(cut, cut.cells(parts.cell)))), family.turned
    turns = None if turned is None else lambda cut: turned(cut, cut.cells(parts.cell))
    trailing, limits = frozenset(encode("".join(family.trailing))), PictureLimits.of(config)
    arrange, spans = family.arranging(encode), functools.partial(spans_of, parts)
    return VisionInput(parts, words, turns, trailing, _breaks(tokenizer), limits, arrange, spans)


def _breaks(tokenizer: Tokenizer) -> dict[int, int]:
    breaks = {count: tokenizer.encode("\n" * count, add_special_tokens=False) for count in range(1, _MOST_BREAKS + 1)}
    return {ids[0]: count for count, ids in breaks.items() if len(ids) == 1} if len(breaks[1]) == 1 else {}


def _processor(folder: Path, usual: Mapping[str, Any] | None) -> Fields:
    for name, key in ((_PROCESSOR, None), (_PROCESSORS, "image_processor")):
        if (folder / name).is_file():
            fields = Fields(read_json(folder / name), folder / name)
            return fields if key is None else fields.section(key)
    if usual is not None:
        return Fields(usual, folder / _PROCESSOR)
    raise InvalidFileError(
        f"{folder}: neither {_PROCESSOR} nor {_PROCESSORS} defines the preprocessing of images; to use the model "
        "without images, set max_images=0"
    )


def _token(token: str, tokenizer: Tokenizer, path: Path) -> int:
    ids = tokenizer.encode(token, add_special_tokens=False, parse_special=True)
    if len(ids) != 1:
        raise UnsupportedModelError(f"{path}: the tokenizer has no token {token!r}, the placeholder of an image")
    return ids[0]
