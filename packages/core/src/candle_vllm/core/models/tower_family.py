# SPDX-License-Identifier: MIT
"""Protocols and tables of a vision encoder's family: how the loader and the engine read, build, fill and run it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from candle_vllm.core.errors import InvalidFileError, PromptTooLongError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.activation import Activation
from candle_vllm.core.kernels.recorded import Value
from candle_vllm.core.layers.parameters import Placement
from candle_vllm.core.loading.weights import WeightName
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.text.chat_template import ChatTemplate
from candle_vllm.core.text.tokenizer import Tokenizer
from candle_vllm.core.vision.inputs import ImageInput
from candle_vllm.core.vision.preprocessing import Cut, Rule, patch_places, patch_rows, window_order
from candle_vllm.core.vision.prompts import VisionDescription


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Config of a vision encoder. A patch is a square of pixels; a cell is a square of patches, for one embedding.

    Attributes:
        patch: side of a patch in pixels.
        side: longest possible side of a tile in patches.
        cell: side of a cell in patches.
        text_size: elements of an embedding, which is the hidden size of the text model.
        rule: how images become tiles.
        pooled: the input of a cell's projection is the mean of its patches; otherwise its patches side by side.
        most_patches: maximum number of patches of a tile; 0 for `side` squared.
        window: side of an attention window in cells; 0 without windows.
        windowed: layers whose patches attend only to patches of the same window.
        gated: the feed-forward layers have a gate.
        learned: side of a table of learned positions that the host looks up; 0 without such a table.
        deep: layers whose outputs are also projected, and added after the first layers of the text model (DeepStack).
        whole: in the text model the embeddings of a tile attend to each other in both directions.
        prefix: see `VisionDescription.prefix`.
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
    prefix: int = 0
    blank: int | None = None
    num_experts: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise InvalidFileError(
                f"vision encoder: {self.num_heads} heads cannot share hidden_size {self.hidden_size}"
            )
        if not 0 < self.norm_eps < 1:
            raise InvalidFileError(f"vision encoder: the epsilon of its norms is {self.norm_eps}, not between 0 and 1")

    @property
    def patches(self) -> int:
        """Maximum number of patches of a tile."""
        return self.most_patches or self.side**2

    @property
    def most_whole(self) -> int:
        """Tokens for which a step must have room: those of a tile, and with a prefix also some of its text."""
        tile = self.patches // self.cell**2
        return min(self.prefix, tile + min(tile // 4, 128)) if self.prefix else tile

    @property
    def windows(self) -> int:
        """Maximum number of windows of a tile; 1 for an encoder without windows."""
        if not self.windowed:
            return 1
        cells, side = self.patches // self.cell**2, -(-self.side // self.cell)
        return min(cells, cells // self.window**2 + 2 * side // self.window + 2)

    def step_bytes(self, threads: int) -> int:
        """Upper bound of the memory that the largest tile needs while `threads` threads encode it, in bytes."""
        size, inner = self.hidden_size, self.intermediate_size * (3 if self.gated else 2)
        each = 2 * self.patch_size + 8 * size + inner + 32 * (threads + 16)  # rows are rounded up to cache lines
        keys = 16 * self.windows * 2 * size  # keys and values of windows that are not full
        cells = 256 * 4 * (3 * self.cell_size + self.text_size)
        return 4 * (self.patches * each + keys + cells)

    @property
    def vectors(self) -> int:
        """Number of embeddings of a cell, which are side by side: one of the last layer, and one for each of `deep`."""
        return 1 + len(self.deep)

    @property
    def patch_size(self) -> int:
        """Elements of a patch: RGB values of its pixels."""
        return 3 * self.patch**2

    @property
    def cell_pixels(self) -> int:
        """Side of a cell in pixels."""
        return self.cell * self.patch

    @property
    def cell_size(self) -> int:
        """Elements of a cell, the input of `Tower.project`."""
        return self.hidden_size if self.pooled else self.hidden_size * self.cell_rows

    @property
    def cell_rows(self) -> int:
        """Rows of a cell in the output of the last layer."""
        return self.cell**2

    def patches_of_row(self, layer: int) -> int:
        """Number of patches that a row stands for in layer `layer` of the encoder, and in its output."""
        del layer
        return 1

    def cells(self, hidden: Any) -> Any:
        """The cells [C, cell_size] for `Tower.project` from the last norm's rows [T, E], an array or a tensor."""
        whole = hidden.reshape(-1, self.cell_rows, self.hidden_size)
        return whole.mean(1) if self.pooled else whole.reshape(len(whole), -1)

    def count(self, tile: NDArray[np.uint8]) -> int:
        """Number of cells of a tile [h, w, 3]."""
        return math.prod(tile.shape[:2]) // self.cell_pixels**2

    def read(self, tile: NDArray[np.uint8]) -> TileRows:
        """Prepare a tile [h, w, 3] for the encoder."""
        rows, columns = tile.shape[0] // self.cell_pixels, tile.shape[1] // self.cell_pixels
        each = self.cell**2
        places = patch_places(rows * self.cell, columns * self.cell, self.cell)
        if not self.windowed:
            return TileRows(tile, self, places, None, (len(places),))
        order, lengths = window_order(rows, columns, self.window)
        places = places.reshape(-1, each, 2)[order].reshape(-1, 2)
        return TileRows(tile, self, places, order, tuple((lengths * each).tolist()))


