# SPDX-License-Identifier: MIT
"""GOT-OCR 2.0 of random weights in its original format, with its tiktoken file: embeddings and logits against the same
model in transformers, prompts, and what is refused."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from candle_vllm.core import InferenceEngine
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models import got_ocr2_tower
from candle_vllm.core.models.got_tower import FAMILY
from candle_vllm.core.models.registry import family_from_hf, tower_family
from packages.core.tests.models.sight import (
    answers_alone,
    loaded_from,
    model_of,
    random_model,
    require_logits,
    require_same_embeddings,
    require_same_when_cached,
)
from packages.core.tests.models.test_got_ocr2 import IMAGES, PICTURES, PUBLISHED, SYSTEM, VISION, pixels_of
from packages.core.tests.models.tiny import SMALL
from tests.common_run import few

PAD, PATH = 256 + 208 + 8, Path("config.json")
NAMES = {
    r"model\.language_model\.": "model.", r"language_model\.model\.": "model.",
    r"model\.(vision_tower|multi_modal_projector)\.": r"\1.", r"patch_embed\.projection": "patch_embed.proj",
    r"vision_tower\.layers\.(\d+)\.layer_norm": r"vision_tower.blocks.\1.norm",
    r"vision_tower\.layers\.": "vision_tower.blocks.", r"neck\.conv1": "neck.0", r"neck\.layer_norm1": "neck.1",
    r"neck\.conv2": "neck.2", r"neck\.layer_norm2": "neck.3", r"vision_tower\.": "model.vision_tower_high.",
    r"multi_modal_projector\.conv_upsampler1": "model.vision_tower_high.net_2",
    r"multi_modal_projector\.conv_upsampler2": "model.vision_tower_high.net_3",
    r"multi_modal_projector\.multimodal_projector": "model.mm_projector_vary",
}  # fmt: skip
"""Names in transformers, and in the original files: the inverse of transformers' conversion script."""
CONFIG: dict[str, Any] = {
    "architectures": ["GOTQwenForCausalLM"], "model_type": "GOT", "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "freeze_vision_tower": False, "hidden_act": "silu", "hidden_size": 1024,
    "im_end_token": 151858, "im_patch_token": 151859, "im_start_token": 151857, "image_token_len": 256,
    "intermediate_size": 2816, "max_position_embeddings": 32768, "max_window_layers": 21, "num_attention_heads": 16,
    "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "use_cache": True, "use_im_start_end": True,
    "use_sliding_window": False, "vocab_size": 151860,
}  # fmt: skip
"""As published."""
PROMPTS: list[Any] = [
    {
        "prompt": "<img><imgpad></img>\nOCR of this page, line by line, with every word.",
        "multi_modal_data": {"image": PICTURES[:1]},
    },
    {
        "prompt": "<img><imgpad></img>\nOCR with format, of each of the formulas, too!",
        "multi_modal_data": {"image": PICTURES[1:2]},
    },
    "<|im_start|>user\nNothing to read.<|im_end|>",
]


