# SPDX-License-Identifier: MIT
"""dots.ocr of random weights: embeddings, logits, files, and the published config.

transformers has Qwen2, and the vision encoder as that of dots3.note without experts and norms of queries and keys.
"""

from __future__ import annotations

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
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.dots3_note.configuration_dots3_note import Dots3NoteVisionConfig
from transformers.models.dots3_note.modeling_dots3_note import Dots3NoteVisionModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from candle_vllm.core.errors import InvalidFileError, UnsupportedModelError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models import dots_ocr_tower
from candle_vllm.core.models.registry import family_from_hf
from packages.core.tests.models.sight import (
    GPU_STEPS,
    PICTURES,
    TEMPLATE,
    answers_alone,
    require_logits,
    require_same_embeddings,
    require_same_from_gguf,
    require_same_in_steps,
    require_same_on_a_gpu,
    write_tokenizer,
    write_tower,
)
from packages.core.tests.models.tiny import SMALL, randomise
from tests.common_run import combined, few

PAD = 262
MARKS = ("<|img|>", "<|endofimg|>", "<|imgpad|>", "<|video_pad|>")
ONE = "<|img|><|imgpad|><|endofimg|>"
ASK = f"<|im_start|>user\n{ONE}Compare this with {ONE}, please.<|im_end|>\n<|im_start|>assistant\n"
VISION = {
    "embed_dim": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 1, "num_channels": 3, "rms_norm_eps": 1e-5, "use_bias": False,
    "post_norm": True, "is_causal": False,
}  # fmt: skip
PROCESSOR = {
    "min_pixels": 256, "max_pixels": 1600, "patch_size": 4, "merge_size": 2, "temporal_patch_size": 1,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
PROMPTS: list[Any] = [
    {"prompt": ASK, "multi_modal_data": {"image": PICTURES[:2]}},
    {"prompt": ASK, "multi_modal_data": {"image": [PICTURES[2], PICTURES[2]]}},
    {"prompt": f"{ONE}What is this?", "multi_modal_data": {"image": [PICTURES[3]]}},
    "<|im_start|>user\nCompare nothing.<|im_end|>\n",
]
NAMES = {
    "patch_embed.proj": "patch_embed.patchifier.proj", "patch_embed.norm": "patch_embed.patchifier.norm",
    "mlp.gate_proj": "mlp.fc1", "mlp.up_proj": "mlp.fc3", "mlp.down_proj": "mlp.fc2",
}  # fmt: skip
"""The checkpoint's names of tensors, by transformers' names in dots3.note."""


class Theirs:
    """The model by transformers' layers."""

    def __init__(self) -> None:
        sizes = {key: VISION[key] for key in ("intermediate_size", "num_hidden_layers", "num_attention_heads")}
        config = Dots3NoteVisionConfig(
            hidden_size=32, patch_size=4, spatial_merge_size=2, adapter_in_dim=32, adapter_out_dim=64, **sizes,
            mlp_layer_types=["dense"] * 3, rope_parameters={"rope_type": "axial", "rope_theta": 1e4},
            attn_implementation="eager",
        )  # fmt: skip
        torch.manual_seed(0)
        self.tower = Dots3NoteVisionModel(config).eval()
        for block in self.tower.blocks:
            block.attn.q_norm = block.attn.k_norm = torch.nn.Identity()
        text = {**SMALL, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "tie_word_embeddings": False}
        self.text = Qwen2ForCausalLM._from_config(Qwen2Config(**text), attn_implementation="eager").eval()
        for each in (self.tower, self.text):
            randomise(each)
        with torch.no_grad():  # embeddings of pictures as long as those of words
            self.tower.merger.mlp[2].weight.mul_(6)

    def images(self, pictures: list[NDArray[np.uint8]]) -> list[torch.Tensor]:
        """One at a time, as attention is within an image."""
        processor = Qwen2VLImageProcessorPil(**PROCESSOR)
        made = []
        for picture in pictures:
            found = processor(images=[Image.fromarray(picture)], return_tensors="pt")
            with torch.inference_mode():
                made.append(self.tower(found["pixel_values"], found["image_grid_thw"]).pooler_output)
        return made

    def logits(self, ids: list[int], pictures: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        with torch.inference_mode():
            rows = self.text.get_input_embeddings()(torch.tensor([ids]))
            rows[0, torch.tensor(ids) == PAD] = torch.cat(self.images(pictures))
            return self.text(inputs_embeds=rows).logits[0].log_softmax(-1).numpy()


def write(folder: Path, theirs: Theirs) -> Path:
    theirs.text.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in theirs.tower.state_dict().items():
        for found, named in NAMES.items():
            name = name.replace(found, named)
        tensors["vision_tower." + re.sub("^norm", "post_trunk_norm", name)] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    own = {"architectures": ["DotsOCRForCausalLM"], "model_type": "dots_ocr", "image_token_id": PAD}
    own["vision_config"] = VISION | {"hidden_size": 64, "model_type": "dots_vit"}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    write_tokenizer(folder, MARKS, TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", ONE))
    return folder


@pytest.fixture(scope="module")
def theirs() -> Theirs:
    return Theirs()


@pytest.fixture(scope="module")
def folder(theirs: Theirs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("dots"), theirs)


@pytest.mark.parametrize("eager", few([True, False], False))
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Theirs) -> None:
    require_same_embeddings(folder, PAD, PICTURES, theirs.images(PICTURES), eager=eager, most=16)


@combined("eager tokens", (True, False), (512, 23), common=[(False, 23)])
def test_logits_are_those_of_transformers(tokens: int, eager: bool, folder: Path, theirs: Theirs) -> None:
    require_logits(
        folder, PROMPTS[0], lambda ids: theirs.logits(ids[0].tolist(), PICTURES[:2]), eager=eager, tokens=tokens
    )


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
def test_steps_of_a_gpu_have_the_same_answers(folder: Path, how: str) -> None:
    asked = [(ASK, PICTURES[:2]), ("Nothing to see.", []), (f"{ONE}What is this?", PICTURES[3:])]
    require_same_on_a_gpu(folder, asked, how)


GGUF_NAMES = {
    "patch_embed.patchifier.proj": "v.patch_embd", "patch_embed.patchifier.norm": "v.pre_ln",
    "attn.qkv": "attn_qkv", "attn.proj": "attn_out", "norm1": "ln1", "norm2": "ln2", "mlp.fc1": "ffn_gate",
    "mlp.fc2": "ffn_down", "mlp.fc3": "ffn_up", "post_trunk_norm": "mm.post_norm", "merger.ln_q": "mm.input_norm",
    "merger.mlp.0": "mm.0", "merger.mlp.2": "mm.2",
}  # fmt: skip


def write_mmproj(folder: Path, made: Path) -> Path:
    """The checkpoint's tower as llama.cpp's converter writes it."""
    values: dict[str, Any] = {
        "image_size": 0, "image_min_pixels": 256, "image_max_pixels": 1600, "projector.scale_factor": 2,
        "attention.layer_norm_epsilon": 1e-5, "clip.use_silu": True,
    }  # fmt: skip
    tensors = dict[str, NDArray[np.float32]]()
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.startswith("vision_tower."):
            (part, _, kind), block = name.removeprefix("vision_tower.").rpartition("."), ""
            if (found := re.match(r"blocks\.(\d+)\.", part)) is not None:
                block, part = f"v.blk.{found[1]}.", part[found.end() :]
            tensors[f"{block}{GGUF_NAMES[part]}.{kind}"] = tensor.numpy()
    return write_tower(made, "dots_ocr", values, tensors, PROCESSOR)


def test_a_gguf_file_and_that_of_its_tower_are_the_same_model(
    folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]
) -> None:
    require_same_from_gguf(folder, write_mmproj(folder, tmp_path / "mmproj.gguf"), PROMPTS, alone, "qwen2")


PUBLISHED: dict[str, Any] = {
    "architectures": ["DotsOCRForCausalLM"], "model_type": "dots_ocr", "attention_bias": True, "attention_dropout": 0.0,
    "hidden_act": "silu", "hidden_size": 1536, "intermediate_size": 8960, "max_position_embeddings": 131072,
    "max_window_layers": 28, "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 131072,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936, "image_token_id": 151665,
    "vision_config": {
        "embed_dim": 1536, "hidden_size": 1536, "intermediate_size": 4224, "num_hidden_layers": 42,
        "num_attention_heads": 12, "num_channels": 3, "patch_size": 14, "post_norm": True, "rms_norm_eps": 1e-05,
        "spatial_merge_size": 2, "temporal_patch_size": 1, "use_bias": False, "is_causal": False,
    },
}  # fmt: skip


def test_the_published_config_is_read() -> None:
    path = Path("config.json")
    tower = dots_ocr_tower.FAMILY.config_from_hf(Fields(PUBLISHED, path), Fields({}, path), 1536, {})
    assert (tower.hidden_size, tower.intermediate_size, tower.num_layers, tower.num_heads) == (1536, 4224, 42, 12)
    family, text = family_from_hf(PUBLISHED, path)
    assert (family.hf.get("Qwen2ForCausalLM"), text.hidden_size, text.num_layers) == ("qwen2", 1536, 28)


@pytest.mark.parametrize(
    ("key", "value"),
    [("use_bias", True), ("post_norm", False), ("is_causal", True), ("temporal_patch_size", 2), ("hidden_size", 8)],
)
def test_other_towers_are_refused(key: str, value: Any) -> None:
    config, path = PUBLISHED | {"vision_config": PUBLISHED["vision_config"] | {key: value}}, Path("config.json")
    with pytest.raises(UnsupportedModelError, match=key):
        dots_ocr_tower.FAMILY.config_from_hf(Fields(config, path), Fields({}, path), 1536, {})


def test_a_processor_of_another_model_is_refused() -> None:
    path = Path("config.json")
    with pytest.raises(InvalidFileError, match="merge_size is 4"):
        dots_ocr_tower.FAMILY.config_from_hf(Fields(PUBLISHED, path), Fields({"merge_size": 4}, path), 1536, {})
