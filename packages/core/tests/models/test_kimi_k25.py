# SPDX-License-Identifier: MIT
"""Kimi K2.5 of random weights: its vision encoder and logits against transformers, files, sizes and prompts."""

from __future__ import annotations

import ast
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from candle_vllm.core.errors import ConfigError, InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.models import kimi_tower
from packages.core.tests.models.families import DEEPSEEK
from packages.core.tests.models.sight import (
    GPU_STEPS,
    PICTURES,
    TEMPLATE,
    answers_alone,
    answers_of,
    loaded_from,
    model_of,
    random_model,
    require_logits,
    require_nearly_same_when_quantised,
    require_same_embeddings,
    require_same_from_gguf,
    require_same_in_steps,
    require_same_on_a_gpu,
    write_tokenizer,
    write_tower,
)
from packages.core.tests.models.tiny import SMALL
from tests.common_run import combined, few

Pixels = dict[str, torch.Tensor]
PAD = 262
MARKS = ("<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>")
ONE = f"{MARKS[0]}image{MARKS[1]}{MARKS[2]}{MARKS[3]}"
ASK = f"<|im_start|>user\n{ONE}Compare this with {ONE}, please.<|im_end|>\n<|im_start|>assistant\n"
PROMPTS: list[Any] = [
    {"prompt": ASK, "multi_modal_data": {"image": PICTURES[:2]}},
    {"prompt": ASK, "multi_modal_data": {"image": [PICTURES[2], PICTURES[2]]}},
    {"prompt": f"{ONE}What is this?", "multi_modal_data": {"image": [PICTURES[3]]}},
    "<|im_start|>user\nCompare nothing.<|im_end|>\n",
]
TOWER: dict[str, Any] = {
    "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48,
    "pos_emb_height": 7, "pos_emb_width": 7, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "usual": {},
    "other": {"hidden_act": "gelu", "rope_parameters": {"rope_type": "axial", "rope_theta": 300.0}},
}
PROCESSOR: dict[str, Any] = {
    "max_patches": 60, "size": {"max_height": 18, "max_width": 18}, "patch_size": 4, "merge_size": 2,
    "image_mean": [0.5, 0.4, 0.6], "image_std": [0.5, 0.6, 0.4],
}  # fmt: skip


def as_published(name: str) -> str:
    """transformers writes some tensors under other names than it reads in published files."""
    name = name.replace("language_model.model.blocks.", "language_model.model.layers.")
    return name.replace("encoder.patch_embed.", "patch_embed.").replace("model.mm_projector.", "mm_projector.")


def save_random(config: Any, folder: Path) -> Any:
    """Save a random model, and return it."""
    model = random_model(config)
    with torch.no_grad():  # as far apart as embedded patches
        model.model.vision_tower.patch_embed.pos_emb.position_embeddings.normal_()
    model.save_pretrained(folder)
    return model


