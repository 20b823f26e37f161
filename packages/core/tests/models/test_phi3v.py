# SPDX-License-Identifier: MIT
"""Phi-3.5-vision of random weights: tiles, embeddings, logits, prompts, and the published config.

transformers has no class of it. The reference is CLIP and Phi-3 of transformers, joined as vLLM's `phi3v.py` does it,
and images are prepared as by `image_processing_phi3_v.py` of the published models.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, Phi3Config, Phi3ForCausalLM

from candle_vllm.core import InferenceEngine
from candle_vllm.core.errors import CandleVllmError, InvalidFileError, InvalidParameterError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models.phi3v_rule import shrunk
from candle_vllm.core.models.phi3v_tower import FAMILY
from candle_vllm.core.models.registry import family_from_hf, tower_family
from candle_vllm.core.vision.pictures import picture_of
from packages.core.tests.models.sight import (
    GPU_STEPS,
    answers,
    answers_alone,
    loaded_from,
    random_pictures,
    require_embeddings,
    require_logits,
    require_same_on_a_gpu,
    require_same_when_cached,
    write_tokenizer,
)
from packages.core.tests.models.tiny import SMALL, randomise
from tests.common_run import few

PAD, TILE = 262, 16
MARKS = ("<s>", "<|end|>", "<|image|>", "<|user|>")
TEMPLATE = (  # as it is published
    "{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{- '<|assistant|>\n' -}}"
    "{% endif %}"
)
ONE = "<|image|><s>\n"
ASK = f"<s><|user|>\n{ONE}{ONE}Compare these.<|end|>\n<|assistant|>\n"
PICTURES = random_pictures((30, 47), (41, 17), (5, 5), (9, 60))
"""Grids of 2 x 3 tiles, 3 x 2, 2 x 2 and 1 x 4: the last tile is shrunk by even and odd factors on both axes."""
PROMPTS: list[Any] = [
    {"prompt": ASK, "multi_modal_data": {"image": PICTURES[:2]}},
    {"prompt": ASK, "multi_modal_data": {"image": [PICTURES[2], PICTURES[2]]}},
    {"prompt": f"<s><|user|>\n{ONE}What is this?", "multi_modal_data": {"image": [PICTURES[3]]}},
    "<s><|user|>\nCompare nothing.<|end|>\n",
]
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4,
    "image_size": TILE, "projection_dim": 8,
}  # fmt: skip
ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 1.5 * i for i in range(8)],
}  # fmt: skip
LAYOUT = {
    "embedding_cls": "image", "hd_transform_order": "sub_glb", "projection_cls": "mlp", "use_hd_transform": True,
    "with_learnable_separator": True,
}  # fmt: skip
PROCESSOR = {
    "num_crops": 6, "num_img_tokens": 4, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711], "image_processor_type": "Phi3VImageProcessor",
}  # fmt: skip


def their_pixels(picture: NDArray[np.uint8], tile: int = TILE, crops: int = 6) -> tuple[torch.Tensor, int, int]:
    """The tile of the whole image and those of the grid [1 + N, 3, tile, tile], and the grid's rows and columns."""
    image = Image.fromarray(picture)
    if tall := image.width < image.height:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    ratio, scale = image.width / image.height, 1
    while scale * np.ceil(scale / ratio) <= crops:
        scale += 1
    wide = int((scale - 1) * tile)
    image = image.resize((wide, int(wide / ratio)), Image.Resampling.BILINEAR)
    full = int(np.ceil(image.height / tile) * tile)
    top = int((full - image.height) / 2)
    image = ImageOps.expand(image, (0, top, 0, full - image.height - top), (255, 255, 255))
    if tall:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)
    mean, std = (torch.tensor(PROCESSOR[key])[:, None, None] for key in ("image_mean", "image_std"))
    values = (values - mean) / std
    whole = torch.nn.functional.interpolate(values[None], size=(tile, tile), mode="bicubic")
    rows, columns = values.shape[1] // tile, values.shape[2] // tile
    parts = values.reshape(3, rows, tile, columns, tile).permute(1, 3, 0, 2, 4).reshape(-1, 3, tile, tile)
    return torch.cat([whole, parts]), rows, columns


