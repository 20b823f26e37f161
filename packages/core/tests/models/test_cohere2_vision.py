# SPDX-License-Identifier: MIT
"""Cohere 2 Vision and Aya Vision of random weights: tiles, embeddings and logits against transformers, and answers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig
from transformers.models.aya_vision.processing_aya_vision import AyaVisionProcessor
from transformers.models.cohere2_vision.processing_cohere2_vision import Cohere2VisionProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.errors import ConfigError, InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models import aya_vision_tower, cohere2_vision_tower
from candle_vllm.core.models.registry import family_from_hf, tower_family
from candle_vllm.core.vision.pictures import picture_of
from packages.core.tests.models.sight import (
    GPU_STEPS,
    answers,
    answers_alone,
    loaded_from,
    model_of,
    random_model,
    require_logits,
    require_same_embeddings,
    require_same_in_steps,
    require_same_on_a_gpu,
    without_torchvision,
    write_tokenizer,
)
from packages.core.tests.models.tiny import SMALL
from tests.common_run import combined, few

MARKS = ("<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>")
PAD, START, END = range(260, 263)
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ 'ASKS' }}{% elif content['type'] == 'text' %}{{ content['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = ((45, 28, 3), (17, 12, 3), (16, 16, 3), (2, 5, 3), (9, 70, 3))
RANDOM = np.random.default_rng(6)
PICTURES = [RANDOM.integers(0, 256, size, dtype=np.uint8) for size in SIZES]
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "patch_size": 4, "image_size": 16, "vision_use_head": False,
}  # fmt: skip
COHERE2: dict[str, Any] = {
    **SMALL, "model_type": "cohere2", "num_hidden_layers": 4, "sliding_window": 24, "logit_scale": 0.25,
    "vocab_size": 264,
}  # fmt: skip
COHERE: dict[str, Any] = {
    **SMALL, "model_type": "cohere", "use_qk_norm": True, "logit_scale": 0.25,
    "vocab_size": 264,
}  # fmt: skip
IMAGES: dict[str, Any] = {
    "size": {"height": 16, "width": 16}, "max_patches": 4, "resample": 3, "image_mean": [0.5, 0.4, 0.6],
    "image_std": [0.5, 0.6, 0.4], "do_convert_rgb": True, "do_rescale": True, "rescale_factor": 1 / 255,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "command": ("cohere2_vision", COHERE2, {"vision_use_head": True}, {"alignment_intermediate_size": 40}),
    "aya": ("aya_vision", COHERE2, {}, {"alignment_intermediate_size": 40, "adapter_layer_norm_eps": 1e-3}),
    "aya 32B": ("aya_vision", COHERE, {"vision_use_head": True}, {}),
}
"""model_type, the text model, and keys of the vision encoder and of the whole."""


def asks(kind: str) -> str:
    return "<image>" if "aya" in kind else "<|IMG_PATCH|>"


def prompts(kind: str) -> list[Any]:
    one = asks(kind)
    ask = f"<|im_start|>user\n{one}Compare this with {one}, please.<|im_end|>\n<|im_start|>assistant\n"
    return [
        {"prompt": ask, "multi_modal_data": {"image": PICTURES[:2]}},
        {"prompt": ask, "multi_modal_data": {"image": [PICTURES[4], PICTURES[4]]}},
        {"prompt": f"{one}What is this?", "multi_modal_data": {"image": [PICTURES[3]]}},
        "<|im_start|>user\nCompare nothing.<|im_end|>\n",
    ]


# ---- transformers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiled() -> Any:
    """The module of Cohere 2 Vision's image processor, with Pillow's resampling for that of torchvision."""
    theirs = without_torchvision("cohere2_vision.image_processing_cohere2_vision")

    class Processor(theirs.Cohere2VisionImageProcessor):  # type: ignore[misc,name-defined]
        def __init__(self, **said: Any) -> None:
            self.said = IMAGES | {"crop_to_patches": True} | said

        def resize(self, image: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
            images = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in image]
            resized = [np.asarray(each.resize((size.width, size.height), Image.Resampling.BICUBIC)) for each in images]
            return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)

        def rescale_and_normalize(
            self, image: torch.Tensor, _1: bool, scale: float, _2: bool, mean: list[float], std: list[float]
        ) -> torch.Tensor:
            means, stds = (torch.tensor(each)[:, None, None] for each in (mean, std))
            return (image.float() * scale - means) / stds

        def __call__(self, pictures: list[NDArray[np.uint8]]) -> Any:
            given = [torch.from_numpy(each).permute(2, 0, 1).contiguous() for each in pictures]
            size = SimpleNamespace(**self.said["size"])
            more = {"do_resize": True, "do_normalize": True, "disable_grouping": True, "return_tensors": None}
            made = self._preprocess(given, **self.said | more | {"size": size})
            return {"pixel_values": torch.stack(made["pixel_values"]), "num_patches": made["num_patches"]}

    return SimpleNamespace(Processor=Processor, canvas=theirs.get_optimal_tiled_canvas)


def their_tiles(kind: str, tiled: Any, pictures: list[NDArray[np.uint8]], **said: Any) -> Any:
    if "aya" not in kind:
        return tiled.Processor(**said)(pictures)
    processor = GotOcr2ImageProcessorPil(**IMAGES | {"crop_to_patches": True} | said)  # as AyaVisionProcessor asks
    return processor(images=[Image.fromarray(each) for each in pictures], return_tensors="pt")


def write(folder: Path, kind: str) -> Path:
    name, text, vision, own = KINDS[kind]
    config = AutoConfig.for_model(
        name, text_config=text, vision_config=VISION | vision, downsample_factor=2, image_token_id=PAD, **own
    )
    model = random_model(config)
    with torch.no_grad():  # embeddings of words as long as those of pictures, so that layers matter
        model.model.language_model.embed_tokens.weight.mul_(0.05)
    model.save_pretrained(folder)
    said = IMAGES if "aya" in kind else IMAGES | {"patch_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    last = "<image>" if "aya" in kind else "<|IMG_LINE_BREAK|>"
    write_tokenizer(folder, (*MARKS, last), TEMPLATE.replace("ASKS", asks(kind)))
    return folder


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("cohere2_vision"), kind)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return model_of(folder)


# ---- tiles and placeholders ------------------------------------------------------------------------------------------

EDGES = (
    (640, 480), (1920, 1080), (512, 512), (513, 512), (1024, 1024), (724, 724), (1280, 1024), (4000, 3000), (20, 20),
    (300, 10), (14, 2100), (2100, 14), (1000, 500), (500, 1000), (3000, 56), (1, 1), (5, 900), (6144, 512), (300, 200),
    (6145, 512), (8192, 8192),
)  # fmt: skip
"""Widths and heights."""


@pytest.mark.parametrize("said", [{}, {"max_patches": 5}, {"max_patches": 1}, {"crop_to_patches": False}])
def test_images_have_the_canvas_and_placeholders_of_transformers(said: dict[str, Any], tiled: Any) -> None:
    path = Path("config.json")
    rule = cohere2_vision_tower.config_from_hf(Fields(PUBLISHED["command"], path), Fields({}, path), 12288, said).rule
    words: Any = object.__new__(Cohere2VisionProcessor)
    words.boi_token, words.eoi_token, words.image_token = "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>"
    words.img_line_break_token, words.patch_size = "<|IMG_LINE_BREAK|>", 16
    for width, height in EDGES:
        cut = rule.cut(height, width)
        most = said.get("max_patches", 12) if said.get("crop_to_patches", True) else 1
        columns, rows = tiled.canvas((height, width), (512, 512), 1, most)
        assert (max(cut.rows, 1), max(cut.columns, 1)) == (rows, columns), (width, height)
        count = rows * columns + (rows * columns > 1)
        text = words.replace_image_token({"num_patches": [count]}, 0)
        assert cohere2_vision_tower.FAMILY.words_around(cut, cut.cells(32)) == text


def test_placeholders_of_aya_vision_are_those_of_transformers() -> None:
    path = Path("config.json")
    size = Fields({"size": {"height": 364, "width": 364}}, path)
    rule = aya_vision_tower.config_from_hf(Fields(PUBLISHED["aya"], path), size, 4096).rule
    words: Any = object.__new__(AyaVisionProcessor)
    words.start_of_img_token, words.end_of_img_token, words.img_patch_token = MARKS[1], MARKS[2], MARKS[0]
    words.tile_token, words.tile_global_token, words.img_size, words.patch_size = "TILE", "TILE_GLOBAL", 364, 28
    for width, height in EDGES:
        cut = rule.cut(height, width)
        count = GotOcr2ImageProcessorPil(size=size.values["size"], crop_to_patches=True).get_number_of_image_patches(
            height, width
        )
        text = words.replace_image_token({"num_patches": [count]}, 0)
        assert aya_vision_tower.FAMILY.words_around(cut, cut.cells(28)) == text


@combined(
    "kind said", KINDS, ({}, {"max_patches": 6}, {"crop_to_patches": False}),
    common=[*((kind, {}) for kind in ("command", "aya"))], indirect=["kind"],
)  # fmt: skip
def test_pixels_are_those_of_transformers(said: dict[str, Any], kind: str, folder: Path, tiled: Any) -> None:
    loaded = loaded_from(folder, mm_processor_kwargs=said)
    assert loaded.tower is not None
    rule = loaded.tower.tower.config.rule
    for picture in PICTURES:
        tiles = np.stack(list(rule.tiles(picture_of(picture))))
        theirs = their_tiles(kind, tiled, [picture], **said)["pixel_values"].numpy()
        ours = rule.normalisation.table[tiles, np.arange(3)].transpose(0, 3, 1, 2)
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < 1e-5


# ---- embeddings, logits, answers -------------------------------------------------------------------------------------


@combined("kind eager", KINDS, (True, False), common=[("command", False), ("aya", False)], indirect=["kind"])
def test_embeddings_are_those_of_transformers(eager: bool, kind: str, folder: Path, theirs: Any, tiled: Any) -> None:
    given = their_tiles(kind, tiled, PICTURES)
    with torch.inference_mode():
        expected = theirs.model.get_image_features(pixel_values=given["pixel_values"]).pooler_output
    counts = [int(count) for count in given["num_patches"]]
    wanted = [each.reshape(-1, 64).numpy() for each in expected.split(counts)]
    asked = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(asks(kind))
    _, images = require_same_embeddings(folder, asked, PICTURES, wanted, eager=eager, most=64)
    assert [len(image.sizes) for image in images] == counts


@combined(
    "kind eager tokens", KINDS, (True, False), (512, 23),
    common=[("command", False, 23), ("aya", False, 512), ("aya 32B", True, 23)], indirect=["kind"],
)  # fmt: skip
def test_logits_are_those_of_transformers(
    tokens: int, eager: bool, kind: str, folder: Path, theirs: Any, tiled: Any
) -> None:
    """Times the scale of the text model's own class, which the class with images leaves out."""
    pixels, scale = their_tiles(kind, tiled, PICTURES[:2])["pixel_values"], KINDS[kind][1]["logit_scale"]

    def wanted(ids: torch.Tensor) -> torch.Tensor:
        return (theirs(input_ids=ids, pixel_values=pixels).logits[0] * scale).log_softmax(-1)

    require_logits(folder, prompts(kind)[0], wanted, eager=eager, tokens=tokens)


