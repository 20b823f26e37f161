# SPDX-License-Identifier: MIT
"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5 of random weights: towers, positions and logits against transformers, and
answers however a prompt comes to the model."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from candle_vllm.core import EngineConfig, InferenceEngine, LoRARequest, SamplingParams
from candle_vllm.core.assembly.model import load_model
from candle_vllm.core.conversion import write_gguf
from candle_vllm.core.devices import choose_device
from candle_vllm.core.engine.build import preparation_for
from candle_vllm.core.engine.runners.eager_runner import EagerTower
from candle_vllm.core.engine.runners.images import TowerRunner, tiles_of
from candle_vllm.core.engine.runners.recorded_tower import RecordedTower
from candle_vllm.core.engine.step.batch import rotary_positions
from candle_vllm.core.engine.step.live import LiveSequence
from candle_vllm.core.engine.step.sequence import Run
from candle_vllm.core.errors import (
    ConfigError,
    InvalidFileError,
    InvalidParameterError,
    RequestError,
    UnsupportedModelError,
    WeightsError,
)
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.models.qwen_vl import FAMILY
from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.remote import RemoteEngine
from candle_vllm.core.vision.preprocessing import window_order
from packages.core.tests.engine.drafted import same_times
from packages.core.tests.models.families import QWEN4_EXP, QWEN35
from packages.core.tests.models.peft_adapters import randomise as randomise_adapter
from packages.core.tests.models.published_configs import CONFIGS
from packages.core.tests.models.sight import (
    END,
    GPU_STEPS,
    PAD,
    PICTURES,
    START,
    VIDEO,
    answers,
    answers_alone,
    answers_without_torch,
    finished,
    loaded_from,
    model_of,
    prompt_error,
    random_model,
    request_of,
    require_logits,
    require_same_embeddings,
    require_same_from_gguf,
    require_same_on_a_gpu,
    write_tokenizer,
    write_tower,
)
from packages.core.tests.models.tiny import SMALL
from tests.common_run import combined, few

