# SPDX-License-Identifier: MIT
"""What tests of models that see share: random models and their files, towers, answers of engines, log-probabilities."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForImageTextToText

from candle_vllm.core import EngineConfig, GenerationOutput, InferenceEngine, SamplingParams
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.config import SpeculativeConfig
from candle_vllm.core.conversion import write_gguf
from candle_vllm.core.devices import CPU, choose_device
from candle_vllm.core.engine.build import preparation_for
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.cache.states import StatePool
from candle_vllm.core.engine.drafts.drafting import Drafter
from candle_vllm.core.engine.outputs import OutputCollector
from candle_vllm.core.engine.ranks.ranks import RankedRunner
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.device_inputs import DeviceLimits
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.engine.runners.eager_runner import EagerRunner, EagerTower, StageRunner
from candle_vllm.core.engine.runners.images import ImageStore, TowerRunner, tiles_of
from candle_vllm.core.engine.runners.model_runner import ModelRunner
from candle_vllm.core.engine.runners.recorded_tower import RecordedTower
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.kernels.device_stream import CudaStream, DeviceStream
from candle_vllm.core.loading.cache_specs import NO_STATES, StateRoom, states
from candle_vllm.core.remote import RemoteEngine
from candle_vllm.core.text.pretokenizers import PRE_TOKENIZERS
from candle_vllm.core.vision.inputs import ImageInput
from candle_vllm.core.vision.prompts import VisionInput
from packages.core.tests.engine.drafted import same_times
from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.lazy_stream import LazyStream
from packages.core.tests.models.tiny import randomise
from packages.core.tests.thread_ranks import Meetings, MeetingStages, ThreadRanks, ToldRanks, in_threads

Answers: TypeAlias = list[tuple[tuple[int, ...], list[float]]]
"""Tokens, and log-probabilities of a prompt."""
BLOCK, CONTEXT = 16, 256
Q8_0 = GGMLQuantizationType.Q8_0
SIZES = {
    "patch_size": 4, "embedding_length": 32, "block_count": 3, "attention.head_count": 2, "feed_forward_length": 48,
    "attention.layer_norm_epsilon": 1e-6,
}  # fmt: skip
"""Sizes of most of the vision encoders, by llama.cpp's names."""


