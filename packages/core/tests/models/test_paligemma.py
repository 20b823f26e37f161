# SPDX-License-Identifier: MIT
"""PaliGemma 1 and 2 of random weights: prompts, embeddings and logits against transformers, and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from candle_vllm.core import BeamSearchParams, InferenceEngine, SamplingParams
from candle_vllm.core.errors import (
    ConfigError,
    InvalidFileError,
    ModelLoadError,
    PromptTooLongError,
    UnsupportedModelError,
)
from candle_vllm.core.fields import Fields
from candle_vllm.core.models.paligemma_tower import FAMILY
from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.vllm.beam_search import beam_search
from packages.core.tests.models.sight import (
    GPU_STEPS,
    answers,
    answers_alone,
    loaded_from,
    model_of,
    random_model,
    require_logits,
    require_same_embeddings,
    require_same_on_a_gpu,
    without_template,
    write_tokenizer,
)
from packages.core.tests.models.tiny import SMALL
from tests.common_run import combined, few

MARK, BOS = 260, 261
MARKS = ("<image>", "<bos>", "<loc0000>", "<seg000>")
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
SIZES = ((45, 28, 3), (17, 22, 3), (20, 20, 3), (1, 1, 3), (19, 70, 3))
RANDOM = np.random.default_rng(5)
PICTURES = [RANDOM.integers(0, 256, size, dtype=np.uint8) for size in SIZES]
IMAGES = {
    "size": {"height": 20, "width": 20}, "resample": 3, "image_mean": [0.5, 0.4, 0.6], "image_std": [0.5, 0.6, 0.4],
    "image_seq_length": 25, "image_processor_type": "SiglipImageProcessor", "do_convert_rgb": None,
}  # fmt: skip
VISION = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "patch_size": 4, "image_size": 20, "vision_use_head": False,
}  # fmt: skip
TEXT = {
    **SMALL, "vocab_size": 264, "head_dim": 16, "num_hidden_layers": 3, "model_type": "gemma",
    "tie_word_embeddings": False,
}  # fmt: skip
GEMMA2 = TEXT | {
    "model_type": "gemma2", "num_hidden_layers": 4, "query_pre_attn_scalar": 24, "sliding_window": 96,
    "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "tie_word_embeddings": True,
}  # fmt: skip
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma": (TEXT, {}),
    "gemma2": (GEMMA2, {"vision_use_head": True}),
}
"""The text models, and a vision encoder with a head that is not used."""


def asked(text: str, *numbers: int) -> dict[str, Any]:
    return {"prompt": text, "multi_modal_data": {"image": [PICTURES[number] for number in numbers]}}


PROMPTS: list[Any] = [
    asked("<image>caption en", 0),
    asked("<image><image>which of these is larger", 1, 4),
    asked("<image>caption en.", 0),
    asked("<image>caption en", 3),
    asked("answer en what is in <image>", 2),
    "caption nothing",
]


def write(folder: Path, kind: str) -> Path:
    text, vision = KINDS[kind]
    config = AutoConfig.for_model(
        "paligemma", text_config=text, vision_config=VISION | vision, image_token_index=MARK, projection_dim=64,
        hidden_size=64, tie_word_embeddings=text["tie_word_embeddings"],
    )  # fmt: skip
    model = random_model(config)
    with torch.no_grad():  # so that layers matter: the model multiplies it by 8
        model.model.language_model.embed_tokens.weight.mul_(0.02)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    write_tokenizer(folder, MARKS, TEMPLATE)
    return folder


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("paligemma"), request.param)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return model_of(folder)


def processor(folder: Path) -> PaliGemmaProcessor:
    images: Any = SiglipImageProcessorPil(**IMAGES)
    images.image_seq_length = 25
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<bos>")
    tokenizer.image_token, tokenizer.image_token_id = "<image>", MARK
    return PaliGemmaProcessor(images, tokenizer)


# ---- prompts and pixels ----------------------------------------------------------------------------------------------


@combined(
    "folder number", KINDS, range(5),
    common=[*(("gemma", number) for number in (0, 4)), *(("gemma2", number) for number in (1, 3))],
    indirect=["folder"],
)  # fmt: skip
def test_prompts_and_pixels_are_those_of_transformers(number: int, folder: Path) -> None:
    """However much of the form is written out."""
    prompt = PROMPTS[number]
    text, pictures = prompt["prompt"], prompt["multi_modal_data"]["image"]
    made: Any = processor(folder)
    wanted = made(images=[[Image.fromarray(each) for each in pictures]], text=[text], return_tensors="np")
    loaded = loaded_from(folder)
    assert loaded.tower is not None
    front, behind = text[: text.rfind("<image>") + 7], text[text.rfind("<image>") + 7 :]
    for form in (text, f"<bos>{text}", f"{front}<bos>{behind}", f"<bos>{front}<bos>{behind}\n"):
        ids = loaded.tokenizer.encode(form, add_special_tokens=False, parse_special=True)
        found, images = loaded.tower.vision.look(ids, pictures)
        assert found == wanted["input_ids"][0].tolist()
        assert [each.prefix for each in images] == [len(found)] * len(pictures)
    for image, pixels in zip(images, wanted["pixel_values"], strict=True):
        tile = np.frombuffer(image.tiles, np.uint8).reshape(20, 20, 3)
        ours = loaded.tower.tower.config.rule.normalisation.table[tile, np.arange(3)]
        assert np.abs(ours - pixels.transpose(1, 2, 0)).max() < 1e-5


@pytest.mark.parametrize("folder", few(KINDS, "gemma"), indirect=True)
def test_a_template_needs_to_write_the_mark_alone(folder: Path) -> None:
    content: Any = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "caption en"}]
    with InferenceEngine(folder) as engine:
        output = engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=1), use_tqdm=False)
        again = engine.generate(PROMPTS[0], SamplingParams(max_tokens=1), use_tqdm=False)[0]
    assert output.prompt_token_ids == again.prompt_token_ids


@pytest.mark.parametrize("folder", few(KINDS, "gemma"), indirect=True)
def test_published_files_have_no_template(folder: Path, tmp_path: Path) -> None:
    bare = without_template(folder, tmp_path / "bare")
    for content in ([{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "caption en"}], "caption en"):
        said: Any = [{"role": "user", "content": content}]
        with InferenceEngine(bare) as engine:
            output = engine.chat(said, SamplingParams(max_tokens=1), use_tqdm=False)
            again = engine.generate(
                PROMPTS[0] if isinstance(content, list) else content, SamplingParams(max_tokens=1), use_tqdm=False
            )[0]
        assert output.prompt_token_ids == again.prompt_token_ids


# ---- embeddings, logits, answers -------------------------------------------------------------------------------------


@combined("folder eager", KINDS, (True, False), common=[("gemma2", False)], indirect=["folder"])
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    with torch.inference_mode():
        pixels = SiglipImageProcessorPil(**IMAGES)(images=[Image.fromarray(each) for each in PICTURES])["pixel_values"]
        wanted = theirs.model.get_image_features(torch.from_numpy(np.stack(pixels))).pooler_output.numpy()
    require_same_embeddings(folder, MARK, PICTURES, wanted, eager=eager, most=64)


@combined(
    "folder number eager", KINDS, range(5), (True, False),
    common=[("gemma", 1, False), ("gemma2", 0, False)], indirect=["folder"],
)  # fmt: skip
def test_logits_are_those_of_transformers(number: int, eager: bool, folder: Path, theirs: Any) -> None:
    """Of a prompt whose tokens see each other, and of an answer that is causal."""
    given = PROMPTS[number]["multi_modal_data"]["image"]
    pixels = SiglipImageProcessorPil(**IMAGES)(images=[Image.fromarray(each) for each in given], return_tensors="pt")

    def wanted(ids: torch.Tensor) -> torch.Tensor:
        kinds = torch.zeros_like(ids)
        kinds[:, -5:] = 1  # the answer
        said: Any = theirs(input_ids=ids, pixel_values=pixels["pixel_values"], token_type_ids=kinds)
        return said.logits[0].log_softmax(-1)

    require_logits(folder, PROMPTS[number], wanted, eager=eager)


@pytest.mark.parametrize("folder", few(KINDS, "gemma"), indirect=True)
def test_a_prompt_without_an_image_is_causal(folder: Path, theirs: Any) -> None:
    require_logits(folder, PROMPTS[5], lambda ids: theirs(input_ids=ids).logits[0].log_softmax(-1), eager=True)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[tuple[int, ...]]:
    return answers_alone(folder, PROMPTS)


@combined("folder tokens", KINDS, (512, 128, 99, 98), common=[("gemma", 512), ("gemma2", 98)], indirect=["folder"])
def test_answers_are_the_same_in_a_batch_and_cached(tokens: int, folder: Path, alone: list[tuple[int, ...]]) -> None:
    """A prompt with an image is found in the cache if all of it is the same, for its keys depend on all of it."""
    with InferenceEngine(folder, max_num_batched_tokens=tokens, max_num_seqs=8, block_size=16) as engine:
        for warm in (False, True):
            params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
            found = engine.generate(PROMPTS, params, use_tqdm=False)
            assert [tuple(each.outputs[0].token_ids) for each in found] == alone
            cached = [each.num_cached_tokens for each in found]
            assert cached == [32 * warm, 64 * warm, 32 * warm, 32 * warm, 32 * warm, 0]
        longer = engine.generate(asked("<image>caption en, please", 0), params, use_tqdm=False)[0]
        assert longer.num_cached_tokens == 0


@pytest.mark.parametrize("folder", few(KINDS, "gemma2"), indirect=True)
def test_answers_survive_preemption(folder: Path) -> None:
    layers = json.loads((folder / "config.json").read_text())["text_config"]["num_hidden_layers"]
    memory = 18 * 16 * layers * 2 * 2 * 16 * 2
    with InferenceEngine(folder, kv_cache_memory=memory, block_size=16, max_model_len=256, max_num_seqs=4) as engine:
        whole = [answers(engine, [each], max_tokens=90)[0] for each in PROMPTS[:3]]
        assert answers(engine, PROMPTS[:3], max_tokens=90) == whole
        assert engine.stats().preemptions


@pytest.mark.parametrize("folder", few(KINDS, "gemma2"), indirect=True)
def test_beams_see_the_prompt_in_both_directions_alone(folder: Path, alone: list[tuple[int, ...]]) -> None:
    with InferenceEngine(folder, block_size=16) as engine:
        prompt = asked("<image>caption en", 0)
        found = beam_search(engine, prompt, BeamSearchParams(beam_width=1, max_tokens=8, ignore_eos=True))[0]
        assert tuple(found.sequences[0].tokens[-8:]) == alone[0]


@combined("folder how", KINDS, GPU_STEPS, common=[("gemma2", "captured")], indirect=["folder"])
def test_steps_of_a_gpu_have_the_same_answers(folder: Path, how: str) -> None:
    given = [("<image><image>which", PICTURES[:2]), ("Nothing to see.", []), ("<image>caption", PICTURES[3:4])]
    require_same_on_a_gpu(folder, given, how, budget=96)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_prompt_that_fits_no_step_is_refused(tmp_path: Path) -> None:
    with InferenceEngine(write(tmp_path / "a", "gemma"), max_num_batched_tokens=76, max_num_seqs=4) as engine:
        answers(engine, [asked("<image>" + 29 * "a", 0)])  # beside four sequences, and 16 drafts
        said = "the prompt has 57 tokens; with an image all of them attend to each other, so at most 56 may: .* larger"
        with pytest.raises(PromptTooLongError, match=said):
            answers(engine, [asked("<image>" + 30 * "a", 0)])
        answers(engine, [200 * "a"])
    said = r"needs 31 tokens for an image in one step, .*: set max_num_batched_tokens=111"
    with pytest.raises(ConfigError, match=said):
        InferenceEngine(tmp_path / "a", max_num_batched_tokens=110)
    with (
        InferenceEngine(write(tmp_path / "b", "gemma2")) as engine,
        pytest.raises(PromptTooLongError, match=r"the prompt has 97 tokens; .* at most 96 may: shorten it$"),
    ):
        answers(engine, [asked("<image>" + 70 * "a", 0)])
    with pytest.raises(ConfigError, match=r"'max_pixels' is not a setting of this model, which has none$"):
        InferenceEngine(tmp_path / "b", mm_processor_kwargs={"max_pixels": 4})


@pytest.mark.parametrize(
    ("part", "said", "why"),
    [
        ("text_config", {"use_bidirectional_attention": False}, "use_bidirectional_attention is false, not true"),
        ("text_config", {"sliding_window": 25}, "an image has 25 embeddings, and sliding_window is 25"),
        ("vision_config", {"projection_dim": 32}, "projection_dim is 32; the text model has 64 elements"),
        ("vision_config", {"num_channels": 1}, "num_channels is 1, not 3"),
        ("vision_config", {"image_size": 16}, "image_seq_length is 25; an image has 4 x 4 patches"),
        ("vision_config", {"patch_size": 0}, "patch_size"),
        ("vision_config", {"hidden_act": "relu"}, "hidden_act"),
    ],
)
def test_configs_that_do_not_fit_are_named(part: str, said: dict[str, Any], why: str, tmp_path: Path) -> None:
    folder = write(tmp_path, "gemma2")
    config = json.loads((folder / "config.json").read_text())
    config[part] |= said
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((InvalidFileError, UnsupportedModelError, ModelLoadError), match=why):
        InferenceEngine(folder)


# ---- files -----------------------------------------------------------------------------------------------------------


@combined("folder begin", KINDS, ("", "model."), common=[("gemma", "model."), ("gemma2", "")], indirect=["folder"])
def test_other_names_of_tensors_are_read(
    begin: str, folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]
) -> None:
    """Those of published checkpoints, and of transformers within."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    renamed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if begin:
            name = name.replace("language_model.model.", "language_model.").replace("language_model.lm_head", "lm_head")
            name = name if name.startswith("lm_head") else begin + name
        else:
            name = name.replace("vision_tower.", "vision_tower.vision_model.")
        renamed[name] = tensor
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    with InferenceEngine(tmp_path) as engine:
        assert answers(engine, PROMPTS) == alone