@pytest.fixture(scope="module")
def alone(kind: str, folder: Path) -> list[tuple[int, ...]]:
    return answers_alone(folder, prompts(kind))


@combined("kind tokens", KINDS, (512, 64, 31, 23, 17, 13, 11, 9), common=[("command", 11)], indirect=["kind"])
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(
    tokens: int, kind: str, folder: Path, alone: list[tuple[int, ...]]
) -> None:
    require_same_in_steps(folder, prompts(kind), alone, tokens)


@pytest.mark.every_case
@pytest.mark.parametrize("how", GPU_STEPS)
def test_steps_of_a_gpu_have_the_same_answers(how: str, kind: str, folder: Path) -> None:
    given = prompts(kind)
    asked = [(given[0]["prompt"], PICTURES[:2]), ("Nothing to see.", []), (given[2]["prompt"], PICTURES[3:4])]
    require_same_on_a_gpu(folder, asked, how)


@pytest.mark.parametrize("kind", few(KINDS, "command"), indirect=True)
def test_a_template_writes_the_mark_of_an_image(folder: Path) -> None:
    content: Any = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "What is this?"}]
    with InferenceEngine(folder) as engine:
        output = engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=1), use_tqdm=False)
    ids = list(output.prompt_token_ids)
    assert (ids.count(START), ids.count(END), ids.count(PAD) % 4) == (1, 1, 0)


