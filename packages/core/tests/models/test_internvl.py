# SPDX-License-Identifier: MIT
"""InternVL of random weights: towers, tiles and logits against transformers, in each of its formats."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor

from candle_vllm.core import EngineConfig, InferenceEngine, SamplingParams
from candle_vllm.core.conversion import write_gguf
from candle_vllm.core.devices import choose_device
from candle_vllm.core.engine.runners.eager_runner import EagerTower
from candle_vllm.core.engine.runners.images import tiles_of
from candle_vllm.core.errors import ConfigError, InvalidFileError, UnsupportedModelError, WeightsError
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.models.internvl_tower import FAMILY
from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.vision.pictures import picture_of
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.sight import (
    GPU_STEPS,
    PICTURES,
    answers,
    answers_alone,
    finished,
    loaded_from,
    model_of,
    random_model,
    require_logits,
    require_same_embeddings,
    require_same_from_gguf,
    require_same_in_steps,
    require_same_on_a_gpu,
    write_tokenizer,
    write_tower,
)
from packages.core.tests.models.test_renamed import internlm2
from packages.core.tests.models.tiny import SMALL
from tests.common_run import combined, few

MARKS = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
START, END, PAD, _ = range(260, 264)
TEMPLATE = (  # of the published files
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}"
    "{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
ONE = "<IMG_CONTEXT>\n"
ASK = f"<|im_start|>user\n{ONE}Compare this with {ONE}, please.<|im_end|>\n<|im_start|>assistant\n"
PROMPTS: list[Any] = [
    {"prompt": ASK, "multi_modal_data": {"image": PICTURES[:2]}},
    {"prompt": ASK, "multi_modal_data": {"image": [PICTURES[2], PICTURES[2]]}},
    {"prompt": f"{ONE}What is this?", "multi_modal_data": {"image": [PICTURES[3]]}},
    "<|im_start|>user\nCompare nothing.<|im_end|>\n",
]
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": [16, 16], "patch_size": [4, 4], "attention_bias": True,
}  # fmt: skip
LARGE = {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}  # as the encoder of 6 billion
EXPERTS = {  # all of them for every token: no near ties
    "num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 40, "head_dim": 16, "norm_topk_prob": True
}  # fmt: skip
TEXTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "internvl qwen2": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, {}),
    "internvl qwen3": ({"head_dim": 16}, {}),
    "internvl qwen3_moe": (EXPERTS, LARGE),
    "qianfan_ocr qwen3": ({"head_dim": 16}, {}),
}
"""What the text model and the vision encoder have beside `SMALL` and `TOWER`."""
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "internvl llama": ({"head_dim": 16, "attention_bias": True}, {}),
    "internvl gpt_oss": ({**ROWS["gpt-oss"].config, "eos_token_id": 258}, {}),
}
"""Text models of a few published ones."""
PROCESSOR = {
    "image_processor_type": "GotOcr2ImageProcessorFast", "size": {"height": 16, "width": 16}, "do_center_crop": None,
    "crop_to_patches": False, "min_patches": 1, "max_patches": 4, "resample": 3, "do_convert_rgb": True,
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip

CLIP = {  # of the original repositories, where only the means and deviations have an effect
    "crop_size": 448, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 448,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip


def write(folder: Path, name: str, **vision: Any) -> Path:
    text, tower = (TEXTS | OTHERS)[name]
    config = AutoConfig.for_model(
        name.split()[0],
        text_config={**SMALL, "model_type": name.split()[1], "tie_word_embeddings": False, **text},
        vision_config=TOWER | tower | vision,
        image_token_id=PAD, image_seq_length=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = random_model(config)
    with torch.no_grad():  # embeddings of pictures as long as those of words
        model.model.multi_modal_projector.linear_2.weight.mul_(6)
    model.save_pretrained(folder, save_original_format="qianfan" not in name)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    write_tokenizer(folder, MARKS, TEMPLATE.replace(ONE, "<image>\n") if "qianfan" in name else TEMPLATE)
    return folder


@pytest.fixture(scope="module", params=list(TEXTS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("internvl"), request.param)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return model_of(folder)


def their_tiles(pictures: list[NDArray[np.uint8]], **said: Any) -> Any:
    settings = {key: value for key, value in PROCESSOR.items() if "type" not in key and value is not None}
    processor = GotOcr2ImageProcessorPil(**settings | {"crop_to_patches": True} | said)  # as InternVLProcessor asks
    return processor(images=[Image.fromarray(each) for each in pictures], return_tensors="pt")


@combined(
    "folder eager", TEXTS, (True, False),
    common=[*((kind, False) for kind in ("internvl qwen3", "internvl qwen3_moe"))], indirect=["folder"],
)  # fmt: skip
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    given = their_tiles(PICTURES)
    with torch.inference_mode():
        expected = theirs.model.get_image_features(pixel_values=given["pixel_values"]).pooler_output
    counts = [int(count) for count in given["num_patches"]]
    wanted = [each.reshape(-1, 64).numpy() for each in expected.split(counts)]
    _, images = require_same_embeddings(folder, PAD, PICTURES, wanted, eager=eager, most=64)
    assert [len(image.sizes) for image in images] == counts


@combined(
    "folder eager tokens", TEXTS, (True, False), (512, 23),
    common=[("internvl qwen2", False, 512), ("internvl qwen3_moe", True, 23), ("qianfan_ocr qwen3", False, 23)],
    indirect=["folder"],
)  # fmt: skip
def test_logits_are_those_of_transformers(tokens: int, eager: bool, folder: Path, theirs: Any) -> None:
    # keys and values are bfloat16 in the compiled steps
    require_theirs(folder, theirs, eager=eager, tokens=tokens)


@pytest.mark.parametrize("name", OTHERS)
def test_other_text_models_have_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    """InternVL 2.5 is published with InternLM 2, a Llama with other names."""
    folder = write(tmp_path, name)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    require_theirs(folder, model, eager=True)
    if name == "internvl llama":
        (made := tmp_path / "original").mkdir()
        write_original(folder, made)
        stored, config = load_file(made / "model.safetensors"), read_json(made / "config.json")
        at = "language_model."
        text = {part.removeprefix(at): stored.pop(part) for part in list(stored) if part.startswith(at)}
        config["llm_config"], text = internlm2(config["llm_config"], text)
        save_file(stored | {at + part: each for part, each in text.items()}, made / "model.safetensors")
        (made / "config.json").write_text(json.dumps(config))
        require_theirs(made, model, eager=True)


def require_theirs(folder: Path, theirs: Any, **settings: Any) -> None:
    """Of a prompt with two pictures."""
    pixels = their_tiles(PICTURES[:2])["pixel_values"]

    def wanted(ids: torch.Tensor) -> torch.Tensor:
        return theirs(input_ids=ids, pixel_values=pixels).logits[0].log_softmax(-1)

    require_logits(folder, PROMPTS[0], wanted, max_model_len=512, **settings)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[tuple[int, ...]]:
    return answers_alone(folder, PROMPTS)


@combined("folder tokens", TEXTS, (512, 17), common=[("internvl qwen3", 17)], indirect=["folder"])
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(
    tokens: int, folder: Path, alone: list[tuple[int, ...]]
) -> None:
    require_same_in_steps(folder, PROMPTS, alone, tokens)


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("folder", "how"), [(kind, how) for kind in TEXTS for how in GPU_STEPS],
    indirect=["folder"],
)  # fmt: skip
def test_steps_of_a_gpu_have_the_same_answers(folder: Path, how: str) -> None:
    asked = [(ASK, PICTURES[:2]), ("Nothing to see.", []), (f"{ONE}What is this?", PICTURES[3:])]
    require_same_on_a_gpu(folder, asked, how)


# ---- tiles and tokens ------------------------------------------------------------------------------------------------

SIZES = (
    (640, 480), (1920, 1080), (448, 448), (449, 449), (896, 896), (1000, 1000), (20, 20), (10, 300), (300, 10),
    (27, 5000), (4000, 3000), (3, 500), (560, 448), (700, 560), (1344, 2688), (500, 1000), (1000, 500),
)  # fmt: skip
"""Widths and heights."""


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("said", [{}, {"max_patches": 6}, {"min_patches": 2, "max_patches": 12}, {"max_patches": 1}])
def test_images_have_the_tiles_of_transformers(said: dict[str, Any]) -> None:
    """Their number for many sizes, and their pixels for some."""
    path = Path("config.json")
    usual = {"size": {"height": 448, "width": 448}}
    processor = GotOcr2ImageProcessorPil(**usual, **{"crop_to_patches": True} | said)
    config = PUBLISHED["InternVL3_5-1B-HF"][0]
    tokens: Any = SimpleNamespace(
        start_image_token="<img>", end_image_token="</img>", image_token="<IMG_CONTEXT>", image_seq_length=256
    )
    rule = FAMILY.config_from_hf(Fields(config, path), Fields(usual, path), 64, said).rule
    for width, height in SIZES:
        count = processor.get_number_of_image_patches(height, width)
        assert rule.cut(height, width).tiles == count, (width, height)
        words = FAMILY.words_around(rule.cut(height, width), rule.cut(height, width).cells(28))
        assert words == InternVLProcessor.replace_image_token(tokens, {"num_patches": [count]}, 0)
    for picture in PICTURES:
        found = rule.tiles(picture_of(picture))
        plain = processor(images=[Image.fromarray(picture)], do_normalize=False, do_rescale=False)
        assert np.array_equal(found, np.stack(plain["pixel_values"]).transpose(0, 2, 3, 1))


def test_a_template_of_texts_has_the_same_prompt(tmp_path: Path) -> None:
    """As the original repositories and GGUF files have: Qwen's, which takes no parts."""
    folder, prompts = write(tmp_path, "internvl qwen3"), list[list[int]]()
    plain = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    content: Any = [{"type": "image", "image": PICTURES[1]}, {"type": "text", "text": "What is this?"}]
    for template in (TEMPLATE, plain):
        write_tokenizer(folder, MARKS, template)
        with InferenceEngine(folder) as engine:
            output = engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=1), use_tqdm=False)
            prompts.append(list(output.prompt_token_ids))
    assert prompts[0] == prompts[1]
    assert prompts[0].count(PAD) == 20


