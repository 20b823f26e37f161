# SPDX-License-Identifier: MIT
"""What the loader and the engine need of a model family: how to read, build, fill and run its models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.activation import Activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.attention import StepInput
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.config import EncoderConfig, ModelConfig
from candle_vllm.core.loading.tensors import Checkpoint
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.pooled_head import Dense
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.vision.preprocessing import Cut, Rule, patch_places, patch_rows, window_order


class Decoder(Protocol):
    """What the engine needs of a model.

    Attributes:
        narrows: see `DecoderStack`.
    """

    narrows: bool

    @property
    def config(self) -> ModelConfig:
        """Its description."""
        ...

    def prepare(self, positions: int) -> None:
        """Makes the tables for positions below `positions`, at most the config's; the first step makes them else."""
        ...

    def forward(self, token_ids: Value, step: StepInput) -> Value:
        """Token ids [T] to hidden states [T, E]."""
        ...

    def logits(self, hidden: Value, out: Value | None = None) -> Value:
        """Hidden states [T, E] to scores [T, V] in fp32; into `out` where it is given."""
        ...


class DraftHead(Protocol):
    """What the engine needs of layers that draft a model's tokens from its hidden states.

    At position p they are given token p + 1 and hidden states of p, and say what token p + 2 is.

    Attributes:
        taps: the layers of the model whose inputs `fuse` is given, side by side; None for what its last norm gives.
        input_size: numbers of that.
    """

    taps: tuple[int, ...] | None
    input_size: int

    @property
    def config(self) -> ModelConfig:
        """Its description, as if it were a model of one layer."""
        ...

    def prepare(self, positions: int) -> None:
        """See `Decoder.prepare`."""
        ...

    def fuse(self, states: Value) -> Value:
        """The model's hidden states [T, input_size] as `forward` takes them, [T, E]."""
        ...

    def forward(self, token_ids: Value, hidden: Value, step: StepInput) -> tuple[Value, Value]:
        """Token ids [T] and hidden states [T, E] to the input of the logits, and the next draft's hidden states."""
        ...

    def logits(self, hidden: Value, out: Value | None = None) -> Value:
        """Hidden states [T, E] to the logits in fp32 of the draft vocabulary."""
        ...