def random_pictures(*sizes: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """Pictures [H, W, 3] of these heights and widths, the same in each run whatever other tests drew before."""
    random = np.random.default_rng(3)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


PICTURES = random_pictures((40, 33), (19, 70), (100, 9), (5, 5))
MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
START, END, PAD, VIDEO = range(260, 264)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GPU_STEPS: dict[str, dict[str, Any]] = {
    "captured": {"captured": 64, "budget": 40},
    "one by one": {"graphs": False},
    "guesses": {"drafts": 8},
}

# ---- random models ---------------------------------------------------------------------------------------------------


def random_model(config: Any) -> Any:
    """transformers' model with this config, of the same random numbers each time."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager")
    randomise(model)
    return model


def model_of(folder: Path) -> Any:
    """transformers' model of a folder."""
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def loaded_from(folder: Path, **settings: Any) -> LoadedModel:
    """What is loaded of a folder, on the CPU."""
    loaded = load_model(EngineConfig(model=str(folder), **settings), choose_device("cpu"), lambda *_: None)
    assert isinstance(loaded, LoadedModel)
    return loaded


def request_of(loaded: LoadedModel, pictures: list[NDArray[np.uint8]], text: str) -> GenerationRequest:
    """A prompt with pictures, as the engine gets it."""
    assert loaded.tower is not None
    ids, images = loaded.tower.vision.look(loaded.tokenizer.encode(text, parse_special=True), pictures)
    params = SamplingParams(max_tokens=8, temperature=0)
    return GenerationRequest(request_id="r", prompt_token_ids=ids, params=params, images=images)


def write_tokenizer(folder: Path, marks: Sequence[str] = MARKS, template: str = TEMPLATE) -> None:
    """Bytes, two merges and Qwen2's cut, which GGUF has a form for, and the marks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e")]
    vocabulary = {text: index for index, text in enumerate([*letters, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    cut = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["qwen2"].patterns[0]), "isolated")
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, spelling])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_end|>", "<|im_start|>", *marks])
    assert [tokenizer.token_to_id(mark) for mark in marks] == list(range(START, START + len(marks)))
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"eos_token": "<|im_end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


def write_tower(
    made: Path,
    kind: str,
    values: Mapping[str, Any],
    tensors: Mapping[str, NDArray[np.float32]],
    images: Mapping[str, Any],
    quantised: Callable[[str, NDArray[np.float32]], bool] = lambda *_: False,
) -> Path:
    """A vision encoder's GGUF file, as llama.cpp's converter leaves it.

    Args:
        made: the file.
        kind: its `clip.projector_type`; empty if `values` has it elsewhere.
        values: further metadata, and other sizes than `SIZES`; names without `clip.` follow `clip.vision.`.
        tensors: the tensors by their names.
        images: settings of images, of which the means and deviations are written if they are there.
        quantised: which tensors are Q8_0.
    """
    writer = GGUFWriter(made, "clip")
    if kind:
        writer.add_string("clip.projector_type", kind)
    adds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    means = {key: images[key] for key in ("image_mean", "image_std") if key in images}
    for key, value in {**SIZES, **means, **values}.items():
        add: Any = adds.get(type(value), writer.add_array)
        add(key if key.startswith("clip.") else f"clip.vision.{key}", value)
    for name, data in tensors.items():
        if quantised(name, data):
            writer.add_tensor(name, quantize(data, Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def without_torchvision(name: str) -> Any:
    """A module of transformers that imports torchvision, with modules that are empty in its place."""
    names = ["torchvision", *(f"torchvision.transforms{end}" for end in ("", ".v2", ".v2.functional"))]
    made: dict[str, Any] = {name: ModuleType(name) for name in names}
    made[names[2]].functional = made[names[3]]
    with mock.patch.dict(sys.modules, made):
        return importlib.import_module(f"transformers.models.{name}")


# ---- towers ----------------------------------------------------------------------------------------------------------


def nbytes(tower: RecordedTower) -> int:
    """The bytes that encoding the largest tile takes."""
    return sum(each.nbytes for recorder in (tower._tile, tower._cells) for each in recorder.allocated)


def finished(
    runner: TowerRunner, tiles: Collection[NDArray[np.uint8]], whole: tuple[int, int] = (0, 0)
) -> tuple[NDArray[np.float32], int]:
    """What a tower gives, and in how many pieces before that."""
    encoding, pieces = runner.embeddings(tiles, whole), 0
    while True:
        try:
            next(encoding)
            pieces += 1
        except StopIteration as done:
            return done.value, pieces


def require_embeddings(
    loaded: LoadedModel, images: Sequence[ImageInput], wanted: Sequence[NDArray[np.float32]], *, eager: bool, most: int
) -> None:
    """A tower gives these embeddings, and the first again; a step reserves less than `most` times what it takes."""
    assert loaded.tower is not None
    tower, team = loaded.tower.tower, ThreadTeam(2)
    try:
        runner: TowerRunner = EagerTower(tower, CPU) if eager else RecordedTower(tower, team)
        for image, expected in zip([*images, images[0]], [*wanted, wanted[0]], strict=True):
            found, _ = finished(runner, tiles_of(image), image.whole)
            assert found.shape == expected.shape
            assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
        if isinstance(runner, RecordedTower):
            assert nbytes(runner) < tower.config.step_bytes(2) < most * nbytes(runner)
    finally:
        team.close()


def require_same_embeddings(
    folder: Path, asks: int, pictures: list[NDArray[np.uint8]], wanted: Iterable[Any], *, eager: bool, most: int
) -> tuple[VisionInput, tuple[ImageInput, ...]]:
    """See `require_embeddings`; a prompt has as many placeholders. Returns how pictures are prepared, and the images.

    Args:
        folder: the model's.
        asks: the token that a template writes for a picture.
        pictures, wanted: pictures, and the embeddings [n, E] of each, tensors or arrays.
        eager, most: see `require_embeddings`.
    """
    loaded, arrays = loaded_from(folder, op_by_op=eager), [np.asarray(each) for each in wanted]
    assert loaded.tower is not None
    vision = loaded.tower.vision
    ids, images = vision.look([asks] * len(pictures), pictures)
    assert [len(each) for each in vision.places(ids, images)] == [len(each) for each in arrays]
    require_embeddings(loaded, images, arrays, eager=eager, most=most)
    return vision, images


def require_nearly_same_when_quantised(folder: Path, mark: int, picture: NDArray[np.uint8]) -> None:
    """The embeddings of a tower that is quantised to Q8_0 as it is loaded."""
    made = list[NDArray[np.float32]]()
    for more in ({}, {"isq": "q8_0"}):
        loaded = loaded_from(folder, op_by_op=True, **more)
        assert loaded.tower is not None
        image = loaded.tower.vision.look([mark], [picture])[1][0]
        made.append(finished(EagerTower(loaded.tower.tower, CPU), tiles_of(image), image.whole)[0])
    assert 0 < np.abs(made[1] - made[0]).max() < 0.1 * np.abs(made[0]).max()


# ---- answers ---------------------------------------------------------------------------------------------------------


def without_template(folder: Path, bare: Path) -> Path:
    """Copy a model's folder without its chat template."""
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("chat_template*"))
    path = bare / "tokenizer_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in said.items() if key != "chat_template"}))
    return bare