def test_a_template_writes_the_mark_for_a_text_that_is_no_token(tmp_path: Path) -> None:
    """The tokenizers of published models have no token `<image>`, which transformers replaces in the text."""
    folder = write(tmp_path, "aya")
    write_tokenizer(folder, (*MARKS, "<|IMG_LINE_BREAK|>"), TEMPLATE.replace("ASKS", "<image>"))
    content: Any = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "What is an <image>?"}]
    with InferenceEngine(folder) as engine:
        output = engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=1), use_tqdm=False)
        asked = {"prompt": "<|IMG_PATCH|>What is this?", "multi_modal_data": {"image": PICTURES[:1]}}
        (other,) = engine.generate([asked], SamplingParams(max_tokens=1), use_tqdm=False)
    for ids in (list(output.prompt_token_ids), list(other.prompt_token_ids)):
        assert (ids.count(START), ids.count(END), ids.count(PAD) % 4) == (1, 1, 0)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "part", "said", "why"),
    [
        ("command", None, {"alignment_intermediate_size": 41}, "alignment_intermediate_size is 41, not an even number"),
        ("command", None, {"downsample_factor": 3}, "3 x 3 of which are one embedding"),
        ("command", "vision_config", {"num_channels": 1}, "num_channels is 1; implemented: 3"),
        ("command", "images", {"patch_size": 16}, "patch_size is 16; a tile has 2 x 2 embeddings"),
        ("command", "images", {"max_patches": 65}, "max_patches"),
        ("aya", None, {"vision_feature_layer": -2}, "vision_feature_layer is -2; implemented: -1"),
        ("aya", None, {"vision_feature_select_strategy": "default"}, "is 'default'; implemented: full"),
        ("aya", None, {"adapter_layer_norm_eps": 0.0}, "adapter_layer_norm_eps is 0.0, not between 0 and 1"),
        ("aya", "images", {"min_patches": 5}, "min_patches is 5, more than max_patches, 4"),
    ],
    indirect=["kind"],
)
def test_configs_that_do_not_fit_are_named(
    kind: str, part: str | None, said: dict[str, Any], why: str, folder: Path
) -> None:
    config, images = json.loads((folder / "config.json").read_text()), IMAGES
    images = IMAGES | said if part == "images" else IMAGES
    if part != "images":
        (config if part is None else config[part]).update(said)
    family = tower_family(config)
    assert family is not None
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=why):
        family.config_from_hf(Fields(config, folder), Fields(images, folder), 64, {})


