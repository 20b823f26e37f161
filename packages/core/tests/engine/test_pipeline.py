# SPDX-License-Identifier: MIT
"""Engines whose layers are divided among processes: the answers of one, whatever is in flight."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core import EngineConfig, InferenceEngine, LoRARequest, PoolingParams, SamplingParams
from candle_vllm.core.errors import ConfigError
from candle_vllm.core.fields import read_json
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.engine.test_ranks import GREEDY, KINDS, PROMPTS, dies, engine_of, pids, seeing, until_gone
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.tiny import write_tiny
from packages.core.tests.toy_adapter import write_adapter
from packages.core.tests.toy_sight import write_toy_sight

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="several ranks need sockets that a child inherits")


BLOCK = 8 * 2 * 2 * 2 * 16 * 4  # bytes, of the two layers of the stage that has more


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("toy"), toy_config(num_hidden_layers=3))


@pytest.fixture(scope="module")
def whole(model: Path) -> Iterator[InferenceEngine]:
    with engine_of(model, 1, enable_lora=True, lora_dtype="f32") as engine:
        yield engine


@pytest.fixture(scope="module")
def staged(model: Path) -> Iterator[InferenceEngine]:
    """Two stages, with fewer blocks than `answers` would take."""
    room = {"max_model_len": 192, "kv_cache_memory": 40 * BLOCK}
    with engine_of(model, 1, pipeline_parallel_size=2, enable_lora=True, lora_dtype="f32", **room) as engine:
        yield engine


def answers(engine: InferenceEngine, params: SamplingParams, **options: Any) -> list[Any]:
    """Of eight sequences; of each the tokens of all its answers."""
    outputs = engine.generate(PROMPTS * 2 + ["a", "b"], params, **options)
    return [[each.token_ids for each in output.outputs] for output in outputs]


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_request(kind: str, whole: InferenceEngine, staged: InferenceEngine) -> None:
    assert answers(staged, KINDS[kind]) == answers(whole, KINDS[kind])
    if kind == "greedy":
        assert staged.stats().preemptions


def test_log_probabilities_of_prompts_and_vectors(whole: InferenceEngine, staged: InferenceEngine) -> None:
    for ours, right in zip(*(each.generate(PROMPTS, KINDS["log-probabilities"]) for each in (staged, whole))):
        found, wanted = (
            [each.chosen.logprob for each in some or () if each is not None]
            for some in (ours.prompt_logprobs, right.prompt_logprobs)
        )
        assert found == pytest.approx(wanted, abs=1e-4)
    for ours, right in zip(*(each.embed(PROMPTS, PoolingParams()) for each in (staged, whole))):
        assert list(ours.embedding) == pytest.approx(list(right.embedding), abs=1e-4)


def test_steps_are_in_flight_of_disjoint_sequences(staged: InferenceEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence that decodes is in one step at most; half of those that run are in each."""
    engine, seen = staged._engine, list[list[set[int]]]()
    assert engine is not None
    landed = engine._collect

    def collect() -> Any:
        seen.append([{id(run.sequence) for run in flight.step if run.wanted} for flight in engine._flights])
        return landed()

    monkeypatch.setattr(engine, "_collect", collect)
    assert all(len(output.outputs[0].token_ids) == 24 for output in staged.generate(["a"] * 8, GREEDY))
    full = [flights for flights in seen if len(flights) == 2]
    assert len(full) > 0.8 * len(seen)
    assert all(not first & second for first, second in full)
    assert sum(len(first) == len(second) == 4 for first, second in full) > 30


def test_the_prefix_cache_and_requests_that_end_in_flight(staged: InferenceEngine) -> None:
    staged.reset_prefix_cache()
    alone = [staged.generate([prompt], GREEDY)[0].outputs[0].token_ids for prompt in PROMPTS]
    before = staged.stats().cached_prompt_tokens
    form = KINDS["form"].structured_outputs
    long = SamplingParams(max_tokens=80, temperature=1.0, seed=1, ignore_eos=True)
    for params in (long, SamplingParams(max_tokens=80, structured_outputs=form, prompt_logprobs=1)):
        with staged.generate_stream(PROMPTS[0], params) as stream:
            next(stream)  # it is under way
            asking = threading.Thread(target=stream.close)
            asking.start()
            again = [output.outputs[0].token_ids for output in staged.generate(PROMPTS * 3, GREEDY)]
            asking.join()
        assert again == alone * 3
    assert staged.stats().cached_prompt_tokens > before
    assert staged.stats().num_running == 0


