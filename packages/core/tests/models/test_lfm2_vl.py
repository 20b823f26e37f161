# SPDX-License-Identifier: MIT
"""LFM2-VL of random weights: tiles, placeholders, embeddings and logits against transformers, files, and answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig
from transformers.models.lfm2_vl.processing_lfm2_vl import Lfm2VlProcessor

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.errors import ConfigError, InvalidFileError, InvalidParameterError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models.lfm2_vl_tower import FAMILY
from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.vision.pictures import picture_of
from packages.core.tests.models.families import LFM2
from packages.core.tests.models.sight import (
    GPU_STEPS,
    answers,
    answers_alone,
    answers_of,
    loaded_from,
    model_of,
    random_model,
    random_pictures,
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

START, END, PAD, THUMBNAIL = range(260, 264)
MARKS = ("<|image_start|>", "<|image_end|>", "<image>", "<|img_thumbnail|>")
PLACES = [f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5) if row * column <= 4]
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<image>' }}{% elif content['type'] == 'text' %}{{ content['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
ASK = "<|im_start|>user\n<image>Compare this with <image>, please.<|im_end|>\n<|im_start|>assistant\n"
SIZES = ((45, 28), (17, 22), (64, 12), (5, 5), (19, 70))
PICTURES = random_pictures(*SIZES)
"""Large, small, shrunk, enlarged, large."""
PROMPTS: list[Any] = [
    {"prompt": ASK, "multi_modal_data": {"image": PICTURES[:2]}},
    {"prompt": ASK, "multi_modal_data": {"image": [PICTURES[4], PICTURES[4]]}},
    {"prompt": "<image>What is this?", "multi_modal_data": {"image": [PICTURES[3]]}},
    "<|im_start|>user\nCompare nothing.<|im_end|>\n",
]
TEXT = {**SMALL, **LFM2, "model_type": "lfm2", "vocab_size": 272}
VISION = {
    "model_type": "siglip2_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "patch_size": 4, "num_patches": 25, "num_channels": 3, "vision_use_head": False,
}  # fmt: skip
IMAGES = {
    "tile_size": 16, "min_tiles": 2, "max_tiles": 4, "min_image_tokens": 3, "max_image_tokens": 8,
    "encoder_patch_size": 4, "downsample_factor": 2, "max_pixels_tolerance": 2.0, "use_thumbnail": True,
    "do_image_splitting": True, "do_resize": False, "image_mean": [0.5, 0.4, 0.6], "image_std": [0.5, 0.6, 0.4],
    "image_processor_type": "Lfm2VlImageProcessorFast", "resample": 2, "size": {"height": 16, "width": 16},
}  # fmt: skip
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "norm": ({}, {}),
    "plain": ({"projector_use_layernorm": False, "projector_bias": False}, {"vision_use_head": True}),
}
"""Two kinds of projectors, and a vision encoder with a head that is not used."""


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images() -> Any:
    """transformers' image processor, whose resampling torch computes, as in torchvision."""
    theirs = without_torchvision("lfm2_vl.image_processing_lfm2_vl")
    backend = theirs.Lfm2VlImageProcessor.__mro__[1]

    class Resampling(backend):  # type: ignore[misc,valid-type]
        def resize(self, image: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
            wanted = [size.height, size.width]
            if list(image.shape[-2:]) == wanted:
                return image
            return torch.nn.functional.interpolate(image, wanted, mode="bilinear", antialias=True)

        def rescale_and_normalize(
            self, image: torch.Tensor, _1: bool, scale: float, _2: bool, mean: list[float], std: list[float]
        ) -> torch.Tensor:
            means, stds = (torch.tensor(each)[:, None, None] for each in (mean, std))
            return (image.float() * scale - means) / stds

    class Processor(theirs.Lfm2VlImageProcessor, Resampling):  # type: ignore[misc,name-defined]
        def __init__(self, **said: Any) -> None:
            self.said = said

        def __call__(self, pictures: list[NDArray[np.uint8]]) -> Any:
            given = [torch.from_numpy(each).permute(2, 0, 1).contiguous() for each in pictures]
            keys = (*IMAGES, "do_rescale", "rescale_factor", "do_normalize", "do_pad")
            usual = {key: getattr(self, key, None) for key in keys}
            more = {"return_row_col_info": True, "return_tensors": None, "disable_grouping": True}
            return self._preprocess(given, **usual | self.said | more)

    Processor.split = staticmethod(theirs.convert_image_to_patches)  # type: ignore[attr-defined]
    return Processor


def their_pixels(pictures: list[NDArray[np.uint8]], rule: Any, images: Any) -> dict[str, torch.Tensor]:
    """The inputs of transformers' vision encoder for tiles of this package, padded to the largest."""
    tiles = [tile for each in pictures for tile in rule.tiles(picture_of(each))]
    shapes = torch.tensor([[tile.shape[0] // 4, tile.shape[1] // 4] for tile in tiles])
    counts = shapes.prod(1)
    pixels, mask = torch.zeros(len(tiles), int(counts.max()), 48), torch.zeros(len(tiles), int(counts.max())).int()
    for number, tile in enumerate(tiles):
        values = torch.from_numpy(rule.normalisation.table[tile, np.arange(3)]).permute(2, 0, 1)
        pixels[number, : counts[number]] = images.split(values[None], 4)[0]
        mask[number, : counts[number]] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def rule_of(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    return FAMILY.config_from_hf(Fields(config, folder), Fields(IMAGES, folder), 64, {}).rule


def write(folder: Path, kind: str) -> Path:
    own, vision = KINDS[kind]
    config = AutoConfig.for_model(
        "lfm2_vl", text_config=TEXT, vision_config=VISION | vision, image_token_id=PAD, projector_hidden_size=40,
        downsample_factor=2, **own,
    )  # fmt: skip
    model = random_model(config)
    with torch.no_grad():  # embeddings of pictures as long as those of words
        model.model.multi_modal_projector.linear_2.weight.mul_(6)
    model.save_pretrained(folder)
    if kind == "plain":
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": IMAGES}))
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    write_tokenizer(folder, MARKS, TEMPLATE)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(PLACES)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("lfm2_vl"), request.param)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return model_of(folder)


# ---- tiles and placeholders ------------------------------------------------------------------------------------------

EDGES = (
    (640, 480), (1920, 1080), (512, 512), (600, 600), (724, 724), (736, 736), (1280, 1024), (4000, 3000), (20, 20),
    (300, 10), (14, 2100), (16, 2080), (2100, 14), (1000, 500), (500, 1000), (1600, 1200), (3000, 56), (1, 1), (5, 900),
)  # fmt: skip
"""Widths and heights."""


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize(
    "said", [{}, {"max_tiles": 4}, {"do_image_splitting": False}, {"min_image_tokens": 1, "max_image_tokens": 84}]
)
def test_images_have_the_tiles_and_placeholders_of_transformers(said: dict[str, Any], images: Any) -> None:
    path, theirs = Path("config.json"), images(**said)
    config = FAMILY.config_from_hf(Fields(PUBLISHED, path), Fields({}, path), 1024, said)
    words: Any = object.__new__(Lfm2VlProcessor)
    words.image_token, words.image_start_token, words.image_end_token, words.image_thumbnail_token = (
        "<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>"
    )  # fmt: skip
    words.image_processor = SimpleNamespace(
        use_thumbnail=True, tile_size=512, downsample_factor=2, encoder_patch_size=16
    )
    for width, height in EDGES:
        pixels = np.zeros((height, width, 3), np.uint8)
        given, cut = theirs([pixels]), config.rule.cut(height, width)
        text = words.replace_image_token(given, 0, use_image_special_tokens=True)
        assert FAMILY.words_around(cut, cut.cells(32)) == text, (width, height)
        shapes = [[tile.shape[0] // 16, tile.shape[1] // 16] for tile in config.rule.tiles(picture_of(pixels))]
        assert shapes == given["spatial_shapes"].tolist(), (width, height)
        assert len(shapes) == cut.tiles
        assert all(rows * columns <= config.patches for rows, columns in shapes)


@pytest.mark.parametrize("said", [{}, {"do_image_splitting": False}, {"resample": 2, "max_pixels_tolerance": 0.5}])
def test_pixels_are_those_of_transformers(said: dict[str, Any], images: Any) -> None:
    """torchvision's resampling, which torch computes, differs from Pillow's by 1 or 2 of 255 in some values."""
    path, theirs = Path("config.json"), images(**IMAGES | said)
    tiny = {**PUBLISHED, "vision_config": VISION}
    rule = FAMILY.config_from_hf(Fields(tiny, path), Fields(IMAGES | said, path), 64, {}).rule
    for picture in PICTURES:
        given, ours = theirs([picture]), their_pixels([picture], rule, images)
        assert torch.equal(given["spatial_shapes"], ours["spatial_shapes"])
        length = ours["pixel_values"].shape[1]
        assert torch.equal(given["pixel_attention_mask"][:, :length].int(), ours["pixel_attention_mask"])
        apart = (given["pixel_values"][:, :length] - ours["pixel_values"]).abs()
        assert apart.max() < 2.1 / 255 / 0.4
        assert (apart < 1e-5).float().mean() > 0.7


def test_an_extreme_shape_is_refused(folder: Path) -> None:
    loaded = loaded_from(folder)
    assert loaded.tower is not None
    with pytest.raises(InvalidParameterError, match="1 x 201 pixels; the longer side may be 200 times the other"):
        loaded.tower.vision.look([PAD], [np.zeros((201, 1, 3), np.uint8)])


# ---- embeddings, logits, answers -------------------------------------------------------------------------------------


@combined("folder eager", KINDS, (True, False), common=[*((kind, False) for kind in KINDS)], indirect=["folder"])
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any, images: Any) -> None:
    rule = rule_of(folder)
    wanted = list[NDArray[np.float32]]()
    for picture in PICTURES:
        with torch.inference_mode():
            found = theirs.model.get_image_features(**their_pixels([picture], rule, images)).pooler_output
        wanted.append(torch.cat(list(found)).numpy())
    _, given = require_same_embeddings(folder, PAD, PICTURES, wanted, eager=eager, most=64)
    assert [len(set(each.sizes)) for each in given] == [2, 1, 1, 1, 2]


@combined("folder eager tokens", KINDS, (True, False), (512, 23), common=[("norm", False, 23)], indirect=["folder"])
def test_logits_are_those_of_transformers(tokens: int, eager: bool, folder: Path, theirs: Any, images: Any) -> None:
    pixels = their_pixels(PICTURES[:2], rule_of(folder), images)

    def wanted(ids: torch.Tensor) -> torch.Tensor:
        return theirs(input_ids=ids, **pixels).logits[0].log_softmax(-1)

    require_logits(folder, PROMPTS[0], wanted, eager=eager, tokens=tokens)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[tuple[int, ...]]:
    return answers_alone(folder, PROMPTS)


@combined("folder tokens", KINDS, (512, 64, 31, 23, 17, 13, 11, 9), common=[("norm", 11)], indirect=["folder"])
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(
    tokens: int, folder: Path, alone: list[tuple[int, ...]]
) -> None:
    require_same_in_steps(folder, PROMPTS, alone, tokens)


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("folder", "how"), [(kind, how) for kind in KINDS for how in GPU_STEPS],
    indirect=["folder"],
)  # fmt: skip
def test_steps_of_a_gpu_have_the_same_answers(folder: Path, how: str) -> None:
    asked = [(ASK, PICTURES[:2]), ("Nothing to see.", []), ("<image>What is this?", PICTURES[3:4])]
    require_same_on_a_gpu(folder, asked, how)


def test_a_template_writes_the_mark_of_an_image(tmp_path: Path) -> None:
    folder = write(tmp_path, "norm")
    content: Any = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "What is this?"}]
    with InferenceEngine(folder) as engine:
        output = engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=1), use_tqdm=False)
    ids, tokenizer = list(output.prompt_token_ids), Tokenizer.from_file(str(folder / "tokenizer.json"))
    first, second = (tokenizer.token_to_id(place) for place in ("<|img_row_1_col_1|>", "<|img_row_2_col_1|>"))
    image = [START, first, *[PAD] * 4, second, *[PAD] * 4, THUMBNAIL, *[PAD] * 6, END]
    begin = ids.index(START)
    assert ids[begin : begin + len(image)] == image
    assert ids.count(PAD) == 14