def require_same_when_cached(engine: InferenceEngine, prompts: list[Any], alone: list[tuple[int, ...]]) -> None:
    """Answers are those of prompts alone, cold and warm; the first two prompts are found in the cache."""
    assert answers(engine, prompts) == alone
    again = engine.generate(prompts, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True), use_tqdm=False)
    assert [tuple(each.outputs[0].token_ids) for each in again] == alone
    assert all(each.num_cached_tokens for each in again[:2])


def require_same_in_steps(folder: Path, prompts: list[Any], alone: list[tuple[int, ...]], tokens: int) -> None:
    """Answers are those of prompts alone: together, cut into steps of so many tokens, cold and warm."""
    with InferenceEngine(folder, max_num_batched_tokens=tokens, max_num_seqs=8) as engine:
        require_same_when_cached(engine, prompts, alone)


def require_same_from_gguf(
    folder: Path, tower: Path, prompts: list[Any], wanted: list[tuple[int, ...]], architecture: str, **settings: Any
) -> None:
    """Answers of the text model's GGUF file, which is written here, and of that of its vision encoder."""
    text = tower.with_name("model.gguf")
    write_gguf(EngineConfig(model=str(folder), dtype="f32"), text)
    with InferenceEngine(text, mmproj=tower, tokenizer=folder, **settings) as engine:
        assert engine.model_info.architecture == architecture
        assert answers(engine, prompts) == wanted


def require_same_on_a_gpu(
    folder: Path, prompts: list[tuple[str, list[NDArray[np.uint8]]]], how: str = "captured", **more: Any
) -> None:
    """Answers of a GPU's steps, by the references of its kernels, are those of steps op by op."""
    loaded, settings = loaded_from(folder, op_by_op=True), GPU_STEPS[how] | more
    tokens = 12 if "drafts" in settings else 6
    with exact_sums():
        found, stream = answers_of_a_gpu(loaded, prompts, tokens=tokens, **settings)
        require_same(found, answers_op_by_op(loaded, prompts, tokens))
    assert isinstance(stream, LazyStream)
    assert bool(stream.replayed) == settings.get("graphs", True)


def answers_of(folder: Path, prompts: list[Any], **settings: Any) -> list[tuple[int, ...]]:
    """Answers to prompts that are asked together."""
    with InferenceEngine(folder, **settings) as engine:
        return answers(engine, prompts)


def answers(engine: InferenceEngine | RemoteEngine, prompts: list[Any], **params: Any) -> list[tuple[int, ...]]:
    asked = SamplingParams(**{"max_tokens": 8, "temperature": 0, "ignore_eos": True} | params)
    return [tuple(each.outputs[0].token_ids) for each in engine.generate(prompts, asked, use_tqdm=False)]


def answers_alone(folder: Path, prompts: list[Any]) -> list[tuple[int, ...]]:
    """Different answers to prompts of one step each, nothing cached."""
    with InferenceEngine(folder, enable_prefix_caching=False, max_num_batched_tokens=512) as engine:
        found = [answers(engine, [prompt])[0] for prompt in prompts]
    assert len(set(found)) == len(found)
    return found