def qianfan_saved_by_transformers(folder: Path, to: Path) -> None:
    """Names and keys of the published repository; transformers adds "encoder." to the names of the text model too."""
    read = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model = AutoModelForImageTextToText.from_config(read.config, dtype=torch.float32)  # does not know the file's names
    model.load_state_dict(read.state_dict())
    model.save_pretrained(to)
    assert any(".encoder.layers.0.self_attn." in name for name in load_file(to / "model.safetensors"))
    config = read_json(to / "config.json")
    vision = {
        key: value for key, value in config["vision_config"].items() if not key.startswith(("use_", "attention_"))
    }
    config["vision_config"] = vision | {"qk_normalization": False, "qkv_bias": True, "image_size": 16, "patch_size": 4}
    config |= {"dynamic_image_size": True, "force_image_size": 16, "ps_version": "v2", "use_thumbnail": True}
    (to / "config.json").write_text(json.dumps(config))
    (to / "preprocessor_config.json").write_text(json.dumps(CLIP | {"size": 16, "max_patches": 4}))
    write_tokenizer(to, MARKS, TEMPLATE.replace(ONE, "<image>\n"))


@pytest.mark.parametrize("folder", ["qianfan_ocr qwen3"], indirect=True)
def test_published_names_of_qianfan_are_the_same_model(
    folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]
) -> None:
    qianfan_saved_by_transformers(folder, tmp_path)
    with InferenceEngine(tmp_path) as engine:
        assert answers(engine, PROMPTS) == alone