def test_an_operator_sets_tiles_and_tokens(tmp_path: Path) -> None:
    folder = write(tmp_path, "norm")
    for said, sizes in (
        ({}, [(16, 16)] * 2 + [(24, 16)]),
        ({"min_tiles": 3}, [(16, 16)] * 3 + [(24, 16)]),
        ({"do_image_splitting": False}, [(24, 16)]),
        ({"min_image_tokens": 12, "max_image_tokens": 24}, [(48, 32)]),
    ):
        loaded = loaded_from(folder, mm_processor_kwargs=said)
        assert loaded.tower is not None
        ids, images = loaded.tower.vision.look([PAD], PICTURES[:1])
        assert list(images[0].sizes) == sizes
        assert (ids[0], ids[-1], THUMBNAIL in ids) == (START, END, len(sizes) > 1)
        assert ids.count(PAD) == sum(height * width // 64 for height, width in sizes)
    with pytest.raises(ConfigError, match="min_tiles is 5, more than max_tiles, 4"):
        loaded_from(folder, mm_processor_kwargs={"min_tiles": 5})


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", few(KINDS, "norm"), indirect=True)
def test_names_of_published_checkpoints_are_read(folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]) -> None:
    """Which have the name that the vision model's class had in transformers 4."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    stored = load_file(folder / "model.safetensors")
    assert any(name.startswith("model.vision_tower.e") for name in stored)
    renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): each for name, each in stored.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    with InferenceEngine(tmp_path) as engine:
        assert answers(engine, PROMPTS) == alone


GGUF_NAMES = {
    "embeddings.patch_embedding": "v.patch_embd", "embeddings.position_embedding": "v.position_embd",
    "layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
    "post_layernorm": "v.post_ln", "layer_norm": "mm.input_norm", "linear_1": "mm.1", "linear_2": "mm.2",
}  # fmt: skip
TENSOR = re.compile(r"model\.(?:vision_tower|multi_modal_projector)\.(?:encoder\.layers\.(\d+)\.)?(.*)\.(weight|bias)")


def write_mmproj(folder: Path, made: Path) -> Path:
    """The checkpoint's vision encoder as llama.cpp's converter writes it."""
    values: dict[str, Any] = {"image_size": 256, "projector.scale_factor": 2, "clip.use_gelu": True}
    tensors = dict[str, NDArray[np.float32]]()
    for name, tensor in load_file(folder / "model.safetensors").items():
        if (found := TENSOR.fullmatch(name)) is None or ".head." in name:
            continue
        layer, part, kind = found.groups()
        if (part, kind) == ("embeddings.patch_embedding", "weight"):
            tensor = tensor.view(-1, 4, 4, 3).permute(0, 3, 1, 2).contiguous()
        block = "" if layer is None else f"v.blk.{layer}."
        tensors[f"{block}{GGUF_NAMES[part]}.{kind}"] = tensor.numpy()
    return write_tower(made, "lfm2", values, tensors, IMAGES)


@pytest.mark.parametrize("folder", few(KINDS, "plain"), indirect=True)
def test_a_gguf_file_and_that_of_its_tower_are_the_same_model(folder: Path, tmp_path: Path) -> None:
    """With published settings of images, which the file does not contain, but for the numbers of tokens."""
    bounds: dict[str, Any] = {"mm_processor_kwargs": {"min_image_tokens": 3, "max_image_tokens": 8}}
    asked = [{"prompt": ASK, "multi_modal_data": {"image": [PICTURES[1], PICTURES[3]]}}, *PROMPTS[2:]]
    tower = write_mmproj(folder, tmp_path / "mmproj.gguf")
    require_same_from_gguf(folder, tower, asked, answers_of(folder, asked, **bounds), "lfm2", **bounds)


PUBLISHED: dict[str, Any] = {
    "architectures": ["Lfm2VlForConditionalGeneration"], "model_type": "lfm2_vl", "image_token_id": 396,
    "downsample_factor": 2, "do_image_splitting": True, "encoder_patch_size": 16, "max_tiles": 10, "min_tiles": 2,
    "projector_bias": True, "projector_hidden_act": "gelu", "projector_hidden_size": 2560, "tile_size": 512,
    "vision_feature_layer": -1, "use_thumbnail": False,
    "text_config": {
        "model_type": "lfm2", "hidden_size": 1024, "num_hidden_layers": 16, "num_attention_heads": 16,
        "num_key_value_heads": 8, "intermediate_size": 6656, "block_ff_dim": 6656, "block_auto_adjust_ff_dim": True,
        "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256, "conv_L_cache": 3, "conv_bias": False,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14], "norm_eps": 1e-05, "rope_theta": 1000000.0, "vocab_size": 65536,
        "max_position_embeddings": 128000, "eos_token_id": 7, "tie_embedding": True,
    },
    "vision_config": {
        "model_type": "siglip2_vision_model", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_channels": 3, "num_patches": 256, "patch_size": 16, "layer_norm_eps": 1e-06,
        "hidden_act": "gelu_pytorch_tanh", "vision_use_head": False,
    },
}  # fmt: skip
"""Keys of LFM2-VL-450M; that of the thumbnail is overruled by the settings of images."""


def test_the_published_config_is_read() -> None:
    path = Path("config.json")
    tower = FAMILY.config_from_hf(Fields(PUBLISHED, path), Fields({"do_resize": False}, path), 1024, {})
    assert (tower.hidden_size, tower.num_layers, tower.learned, tower.cell_pixels) == (768, 12, 16, 32)
    counts = []
    for width, height in ((640, 480), (1920, 1080)):
        cut = tower.rule.cut(height, width)
        counts.append(FAMILY.words_around(cut, cut.cells(32)).count("<image>"))
    assert counts == [234, 2300]
    family, text = family_from_hf(PUBLISHED, path)
    assert (family.hf.get("Lfm2ForCausalLM"), text.hidden_size, text.num_layers) == ("lfm2", 1024, 16)
    assert (text.intermediate_size, text.tie_embeddings) == (4608, True)


@pytest.mark.parametrize(
    ("change", "processor", "said"),
    [
        ({"vision_feature_layer": -2}, {}, "vision_feature_layer is -2"),
        ({"projector_hidden_act": "relu"}, {}, "projector_hidden_act is 'relu'"),
        ({"vision_config": {"num_patches": 200}}, {}, "num_patches is 200, not a square number"),
        ({"vision_config": {"hidden_act": "relu"}}, {}, "hidden_act is 'relu'"),
        ({}, {"use_thumbnail": False}, "use_thumbnail is false"),
        ({}, {"encoder_patch_size": 14}, "encoder_patch_size is 14; config.json says 16"),
        ({}, {"tile_size": 500}, "tile_size is 500, which must be a multiple of 32"),
        ({}, {"tile_size": 4096}, "tile_size is 4096"),
        ({}, {"max_image_tokens": 32}, "at least 65536 pixels and at most 32768"),
        ({}, {"max_image_tokens": 5000}, "max_image_tokens is 5000"),
        ({}, {"max_tiles": 65}, "max_tiles is 65"),
    ],
)
def test_other_models_are_refused(change: dict[str, Any], processor: dict[str, Any], said: str) -> None:
    path = Path("config.json")
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=said):
        FAMILY.config_from_hf(Fields(PUBLISHED | change, path), Fields(processor, path), 1024, {})