class Encoder(Protocol):
    """What the engine needs of a model that reads texts whole."""

    @property
    def config(self) -> EncoderConfig:
        """Its description."""
        ...

    def forward(self, token_ids: Value, positions: Value, types: Value, lengths: Sequence[int]) -> Value:
        """Token ids [T] of texts behind each other to hidden states [T, E] in fp32; see `EncoderStack.forward`."""
        ...

    def scores(self, first: Value) -> Value:
        """Hidden states [R, E] of the texts' first tokens to scores [R, L], of a model with L labels."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """What is to be known of a tower.

    Attributes:
        patch: pixels of a patch's side.
        side: patches of the longest side that a tile may have.
        cell: of a cell's, which becomes one embedding.
        text_size: numbers of an embedding.
        rule: how images become tiles.
        pooled: a cell is the mean of its patches; else they stand side by side.
        most_patches: of a tile; 0 where it is `side` squared.
        window: cells of the side of a window.
        windowed: the layers in which patches see those of their window alone.
        gated: layers have a gate in the feed-forward part.
        learned: of the side of a table of positions that the host looks up; 0 without such a table.
        deep: layers whose results become embeddings too, which are added behind the first layers of the text model.
        whole: the embeddings of a tile see each other in the text model, those behind them too.
        blank: see `VisionDescription.blank`.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    norm_eps: float
    activation: Activation
    patch: int
    side: int
    cell: int
    text_size: int
    rule: Rule
    pooled: bool = False
    most_patches: int = 0
    window: int = 0
    windowed: frozenset[int] = frozenset()
    gated: bool = False
    learned: int = 0
    deep: tuple[int, ...] = ()
    whole: bool = False
    blank: int | None = None
    num_experts: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise InvalidFileError(f"vision_config: {self.num_heads} heads of {self.hidden_size} numbers")
        if not 0 < self.norm_eps < 1:
            raise InvalidFileError(f"vision_config says the epsilon of its norms is {self.norm_eps}")

    @property
    def patches(self) -> int:
        """The most of a tile."""
        return self.most_patches or self.side**2

    @property
    def windows(self) -> int:
        """Most windows of a tile; 1 for a tower without windows."""
        if not self.windowed:
            return 1
        cells, side = self.patches // self.cell**2, -(-self.side // self.cell)
        return min(cells, cells // self.window**2 + 2 * side // self.window + 2)

    def step_bytes(self, threads: int) -> int:
        """Memory that the largest tile takes while so many threads encode it, at most."""
        size, inner = self.hidden_size, self.intermediate_size * (3 if self.gated else 2)
        each = 2 * self.patch_size + 8 * size + inner + 32 * (threads + 16)  # rows are rounded up to lines
        keys = 16 * self.windows * 2 * size  # and values, of windows that are not full
        cells = 256 * 4 * (3 * self.cell_size + self.text_size)
        return 4 * (self.patches * each + keys + cells)

    @property
    def vectors(self) -> int:
        """Embeddings of a cell, which stand side by side: that of the last layer, and those of `deep`."""
        return 1 + len(self.deep)

    @property
    def patch_size(self) -> int:
        """Numbers of a patch."""
        return 3 * self.patch**2

    @property
    def cell_pixels(self) -> int:
        """Of a cell's side."""
        return self.cell * self.patch

    @property
    def cell_size(self) -> int:
        """Numbers of what `Tower.project` is given of a cell."""
        return self.hidden_size if self.pooled else self.hidden_size * self.cell**2

    def cells(self, hidden: Any) -> Any:
        """What `Tower.project` is given [C, cell_size] of the last norm's rows [T, E], an array or a tensor."""
        whole = hidden.reshape(-1, self.cell**2, self.hidden_size)
        return whole.mean(1) if self.pooled else whole.reshape(len(whole), -1)

    def read(self, tile: NDArray[np.uint8]) -> TileRows:
        """What a tower is given of a tile [h, w, 3]."""
        rows, columns = tile.shape[0] // self.cell_pixels, tile.shape[1] // self.cell_pixels
        each = self.cell**2
        places = patch_places(rows * self.cell, columns * self.cell, self.cell)
        if not self.windowed:
            return TileRows(tile, self, places, None, (len(places),))
        order, lengths = window_order(rows, columns, self.window)
        places = places.reshape(-1, each, 2)[order].reshape(-1, 2)
        return TileRows(tile, self, places, order, tuple((lengths * each).tolist()))


class TileRows(NamedTuple):
    """A tile as a tower reads it.

    Attributes:
        tile: the tile.
        config: of the tower.
        places: [T, 2] int64, row and column of each patch.
        order: [C] int64, which of the tile's cells each stands for; None where they are in their order.
        windows: patches of each window, which stand side by side.
    """

    tile: NDArray[np.uint8]
    config: TowerConfig
    places: NDArray[np.int64]
    order: NDArray[np.int64] | None
    windows: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of its patches."""
        return self.tile.shape[0] // self.config.patch, self.tile.shape[1] // self.config.patch

    def strips(self, most: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Patches [n, numbers of one] of rows of cells, and which ones they are, [n]: some `most` at a time."""
        config, each = self.config, self.config.cell**2
        columns = self.grid[1] // config.cell
        step = max(1, most // (columns * each))
        after = None if self.order is None else np.argsort(self.order)
        for row in range(0, self.grid[0] // config.cell, step):
            strip = self.tile[row * config.cell_pixels : (row + step) * config.cell_pixels]
            patches, _ = patch_rows(strip[None], config.patch, config.cell, config.rule.normalisation)
            cells = np.arange(row * columns, row * columns + len(patches) // each)
            cells = cells if after is None else after[cells]
            yield (each * cells[:, None] + np.arange(each)).reshape(-1), patches

    def patches(self) -> NDArray[np.float32]:
        """All of them, [T, numbers of one]."""
        made = np.empty((len(self.places), self.config.patch_size), np.float32)
        for rows, patches in self.strips(len(made)):
            made[rows] = patches
        return made

    def in_order(self, made: NDArray[np.float32]) -> NDArray[np.float32]:
        """The embeddings [C, vectors * text size] of the cells in the tile's own order, in new memory."""
        if self.order is None:
            return made.copy()
        found = np.empty_like(made)
        found[self.order] = made
        return found


class Placed(NamedTuple):
    """What a tower makes of the rows and columns of a tile's patches.

    Attributes:
        numbers: [n] int64, what stands for each.
        start: [n, E] float32, what x begins with; None where it begins with the patches alone.
    """

    numbers: NDArray[np.int64]
    start: NDArray[np.float32] | None = None


@dataclasses.dataclass(frozen=True)
class TowerStep:
    """What the layers of a tower see of a tile beside x.

    Attributes:
        places, start: `numbers` and `start` of `Placed`.
        lengths: patches of each tile; while a step is recorded it is not looked at.
        windows: the same of each window.
    """

    places: Value
    lengths: Sequence[int] = ()
    windows: Sequence[int] = ()
    start: Value | None = None


class Tower(Protocol):
    """What the engine needs of a model that reads images.

    Attributes:
        config: its description.
        layers: each takes x [T, E] and gives [T, E].
        norm: behind the last layer.
        mergers: embeddings [C, text size] of the cells of each of the config's `deep` layers.
    """

    @property
    def config(self) -> TowerConfig: ...

    @property
    def layers(self) -> Sequence[Callable[[Value, TowerStep], Value]]: ...

    @property
    def norm(self) -> Callable[[Value], Value]: ...

    @property
    def mergers(self) -> Sequence[Callable[[Value], Value]]: ...

    def place(self, places: NDArray[np.int64], first: int, grid: tuple[int, int]) -> Placed:
        """What it makes of the row and column [n, 2] of patches from `first` on; good for one tile at a time.

        `grid` are rows and columns of the tile's patches.
        """
        ...

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """x [T, E] of patches [T, numbers of one]."""
        ...

    def cells(self, hidden: Any) -> Any:
        """Cells [C, cell size] of what `norm` gives [T, E], an array or a tensor."""
        ...

    def project(self, cells: Value) -> Value:
        """Embeddings [C, text size] of cells [C, cell size]."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerFamily:
    """All that a family of models that see is: one file in this folder has it as `FAMILY`.

    How pixels are prepared, and how many tiles and embeddings an image has, is the rule of the `TowerConfig`.

    Attributes:
        name: of its file.
        hf: `architectures` of the whole models' config.json, and the model_type.
        seen: model_type of their `vision_config` that are served; empty where the architecture says it all.
        gguf: `clip.projector_type` of GGUF files.
        settings: keys of preprocessor_config.json that an operator may say otherwise.
        config_from_hf: reads a tower's description from that, preprocessor_config.json, the text model's width, and
            what the operator says.
        config_from_gguf: from the metadata of such a file, the text model's width, and that.
        prepared: the tensors of such a file, by their right names.
        build, weights: as for `Family`.
        mark: the token that stands for each of an image's embeddings.
        asks: the token that a template writes for an image; empty where it is `mark`.
        written: all that a template writes for one; empty where it is `asks`.
        words_around: an image's placeholder in a prompt, by how it is cut, and rows and columns of a tile's cells.
        turned: the text model turns embeddings by their time, row and column; see `engine/batch.py`.
    """

    name: str
    hf: Mapping[str, str]
    seen: tuple[str, ...] = ()
    gguf: tuple[str, ...] = ()
    settings: tuple[str, ...]
    config_from_hf: Callable[[Fields, Fields, int, Mapping[str, Any]], TowerConfig]
    config_from_gguf: Callable[[Fields, int, Mapping[str, Any]], TowerConfig]
    prepared: Callable[[Mapping[str, StoredTensor], TowerConfig], Mapping[str, StoredTensor]]
    build: Callable[[Any, Placement], Tower]
    weights: Sequence[WeightName]
    mark: str
    asks: str = ""
    written: str = ""
    words_around: Callable[[Cut, tuple[int, int]], str]
    turned: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How to read, build and fill the models of one file in this folder.

    Attributes:
        hf: `architectures` of config.json, and the model_type by whose rules each one's config is read.
        gguf: `general.architecture` of GGUF files.
        config_from_hf, config_from_gguf: read a model's description, strictly. `config` parameters below are what they
            return: `ModelConfig`, or what the family derives from it.
        build: the model without its weights.
        weights: its table of names.
        ignored: patterns of stored names that carry nothing.
        prepared: the tensors of a checkpoint under the names of the table; None where they are stored under these.
        completed: the description with what `config.json` leaves to the tensors; None where it says all.
    """

    hf: Mapping[str, str]
    gguf: tuple[str, ...] = ()
    config_from_hf: Callable[[Fields, str], ModelConfig]
    config_from_gguf: Callable[[Fields, Checkpoint], ModelConfig] | None = None
    build: Callable[[Any, Placement, Checkpoint], Decoder]
    weights: Sequence[WeightName]
    ignored: Callable[[Any], Sequence[str]]
    prepared: Callable[[Checkpoint], Checkpoint] | None = None
    completed: Callable[[Any, Mapping[str, StoredTensor]], ModelConfig] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """How to read, build and fill the encoders of one file in this folder.

    Attributes:
        hf: `architectures` of config.json: the model_type, and whether the model has a head for scores.
        gguf, config_from_hf, config_from_gguf, build, weights, ignored: as for `Family`.
        behind: the layers of a head that stands behind the pooling; None where no class has one.
        in_torch: why its layers run op by op in torch; None where they are compiled on a CPU.
    """

    hf: Mapping[str, tuple[str, bool]]
    gguf: tuple[str, ...] = ()
    config_from_hf: Callable[..., EncoderConfig]
    config_from_gguf: Callable[[Fields, Checkpoint], EncoderConfig] | None = None
    build: Callable[[Any, Placement], Encoder]
    weights: Callable[[Any, Iterable[str]], Sequence[WeightName]]
    ignored: Callable[[Any], Sequence[str]]
    behind: Callable[[Any, Checkpoint], tuple[Dense, ...]] | None = None
    in_torch: str | None = None
