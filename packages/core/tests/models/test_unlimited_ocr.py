# SPDX-License-Identifier: MIT
"""Unlimited-OCR of random weights: its window over the answer, tiles, embeddings and logits against transformers."""

from __future__ import annotations

import itertools
import json
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.image_utils import SizeDict
from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import DeepseekOcr2ImageProcessorPil
from transformers.models.unlimited_ocr.processing_unlimited_ocr import UnlimitedOcrProcessor

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.engine.build import preparation_for
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.eager_runner import EagerRunner
from candle_vllm.core.engine.runners.model_runner import ModelRunner
from candle_vllm.core.engine.runners.recorded_runner import RecordedRunner
from candle_vllm.core.engine.step.batch import BatchBuilder
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.engine.step.sequence import Run, Sequence
from candle_vllm.core.errors import CandleVllmError, ConfigError, InvalidParameterError
from candle_vllm.core.fields import Fields
from candle_vllm.core.kernels.cpu_runtime.recorder import StepLimits
from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.models.unlimited_ocr_tower import FAMILY
from candle_vllm.core.vision.pictures import picture_of
from candle_vllm.core.vllm.beam_search import BeamSearchParams, beam_search
from packages.core.tests.models.families import DEEPSEEK_OCR, DEEPSEEK_OCR_GROUPS
from packages.core.tests.models.sight import (
    answers_of_ranks,
    answers_op_by_op,
    loaded_from,
    model_of,
    random_model,
    random_pictures,
    require_logits,
    require_same,
    require_same_embeddings,
    require_same_from_gguf,
    require_same_in_steps,
    require_same_on_a_gpu,
    without_template,
    without_torchvision,
    write_tokenizer,
    write_tower,
)
from packages.core.tests.models.test_deepseek_ocr import EDGES, TEMPLATE, TEXT
from packages.core.tests.models.test_deepseek_ocr import SAM as SMALL_SAM
from packages.core.tests.models.test_deepseek_ocr_original import SAM_B, gguf_tensors
from packages.core.tests.models.test_deepseek_ocr_original import TOLD as ORIGINAL
from packages.core.tests.models.tiny import BLOCK, CPU, load, settled, some_tokens, spread, write_tiny
from tests.common_run import few

WINDOW, PROMPT, ANSWER = 20, 37, 70


TEXTS = {"usual": DEEPSEEK_OCR, "groups": DEEPSEEK_OCR_GROUPS}


@pytest.fixture(scope="module", params=few(TEXTS, "usual"))
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, config = tmp_path_factory.mktemp("text"), TEXTS[request.param] | {"sliding_window": WINDOW}
    return write_tiny(folder, "unlimited_ocr_text", **config)


def their_model(folder: Path) -> Any:
    """transformers' text model; its eager attention does not share keys among heads."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def their_logits(folder: Path, tokens: list[int], prompt: int) -> torch.Tensor:
    """transformers' logits [T, V] of a prompt, and of an answer token by token."""
    model = their_model(folder)
    cache, found, ends = DynamicCache(config=model.config), [], [prompt, *range(prompt + 1, len(tokens) + 1)]
    with torch.inference_mode():
        for first, last in itertools.pairwise([0, *ends]):
            found.append(model(torch.tensor([tokens[first:last]]), past_key_values=cache).logits[0])
    return torch.cat(found)


