# SPDX-License-Identifier: MIT
"""GLM-4V, GLM-OCR, GLM-5.3-Flash, PaddleOCR-VL of random weights: towers, logits against transformers, files, sizes."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm5_next.image_processing_pil_glm5_next import Glm5NextImageProcessorPil
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil

from candle_vllm.core import InferenceEngine
from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.models import glm4v_tower, glm5_next_tower, paddleocr_tower
from candle_vllm.core.models.registry import family_from_hf
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.sight import (
    GPU_STEPS,
    PICTURES,
    TEMPLATE,
    answers,
    answers_alone,
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

START, END, PAD, VIDEO = range(260, 264)
GLM = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|video|>")
PADDLE = ("<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>", "<|video|>")
TOWER = {
    "depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "hidden_size": 32,
    "intermediate_size": 48, "out_hidden_size": 64, "image_size": 28, "hidden_act": "silu",
}  # fmt: skip
EXPERTS = {**ROWS["GLM-4-MoE"].config, "head_dim": 16, "num_hidden_layers": 3}
TEXTS: dict[str, dict[str, Any]] = {
    "glm4v": {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]},
    "glm46v": {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
    "glm4v_moe": {"partial_rotary_factor": 0.5, "mrope_section": [1, 2, 1]},
    "glm_ocr": {"mrope_section": [2, 3, 3]},
    "paddleocr_vl": {"mrope_section": [3, 2, 3]},
    "glm5_next": {},
}
"""Rotary settings of the text models."""
PROCESSOR = {
    "image_processor_type": "Glm4vImageProcessor", "size": {"shortest_edge": 512, "longest_edge": 3200},
    "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
GLM5_NEXT = {key: value for key, value in PROCESSOR.items() if key != "size"} | {
    "image_processor_type": "Glm5NextImageProcessor", "min_image_tokens": 5, "max_image_tokens": 24,
}  # fmt: skip
PROCESSORS = {
    "paddleocr_vl": PROCESSOR | {"size": {"shortest_edge": 256, "longest_edge": 1600}, "temporal_patch_size": 1},
    "glm5_next": GLM5_NEXT,
}
NAMED_OTHERWISE = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": "gelu_pytorch_tanh"}
"""Keys of PaddleOCR-VL's `vision_config`."""


def marks(kind: str) -> tuple[str, ...]:
    return PADDLE if kind.startswith("paddle") else GLM


def one(kind: str) -> str:
    """What a template writes for an image."""
    start, end, pad, _ = marks(kind)
    return f"{start}{pad}{end}"


def ask(kind: str) -> str:
    return f"<|im_start|>user\n{one(kind)}Compare this with {one(kind)}, please.<|im_end|>\n<|im_start|>assistant\n"


def prompts(folder: Path) -> list[Any]:
    kind = read_json(folder / "config.json")["model_type"]
    return [
        {"prompt": ask(kind), "multi_modal_data": {"image": PICTURES[:2]}},
        {"prompt": ask(kind), "multi_modal_data": {"image": [PICTURES[2], PICTURES[2]]}},
        {"prompt": f"{one(kind)}What is this?", "multi_modal_data": {"image": [PICTURES[3]]}},
        "<|im_start|>user\nCompare nothing.<|im_end|>\n",
    ]


