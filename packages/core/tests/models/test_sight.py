# SPDX-License-Identifier: MIT
"""A model that sees, of random weights: its tower and its logits against transformers, and its answers however a prompt
comes to it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from candle_vllm.core import EngineConfig, InferenceEngine, SamplingParams
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.devices import choose_device
from candle_vllm.core.engine import build
from candle_vllm.core.engine.runners.eager_runner import EagerTower
from candle_vllm.core.engine.runners.images import TowerRunner, tiles_of
from candle_vllm.core.engine.runners.recorded_tower import RecordedTower
from candle_vllm.core.errors import (
    ConfigError,
    InvalidFileError,
    InvalidParameterError,
    PromptTooLongError,
    UnsupportedModelError,
    WeightsError,
)
from candle_vllm.core.fields import Fields, read_json
from candle_vllm.core.kernels.cpu_runtime.level import Isa, host_isa
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.memory import Room
from candle_vllm.core.models.siglip import FAMILY
from candle_vllm.core.remote import RemoteEngine
from candle_vllm.core.vision.preprocessing import Normalisation, StretchRule, tile_rule
from candle_vllm.core.vision.prompts import VisionDescription, VisionInput
from packages.core.tests.models.sight import answers, finished, nbytes, prompt_error
from packages.core.tests.toy_gguf import write_toy_gguf
from packages.core.tests.toy_sight import toy_sight_config, write_toy_sight
from tests.common_run import few

RANDOM = np.random.default_rng(3)
PICTURES = [RANDOM.integers(0, 256, size, dtype=np.uint8) for size in ((40, 70, 3), (32, 32, 3), (9, 100, 3))]
ASK = "<|im_start|>user\nCompare <image> with <image>.<|im_end|>\n<|im_start|>assistant\n"
PROMPT: dict[str, Any] = {"prompt": ASK, "multi_modal_data": {"image": PICTURES[:2]}}
GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_sight(tmp_path_factory.mktemp("sight"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def their_pixels(folder: Path, pictures: list[NDArray[np.uint8]]) -> torch.Tensor:
    said = {key: value for key, value in read_json(folder / "preprocessor_config.json").items() if "type" not in key}
    processor = SmolVLMImageProcessorPil(**said)
    tiles = [processor(images=[Image.fromarray(each)], return_tensors="np")["pixel_values"][0] for each in pictures]
    return torch.from_numpy(np.concatenate(tiles))[None]


@pytest.mark.parametrize("eager", few([True, False], False))
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    config = EngineConfig(model=str(folder), op_by_op=eager)
    loaded = load_model(config, choose_device("cpu"), lambda *_: None)
    assert isinstance(loaded, LoadedModel)
    assert loaded.tower is not None
    pixels = their_pixels(folder, PICTURES)
    with torch.inference_mode():
        mask = torch.ones(*pixels.shape[:2], *pixels.shape[3:], dtype=torch.bool)
        features = theirs.model.get_image_features(pixels, mask).pooler_output
        expected = np.concatenate([np.asarray(each).reshape(-1, 64) for each in features])
    tiles = np.concatenate([
        tiles_of(image)
        for image in loaded.tower.vision.look([260] * 3, PICTURES)[1]
    ])  # fmt: skip
    team = ThreadTeam(2)
    try:
        runner: TowerRunner = (
            EagerTower(loaded.tower.tower, choose_device("cpu")) if eager else RecordedTower(loaded.tower.tower, team)
        )
        found, _ = finished(runner, tiles)
        alone, _ = finished(runner, tiles[1:2])
        if isinstance(runner, RecordedTower):  # what is put aside is enough
            assert nbytes(runner) < loaded.tower.tower.config.step_bytes(2) < 16 * nbytes(runner)
    finally:
        team.close()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.array_equal(alone, found[16:32])


@pytest.mark.parametrize("eager", few([True, False], False))
def test_logits_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    with InferenceEngine(folder, op_by_op=eager, enable_prefix_caching=False) as engine:
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
        found = engine.generate(PROMPT, params, use_tqdm=False)[0]
    ids = torch.tensor([found.prompt_token_ids])
    pixels = their_pixels(folder, PICTURES[:2])
    mask = torch.ones(*pixels.shape[:2], *pixels.shape[3:], dtype=torch.bool)
    with torch.inference_mode():
        logits = theirs(input_ids=ids, pixel_values=pixels, pixel_attention_mask=mask).logits[0]
    # keys and values are bfloat16 in the compiled steps
    assert prompt_error(found, logits) < (1e-4 if eager else 0.2)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[tuple[int, ...]]:
    """Answers to prompts of one step each, nothing cached."""
    with InferenceEngine(folder, enable_prefix_caching=False, max_num_batched_tokens=512) as engine:
        return [answers(engine, [prompt])[0] for prompt in PROMPTS]


OTHER = {"prompt": ASK, "multi_modal_data": {"image": [PICTURES[1], PICTURES[0]]}}
TWICE = {"prompt": ASK, "multi_modal_data": {"image": [PICTURES[2], PICTURES[2]]}}
PROMPTS: list[Any] = [PROMPT, OTHER, TWICE, "<|im_start|>user\nCompare nothing.<|im_end|>\n"]


def test_the_pictures_are_what_answers_depend_on(alone: list[tuple[int, ...]]) -> None:
    assert len(set(alone)) == len(alone)


@pytest.mark.parametrize("tokens", few([512, 64, 17], 64))
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(
    tokens: int, folder: Path, alone: list[tuple[int, ...]]
) -> None:
    with InferenceEngine(folder, max_num_batched_tokens=tokens, max_num_seqs=8) as engine:
        assert answers(engine, PROMPTS) == alone
        again = engine.generate(PROMPTS, GREEDY, use_tqdm=False)
        assert [tuple(each.outputs[0].token_ids) for each in again] == alone
        assert all(each.num_cached_tokens for each in again[:3])


@pytest.mark.parametrize("limit", [1 << 28, 0])
def test_answers_survive_preemption(
    limit: int, folder: Path, alone: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_MOST_FOR_IMAGES", limit)
    long = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
    several = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True, n=6)  # which begin together
    with InferenceEngine(folder, kv_cache_memory=220_000, block_size=16, max_model_len=384) as engine:
        whole = [engine.generate(prompt, long, use_tqdm=False)[0].outputs[0].token_ids for prompt in PROMPTS[:3]]
        found = engine.generate(PROMPTS[:3], several, use_tqdm=False)
        for answers, right in zip(found, whole, strict=True):
            assert [each.token_ids for each in answers.outputs] == [right] * 6
        assert engine.stats().preemptions
        assert (engine.stats().images_encoded == 3) is (limit > 0)  # otherwise again for a preempted one


def test_images_are_encoded_in_the_order_of_requests_and_not_far_ahead(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_MOST_FOR_IMAGES", 0)
    with InferenceEngine(folder, max_num_seqs=2) as engine:
        pictures = [RANDOM.integers(0, 256, (40, 40, 3), dtype=np.uint8) for _ in range(7)]
        prompts = [{"prompt": "<image> x", "multi_modal_data": {"image": picture}} for picture in pictures]
        names = [engine.add_request(prompt, GREEDY, priority=10) for prompt in prompts[1:]]
        names.insert(0, engine.add_request(prompts[0], GREEDY, priority=0))
        began, store = dict[str, None](), engine._require()[0].images
        assert store is not None
        while engine.has_unfinished_requests:
            began |= dict.fromkeys(output.request_id for output in engine.step())
            assert store._bytes <= 5 * 16 * 64 * 4  # one picture
        assert list(began) == names
        assert engine.stats().images_encoded == len(names)


def test_several_answers_share_a_picture(folder: Path, alone: list[tuple[int, ...]]) -> None:
    with InferenceEngine(folder) as engine:
        params = SamplingParams(max_tokens=8, temperature=0, n=2)
        outputs = engine.generate(PROMPT, params, use_tqdm=False)[0].outputs
        assert [tuple(each.token_ids) for each in outputs] == [alone[0]] * 2
        assert engine._require()[0].stats().images_encoded == 2  # two pictures, once each


def test_conversations_have_pictures_here_and_in_another_process(folder: Path) -> None:
    ask = {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "image", "image": PICTURES[0]}]}
    found = []
    kinds: tuple[Callable[..., InferenceEngine | RemoteEngine], ...] = (InferenceEngine, RemoteEngine)
    for make in kinds:
        with make(folder) as engine:
            assert engine.model_info.modalities == ("text", "image")
            found.append(engine.chat([ask], GREEDY))
            of_texts = "{{ '<|im_start|>user\n' + messages[0].content + '<|im_end|>\n<|im_start|>assistant\n' }}"
            same = engine.chat([ask], GREEDY, chat_template=of_texts)
            assert same.prompt_token_ids == found[-1].prompt_token_ids
    assert found[0].prompt_token_ids == found[1].prompt_token_ids
    assert found[0].outputs[0].token_ids == found[1].outputs[0].token_ids
    assert list(found[0].prompt_token_ids).count(260) == 5 * 16


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            {"prompt": "no mark", "multi_modal_data": {"image": PICTURES[0]}},
            "0 placeholders in the .* needs one '<image>'",
        ),
        ({"prompt": "<image><image>", "multi_modal_data": {"image": PICTURES[0]}}, "1 images, and 2 placeholders"),
        ({"prompt": "<image>", "multi_modal_data": {"image": [PICTURES[0]] * 65}}, "65 images; at most 64 are allowed"),
        ({"prompt": "<image>", "multi_modal_data": {"image": "x.png"}}, "an image must be a PIL.Image"),
        ({"prompt": "<image>", "multi_modal_data": {"video": 1}}, "multi_modal_data has 'video'"),
        ({"prompt": "<image>", "multi_modal_data": []}, "multi_modal_data must be an object"),
    ],
)
def test_wrong_prompts_are_refused_and_hurt_nobody(prompt: Any, message: str, shared: InferenceEngine) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        shared.generate(prompt, GREEDY, use_tqdm=False)
    assert shared.generate("Hello", GREEDY, use_tqdm=False)[0].outputs[0].token_ids


@pytest.fixture(scope="module")
def shared(folder: Path) -> Any:
    with InferenceEngine(folder) as engine:
        yield engine


def test_other_media_may_be_none(shared: InferenceEngine) -> None:
    data = {"image": PICTURES[0], "video": None}
    assert shared.generate({"prompt": "<image>", "multi_modal_data": data}, GREEDY, use_tqdm=False)


def test_fields_of_an_image_part_are_read_or_refused(shared: InferenceEngine) -> None:
    part = {"type": "image", "image": PICTURES[0], "detail": "low", "uuid": "a", "text": None, "cache_control": {}}
    assert shared.chat([{"role": "user", "content": [part]}], GREEDY)
    for name, value in (("text", "lost"), ("min_pixels", 4), ("detial", "low")):
        with pytest.raises(InvalidParameterError, match=f"a part with an image has no '{name}'") as refusal:
            shared.chat([{"role": "user", "content": [part | {name: value}]}], GREEDY)
        assert refusal.value.param == f"messages[0].content[0].{name}"


def test_a_mark_without_a_picture_is_a_token(shared: InferenceEngine) -> None:
    assert shared.generate("<image>", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    shown = {"prompt": "<image>", "multi_modal_data": {"image": PICTURES[0]}}
    text, image = (shared.embed(prompt, use_tqdm=False)[0].embedding for prompt in ("<image>", shown))
    assert len(text) == len(image)
    assert text != image


def test_without_pillow_a_model_reads_text_alone_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("PIL", "PIL.Image"):
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level("WARNING"), InferenceEngine(folder) as engine:
        assert engine.generate("ab", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        with pytest.raises(InvalidParameterError, match="the model takes text only"):
            engine.generate(PROMPT, GREEDY, use_tqdm=False)
    assert "takes text only: images need Pillow" in caplog.text


def changed(folder: Path, tmp_path: Path, **config: Any) -> Path:
    """A checkpoint whose config says something else."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    write_toy_sight(tmp_path, toy_sight_config() | config)
    return tmp_path


