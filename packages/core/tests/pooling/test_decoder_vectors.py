# SPDX-License-Identifier: MIT
"""Vectors of models that generate: transformers' hidden states, however a text is batched, cut, cached or preempted."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from candle_vllm.core import (
    CandleVllmError,
    EngineConfig,
    InferenceEngine,
    InvalidParameterError,
    PromptTooLongError,
    SamplingParams,
)
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.engine.build import preparation_for
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.requests import GenerationRequest, PoolingRequest
from candle_vllm.core.engine.runners.device_inputs import DeviceLimits
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.engine.runners.eager_runner import EagerRunner
from candle_vllm.core.engine.runners.model_runner import ModelRunner
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.errors import ConfigError, ModelLoadError
from candle_vllm.core.models.trunks import prefixed
from candle_vllm.core.pooling import PoolingKind, PoolingParams
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.exact_sums import exact_sums
from packages.core.tests.lazy_stream import LazyStream
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.tiny import eager_logits, some_tokens, write_tiny
from packages.core.tests.toy_gguf import write_toy_gguf
from tests.waiting import until

CPU = torch.device("cpu")
KINDS: tuple[PoolingKind, ...] = ("mean", "weighted_mean", "cls", "last")
TEXTS = [[(7 * i + n) % 256 for i in range(length)] for n, length in enumerate((1, 2, 15, 16, 17, 63, 64, 130))]
LONG = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)


def hidden_states(folder: Path, tokens: list[int]) -> np.ndarray:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([tokens])).last_hidden_state[0].numpy()


def pooled(states: np.ndarray, kind: PoolingKind) -> np.ndarray:
    means = {"mean": None, "weighted_mean": np.arange(1, len(states) + 1)}  # the weights of sentence-transformers
    vector = np.average(states, 0, means[kind]) if kind in means else states[0 if kind == "cls" else -1]
    return vector / np.linalg.norm(vector)


def vectors(engine: InferenceEngine, texts: list[list[int]], params: PoolingParams | None = None) -> np.ndarray:
    return np.stack([np.asarray(output.embedding) for output in engine.embed(texts, params, use_tqdm=False)])


@pytest.fixture(scope="module")
def expected(toy_model: Path) -> dict[PoolingKind, np.ndarray]:
    states = [hidden_states(toy_model, text) for text in TEXTS]
    return {kind: np.stack([pooled(each, kind) for each in states]) for kind in KINDS}


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 8, "max_num_seqs": 3, "block_size": 16}])
def test_equals_transformers(toy_model: Path, expected: dict[PoolingKind, np.ndarray], settings: Any) -> None:
    with InferenceEngine(str(toy_model), op_by_op=True, **settings) as engine:
        assert engine.model_info.tasks == ("generate", "embed", "score")
        assert engine.model_info.embedding_size == 64
        for kind in KINDS:
            assert np.abs(vectors(engine, TEXTS, PoolingParams(pooling=kind)) - expected[kind]).max() < 1e-5
        assert np.abs(vectors(engine, TEXTS) - expected["last"]).max() < 1e-5, "decoders give the last one's"


def test_a_setting_names_the_pooling_of_requests_that_name_none(
    toy_model: Path, expected: dict[PoolingKind, np.ndarray]
) -> None:
    with InferenceEngine(str(toy_model), op_by_op=True, pooling="mean") as engine:
        assert np.abs(vectors(engine, TEXTS) - expected["mean"]).max() < 1e-5
        assert np.abs(vectors(engine, TEXTS, PoolingParams(pooling="cls")) - expected["cls"]).max() < 1e-5
    with pytest.raises(ConfigError, match="pooling 'all' is not one of mean, weighted_mean, cls, last"):
        InferenceEngine(str(toy_model), pooling="all")  # type: ignore[arg-type]


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
def test_recorded_steps_give_the_same_vectors(tmp_path: Path, quantization: str) -> None:
    """The kernels keep a 16-bit cache, and of quantised weights 8-bit activations."""
    config = toy_config(hidden_size=128, head_dim=32, intermediate_size=160)
    path = write_toy_gguf(tmp_path / "toy.gguf", config, quantization=quantization)
    for kind in KINDS:
        params = PoolingParams(pooling=kind)
        with InferenceEngine(str(path), op_by_op=True) as exact:
            wanted = vectors(exact, TEXTS, params)
        with InferenceEngine(str(path), threads=2, block_size=16) as engine:
            whole = vectors(engine, TEXTS, params)
        with InferenceEngine(str(path), threads=1, block_size=16, max_num_batched_tokens=8, max_num_seqs=2) as engine:
            cut = vectors(engine, TEXTS, params)
        assert ((whole * wanted).sum(-1) > 0.999).all(), kind
        assert np.abs(whole - cut).max() < 1e-6, "however the text is cut"


def test_vectors_and_answers_do_not_disturb_each_other(
    toy_model: Path, expected: dict[PoolingKind, np.ndarray]
) -> None:
    prompts = [TEXTS[3], TEXTS[5], TEXTS[6]]
    with exact_sums(), InferenceEngine(str(toy_model), op_by_op=True) as engine:
        alone = [output.token_ids for output in engine.generate(prompts, GREEDY, use_tqdm=False)]

    async def mixed(engine: InferenceEngine) -> tuple[list[Any], list[Any]]:
        answers = asyncio.gather(*(engine.agenerate(prompt, GREEDY) for prompt in prompts))
        found = asyncio.gather(*(engine.aembed(TEXTS, PoolingParams(pooling=kind)) for kind in KINDS))
        return await answers, await found

    settings: dict[str, Any] = {"op_by_op": True, "max_num_batched_tokens": 16, "max_num_seqs": 4}
    with exact_sums(), InferenceEngine(str(toy_model), **settings) as engine:
        answers, found = asyncio.run(mixed(engine))
        assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert [answer.token_ids for answer in answers] == alone
    for kind, outputs in zip(KINDS, found):
        assert np.abs(np.stack([np.asarray(o.embedding) for o in outputs]) - expected[kind]).max() < 1e-5


def test_the_prefix_cache_serves_the_last_position_only(toy_model: Path) -> None:
    text = TEXTS[-1]
    with InferenceEngine(str(toy_model), op_by_op=True, block_size=16) as engine:
        first = engine.embed([text], use_tqdm=False)[0]
        again = engine.embed([text], use_tqdm=False)[0]
        mean = engine.embed([text], PoolingParams(pooling="mean"), use_tqdm=False)[0]
        assert (first.num_cached_tokens, again.num_cached_tokens, mean.num_cached_tokens) == (0, 128, 0)
        assert np.abs(np.asarray(first.embedding) - np.asarray(again.embedding)).max() < 1e-6
        answer = engine.generate([text], GREEDY, use_tqdm=False)[0]
        assert answer.num_cached_tokens == 128, "an answer may use what a vector has computed"


def test_a_text_may_fill_the_whole_context(toy_model: Path) -> None:
    with InferenceEngine(str(toy_model), op_by_op=True, max_model_len=64, block_size=16) as engine:
        for kind in KINDS:
            assert len(vectors(engine, [TEXTS[6]], PoolingParams(pooling=kind))[0]) == 64
        with pytest.raises(PromptTooLongError, match="the text has 65 tokens and the model takes at most 64"):
            engine.embed([*TEXTS[6], 1], use_tqdm=False)
        with pytest.raises(PromptTooLongError, match="input 1: the text has 65 tokens") as caught:
            engine.embed([[1], [*TEXTS[6], 1]], use_tqdm=False)
        assert caught.value.param == "inputs.1"


# ---- steps that overlap, preemption ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(toy_model: Path) -> LoadedModel:
    return load_model(EngineConfig(model=str(toy_model), op_by_op=True), CPU, lambda *_: None)


def lazy_runner(loaded: LoadedModel, blocks: int) -> DeviceRunner:
    runner = DeviceRunner(loaded.decoder, DeviceLimits(32, 8, 32, 16), LazyStream(), torch.float32, finite_cache=True)
    for work in runner.largest_steps():
        work()
    runner.allocate(blocks)
    return runner


def drive(loaded: LoadedModel, runner: ModelRunner, blocks: int) -> tuple[dict[str, Any], int]:
    """Vectors of all kinds and answers in one engine; what came out, and the preemptions."""
    scheduler = Scheduler(BlockManager(blocks, 16), 8, 32)
    engine = Engine(runner, scheduler, preparation_for(loaded, 512, seed=0))
    requests: list[GenerationRequest] = []
    for number, text in enumerate(TEXTS):
        requests += [
            PoolingRequest(request_id=f"{kind}{number}", prompt_token_ids=text, pooling=PoolingParams(pooling=kind))
            for kind in KINDS
        ]
        requests.append(GenerationRequest(request_id=f"answer{number}", prompt_token_ids=text, params=LONG))
    found: dict[str, Any] = {request.request_id: [] for request in requests}
    for step in range(5000):
        if requests and step % 2 == 0:
            engine.add(engine.prepare(requests.pop(0)))
        for piece in engine.step():
            assert piece.error is None
            found[piece.request_id] += piece.token_ids if piece.pooled is None else [np.asarray(piece.pooled)]
        if not requests and not engine.has_work:
            break
    assert scheduler.blocks.num_free == blocks
    return found, scheduler.num_preemptions


@pytest.fixture(scope="module")
def plain(loaded: LoadedModel) -> dict[str, Any]:
    """Step by step, with room for all."""
    with exact_sums():
        return drive(loaded, EagerRunner(loaded.decoder, 400, 16, CPU, torch.float32), 400)[0]


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize(("lazy", "blocks"), [(True, 16), (False, 16), (True, 400)])
def test_the_same_on_a_late_device_and_after_preemption(
    loaded: LoadedModel,
    expected: dict[PoolingKind, np.ndarray],
    plain: dict[str, Any],
    lazy: bool,
    blocks: int,
) -> None:
    with exact_sums():
        runner = lazy_runner(loaded, blocks) if lazy else EagerRunner(loaded.decoder, blocks, 16, CPU, torch.float32)
        found, preemptions = drive(loaded, runner, blocks)
    assert (preemptions > 0) == (blocks == 16)
    for number in range(len(TEXTS)):
        assert found[f"answer{number}"] == plain[f"answer{number}"]
        for kind in KINDS:
            (vector,) = found[f"{kind}{number}"]
            assert np.abs(vector - expected[kind][number]).max() < 1e-5, (kind, number)


def test_an_aborted_text_frees_its_blocks(loaded: LoadedModel) -> None:
    scheduler = Scheduler(BlockManager(40, 16), 8, 16)
    engine = Engine(EagerRunner(loaded.decoder, 40, 16, CPU, torch.float32), scheduler, preparation_for(loaded, 512))
    engine.add(engine.prepare(PoolingRequest(request_id="a", prompt_token_ids=TEXTS[-1])))
    assert engine.step() == []
    (piece,) = engine.abort("a")
    assert piece.finish_reason == "abort"
    assert piece.pooled is None
    assert scheduler.blocks.num_free == 40
    assert not engine.has_work


# ---- what is asked for -----------------------------------------------------------------------------------------------


def test_vectors_may_be_cut_where_the_model_says_so(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path, toy_config(is_matryoshka=True))
    with InferenceEngine(str(folder), op_by_op=True) as engine:
        whole = vectors(engine, [TEXTS[4]])[0]
        cut = vectors(engine, [TEXTS[4]], PoolingParams(dimensions=8))[0]
        assert np.abs(cut - whole[:8] / np.linalg.norm(whole[:8])).max() < 1e-6
        bare = vectors(engine, [TEXTS[4]], PoolingParams(normalize=False))[0]
        assert np.linalg.norm(bare) == pytest.approx(np.linalg.norm(hidden_states(folder, TEXTS[4])[-1]), rel=1e-4)
        with pytest.raises(InvalidParameterError, match="dimensions is 65 and the model's vectors have 64"):
            engine.embed([TEXTS[4]], PoolingParams(dimensions=65), use_tqdm=False)


def test_lengths_that_the_model_was_not_trained_for_are_refused(toy_model: Path, tmp_path: Path) -> None:
    with InferenceEngine(str(toy_model), op_by_op=True) as engine:
        assert len(vectors(engine, [[1]], PoolingParams(dimensions=64))[0]) == 64
        with pytest.raises(InvalidParameterError, match="leave dimensions out") as caught:
            engine.embed([[1]], PoolingParams(dimensions=32), use_tqdm=False)
        assert caught.value.param == "dimensions"
    folder = write_toy_model(tmp_path, toy_config(matryoshka_dimensions=[16, 32]))
    with InferenceEngine(str(folder), op_by_op=True) as engine:
        assert len(vectors(engine, [[1]], PoolingParams(dimensions=32))[0]) == 32
        with pytest.raises(InvalidParameterError, match="trained for 16, 32, 64"):
            engine.embed([[1]], PoolingParams(dimensions=31), use_tqdm=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dimensions", 0), ("dimensions", -1), ("dimensions", True), ("dimensions", 1.5), ("dimensions", 10**30),
        ("dimensions", "8"), ("normalize", 1), ("normalize", "yes"), ("pooling", "max"), ("pooling", 1),
        ("pooling", []),
    ],
)  # fmt: skip
def test_wrong_parameters_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidParameterError, match=field) as caught:
        PoolingParams(**{field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([[]], "the text is empty"), ([[1], []], "input 1: the text is empty"),
        ([[1, 272]], "token id 272 is out of vocabulary: .* 0 to 271"), (7, "prompts are"),
        ([[1], [-1]], "input 1: token id -1 is out of"), ([[1], [10**30]], "input 1: a token id is out of .* 0 to 271"),
        ([[1], 5.0], "input 1: a prompt is a text or a list"), ([["a"]], "a prompt is a text or a list"),
        ([[1], [True]], "input 1: a prompt is a text or a list"), ({"a": 1}, "a prompt has no .a.: a prompt has"),
        (["a", "\ud800"], "input 1: the text has half a surrogate"),
    ],
)  # fmt: skip
def test_wrong_inputs_are_refused_by_number(toy_engine: InferenceEngine, inputs: Any, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        toy_engine.embed(inputs, use_tqdm=False)


def test_nothing_in_nothing_out(toy_engine: InferenceEngine) -> None:
    assert toy_engine.embed([], use_tqdm=False) == []
    assert toy_engine.score([], use_tqdm=False) == []


@pytest.fixture(scope="module")
def toy_engine(toy_model: Path) -> Any:
    with InferenceEngine(str(toy_model), op_by_op=True) as engine:
        yield engine


def test_scores_are_cosines_and_every_text_is_run_once(toy_engine: InferenceEngine) -> None:
    before = toy_engine.stats().prompt_tokens
    scores = toy_engine.score([("query", "one"), ("query", "three"), ("query", "query")], use_tqdm=False)
    assert toy_engine.stats().prompt_tokens - before == len("query") + len("one") + len("three")
    assert [score.num_tokens for score in scores] == [8, 5, 0]
    assert scores[2].score == pytest.approx(1.0)
    query, one = vectors(toy_engine, [list(b"query"), list(b"one")])
    assert scores[0].score == pytest.approx(float(query @ one), abs=1e-6)
    done: list[Any] = []

    async def apart(function: Any, *arguments: Any) -> Any:
        done.append(made := await asyncio.to_thread(function, *arguments))
        return made

    (score,) = asyncio.run(toy_engine.ascore([("query", "one")], apart=apart))
    assert score.score == pytest.approx(scores[0].score)
    assert done[-1] == [score], "cosines are not computed in the event loop"
    assert scores[0].prompt_token_ids == tuple(b"queryone")
    assert not score.prompt_token_ids, "a long query is not repeated for each document"


def test_a_pairs_text_that_is_too_long_is_named(toy_engine: InferenceEngine) -> None:
    with pytest.raises(PromptTooLongError, match="input 1, second text: the text has 513 tokens") as caught:
        toy_engine.score([("a", "b"), ("a", "b" * 513)], use_tqdm=False)
    assert caught.value.param == "inputs.1.1"


@pytest.mark.parametrize("pairs", ["ab", [("a",)], [("a", "")], ["ab"], [("a", 5)], 7])
def test_wrong_pairs_are_refused(toy_engine: InferenceEngine, pairs: Any) -> None:
    with pytest.raises(InvalidParameterError, match="pair"):
        toy_engine.score(pairs, use_tqdm=False)


def test_numbers_that_are_not_finite_never_leave(toy_model: Path, tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = torch.nan
    save_file(weights, folder / "model.safetensors")
    with InferenceEngine(str(folder), op_by_op=True) as engine:
        with pytest.raises(CandleVllmError, match="not finite"):
            engine.embed([[7]], use_tqdm=False)
        assert np.isfinite(vectors(engine, [[8]])).all(), "others go on"


def test_more_texts_than_the_queue_takes(toy_model: Path) -> None:
    texts = [[n % 256, n // 256] for n in range(700)]
    with InferenceEngine(str(toy_model), op_by_op=True, max_queued_requests=16) as engine:
        found = vectors(engine, texts)
        assert np.abs(vectors(engine, texts[-1:])[0] - found[-1]).max() < 1e-5
        assert len(asyncio.run(engine.aembed(texts))) == 700


async def test_a_cancelled_call_leaves_nothing_behind(toy_model: Path) -> None:
    with InferenceEngine(str(toy_model), op_by_op=True, max_num_batched_tokens=64, max_num_seqs=2) as engine:
        task = asyncio.create_task(engine.aembed([TEXTS[-1]] * 200, PoolingParams(pooling="mean")))
        await until(lambda: engine.stats().finished.get("stop"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not engine.stats().num_running and not engine.stats().num_waiting)
        assert engine.stats().finished["stop"] < 200
        assert engine.stats().num_free_blocks == engine.stats().num_blocks


# ---- the model's own pooling -----------------------------------------------------------------------------------------


def write_modules(folder: Path, pooling: dict[str, Any] | None, *, normalize: bool = True) -> None:
    kinds = ["Transformer", "Pooling", "Normalize"][: 3 if normalize else 2]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    ("pooling", "kind"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted_mean"),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_a_sentence_transformers_folder_says_how(
    tmp_path: Path, expected: dict[PoolingKind, np.ndarray], pooling: Any, kind: PoolingKind, normalize: bool
) -> None:
    folder = write_toy_model(tmp_path)
    write_modules(folder, pooling, normalize=normalize)
    with InferenceEngine(str(folder), op_by_op=True) as engine:
        found = vectors(engine, TEXTS)
    lengths = np.linalg.norm(found, axis=-1, keepdims=True)
    assert np.allclose(lengths, 1, atol=1e-5) == normalize
    assert np.abs(found / lengths - expected[kind]).max() < 1e-5


@pytest.mark.parametrize(("number", "kind"), [(0, "last"), (1, "mean"), (2, "cls"), (3, "last")])
def test_a_gguf_file_says_how(number: int, kind: str) -> None:
    from candle_vllm.core.loading.pooling import read_pooling
    from candle_vllm.core.loading.source import ModelFiles

    files = ModelFiles(name="m", folder=Path("."), weights=(Path("m.gguf"),), format="gguf")
    metadata = {"general.architecture": "llama", "llama.pooling_type": number}
    assert read_pooling(files, metadata, 64, "last").pooling == kind
    with pytest.raises(CandleVllmError, match=r"m\.gguf: llama\.pooling_type is 4"):
        read_pooling(files, metadata | {"llama.pooling_type": 4}, 64, "last")


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        (None, None, r"1_Pooling/config\.json is missing"),
        (None, {"pooling_mode_max_tokens": True}, "the pooling is max; implemented"),
        (None, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "the pooling is cls and mean"),
        (None, {}, "the pooling is not named"),
        (None, {"pooling_mode": "weighted"}, "the pooling is weighted"),
        (None, {"pooling_mode_mean_tokens": True, "include_prompt": False}, "include_prompt is false"),
        (None, {"pooling_mode_mean_tokens": "yes"}, "pooling_mode_mean_tokens is 'yes', not a bool"),
        (
            [{"type": "a.Transformer", "path": ""}, {"type": "a.WordWeights", "path": "2_W"}],
            None,
            "Transformer, WordWe",
        ),
        ([{"type": "a.Transformer", "path": ""}, {"type": "a.Dense", "path": "2_Dense"}], None, "cannot be read"),
        ([{"type": "a.Transformer", "path": "../../etc"}], None, "a path that is empty or a folder beside"),
        ([{"type": "a.Transformer", "path": "/etc"}], None, "a path that is empty or a folder beside"),
        ([{"type": "a.Transformer"}], None, "each entry must have a type"),
        ([5] * 3, None, "each entry must have a type"),
        ([{}] * 99, None, "a list of at most 16"),
        ({"a": 1}, None, "a list of at most 16"),
        ("[", None, "cannot be read as JSON"),
        ("[" * 100_000, None, "cannot be read as JSON"),
    ],
)
def test_a_folder_that_means_something_else_is_refused(
    tmp_path: Path, modules: Any, pooling: Any, message: str
) -> None:
    folder = write_toy_model(tmp_path)
    write_modules(folder, pooling)
    if modules is not None:
        (folder / "modules.json").write_text(modules if isinstance(modules, str) else json.dumps(modules))
    with pytest.raises(CandleVllmError, match=message):
        InferenceEngine(str(folder), op_by_op=True)


@pytest.mark.parametrize("lengths", [[0], [65], ["8"], [True]])
def test_wrong_matryoshka_lengths_name_the_file(tmp_path: Path, lengths: Any) -> None:
    folder = write_toy_model(tmp_path, toy_config(matryoshka_dimensions=lengths))
    with pytest.raises(CandleVllmError, match=r"config\.json: matryoshka_dimensions is"):
        InferenceEngine(str(folder), op_by_op=True)


# ---- models without a head -------------------------------------------------------------------------------------------


def write_trunk(source: Path, folder: Path, architecture: str) -> Path:
    """The toy as embedding models are published: saved from the base model, names without a prefix, no head."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight")
    bare = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(bare, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [architecture]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("architecture", ["LlamaModel", "LlamaForCausalLM"])
def test_a_model_without_a_head_gives_vectors_alone(architecture: str, toy_model: Path, tmp_path: Path) -> None:
    trunk = write_trunk(toy_model, tmp_path / "trunk", architecture)
    with InferenceEngine(str(toy_model)) as whole, InferenceEngine(str(trunk)) as engine:
        assert engine.model_info.tasks == ("embed", "score")
        assert np.array_equal(vectors(engine, TEXTS), vectors(whole, TEXTS))
        with pytest.raises(InvalidParameterError, match="generates no text"):
            engine.generate([TEXTS[1]], GREEDY, use_tqdm=False)


def test_a_missing_head_makes_no_embedder_of_a_model_that_generates(
    toy_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in vLLM: its class has a head, so that is the embedding table, and the log says so."""
    shutil.copytree(toy_model, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "m" / "model.safetensors")
    loaded = load_model(EngineConfig(model=str(tmp_path / "m")), CPU, lambda *_: None)
    assert (loaded.config.has_head, loaded.config.tie_embeddings) == (True, True)
    assert "no lm_head.weight is stored: the embedding table is used as the head" in caplog.text


def test_a_tied_table_may_be_stored_as_the_head_alone(tmp_path: Path) -> None:
    """As a safetensors file that has one name for two tensors of the same memory."""
    folder = write_toy_model(tmp_path / "m", toy_config(tie_word_embeddings=True))
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight", None)
    with InferenceEngine(str(folder)) as engine:
        expected = engine.generate([TEXTS[1]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / "model.safetensors")
    with InferenceEngine(str(folder)) as engine:
        assert engine.generate([TEXTS[1]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected
    path = folder / "config.json"
    for tied in (False, None):  # Llama is not tied without the key
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": tied}))
        with pytest.raises(ModelLoadError, match="embed_tokens"):
            load_model(EngineConfig(model=str(folder)), CPU, lambda *_: None)


def test_a_family_that_is_tied_without_saying_so_may_be_stored_as_the_head_alone(tmp_path: Path) -> None:
    folder, tokens = write_tiny(tmp_path / "m", "gemma2", **ROWS["Gemma-2"].config), some_tokens(24)
    expected = eager_logits(folder, tokens, [len(tokens)])
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / "model.safetensors")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "tie_word_embeddings"}))
    assert np.array_equal(eager_logits(folder, tokens, [len(tokens)]), expected)


def test_the_head_of_a_draft_is_no_table() -> None:
    names = ("fc.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight")
    draft: Any = SimpleNamespace(tensors=dict.fromkeys(names))
    assert prefixed(draft, tied=True) is draft
