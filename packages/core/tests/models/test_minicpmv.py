# SPDX-License-Identifier: MIT
"""MiniCPM-V 4.6 and MiniCPM-OCR of random weights: tiles, placeholders, embeddings and logits against transformers,
files, and answers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMV4_6Processor
from transformers.vision_utils import get_vision_nearest_position_ids

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.engine.build import preparation_for
from candle_vllm.core.engine.runners.images import tiles_of
from candle_vllm.core.engine.runners.recorded_tower import RecordedTower
from candle_vllm.core.engine.step.batch import rotary_positions
from candle_vllm.core.engine.step.live import LiveSequence
from candle_vllm.core.engine.step.sequence import Run
from candle_vllm.core.errors import ConfigError, InvalidFileError, InvalidParameterError, UnsupportedModelError
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.models.minicpmv_tower import FAMILY, MiniCPMVTower
from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.remote import RemoteEngine
from candle_vllm.core.vision.pictures import picture_of
from packages.core.tests.models.families import EVEN_HEADS, QWEN35
from packages.core.tests.models.sight import (
    GPU_STEPS,
    answers,
    answers_alone,
    answers_of,
    answers_without_torch,
    finished,
    loaded_from,
    model_of,
    random_model,
    random_pictures,
    request_of,
    require_logits,
    require_same_embeddings,
    require_same_from_gguf,
    require_same_in_steps,
    require_same_on_a_gpu,
    without_torchvision,
    write_tokenizer,
    write_tower,
)
from packages.core.tests.models.tiny import SMALL
from tests.common_run import combined, few

MARKS = ("<image>", "</image>", "<|image_pad|>", "<slice>")
MORE = ("</slice>", "<image_id>", "</image_id>")
START, END, PAD, SLICE, SLICED, NUMBER, NUMBERED = range(260, 267)
CANVAS = ("image_start_id", "image_end_id", "slice_start_id", "slice_end_id", "newline_id")
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<|image_pad|>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
ASK = "<|im_start|>user\n<|image_pad|>Compare this with <|image_pad|>, please.<|im_end|>\n<|im_start|>assistant\n"
SIZES = ((45, 38), (17, 22), (90, 12), (5, 5), (30, 70))
PICTURES = random_pictures(*SIZES)
"""A grid of two tiles, small, a grid of three, enlarged, a grid of two."""
(BIG,) = random_pictures((64, 64))  # a grid of two rows of two tiles
PROMPTS: list[Any] = [
    {"prompt": ASK, "multi_modal_data": {"image": PICTURES[:2]}},
    {"prompt": ASK, "multi_modal_data": {"image": [PICTURES[4], PICTURES[4]]}},
    {"prompt": "<|image_pad|>What is this?", "multi_modal_data": {"image": [PICTURES[3]]}},
    "<|im_start|>user\nCompare nothing.<|im_end|>\n",
]
TEXT: dict[str, Any] = {
    **SMALL, **QWEN35, **EVEN_HEADS, "model_type": "qwen3_5_text", "vocab_size": 272, "num_hidden_layers": 3,
    "head_dim": 64, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "tie_word_embeddings": False,
}  # fmt: skip
TEXT["rope_parameters"] = TEXT["rope_parameters"] | {"mrope_section": [3, 3, 2]}
VISION = {
    "model_type": "minicpmv4_6_vision", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "patch_size": 4, "image_size": 28, "num_channels": 3,
}  # fmt: skip
IMAGES = {
    "scale_resolution": 32, "patch_size": 4, "max_slice_nums": 4, "slice_mode": True, "downsample_mode": "16x",
    "use_image_id": True, "image_mean": [0.5, 0.4, 0.6], "image_std": [0.5, 0.6, 0.4],
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "first": ("minicpmv4_6", {"insert_layer_id": 0}, {}),
    "middle": ("minicpmv4_6", {"insert_layer_id": 1}, {"hidden_act": "gelu", "layer_norm_eps": 1e-5}),
    "last": ("minicpmv4_6", {"insert_layer_id": 2}, {}),
    "4x": ("minicpmv4_6", {"insert_layer_id": 1, "downsample_mode": "4x"}, {}),
    "canvas": ("minicpmv4_7", {"insert_layer_id": 1}, {"model_type": "minicpmv4_7_vision"}),
    "canvas 4x": ("minicpmv4_7", {"insert_layer_id": 1, "downsample_mode": "4x"}, {"model_type": "minicpmv4_7_vision"}),
    "ocr": ("minicpm_ocr", {"insert_layer_id": 1}, {"model_type": "minicpm_ocr_vision"}),
}
"""The merger after the first, the second and the last block, and without it; 4.7, whose images lie on a canvas."""


# ---- transformers ----------------------------------------------------------------------------------------------------


def their_pixels(pictures: list[NDArray[np.uint8]], said: dict[str, Any]) -> Any:
    made = MiniCPMV4_6ImageProcessorPil(**said)(images=[Image.fromarray(each) for each in pictures])
    kept = {key: torch.as_tensor(np.asarray(made[key])) for key in ("pixel_values", "target_sizes")}
    return made, kept


def their_sizes(picture: NDArray[np.uint8], said: dict[str, Any]) -> list[list[int]]:
    """Rows and columns of patches of a picture's tiles."""
    return their_pixels([picture], said)[1]["target_sizes"].tolist()