def test_a_tower_that_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    vision = toy_sight_config()["vision_config"]

    def refused(kind: type[Exception], message: str, **config: Any) -> None:
        made = changed(folder, tmp_path)
        (made / "config.json").write_text(json.dumps(toy_sight_config() | config))
        with pytest.raises(kind, match=message):
            InferenceEngine(made)

    refused(WeightsError, r"vision_model\.encoder\.layers\.2", vision_config=vision | {"num_hidden_layers": 3})
    refused(InvalidFileError, "tiles of 32 pixels", vision_config=vision | {"image_size": 64})
    refused(
        InvalidFileError,
        "^vision encoder: 5 heads cannot share hidden_size 48",
        vision_config=vision | {"num_attention_heads": 5},
    )
    refused(UnsupportedModelError, "hidden_act", vision_config=vision | {"hidden_act": "swish"})
    made = changed(folder, tmp_path)
    (made / "preprocessor_config.json").unlink()
    with pytest.raises(InvalidFileError, match="defines the preprocessing of images"):
        InferenceEngine(made)


def write_towers(
    folder: Path, made: Path, *, swapped: bool = False, kind: str = "idefics3", mean: Any = (0.5,) * 3
) -> dict[str, Any]:
    """The checkpoint as llama.cpp has it: settings that name its text model's file and that of its tower."""
    config, tensors = read_json(folder / "config.json"), load_file(folder / "model.safetensors")
    described = config["vision_config"]
    made.mkdir(parents=True)
    write_toy_gguf(
        made / "model.gguf", quantization="F32", config={"architectures": ["LlamaForCausalLM"], **config["text_config"]}
    )
    writer = GGUFWriter(made / "mmproj.gguf", "clip")
    for key, value in {
        "clip.projector_type": kind, "clip.vision.image_size": described["image_size"],
        "clip.vision.patch_size": described["patch_size"], "clip.vision.embedding_length": described["hidden_size"],
        "clip.vision.feed_forward_length": described["intermediate_size"], "clip.vision.block_count": 2,
        "clip.vision.attention.head_count": 3, "clip.vision.preproc_image_size": 64,
        "clip.vision.projector.scale_factor": config["scale_factor"],
    }.items():  # fmt: skip
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    writer.add_array("clip.vision.image_mean", mean)
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])
    table = {line.hf: line.gguf for line in FAMILY.weights}
    for name, tensor in tensors.items():
        plain = name.removeprefix("model.")
        number = re.search(r"layers\.(\d+)\.", plain)
        found = table.get(plain if number is None else plain.replace(number[0], "layers.{i}."))
        if isinstance(found, str):
            called = found.replace("{i}", "" if number is None else number[1])
            if swapped:
                called = called.replace("ffn_up", "x").replace("ffn_down", "ffn_up").replace("x", "ffn_down")
            writer.add_tensor(called, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"model": str(made / "model.gguf"), "mmproj": made / "mmproj.gguf", "tokenizer": folder}