class Theirs:
    """The model by transformers' layers; `layer` of the encoder's hidden states is used."""

    def __init__(self, layer: int = -2) -> None:
        torch.manual_seed(0)
        self.layer = layer
        self.tower = CLIPVisionModel(CLIPVisionConfig(**VISION | {"attn_implementation": "eager"})).eval()
        self.project = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        text: dict[str, Any] = {**SMALL, "rope_parameters": ROPE, "original_max_position_embeddings": 48}
        self.text = Phi3ForCausalLM._from_config(Phi3Config(**text), attn_implementation="eager").eval()
        for each in (self.tower, self.project, self.text):
            randomise(each)
        with torch.no_grad():  # embeddings of pictures as long as those of words
            list(self.project.parameters())[2].mul_(6)
        self.newline, self.separator = torch.randn(1, 1, 1, 128), torch.randn(1, 1, 128)

    def image(self, picture: NDArray[np.uint8]) -> torch.Tensor:
        tiles, rows, columns = their_pixels(picture)
        with torch.inference_mode():
            hidden = self.tower(tiles, output_hidden_states=True).hidden_states[self.layer][:, 1:]
            side = TILE // 8
            cells = hidden.reshape(-1, side, 2, side, 2, 32).permute(0, 1, 3, 2, 4, 5).reshape(-1, side, side, 128)
            grid = cells[1:].reshape(rows, columns, side, side, 128).transpose(1, 2)
            lines = [
                torch.cat([each, self.newline[0].expand(len(each), 1, 128)], 1).flatten(0, 1)
                for each in (grid.reshape(rows * side, columns * side, 128), cells[0])
            ]
            return self.project(torch.cat([lines[0], self.separator[0], lines[1]]))

    def logits(self, ids: list[int], pictures: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        with torch.inference_mode():
            rows = self.text.get_input_embeddings()(torch.tensor([ids]))
            rows[0, torch.tensor(ids) == PAD] = torch.cat([self.image(each) for each in pictures])
            return self.text(inputs_embeds=rows).logits[0].log_softmax(-1).numpy()


def write(folder: Path, theirs: Theirs | None = None, **own: Any) -> Path:
    theirs = theirs or Theirs()
    theirs.text.save_pretrained(folder)
    at, tensors = "model.vision_embed_tokens.", load_file(folder / "model.safetensors")
    tensors |= {f"{at}sub_GN": theirs.newline, f"{at}glb_GN": theirs.separator}
    tensors |= {f"{at}img_projection.{name}": tensor for name, tensor in theirs.project.state_dict().items()}
    for name, tensor in theirs.tower.state_dict().items():
        name = name.removeprefix("vision_model.")
        tensors[f"{at}img_processor.vision_model.{name}"] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["Phi3VForCausalLM"], "model_type": "phi3_v", "embd_layer": LAYOUT}
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["rope_scaling"] = {"type": "su", **{key: ROPE[key] for key in ("short_factor", "long_factor")}}
    processor = {"name": "clip_vision_model", "image_dim_out": 32, "num_img_tokens": 4, "layer_idx": theirs.layer}
    config |= {"img_processor": {"model_name": "openai/clip-vit-large-patch14-336", **processor}}
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": VISION} | own))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    write_tokenizer(folder, MARKS, TEMPLATE)
    said = json.loads((folder / "tokenizer_config.json").read_text()) | {"bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def theirs() -> Theirs:
    return Theirs()


@pytest.fixture(scope="module")
def folder(theirs: Theirs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("phi3v"), theirs)


# ---- images ----------------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, Any] = {
    "architectures": ["Phi3VForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "embd_layer": LAYOUT,
    "embd_pdrop": 0.0, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 3072,
    "img_processor": {
        "image_dim_out": 1024, "model_name": "openai/clip-vit-large-patch14-336", "name": "clip_vision_model",
        "num_img_tokens": 144,
    },
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "model_type": "phi3_v",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.05] * 48, "type": "su"}, "rope_theta": 10000.0,
    "sliding_window": 262144, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
    "vocab_size": 32064,
}  # fmt: skip
EDGES = (
    (640, 480), (1920, 1080), (336, 336), (337, 336), (1000, 1000), (4000, 3000), (20, 20), (3, 2), (300, 10),
    (10, 300), (14, 2100), (2100, 14), (1000, 500), (672, 336), (1, 1), (1, 200), (5377, 336), (335, 5376),
)  # fmt: skip
"""Widths and heights."""
PATH = Path("config.json")


def config_of(said: dict[str, Any] | None = None, processor: Any = None, **own: Any) -> Any:
    return FAMILY.config_from_hf(Fields(PUBLISHED | own, PATH), Fields(processor or {}, PATH), 3072, said or {})


