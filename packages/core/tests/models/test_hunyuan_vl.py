# SPDX-License-Identifier: MIT
"""HunyuanOCR of random weights: its tower, positions and logits against transformers, files, sizes and prompts."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.hunyuan_vl.image_processing_pil_hunyuan_vl import HunYuanVLImageProcessorPil
from transformers.models.hunyuan_vl.modeling_hunyuan_vl import HunYuanVLRotaryEmbedding

from candle_vllm.core import EngineConfig, InferenceEngine
from candle_vllm.core.conversion import write_gguf
from candle_vllm.core.engine.build import preparation_for
from candle_vllm.core.engine.step.batch import rotary_positions
from candle_vllm.core.engine.step.live import LiveSequence
from candle_vllm.core.engine.step.sequence import Run
from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError, WeightsError
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.models import hunyuan, hunyuan_tower
from candle_vllm.core.models.registry import family_from_hf
from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.models.sight import (
    GPU_STEPS,
    PICTURES,
    TEMPLATE,
    answers_alone,
    answers_of,
    answers_of_ranks,
    answers_op_by_op,
    loaded_from,
    model_of,
    random_model,
    request_of,
    require_logits,
    require_nearly_same_when_quantised,
    require_same,
    require_same_embeddings,
    require_same_from_gguf,
    require_same_in_steps,
    require_same_on_a_gpu,
    write_tokenizer,
    write_tower,
)
from packages.core.tests.models.tiny import SMALL
from tests.common_run import combined, few

START, END, PAD = range(260, 263)
MARKS = tuple(f"<｜hy_place▁holder▁no▁{number}｜>" for number in (100, 101, 102, 103))
ONE = f"{MARKS[0]}{MARKS[2]}{MARKS[1]}"
ASK = f"<|im_start|>user\n{ONE}Compare this with {ONE}, please.<|im_end|>\n<|im_start|>assistant\n"
PROMPTS: list[Any] = [
    {"prompt": ASK, "multi_modal_data": {"image": PICTURES[:2]}},
    {"prompt": ASK, "multi_modal_data": {"image": [PICTURES[2], PICTURES[2]]}},
    {"prompt": f"{ONE}What is this?", "multi_modal_data": {"image": [PICTURES[3]]}},
    "<|im_start|>user\nCompare nothing.<|im_end|>\n",
]
TOWER: dict[str, Any] = {
    "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "hidden_size": 32,
    "intermediate_size": 48, "max_image_size": 28, "rms_norm_eps": 1e-4,
}  # fmt: skip
ALPHA: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}
KINDS: dict[str, dict[str, Any]] = {
    "four": {"rope_parameters": ALPHA | {"mrope_section": [3, 2, 1, 2]}},
    "three": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "biased": {"rope_parameters": ALPHA | {"mrope_section": [2, 2, 2, 2]}, "attention_bias": True},
}
PROCESSOR: dict[str, Any] = {
    "image_processor_type": "HunYuanVLImageProcessor", "min_pixels": 256, "max_pixels": 1600, "patch_size": 4,
    "merge_size": 2, "temporal_patch_size": 1, "resample": 1, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip


def recomposed(self: Any, freq: torch.Tensor) -> torch.Tensor:
    """Cosines or sines [axes, 1, T, D / 2] of pairs: those of an axis for the frequencies of its section.

    As in the code that the model was published with, in vLLM and in llama.cpp; transformers 5.23 doubles each section
    instead of the list, so that the two elements of a pair are turned by different axes.
    """
    parts = torch.cat((freq, freq), -1).split(list(self.mrope_section) * 2, -1)
    return torch.cat([part[index % len(self.mrope_section)] for index, part in enumerate(parts)], -1)


@pytest.fixture(scope="module", autouse=True)
def published_rotation() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HunYuanVLRotaryEmbedding, "recomposition_frequencies", recomposed)
        yield


def write(folder: Path, kind: str = "four", **vision: Any) -> Path:
    config = AutoConfig.for_model(
        "hunyuan_vl",
        text_config=dict(SMALL) | {"head_dim": 16, "attention_dropout": 0.0} | KINDS[kind],
        vision_config=TOWER | vision,
        image_token_id=PAD, im_start_id=START, im_end_id=END, im_newline_id=PAD + 1, tie_word_embeddings=False,
    )  # fmt: skip
    config.text_config.tie_word_embeddings = config.tie_word_embeddings = False
    model = random_model(config)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    write_tokenizer(folder, MARKS, TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", ONE))
    return folder


@pytest.fixture(scope="module", params=few(KINDS, "four"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return model_of(folder)


def their_pixels(pictures: list[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
    processor = HunYuanVLImageProcessorPil(**{key: value for key, value in PROCESSOR.items() if "type" not in key})
    found = processor(images=[Image.fromarray(each) for each in pictures], return_tensors="pt")
    return {key: found[key] for key in ("pixel_values", "image_grid_thw")}


@pytest.mark.parametrize("eager", few([True, False], False))
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    with torch.inference_mode():
        expected = theirs.model.get_image_features(**their_pixels(PICTURES)).pooler_output
    require_same_embeddings(folder, PAD, PICTURES, expected, eager=eager, most=16)


@combined("eager tokens", (True, False), (512, 23), common=[(False, 23)])
def test_logits_are_those_of_transformers(tokens: int, eager: bool, folder: Path, theirs: Any) -> None:
    pixels = their_pixels(PICTURES[:2])

    def wanted(ids: torch.Tensor) -> torch.Tensor:
        return theirs(input_ids=ids, **pixels, mm_token_type_ids=(ids == PAD).int()).logits[0].log_softmax(-1)

    require_logits(folder, PROMPTS[0], wanted, eager=eager, tokens=tokens)


@pytest.mark.parametrize("chunks", [(512,), (5, 1, 3), (7,)])
def test_positions_are_those_of_transformers(chunks: tuple[int, ...], folder: Path, theirs: Any) -> None:
    loaded, pictures = loaded_from(folder), [PICTURES[0], PICTURES[2], PICTURES[0]]
    request = request_of(loaded, pictures, f"{ONE}and this{ONE}{ONE}and this")
    made = preparation_for(loaded, 512).prepare(request)[0]
    assert isinstance(made, LiveSequence)
    ids, sequence = request.prompt_token_ids, made.sequence
    tokens = torch.tensor([ids])
    grid = their_pixels(pictures)["image_grid_thw"]
    wanted, delta = theirs.model.get_rope_index(tokens, (tokens == PAD).int(), grid)
    assert [image.shift for image in sequence.images] == [0] * 3
    assert delta.item() == 0
    found, start = list[Any](), 0
    while start < len(ids):
        count = min(chunks[min(len(found), len(chunks) - 1)], len(ids) - start)
        turned = rotary_positions([Run(sequence, start, count, 0, 0, False)], np.array([0, count]))
        places = np.repeat(np.arange(start, start + count)[:, None], 4, 1)
        if turned is not None:
            assert not turned.shifts.any()
            places[turned.rows] = turned.places
        found.append(places)
        start += count
    axes = [0, 2, 1, 3][-len(wanted) :]
    assert np.array_equal(np.concatenate(found).T[axes], wanted[:, 0].numpy())


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[tuple[int, ...]]:
    return answers_alone(folder, PROMPTS)


@pytest.mark.parametrize("tokens", few([512, 17], 17))
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(
    tokens: int, folder: Path, alone: list[tuple[int, ...]]
) -> None:
    require_same_in_steps(folder, PROMPTS, alone, tokens)


ASKED = [(ASK, PICTURES[:2]), ("Nothing to see.", []), (f"{ONE}What is this?", PICTURES[3:])]


@pytest.mark.parametrize("how", few(GPU_STEPS, "captured"))
def test_steps_of_a_gpu_have_the_same_answers(how: str, folder: Path) -> None:
    require_same_on_a_gpu(folder, ASKED, how)


@pytest.mark.every_case
@pytest.mark.parametrize("gpu", [False, True])
def test_ranks_have_the_same_answers(gpu: bool, folder: Path) -> None:
    with exact_sums():
        wanted = answers_op_by_op(loaded_from(folder, op_by_op=True), ASKED)
        require_same(answers_of_ranks(folder, ASKED, 2, budget=40, gpu=gpu), wanted)


THEIR_NAMES = {
    r"^vit\.perceive\.": "model.vision_tower.patch_merger.",
    r"^vit\.": "model.vision_tower.",
    r"^model\.(?!vision_tower)": "model.language_model.",
    r"\.proj\.0\.": ".proj_conv.",
    r"\.proj\.2\.": ".proj_out.",
    r"(vision_tower.*)\.input_layernorm\.": r"\1.layer_norm1.",
    r"(vision_tower.*)\.post_attention_layernorm\.": r"\1.layer_norm2.",
    r"\.dense_h_to_4h\.": ".fc1.",
    r"\.dense_4h_to_h\.": ".fc2.",
}
"""The names of tensors in transformers' modules, by those in published files."""