@pytest.mark.parametrize("swapped", few([False, True], True))
def test_a_gguf_file_beside_the_model_is_the_same_tower(
    swapped: bool, folder: Path, tmp_path: Path, alone: list[tuple[int, ...]]
) -> None:
    with InferenceEngine(**write_towers(folder, tmp_path / "gguf", swapped=swapped)) as engine:
        assert answers(engine, PROMPTS) == alone


def test_towers_of_f16_lose_little(folder: Path, tmp_path: Path) -> None:
    made = changed(folder, tmp_path)
    halves = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    (made / "model.safetensors").unlink()
    save_file(halves, made / "model.safetensors")
    found: list[NDArray[np.float32]] = []
    team = ThreadTeam(2)
    for settings in ({}, {"dtype": "f16"}, {"dtype": "f32"}):
        loaded = load_model(EngineConfig(model=str(made), **settings), choose_device("cpu"), lambda *_: None)
        assert loaded.tower is not None
        tiles = np.frombuffer(loaded.tower.vision.look([260], PICTURES[:1])[1][0].tiles, np.uint8).reshape(
            -1, 32, 32, 3
        )
        found.append(finished(RecordedTower(loaded.tower.tower, team), tiles)[0])
    team.close()
    assert np.array_equal(found[1], found[2])  # F16 is exact where it is asked for
    lost = float(np.sqrt(np.mean((found[0] - found[2]) ** 2) / np.mean(found[2] ** 2)))
    assert 0 < lost < 1.5e-3 if host_isa() & Isa.VNNI else lost == 0