@pytest.mark.parametrize("crops", [16, 4, 1])
def test_images_have_the_placeholders_of_the_published_processor(crops: int) -> None:
    config = config_of({"num_crops": crops})
    for width, height in EDGES:
        wide, high = sorted((width, height), reverse=True)
        scale = max(each for each in range(1, crops + 1) if each * math.ceil(each / (wide / high)) <= crops)
        sides = scale, math.ceil(int(scale * 336 / (wide / high)) / 336)
        columns, rows = sides if width >= height else sides[::-1]
        cut = config.rule.cut(height, width)
        assert (cut.rows, cut.columns) == (rows, columns)
        count = (rows * columns + 1) * 144 + 1 + (rows + 1) * 12
        assert FAMILY.words_around(cut, cut.cells(28)) == "<|image|>" * count, (width, height)
        assert cut.tiles <= config.tiles
    with pytest.raises(InvalidParameterError, match="200 times the other"):
        config.rule.cut(1, 201)


def test_tiles_are_those_of_the_published_processor(folder: Path) -> None:
    """To the bit, and the shrunk tile of the whole image to the rounding of floats."""
    values = json.loads((folder / "config.json").read_text())
    for crops in (1, 3, 6, 16):
        config = FAMILY.config_from_hf(Fields(values, PATH), Fields(PROCESSOR, PATH), 64, {"num_crops": crops})
        for picture in (*PICTURES, *random_pictures((1, 1))):
            wanted, rows, columns = their_pixels(picture, crops=crops)
            *tiles, whole = config.rule.tiles(picture_of(picture))
            assert whole.shape == (rows * TILE, columns * TILE, 3)
            ours = config.rule.normalisation.table[np.stack(tiles), np.arange(3)].transpose(0, 3, 1, 2)
            assert np.abs(wanted[1:].numpy() - ours).max() < 1e-6
            read = config.read(whole)
            found = wanted[0].unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4).reshape(4, 4, 48)
            theirs = found.numpy()[tuple(read.places[:-1].T)]
            assert np.abs(read.patches()[:-1] - theirs).max() < 2e-6
            assert (read.grid, len(read.places), config.count(whole)) == ((4, 4), 17, 4)
        assert config.rule.tiles(picture_of(np.zeros((200, 1, 3), np.uint8)))[-1].shape == (crops * TILE, TILE, 3)


def test_a_shrunk_image_is_torchs() -> None:
    """Of every factor."""
    for rows in range(1, 17):
        (pixels,) = random_pictures((rows * 6, (17 - rows) * 6))
        values = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        wanted = torch.nn.functional.interpolate(values, size=(6, 6), mode="bicubic")[0].permute(1, 2, 0)
        assert np.abs(shrunk(pixels, 6) - wanted.numpy()).max() < 1e-3


# ---- embeddings and answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eager", "layer"), few([(e, n) for e in (True, False) for n in (-2, -1, -3)], (False, -2)))
def test_embeddings_are_those_of_the_reference(
    eager: bool, layer: int, folder: Path, theirs: Theirs, tmp_path: Path
) -> None:
    if layer != -2:
        theirs = Theirs(layer)
        folder = write(tmp_path / "other", theirs)
    loaded = loaded_from(folder, op_by_op=eager)
    assert loaded.tower is not None
    images = loaded.tower.vision.look([PAD] * len(PICTURES), PICTURES)[1]
    require_embeddings(loaded, images, [theirs.image(each).numpy() for each in PICTURES], eager=eager, most=64)


@pytest.mark.parametrize(("eager", "tokens"), few([(e, t) for e in (True, False) for t in (512, 23)], (True, 23)))
def test_logits_are_those_of_the_reference(tokens: int, eager: bool, folder: Path, theirs: Theirs) -> None:
    require_logits(
        folder, PROMPTS[0], lambda ids: theirs.logits(ids[0].tolist(), PICTURES[:2]), eager=eager, tokens=tokens
    )


@pytest.mark.parametrize("tokens", few([512, 17], 17))
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(tokens: int, folder: Path) -> None:
    alone = answers_alone(folder, PROMPTS)
    with InferenceEngine(folder, max_num_batched_tokens=tokens, max_num_seqs=8) as engine:
        require_same_when_cached(engine, PROMPTS, alone)