@pytest.mark.parametrize("folder", ["qianfan_ocr qwen3"], indirect=True)
def test_a_template_that_writes_another_text_has_the_same_prompt(folder: Path, tmp_path: Path) -> None:
    """Qianfan-OCR's template writes `<image>`, which is no token; in a text of the user it stands for itself."""
    content: Any = [{"type": "image", "image": PICTURES[1]}, {"type": "text", "text": "What is <image>?"}]
    prompts = list[list[int]]()
    for template in (TEMPLATE, TEMPLATE.replace(ONE, "<image>\n")):
        write_tokenizer(folder, MARKS, template)
        with InferenceEngine(folder) as engine:
            output = engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=1), use_tqdm=False)
            prompts.append(list(output.prompt_token_ids))
    assert prompts[0] == prompts[1]
    assert prompts[0].count(PAD) == 20


def test_pixels_are_normalised_as_transformers_does_without_a_mean() -> None:
    for name in ("InternVL3_5-1B-HF", "Qianfan-OCR"):
        config, path = PUBLISHED[name][0], Path("config.json")
        processor = Fields({"size": {"height": 448, "width": 448}}, path)
        found = FAMILY.config_from_hf(Fields(config, path), processor, 64, {})
        assert found.rule.normalisation.mean == tuple(GotOcr2ImageProcessorPil().image_mean)