def renamed(name: str) -> str:
    for pattern, known in THEIR_NAMES.items():
        name = re.sub(pattern, known, name)
    return name


@pytest.mark.parametrize("folder", ["four"], indirect=True)
def test_names_may_be_those_of_modules_and_a_config_flat(
    folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]
) -> None:
    made = shutil.copytree(folder, tmp_path / "made")
    stored = load_file(folder / "model.safetensors")
    tensors = {renamed(name): each for name, each in stored.items()}
    assert tensors.keys() == dict(model_of(folder).named_parameters()).keys()
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    assert answers_of(made, PROMPTS) == alone
    config = read_json(folder / "config.json")
    text = config.pop("text_config") | {"model_type": "hunyuan_vl"}
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope.pop("rope_theta"), "attention_head_dim": text.pop("head_dim")}
    rope["xdrope_section"] = [float(each) for each in rope.pop("mrope_section")]
    del rope["rope_type"]
    text["rope_scaling"] = rope | {"type": "xdrope", "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}
    (made / "config.json").write_text(json.dumps(config | text))
    assert answers_of(made, PROMPTS) == alone


@pytest.mark.parametrize(
    "size", [(640, 480), (1920, 1080), (20, 20), (10, 300), (300, 10), (27, 5000), (32, 32), (4000, 3000), (3, 500)]
)
def test_images_have_the_sizes_of_transformers(size: tuple[int, int]) -> None:
    path, theirs = Path("config.json"), HunYuanVLImageProcessorPil()
    fields = Fields({"vision_config": {}}, path)
    tower = hunyuan_tower.FAMILY.config_from_hf(fields, Fields({}, path), 1024, {"size": dict(theirs.size)})
    cut = tower.rule.cut(size[1], size[0])
    rows, columns = (2 * side for side in cut.cells(32))
    assert (rows, columns) == theirs.get_number_of_image_patches(size[1], size[0])
    assert tower.patches >= rows * columns
    words = hunyuan_tower.words_around(cut, cut.cells(32))
    assert words.count(MARKS[2]) == rows // 2 * (columns // 2 + 1) + 2


PUBLISHED: dict[str, Any] = {
    "architectures": ["HunYuanVLForConditionalGeneration"], "model_type": "hunyuan_vl", "attention_bias": False,
    "attention_head_dim": 128, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3584,
    "max_position_embeddings": 32768, "num_attention_heads": 16, "num_hidden_layers": 24, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "vocab_size": 120818, "use_qk_norm": True, "use_cla": False, "rope_theta": 10000.0,
    "eos_token_id": 120007, "tie_word_embeddings": True, "image_token_id": 120120, "im_start_id": 120118,
    "rope_scaling": {
        "alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "type": "xdrope", "xdrope_section": [16, 16, 16, 16],
    },
    "vision_config": {
        "hidden_act": "gelu", "hidden_size": 1152, "img_max_token_num": 4096, "intermediate_size": 4304,
        "interpolate_mode": "bilinear", "max_image_size": 2048, "max_vit_seq_len": 16384, "num_attention_heads": 16,
        "num_channels": 3, "num_hidden_layers": 27, "out_hidden_size": 1024, "patch_size": 16, "rms_norm_eps": 1e-05,
        "spatial_merge_size": 2, "text_hidden_size": 1024,
    },
}  # fmt: skip
PATH = Path("config.json")


def tower_of(config: dict[str, Any], processor: dict[str, Any]) -> Any:
    return hunyuan_tower.FAMILY.config_from_hf(Fields(config, PATH), Fields(processor, PATH), 1024, {})


def test_published_configs_are_read() -> None:
    found = tower_of(PUBLISHED, {"min_pixels": 262144, "max_pixels": 4194304, "resample": 1})
    assert (found.hidden_size, found.num_layers, found.learned, found.norm_eps) == (1152, 27, 128, 1e-5)
    assert (found.rule.resample, found.rule.most, found.rule.lined) == (3, 1 << 22, True)
    text: Any = family_from_hf(PUBLISHED, PATH)[1]
    assert text.rope.axes == (0,) * 16 + (2,) * 16 + (1,) * 16 + (3,) * 16
    assert text.rope.theta == pytest.approx(1e4 * 1000 ** (128 / 126))
    assert (text.qk_norm, text.norms_behind, text.tie_embeddings, text.head_dim) == (True, True, True, 128)


@pytest.mark.parametrize(
    ("key", "value"),
    [("interpolate_mode", "bicubic"), ("temporal_patch_size", 2), ("num_channels", 1), ("hidden_act", "silu"),
     ("head_dim", 80), ("remove_prenorm", False), ("cat_extra_token", 0), ("anyres_vit_two_views", True)],
)  # fmt: skip
def test_other_towers_are_refused(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=key):
        tower_of(PUBLISHED | {"vision_config": PUBLISHED["vision_config"] | {key: value}}, {})


def test_keys_of_the_tower_may_be_null() -> None:
    keys = dict.fromkeys(("remove_prenorm", "cat_extra_token", "anyres_vit_two_views", "learnable_mlp_pooling_size"))
    usual = PUBLISHED["vision_config"]
    assert tower_of(PUBLISHED | {"vision_config": usual | keys}, {}) == tower_of(PUBLISHED, {})


def test_keys_of_version_1_5_are_read() -> None:
    """Its text model's keys are nested, with another name of the rotary kind."""
    same = ("image_token_id", "im_start_id", "tie_word_embeddings", "architectures", "model_type", "vision_config")
    left_out = ("rope_scaling", "rope_theta", "attention_head_dim", "use_cla")
    text = {key: value for key, value in PUBLISHED.items() if key not in same + left_out}
    rope = {"alpha": 1000.0, "rope_theta": 1e4, "rope_type": "xdrope", "type": "xdrope"}
    text |= {"model_type": "hunyuan_vl_text", "rope_parameters": rope | {"xdrope_section": [16, 16, 16, 16]}}
    config = {key: PUBLISHED[key] for key in same} | {"text_config": text}
    found, wanted = (family_from_hf(each, PATH)[1] for each in (config, PUBLISHED))
    assert dataclasses.replace(found, eos_token_ids=wanted.eos_token_ids) == wanted


@pytest.mark.parametrize(
    ("scaling", "said"),
    [({"xdrope_section": [16, 16, 16]}, "64 in all"), ({"xdrope_section": [16, 16, 16, 8, 8]}, "3 or 4 numbers"),
     ({"xdrope_section": [16, 16, 16.5, 15.5]}, "3 or 4 numbers"), ({"xdrope_section": [16, 16, 48, -16]}, "3 or 4"),
     ({"mrope_section": [32, 16, 8, 8]}, "another xdrope_section"), ({"alpha": -1.0}, "alpha is -1"),
     ({"type": "yarn"}, "yarn"), ({"xdrope_section": "none"}, "xdrope_section")],
)  # fmt: skip
def test_other_rotary_positions_are_refused(scaling: dict[str, Any], said: str) -> None:
    config = PUBLISHED | {"rope_scaling": PUBLISHED["rope_scaling"] | scaling}
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=said):
        family_from_hf(config, PATH)