@pytest.mark.parametrize("how", few(GPU_STEPS, "captured"))
def test_steps_of_a_gpu_have_the_same_answers(folder: Path, how: str) -> None:
    """By the references of its kernels."""
    asked = [(f"{ONE}{ONE}Compare.", PICTURES[1:3]), ("Nothing to see.", []), (f"{ONE}What is this?", PICTURES[3:])]
    require_same_on_a_gpu(folder, asked, how)


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_images_stand_before_the_texts_of_their_message(folder: Path) -> None:
    """As in vLLM; `<s>` follows each, as the published processor tokenizes the texts between images one by one."""
    image, other = {"type": "image", "image": PICTURES[2]}, {"type": "image", "image": PICTURES[3]}
    texts = [{"type": "text", "text": text} for text in ("Compare", "these.")]
    said: list[Any] = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [texts[0], image, texts[1], other]},
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": [image]},
    ]
    wanted = f"<s><|system|>\nLook.<|end|>\n<|user|>\n{ONE}{ONE}Compare\nthese.<|end|>\n<|assistant|>\nDone.<|end|>\n"
    wanted += f"<|user|>\n{ONE}<|end|>\n<|assistant|>\n"
    with InferenceEngine(folder, max_num_seqs=4) as engine:
        assert engine.apply_chat_template(said) == wanted
        ids = engine.tokenize(wanted, add_special_tokens=False)
        made, images = engine.look(ids, [PICTURES[2], PICTURES[3], PICTURES[2]])
        counts = [len(Theirs().image(PICTURES[n])) for n in (2, 3, 2)]
        assert [made.count(PAD), len(images)] == [sum(counts), 3]
        first = made.index(PAD)
        assert made[first + counts[0] : first + counts[0] + 2] == engine.tokenize("<s>\n", add_special_tokens=False)
        assert engine.apply_chat_template(said[:1]) == "<s><|system|>\nLook.<|end|>\n<|assistant|>\n"
        with pytest.raises(InvalidParameterError, match="2 images, and 1 placeholders"):
            engine.generate([{"prompt": ONE, "multi_modal_data": {"image": PICTURES[:2]}}])


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_published_config_is_read() -> None:
    assert tower_family(PUBLISHED) is FAMILY
    tower = config_of(processor={"num_crops": 16, "num_img_tokens": 144})
    assert (tower.hidden_size, tower.num_layers, tower.side, tower.cell, tower.tiles) == (1024, 23, 24, 2, 17)
    assert (tower.rule.resample, tower.activation) == (2, "quick_gelu")
    family, text = family_from_hf(PUBLISHED, PATH)
    assert (family.hf.get("Phi3ForCausalLM"), text.hidden_size, text.rope.kind) == ("phi3", 3072, "longrope")


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("embd_layer", "hd_transform_order", "glb_sub"), ("embd_layer", "use_hd_transform", False),
        ("embd_layer", "with_learnable_separator", None), ("embd_layer", "projection_cls", "linear"),
        ("embd_layer", "embedding_cls", "image_audio"), ("img_processor", "name", "siglip"),
        ("img_processor", "model_name", "openai/clip-vit-base-patch32"), ("img_processor", "layer_idx", 3),
        ("img_processor", "type_feature", "cls_patch"), ("img_processor", "image_dim_out", 768),
        ("img_processor", "num_img_tokens", 256),
    ],
)  # fmt: skip
def test_other_towers_are_refused(section: str, key: str, value: Any) -> None:
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=key):
        config_of(**{section: {**PUBLISHED[section], key: value}})


@pytest.mark.parametrize("processor", [{"num_crops": 0}, {"num_crops": 65}, {"num_img_tokens": 100}])
def test_other_processors_are_refused(processor: dict[str, Any]) -> None:
    with pytest.raises(InvalidFileError, match=next(iter(processor))):
        config_of(processor=processor)


def test_a_file_may_have_the_embeddings_twice_and_must_have_the_vectors(
    folder: Path, theirs: Theirs, tmp_path: Path
) -> None:
    """Under the name that the published class has for them in its vision encoder, too."""
    other = write(tmp_path / "other", theirs)
    stored = load_file(other / "model.safetensors")
    twice = {"model.vision_embed_tokens.wte.weight": stored["model.embed_tokens.weight"].clone()}
    save_file(stored | twice, other / "model.safetensors", {"format": "pt"})
    with InferenceEngine(other) as engine, InferenceEngine(folder) as same:
        assert answers(engine, PROMPTS[2:3]) == answers(same, PROMPTS[2:3])
    for name in ("glb_GN", "img_projection.2.bias", "img_processor.vision_model.embeddings.class_embedding"):
        kept = {key: each for key, each in stored.items() if not key.endswith(name)}
        save_file(kept, other / "model.safetensors", {"format": "pt"})
        with pytest.raises(CandleVllmError, match=name):
            loaded_from(other)