def their_words(made: Any, count: int, mode: str) -> list[str]:
    """The text of each image in one prompt."""
    words: Any = object.__new__(MiniCPMV4_6Processor)
    words.slice_mode, words.image_token = True, "<|image_pad|>"
    words.image_start_token, words.image_end_token = "<image>", "</image>"
    words.slice_start_token, words.slice_end_token = "<slice>", "</slice>"
    words.image_id_start_token, words.image_id_end_token = "<image_id>", "</image_id>"
    divisor = {"16x": 16, "4x": 4}[mode]
    each = [words.replace_image_token(made, number, image_token_divisor=divisor) for number in range(count)]
    return words._prepend_local_ids(["<|image_pad|>" * count], each, "<|image_pad|>")


def write(folder: Path, kind: str, **sizes: Any) -> Path:
    model_type, own, vision = KINDS[kind]
    write_tokenizer(folder, MARKS, TEMPLATE)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(list(MORE))
    tokenizer.save(str(folder / "tokenizer.json"))
    if "canvas" in kind:
        own = own | dict(zip(CANVAS, (START, END, SLICE, SLICED, *tokenizer.encode("\n").ids), strict=True))
    config = AutoConfig.for_model(
        model_type,
        text_config=TEXT,
        vision_config=VISION | vision | sizes,
        image_token_id=PAD,
        tie_word_embeddings=False,
        **own,
    )
    model = random_model(config)
    with torch.no_grad():  # embeddings of pictures as long as those of words
        model.model.merger.mlp[0].linear_2.weight.mul_(6)
    model.save_pretrained(folder)
    images = IMAGES | {"downsample_mode": mode_of(kind)}
    if kind == "4x":
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": images}))
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder


def mode_of(kind: str) -> str:
    return "4x" if kind in ("4x", "canvas 4x", "ocr") else "16x"


def said_of(folder: Path) -> dict[str, Any]:
    single = folder / "preprocessor_config.json"
    return read_json(single) if single.exists() else read_json(folder / "processor_config.json")["image_processor"]


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("minicpmv"), request.param)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return model_of(folder)


# ---- tiles and placeholders ------------------------------------------------------------------------------------------

PUBLISHED: dict[str, Any] = {
    "architectures": ["MiniCPMV4_6ForConditionalGeneration"], "model_type": "minicpmv4_6", "image_token_id": 248056,
    "insert_layer_id": 6, "downsample_mode": "16x", "merge_kernel_size": [2, 2], "merger_times": 1,
    "drop_vision_last_layer": False, "image_size": 448, "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_5_text", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 3584, "vocab_size": 248320,
        "max_position_embeddings": 262144, "rms_norm_eps": 1e-06, "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_num_key_heads": 16, "linear_num_value_heads": 16, "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25, "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
        },
    },
    "vision_config": {
        "model_type": "minicpmv4_6_vision", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_channels": 3, "image_size": 980, "patch_size": 14, "layer_norm_eps": 1e-06,
        "hidden_act": "gelu_pytorch_tanh", "window_kernel_size": [2, 2],
    },
}  # fmt: skip
"""Keys as transformers writes them for a model of the size of MiniCPM-V 4.6."""
EDGES = (
    (640, 480), (1920, 1080), (448, 448), (449, 448), (600, 600), (1344, 1344), (1280, 1024), (2000, 1500), (20, 20),
    (300, 10), (14, 2100), (16, 2080), (2100, 14), (1000, 500), (500, 1000), (1600, 1200), (3000, 56), (1, 1), (5, 900),
    (896, 448), (1345, 1343), (777, 333), (6000, 40),
)  # fmt: skip
"""Widths and heights."""