@pytest.mark.parametrize("level", [1, 2])
def test_stages_sleep_and_wake(level: int, staged: InferenceEngine) -> None:
    right = answers(staged, GREEDY)
    staged.sleep(level)
    staged.wake_up()
    assert answers(staged, GREEDY) == right


def test_adapters(model: Path, tmp_path: Path, whole: InferenceEngine, staged: InferenceEngine) -> None:
    """Each stage has what an adapter does to its layers, the first one what it does to the tables."""
    config = read_json(model / "config.json")
    size, words = config["hidden_size"], config["vocab_size"]
    shapes = {f"model.layers.{layer}.mlp.down_proj": (size, config["intermediate_size"]) for layer in (0, 1, 2)}
    write_adapter(tmp_path / "layers", shapes, rank=4, seed=0, size=2)
    write_adapter(tmp_path / "last", {"model.layers.2.mlp.down_proj": (size, config["intermediate_size"])}, seed=1)
    write_adapter(tmp_path / "tables", {"lm_head": (words, size)}, rank=4, seed=2, size=2)
    uses = [None, *(LoRARequest(name, lora_path=str(tmp_path / name)) for name in ("layers", "last", "tables"))]
    found = answers(staged, GREEDY, lora_request=uses * 2)
    assert found == answers(whole, GREEDY, lora_request=uses * 2)
    assert len({str(each) for each in found[:1] + answers(staged, GREEDY, lora_request=uses[1])[:1]}) == 2


@pytest.mark.every_case
def test_few_blocks_and_four_ranks(model: Path, whole: InferenceEngine) -> None:
    """Two stages of two ranks each; sequences are preempted while their steps are in flight."""
    prompts = [prompt[:20] for prompt in PROMPTS]
    right = [output.outputs[0].token_ids for output in whole.generate(prompts, GREEDY)]
    settings = {"max_model_len": 64, "kv_cache_memory": 12 * BLOCK, "pipeline_parallel_size": 2}
    with engine_of(model, 2, **settings) as engine:
        assert [output.outputs[0].token_ids for output in engine.generate(prompts, GREEDY)] == right
        assert engine.stats().preemptions
        found = pids(engine)
        assert len(found) == 3
    until_gone(found)


@pytest.mark.every_case
def test_a_stage_that_dies_ends_the_engine_by_name(model: Path) -> None:
    with engine_of(model, 1, pipeline_parallel_size=2, max_model_len=512) as engine:
        found = pids(engine)
        kill = partial(os.kill, found[0], signal.SIGKILL)
        dies(engine, kill, "rank 1 has ended (killed by SIGKILL)", prompts=4)
    until_gone(found)


@pytest.mark.parametrize("kinds", [("linear_attention", "full_attention"), ("full_attention", "linear_attention")])
def test_a_stage_may_have_no_layers_with_states(kinds: tuple[str, str], tmp_path: Path) -> None:
    row = ROWS["Qwen3.5"]
    folder = write_tiny(tmp_path / "model", row.model_type, **{**row.config, "layer_types": list(kinds)})
    found = []
    for stages in (1, 2):
        with engine_of(folder, 1, pipeline_parallel_size=stages, max_model_len=64) as engine:
            outputs = engine.generate([[5, 6, 7, 8], [9, 3]], GREEDY, use_tqdm=False)
            found.append([output.outputs[0].token_ids for output in outputs])
    assert found[0] == found[1]


@pytest.mark.every_case
def test_pictures(tmp_path: Path) -> None:
    folder = write_toy_sight(tmp_path)
    right = seeing(folder)
    assert seeing(folder, pipeline_parallel_size=2) == right


def test_what_stages_cannot_do_is_refused() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"speculative_config": {"method": "suffix"}}, "speculative_config"),
        ({"speculative_config": {"method": "mtp"}}, "speculative_config"),
        ({"device": "cuda:0,cuda:1,cuda:2"}, "tensor_parallel_size"),
        ({"cpu_offload_gb": 1.0}, "cpu_offload_gb"),
    ]
    for settings, blamed in refused:
        with pytest.raises(ConfigError) as raised:
            EngineConfig(model="m", pipeline_parallel_size=2, **settings)
        assert raised.value.setting == blamed
    assert EngineConfig(model="m", pipeline_parallel_size=2, device="cuda:0,cuda:1,cuda:2,cuda:3").ranks == 4