@pytest.mark.parametrize("kind", few(KINDS, "command"), indirect=True)
def test_settings_of_an_operator_are_checked(folder: Path) -> None:
    for said in ({"max_patches": 65}, {"min_patches": 5}):  # Command A Vision has no min_patches
        with pytest.raises(ConfigError, match=f"^mm_processor_kwargs: '?{next(iter(said))}"):
            loaded_from(folder, mm_processor_kwargs=said)


@pytest.mark.parametrize("kind", few(KINDS, "command", "aya"), indirect=True)
def test_names_of_published_checkpoints_are_read(
    kind: str, folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        name = name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")
        if name.startswith("language_model.") and not name.startswith(("language_model.model.", "language_model.lm_")):
            name = name.replace("language_model.", "language_model.model.")
        renamed[name] = tensor
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    with InferenceEngine(tmp_path) as engine:
        assert answers(engine, prompts(kind)) == alone


PUBLISHED: dict[str, dict[str, Any]] = {
    "command": {
        "architectures": ["Cohere2VisionForConditionalGeneration"], "model_type": "cohere2_vision",
        "alignment_intermediate_size": 36864, "downsample_factor": 2, "image_token_id": 255036,
        "text_config": {
            "model_type": "cohere2", "hidden_size": 12288, "intermediate_size": 36864, "num_hidden_layers": 64,
            "num_attention_heads": 96, "num_key_value_heads": 8, "sliding_window": 4096, "rope_theta": 50000,
            "max_position_embeddings": 131072, "logit_scale": 0.25, "vocab_size": 256000,
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 512, "intermediate_size": 4304,
            "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 16,
        },
    },
    "aya": {
        "architectures": ["AyaVisionForConditionalGeneration"], "model_type": "aya_vision",
        "alignment_intermediate_size": 28672, "adapter_layer_norm_eps": 1e-06, "downsample_factor": 2,
        "image_token_index": 255036, "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        "text_config": {
            "model_type": "cohere2", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096, "rope_theta": 50000,
            "logit_scale": 0.25,
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 364, "intermediate_size": 4304,
            "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
        },
    },
}  # fmt: skip
"""Keys of published models, as far as known; the others have the defaults of transformers."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    said, path = PUBLISHED[name], Path("config.json")
    family, size = tower_family(said), said["vision_config"]["image_size"]
    assert family is not None
    images = Fields({"size": {"height": size, "width": size}}, path)
    tower: Any = family.config_from_hf(Fields(said, path), images, said["text_config"]["hidden_size"], {})
    assert (tower.hidden_size, tower.num_layers, tower.cell) == (1152, 27, 2)
    assert tower.projected == said["alignment_intermediate_size"]
    cut = tower.rule.cut(480, 640)
    words = family.words_around(cut, cut.cells(tower.cell_pixels))
    assert words.count("<|IMG_PATCH|>") == {"command": 3 * 256, "aya": 13 * 169}[name]
    _, text = family_from_hf(said, path)
    theirs = AutoConfig.for_model(**{key: value for key, value in said.items() if key != "architectures"}).text_config
    assert (text.vocab_size, text.max_position) == (theirs.vocab_size, theirs.max_position_embeddings)
    assert (text.norm_eps, text.num_kv_heads) == (theirs.layer_norm_eps, theirs.num_key_value_heads)
    assert text.tie_embeddings == theirs.tie_word_embeddings
    windows = [4096 if kind == "sliding_attention" else None for kind in theirs.layer_types]
    assert list(text.sliding_windows) == windows