def test_wrong_files_beside_a_model_are_named(folder: Path, tmp_path: Path) -> None:
    right = write_towers(folder, tmp_path / "gguf")
    with pytest.raises(UnsupportedModelError, match="this is not a vision encoder file"):
        InferenceEngine(right["model"], mmproj=Path(right["model"]))
    with pytest.raises(ConfigError, match="mmproj is for GGUF models"):
        InferenceEngine(folder, mmproj=right["mmproj"])
    other = write_towers(folder, tmp_path / "other", kind="ldp")
    with pytest.raises(UnsupportedModelError, match=r"clip\.projector_type is 'ldp'; implemented: idefics3"):
        InferenceEngine(right["model"], mmproj=other["mmproj"])


@pytest.mark.parametrize("values", [["a", "b", "c"], [[0.5], [0.5]]])
def test_wrong_numbers_of_pixels_are_named(values: list[Any], folder: Path, tmp_path: Path) -> None:
    made = write_towers(folder, tmp_path / "gguf", mean=values)
    with pytest.raises(InvalidFileError, match="image_mean is "):
        InferenceEngine(**made)


def test_a_tower_computes_as_its_text_model_does(tmp_path: Path) -> None:
    with InferenceEngine(write_toy_sight(tmp_path, toy_sight_config(head_dim=12))) as engine:  # has no kernel
        first = answers(engine, [PROMPT])
        other = {**PROMPT, "multi_modal_data": {"image": PICTURES[1:]}}
        assert answers(engine, [other]) != first