def rule_of(said: dict[str, Any], config: dict[str, Any] = PUBLISHED) -> Any:
    path = Path("config.json")
    return FAMILY.config_from_hf(Fields(config, path), Fields({}, path), 1024, said)


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize(
    "said",
    [
        {}, {"max_slice_nums": 4}, {"slice_mode": False}, {"downsample_mode": "4x"}, {"max_slice_nums": 1},
        {"scale_resolution": 336, "max_slice_nums": 16},
    ],
)  # fmt: skip
def test_images_have_the_tiles_and_placeholders_of_transformers(said: dict[str, Any]) -> None:
    config = rule_of(said)
    mode = said.get("downsample_mode", "16x")
    for width, height in EDGES:
        pixels = np.zeros((height, width, 3), np.uint8)
        made, kept = their_pixels([pixels], said)
        cut = config.rule.cut(height, width)
        [text] = their_words(made, 1, mode)
        words = FAMILY.words_around(cut, cut.cells(config.cell_pixels))
        assert words == text, (width, height)
        shapes = [[tile.shape[0] // 14, tile.shape[1] // 14] for tile in config.rule.tiles(picture_of(pixels))]
        assert shapes == kept["target_sizes"].tolist(), (width, height)
        assert len(shapes) == cut.tiles
        assert all(rows * columns <= config.patches for rows, columns in shapes)
        assert max(max(shape) for shape in shapes) <= config.side


def test_every_size_has_the_tiles_of_transformers() -> None:
    config, theirs = rule_of({}), MiniCPMV4_6ImageProcessorPil()
    for height, width in np.random.default_rng(3).integers(1, 3000, (4000, 2)).tolist():
        if max(height, width) > 200 * min(height, width):
            continue
        cut, grid = config.rule.cut(height, width), theirs.get_sliced_grid((height, width), 9, 448)
        whole = theirs.find_best_resize((height, width), 448, 14, "16x", allow_upscale=grid is None)
        assert (cut.last or cut[2:4]) == whole
        assert math.prod(whole) // 14**2 <= config.patches
        if grid is not None:
            refined = theirs.get_refine_size((height, width), grid, 448, 14, "16x", allow_upscale=True)
            assert cut[:2] == tuple(grid)
            assert (cut.rows * cut.height, cut.columns * cut.width) == refined
            assert cut.height * cut.width // 14**2 <= config.patches


@pytest.mark.parametrize("said", [{}, {"max_slice_nums": 1}, {"resample": 2, "downsample_mode": "4x"}])
def test_pixels_are_those_of_transformers(said: dict[str, Any]) -> None:
    tiny = {**PUBLISHED, "vision_config": VISION | {"model_type": "minicpmv4_6_vision"}, "insert_layer_id": 1}
    path = Path("config.json")
    images = {key: value for key, value in (IMAGES | said).items() if key != "downsample_mode"}
    rule = FAMILY.config_from_hf(
        Fields(tiny, path), Fields(images, path), 64, {key: said[key] for key in said if key == "downsample_mode"}
    ).rule
    for picture in PICTURES:
        _, kept = their_pixels([picture], IMAGES | said)
        ours = []
        for tile in rule.tiles(picture_of(picture)):
            values = rule.normalisation.table[tile, np.arange(3)].transpose(2, 0, 1)
            ours.append(MiniCPMV4_6ImageProcessorPil().reshape_by_patch(values, 4))
        found = np.concatenate(ours, -1)[None]
        assert found.shape == kept["pixel_values"].shape
        assert np.abs(found - kept["pixel_values"].numpy()).max() < 1e-6


@pytest.mark.parametrize("upsize", few(["always", "never"], "never"))
def test_small_images_are_resized_as_in_transformers(upsize: str) -> None:
    """MiniCPM-OCR's processor, which needs torchvision; torch resizes here."""
    module = without_torchvision("minicpm_ocr.image_processing_minicpm_ocr")

    class Processor(module.MiniCPMOcrImageProcessor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None: ...

        def resize(self, image: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
            return torch.zeros(3, size.height, size.width)

        def rescale_and_normalize(self, image: torch.Tensor, *_: Any) -> torch.Tensor:
            return image

    config = rule_of({"small_image_upsize": upsize}, PUBLISHED | {
        "architectures": ["MiniCPMOcrForConditionalGeneration"], "downsample_mode": "4x"
    })  # fmt: skip
    for width, height in EDGES:
        given = Processor()._preprocess(
            [torch.zeros(3, height, width)], do_resize=True, resample=3, do_rescale=True, rescale_factor=1 / 255,
            do_normalize=True, image_mean=None, image_std=None, max_slice_nums=9, scale_resolution=448, patch_size=14,
            slice_mode=True, small_image_upsize=upsize, return_tensors="pt", disable_grouping=True,
        )  # fmt: skip
        tiles = config.rule.tiles(picture_of(np.zeros((height, width, 3), np.uint8)))
        assert [[tile.shape[0] // 14, tile.shape[1] // 14] for tile in tiles] == given["target_sizes"].tolist()
        assert all(tile.shape[0] * tile.shape[1] // 14**2 <= config.patches for tile in tiles)


def test_positions_are_those_of_transformers() -> None:
    tower: Any = object.__new__(MiniCPMVTower)
    for side in (70, 35, 7):
        tower.config = dataclasses.replace(rule_of({}), table=side)
        for rows, columns in ((4, 4), (32, 36), (4, 448), (444, 4), (70, 70), (140, 20), (35, 105), (7, 14)):
            wanted = get_vision_nearest_position_ids(torch.tensor([[rows, columns]]), side).numpy()
            places = np.indices((rows, columns)).reshape(2, -1).T
            assert (tower.place(places, 0, (rows, columns)).numbers == wanted).all()


def test_an_extreme_shape_is_refused(tmp_path: Path) -> None:
    loaded = loaded_from(write(tmp_path, "first"))
    assert loaded.tower is not None
    with pytest.raises(InvalidParameterError, match="1 x 201 pixels; the longer side may be 200 times the other"):
        loaded.tower.vision.look([PAD], [np.zeros((201, 1, 3), np.uint8)])


# ---- embeddings, logits, answers -------------------------------------------------------------------------------------


@combined(
    "folder eager", KINDS, (True, False),
    common=[*((kind, False) for kind in ("first", "middle", "last", "4x"))], indirect=["folder"],
)  # fmt: skip
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    wanted = list[NDArray[np.float32]]()
    for picture in PICTURES:
        with torch.inference_mode():
            found = theirs.model.get_image_features(**their_pixels([picture], said_of(folder))[1]).pooler_output
        wanted.append(torch.cat(list(found)).numpy())
    _, given = require_same_embeddings(folder, PAD, PICTURES, wanted, eager=eager, most=64)
    assert [len(each.sizes) for each in given] == [3, 1, 4, 1, 3]


@combined(
    "folder eager tokens", KINDS, (True, False), (512, 23),
    common=[("canvas", False, 23), ("middle", True, 512), ("ocr", False, 23)], indirect=["folder"],
)  # fmt: skip
def test_logits_are_those_of_transformers(tokens: int, eager: bool, folder: Path, theirs: Any) -> None:
    pixels = their_pixels(PICTURES[:2], said_of(folder))[1]

    def wanted(ids: torch.Tensor) -> torch.Tensor:
        kinds = {"mm_token_type_ids": (ids == PAD).int()} if type(theirs).__name__.startswith("MiniCPMV4_7") else {}
        return theirs(input_ids=ids, **pixels, **kinds).logits[0].log_softmax(-1)

    require_logits(folder, PROMPTS[0], wanted, eager=eager, tokens=tokens)


@pytest.mark.one_of_each
@pytest.mark.parametrize(("folder", "mode"), [("canvas", "16x"), ("canvas 4x", "4x")], indirect=["folder"])
@pytest.mark.parametrize("chunks", [[1000], [7], [1, 2, 30]])
@pytest.mark.parametrize(
    "text", [ASK, "<|image_pad|>\n<|image_pad|>\n\n?", "<|image_pad|>\nand <slice></image>, then<|image_pad|>"]
)
def test_positions_on_the_canvas_are_those_of_transformers(
    text: str, chunks: list[int], mode: str, folder: Path, theirs: Any
) -> None:
    loaded = loaded_from(folder, op_by_op=True)
    assert loaded.tower is not None
    for pictures in ([PICTURES[2], PICTURES[3]], [PICTURES[4], PICTURES[0]], [PICTURES[1], BIG]):
        request = request_of(loaded, pictures, text)
        ids = torch.tensor([request.prompt_token_ids])
        sizes = their_pixels(pictures, said_of(folder))[1]["target_sizes"]
        wanted, delta = theirs.model.get_rope_index(ids, (ids == PAD).int(), sizes, downsample_mode=mode)
        made = preparation_for(loaded, 2048).prepare(request)[0]
        assert isinstance(made, LiveSequence)
        assert made.sequence.images[-1].shift == delta.item()
        found = rotated(made.sequence, chunks)
        length = ids.shape[1]
        assert (found[:, :length] == wanted[:, 0].numpy()).all()
        assert (found[:, length:] == np.arange(length, found.shape[1]) + delta.item()).all()


def rotated(sequence: Any, chunks: list[int]) -> NDArray[np.int64]:
    """Time, height and width [3, T] of a prompt's tokens and some generated ones, in steps of so many tokens."""
    sequence.tokens += [1] * 20
    found, start, total = [], 0, len(sequence.tokens)
    while start < total:
        count = min(chunks[min(len(found), len(chunks) - 1)], total - start)
        turned = rotary_positions([Run(sequence, start, count, 0, 0, False)], np.array([0, count]))
        places = np.repeat(np.arange(start, start + count)[:, None], 3, 1)
        if turned is not None:
            places += turned.shifts[:, None]
            places[turned.rows] = turned.places[:, :3]
        found.append(places)
        start += count
    return np.concatenate(found).T


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[tuple[int, ...]]:
    return answers_alone(folder, PROMPTS)


@combined(
    "folder tokens", KINDS, (512, 64, 31, 23, 17, 13, 11, 9),
    common=[("middle", 11), ("canvas", 512)], indirect=["folder"],
)  # fmt: skip
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(
    tokens: int, folder: Path, alone: list[tuple[int, ...]]
) -> None:
    require_same_in_steps(folder, PROMPTS, alone, tokens)


@combined("folder how", KINDS, GPU_STEPS, common=[("middle", "captured")], indirect=["folder"])
def test_steps_of_a_gpu_have_the_same_answers(folder: Path, how: str) -> None:
    asked = [(ASK, PICTURES[:2]), ("Nothing to see.", []), ("<|image_pad|>What is this?", PICTURES[3:4])]
    require_same_on_a_gpu(folder, asked, how)


def test_a_template_writes_the_mark_of_an_image_and_images_are_numbered(tmp_path: Path) -> None:
    folder = write(tmp_path, "middle")
    content: Any = [{"type": "image", "image": each} for each in PICTURES[:2]]
    content.append({"type": "text", "text": "What is this?"})
    with InferenceEngine(folder) as engine:
        output = engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=1), use_tqdm=False)
    ids, tokenizer = list(output.prompt_token_ids), Tokenizer.from_file(str(folder / "tokenizer.json"))
    made, _ = their_pixels(PICTURES[:2], IMAGES)
    first, second = their_words(made, 2, "16x")
    text = f"<|im_start|>user\n{first}\n{second}\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert first.startswith("<image_id>0</image_id><image>")
    assert second.startswith("<image_id>1</image_id><image>")
    assert ids.count(SLICE) == ids.count(SLICED) == 2


@pytest.mark.every_case
def test_answers_are_the_same_in_another_process_and_without_torch(tmp_path: Path) -> None:
    folder = write(tmp_path, "middle")
    with InferenceEngine(folder, device="cpu") as engine:
        alone = answers(engine, PROMPTS)
    with RemoteEngine(folder, device="cpu") as engine:
        assert answers(engine, PROMPTS) == alone
    assert answers_without_torch([(folder, ASK, PICTURES[:2])]) == alone[:1]


@pytest.mark.every_case
@pytest.mark.parametrize("kind", ["middle", "4x"])
def test_quantised_while_loading_the_embeddings_are_nearly_the_same(kind: str, tmp_path: Path) -> None:
    """Rows of matrices are whole blocks of 32 values."""
    folder, found = write(tmp_path, kind, intermediate_size=64), []
    for isq in (None, "q4_k"):
        loaded = loaded_from(folder, isq=isq)
        assert loaded.tower is not None
        _, images = loaded.tower.vision.look([PAD], PICTURES[:1])
        team = ThreadTeam(2)
        try:
            found.append(finished(RecordedTower(loaded.tower.tower, team), tiles_of(images[0]))[0])
        finally:
            team.close()
    apart = np.sqrt(np.square(found[1] - found[0]).mean() / np.square(found[0]).mean())
    assert 0 < apart < 0.03


def test_an_operator_sets_tiles_and_tokens(tmp_path: Path) -> None:
    folder = write(tmp_path, "middle")
    for said, count, cell in (
        ({}, 3, 16),
        ({"max_slice_nums": 1}, 1, 16),
        ({"slice_mode": False}, 1, 16),
        ({"scale_resolution": 64}, 1, 16),
        ({"scale_resolution": 64, "small_image_upsize": "never"}, 1, 16),
        ({"downsample_mode": "4x"}, 3, 8),
    ):
        loaded = loaded_from(folder, mm_processor_kwargs=said)
        assert loaded.tower is not None
        ids, images = loaded.tower.vision.look([PAD], PICTURES[:1])
        if "small_image_upsize" in said:  # which 4.6's processor does not have
            wanted = [(48, 32)]
        else:
            wanted = [(4 * rows, 4 * columns) for rows, columns in their_sizes(PICTURES[0], IMAGES | said)]
        assert list(images[0].sizes) == wanted
        assert len(wanted) == count
        assert (ids[0], ids[2]) == (NUMBER, NUMBERED)
        assert ids.count(PAD) == sum(height * width // cell**2 for height, width in wanted)
    with pytest.raises(ConfigError, match="max_slice_nums is 65"):
        loaded_from(folder, mm_processor_kwargs={"max_slice_nums": 65})


# ---- files -----------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "embeddings.patch_embedding": "v.patch_embd", "embeddings.position_embedding": "v.position_embd",
    "layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
    "post_layernorm": "v.post_ln", "mlp.0.pre_norm": "mm.input_norm", "mlp.0.linear_1": "mm.up",
    "mlp.0.linear_2": "mm.down", "pre_norm": "ds_ln", "linear_1": "ds_ffn_up", "linear_2": "ds_ffn_down",
}  # fmt: skip
TENSOR = re.compile(r"model\.(?:vision_tower|merger)\.(?:(vit_merger)\.|encoder\.layers\.(\d+)\.)?(.*)\.(weight|bias)")


def write_mmproj(folder: Path, made: Path, kind: str) -> Path:
    """The checkpoint's vision encoder as llama.cpp's converter writes it."""
    merged = mode_of(kind) == "16x"
    values: dict[str, Any] = {
        "image_size": 32, "projector.scale_factor": 4 if merged else 2, "clip.use_gelu": True,
        "wa_layer_indexes": [KINDS[kind][1]["insert_layer_id"]],
    }  # fmt: skip
    tensors = dict[str, NDArray[np.float32]]()
    for name, tensor in load_file(folder / "model.safetensors").items():
        if (found := TENSOR.fullmatch(name)) is None:
            continue
        merger, layer, part, tail = found.groups()
        if merger and not merged:
            continue
        block = "v.vit_merger." if merger else "" if layer is None else f"v.blk.{layer}."
        tensors[f"{block}{GGUF_NAMES[part]}.{tail}"] = tensor.numpy()
    return write_tower(made, "minicpmv4_6", values, tensors, IMAGES)


@pytest.mark.parametrize("kind", few(["first", "last", "4x"], "last"))
def test_a_gguf_file_and_that_of_its_tower_are_the_same_model(kind: str, tmp_path: Path) -> None:
    """With published settings of images, which the file does not contain, but for the number of tiles."""
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, kind)
    said: dict[str, Any] = {"mm_processor_kwargs": {"max_slice_nums": 4}}
    tower = write_mmproj(folder, tmp_path / "mmproj.gguf", kind)
    require_same_from_gguf(folder, tower, PROMPTS, answers_of(folder, PROMPTS, **said), "qwen35", **said)


@pytest.mark.parametrize("layer", [{}, [], None, "x", 0.5])
def test_a_layer_of_a_gguf_file_that_is_no_number_is_refused(layer: Any) -> None:
    said = {
        "image_size": 448, "patch_size": 14, "embedding_length": 64, "block_count": 3, "attention.head_count": 4,
        "feed_forward_length": 96, "wa_layer_indexes": [layer],
    }  # fmt: skip
    fields = Fields({f"clip.vision.{key}": value for key, value in said.items()}, Path("mmproj.gguf"), "clip.vision.")
    assert FAMILY.config_from_gguf is not None
    with pytest.raises(InvalidFileError, match="wa_layer_indexes is"):
        FAMILY.config_from_gguf(fields, 64, {})


def test_a_published_config_is_read() -> None:
    path = Path("config.json")
    tower = rule_of({})
    assert (tower.hidden_size, tower.num_layers, tower.merged_at, tower.cell_pixels) == (1152, 27, 7, 56)
    counts = []
    for width, height in ((640, 480), (1920, 1080)):
        cut = tower.rule.cut(height, width)
        counts.append(FAMILY.words_around(cut, cut.cells(56)).count("<|image_pad|>"))
    assert counts == [203, 578]
    family, text = family_from_hf(PUBLISHED, path)
    assert (family.hf.get("Qwen3_5ForCausalLM"), text.hidden_size, text.num_layers) == ("qwen3_5", 1024, 24)
    assert text.tie_embeddings


@pytest.mark.parametrize(
    ("change", "processor", "said"),
    [
        ({"merger_times": 2}, {}, "merger_times is 2"),
        ({"merge_kernel_size": [4, 1]}, {}, "merge_kernel_size is"),
        ({"drop_vision_last_layer": True}, {}, "drop_vision_last_layer is True"),
        ({"vision_config": {"window_kernel_size": [4, 4]}}, {}, "window_kernel_size is"),
        ({"vision_config": {"num_channels": 1}}, {}, "num_channels is 1"),
        ({"vision_config": {"hidden_act": "relu"}}, {}, "hidden_act is 'relu'"),
        ({"vision_config": {"insert_layer_id": 3}}, {}, "another insert_layer_id than 6"),
        ({"insert_layer_id": 27}, {}, "after layer 27 of 27"),
        ({"insert_layer_id": -1}, {}, "after layer -1 of 27"),
        ({"downsample_mode": "8x"}, {}, "downsample_mode is '8x'; implemented: 16x, 4x"),
        ({}, {"downsample_mode": "4x"}, "downsample_mode is 4x; config.json says 16x"),
        ({}, {"use_image_id": False}, "use_image_id is false"),
        ({}, {"small_image_upsize": "adaptive"}, "small_image_upsize is 'adaptive'; implemented: always, never"),
        ({}, {"patch_size": 16}, "patch_size is 16; the model's is 14"),
        ({}, {"scale_resolution": 28}, "scale_resolution is 28"),
        ({}, {"scale_resolution": 4000}, "scale_resolution is 4000"),
        ({}, {"max_slice_nums": 65}, "max_slice_nums is 65"),
        ({}, {"do_resize": False}, "do_resize is false"),
    ],
)
def test_other_models_are_refused(change: dict[str, Any], processor: dict[str, Any], said: str) -> None:
    path = Path("config.json")
    vision = PUBLISHED["vision_config"] | change.get("vision_config", {})
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=said):
        FAMILY.config_from_hf(
            Fields(PUBLISHED | change | {"vision_config": vision}, path), Fields(processor, path), 1024, {}
        )