class TileRows(NamedTuple):
    """A tile in the order in which the encoder reads its patches.

    Attributes:
        tile: the tile's pixels.
        config: config of the encoder.
        places: [T, 2] int64, row and column of each patch.
        order: [C] int64, index in the tile of each cell that the encoder reads; None for the tile's own order.
        windows: number of patches of each window; the patches of a window follow each other.
    """

    tile: NDArray[np.uint8]
    config: TowerConfig
    places: NDArray[np.int64]
    order: NDArray[np.int64] | None
    windows: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, int]:
        """The tile's number of rows and of columns of patches."""
        return self.tile.shape[0] // self.config.patch, self.tile.shape[1] // self.config.patch

    def lengths(self, layer: int, *, windowed: bool) -> tuple[int, ...]:
        """Number of rows of each text of a layer's attention; their sum is the number of rows that the layer reads."""
        each = self.config.patches_of_row(layer)
        return tuple(count // each for count in self.windows) if windowed else (len(self.places) // each,)

    def strips(self, most: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Yield indices [n] and elements [n, patch_size] of patches by rows of cells, about `most` patches at once."""
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
        """All patches, [T, patch_size]."""
        made = np.empty((len(self.places), self.config.patch_size), np.float32)
        for rows, patches in self.strips(len(made)):
            made[rows] = patches
        return made

    def in_order(self, made: NDArray[np.float32]) -> NDArray[np.float32]:
        """Copy embeddings [C, vectors * text size] from the encoder's order of cells to the tile's own order."""
        if self.order is None:
            return made.copy()
        found = np.empty_like(made)
        found[self.order] = made
        return found


class Placed(NamedTuple):
    """Positions of patches, as the encoder needs them.

    Attributes:
        numbers: [n] int64, row of each patch in the encoder's tables of positions or of RoPE.
        start: [n, E] float32, added to the embedded patches; None if there is no such addition.
    """

    numbers: NDArray[np.int64]
    start: NDArray[np.float32] | None = None


@dataclasses.dataclass(frozen=True)
class TowerStep:
    """Inputs of the encoder's layers besides x.

    Attributes:
        places, start: `numbers` and `start` of `Placed`.
        lengths: number of patches of each tile; not used while a step is recorded.
        windows: number of patches of each window; not used while a step is recorded.
    """

    places: Value
    lengths: Sequence[int] = ()
    windows: Sequence[int] = ()
    start: Value | None = None


class Tower(Protocol):
    """The interface of a vision encoder for the engine.

    Attributes:
        config: config of the encoder.
        layers: each maps x [T, E] to [T, E].
        norm: norm after the last layer.
        mergers: for each layer in the config's `deep`, the projection of its cells to embeddings [C, text size].
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
        """Return the positions of patches, given their rows and columns [n, 2]; the first patch has index `first`.

        `grid` is the tile's number of rows and of columns of patches. The call may write rows of the encoder's tables
        from `first` on, which the next tile overwrites.
        """

    def begin(self, patches: Value, step: TowerStep) -> Value:
        """Embed patches [T, patch_size]: x [T, E]."""

    def cells(self, hidden: Any) -> Any:
        """Cells [C, cell size] from the output of `norm` [T, E], an array or a tensor."""

    def project(self, cells: Value) -> Value:
        """Embeddings [C, text size] of cells [C, cell size]."""


Joining: TypeAlias = Generator[None, None, NDArray[np.float32]]


@runtime_checkable
class JoiningTower(Tower, Protocol):
    """A vision encoder that joins the embeddings of a grid of tiles to rows of the whole image."""

    def join(self, made: NDArray[np.float32], whole: tuple[int, int]) -> Joining:
        """Embeddings of an image of this height and width, from those of all its tiles [C, text size].

        Yields between rows, so that steps can run.
        """


def joined(tower: Tower, made: NDArray[np.float32], whole: tuple[int, int]) -> Joining:
    """The embeddings of an image; see `JoiningTower`."""
    return (yield from tower.join(made, whole)) if isinstance(tower, JoiningTower) else made


Turned: TypeAlias = Callable[[Cut, tuple[int, int]], tuple[int, int, NDArray[np.int64]]]
"""Rotary positions of an image's tokens, from its `Cut` and a tile's rows and columns of cells.

Returns how many tokens after the image's first embedding they begin, and positions [n, 4] of n tokens: time, height,
width, and the number of the image. So many first of the four, which is also returned, count from the rotary position of
the first of these tokens.
"""


def turned_by_grid(cut: Cut, grid: tuple[int, int]) -> tuple[int, int, NDArray[np.int64]]:
    """See `Turned`: embeddings have one time, and their row and column. Source: Wang et al., 2024, arXiv:2409.12191."""
    del cut
    row, column = np.indices(grid).reshape(2, -1)
    return 0, 3, np.stack([0 * row, row, column, 0 * row], 1)


def contents_template(image: str) -> str:
    """Return the chat template of a model without roles: the contents of all messages, with `image` for an image."""
    part = "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}"
    parts = "{% for part in message.content %}" + part + "{% endfor %}"
    content = "{% if message.content is string %}{{ message.content }}{% else %}" + parts + "{% endif %}"
    return "{{ bos_token | default('') }}{% for message in messages %}" + content + "{% endfor %}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerFamily:
    """How to read, build and fill vision encoders: each file of such a family in this folder has one as `FAMILY`.

    The rule in the `TowerConfig` sets how pixels are prepared, and how many tiles and embeddings an image has.

    Attributes:
        name: name of the family's module, such as "siglip".
        hf: `architectures` in config.json of the multimodal models, with their model_type.
        seen: supported values of model_type in `vision_config`, None if it may be absent; empty if the architecture is
            enough.
        gguf: `clip.projector_type` of GGUF files.
        settings: keys of preprocessor_config.json that an operator may override.
        images: settings of images for folders without a file of them; None if such folders are refused.
        config_from_hf: reads a config from config.json, preprocessor_config.json, the text model's hidden size, and the
            operator's values.
        config_from_gguf: the same from a GGUF file's metadata, the text model's hidden size, and the operator's values;
            None if `gguf` is empty.
        completed: adds to the config what only a GGUF file's tensors show; None if the metadata is complete.
        prepared: renames and reshapes a file's tensors to the names and shapes in `weights`.
        build, weights: as for `Family`.
        mark: the token that is repeated for each of an image's embeddings.
        asks: the token that a chat template writes for an image, see `known_to`; empty if it is `mark`.
        written: the whole text that a chat template writes for an image; empty if it is `asks`.
        template: the chat template for models that are published without a template; empty to leave them so.
        preface: Jinja that comes before the model's own chat template, such as one that takes texts alone.
        spelled: a text that templates write instead of the token `asks`; empty if they write `asks`.
        stand_in: token that takes the place of `mark` if the tokenizer lacks that; empty if such a model is refused.
        words_around: makes an image's placeholder in a prompt from its `Cut`, and a tile's rows and columns of cells.
        arranging: makes `VisionInput.arrange` from a function that encodes texts with special tokens.
        turned: the text model has M-RoPE, see `Turned`; None without it.
        trailing: tokens that are rotated as the first one of `turned` where they follow an image.
    """

    name: str
    hf: Mapping[str, str]
    seen: tuple[str | None, ...] = ()
    gguf: tuple[str, ...] = ()
    settings: tuple[str, ...]
    images: Mapping[str, Any] | None = None
    config_from_hf: Callable[[Fields, Fields, int, Mapping[str, Any]], TowerConfig]
    config_from_gguf: Callable[[Fields, int, Mapping[str, Any]], TowerConfig] | None = None
    completed: Callable[[Any, Mapping[str, StoredTensor]], TowerConfig] | None = None
    prepared: Callable[[Mapping[str, StoredTensor], TowerConfig], Mapping[str, StoredTensor]]
    build: Callable[[Any, Placement], Tower]
    weights: Sequence[WeightName]
    mark: str
    asks: str = ""
    written: str = ""
    spelled: str = ""
    template: str = ""
    preface: str = ""
    stand_in: str = ""
    words_around: Callable[[Cut, tuple[int, int]], str]
    arranging: Callable[[Callable[[str], Sequence[int]]], Callable[[list[int]], list[int]]] = lambda _: list
    turned: Turned | None = None
    trailing: Sequence[str] = ()

    def with_mark(self, template: ChatTemplate | None, tokenizer: Tokenizer) -> ChatTemplate | None:
        """Return a chat template with `asks` in place of `spelled`, or `template` for a model without one."""
        if template is None:
            return ChatTemplate(self.template, tokenizer.special_tokens) if self.template else None
        if self.preface:
            texts = template.source
            made = texts if isinstance(texts, str) else {name: self.preface + text for name, text in texts.items()}
            return ChatTemplate(self.preface + made if isinstance(made, str) else made, tokenizer.special_tokens)
        known = self.known_to(tokenizer.encode)
        return template.replaced(known.spelled, known.asks or known.mark) if known.spelled else template

    def known_to(self, encode: Callable[..., Sequence[int]]) -> TowerFamily:
        """Return the family with other marks for a tokenizer whose vocabulary lacks some.

        `stand_in` takes the place of `mark`. An `asks` that is no token is `spelled`, and `mark` takes its place.

        Args:
            encode: the method of the tokenizer.
        """

        def lacks(token: str) -> bool:
            return len(encode(token, add_special_tokens=False, parse_special=True)) != 1

        def around(cut: Cut, grid: tuple[int, int]) -> str:
            return self.words_around(cut, grid).replace(self.mark, self.stand_in)

        if self.asks and lacks(self.asks):
            return dataclasses.replace(self, asks="", spelled=self.asks)
        if self.stand_in and lacks(self.mark):
            return dataclasses.replace(self, mark=self.stand_in, words_around=around)
        return self


def spans_of(
    parts: VisionDescription, image: ImageInput, places: NDArray[np.int64], count: int, most: int
) -> list[tuple[int, int]]:
    """Return `PlacedImage.spans` of an image with embeddings at these `places` of a prompt of `count` tokens.

    Raises:
        PromptTooLongError: a prefix of more tokens than `most`, those of a step, or than `VisionDescription.prefix`.
    """
    if not parts.prefix:
        parted = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if parts.whole else []
        return [(int(part[0]), int(part[-1]) + 1) for part in parted]
    if (end := min(image.prefix or count, count)) > (most := min(most, parts.prefix)):
        way = "shorten it" if most == parts.prefix else "shorten it, or set a larger max_num_batched_tokens"
        said = f"the prompt has {end} tokens; with an image all of them attend to each other, so at most {most} may"
        raise PromptTooLongError(f"{said}: {way}", "prompt")
    return [(0, end)]


def mark_of_cells(mark: str) -> Callable[[Cut, tuple[int, int]], str]:
    """`TowerFamily.words_around` of an image of one tile whose surrounding text is written by chat templates."""
    return lambda _, grid: mark * math.prod(grid)