@pytest.mark.parametrize("folder", few(TEXTS, "qianfan_ocr qwen3"), indirect=True)
def test_the_number_of_tiles_may_be_set(folder: Path) -> None:
    for said, count in (({"max_patches": 2}, 3), ({"crop_to_patches": False}, 1), ({"min_patches": 4}, 5)):
        loaded = loaded_from(folder, mm_processor_kwargs=said)
        assert loaded.tower is not None
        ids, images = loaded.tower.vision.look([PAD], PICTURES[1:2])
        assert (len(ids), len(images[0].sizes)) == (2 + 4 * count, count)
        assert (ids[0], ids[-1]) == (START, END)
    with pytest.raises(ConfigError, match="min_patches is 5, more than max_patches, 4"):
        loaded_from(folder, mm_processor_kwargs={"min_patches": 5})


# ---- other formats ---------------------------------------------------------------------------------------------------

NAMES = {
    "layernorm_before": ("norm1", "ln1"), "layernorm_after": ("norm2", "ln2"), "lambda_1": ("ls1", "ls1"),
    "lambda_2": ("ls2", "ls2"), "attention.projection_layer": ("attn.proj", "attn_out"),
    "attention.q_norm": ("attn.q_norm", "attn_q_norm"), "attention.k_norm": ("attn.k_norm", "attn_k_norm"),
    "mlp.fc1": ("mlp.fc1", "ffn_up"), "mlp.fc2": ("mlp.fc2", "ffn_down"), "attention.q_proj": ("", "attn_q"),
    "attention.k_proj": ("", "attn_k"), "attention.v_proj": ("", "attn_v"),
    "cls_token": ("class_embedding", "v.class_embd"), "position_embeddings": ("position_embedding", "v.position_embd"),
    "patch_embeddings.projection": ("patch_embedding", "v.patch_embd"), "layer_norm": ("mlp1.0", "mm.model.mlp.0"),
    "linear_1": ("mlp1.1", "mm.model.mlp.1"), "linear_2": ("mlp1.3", "mm.model.mlp.3"),
}  # fmt: skip
"""The names of a tower's tensors in the original repositories and in llama.cpp's files, by transformers'."""
TENSOR = re.compile(
    r"(?:vision_tower\.(?:embeddings|encoder\.layer\.(\d+))|multi_modal_projector)\.(.*?)(?:\.(weight|bias))?"
)


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors by the names of transformers' InternVL, which has those of Qianfan-OCR with other prefixes."""
    prefixes = {
        "model.language_model.": "language_model.model.", "lm_head": "language_model.lm_head",
        "model.vision_tower.layers.": "vision_tower.encoder.layer.", "model.vision": "vision", "model.multi": "multi",
    }  # fmt: skip
    found = load_file(folder / "model.safetensors")
    for old, new in prefixes.items():
        found = {new + name.removeprefix(old) if name.startswith(old) else name: each for name, each in found.items()}
    return found