def write(folder: Path, kind: str, **vision: Any) -> Path:
    rope = {"rope_type": "default", "rope_theta": 1e4, **TEXTS[kind]}
    more = EXPERTS if kind == "glm4v_moe" else {"head_dim": 16} if kind in ("glm_ocr", "paddleocr_vl") else {}
    if kind == "glm5_next":
        rope, more, vision = {}, ROWS["GLM-5.3-Flash"].config, {"projection_intermediate_size": 96} | vision
    own = {"attention_bias": True} if kind == "glm46v" else NAMED_OTHERWISE if kind == "paddleocr_vl" else {}
    config = AutoConfig.for_model(
        kind,
        text_config=dict(SMALL) | more | ({"rope_parameters": rope} if rope else {}),
        vision_config=TOWER | own | vision,
        image_token_id=PAD, video_token_id=VIDEO, image_start_token_id=START, image_end_token_id=END,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = random_model(config)
    with torch.no_grad():  # embeddings of pictures as long as those of words
        inner = model.model
        (inner.projector.linear_2 if kind == "paddleocr_vl" else inner.visual.merger.down_proj).weight.mul_(6)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSORS.get(kind, PROCESSOR)))
    write_tokenizer(folder, marks(kind), TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", one(kind)))
    return folder


@pytest.fixture(scope="module", params=list(TEXTS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return model_of(folder)


def their_pixels(folder: Path, pictures: list[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
    kind = read_json(folder / "config.json")["model_type"]
    others = {"paddleocr_vl": PaddleOCRVLImageProcessorPil, "glm5_next": Glm5NextImageProcessorPil}
    values = {key: value for key, value in PROCESSORS.get(kind, PROCESSOR).items() if "type" not in key}
    processor = others.get(kind, Glm4vImageProcessorPil)(**values)
    found = processor(images=[Image.fromarray(each) for each in pictures], return_tensors="pt")
    return {key: found[key] for key in ("pixel_values", "image_grid_thw")}


@combined(
    "folder eager", TEXTS, (True, False),
    common=[*((kind, False) for kind in ("glm4v", "glm_ocr", "paddleocr_vl"))], indirect=["folder"],
)  # fmt: skip
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    with torch.inference_mode():
        expected = theirs.model.get_image_features(**their_pixels(folder, PICTURES)).pooler_output
    require_same_embeddings(folder, PAD, PICTURES, expected, eager=eager, most=16)


@combined(
    "folder eager tokens", TEXTS, (True, False), (512, 23),
    common=[("glm4v_moe", True, 512), *((kind, False, 23) for kind in ("glm4v", "glm_ocr", "paddleocr_vl"))],
    indirect=["folder"],
)  # fmt: skip
def test_logits_are_those_of_transformers(tokens: int, eager: bool, folder: Path, theirs: Any) -> None:
    pixels = their_pixels(folder, PICTURES[:2])

    def wanted(ids: torch.Tensor) -> torch.Tensor:
        return theirs(input_ids=ids, **pixels, mm_token_type_ids=(ids == PAD).int()).logits[0].log_softmax(-1)

    require_logits(folder, prompts(folder)[0], wanted, eager=eager, tokens=tokens)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[tuple[int, ...]]:
    return answers_alone(folder, prompts(folder))


@combined("folder tokens", TEXTS, (512, 17), common=[("glm4v", 17), ("paddleocr_vl", 512)], indirect=["folder"])
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(
    tokens: int, folder: Path, alone: list[tuple[int, ...]]
) -> None:
    require_same_in_steps(folder, prompts(folder), alone, tokens)


@pytest.mark.every_case
@pytest.mark.parametrize(
    ("folder", "how"), [(kind, how) for kind in TEXTS for how in GPU_STEPS],
    indirect=["folder"],
)  # fmt: skip
def test_steps_of_a_gpu_have_the_same_answers(folder: Path, how: str) -> None:
    kind = read_json(folder / "config.json")["model_type"]
    asked = [(ask(kind), PICTURES[:2]), ("Nothing to see.", []), (f"{one(kind)}What is this?", PICTURES[3:])]
    require_same_on_a_gpu(folder, asked, how)


def test_the_multi_token_prediction_layer_is_not_loaded(tmp_path: Path) -> None:
    """GLM-OCR's files have one layer more than its config, with names of its own."""
    folder = write(tmp_path, "glm_ocr")
    with InferenceEngine(folder) as engine:
        wanted = answers(engine, prompts(folder))
    stored = load_file(folder / "model.safetensors")
    stored["model.language_model.layers.2.eh_proj.weight"] = torch.zeros(64, 128)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with InferenceEngine(folder) as engine:
        assert answers(engine, prompts(folder)) == wanted


def test_an_original_config_of_paddleocr_is_flat(tmp_path: Path) -> None:
    """The text model's keys stand beside `vision_config`, and some stored tensors are not used."""
    folder = write(tmp_path, "paddleocr_vl")
    with InferenceEngine(folder) as engine:
        wanted = answers(engine, prompts(folder))
    config = read_json(folder / "config.json")
    text = config.pop("text_config") | {"model_type": "paddleocr_vl"}
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "default", **rope}}
    config["vision_config"] |= {"temporal_patch_size": 2, "tokens_per_second": 2}
    (folder / "config.json").write_text(json.dumps(text | config))
    stored = load_file(folder / "model.safetensors")
    stored["visual.vision_model.embeddings.packing_position_embedding.weight"] = torch.zeros(8, 32)
    stored["visual.vision_model.head.probe"] = torch.zeros(1, 1, 32)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with InferenceEngine(folder) as engine:
        assert answers(engine, prompts(folder)) == wanted


@pytest.mark.parametrize(
    "size", [(640, 480), (1920, 1080), (20, 20), (10, 300), (300, 10), (27, 5000), (28, 28), (4000, 3000), (3, 500)]
)
def test_images_have_the_sizes_of_transformers(size: tuple[int, int]) -> None:
    """With published settings, up to the default limit of patches, beyond which an operator may go."""
    path = Path("config.json")
    for name, family, theirs in (
        ("Glm4vForConditionalGeneration", glm4v_tower.FAMILY, Glm4vImageProcessorPil()),
        ("PaddleOCRVLForConditionalGeneration", paddleocr_tower.FAMILY, PaddleOCRVLImageProcessorPil()),
        ("Glm5NextForConditionalGeneration", glm5_next_tower.FAMILY, Glm5NextImageProcessorPil()),
    ):
        fields = Fields({"architectures": [name], "vision_config": {}}, path)
        padded = family is glm5_next_tower.FAMILY
        said: dict[str, Any] = {"max_image_tokens": 8000} if padded else {"size": dict(theirs.size)}
        tower = family.config_from_hf(fields, Fields({}, path), 4096, said)
        rows, columns = tower.rule.cut(size[1], size[0]).cells(28)
        assert 4 * rows * columns == theirs.get_number_of_image_patches(size[1], size[0])
        assert tower.patches >= 4 * rows * columns
        small = family.config_from_hf(fields, Fields({}, path), 4096, {})
        assert 4 * np.prod(small.rule.cut(size[1], size[0]).cells(28)) <= 1 << 14


PUBLISHED: dict[str, tuple[dict[str, Any], tuple[int, ...], list[int]]] = {
    "GLM-4.1V-9B": (
        {
            "architectures": ["Glm4vForConditionalGeneration"], "model_type": "glm4v", "image_token_id": 151343,
            "tie_word_embeddings": False,
            "text_config": {
                "model_type": "glm4v_text", "attention_bias": True, "hidden_act": "silu", "hidden_size": 4096,
                "intermediate_size": 13696, "max_position_embeddings": 65536, "num_attention_heads": 32,
                "num_hidden_layers": 40, "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "vocab_size": 151552,
                "eos_token_id": [151329, 151336, 151338, 151348], "partial_rotary_factor": 0.5,
                "rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]}, "rope_theta": 10000.0,
            },
            "vision_config": {
                "depth": 24, "hidden_size": 1536, "intermediate_size": 13696, "num_heads": 12, "attention_bias": False,
                "hidden_act": "silu", "image_size": 336, "in_channels": 3, "out_hidden_size": 4096, "patch_size": 14,
                "rms_norm_eps": 1e-05, "spatial_merge_size": 2, "temporal_patch_size": 2,
            },
        },
        (1536, 4096, 13696, 24, 24),
        [8, 12, 12],
    ),
    "GLM-OCR": (
        {
            "architectures": ["GlmOcrForConditionalGeneration"], "model_type": "glm_ocr", "image_token_id": 59280,
            "text_config": {
                "model_type": "glm_ocr_text", "attention_bias": False, "hidden_act": "silu", "hidden_size": 1536,
                "head_dim": 128, "intermediate_size": 4608, "max_position_embeddings": 131072,
                "num_attention_heads": 16, "num_hidden_layers": 16, "num_nextn_predict_layers": 1,
                "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "vocab_size": 59392, "eos_token_id": [59246, 59253],
                "rope_parameters": {
                    "rope_type": "default", "mrope_section": [16, 24, 24], "partial_rotary_factor": 1.0,
                    "rope_theta": 10000,
                },
            },
            "vision_config": {
                "model_type": "glm_ocr_vision", "depth": 24, "hidden_size": 1024, "intermediate_size": 4096,
                "num_heads": 16, "attention_bias": True, "hidden_act": "silu", "image_size": 336, "in_channels": 3,
                "out_hidden_size": 1536, "patch_size": 14, "rms_norm_eps": 1e-05, "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        (1024, 4096, 4608, 24, 0),
        [16, 24, 24],
    ),
}  # fmt: skip
"""What published files say; of their towers width, inner width, the projection's width, layers, and side of the grid
of positions; and the sections of the text model's rotary positions."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    config, wanted, sections = PUBLISHED[name]
    path, said = Path("config.json"), config["text_config"]
    found: Any = glm4v_tower.FAMILY.config_from_hf(Fields(config, path), Fields({}, path), said["hidden_size"], {})
    assert (
        found.hidden_size, found.intermediate_size, found.projected, found.num_layers, found.learned
    ) == wanted  # fmt: skip
    text: Any = family_from_hf(config, path)[1]
    assert [text.rope.axes.count(axis) for axis in range(3)] == sections
    assert (text.qkv_bias, text.sandwich, text.rope.dim) == (said["attention_bias"], True, 2 * sum(sections))


def test_other_towers_are_refused() -> None:
    config, path = PUBLISHED["GLM-OCR"][0], Path("config.json")
    for key, value in (("out_hidden_size", 1024), ("temporal_patch_size", 1)):
        changed = config | {"vision_config": config["vision_config"] | {key: value}}
        with pytest.raises(UnsupportedModelError, match=key):
            glm4v_tower.FAMILY.config_from_hf(Fields(changed, path), Fields({}, path), 1536, {})
    with pytest.raises(InvalidFileError, match="merge_size is 4"):
        glm4v_tower.FAMILY.config_from_hf(Fields(config, path), Fields({"merge_size": 4}, path), 1536, {})


def test_padded_images_have_bounds_and_limited_gates_one_limit() -> None:
    config: dict[str, Any] = {"architectures": ["Glm5NextForConditionalGeneration"], "vision_config": {}}
    path, read = Path("config.json"), glm5_next_tower.FAMILY.config_from_hf
    usual: Any = read(Fields(config, path), Fields({}, path), 4096, {})
    sizes = usual.hidden_size, usual.intermediate_size, usual.projected, usual.num_layers, usual.gate
    assert sizes == (1024, 4096, 10240, 24, "silu_10")
    assert (usual.rule.least, usual.rule.most, usual.patches) == (16, 4096, 1 << 14)
    with pytest.raises(UnsupportedModelError, match=r"swiglu_limit is 7.0; implemented: 10.0"):
        read(Fields(config | {"vision_config": {"swiglu_limit": 7.0}}, path), Fields({}, path), 4096, {})
    with pytest.raises(InvalidFileError, match=r"at least 16 tokens and at most 8$"):
        read(Fields(config, path), Fields({"max_image_tokens": 8}, path), 4096, {})
    with pytest.raises(InvalidFileError, match=r"at least 16 tokens and at most 4$"):
        read(Fields(config | {"vision_config": {"spatial_merge_size": 64}}, path), Fields({}, path), 4096, {})
    with pytest.raises(InvalidFileError, match="max_image_tokens is 20000; it must be 1 to 16384"):
        read(Fields(config, path), Fields({}, path), 4096, {"max_image_tokens": 20000})
    limited = Fields({"clip.use_silu": True, "clip.vision.swiglu_limit": 10.0}, path, "clip.vision.")
    with pytest.raises(UnsupportedModelError, match=r"swiglu_limit is 10.0; implemented: 0.0"):
        glm4v_tower.config_from_gguf(limited, 4096)


NAMES = {
    "attn.qkv": "attn_qkv", "attn.proj": "attn_out", "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm",
    "norm1": "ln1", "norm2": "ln2", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "patch_embed.proj": "v.patch_embd", "post_conv_layernorm": "v.norm_embd", "post_layernorm": "v.post_ln",
    "embeddings.position_embedding": "v.position_embd", "downsample": "mm.patch_merger", "merger.proj": "mm.model.fc",
    "merger.post_projection_norm": "mm.post_norm", "merger.gate_proj": "mm.gate", "merger.up_proj": "mm.up",
    "merger.down_proj": "mm.down",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out", "layer_norm1": "ln1", "layer_norm2": "ln2", "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down", "embeddings.patch_embedding": "v.patch_embd", "pre_norm": "mm.input_norm",
    "linear_1": "mm.1", "linear_2": "mm.2",
}  # fmt: skip
"""llama.cpp's names of a tower's tensors, by Hugging Face's, without those of blocks before them."""


def write_mmproj(folder: Path, made: Path) -> Path:
    """The checkpoint's tower as llama.cpp's converter writes it."""
    paddle = read_json(folder / "config.json")["model_type"] == "paddleocr_vl"
    values: dict[str, Any] = {
        "image_size": 40 if paddle else 28, "image_min_pixels": 256, "image_max_pixels": 1600,
        "attention.layer_norm_epsilon": 1e-6 if paddle else 1e-5,
        "clip.use_gelu" if paddle else "clip.use_silu": True,
    }  # fmt: skip
    tensors = dict[str, NDArray[np.float32]]()
    for name, tensor in load_file(folder / "model.safetensors").items():
        found = re.fullmatch(r"(?:model\.)?(?:visual|mlp_AR)\.(?:vision_model\.)?(.*)", name)
        if found is None:
            continue
        plain = found[1]
        (part, _, kind), block, data = plain.rpartition("."), "", tensor.numpy()
        if (found := re.match(r"(?:blocks|encoder\.layers)\.(\d+)\.", part)) is not None:
            block, part = f"v.blk.{found[1]}.", part[found.end() :]
        if part == "patch_embed.proj" and kind == "weight":
            for frame in range(2):
                tensors["v.patch_embd.weight" + (".1" if frame else "")] = data[:, :, frame].copy()
        else:
            tensors[f"{block}{NAMES[part]}.{kind}"] = data
    return write_tower(made, "paddleocr" if paddle else "glm4v", values, tensors, PROCESSOR)


@pytest.mark.parametrize("folder", few([*TEXTS][:-1], "glm4v", "paddleocr_vl"), indirect=True)
def test_a_gguf_file_and_that_of_its_tower_are_the_same_model(
    folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]
) -> None:
    """Rows of queries and keys are as llama.cpp's M-RoPE wants them, which the written file is read back by."""
    known = {"glm4v_moe": "glm4moe", "paddleocr_vl": "paddleocr"}
    name = known.get(read_json(folder / "config.json")["model_type"], "glm4")
    require_same_from_gguf(folder, write_mmproj(folder, tmp_path / "mmproj.gguf"), prompts(folder), alone, name)


@pytest.mark.parametrize("folder", few(TEXTS, "glm_ocr"), indirect=True)
def test_a_tower_may_be_quantised_as_it_is_loaded(folder: Path) -> None:
    require_nearly_same_when_quantised(folder, PAD, PICTURES[0])


def test_limits_of_the_area_may_be_set(tmp_path: Path) -> None:
    """By `mm_processor_kwargs`; as in the files, both frames count."""
    loaded = loaded_from(write(tmp_path, "glm_ocr"), mm_processor_kwargs={"size": {"longest_edge": 1024}})
    assert loaded.tower is not None
    assert dataclasses.replace(loaded.tower.tower.config).rule.most == 512
