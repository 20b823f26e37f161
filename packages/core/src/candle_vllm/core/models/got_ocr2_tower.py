# SPDX-License-Identifier: MIT
"""The vision encoder of GOT-OCR 2.0: SAM's (`sam.py`), with a matrix to embeddings of the text model, Qwen2.

The second convolution with a stride has the elements of an embedding. An image is one square tile; with
`crop_to_patches` it is stretched to a grid of tiles, by InternVL's rule, which a tile of the whole image follows.
Sources: Wei et al., 2024, arXiv:2409.01704; `GotOcr2ForConditionalGeneration` of transformers.
Shapes: T patches of a tile, E elements of an embedding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.weights import Seen, WeightName
from candle_vllm.core.models import sam
from candle_vllm.core.models.attention_names import pair
from candle_vllm.core.models.canvas_rules import RatioRule
from candle_vllm.core.models.cohere2_vision_tower import PROCESSOR
from candle_vllm.core.models.grid_positions import GridPositions, sharp
from candle_vllm.core.models.row_copies import RowNumbers, taken
from candle_vllm.core.models.sam import Halved, Neck, SamBlock
from candle_vllm.core.models.sam_config import SamConfig, sam_from_hf
from candle_vllm.core.models.sam_grid import Grid
from candle_vllm.core.models.siglip import MOST_PATCHES
from candle_vllm.core.models.tower_family import Placed, TowerConfig, TowerFamily, TowerStep
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import NOTHING, Cut, over, stretch_rule

# ---- config ----------------------------------------------------------------------------------------------------------

_CELL = 4
_TILES = {"min": 1, "max": 12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GotOcr2TowerConfig(SamConfig):
    """Config of this vision encoder."""

    def rows_behind(self, layer: int, count: int) -> int:
        """See `SamConfig`; after the convolutions there is a row for each patch."""
        return count if layer > 2 else super().rows_behind(layer, count)

    @property
    def cell_size(self) -> int:
        """See `TowerConfig`."""
        return self.channels[2]

    def cells(self, hidden: Any) -> Any:
        """See `TowerConfig`; the rows of a cell's patches are the same."""
        return hidden[:: self.cell**2]

    def step_bytes(self, threads: int) -> int:
        """See `TowerConfig`; adds the repeated rows."""
        return super().step_bytes(threads) + 4 * self.patches * self.cell_size