def our_logits(runner: ModelRunner, tokens: list[int], prompt: int, window: int, chunk: int) -> torch.Tensor:
    """The logits of the same tokens, the prompt in chunks; the blocks suffice for the prompt and the window alone."""
    request = GenerationRequest(request_id="r", prompt_token_ids=tokens[:prompt], params=SamplingParams())
    sequence, found = Sequence(request, 0, 0, answer_window=window), list[torch.Tensor]()
    sequence.tokens, sequence.num_uncomputed_tokens = list(tokens), len(tokens)
    sequence.block_table = array("i", reversed(range(-(-(prompt + window) // BLOCK))))
    builder = BatchBuilder(BLOCK, runner.step_memory)
    while sequence.num_uncomputed_tokens:
        run = Run.next(sequence, sequence.chunk(chunk))
        runner.forward(builder.build([run]), [])
        found.append(torch.as_tensor(runner.score(np.arange(run.count))).clone())
        sequence.num_uncomputed_tokens -= run.count
    return torch.cat(found)


def blocks_of(prompt: int, window: int) -> int:
    return -(-(prompt + window) // BLOCK)


@pytest.mark.parametrize("prompt", few([PROMPT, 48, 1], PROMPT))
def test_an_answer_reads_its_prompt_and_its_last_tokens(text: Path, prompt: int) -> None:
    tokens = some_tokens(prompt + ANSWER)
    theirs = their_logits(text, tokens, prompt)
    loaded = load(text, op_by_op=True)
    assert loaded.config.answer_window == WINDOW
    for chunk in (64, 7, 1):
        runner = EagerRunner(
            loaded.decoder, blocks_of(prompt, WINDOW), BLOCK, CPU, torch.float32, None, None, loaded.turning(64)
        )
        assert spread(our_logits(runner, tokens, prompt, WINDOW, chunk), theirs) < 1e-5, chunk


@pytest.mark.parametrize("prompt", few([PROMPT, 48], 48))
def test_compiled_steps_read_the_same(text: Path, prompt: int) -> None:
    tokens, made = some_tokens(prompt + ANSWER), list[torch.Tensor]()
    theirs = their_logits(text, tokens, prompt)
    for chunk in (64, 7):
        loaded, blocks = load(text, block_size=BLOCK), blocks_of(prompt, WINDOW)
        limits = StepLimits(tokens=64, sequences=4, logit_rows=64, table_width=blocks, block_size=BLOCK, threads=2)
        runner = RecordedRunner(loaded.decoder, blocks, limits, turning=loaded.turning(64))
        try:
            made.append(our_logits(runner, tokens, prompt, WINDOW, chunk))
        finally:
            runner.close()
    assert spread(*settled(made[0], theirs, 0.1)) < 1e-2
    assert torch.equal(*made)


def test_a_prompt_is_hashed_once() -> None:
    """Its images are not read again while the answer grows, even if its last block is not full."""
    request = GenerationRequest(request_id="r", prompt_token_ids=some_tokens(PROMPT), params=SamplingParams())
    sequence = Sequence(request, 0, 0, answer_window=WINDOW)
    hashes = sequence.hashes(BLOCK)
    sequence.tokens += some_tokens(ANSWER)
    assert sequence.hashes(BLOCK) is hashes
    assert len(hashes) == PROMPT // BLOCK


def answers(engine: InferenceEngine, prompts: list[list[int]], **more: Any) -> list[Any]:
    params = SamplingParams(**{"max_tokens": ANSWER, "temperature": 0, "ignore_eos": True} | more)
    return engine.generate(prompts, params, use_tqdm=False)


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [list(each.outputs[0].token_ids) for each in outputs]


def prompts() -> list[list[int]]:
    """Some begin alike."""
    tokens = some_tokens(90)
    return [tokens[:PROMPT], tokens[:48], tokens[:33] + tokens[60:75], tokens[80:83]]


@pytest.fixture(scope="module")
def wanted(text: Path) -> list[list[int]]:
    """transformers' greedy answers."""
    model = their_model(text)
    found = list[list[int]]()
    for prompt in prompts():
        cache, answer, given = DynamicCache(config=model.config), list[int](), prompt
        with torch.inference_mode():
            while len(answer) < ANSWER:
                answer.append(int(model(torch.tensor([given]), past_key_values=cache).logits[0, -1].argmax()))
                given = answer[-1:]
        found.append(answer)
    return found


@pytest.mark.parametrize("op_by_op", [True, False])
def test_answers_do_not_depend_on_the_cache_and_other_requests(
    op_by_op: bool, text: Path, wanted: list[list[int]]
) -> None:
    settings: dict[str, Any] = {"op_by_op": op_by_op, "max_num_seqs": 4, "block_size": BLOCK}
    with InferenceEngine(text, enable_prefix_caching=False, **settings) as engine:
        alone = [tokens_of(answers(engine, [prompt]))[0] for prompt in prompts()]
        assert len({*map(tuple, alone)}) == len(alone)
        assert tokens_of(answers(engine, prompts())) == alone
    if op_by_op:
        assert alone == wanted
    with InferenceEngine(text, **settings | {"max_num_batched_tokens": 48, "max_num_seqs": 40}) as engine:
        for _ in range(2):
            found = answers(engine, prompts())
            assert tokens_of(found) == alone
        assert [each.num_cached_tokens for each in found] == [32, 32, 32, 0]
        if not op_by_op:
            assert tokens_of(answers(engine, prompts() * 10, max_tokens=30)) == [each[:30] for each in alone * 10]
        (several,) = answers(engine, prompts()[:1], n=3)
        assert [list(each.token_ids) for each in several.outputs] == alone[:1] * 3
        follows = [*prompts()[0], *alone[0], 5]  # the next turn: its prompt holds the answer, whose keys differ
        (again,) = answers(engine, [follows])
        assert again.num_cached_tokens == 32
    with InferenceEngine(text, enable_prefix_caching=False, **settings) as engine:
        assert tokens_of(answers(engine, [follows])) == tokens_of([again])


def test_preempted_sequences_go_on_with_their_answers(text: Path, wanted: list[list[int]]) -> None:
    """For lack of blocks, and at any time: what was generated stays an answer, and is computed token by token."""
    loaded = load(text, op_by_op=True)
    runner = EagerRunner(loaded.decoder, 9, BLOCK, CPU, torch.float32, None, None, loaded.turning(64))
    scheduler = Scheduler(BlockManager(9, BLOCK), 4, 64)
    engine, outputs, taken = (
        Engine(runner, scheduler, preparation_for(loaded, 256)),
        dict[str, list[int]](),
        list[Sequence](),
    )
    for number, prompt in enumerate(prompts()):
        params = SamplingParams(max_tokens=ANSWER, temperature=0, ignore_eos=True)
        engine.add(engine.prepare(GenerationRequest(request_id=str(number), prompt_token_ids=prompt, params=params)))
    while engine.has_work:
        for piece in engine.step():
            outputs.setdefault(piece.request_id, []).extend(piece.token_ids)
        assert all(len(each.block_table) <= blocks_of(each.num_prompt_tokens, WINDOW) for each in scheduler.running)
        for sequence in list(scheduler.running):
            if len(sequence.tokens) > sequence.num_prompt_tokens + WINDOW + 25 and sequence not in taken:
                taken.append(sequence)
                scheduler._preempt(sequence)
                if len(taken) % 2:
                    scheduler.blocks.reset_prefix_cache()
    assert [outputs[str(number)] for number in range(len(wanted))] == wanted
    assert scheduler.num_preemptions > len(taken) == len(wanted)


def test_a_beam_search_is_refused(text: Path) -> None:
    """Whose steps send answers as prompts."""
    with (
        InferenceEngine(text) as engine,
        pytest.raises(InvalidParameterError, match="reads its answer through a window"),
    ):
        beam_search(engine, [prompts()[0]], BeamSearchParams(beam_width=2, max_tokens=3))


def test_drafts_are_refused(text: Path, tmp_path: Path) -> None:
    """By default there are none."""
    for said in ({"method": "suffix"}, {"model": str(text)}):
        with pytest.raises(ConfigError, match="a rejected draft token would overwrite"):
            InferenceEngine(text, speculative_config=said)
    other = write_tiny(tmp_path, "deepseek_ocr2_text", **DEEPSEEK_OCR)
    with pytest.raises(ConfigError, match="cannot draft for another model"):
        InferenceEngine(other, speculative_config={"model": str(text)})


# ---- tiles and placeholders ------------------------------------------------------------------------------------------

IMAGE = 262
PICTURES = random_pictures((120, 90), (40, 70), (60, 300))
"""A grid, an image of one tile, and a row of tiles."""
PROMPTS: list[Any] = [
    {"prompt": "<image>\ndocument parsing.", "multi_modal_data": {"image": PICTURES[:1]}},
    {"prompt": "<image><image>Multi page parsing.", "multi_modal_data": {"image": PICTURES[1:]}},
    "Nothing to read.",
]
IMAGES: dict[str, Any] = {
    "size": {"height": 128, "width": 128}, "tile_size": 80, "min_patches": 2, "max_patches": 6, "resample": 3,
    "image_mean": [0.5, 0.4, 0.6], "image_std": [0.5, 0.6, 0.4],
}  # fmt: skip
CLIP: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 70
}  # fmt: skip
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "usual": ({}, {}),
    "other": (
        {"window_size": 5, "global_attn_indexes": [0], "num_hidden_layers": 2, "qkv_bias": False},
        {"num_hidden_layers": 3, "layer_norm_eps": 1e-2, "image_size": 224},
    ),
}
SHORT = 3


def write(folder: Path, kind: str = "usual", **images: Any) -> Path:
    sam, clip = KINDS[kind]
    vision = {"sam_config": SMALL_SAM | {"downsample_channels": [24, 48]} | sam, "encoder_config": CLIP | clip}
    text = TEXT | {"sliding_window": SHORT}
    config = AutoConfig.for_model("unlimited_ocr", text_config=text, vision_config=vision, image_token_id=IMAGE)
    model = random_model(config)
    with torch.no_grad():  # embeddings of pictures as long as those of words
        model.model.multi_modal_projector.weight.mul_(3)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES | images))
    write_tokenizer(folder, ("<a>", "<b>", "<image>", "<c>"), TEMPLATE)
    return folder


@pytest.fixture(scope="module", params=few(KINDS, "usual"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("unlimited_ocr"), request.param)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return model_of(folder)


def rule_of(said: dict[str, Any], **images: Any) -> Any:
    path = Path("config.json")
    config = {"vision_config": {"sam_config": SMALL_SAM | {"downsample_channels": [24, 48]}, "encoder_config": CLIP}}
    return FAMILY.config_from_hf(Fields(config, path), Fields(IMAGES | images, path), 64, said).rule


def their_images(*pictures: NDArray[np.uint8], **said: Any) -> Any:
    """The tiles of transformers' processor, which needs torchvision, with the resizing of Pillow; not normalised."""
    module = without_torchvision("unlimited_ocr.image_processing_unlimited_ocr")

    class Processor(module.UnlimitedOcrImageProcessor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self.background_color = [127] * 3

        def resize(self, images: torch.Tensor, size: Any, resample: int) -> torch.Tensor:
            made = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in images]
            made = [each.resize((size.width, size.height), resample) for each in made]
            return torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1) for each in made])

        def pad_to_square(self, images: torch.Tensor, background_color: Any) -> torch.Tensor:
            pad: Any = DeepseekOcr2ImageProcessorPil.pad_to_square
            return torch.stack([torch.from_numpy(pad(None, each.numpy(), background_color)) for each in images])

        def rescale_and_normalize(self, images: torch.Tensor, *_: Any) -> torch.Tensor:
            return images

    settings = {"crop_to_patches": True, "maximum_pad_value": 640, **IMAGES} | said
    return Processor()._preprocess(
        [torch.from_numpy(each).permute(2, 0, 1) for each in pictures],
        **settings | {"size": SizeDict(**settings["size"])}, do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, disable_grouping=True, return_tensors=None,
    )  # fmt: skip