def write(folder: Path) -> Path:
    """The original format, and beside it the folder `theirs`. Other sizes of the encoder than the code's are named."""
    text = {**SMALL, "vocab_size": 480, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    text |= {"model_type": "qwen2", "tie_word_embeddings": True}
    config = AutoConfig.for_model("got_ocr2", text_config=text, vision_config=VISION, image_token_index=PAD)
    config.tie_word_embeddings = True
    model = random_model(config)
    with torch.no_grad():  # embeddings of pictures as long as those of words
        model.model.multi_modal_projector.multimodal_projector.weight.mul_(3)
    model.save_pretrained(folder / "theirs")
    stored = dict[str, torch.Tensor]()
    for name, tensor in load_file(folder / "theirs" / "model.safetensors").items():
        for theirs, original in NAMES.items():
            name = re.sub(theirs, original, name)
        stored[name] = tensor
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    assert all(name.startswith(("model.", "lm_head.")) for name in stored)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    own = {key: value for key, value in {**CONFIG, **SMALL}.items() if key not in ("model_type", "rope_parameters")}
    own |= {"model_type": "GOT", "vocab_size": 480, "rope_theta": 1e4, "vision_config": VISION, "image_token_len": 16}
    own |= {"eos_token_id": 256, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(own))
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (folder / "qwen.tiktoken").write_text("\n".join([*lines, ""]))
    said = {"tokenizer_class": "QWenTokenizer", "pad_token": "<|endoftext|>", "added_tokens_decoder": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("got"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return model_of(folder / "theirs")


@pytest.mark.parametrize("eager", few([True, False], False))
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    wanted = list[Any]()
    for picture in PICTURES:
        with torch.inference_mode():
            found = theirs.model.get_image_features(pixels_of(folder, [picture])).pooler_output
        wanted.append(found.flatten(0, 1))
    require_same_embeddings(folder, PAD, PICTURES, wanted, eager=eager, most=16)


@pytest.mark.parametrize("eager", few([True, False], False))
def test_logits_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    def wanted(ids: torch.Tensor) -> torch.Tensor:
        return theirs(input_ids=ids, pixel_values=pixels_of(folder, PICTURES[:1])).logits[0].log_softmax(-1)

    require_logits(folder, PROMPTS[0], wanted, eager=eager, tokens=23)


def test_answers_are_the_same_in_chunks_and_cached(folder: Path) -> None:
    alone = answers_alone(folder, PROMPTS)
    with InferenceEngine(folder, max_num_batched_tokens=17, max_num_seqs=8) as engine:
        require_same_when_cached(engine, PROMPTS, alone)


def test_prompts_are_those_of_the_original_code(folder: Path) -> None:
    """Its vocabulary has a mark for each embedding, and a turn ends an answer."""
    tokenizer = loaded_from(folder).tokenizer
    marks = ["<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"]
    assert tokenizer.encode("".join(marks)) == [*range(256 + 208, 256 + 208 + 9)]
    assert {*tokenizer.eos_token_ids} == {256, 258}  # <|endoftext|>, <|im_end|>
    with InferenceEngine(folder) as engine:
        content: Any = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "OCR: "}]
        found = engine.apply_chat_template([{"role": "user", "content": content}])
    assert found == (f"{SYSTEM}<|im_start|>user\n<img><imgpad></img>\nOCR: <|im_end|><|im_start|>assistant\n")


def config_of(**values: Any) -> Any:
    fields = Fields(CONFIG | values, PATH)
    return FAMILY.config_from_hf(fields, Fields(FAMILY.images or {}, PATH), 1024, {})


def test_the_published_config_is_read() -> None:
    """Sizes of the encoder, and settings of images that the repository has no file of."""
    assert tower_family(CONFIG) is FAMILY
    vision = Fields({"vision_config": PUBLISHED["vision_config"]}, PATH)
    images = {"size": {"height": 1024, "width": 1024}, "image_mean": [0.48145466, 0.4578275, 0.40821073]}
    images |= {"image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "do_convert_rgb": True}
    assert config_of() == got_ocr2_tower.FAMILY.config_from_hf(vision, Fields(images, PATH), 1024, {})
    _, text = family_from_hf(CONFIG, PATH)
    assert text.tie_embeddings
    assert (text.hidden_size, text.num_layers, text.max_position, {*text.eos_token_ids}) == (1024, 24, 32768, {151643})


def test_folders_without_settings_of_images_have_the_tiles_of_the_code(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "qwen.tiktoken", "tokenizer_config.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(CandleVllmError, match="tiles of 1024 pixels; the model has 16 x 16 patches"):
        loaded_from(tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [({"image_token_len": 400}, "image_token_len is 400"), ({"use_im_start_end": False}, "use_im_start_end is false")],
)
def test_other_models_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(CandleVllmError, match=said):
        config_of(**values)


def test_missing_tensors_have_the_names_of_the_file(folder: Path, tmp_path: Path) -> None:
    for path in folder.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored = load_file(folder / "model.safetensors")
    for name in ("mm_projector_vary.weight", "vision_tower_high.neck.0.weight"):
        kept = {key: each for key, each in stored.items() if not key.endswith(name)}
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CandleVllmError, match=name):
            loaded_from(tmp_path)