def config_from_hf(
    fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING
) -> GotOcr2TowerConfig:
    """Read `config.json` and `preprocessor_config.json`."""
    vision = fields.section("vision_config")
    sizes = [2 * vision.count("output_channels", 256, most=1 << 13), text_size]
    own = sam_from_hf(Fields({**vision.values, "downsample_channels": sizes}, fields.path))
    usual = {"size": {"height": 384, "width": 384}, **PROCESSOR, "crop_to_patches": False}
    images = over(processor.with_absent(**usual), said)
    shared, patch = stretch_rule(images), own["patch"]
    least, most = (images.count(f"{which}_patches", number, most=64) for which, number in _TILES.items())
    if least > most:
        raise InvalidFileError(f"{images.path}: min_patches is {least}, more than max_patches, {most}")
    if not images.get("crop_to_patches", bool):
        least = most = 1
    side, window = own["learned"], own["window"]
    rows = (-(-side // window) * window) ** 2  # with those of windows at the edges
    if shared.tile != side * patch or side % _CELL or not 0 < rows <= MOST_PATCHES:
        raise InvalidFileError(
            f"{images.path}: tiles of {shared.tile} pixels; the model has {side} x {side} patches of {patch} pixels, "
            f"{_CELL} x {_CELL} of which are one embedding; with those of windows at most {MOST_PATCHES} are supported"
        )
    if own["hidden_size"] % 16:
        raise UnsupportedModelError(f"{fields.path}: hidden_size is {own['hidden_size']}; implemented: multiples of 16")
    return GotOcr2TowerConfig(
        **own,
        num_layers=own["blocks"],
        tiles=(side,),
        side=side,
        cell=_CELL,
        most_patches=rows,
        text_size=text_size,
        rule=RatioRule(tile=shared.tile, least=least, most=most, **shared.pixels),
    )


# ---- model -----------------------------------------------------------------------------------------------------------


class GotOcr2Tower:
    """The vision encoder: patches of tiles to embeddings; see `Tower`."""

    mergers = ()

    def __init__(self, config: GotOcr2TowerConfig, placement: Placement) -> None:
        channels = config.channels
        self.config = config
        self.patches = Linear(config.patch_size, config.hidden_size, placement, bias=True)
        self.positions = GridPositions(config.learned, config.hidden_size, placement, sharp)
        self._grid, self._last = Grid(config), RowNumbers(config.patches)
        self.blocks = [SamBlock(config, layer, self._grid, placement) for layer in range(config.blocks)]
        self.neck = Neck(config, self._grid, placement)
        self.halves = [Halved(channels[at], channels[at + 1], self._grid.halves[at], placement) for at in range(2)]
        self.projector = Linear(config.text_size, config.text_size, placement, bias=True)
        parts = [part for block in self.blocks for part in (block.attention, block.mlp)]
        self.layers = [*parts, self.neck, *self.halves]

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`; the numbers are not used."""
        del first
        self._grid.fill(grid[0])
        self._last.fill(np.arange(grid[0] ** 2)[None] // _CELL**2)
        return Placed(np.zeros(len(places), np.int64), self.positions(places, grid))

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        assert step.start is not None
        return step.start + self.patches(patches)

    def norm(self, x: Value) -> Value:
        """See `Tower`; the row of each patch's cell, without a norm."""
        return taken(x, self._last)

    def cells(self, hidden: Any) -> Any:
        """See `Tower`."""
        return self.config.cells(hidden)

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        return self.projector(cells)


# ---- weight names ----------------------------------------------------------------------------------------------------


def _own(line: WeightName) -> WeightName:
    """A line of `sam.WEIGHTS` with this model's name of the tensor."""
    assert isinstance(line.hf, tuple)
    first = line.hf[0]
    name = first.name if isinstance(first, Seen) else first
    name = name.replace("vision_tower.sam_encoder.proj.conv", "multi_modal_projector.conv_upsampler")
    name = name.replace("sam_encoder.", "")
    return dataclasses.replace(line, hf=Seen(name, first.view) if isinstance(first, Seen) else name, gguf=())


WEIGHTS = (*map(_own, sam.WEIGHTS), *pair("projector:", "multi_modal_projector.multimodal_projector"))


def prepared(tensors: Mapping[str, StoredTensor], config: TowerConfig) -> Mapping[str, StoredTensor]:
    """Return the tensors as they are."""
    del config
    return tensors


# ---- prompts ---------------------------------------------------------------------------------------------------------

_MARK = "<imgpad>"
_SYSTEM = "You should follow the instructions carefully and explain your answers in detail."
_IMAGES = "message.content | selectattr('type', 'equalto', 'image') | list"
_TEXTS = "message.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\n')"
_TEMPLATE = (
    f"{{% if messages[0].role != 'system' %}}{{{{ '<|im_start|>system\n{_SYSTEM}<|im_end|>' }}}}{{% endif %}}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.content is string %}"
    f"{{{{ message.content }}}}{{% else %}}{{% if {_IMAGES} %}}{{{{ '<img>' + '{_MARK}' * ({_IMAGES} | length) + "
    f"'</img>\n' }}}}{{% endif %}}{{{{ {_TEXTS} }}}}{{% endif %}}<|im_end|>{{% endfor %}}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The conversation that transformers' processor writes: published files have no template. Several images are pages."""


def words_around(cut: Cut, grid: tuple[int, int]) -> str:
    """The placeholder of an image: a mark for each cell of each tile."""
    return _MARK * (cut.tiles * math.prod(grid))


FAMILY = TowerFamily(
    name="got_ocr2_tower",
    hf={"GotOcr2ForConditionalGeneration": "got_ocr2"},
    settings=("crop_to_patches", "min_patches", "max_patches"),
    config_from_hf=config_from_hf,
    prepared=prepared,
    build=GotOcr2Tower,
    weights=WEIGHTS,
    mark=_MARK,
    written=f"<img>{_MARK}</img>",
    template=_TEMPLATE,
    words_around=words_around,
)