def their_pixels(*pictures: NDArray[np.uint8]) -> dict[str, Any]:
    found, table = their_images(*pictures), rule_of({}).normalisation.table
    made: dict[str, Any] = {key: found[key] for key in ("num_local_patches", "patches_grid")}
    for key in ("pixel_values", "pixel_values_local"):
        tiles = [table[each.permute(1, 2, 0).numpy(), np.arange(3)] for each in found.get(key, ())]
        made[key] = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2) if tiles else None
    return made


@pytest.mark.parametrize(
    "said",
    [{}, {"max_patches": 32}, {"min_patches": 3}, {"crop_to_patches": False},
     {"crop_to_patches": False, "maximum_pad_value": 100}],
)  # fmt: skip
def test_images_have_the_tiles_and_placeholders_of_transformers(said: dict[str, Any]) -> None:
    pads = {key: said[key] for key in said if key == "maximum_pad_value"}
    rule = rule_of({key: said[key] for key in said if key not in pads}, **pads)
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(size=IMAGES["size"], tile_size=80), patch_size=2, downsample_ratio=4,
        image_token="<image>",
    )  # fmt: skip
    random = np.random.default_rng(7)
    for width, height in [tuple(max(side // 8, 1) for side in edges) for edges in EDGES if min(edges) > 9]:
        picture = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        found, cut, tiles = their_images(picture, **said), rule.cut(height, width), rule.tiles(picture_of(picture))
        wanted = [*found.get("pixel_values_local", ()), *found["pixel_values"]]
        assert cut.tiles == len(tiles) == len(wanted), (width, height)
        assert all(np.array_equal(tile, each.permute(1, 2, 0).numpy()) for tile, each in zip(tiles, wanted))
        marks = UnlimitedOcrProcessor.replace_image_token(processor, found, 0)  # type: ignore[arg-type]
        assert FAMILY.words_around(cut, cut.cells(8)) == marks, (width, height)


# ---- embeddings, logits, answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("eager", few([True, False], False))
def test_embeddings_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    pictures = PICTURES if eager else PICTURES[1:2]
    with torch.inference_mode():
        wanted = theirs.model.get_image_features(**their_pixels(*pictures)).pooler_output
    require_same_embeddings(folder, IMAGE, pictures, wanted, eager=eager, most=8)


@pytest.mark.parametrize("eager", few([True, False], False))
def test_logits_are_those_of_transformers(eager: bool, folder: Path, theirs: Any) -> None:
    """Of a prompt with two images, and of its answer, which is longer than the window."""

    def wanted(ids: torch.Tensor) -> torch.Tensor:
        count, cache, found = ids.shape[1] - 5, DynamicCache(config=theirs.config.text_config), []
        given: dict[str, Any] = their_pixels(*PICTURES[1:])
        for first, last in itertools.pairwise([0, *range(count, ids.shape[1] + 1)]):
            found.append(theirs(input_ids=ids[:, first:last], past_key_values=cache, **given).logits[0])
            given = {}
        return torch.cat(found).log_softmax(-1)

    require_logits(folder, PROMPTS[1], wanted, eager=eager, tokens=128)


def test_published_files_have_no_template(small: Path, tmp_path: Path) -> None:
    """Their prompt is `<image>document parsing.`."""
    content: Any = [{"type": "image", "image": PICTURES[1][:, :40]}, {"type": "text", "text": "document parsing."}]
    with InferenceEngine(without_template(small, tmp_path / "bare")) as engine:
        ids = engine.chat([{"role": "user", "content": content}], SamplingParams(max_tokens=1), use_tqdm=False)
        assert list(ids.prompt_token_ids) == [IMAGE] * (8 * 9 + 1) + engine.tokenize("document parsing.")


@pytest.mark.every_case
@pytest.mark.parametrize("tokens", [1024, 77])
def test_answers_are_the_same_in_a_batch_in_chunks_and_cached(tokens: int, folder: Path) -> None:
    with InferenceEngine(folder, enable_prefix_caching=False, max_num_batched_tokens=2048) as engine:
        alone = [tuple(tokens_of(answers(engine, [prompt], max_tokens=8))[0]) for prompt in PROMPTS]
    assert len(set(alone)) == len(alone)
    require_same_in_steps(folder, PROMPTS, alone, tokens)


ASKED = [("<image>document parsing.", PICTURES[1:2]), ("Nothing to see.", [])]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("small"), size={"height": 64, "width": 64}, tile_size=40)


@pytest.mark.parametrize("how", few(["captured", "one by one"], "captured"))
def test_steps_of_a_gpu_have_the_same_answers(how: str, small: Path) -> None:
    """By the references of its kernels."""
    require_same_on_a_gpu(small, ASKED, how)


@pytest.mark.every_case
@pytest.mark.parametrize(("size", "stages"), [(2, 1), (1, 2)])
def test_ranks_and_stages_have_the_same_answers(size: int, stages: int, small: Path) -> None:
    expected = answers_op_by_op(loaded_from(small, op_by_op=True), ASKED)
    require_same(answers_of_ranks(small, ASKED, size, stages), expected)


# ---- files -----------------------------------------------------------------------------------------------------------


def write_mmproj(folder: Path, made: Path) -> Path:
    """The checkpoint's vision encoders as llama.cpp's converter writes them: those of DeepSeek-OCR 1."""
    values: dict[str, Any] = {
        "image_size": 128, "patch_size": 2, "embedding_length": 48, "block_count": 2, "feed_forward_length": 8,
        "window_size": 14, "sam.block_count": 3, "sam.embedding_length": 32, "sam.head_count": 2,
        "preproc_min_tiles": 2, "preproc_max_tiles": 6, "clip.use_gelu": True,
    }  # fmt: skip
    return write_tower(made, "deepseekocr", values, gguf_tensors(folder), IMAGES)


@pytest.mark.every_case
@pytest.mark.parametrize("folder", ["usual"], indirect=True)
def test_gguf_files_are_the_same_model(folder: Path, tmp_path: Path) -> None:
    """Which have the window's length, too."""
    with InferenceEngine(folder, enable_prefix_caching=False) as engine:
        wanted = [tuple(each) for each in tokens_of(answers(engine, PROMPTS, max_tokens=8))]
    require_same_from_gguf(folder, write_mmproj(folder, tmp_path / "mmproj.gguf"), PROMPTS, wanted, "deepseek2-ocr")


TOLD = ORIGINAL | {"use_mla": False}
PUBLISHED: dict[str, Any] = {
    "architectures": ["UnlimitedOcrForConditionalGeneration"], "model_type": "unlimited_ocr",
    "text_config": {"model_type": "unlimited_ocr_text", "max_position_embeddings": 8192}, "eos_token_id": 1,
    "vision_config": {
        "sam_config": {"model_type": "unlimited_ocr_sam_vision_model"},
        "encoder_config": {"model_type": "unlimited_ocr_vision_encoder"},
    },
}  # fmt: skip
"""The sizes are transformers' defaults."""


def test_both_formats_are_read() -> None:
    path, width = Path("config.json"), {"heads": 16, "image_size": 224, "layers": 24, "patch_size": 14, "width": 1024}
    vision = {"image_size": 1024, "width": {"clip-l-14-224": width, "sam_vit_b": SAM_B}}
    original = {
        "architectures": ["UnlimitedOCRForCausalLM"], "model_type": "unlimited-ocr", "language_config": TOLD,
        "vision_config": vision, "sliding_window": 128, "sliding_window_size": 128, **TOLD,
    }  # fmt: skip
    towers, texts = list[Any](), list[Any]()
    for config in (PUBLISHED, original):
        towers.append(FAMILY.config_from_hf(Fields(config, path), Fields({}, path), 1280, {}))
        texts.append(family_from_hf(config, path)[1])
    assert (texts[0].hidden_size, texts[0].num_experts, texts[0].answer_window) == (1280, 64, 128)
    assert texts[0] == texts[1]
    assert (towers[0].tiles, towers[0].sides, towers[0].rule.most, towers[0].clip.learned) == (
        (40, 64),
        (16, 10),
        32,
        16,
    )
    assert towers[0].clip == towers[1].clip
    assert towers[0].rule == towers[1].rule
    _, other = family_from_hf(original | {"sliding_window": 64, "sliding_window_size": 64}, path)
    assert other.answer_window == 64


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"sliding_window": 0}, "sliding window is 0 tokens"),
        ({"sliding_window": 1 << 40}, "sliding window is"),
        ({"sliding_window": "many"}, "sliding_window"),
        ({"sliding_window_size": 64, "sliding_window": 128}, "implemented: one window"),
        ({"layer_types": ["reference_sliding_attention"] * 6 + ["full_attention"] * 6}, "in all layers"),
        ({"layer_types": ["reference_sliding_attention"] * 3}, "in all layers"),
        ({"layer_types": ["sliding_attention"] * 12}, "in all layers"),
    ],
)
def test_other_windows_are_refused(said: dict[str, Any], why: str) -> None:
    with pytest.raises(CandleVllmError, match=why):
        family_from_hf(PUBLISHED | {"text_config": PUBLISHED["text_config"] | said}, Path("config.json"))
    full = PUBLISHED["text_config"] | {"layer_types": ["full_attention"] * 12}
    assert family_from_hf(PUBLISHED | {"text_config": full}, Path("config.json"))[1].answer_window is None


@pytest.mark.parametrize(
    ("section", "said", "why"),
    [
        ("encoder_config", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("encoder_config", {"hidden_size": 512}, "ends with 1024; CLIP's encoder has 512"),
        ("encoder_config", {"layer_norm_eps": 2.0}, "eps"),
        ("encoder_config", {"num_attention_heads": 7}, "heads"),
        ("encoder_config", {"image_size": 7}, "0 rows of positions"),
        ("sam_config", {"use_rel_pos": False}, "use_rel_pos"),
        ("sam_config", {"downsample_channels": [512, 896]}, "ends with 896; CLIP's encoder has 1024"),
    ],
)
def test_other_encoders_are_refused(section: str, said: dict[str, Any], why: str) -> None:
    vision, path = PUBLISHED["vision_config"], Path("config.json")
    config = PUBLISHED | {"vision_config": vision | {section: vision[section] | said}}
    with pytest.raises(CandleVllmError, match=why):
        FAMILY.config_from_hf(Fields(config, path), Fields({}, path), 1280, {})