def require_logits(
    folder: Path, prompt: Any, wanted: Callable[[torch.Tensor], Any], *, eager: bool, tokens: int = 512, **settings: Any
) -> None:
    """The log-probabilities of a prompt and its answer are `wanted`'s [T, V] for ids [1, T]."""
    settings |= {"op_by_op": eager, "max_num_batched_tokens": tokens, "max_num_seqs": 8}
    with InferenceEngine(folder, enable_prefix_caching=False, **settings) as engine:
        params = SamplingParams(max_tokens=6, temperature=0, prompt_logprobs=1, logprobs=1, ignore_eos=True)
        found = engine.generate(prompt, params, use_tqdm=False)[0]
    answer = found.outputs[0]
    everything = [*found.prompt_token_ids, *answer.token_ids]
    with torch.inference_mode():
        expected = np.asarray(wanted(torch.tensor([everything[:-1]])))
    assert found.prompt_logprobs is not None
    assert answer.logprobs is not None
    ours = [each.chosen.logprob for each in [*found.prompt_logprobs[1:], *answer.logprobs] if each is not None]
    apart = np.abs(np.array(ours) - expected[np.arange(len(ours)), everything[1:]])
    assert apart.max() < (1e-4 if eager else 0.1)  # keys and values are bfloat16 in the compiled steps


def prompt_error(found: GenerationOutput, logits: torch.Tensor) -> float:
    """How far the log-probabilities of a prompt's tokens lie from those of other logits [T, V], at most."""
    assert found.prompt_logprobs is not None
    ours = [each.chosen.logprob for each in found.prompt_logprobs[1:] if each is not None]
    assert len(ours) == len(found.prompt_token_ids) - 1
    expected = logits.log_softmax(-1).numpy()
    wanted = [expected[place, token] for place, token in enumerate(found.prompt_token_ids[1:])]
    return float(np.abs(np.array(ours) - np.array(wanted)).max())


def room_of(loaded: LoadedModel, drafts: int = 0) -> StateRoom:
    """Room for states of four sequences, where layers keep any."""
    return StateRoom(4, 6, drafts) if states(loaded.config.cache_specs) else NO_STATES


def engine_of(loaded: LoadedModel, runner: ModelRunner, budget: int, drafts: int = 0) -> Engine:
    assert loaded.tower is not None
    images = ImageStore(EagerTower(loaded.tower.tower, loaded.placement.device), 1 << 24)
    flight = runner.in_flight
    room = room_of(loaded)
    pool = None if room is NO_STATES else StatePool(room.running, room.checkpoints, BLOCK)
    scheduler = Scheduler(
        BlockManager(100, BLOCK), 4, budget, draft_rows=drafts, images=images, in_flight=flight, states=pool
    )
    drafter = Drafter(SpeculativeConfig(), drafts) if drafts else None
    if drafter is not None:
        drafter.times = same_times
    return Engine(runner, scheduler, preparation_for(loaded, CONTEXT, seed=0), drafter, images)


def answers_op_by_op(
    loaded: LoadedModel, prompts: list[tuple[str, list[NDArray[np.uint8]]]], tokens: int = 12
) -> Answers:
    """Of steps that wait for each other."""
    loaded.decoder.prepare(CONTEXT)
    turning, room = loaded.turning(CONTEXT), room_of(loaded)
    runner = EagerRunner(loaded.decoder, 100, BLOCK, CPU, torch.float32, None, None, turning, room)
    return driven(engine_of(loaded, runner, CONTEXT), loaded, prompts, tokens)