TOWER = {"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"embed_dim": 32, "mlp_ratio": 4, "hidden_act": "quick_gelu", "hidden_size": 64},
    "qwen2_5_vl": {
        "hidden_size": 32, "intermediate_size": 48, "hidden_act": "silu", "out_hidden_size": 64, "window_size": 16,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "hidden_size": 32, "intermediate_size": 48, "hidden_act": "gelu_pytorch_tanh", "out_hidden_size": 64,
        "num_position_embeddings": 49, "deepstack_visual_indexes": [0, 2],
    },
}  # fmt: skip
KINDS["qwen3_vl_moe"] = KINDS["qwen3_vl"]
KINDS["qwen3_5"] = {key: value for key, value in KINDS["qwen3_vl"].items() if key != "deepstack_visual_indexes"}
KINDS["qwen3_5_moe"] = KINDS["qwen4_exp"] = KINDS["qwen3_5"]
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "decoder_sparse_step": 1,
    "head_dim": 16,
}
HYBRID = QWEN35 | {
    "num_hidden_layers": 3,
    "head_dim": 64,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
TEXTS: dict[str, dict[str, Any]] = {
    "qwen3_vl": {"head_dim": 16, "num_hidden_layers": 3},
    "qwen3_vl_moe": EXPERTS,
    "qwen3_5": HYBRID,
    "qwen3_5_moe": EXPERTS | {"shared_expert_intermediate_size": 56} | HYBRID,
    "qwen4_exp": QWEN4_EXP | {"head_dim": 64, "eos_token_id": END},
}
"""What text models have beside `SMALL`."""
DEEP = ("qwen3_vl", "qwen3_vl_moe")
HYBRIDS = ("qwen3_5", "qwen3_5_moe", "qwen4_exp")
NEWEST = (*DEEP, *HYBRIDS)
SOME = ("qwen2_5_vl", "qwen3_vl", "qwen3_5_moe")  # of each text model: plain, with layers to add to, with states
JOINED = [(kind, joined) for kind in KINDS for joined in (False, True)]
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 256, "max_pixels": 1600, "patch_size": 4,
    "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
ONE = "<|vision_start|><|image_pad|><|vision_end|>"
ASK = f"<|im_start|>user\n{ONE}Compare this with {ONE}, please.<|im_end|>\n<|im_start|>assistant\n"
SHOWN = (ASK, ONE * 2 + "?", f"{ONE} and a longer text than before, then {ONE}")
PROMPT: dict[str, Any] = {"prompt": ASK, "multi_modal_data": {"image": PICTURES[:2]}}
OTHER = {"prompt": ASK, "multi_modal_data": {"image": [PICTURES[1], PICTURES[0]]}}
TWICE = {"prompt": ASK, "multi_modal_data": {"image": [PICTURES[2], PICTURES[2]]}}
FIRST = {"prompt": f"{ONE}What is this?", "multi_modal_data": {"image": [PICTURES[3]]}}
PROMPTS: list[Any] = [PROMPT, OTHER, TWICE, FIRST, "<|im_start|>user\nCompare nothing.<|im_end|>\n"]
GREEDY = SamplingParams(max_tokens=8, temperature=0)


def write(folder: Path, kind: str, **vision: Any) -> Path:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    if kind in HYBRIDS:  # a quarter of a head
        rope |= {"partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2]}
    config = AutoConfig.for_model(
        kind,
        text_config=dict(SMALL) | TEXTS.get(kind, {}) | {"rope_parameters": rope},
        vision_config=TOWER | KINDS[kind] | vision,
        image_token_id=PAD,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    model = random_model(config)
    with torch.no_grad():  # embeddings of pictures as long as those of words
        merger = model.model.visual.merger
        (merger.linear_fc2 if kind in NEWEST else merger.mlp[2]).weight.mul_(3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", params=list(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return model_of(folder)


def their_pixels(folder: Path, pictures: list[NDArray[np.uint8]]) -> dict[str, torch.Tensor]:
    said = {key: value for key, value in read_json(folder / "preprocessor_config.json").items() if "type" not in key}
    processor = Qwen2VLImageProcessorPil(**said)
    found = processor(images=[Image.fromarray(each) for each in pictures], return_tensors="pt")
    return {key: found[key] for key in ("pixel_values", "image_grid_thw")}


@combined(
    "folder eager", KINDS, (True, False),
    common=[*((kind, False) for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"))], indirect=["folder"],
)  # fmt: skip
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    with torch.inference_mode():
        found = theirs.model.get_image_features(**their_pixels(folder, PICTURES))
        deep = getattr(found, "deepstack_features", None) or []
        expected = [torch.cat(each, 1) for each in zip(found.pooler_output, *deep, strict=True)]
    require_same_embeddings(folder, PAD, PICTURES, expected, eager=eager, most=16)


@pytest.mark.parametrize(
    ("folder", "text", "chunks"),
    few(
        [(kind, text, chunks) for kind in KINDS for text in SHOWN for chunks in ([1000], [7], [1, 2, 30])],
        ("qwen2_vl", SHOWN[0], [1000]),
        ("qwen2_5_vl", SHOWN[1], [7]),
        ("qwen3_vl", SHOWN[2], [1, 2, 30]),
    ),
    indirect=["folder"],
)
def test_positions_are_those_of_transformers(chunks: list[int], text: str, folder: Path, theirs: Any) -> None:
    loaded = loaded_from(folder, op_by_op=True)
    pictures = PICTURES[1:3]
    request = request_of(loaded, pictures, text)
    made = preparation_for(loaded, 512).prepare(request)[0]
    assert isinstance(made, LiveSequence)
    sequence = made.sequence
    ids = torch.tensor([request.prompt_token_ids])
    grid = their_pixels(folder, pictures)["image_grid_thw"]
    wanted, delta = theirs.model.get_rope_index(ids, (ids == PAD).int(), grid)
    assert sequence.images[-1].shift == delta.item()
    sequence.tokens += [1] * 20  # what is generated later
    found, start, total = [], 0, len(sequence.tokens)
    while start < total:
        count = min(chunks[min(len(found), len(chunks) - 1)], total - start)
        run = Run(sequence, start, count, 0, 0, False)
        turned = rotary_positions([run], np.array([0, count]))
        places = np.repeat(np.arange(start, start + count)[:, None], 3, 1)
        if turned is not None:
            places += turned.shifts[:, None]
            places[turned.rows] = turned.places[:, :3]
        found.append(places)
        start += count
    ours = np.concatenate(found).T
    length = ids.shape[1]
    assert np.array_equal(ours[:, :length], wanted[:, 0].numpy())
    assert np.array_equal(ours[:, length:], np.repeat([np.arange(length, total) + delta.item()], 3, 0))


@combined(
    "folder eager tokens",
    KINDS,
    (True, False),
    (512, 23),
    common=[
        ("qwen3_vl_moe", True, 512),
        ("qwen3_5_moe", True, 23),
        *((kind, False, 23) for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")),
    ],
    indirect=["folder"],
)
def test_logits_are_those_of_transformers(tokens: int, eager: bool, folder: Path, theirs: Any) -> None:
    pixels = their_pixels(folder, PICTURES[:2])

    def wanted(ids: torch.Tensor) -> torch.Tensor:
        return theirs(input_ids=ids, **pixels, mm_token_type_ids=(ids == PAD).int()).logits[0].log_softmax(-1)

    require_logits(folder, PROMPT, wanted, eager=eager, tokens=tokens)


@combined("folder eager", KINDS, (True, False), common=[("qwen2_5_vl", False), ("qwen3_vl", True)], indirect=["folder"])
def test_vectors_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    """The last token's state, as embedding models with this class have it; what is shown changes it."""
    with InferenceEngine(folder, op_by_op=eager) as engine:
        asked = [PROMPT, {**PROMPT, "multi_modal_data": {"image": PICTURES[1:3]}}, PROMPTS[-1]]
        found = engine.embed(asked, use_tqdm=False)
        again = engine.embed(asked[:1], use_tqdm=False)[0]
    assert np.abs(np.subtract(again.embedding, found[0].embedding)).max() <= (1e-6 if eager else 0)
    ids = torch.tensor([found[0].prompt_token_ids])
    with torch.inference_mode():
        given = their_pixels(folder, PICTURES[:2]) | {"mm_token_type_ids": (ids == PAD).int()}
        state = theirs.model(input_ids=ids, **given).last_hidden_state[0, -1].double().numpy()
    # keys and values are bfloat16 in the compiled steps
    assert float(np.dot(found[0].embedding, state / np.linalg.norm(state))) > (0.99999 if eager else 0.999)
    assert float(np.dot(found[0].embedding, found[1].embedding)) < 0.999


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[tuple[int, ...]]:
    return answers_alone(folder, PROMPTS)


@combined("folder tokens", KINDS, (512, 64, 17), common=[*zip(SOME, (512, 64, 17), strict=True)], indirect=["folder"])
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(
    tokens: int, folder: Path, alone: list[tuple[int, ...]]
) -> None:
    with InferenceEngine(folder, max_num_batched_tokens=tokens, max_num_seqs=8) as engine:
        assert answers(engine, PROMPTS) == alone
        again = engine.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert [tuple(each.outputs[0].token_ids) for each in again] == alone
        assert all(each.num_cached_tokens for each in again[:3])
        assert answers(engine, PROMPTS[-1:]) == alone[-1:]


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("folder", HYBRIDS, indirect=True)
def test_states_behind_a_picture_are_not_those_behind_another(folder: Path, eager: bool) -> None:
    """Of one size and so with the same tokens: a checkpoint is found by what a picture shows, and answers are as if
    nothing was found. The third prompt of each picture goes on from a checkpoint within it."""
    pictures, behind = [PICTURES[0], 255 - PICTURES[0]], ", what now?"
    asked = [
        {"prompt": f"{ONE}{text}", "multi_modal_data": {"image": [picture]}}
        for picture in pictures
        for text in (behind, f" -{behind}", f"!{behind}")
    ]
    settings: dict[str, Any] = {"op_by_op": eager, "block_size": 16}
    with InferenceEngine(folder, enable_prefix_caching=False, **settings) as engine:
        wanted = [answers(engine, [prompt])[0] for prompt in asked]
    assert len(set(wanted)) == len(wanted)
    with InferenceEngine(folder, max_num_batched_tokens=64, **settings) as engine:
        cached = []
        for prompt in asked + asked:
            before = engine.stats().cached_prompt_tokens
            assert answers(engine, [prompt]) == [wanted[len(cached) % len(wanted)]]
            cached.append(engine.stats().cached_prompt_tokens - before)
    assert cached == [0, 0, 16] * 2 + [32] * 6


@pytest.mark.every_case
@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_pictures_need_no_torch(folder: Path) -> None:
    with InferenceEngine(folder, device="cpu") as engine:
        assert answers_without_torch([(folder, ASK, PICTURES[:2])]) == answers(engine, [PROMPT])


@pytest.mark.one_of_each(2)
@combined(
    "folder eager", KINDS, (True, False),
    common=[("qwen3_vl", False), ("qwen3_5_moe", False)], indirect=["folder"],
)  # fmt: skip
def test_answers_survive_preemption_and_guesses(eager: bool, folder: Path) -> None:
    long = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
    held = 100_000 * (1 + eager)
    if read_json(folder / "config.json")["model_type"] in HYBRIDS:
        held = 500_000 * (1 + eager)  # half of it is for states
    if read_json(folder / "config.json")["model_type"] == "qwen4_exp":
        held = 2_200_000  # keys and values are float32 in the compiled steps too
    small: dict[str, Any] = {"kv_cache_memory": held, "block_size": 16, "max_model_len": 256}
    preempted = False
    with InferenceEngine(folder, op_by_op=eager, **small, speculative_config={"method": "none"}) as engine:
        whole = [engine.generate(prompt, long, use_tqdm=False)[0].outputs[0].token_ids for prompt in PROMPTS]
        found = engine.generate(PROMPTS, long, use_tqdm=False)
        assert [each.outputs[0].token_ids for each in found] == whole
        preempted = bool(engine.stats().preemptions)
    assert preempted
    guesses = {"num_speculative_tokens": 4, "prompt_lookup_min": 2}
    with InferenceEngine(folder, op_by_op=eager, max_model_len=256, speculative_config=guesses) as engine:
        inner: Any = engine._engine
        inner._drafter.times = same_times  # drafts are tried, whatever they take on this machine
        for _ in range(2):  # the second time by what was answered the first
            found = engine.generate(PROMPTS, long, use_tqdm=False)
            assert [each.outputs[0].token_ids for each in found] == whole
        assert engine.stats().accepted_draft_tokens > 100


@combined("folder how", KINDS, GPU_STEPS, common=[("qwen3_vl", "captured")], indirect=["folder"])
def test_steps_of_a_gpu_have_the_same_answers(folder: Path, how: str) -> None:
    """Tokens that three positions turn, in what is captured too."""
    asked = [
        (ASK, PICTURES[:2]),
        (ASK, [PICTURES[2]] * 2),
        ("Nothing to see.", []),
        (f"{ONE}What is this?", PICTURES[3:]),
    ]
    require_same_on_a_gpu(folder, asked, how)


@pytest.mark.parametrize("folder", few(KINDS, "qwen3_vl"), indirect=True)
def test_a_text_alone_has_the_bits_of_the_text_model(folder: Path, tmp_path: Path) -> None:
    config = read_json(folder / "config.json")
    named = {
        "qwen3_vl": ("Qwen3ForCausalLM", "qwen3"),
        "qwen3_vl_moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
        "qwen3_5": ("Qwen3_5ForCausalLM", "qwen3_5_text"),
        "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text"),
        "qwen4_exp": ("Qwen4ExpForCausalLM", "qwen4_exp_text"),
    }
    architecture, kind = named.get(config["model_type"], ("Qwen2ForCausalLM", "qwen2"))
    text = config["text_config"] | {"architectures": [architecture], "model_type": kind, "norm_topk_prob": True}
    del text["rope_parameters"]["mrope_section"]
    for file in folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(text | {"tie_word_embeddings": config["tie_word_embeddings"]}))
    stored = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if "visual." not in name
    }
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    params, found = SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=1), []
    for source in (folder, tmp_path):
        with InferenceEngine(source, enable_prefix_caching=False, max_num_batched_tokens=512) as engine:
            if source == folder:
                engine.generate(PROMPT, GREEDY, use_tqdm=False)  # leaves nothing behind
            out = engine.generate(PROMPTS[-1], params, use_tqdm=False)[0]
            assert out.prompt_logprobs is not None
            chosen = [each.chosen.logprob for each in out.prompt_logprobs if each is not None]
            found.append((chosen, out.outputs[0].token_ids))
    assert found[0] == found[1]


@pytest.mark.parametrize("folder", few(KINDS, "qwen3_vl"), indirect=True)
def test_conversations_have_pictures_here_and_in_another_process(folder: Path) -> None:
    ask = {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "image", "image": PICTURES[0]}]}
    found = []
    kinds: tuple[Callable[..., InferenceEngine | RemoteEngine], ...] = (InferenceEngine, RemoteEngine)
    for make in kinds:
        with make(folder) as engine:
            assert engine.model_info.modalities == ("text", "image")
            found.append(engine.chat([ask], GREEDY))
    assert found[0].prompt_token_ids == found[1].prompt_token_ids
    assert found[0].outputs[0].token_ids == found[1].outputs[0].token_ids
    assert list(found[0].prompt_token_ids).count(PAD) == 5 * 4


@pytest.mark.parametrize("folder", few(KINDS, "qwen3_vl"), indirect=True)
def test_what_cannot_be_seen_is_refused_by_name(folder: Path) -> None:
    with InferenceEngine(folder) as engine:
        for prompt, message in (
            ({"prompt": "<|video_pad|>", "multi_modal_data": {"video": [1]}}, "multi_modal_data has 'video'"),
            (
                {"prompt": ONE, "multi_modal_data": {"image": np.zeros((2, 401, 3), np.uint8)}},
                "401 x 2 pixels",
            ),
            ({"prompt": ONE * 2, "multi_modal_data": {"image": PICTURES[0]}}, "1 images, and 2 placeholders"),
        ):
            with pytest.raises(InvalidParameterError, match=message):
                engine.generate(prompt, GREEDY, use_tqdm=False)
        with pytest.raises(InvalidParameterError, match="video"):
            engine.chat([{"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}], GREEDY)


@pytest.mark.parametrize("folder", few(KINDS, "qwen3_vl"), indirect=True)
def test_an_operator_says_how_large_pictures_become(folder: Path, tmp_path: Path) -> None:
    """By either name, before what the file says; and more than what is usual, up to what is published."""
    usual = loaded_from(folder, op_by_op=True).vision
    assert usual is not None
    text, tower = tmp_path / "model.gguf", write_mmproj(folder, tmp_path / "mmproj.gguf")
    write_gguf(EngineConfig(model=str(folder), dtype="f32"), text)
    for said, least, most in (
        ({"max_pixels": 640}, 256, 640),
        ({"size": {"longest_edge": 640, "shortest_edge": 128}}, 128, 640),
        ({"min_pixels": 512, "size": {"shortest_edge": 128}}, 512, 1600),
        ({"max_pixels": 16 << 16}, 256, 16 << 16),
    ):
        for made in ({"model": str(folder)}, {"model": str(text), "mmproj": tower, "tokenizer": folder}):
            config = EngineConfig(**made, op_by_op=True, mm_processor_kwargs=said)
            vision = load_model(config, choose_device("cpu"), lambda *_: None).vision
            assert vision is not None
            assert (vision.parts.rule.least, vision.parts.rule.most) == (least, most)  # type: ignore[union-attr]
            if most == 640:
                counts = [len(each.look([PAD], PICTURES[:1])[0]) for each in (vision, usual)]
                assert counts[0] < counts[1]
    for said, message in (
        (
            {"max_pixel": 640},
            "'max_pixel' is not a setting of this model, which has min_pixels, max_pixels, size.shortest",
        ),
        ({"max_pixels": 1 + (16 << 16)}, "mm_processor_kwargs: max_pixels is 1048577; it must be 1 to 1048576"),
        ({"max_pixels": 100}, "mm_processor_kwargs: images must have at least 256 pixels and at most 100"),
        ({"size": {"longest_edge": "x"}}, "mm_processor_kwargs: max_pixels is 'x', not a int"),
    ):
        with pytest.raises(ConfigError, match=message):
            loaded_from(folder, mm_processor_kwargs=said)


@pytest.mark.parametrize("folder", few(KINDS, "qwen2_vl"), indirect=True)
def test_marks_of_a_picture_stand_side_by_side(folder: Path) -> None:
    loaded = loaded_from(folder, op_by_op=True)
    request = request_of(loaded, PICTURES[:1], ONE)
    ids = list(request.prompt_token_ids)
    ids[2:2] = [5]
    with pytest.raises(InvalidParameterError, match="must be consecutive"):
        preparation_for(loaded, 512).prepare(msgspec.structs.replace(request, prompt_token_ids=ids))


# ---- files -----------------------------------------------------------------------------------------------------------


def changed(folder: Path, made: Path, edit: Callable[[dict[str, Any]], object], **processor: Any) -> Path:
    """A checkpoint whose config says something else."""
    made.mkdir()
    for file in folder.iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    config = read_json(folder / "config.json")
    edit(config)
    (made / "config.json").write_text(json.dumps(config))
    (made / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | processor))
    return made


def flat(config: dict[str, Any]) -> None:
    """As published configs have it: the text model's keys beside the others, and rotary settings as they were."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    config |= {key: value for key, value in text.items() if key != "model_type"}
    config["vision_config"]["model_type"] = config["model_type"]


def published(config: dict[str, Any]) -> None:
    """As those of Qwen3-VL have it: the flag of axes in turns, and the model_type of the whole for the tower."""
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = {"mrope_interleaved": True, "rope_type": "default", "mrope_section": rope["mrope_section"]}
    if config["model_type"] == "qwen4_exp":  # by default whole heads rotate
        text["rope_scaling"]["partial_rotary_factor"] = rope["partial_rotary_factor"]
    config["vision_config"]["model_type"] = config["model_type"]


@pytest.mark.parametrize("folder", few(KINDS, "qwen2_vl", "qwen3_vl_moe"), indirect=True)
def test_published_configs_and_names_of_both_layouts_are_read(
    folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]
) -> None:
    kind = read_json(folder / "config.json")["model_type"]
    newest = kind in NEWEST
    made = changed(folder, tmp_path / "flat", published if newest else flat)
    stored = load_file(folder / "model.safetensors")
    plain = {name.replace("model.visual.", "visual."): tensor for name, tensor in stored.items()}
    plain = {name.replace("model.language_model.", "model."): tensor for name, tensor in plain.items()}
    newer = {
        f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in plain.items()
    }
    lying = {name: tensor.mT.contiguous() if ".experts." in name else tensor for name, tensor in newer.items()}
    for layout in (plain, newer, *([lying] if kind == "qwen3_vl_moe" else [])):
        save_file(layout, made / "model.safetensors", {"format": "pt"})
        with InferenceEngine(made) as engine:
            assert answers(engine, PROMPTS) == alone


PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[int, ...]]] = {
    "Qwen2-VL-2B": (
        {
            "architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "hidden_act": "silu",
            "bos_token_id": 151643, "eos_token_id": 151645, "image_token_id": 151655, "vision_token_id": 151654,
            "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
            "num_key_value_heads": 2, "max_position_embeddings": 32768, "max_window_layers": 28, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
            "vocab_size": 151936, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vision_config": {
                "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 1536,
                "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
            },
        },
        {},
        (1280, 5120, 32, 0, 0),
    ),
    "Qwen2.5-VL-3B": (
        {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "hidden_act": "silu",
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "max_position_embeddings": 128000, "max_window_layers": 70, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
            "vocab_size": 151936, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vision_config": {
                "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2,
                "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
                "tokens_per_second": 2, "temporal_patch_size": 2,
            },
        },
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}},
        (1280, 3420, 32, 4, 28),
    ),
    "Qwen3-VL-2B": (
        {
            "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "image_token_id": 151655,
            "tie_word_embeddings": True,
            "text_config": {
                "attention_bias": False, "dtype": "bfloat16", "eos_token_id": 151645, "head_dim": 128,
                "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
                "max_position_embeddings": 262144, "model_type": "qwen3_vl_text", "num_attention_heads": 16,
                "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
                "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
                "rope_theta": 5000000, "tie_word_embeddings": True, "vocab_size": 151936,
            },
            "vision_config": {
                "deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": 1024, "in_channels": 3, "intermediate_size": 4096, "model_type": "qwen3_vl",
                "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": 2048, "patch_size": 16,
                "spatial_merge_size": 2, "temporal_patch_size": 2,
            },
        },
        {
            "size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        (1024, 4096, 24, 0, 0),
    ),
    "Qwen3.5-9B": (
        {
            "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5", "image_token_id": 248056,
            "tie_word_embeddings": False, "text_config": dict(CONFIGS["Qwen3.5-9B"]),
            "vision_config": {
                "deepstack_visual_indexes": [], "depth": 27, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 1152,
                "in_channels": 3, "intermediate_size": 4304, "model_type": "qwen3_5", "num_heads": 16,
                "num_position_embeddings": 2304, "out_hidden_size": 4096, "patch_size": 16, "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        {
            "size": {"longest_edge": 16777216, "shortest_edge": 65536}, "patch_size": 16, "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
        (1152, 4304, 27, 0, 0),
    ),
}  # fmt: skip
"""What published files say, and of their towers width, inner width, layers, cells of a window's side, and layers that
have windows."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    config, size, wanted = PUBLISHED[name]
    path, patches = Path("config.json"), {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    processor = Fields(patches | (size or {"min_pixels": 3136, "max_pixels": 12845056}), path)
    said = config.get("text_config", config)
    found = FAMILY.config_from_hf(Fields(config, path), processor, said["hidden_size"])
    windows = (found.window, len(found.windowed))
    assert (found.hidden_size, found.intermediate_size, found.num_layers, *windows) == wanted
    third = name.startswith("Qwen3")
    sizes = (640, 480), (1920, 1080)
    grids = [found.rule.cut(height, width).cells(32 if third else 28) for width, height in sizes]
    assert [rows * columns for rows, columns in grids] == ([300, 2040] if third else [391, 2691])
    text = family_from_hf(config, path)[1]
    sections = {"Qwen3-VL-2B": [24, 20, 20], "Qwen3.5-9B": [11, 11, 10]}.get(name, [16, 24, 24])
    assert [text.rope.axes.count(axis) for axis in range(3)] == sections
    assert text.rope.axes[:4] == ((0, 1, 2, 0) if third else (0,) * 4)
    assert text.sliding_windows == (None,) * said["num_hidden_layers"]
    assert (found.learned, found.deep) == (48 if third else 0, (5, 11, 17) if name == "Qwen3-VL-2B" else ())


NAMES = {
    "merger.ln_q": "v.post_ln", "merger.mlp.0": "mm.0", "merger.mlp.2": "mm.2", "norm1": "ln1", "norm2": "ln2",
    "attn.proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "attn.qkv": "attn_qkv",
    "merger.norm": "v.post_ln", "merger.linear_fc1": "mm.0", "merger.linear_fc2": "mm.2",
    "mlp.linear_fc1": "ffn_up", "mlp.linear_fc2": "ffn_down", "patch_embed.proj": "v.patch_embd",
    "pos_embed": "v.position_embd",
}  # fmt: skip
"""By Hugging Face's names of a tower's tensors, without those of blocks before them."""


def write_mmproj(folder: Path, made: Path, *, joined: bool = False, quantised: bool = False) -> Path:
    """The checkpoint's tower as llama.cpp has it; `joined` leaves queries, keys and values in one tensor, and matrices
    are `quantised` to Q8_0 where blocks of 32 fill their rows."""
    config = read_json(folder / "config.json")
    kind, vision = config["model_type"].removesuffix("_moe"), config["vision_config"]
    newest, tensors = kind in NEWEST, dict[str, NDArray[np.float32]]()
    size = vision["embed_dim"] if kind == "qwen2_vl" else vision["hidden_size"]
    merger = {"qwen2_vl": "qwen2vl_merger", "qwen2_5_vl": "qwen2.5vl_merger"}
    values: dict[str, Any] = {
        "image_size": 7 * 4 if newest else 560, "embedding_length": size, "image_min_pixels": 256,
        "feed_forward_length": 0 if kind == "qwen2_vl" else 48, "image_max_pixels": 1600,
        "clip.use_gelu" if newest else "clip.use_silu": kind != "qwen2_vl",
    }  # fmt: skip
    if kind == "qwen2_5_vl":
        values |= {"n_wa_pattern": 2, "window_size": 16}
    deep, projector = vision.get("deepstack_visual_indexes", []), merger.get(kind, "qwen3vl_merger")
    if newest:
        values["is_deepstack_layers"] = [layer in deep for layer in range(3)]

    def is_quantised(name: str, data: NDArray[np.float32]) -> bool:
        return quantised and data.ndim == 2 and data.shape[1] % 32 == 0 and "position" not in name

    for name, tensor in load_file(folder / "model.safetensors").items():
        _, tower, plain = name.rpartition("visual.")
        if not tower:
            continue
        part, _, kind = plain.rpartition(".")
        block, data = "", tensor.numpy()
        if (found := re.match(r"blocks\.(\d+)\.", part)) is not None:
            block, part = f"v.blk.{found[1]}.", part[found.end() :]
        if (found := re.match(r"deepstack_merger_list\.(\d+)\.(?:linear_)?", part)) is not None:
            tensors[f"v.deepstack.{deep[int(found[1])]}.{part[found.end() :]}.{kind}"] = data
        elif part == "patch_embed.proj" and kind == "weight":
            for frame in range(2):
                tensors["v.patch_embd.weight" + (".1" if frame else "")] = data[:, :, frame].copy()
        elif part == "attn.qkv" and not joined:
            for letter, third in zip("qkv", np.split(data, 3)):
                tensors[f"{block}attn_{letter}.{kind}"] = third.copy()
        else:
            tensors[f"{block}{NAMES[part]}.{kind}"] = data
    return write_tower(made, projector, values, tensors, PROCESSOR, is_quantised)


@pytest.mark.parametrize(
    ("folder", "joined"),
    few(JOINED, ("qwen2_5_vl", False), ("qwen3_vl", True), ("qwen3_5", False)),
    indirect=["folder"],
)
def test_a_gguf_file_and_that_of_its_tower_are_the_same_model(
    joined: bool, folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]
) -> None:
    kind = read_json(folder / "config.json")["model_type"]
    tower = write_mmproj(folder, tmp_path / "mmproj.gguf", joined=joined)
    require_same_from_gguf(folder, tower, PROMPTS, alone, kind.replace("_", "") if kind in NEWEST else "qwen2vl")


@pytest.mark.parametrize(("folder", "joined"), few(JOINED, ("qwen3_vl", False)), indirect=["folder"])
def test_a_tower_may_be_quantised(joined: bool, folder: Path, tmp_path: Path) -> None:
    """In its file, or as it is loaded: it gives what one of the numbers that its blocks stand for gives; where those
    are multiplied as they are stored, what they are multiplied by is rounded as well."""
    text, tower = tmp_path / "model.gguf", write_mmproj(folder, tmp_path / "m.gguf", joined=joined, quantised=True)
    write_gguf(EngineConfig(model=str(folder), dtype="f32"), text)
    kind, stored = GGMLQuantizationType.Q8_0, load_file(folder / "model.safetensors")
    for name, tensor in stored.items():
        if "visual." in name and tensor.dim() == 2 and tensor.shape[1] % 32 == 0 and "pos_embed" not in name:
            stored[name] = torch.from_numpy(dequantize(quantize(tensor.numpy(), kind), kind).reshape(tensor.shape))
    plain = changed(folder, tmp_path / "plain", lambda _: None)
    save_file(stored, plain / "model.safetensors", {"format": "pt"})
    wanted = loaded_from(plain, op_by_op=True)
    quantised = EngineConfig(model=str(text), mmproj=tower, tokenizer=folder)
    assert wanted.tower is not None
    assert wanted.vision is not None
    team, cpu = ThreadTeam(2), choose_device("cpu")
    try:
        in_situ = EngineConfig(model=str(folder), isq="q8_0")
        for config, eager, most in (
            (quantised, True, 1e-4), (quantised, False, 2e-2), (in_situ, True, 1e-4), (in_situ, False, 2e-2)
        ):  # fmt: skip
            loaded = load_model(dataclasses.replace(config, op_by_op=eager), cpu, lambda *_: None)
            assert loaded.tower is not None
            found = loaded.tower.tower
            runner: TowerRunner = EagerTower(found, cpu) if eager else RecordedTower(found, team)
            for image in wanted.vision.look([PAD] * 2, PICTURES[:2])[1]:
                tiles = tiles_of(image)
                ours, theirs = finished(runner, tiles)[0], finished(EagerTower(wanted.tower.tower, cpu), tiles)[0]
                error = np.square(ours - theirs).mean() / np.square(theirs).mean()
                assert (0.0 if eager else 1e-12) <= error < most**2
    finally:
        team.close()


@pytest.mark.parametrize("folder", few(KINDS, "qwen3_vl"), indirect=True)
def test_a_text_model_that_is_quantised_has_pictures(folder: Path) -> None:
    with InferenceEngine(folder, isq="q8_0", enable_prefix_caching=False) as engine:
        wanted = [answers(engine, [prompt])[0] for prompt in PROMPTS]
    with InferenceEngine(folder, isq="q8_0", max_num_batched_tokens=23, max_num_seqs=8) as engine:
        assert answers(engine, PROMPTS) == wanted
        assert answers(engine, PROMPTS) == wanted


def adapted(folder: Path, made: Path, targets: str) -> Any:
    """PEFT's model with an adapter of random numbers, which is saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice
        whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        model = get_peft_model(whole, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
        randomise_adapter(model, 1)
        model.save_pretrained(str(made))
    return model.eval()


@pytest.mark.parametrize("folder", few(KINDS, "qwen3_vl"), indirect=True)
def test_adapters_change_the_text_model_of_a_prompt_with_pictures(folder: Path, tmp_path: Path) -> None:
    theirs = adapted(folder, tmp_path / "a", r".*language_model.*\.(q_proj|v_proj)")
    request = LoRARequest("a", lora_path=str(tmp_path / "a"))
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    with InferenceEngine(folder, op_by_op=True, enable_lora=True) as engine:
        found = engine.generate(PROMPT, params, lora_request=request, use_tqdm=False)[0]
        plain = engine.generate(PROMPT, params, use_tqdm=False)[0]
    ids = torch.tensor([list(found.prompt_token_ids)])
    with torch.inference_mode():
        given = their_pixels(folder, PICTURES[:2]) | {"mm_token_type_ids": (ids == PAD).int()}
        logits = theirs(input_ids=ids, **given).logits[0]
    assert prompt_error(found, logits) < 1e-4
    assert prompt_error(plain, logits) > 1e-2
    asked = [request, None, request, None, request]
    with InferenceEngine(folder, enable_lora=True, max_num_batched_tokens=64, max_num_seqs=8) as engine:
        wanted = [
            engine.generate(prompt, GREEDY, lora_request=each, use_tqdm=False)[0].outputs[0].token_ids
            for prompt, each in zip(PROMPTS, asked, strict=True)
        ]
        together = engine.generate(PROMPTS, GREEDY, lora_request=asked, use_tqdm=False)
        assert [each.outputs[0].token_ids for each in together] == wanted


@pytest.mark.parametrize("folder", few(KINDS, "qwen3_vl"), indirect=True)
def test_an_adapter_of_a_tower_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    adapted(folder, tmp_path / "a", r".*visual.*\.qkv")
    with (
        InferenceEngine(folder, enable_lora=True) as engine,
        pytest.raises(RequestError, match=r"visual\.blocks\.0\.attn\.qkv.* is not part of the text model"),
    ):
        engine.generate("a", GREEDY, lora_request=LoRARequest("a", lora_path=str(tmp_path / "a")), use_tqdm=False)


def test_a_text_model_must_have_the_layers_that_a_tower_adds_to(tmp_path: Path) -> None:
    folder, text = write(tmp_path / "model", "qwen3_vl"), tmp_path / "model.gguf"
    other = write(tmp_path / "other", "qwen3_vl", deepstack_visual_indexes=[1])
    write_gguf(EngineConfig(model=str(folder), dtype="f32"), text)
    with pytest.raises(InvalidFileError, match="n_deepstack_layers is 2; the vision tower adds to 1 layers"):
        InferenceEngine(text, mmproj=write_mmproj(other, tmp_path / "mmproj.gguf"), tokenizer=folder)
    stored = load_file(folder / "model.safetensors")
    one = {name: tensor for name, tensor in stored.items() if ".layers.1." not in name and ".layers.2." not in name}
    made = changed(folder, tmp_path / "one", lambda config: config["text_config"].update(num_hidden_layers=1))
    save_file(one, made / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidFileError, match="adds to 2 layers, but the text model has 1"):
        InferenceEngine(made)


@pytest.mark.parametrize("folder", few(KINDS, "qwen2_5_vl", "qwen3_vl"), indirect=True)
def test_a_tower_that_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    numbers = iter(range(99))

    def refused(
        kind: type[Exception], message: str, edit: Callable[[dict[str, Any]], object], **processor: Any
    ) -> None:
        with pytest.raises(kind, match=message):
            InferenceEngine(changed(folder, tmp_path / str(next(numbers)), edit, **processor))

    def tower(**values: Any) -> Callable[[dict[str, Any]], object]:
        return lambda config: config["vision_config"].update(values)

    def same(config: dict[str, Any]) -> None:
        pass

    refused(InvalidFileError, "patch_size is 8; the tower's is 4", same, patch_size=8)
    refused(InvalidFileError, "merge_size is 4; the tower's is 2", same, merge_size=4)
    refused(InvalidFileError, "images must have at least 256 pixels and at most 100", same, max_pixels=100)
    refused(UnsupportedModelError, "do_resize is false", same, do_resize=False)
    refused(UnsupportedModelError, r"vision_config\.temporal_patch_size is 1", tower(temporal_patch_size=1))
    refused(UnsupportedModelError, "hidden_act is 'relu'", tower(hidden_act="relu"))
    refused(WeightsError, r"visual\.blocks\.3", tower(depth=4))
    kind = read_json(folder / "config.json")["model_type"]
    if kind in DEEP:
        said = "deepstack_visual_indexes is"
        for deep in ([2, 0], [0, 0], [3], [-1], ["x"]):
            refused(InvalidFileError, said, tower(deepstack_visual_indexes=deep))
        refused(WeightsError, r"visual\.deepstack_merger_list\.2", tower(deepstack_visual_indexes=[0, 1, 2]))
        refused(WeightsError, r"unexpected .*deepstack_merger_list\.1", tower(deepstack_visual_indexes=[0]))
        refused(WeightsError, "visual.pos_embed.weight has shape", tower(num_position_embeddings=16))
    refused(InvalidFileError, "^vision encoder: 3 heads cannot share hidden_size 32", tower(num_heads=3))
    refused(InvalidFileError, "^vision encoder: head size 2 must be a multiple of 4", tower(num_heads=16))
    refused(
        InvalidFileError,
        "the sections of rotary positions are missing",
        lambda config: config["text_config"]["rope_parameters"].pop("mrope_section"),
    )
    refused(
        InvalidFileError,
        "the rotary sections are ",
        lambda config: config["text_config"]["rope_parameters"].update(mrope_section=[2, 3, 4]),
    )
    if kind == "qwen2_5_vl":
        refused(InvalidFileError, "window_size is 4; a cell has sides of 8", tower(window_size=4))
        refused(InvalidFileError, "fullatt_block_indexes is", tower(fullatt_block_indexes=["x"]))


def test_windows_are_squares_of_cells() -> None:
    order, lengths = window_order(3, 5, 2)
    assert lengths.tolist() == [4, 4, 2, 2, 2, 1]
    assert order.tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    assert window_order(1, 2, 4)[1].tolist() == [2]
