# SPDX-License-Identifier: MIT
"""Image input of Gemma 4's unified models, which have no vision encoder: pixels are normalised and projected.

y = projector(norm(norm_3(norm_2(dense(norm_1(pixels))) + column + row))), where norm_1 to norm_3 are LayerNorms.
Source: Gemma Team, 2026, "Gemma 4 model card". A patch becomes one embedding. Shapes: N positions of an axis, E hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.layer_norm import LayerNorm
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.norm import RMSNorm
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.views import computed
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.models.gemma4_tower import MARK, pixels_last, stacked, words_around
from candle_vllm.core.models.gemma4_tower_config import MOST_POSITIONS
from candle_vllm.core.models.gemma4_tower_parts import Positions
from candle_vllm.core.models.tower_family import Placed, TowerConfig, TowerFamily, TowerStep
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import NOTHING, budget_rule, over

# ---- config ----------------------------------------------------------------------------------------------------------

_EPS = 1e-5  # epsilon of the LayerNorms


def config_from_hf(fields: Fields, processor: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> TowerConfig:
    """Read `config.json` and `preprocessor_config.json` of gemma4_unified."""
    vision, text = fields.section("vision_config"), fields.section("text_config")
    return _config(
        over(processor, said),
        vision.count("patch_size", 16, most=256),
        vision.count("pooling_kernel_size", 3, most=64),
        hidden_size=vision.count("mm_embed_dim", 3840),
        norm_eps=vision.get("rms_norm_eps", float, 1e-6),
        learned=vision.count("mm_posemb_size", 1120, most=MOST_POSITIONS),
        text_size=text_size,
        whole=text.values.get("use_bidirectional_attention", "vision") == "vision",  # null is causal
        blank=text.get("pad_token_id", int, 0),
    )


def config_from_gguf(fields: Fields, text_size: int, said: Mapping[str, Any] = NOTHING) -> TowerConfig:
    """Read the metadata of llama.cpp's `mmproj` files of these models; keys begin with `clip.vision.`."""
    return _config(
        over(Fields({}, fields.path), said),
        fields.count("patch_size", most=256),
        fields.count("projector.scale_factor", 3, most=64),
        hidden_size=fields.count("embedding_length"),
        norm_eps=fields.get("attention.layer_norm_epsilon", float, 1e-6),
        learned=1120,
        text_size=text_size,
        whole=True,
        blank=0,
    )


def _config(processor: Fields, patch: int, cell: int, **own: Any) -> TowerConfig:
    rule = budget_rule(processor, patch, cell)
    own |= {"intermediate_size": 0, "num_layers": 0, "num_heads": 1, "patch": patch * cell, "cell": 1}
    return TowerConfig(
        **own, activation="gelu", side=rule.longest // rule.cell, most_patches=rule.most_cells, rule=rule
    )


# ---- model -----------------------------------------------------------------------------------------------------------


class Gemma4Unified:
    """The projection of an image's patches to embeddings; see `Tower`."""

    layers = mergers = ()

    def __init__(self, config: TowerConfig, placement: Placement) -> None:
        self.config, size = config, config.hidden_size
        self.pixel_norm = LayerNorm(config.patch_size, _EPS, placement)
        self.dense = Linear(config.patch_size, size, placement, bias=True)
        self.dense_norm, self.norm = (LayerNorm(size, _EPS, placement) for _ in range(2))
        self.positions = Positions(config, placement)
        self.cell_norm = RMSNorm(size, config.norm_eps, placement, weighted=False)
        self.projector = Linear(size, config.text_size, placement)

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """See `Tower`."""
        del grid
        return Placed(np.arange(first, first + len(places)), self.positions(places))

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """See `Tower`."""
        return step.start + self.dense_norm(self.dense(self.pixel_norm(patches)))

    def cells(self, hidden: Any) -> Any:
        """See `Tower`."""
        return self.config.cells(hidden)

    def project(self, cells: Value) -> Value:
        """See `Tower`."""
        return self.projector(self.cell_norm(cells))


# ---- weight names ----------------------------------------------------------------------------------------------------


def _columns(stored: StoredTensor, config: Any) -> StoredTensor:
    """Return embeddings of columns and rows [N, 2, E] as one table [2N, E], columns before rows."""
    if stored.shape != (config.learned, 2, config.hidden_size):
        return stored  # the loader reports the wrong shape
    shape = (2 * config.learned, config.hidden_size)
    return computed(stored, shape, lambda values: values.swapaxes(0, 1).reshape(shape))


_AT = "vision_embedder."
_NAMES = {
    "pixel_norm": ("patch_ln1", "v.patch_norm.1"),
    "dense": ("patch_dense", "v.patch_embd"),
    "dense_norm": ("patch_ln2", "v.patch_norm.2"),
    "norm": ("pos_norm", "v.patch_norm.3"),
}
_PROJECTION = "embedding_projection.weight"
WEIGHTS: Sequence[WeightName] = (
    *(
        WeightName(
            f"{target}:{kind}", f"{_AT}{hf}.{kind}", f"{gguf}.{kind}",
            hf_view=pixels_last if target == "pixel_norm" or (target, kind) == ("dense", "weight") else None,
        )
        for target, (hf, gguf) in _NAMES.items()
        for kind in ("weight", "bias")
    ),
    WeightName(
        "positions:weight", _AT + "pos_embedding", "v.position_embd.weight", hf_view=_columns, gguf_view=stacked
    ),
    WeightName(
        "projector:weight",
        ("embed_vision." + _PROJECTION, _AT + "multimodal_embedder." + _PROJECTION),
        "mm.input_projection.weight",
    ),
)  # fmt: skip


def prepared(tensors: Mapping[str, StoredTensor], config: TowerConfig) -> Mapping[str, StoredTensor]:
    """The tensors for images, without those for audio in GGUF files."""
    del config
    return {name: each for name, each in tensors.items() if not name.startswith(("a.", "mm.a."))}


FAMILY = TowerFamily(
    name="gemma4_unified_tower",
    hf={"Gemma4UnifiedForConditionalGeneration": "gemma4_unified"},
    seen=("gemma4_unified_vision",),
    gguf=("gemma4uv",),
    settings=("max_soft_tokens",),
    config_from_hf=config_from_hf,
    config_from_gguf=config_from_gguf,
    prepared=prepared,
    build=Gemma4Unified,
    weights=WEIGHTS,
    mark=MARK,
    words_around=words_around,
)