def answers_of_ranks(
    source: Path,
    prompts: list[tuple[str, list[NDArray[np.uint8]]]],
    size: int,
    stages: int = 1,
    *,
    budget: int = CONTEXT,
    gpu: bool = False,
    tokens: int = 12,
) -> Answers:
    """Of so many ranks of each of the stages, op by op or as steps of GPUs, on streams that stand for them."""
    config = EngineConfig(model=str(source), op_by_op=True, max_images=64)
    meetings = [Meetings() for _ in range(size)]

    def build(ranks: ThreadRanks) -> tuple[LoadedModel, ModelRunner, LazyStream | None]:
        loaded = load_model(config, CPU, lambda *_: None, ranks=ranks)
        loaded.decoder.prepare(CONTEXT)
        if gpu:
            if ranks.stages is not None:
                decoder: Any = loaded.decoder
                decoder.stage.line = MeetingStages(ranks.stages.rank, stages, meetings[ranks.rank])
            stream = LazyStream()
            limits = DeviceLimits(budget, 4, -(-CONTEXT // BLOCK), BLOCK)
            runner = DeviceRunner(
                loaded.decoder, limits, stream, torch.float32, finite_cache=True, captured_prompts=64, overlaps=False,
                turning=loaded.turning(budget),
            )  # fmt: skip
            for work in runner.largest_steps():
                work()
            runner.allocate(100, room_of(loaded))
            while stream.pending:  # a device runs what nobody waits for, too
                stream.progress()
            return loaded, runner, stream
        kind = EagerRunner if ranks.stages is None else StageRunner
        memory = (loaded.decoder, 100, BLOCK, CPU, torch.float32, None, None)
        return loaded, kind(*memory, loaded.turning(budget), room_of(loaded)), None

    (loaded, first, _), *others = in_threads(size, build, stages)
    assert all(other.tower is None for other, *_ in others)
    told: Any = ToldRanks(dataclasses.replace(config, tensor_parallel_size=size), [other[1:] for other in others])
    try:
        return driven(engine_of(loaded, RankedRunner(first, told), budget), loaded, prompts, tokens)
    finally:
        told.close()


def answers_of_a_gpu(
    loaded: LoadedModel,
    prompts: list[tuple[str, list[NDArray[np.uint8]]]],
    *,
    graphs: bool = True,
    captured: int = 0,
    budget: int = CONTEXT,
    drafts: int = 0,
    tokens: int = 12,
) -> tuple[Answers, DeviceStream]:
    """Of a GPU's steps; on the CPU on a stream that does nothing before it is waited for."""
    device = torch.device(loaded.placement.device)
    stream = CudaStream(device) if device.type == "cuda" else LazyStream()
    limits = DeviceLimits(budget, 4 + drafts, -(-CONTEXT // BLOCK), BLOCK)
    loaded.decoder.prepare(CONTEXT)
    runner = DeviceRunner(
        loaded.decoder, limits, stream, torch.float32, graphs=graphs, finite_cache=True, captured_prompts=captured,
        overlaps=not drafts, turning=loaded.turning(budget),
    )  # fmt: skip
    for work in runner.largest_steps() if graphs else ():
        work()
    runner.allocate(100, room_of(loaded, drafts))
    return driven(engine_of(loaded, runner, budget, drafts), loaded, prompts, tokens), stream


def require_same(found: Answers, expected: Answers) -> None:
    """The same tokens, and log-probabilities of the prompts up to 1e-5 of the largest."""
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
    for (_, read), (_, wanted) in zip(found, expected, strict=True):
        assert np.abs(np.array(read) - wanted).max(initial=0) < 1e-5 * np.abs(wanted).max(initial=1)


def driven(
    engine: Engine, loaded: LoadedModel, prompts: list[tuple[str, list[NDArray[np.uint8]]]], tokens: int
) -> Answers:
    """Greedy tokens and the prompts' log-probabilities; a request comes every third step."""
    assert loaded.tower is not None
    waiting, steps = list(enumerate(prompts)), 0
    collectors = dict[str, OutputCollector]()
    while waiting or engine.has_work:
        if waiting and steps % 3 == 0:
            number, (text, pictures) = waiting.pop(0)
            ids, images = loaded.tower.vision.look(loaded.tokenizer.encode(text, parse_special=True), pictures)
            params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, prompt_logprobs=1)
            request = GenerationRequest(request_id=str(number), prompt_token_ids=ids, params=params, images=images)
            collectors[str(number)] = OutputCollector(request)
            engine.add(engine.prepare(request))
        for piece in engine.step():
            collectors[piece.request_id].add(piece)
        steps += 1
        assert steps < 2000
    found: Answers = []
    for collector in collectors.values():
        output = collector.result()
        assert output.prompt_logprobs is not None
        read = [each.chosen.logprob for each in output.prompt_logprobs[1:] if each is not None]
        found.append((tuple(output.outputs[0].token_ids), read))
    return found


WITHOUT_TORCH = """
import json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import numpy as np
from candle_vllm.core import InferenceEngine, SamplingParams

params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
for folder, text, pixels in json.load(sys.stdin):
    prompt = {"prompt": text, "multi_modal_data": {"image": [np.array(each, np.uint8) for each in pixels]}}
    with InferenceEngine(folder, device="cpu", threads=1) as engine:
        print(json.dumps(engine.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids))
"""


def answers_without_torch(prompts: list[tuple[Path, str, list[NDArray[np.uint8]]]]) -> list[tuple[int, ...]]:
    """Greedy answers of models in a process that cannot import torch; to a prompt with pictures each."""
    given = json.dumps([[str(folder), text, [each.tolist() for each in pixels]] for folder, text, pixels in prompts])
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input=given, stdout=subprocess.PIPE, text=True, check=True
    )
    return [tuple(json.loads(line)) for line in run.stdout.splitlines()]
