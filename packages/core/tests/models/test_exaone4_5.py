# SPDX-License-Identifier: MIT
"""EXAONE 4.5 of random weights: embeddings and logits against transformers, answers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from candle_vllm.core import EngineConfig, InferenceEngine
from candle_vllm.core.conversion import write_gguf
from candle_vllm.core.errors import CandleVllmError
from candle_vllm.core.fields import Fields
from candle_vllm.core.models.exaone4_5_tower import FAMILY
from candle_vllm.core.models.registry import family_from_hf, tower_family
from packages.core.tests.models.families import OLMO, WINDOWS
from packages.core.tests.models.sight import (
    GPU_STEPS,
    PAD,
    PICTURES,
    VIDEO,
    answers,
    answers_alone,
    loaded_from,
    model_of,
    random_model,
    require_logits,
    require_nearly_same_when_quantised,
    require_same_embeddings,
    require_same_in_steps,
    require_same_on_a_gpu,
    write_tokenizer,
)
from packages.core.tests.models.test_qwen_vl import PROCESSOR, their_pixels
from packages.core.tests.models.tiny import SMALL
from tests.common_run import few

PATH = Path("config.json")
VISION: dict[str, Any] = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_key_value_heads": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 128, "window_size": 16,
    "fullatt_block_indexes": [1],
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "usual": {},
    "one head": {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "axial", "rope_theta": 500.0}},
}
ONE = "<vision><|image_pad|></vision>"
PROMPTS: list[Any] = [
    {"prompt": f"{ONE}Compare this with {ONE}, please.", "multi_modal_data": {"image": PICTURES[:2]}},
    {"prompt": f"{ONE}Compare this with {ONE}, please!", "multi_modal_data": {"image": [PICTURES[2], PICTURES[1]]}},
    {"prompt": f"{ONE}What is this?", "multi_modal_data": {"image": PICTURES[3:]}},
    "Compare nothing.",
]
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}" + ONE + "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def write(folder: Path, **vision: Any) -> Path:
    text = {**SMALL, **OLMO, **WINDOWS, "model_type": "exaone4", "vocab_size": SMALL["vocab_size"]}
    config = AutoConfig.for_model(
        "exaone4_5", text_config=text, vision_config=VISION | vision, image_token_id=PAD, video_token_id=VIDEO
    )
    model = random_model(config)
    with torch.no_grad():  # embeddings of pictures as long as those of words
        model.model.visual.merger.mlp[2].weight.mul_(3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    write_tokenizer(folder, template=TEMPLATE)
    return folder


@pytest.fixture(scope="module", params=few(KINDS, "usual"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("exaone"), **KINDS[request.param])


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return model_of(folder)


@pytest.mark.parametrize("eager", few([True, False], False))
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    with torch.inference_mode():
        wanted = theirs.model.get_image_features(**their_pixels(folder, PICTURES)).pooler_output
    require_same_embeddings(folder, PAD, PICTURES, wanted, eager=eager, most=16)


@pytest.mark.parametrize(("eager", "tokens"), few([(e, t) for e in (True, False) for t in (512, 23)], (True, 23)))
def test_logits_are_those_of_transformers(tokens: int, eager: bool, folder: Path, theirs: Any) -> None:
    def wanted(ids: torch.Tensor) -> torch.Tensor:
        return theirs(input_ids=ids, **their_pixels(folder, PICTURES[:2])).logits[0].log_softmax(-1)

    require_logits(folder, PROMPTS[0], wanted, eager=eager, tokens=tokens)


def test_answers_are_the_same_in_chunks_and_cached(folder: Path) -> None:
    require_same_in_steps(folder, PROMPTS, answers_alone(folder, PROMPTS), 17)


@pytest.mark.parametrize("how", few(GPU_STEPS, "captured"))
def test_steps_of_a_gpu_have_the_same_answers(folder: Path, how: str) -> None:
    """By the references of its kernels."""
    require_same_on_a_gpu(folder, [(f"{ONE}Read.", PICTURES[:1]), ("Nothing to see.", [])], how)


def test_a_tower_may_be_quantised(folder: Path) -> None:
    require_nearly_same_when_quantised(folder, PAD, PICTURES[0])


CONFIG: dict[str, Any] = {
    "architectures": ["Exaone4_5_ForConditionalGeneration"], "model_type": "exaone4_5", "image_token_id": 67,
    "video_token_id": 68, "tie_word_embeddings": False,
    "text_config": {
        "model_type": "exaone4_5_text", "hidden_size": 5120, "intermediate_size": 27392, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 153600,
        "max_position_embeddings": 262144, "rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 1000000,
        "sliding_window_pattern": "LLLG", "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 16,
        "num_nextn_predict_layers": 1,
    },
    "vision_config": {
        "model_type": "exaone4_5_vision", "depth": 28, "hidden_size": 2048, "intermediate_size": 5120, "num_heads": 32,
        "num_key_value_heads": 8, "out_hidden_size": 5120, "window_size": 112,
        "fullatt_block_indexes": [6, 13, 20, 27],
    },
}  # fmt: skip
"""Like the published one of 33B; the first release has this model_type of its text model."""


def config_of(**vision: Any) -> Any:
    fields = Fields(CONFIG | {"vision_config": CONFIG["vision_config"] | vision}, PATH)
    return FAMILY.config_from_hf(fields, Fields({}, PATH), 5120, {})


def test_configs_of_both_releases_are_read() -> None:
    assert tower_family(CONFIG) is FAMILY
    tower = config_of()
    assert (tower.kv_heads, tower.head_dim, tower.window, tower.theta, tower.gated) == (8, 64, 4, 1e4, True)
    rope = {"rope_type": "axial", "rope_theta": 500.0}
    for own in ({"rope_theta": 500.0}, {"rope_parameters": rope, "rope_theta": 9.0}, {"rope_scaling": rope}):
        assert config_of(**own).theta == 500
    text = family_from_hf(CONFIG, PATH)[1]
    newer = CONFIG | {"text_config": CONFIG["text_config"] | {"model_type": "exaone4"}}
    assert text == family_from_hf(newer, PATH)[1]
    assert (text.num_layers, text.sliding_windows[2:4]) == (64, (4096, None))


@pytest.mark.parametrize(
    ("vision", "said"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide 32"),
        ({"out_hidden_size": 64}, "out_hidden_size is 64"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type is 'linear'"),
        ({"rope_scaling": {"type": "linear"}}, "type is 'linear'"),
        ({"rope_parameters": {"rope_theta": 0.5}}, "rope_theta of the vision encoder is 0.5"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"window_size": 14}, "window_size is 14"),
    ],
)
def test_other_models_are_refused(vision: dict[str, Any], said: str) -> None:
    with pytest.raises(CandleVllmError, match=said):
        config_of(**vision)


def test_layers_for_draft_tokens_are_left_out(folder: Path, tmp_path: Path) -> None:
    """As published files have them."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored = load_file(folder / "model.safetensors")
    save_file(stored | {"mtp.fc.weight": torch.zeros(4, 8)}, tmp_path / "model.safetensors", {"format": "pt"})
    assert loaded_from(tmp_path).tower is not None
    with pytest.raises(CandleVllmError, match="exaone4 has windows only in models of 64 layers"):
        write_gguf(EngineConfig(model=str(folder)), tmp_path / "model.gguf")
    with InferenceEngine(tmp_path) as changed, InferenceEngine(folder) as engine:
        assert answers(changed, PROMPTS[:1]) == answers(engine, PROMPTS[:1])