def original_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """As the original repositories have it, with keys of the encoder's own class."""
    vision = {
        key: value for key, value in config["vision_config"].items() if not key.startswith(("use_", "attention_"))
    }
    vision |= {
        "architectures": ["InternVisionModel"], "model_type": "intern_vit_6b", "image_size": 16, "patch_size": 4,
        "qk_normalization": config["vision_config"]["use_qk_norm"],
        "qkv_bias": config["vision_config"]["attention_bias"],
    }  # fmt: skip
    return {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "downsample_ratio": 0.5,
        "dynamic_image_size": True, "force_image_size": 16, "llm_config": config["text_config"],
        "max_dynamic_patch": 4, "min_dynamic_patch": 1, "ps_version": "v2", "select_layer": -1,
        "template": "internvl2_5", "use_thumbnail": True, "vision_config": vision,
    }  # fmt: skip


def write_original(folder: Path, to: Path) -> Path:
    """The model as it stands in the original repositories, by transformers' script that converts these."""
    tensors, made = stored_tensors(folder), dict[str, torch.Tensor]()
    for name, tensor in tensors.items():
        if (found := TENSOR.fullmatch(name)) is None:
            made[name] = tensor
            continue
        layer, part, kind = found.groups()
        at = "vision_model.embeddings." if layer is None else f"vision_model.encoder.layers.{layer}."
        if part.endswith("q_proj"):
            parts = [tensors[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
            made[f"{at}attn.qkv.{kind}"] = torch.cat(parts)
        elif NAMES[part][0]:
            stem = NAMES[part][0] if NAMES[part][0].startswith("mlp1") else at + NAMES[part][0]
            made[stem if kind is None else f"{stem}.{kind}"] = tensor
    save_file(made, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_text(json.dumps(original_config(read_json(folder / "config.json"))))
    (to / "preprocessor_config.json").write_text(json.dumps(CLIP))
    write_tokenizer(to, MARKS, TEMPLATE)
    return to


@pytest.mark.parametrize("folder", few(TEXTS, "internvl qwen3", "internvl qwen3_moe"), indirect=True)
def test_the_original_format_is_the_same_model(folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]) -> None:
    with InferenceEngine(write_original(folder, tmp_path)) as engine:
        assert answers(engine, PROMPTS) == alone


def write_mmproj(folder: Path, made: Path, quantised: bool = False) -> Path:
    """The checkpoint's tower as llama.cpp's converter writes it; matrices of blocks may be Q8_0."""
    values: dict[str, Any] = {
        "image_size": 16, "projection_dim": 64, "projector.scale_factor": 2, "preproc_min_tiles": 1,
        "preproc_max_tiles": 4, "clip.use_gelu": True,
    }  # fmt: skip
    tensors = dict[str, NDArray[np.float32]]()
    for name, tensor in stored_tensors(folder).items():
        if (found := TENSOR.fullmatch(name)) is not None:
            layer, part, kind = found.groups()
            at = "" if layer is None else f"v.blk.{layer}."
            kind = None if part == "cls_token" else kind or "weight"
            stem = at + NAMES[part][1]
            tensors[stem if kind is None else f"{stem}.{kind}"] = tensor.numpy()

    def is_quantised(name: str, data: NDArray[np.float32]) -> bool:
        return quantised and name.startswith("v.blk.") and data.ndim == 2 and not data.shape[1] % 32

    return write_tower(made, "internvl", values, tensors, PROCESSOR, is_quantised)


@pytest.mark.parametrize("folder", few(list(TEXTS)[1:], "internvl qwen3"), indirect=True)
def test_a_gguf_file_and_that_of_its_tower_are_the_same_model(
    folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]
) -> None:
    kind = read_json(folder / "config.json")["text_config"]["model_type"].replace("_", "")
    require_same_from_gguf(folder, write_mmproj(folder, tmp_path / "mmproj.gguf"), PROMPTS, alone, kind)


def embeddings(folder: Path, **settings: Any) -> NDArray[np.float32]:
    loaded = loaded_from(folder, op_by_op=True, **settings)
    assert loaded.tower is not None
    image = loaded.tower.vision.look([PAD], PICTURES[:1])[1][0]
    tiles = tiles_of(image)
    return finished(EagerTower(loaded.tower.tower, choose_device("cpu")), tiles)[0]


@pytest.mark.parametrize("folder", ["internvl qwen3"], indirect=True)
def test_quantised_towers_are_nearly_the_same(folder: Path, tmp_path: Path) -> None:
    """Quantised as they are loaded, and in a GGUF file, where matrices with scales cannot keep their blocks."""
    wanted, text = embeddings(folder), tmp_path / "model.gguf"
    write_gguf(EngineConfig(model=str(folder), dtype="f32"), text)
    tower = write_mmproj(folder, tmp_path / "mmproj.gguf", quantised=True)
    for found in (embeddings(folder, isq="q8_0"), embeddings(text, mmproj=tower, tokenizer=folder)):
        assert 0 < np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


def test_bfloat16_matrices_are_scaled_in_float32(tmp_path: Path) -> None:
    """The product of a matrix and its scales is rounded once."""
    tensors = {
        name: tensor.bfloat16()
        for name, tensor in load_file(write(tmp_path, "internvl qwen3") / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = loaded_from(tmp_path, op_by_op=True)
    assert loaded.tower is not None
    at = "vision_tower.encoder.layer.1."
    matrix, scales = tensors[f"{at}mlp.fc2.weight"].float(), tensors[f"{at}lambda_2"].float()
    tower: Any = loaded.tower.tower
    found = tower.layers[1].mlp.down.matrices[0].decoded(torch.float32)
    assert torch.equal(found, (matrix * scales[:, None]).bfloat16().float())


# ---- configs ---------------------------------------------------------------------------------------------------------

VIT = {
    "architectures": ["InternVisionModel"], "attention_dropout": 0.0, "drop_path_rate": 0.1, "hidden_act": "gelu",
    "hidden_size": 1024, "image_size": 448, "intermediate_size": 4096, "layer_norm_eps": 1e-06,
    "model_type": "intern_vit_6b", "norm_type": "layer_norm", "num_attention_heads": 16, "num_channels": 3,
    "num_hidden_layers": 24, "patch_size": 14, "qk_normalization": False, "qkv_bias": True, "use_flash_attn": True,
}  # fmt: skip
CHAT = {
    "architectures": ["InternVLChatModel"], "downsample_ratio": 0.5, "dynamic_image_size": True,
    "force_image_size": 448, "max_dynamic_patch": 12, "min_dynamic_patch": 1, "model_type": "internvl_chat",
    "pad2square": False, "ps_version": "v2", "select_layer": -1, "template": "internvl2_5",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_thumbnail": True, "vision_config": VIT,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 1536,
    "intermediate_size": 8960, "max_position_embeddings": 32768, "max_window_layers": 70, "num_attention_heads": 12,
    "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}, "sliding_window": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151674, "eos_token_id": 151643,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36,
    "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "use_sliding_window": False, "vocab_size": 151936, "eos_token_id": 151645,
}  # fmt: skip
INTERNLM2 = {
    "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 32768, "num_attention_heads": 16,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"}, "tie_word_embeddings": False, "vocab_size": 92553,
    "eos_token_id": 2,
}  # fmt: skip
LARGE_VIT = {
    "hidden_size": 3200, "intermediate_size": 12800, "num_attention_heads": 25, "num_hidden_layers": 45,
    "norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False,
}  # fmt: skip
PUBLISHED: dict[str, tuple[dict[str, Any], tuple[int, int, bool, bool]]] = {
    "InternVL2_5-2B": (CHAT | {"llm_config": INTERNLM2}, (1024, 24, False, True)),
    "InternVL3-2B": (CHAT | {"llm_config": QWEN2}, (1024, 24, False, True)),
    "InternVL3-78B": (CHAT | {"llm_config": QWEN2, "vision_config": VIT | LARGE_VIT}, (3200, 45, True, False)),
    "InternVL3_5-8B": (CHAT | {"llm_config": QWEN3}, (1024, 24, False, True)),
    "InternVL3_5-1B-HF": (
        {
            "architectures": ["InternVLForConditionalGeneration"], "downsample_ratio": 0.5, "image_seq_length": 256,
            "image_token_id": 151671, "model_type": "internvl", "projector_hidden_act": "gelu",
            "text_config": QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
            "vision_config": {
                "architectures": ["InternVisionModel"], "attention_bias": True, "attention_dropout": 0.0,
                "hidden_act": "gelu", "hidden_size": 1024, "image_size": [448, 448], "intermediate_size": 4096,
                "layer_norm_eps": 1e-06, "layer_scale_init_value": 0.1, "model_type": "internvl_vision",
                "norm_type": "layer_norm", "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": [14, 14],
                "use_absolute_position_embeddings": True, "use_mask_token": False, "use_mean_pooling": True,
                "use_qk_norm": False,
            },
            "vision_feature_layer": -1, "vision_feature_select_strategy": "default",
        },
        (1024, 24, False, True),
    ),
    "Qianfan-OCR": (
        {
            "architectures": ["QianfanOCRForConditionalGeneration"], "dynamic_image_size": True,
            "force_image_size": 448, "max_dynamic_patch": 12, "min_dynamic_patch": 1, "model_type": "qianfan_ocr",
            "ps_version": "v2", "text_config": QWEN3, "use_thumbnail": True,
            "vision_config": {"model_type": "qianfan_ocr_vision"},
        },
        (1024, 24, False, True),
    ),
}  # fmt: skip
"""What published files say; of their encoders width, layers, whether norms are RMS norms, and a bias."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    config, wanted = PUBLISHED[name]
    path, said = Path("config.json"), config.get("llm_config", config.get("text_config"))
    own = {"size": {"height": 448, "width": 448}, "image_mean": [0.485, 0.456, 0.406], "crop_to_patches": False}
    processor = Fields(own if name.endswith("HF") else CLIP, path)
    found: Any = FAMILY.config_from_hf(Fields(config, path), processor, said["hidden_size"], {})
    assert (found.hidden_size, found.num_layers, found.rms, found.qkv_bias) == wanted
    assert (found.head_norms, found.cell, found.rule.tile, found.rule.most) == (found.rms, 2, 448, 12)
    assert np.allclose(found.rule.normalisation.mean, (0.485, 0.456, 0.406))
    text = family_from_hf(config, path)[1]
    assert (text.num_layers, text.vocab_size) == (said["num_hidden_layers"], said["vocab_size"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ps_version": "v1"}, "ps_version"),
        ({"select_layer": -4}, "select_layer is -4"),
        ({"use_thumbnail": False}, "use_thumbnail is False"),
        ({"force_image_size": 224}, "tiles of 224 pixels"),
        ({"downsample_ratio": 0.3}, "downsample_ratio is 0.3"),
        ({"downsample_ratio": 1 / 49}, "49 x 49 of which are one embedding"),
        ({"vision_config": VIT | {"hidden_act": "silu"}}, "hidden_act"),
        ({"vision_config": VIT | {"image_size": [448, 336]}}, "image_size"),
        ({"max_dynamic_patch": 100}, "max_patches is 100"),
    ],
)  # fmt: skip
def test_other_towers_are_refused(change: dict[str, Any], said: str) -> None:
    config, path = CHAT | {"llm_config": QWEN2} | change, Path("config.json")
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=said):
        FAMILY.config_from_hf(Fields(config, path), Fields(CLIP, path), 1536, {})


def test_a_file_without_a_tensor_of_the_tower_is_refused(folder: Path, tmp_path: Path) -> None:
    write_original(folder, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["vision_model.embeddings.class_embedding"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match="class_embedding is missing"):
        loaded_from(tmp_path)
