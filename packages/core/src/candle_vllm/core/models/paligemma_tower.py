# SPDX-License-Identifier: MIT
"""The vision encoder of PaliGemma 1 and 2: SigLIP's, with one embedding for each patch.

The text model, Gemma or Gemma 2, was trained on a prefix, which is the images and the prompt: its tokens attend to each
other in both directions, and only those of the answer are causal. A prompt is `<image>` for every embedding, `<bos>`,
the text, and a line break. A prompt without an image is causal, as transformers' model has it.
Sources: Beyer et al., 2024, arXiv:2407.07726; Steiner et al., 2024, arXiv:2412.03555;
`PaliGemmaForConditionalGeneration` and `PaliGemmaProcessor` of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.lfm2_vl_tower import prepared
from candle_vllm.core.models.siglip import SMALL, Siglip, config_of_tiles, hf_values, names
from candle_vllm.core.models.tower_family import TowerConfig, TowerFamily, contents_template, mark_of_cells
from candle_vllm.core.vision.preprocessing import NOTHING, over, stretch_rule

# ---- config ----------------------------------------------------------------------------------------------------------

_BICUBIC = 3  # Pillow's code of the filter
_PROCESSOR = MappingProxyType({"size": {"height": 224, "width": 224}, "resample": _BICUBIC})
"""Defaults of transformers' `SiglipImageProcessor` that differ from those of Gemma 3's."""
_LONGEST = MappingProxyType({"gemma": 8192, "gemma2": 4096})
"""Defaults by model_type of the text model: the context of Gemma, and the sliding window of Gemma 2."""


def config_from_hf(fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> TowerConfig:
    """Read `config.json` and `preprocessor_config.json`."""
    vision, text = fields.section("vision_config"), fields.section("text_config")
    if not text.get("use_bidirectional_attention", bool, True):
        raise UnsupportedModelError(f"{fields.path}: text_config.use_bidirectional_attention is false, not true")
    if vision.count("num_channels", 3) != 3:
        raise UnsupportedModelError(f"{fields.path}: num_channels is {vision.count('num_channels')}, not 3")
    if (projected := vision.count("projection_dim", fields.count("projection_dim", 2048))) != text_size:
        raise InvalidFileError(f"{fields.path}: projection_dim is {projected}; the text model has {text_size} elements")
    patch = vision.count("patch_size", 16)
    side = vision.count("image_size", 224) // patch
    processor = over(processor.with_absent(**_PROCESSOR), {**said, "do_pan_and_scan": False})
    if (count := processor.count("image_seq_length", side * side)) != side * side:
        raise InvalidFileError(f"{processor.path}: image_seq_length is {count}; an image has {side} x {side} patches")
    return config_of_tiles(
        processor,
        stretch_rule(processor),
        whole=True,
        prefix=_longest(fields, text, side * side),
        **hf_values(vision.with_defaults(**SMALL)),
        patch=patch,
        side=side,
        cell=1,
        text_size=text_size,
    )


def _longest(fields: Fields, text: Fields, embeddings: int) -> int:
    """The maximum length of a prefix: Gemma 2's sliding window, because sources differ on what its layers see beyond.

    In transformers the tokens of a prefix see all others, in the original code only those within the window.
    """
    kind = text.choice("model_type", "gemma", *_LONGEST)
    key = "sliding_window" if kind == "gemma2" else "max_position_embeddings"
    longest = text.count(key, _LONGEST[kind])
    if longest <= embeddings:
        raise UnsupportedModelError(
            f"{fields.path}: an image has {embeddings} embeddings, and {key} is {longest}: longer prompts are not "
            "implemented; to use the model without images, set max_images=0"
        )
    return longest


# ---- model -----------------------------------------------------------------------------------------------------------


class PaligemmaTower(Siglip):
    """The vision encoder: patches of tiles to embeddings; see `Tower`."""

    def connect(self, placement: Placement) -> None:
        """See `Siglip`."""
        self.projector = Linear(self.config.cell_size, self.config.text_size, placement, bias=True)


# ---- weight names ----------------------------------------------------------------------------------------------------

WEIGHTS = (
    *names("vision_tower.vision_model", "vision_tower"),  # published names, and those of transformers 5
    *pair("projector:", "multi_modal_projector.linear"),
)


# ---- prompts ---------------------------------------------------------------------------------------------------------

_MARK = "<image>"
_MOST_BREAKS = 31  # line breaks in a token of Gemma's tokenizer


def arranging(encode: Callable[[str], Sequence[int]]) -> Callable[[list[int]], list[int]]:
    """Make a function that arranges prompts as `PaliGemmaProcessor` does.

    `<bos>` stands after the last image, and not at the beginning, where Gemma's tokenizer writes it; a line break ends
    the prompt. What a prompt has already is not added again.
    """
    (mark,), bos, end = encode(_MARK), list(encode("<bos>")), list(encode("\n"))
    ends = {ids[0] for count in range(1, _MOST_BREAKS + 1) if len(ids := encode("\n" * count)) == 1}

    def arrange(ids: list[int]) -> list[int]:
        last = len(ids) - ids[::-1].index(mark)
        images, text = ids[:last], ids[last:]
        images = images[len(bos) :] if images[: len(bos)] == bos else images
        text = text if text[: len(bos)] == bos else bos + text
        return images + text + ([] if text[-1] in ends else end)

    return arrange


FAMILY = TowerFamily(
    name="paligemma_tower",
    hf={"PaliGemmaForConditionalGeneration": "paligemma"},
    seen=("siglip_vision_model", None),
    settings=(),
    config_from_hf=config_from_hf,
    prepared=prepared,
    build=PaligemmaTower,
    weights=WEIGHTS,
    mark=_MARK,
    template=contents_template(_MARK),
    words_around=mark_of_cells(_MARK),
    arranging=arranging,
)