def test_an_operator_says_how_pictures_are_prepared(folder: Path) -> None:
    """One tile of each, asked for or because they are made small; and only where something is seen."""
    counts = []
    for said in (None, {"do_image_splitting": False}, {"size": {"longest_edge": 32}}):
        with InferenceEngine(folder, mm_processor_kwargs=said) as engine:
            counts.append(list(engine.generate(PROMPT, GREEDY, use_tqdm=False)[0].prompt_token_ids).count(260))
    assert counts[0] > counts[1] == counts[2] > 0
    for settings, message in (
        (
            {"mm_processor_kwargs": {"size": {"width": 4}}},
            "'size.width' is not a setting .* size.longest_edge, do_image",
        ),
        ({"mm_processor_kwargs": {"size": 4}}, "'size' is not a setting"),
        (
            {"mm_processor_kwargs": {"do_image_splitting": 3}},
            "mm_processor_kwargs: do_image_splitting is 3, not a bool",
        ),
        ({"mm_processor_kwargs": {"size": {"longest_edge": 0}}}, "mm_processor_kwargs: longest_edge is 0"),
        ({"mm_processor_kwargs": {"do_image_splitting": False}, "max_images": 0}, "takes text only"),
    ):
        with pytest.raises(ConfigError, match=message):
            InferenceEngine(folder, **settings)


def test_memory_for_the_largest_picture_is_put_aside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, real = list[tuple[int, int]](), build.main_room

    def room(threads: int, share: float, weights: int = 0) -> Room:
        given.append((threads, weights))
        return real(threads, share, weights)

    monkeypatch.setattr(build, "main_room", room)
    loaded = load_model(EngineConfig(model=str(folder)), choose_device("cpu"), lambda *_: None)
    assert isinstance(loaded, LoadedModel)
    assert loaded.tower is not None
    for most in (64, 0):
        with InferenceEngine(folder, max_images=most):
            threads, weights = given[-1]
            assert weights == (loaded.tower.tower.config.step_bytes(threads) if most else 0)


def test_texts_alone_may_be_asked_for(folder: Path) -> None:
    with InferenceEngine(folder, max_images=0) as engine:
        assert engine.model_info.modalities == ("text",)
        with pytest.raises(InvalidParameterError, match="the model takes text only"):
            engine.generate(PROMPT, GREEDY, use_tqdm=False)
    with (
        InferenceEngine(folder, max_images=1) as engine,
        pytest.raises(InvalidParameterError, match="2 images; at most 1 are allowed"),
    ):
        engine.generate(PROMPT, GREEDY, use_tqdm=False)


class Limited(EngineConfig):
    """Settings with one more, of the name of a field of `PictureLimits`."""

    max_image_pixels = 34


def test_a_limit_of_images_is_a_setting_of_the_same_name(folder: Path) -> None:
    with (
        InferenceEngine(Limited(model=str(folder))) as engine,
        pytest.raises(InvalidParameterError, match="pixels; at most 34"),
    ):
        engine.generate(PROMPT, GREEDY, use_tqdm=False)


def test_what_does_not_fit_is_refused_before_the_rest_is_decoded(folder: Path) -> None:
    with InferenceEngine(folder, max_model_len=128) as engine:
        prompt = {"prompt": "<image>" * 3, "multi_modal_data": {"image": [PICTURES[0], PICTURES[0], b"none"]}}
        with pytest.raises(
            PromptTooLongError, match=r"at least \d+ tokens; this model's maximum context length is 128"
        ):
            engine.generate(prompt, GREEDY, use_tqdm=False)


def test_what_stands_for_a_picture_is_not_written_down_where_it_does_not_fit() -> None:
    said = {"size": {"longest_edge": 4096}, "max_image_size": {"longest_edge": 1}}
    parts = VisionDescription(family="siglip", rule=tile_rule(Fields(said, Path("p.json"))), mark=1, asks=1, cell=1)
    vision = VisionInput(parts, words=lambda cut: pytest.fail(f"words for {cut.tiles} tiles"))
    with pytest.raises(
        PromptTooLongError, match="at least 16777217 tokens; this model's maximum context length is 128"
    ):
        vision.look([1], [PICTURES[1]], most_tokens=128)


def test_tiles_of_too_many_pixels_are_refused() -> None:
    rule = StretchRule(tile=4096, most_parts=64, resample=2, normalisation=Normalisation(1.0, (0,) * 3, (1,) * 3))
    vision = VisionInput(VisionDescription(family="gemma", rule=rule, mark=1, asks=1, cell=4096), words=lambda _: [1])
    with pytest.raises(InvalidParameterError, match="image: its tiles would have 1090519040 pixels, by"):
        vision.look([1], [np.zeros((64, 1, 3), np.uint8)])