def write(folder: Path, kind: str = "usual", **vision: Any) -> Path:
    config = AutoConfig.for_model(
        "kimi_k25",
        text_config=dict(SMALL) | {"model_type": "deepseek_v3"} | DEEPSEEK,
        vision_config=TOWER | KINDS[kind] | vision,
        projection_hidden_size=32, projection_layer_norm_eps=1e-3, image_token_id=PAD, video_token_id=271,
        tie_word_embeddings=False,
    )  # fmt: skip
    save_random(config, folder)
    stored = load_file(folder / "model.safetensors")
    made = {as_published(name): each for name, each in stored.items()}
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    write_tokenizer(folder, MARKS, TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", ONE))
    return folder


@pytest.fixture(scope="module", params=few(KINDS, "usual"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return model_of(folder)


def navit_resize() -> Any:
    """The function of transformers' processor, whose module needs torchvision."""
    file = Path(transformers.__file__).parent / "models/kimi_k25/image_processing_kimi_k25.py"
    found = next(each for each in ast.parse(file.read_text()).body if getattr(each, "name", "") == "navit_resize")
    names: dict[str, Any] = {"math": math}
    exec(compile(ast.Module([found], []), str(file), "exec"), names)
    return names["navit_resize"]


def patches_of(pictures: list[NDArray[np.uint8]], size: Callable[[int, int], tuple[int, int, int, int]]) -> Pixels:
    """As their processors make them, with Pillow's filter; `size` gives an image's height and width in a canvas, and
    those of the canvas."""
    patches, grids = list[NDArray[np.float32]](), list[list[int]]()
    for picture in pictures:
        high, wide, rows, columns = size(*picture.shape[:2])
        canvas = np.zeros((rows, columns, 3), np.uint8)
        canvas[:high, :wide] = np.asarray(Image.fromarray(picture).resize((wide, high), Image.Resampling.BICUBIC))
        values = (canvas.astype(np.float32) / 255 - PROCESSOR["image_mean"]) / PROCESSOR["image_std"]
        parts = values.reshape(rows // 4, 4, columns // 4, 4, 3).transpose(0, 2, 4, 1, 3)
        patches.append(parts.reshape(-1, 3, 4, 4).astype(np.float32))
        grids.append([1, rows // 4, columns // 4])
    return {"pixel_values": torch.from_numpy(np.concatenate(patches)), "image_grid_thw": torch.tensor(grids)}


def require_same_as_transformers(folder: Path, theirs: Any, pixels: Pixels, prompt: Any, **how: Any) -> None:
    """Require the logits of a prompt with images."""

    def wanted(ids: torch.Tensor) -> torch.Tensor:
        return theirs(input_ids=ids, **pixels).logits[0].log_softmax(-1)

    require_logits(folder, prompt, wanted, **how)


def their_pixels(pictures: list[NDArray[np.uint8]]) -> Pixels:
    def size(height: int, width: int) -> tuple[int, int, int, int]:
        (high, wide), (rows, columns) = navit_resize()(height, width, 4, 2, 60, 18)
        return high, wide, rows, columns

    return patches_of(pictures, size)


@pytest.mark.parametrize("eager", few([True, False], False))
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    with torch.inference_mode():
        expected = theirs.model.get_image_features(**their_pixels(PICTURES)).pooler_output
    require_same_embeddings(folder, PAD, PICTURES, expected, eager=eager, most=24)


@combined("eager tokens", (True, False), (512, 23), common=[(False, 23)])
def test_logits_are_those_of_transformers(tokens: int, eager: bool, folder: Path, theirs: Any) -> None:
    require_same_as_transformers(folder, theirs, their_pixels(PICTURES[:2]), PROMPTS[0], eager=eager, tokens=tokens)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[tuple[int, ...]]:
    return answers_alone(folder, PROMPTS)


@pytest.mark.parametrize("tokens", few([512, 17], 17))
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(
    tokens: int, folder: Path, alone: list[tuple[int, ...]]
) -> None:
    require_same_in_steps(folder, PROMPTS, alone, tokens)


@pytest.mark.every_case
@pytest.mark.parametrize("how", GPU_STEPS)
def test_steps_of_a_gpu_have_the_same_answers(how: str, folder: Path) -> None:
    asked = [(ASK, PICTURES[:2]), ("Nothing to see.", []), (f"{ONE}What is this?", PICTURES[3:])]
    require_same_on_a_gpu(folder, asked, how)


VISION_NAMES = {
    r"^vision_tower\.encoder\.blocks\.": "model.vision_tower.layers.",
    r"^vision_tower\.(encoder\.)?": "model.vision_tower.",
    r"(\d)\.norm1\.": r"\1.norm2.",
    r"(\d)\.norm0\.": r"\1.norm1.",
    r"(vision_tower.*)mlp\.fc1\.": r"\1mlp.fc2.",
    r"(vision_tower.*)mlp\.fc0\.": r"\1mlp.fc1.",
    r"(vision_tower.*)\.wo\.": r"\1.attn.proj.",
    r"^mm_projector\.proj\.0\.": "model.mm_projector.in_proj.",
    r"^mm_projector\.proj\.2\.": "model.mm_projector.out_proj.",
    r"^mm_projector\.": "model.mm_projector.",
    r"pos_emb\.weight$": "pos_emb.position_embeddings",
}
"""The names of tensors in transformers' modules, by those in published files."""


def renamed(name: str) -> str:
    for pattern, known in VISION_NAMES.items():
        name = re.sub(pattern, known, name)
    return name


@pytest.mark.parametrize("folder", ["usual"], indirect=True)
def test_names_may_be_those_of_modules(folder: Path, tmp_path: Path, theirs: Any, alone: list[tuple[int, ...]]) -> None:
    stored = load_file(folder / "model.safetensors")
    assert any(name.endswith("blocks.0.wqkv.weight") for name in stored)
    of_modules = {name: each for name, each in theirs.state_dict().items() if "language_model" not in name}
    other = shutil.copytree(folder, tmp_path / "other")
    made = {renamed(name): each for name, each in stored.items() if "wqkv" not in name}
    made |= {name: each.contiguous() for name, each in of_modules.items() if re.search(r"attn\.[qkv]_proj", name)}
    assert {name for name in made if "language_model" not in name} == of_modules.keys() - {"lm_head.weight"}
    made["model.vision_tower.patch_embed.pos_emb.time_weight"] = torch.zeros(4, 1, 32)
    save_file(made, other / "model.safetensors", {"format": "pt"})
    assert answers_of(other, PROMPTS) == alone
    made = {name.replace("r.patch_embed.proj", "r.encoder.patch_embed.proj"): each for name, each in stored.items()}
    save_file(made, other / "model.safetensors", {"format": "pt"})
    assert answers_of(other, PROMPTS) == alone


@pytest.mark.parametrize("folder", ["usual"], indirect=True)
def test_published_files_have_keys_of_their_own(folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]) -> None:
    made = shutil.copytree(folder, tmp_path / "made")
    config = read_json(folder / "config.json")
    config["architectures"] = ["KimiK25ForConditionalGeneration"]
    config["vision_config"] = {
        "vt_num_hidden_layers": 3, "vt_num_attention_heads": 2, "patch_size": 4, "vt_hidden_size": 32,
        "vt_intermediate_size": 48, "init_pos_emb_height": 7, "init_pos_emb_width": 7, "init_pos_emb_time": 4,
        "merge_kernel_size": [2, 2], "merge_type": "sd2_tpool", "mm_hidden_size": 32, "text_hidden_size": 64,
        "mm_projector_type": "patchmerger", "pos_emb_type": "divided_fixed", "projector_hidden_act": "gelu",
        "projector_ln_eps": 1e-3, "video_attn_type": "spatial_temporal",
    }  # fmt: skip
    del config["projection_layer_norm_eps"], config["projection_hidden_size"]
    config["text_config"]["model_type"] = "kimi_k2"
    (made / "config.json").write_text(json.dumps(config))
    media = {
        "in_patch_limit": 60, "patch_limit_on_one_side": 18, "patch_size": 4, "merge_kernel_size": 2,
        "fixed_output_tokens": None, "image_mean": PROCESSOR["image_mean"], "image_std": PROCESSOR["image_std"],
    }  # fmt: skip
    (made / "preprocessor_config.json").write_text(json.dumps({"media_proc_cfg": media}))
    assert answers_of(made, PROMPTS) == alone


PATH = Path("config.json")


def tower_of(config: dict[str, Any], processor: dict[str, Any], **said: Any) -> Any:
    return kimi_tower.FAMILY.config_from_hf(Fields(config, PATH), Fields(processor, PATH), 7168, said)


@pytest.mark.parametrize(
    "size",
    [(640, 480), (1920, 1080), (20, 20), (10, 300), (300, 10), (27, 5000), (28, 28), (4000, 3000), (3, 500),
     (9000, 30), (30, 9000), (7169, 2000), (1, 1), (1800, 1805)],
)  # fmt: skip
def test_images_have_the_sizes_of_transformers(size: tuple[int, int]) -> None:
    for most, side in ((16384, 512), (400, 512), (16384, 33)):
        processor = {"max_patches": most, "size": {"max_height": side, "max_width": side}}
        tower, (wide, high) = tower_of({}, processor), size
        cut = tower.rule.cut(high, wide)
        assert (cut.height, cut.width) == navit_resize()(high, wide, 14, 2, most, side)[1]
        assert tower.patches >= cut.height * cut.width // 14**2
        assert 14 * tower.side >= max(cut.height, cut.width)


def test_published_configs_are_read() -> None:
    found = tower_of({"vision_config": {"vt_hidden_size": 1152, "model_type": ""}}, {"media_proc_cfg": {}})
    assert (found.hidden_size, found.num_layers, found.learned, found.norm_eps) == (1152, 27, 64, 1e-5)
    assert (found.rule.patches, found.rule.longest, found.rule.cell) == (16384, 512 * 14, 28)
    assert tower_of({}, {}, max_patches=256).rule.patches == 256


@pytest.mark.parametrize(
    ("vision", "said"),
    [({"merge_type": "sd2"}, "merge_type"), ({"pos_emb_type": "learned"}, "pos_emb_type"),
     ({"mm_projector_type": "patchmergerv2"}, "mm_projector_type"), ({"hidden_act": "silu"}, "hidden_act"),
     ({"pos_emb_width": 32}, "64 x 32 positions"), ({"merge_kernel_size": [2, 1]}, "merge_kernel_size"),
     ({"mm_hidden_size": 1024}, "mm_hidden_size"), ({"qkv_hidden_size": 1536}, "qkv_hidden_size"),
     ({"text_hidden_size": 4096}, "text_hidden_size"), ({"rope_parameters": {"rope_type": "default"}}, "rope_type"),
     ({"rope_parameters": {"rope_theta": 0.5}}, "rotary base 0.5"), ({"num_attention_heads": 576}, "head size 2"),
     ({"projector_ln_eps": 2.0}, "epsilon of the projection"), ({"pos_emb_height": 5000}, "pos_emb_height")],
)  # fmt: skip
def test_other_towers_are_refused(vision: dict[str, Any], said: str) -> None:
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=said):
        tower_of({"vision_config": vision}, {})


@pytest.mark.parametrize(
    ("processor", "said"),
    [({"media_proc_cfg": {"fixed_output_tokens": 256}}, "fixed_output_tokens"), ({"merge_size": 4}, "merge_size"),
     ({"size": {"max_height": 512, "max_width": 256}}, "max_width of 256"), ({"patch_size": 16}, "patch_size"),
     ({"size": {"max_height": 1 << 14, "max_width": 1 << 14}}, "max_height"), ({"max_patches": 0}, "max_patches"),
     ({"do_resize": False}, "do_resize")],
)  # fmt: skip
def test_other_processors_are_refused(processor: dict[str, Any], said: str) -> None:
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=said):
        tower_of({}, processor)
    with pytest.raises(UnsupportedModelError, match="projection_hidden_size"):
        tower_of({"projection_hidden_size": 1024}, {})


NAMES = {
    "norm0": "ln1", "norm1": "ln2", "wqkv": "attn_qkv", "wo": "attn_out", "mlp.fc0": "ffn_up", "mlp.fc1": "ffn_down",
    "patch_embed.proj": "v.patch_embd", "patch_embed.pos_emb": "v.position_embd",
    "encoder.final_layernorm": "v.post_ln", "pre_norm": "mm.input_norm", "proj.0": "mm.1", "proj.2": "mm.2",
}  # fmt: skip
"""llama.cpp's names of a tower's tensors, by published names, without those of blocks before them."""


def as_in_mmproj(data: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of queries and keys as llama.cpp's converter orders them."""
    parts = data.reshape(3, 2, 4, 2, 2, -1)  # of q, k and v: heads, frequencies, column or row, pair
    made = parts[:2].transpose(0, 1, 3, 2, 4, 5).reshape(2, 32, -1)
    return np.concatenate([*made, parts[2].reshape(32, -1)]).reshape(data.shape)


def write_mmproj(folder: Path, made: Path) -> Path:
    """The checkpoint's tower as llama.cpp's converter writes it."""
    values: dict[str, Any] = {
        "image_size": 28, "projector.scale_factor": 2, "image_min_pixels": 128, "image_max_pixels": 960,
        "attention.layer_norm_epsilon": 1e-5, "clip.use_gelu": True,
    }  # fmt: skip
    tensors = dict[str, NDArray[np.float32]]()
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.startswith(("vision_tower.", "mm_projector.")):
            continue
        plain, block, data = name.partition(".")[2], "", tensor.numpy()
        if (found := re.match(r"encoder\.blocks\.(\d+)\.", plain)) is not None:
            block, plain = f"v.blk.{found[1]}.", plain[found.end() :]
        part, _, kind = plain.rpartition(".")
        tensors[f"{block}{NAMES[part]}.{kind}"] = as_in_mmproj(data) if part == "wqkv" else data
    return write_tower(made, "kimik25", values, tensors, PROCESSOR)


def test_heads_of_a_million_elements_are_refused() -> None:
    """Before memory for their rotary tables is taken, which a small file would ask for."""
    said = {
        "image_size": 896, "patch_size": 14, "embedding_length": 1 << 24, "block_count": 1, "attention.head_count": 16,
        "feed_forward_length": 96,
    }  # fmt: skip
    fields = Fields({f"clip.vision.{key}": value for key, value in said.items()}, Path("mmproj.gguf"), "clip.vision.")
    with pytest.raises(InvalidFileError, match="head size 1048576 must be a multiple of 4, and at most 1024"):
        kimi_tower.config_from_gguf(fields, 64)


def test_a_gguf_file_and_that_of_its_tower_are_the_same_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    config, processor = read_json(folder / "config.json"), PROCESSOR | {"size": {"max_height": 512, "max_width": 512}}
    config["projection_layer_norm_eps"] = 1e-5  # llama.cpp has one epsilon, and its files have no longest side
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    wanted = answers_of(folder, PROMPTS)
    require_same_from_gguf(folder, write_mmproj(folder, tmp_path / "mmproj.gguf"), PROMPTS, wanted, "deepseek2")


def test_a_tower_may_be_quantised_as_it_is_loaded(folder: Path) -> None:
    require_nearly_same_when_quantised(folder, PAD, PICTURES[0])


def test_the_number_of_patches_may_be_set(tmp_path: Path) -> None:
    loaded = loaded_from(write(tmp_path), mm_processor_kwargs={"max_patches": 16})
    assert loaded.tower is not None
    rule: Any = loaded.tower.tower.config.rule
    assert rule.patches == 16
    for said in ({"min_pixels": 16}, {"max_patches": 1 << 15}):
        with pytest.raises(ConfigError, match=next(iter(said))):
            loaded_from(tmp_path, mm_processor_kwargs=said)