PUBLISHED: dict[str, dict[str, Any]] = {
    "paligemma-3b-pt-448": {
        "architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma", "bos_token_id": 2,
        "eos_token_id": 1, "hidden_size": 2048, "ignore_index": -100, "image_token_index": 257152, "pad_token_id": 0,
        "projection_dim": 2048, "torch_dtype": "float32", "vocab_size": 257152,
        "text_config": {
            "hidden_size": 2048, "intermediate_size": 16384, "model_type": "gemma", "num_attention_heads": 8,
            "num_hidden_layers": 18, "num_image_tokens": 1024, "num_key_value_heads": 1, "torch_dtype": "float32",
            "vocab_size": 257216,
        },
        "vision_config": {
            "hidden_size": 1152, "image_size": 448, "intermediate_size": 4304, "model_type": "siglip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 27, "num_image_tokens": 1024, "patch_size": 14,
            "projection_dim": 2048, "projector_hidden_act": "gelu_fast", "vision_use_head": False,
        },
    },
    "paligemma2-3b-pt-224": {
        "architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma", "bos_token_id": 2,
        "eos_token_id": 1, "hidden_size": 2304, "image_token_index": 257152, "pad_token_id": 0,
        "projection_dim": 2304, "torch_dtype": "bfloat16", "vocab_size": 257152,
        "text_config": {
            "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": None, "hidden_size": 2304,
            "intermediate_size": 9216, "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers": 26,
            "num_image_tokens": 256, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
            "torch_dtype": "bfloat16", "vocab_size": 257216,
        },
        "vision_config": {
            "hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model",
            "num_attention_heads": 16, "num_hidden_layers": 27, "num_image_tokens": 256, "num_positions": 256,
            "patch_size": 14, "projection_dim": 2304, "vision_use_head": False,
        },
    },
}  # fmt: skip
"""Keys of published models, as far as known; the others have the defaults of transformers."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    said, path = PUBLISHED[name], Path("config.json")
    theirs = AutoConfig.for_model(**{key: value for key, value in said.items() if key != "architectures"})
    side, size = theirs.vision_config.image_size, theirs.text_config.hidden_size
    images = Fields({"size": {"height": side, "width": side}, "image_seq_length": (side // 14) ** 2}, path)
    tower = FAMILY.config_from_hf(Fields(said, path), images, size, {})
    assert (tower.hidden_size, tower.num_layers, tower.num_heads) == (1152, 27, 16)
    assert (tower.patches, tower.cell, tower.rule.resample) == ((side // 14) ** 2, 1, 3)
    assert tower.prefix == (4096 if "2-3b" in name else 8192)
    _, text = family_from_hf(said, path)
    wanted = theirs.text_config
    for ours, key in {
        "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim",
        "max_position": "max_position_embeddings", "norm_eps": "rms_norm_eps", "intermediate_size": "intermediate_size",
        "tie_embeddings": "tie_word_embeddings",
    }.items():  # fmt: skip
        assert getattr(text, ours) == getattr(wanted, key), key
    kinds = getattr(wanted, "layer_types", [None] * text.num_layers)
    assert list(text.sliding_windows) == [4096 if kind == "sliding_attention" else None for kind in kinds]
    caps: Any = text
    assert caps.attention_softcap == getattr(wanted, "attn_logit_softcapping", None)
    assert caps.final_softcap == getattr(wanted, "final_logit_softcapping", None)


@pytest.mark.parametrize("folder", ["gemma"], indirect=True)
def test_the_tokenizer_is_one_with_the_marks(folder: Path) -> None:
    assert [Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(each) for each in MARKS[:2]] == [MARK, BOS]