@pytest.mark.parametrize("prefix", ["text_config", None])
def test_scaling_that_is_added_to_rotary_parameters_applies(prefix: str | None) -> None:
    """As in other families; also beside sections."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    text = {key: value for key, value in PUBLISHED.items() if key not in ("rope_scaling", "vision_config")}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_scaling": yarn}
    if prefix:
        text["rope_parameters"] |= {"mrope_section": [16, 16, 16, 16]}
        config = {"architectures": PUBLISHED["architectures"], prefix: text | {"model_type": "hunyuan_vl_text"}}
    else:
        config = text | {"architectures": ["HunYuanDenseV1ForCausalLM"]}
    rope = family_from_hf(config, PATH)[1].rope
    assert (rope.kind, rope.factor, rope.theta, len(rope.axes)) == ("yarn", 4.0, 5e5, 64 if prefix else 0)


def test_a_tower_without_sections_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path)
    config = read_json(folder / "config.json")
    del config["text_config"]["rope_parameters"]["mrope_section"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidFileError, match="mrope_section"):
        InferenceEngine(folder)


@pytest.mark.parametrize("name", ["image_newline", "image_begin", "mlp.bias", "after_rms.weight"])
def test_missing_vectors_are_named(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path)
    stored = load_file(folder / "model.safetensors")
    del stored[f"vit.perceive.{name}"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=f"(?s)(is missing|missing).*{name}|{name} is missing"):
        InferenceEngine(folder)


def test_a_vector_of_another_size_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path)
    stored = load_file(folder / "model.safetensors")
    stored["vit.perceive.image_end"] = torch.zeros(63)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match=r"image_end has the shape \[63\]; expected: \[64\]"):
        InferenceEngine(folder)


NAMES = {
    "input_layernorm": "ln1", "post_attention_layernorm": "ln2", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_out",
    "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down", "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd", "perceive.proj.0": "mm.0", "perceive.proj.2": "mm.2",
    "perceive.mlp": "mm.model.fc", "perceive.before_rms": "mm.pre_norm", "perceive.after_rms": "mm.post_norm",
    "perceive.image_newline": "v.image_newline", "perceive.image_sep": "v.view_seperator",
    "perceive.image_begin": "mm.image_begin", "perceive.image_end": "mm.image_end",
}  # fmt: skip
"""llama.cpp's names of a tower's tensors, by published names, without those of blocks before them."""


def write_mmproj(folder: Path, made: Path) -> Path:
    """The checkpoint's tower as llama.cpp's converter writes it."""
    values: dict[str, Any] = {
        "image_size": 28, "spatial_merge_size": 2, "image_min_pixels": 256, "image_max_pixels": 1600,
        "attention.layer_norm_epsilon": 1e-4, "clip.use_gelu": True,
    }  # fmt: skip
    tensors = dict[str, NDArray[np.float32]]()
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.startswith("vit."):
            continue
        plain, block, data = name.removeprefix("vit."), "", tensor.numpy()
        if (found := re.match(r"layers\.(\d+)\.", plain)) is not None:
            block, plain = f"v.blk.{found[1]}.", plain[found.end() :]
        if "position_embedding" in plain:
            data = data[1:].copy()
        part, dot, kind = plain.rpartition(".") if plain.endswith(("weight", "bias")) else (plain, "", "")
        tensors[f"{block}{NAMES[part]}{dot}{kind}"] = data
    return write_tower(made, "hunyuanvl", values, tensors, PROCESSOR)


@pytest.mark.parametrize("folder", ["four"], indirect=True)
def test_a_gguf_file_and_that_of_its_tower_are_the_same_model(
    folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]
) -> None:
    require_same_from_gguf(folder, write_mmproj(folder, tmp_path / "mmproj.gguf"), PROMPTS, alone, "hunyuan_vl")


def test_the_alpha_of_llama_cpps_files_scales_the_base() -> None:
    """Its converter writes the base as it is in config.json, and alpha."""
    values: dict[str, Any] = {
        "embedding_length": 1024, "attention.head_count": 16, "attention.head_count_kv": 8, "block_count": 24,
        "context_length": 32768, "feed_forward_length": 3584, "attention.key_length": 128, "vocab_size": 120818,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0, "rope.scaling.alpha": 1000.0,
        "rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.dimension_sections": [16, 16, 16, 16],
    }  # fmt: skip
    named = {f"hunyuan_vl.{key}": value for key, value in values.items()} | {"general.architecture": "hunyuan_vl"}
    checkpoint: Any = SimpleNamespace(tensors={"blk.0.attn_q_norm.weight": None})
    found = hunyuan.config_from_gguf(Fields(named, Path("model.gguf"), "hunyuan_vl."), checkpoint)
    wanted: Any = family_from_hf(PUBLISHED, PATH)[1]
    assert found.rope.theta == pytest.approx(wanted.rope.theta)
    assert (found.rope.axes, found.model_type, found.norms_behind) == (wanted.rope.axes, "hunyuan_vl", True)


def test_a_gguf_file_needs_a_section_of_positions(tmp_path: Path) -> None:
    folder = write(tmp_path, "three")
    with pytest.raises(UnsupportedModelError, match="section of positions"):
        write_gguf(EngineConfig(model=str(folder), dtype="f32"), tmp_path / "model.gguf")


def test_a_tower_may_be_quantised_as_it_is_loaded(folder: Path) -> None:
    require_nearly_same_when_quantised(folder, PAD, PICTURES[0])


def test_limits_of_the_area_may_be_set(tmp_path: Path) -> None:
    loaded = loaded_from(write(tmp_path), mm_processor_kwargs={"size": {"longest_edge": 1024}})
    assert loaded.tower is not None
    rule: Any = loaded.tower.tower.config.rule
    assert rule.most == 1024
