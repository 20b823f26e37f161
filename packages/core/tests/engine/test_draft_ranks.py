# SPDX-License-Identifier: MIT
"""Models and heads that draft for a model over several processes: the answers of the same ranks without drafts."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.engine.drafts.draft_model import DraftModel
from candle_vllm.core.testing.toy_model import write_toy_model
from packages.core.tests.engine.drafted import FreeTimes, answers, same_times
from packages.core.tests.engine.test_draft_head import CONFIG, MODELS, apart, eagle3_reference, loaded, watched
from packages.core.tests.engine.toy_heads import NextTokens, eagle3_config, eagle3_weights, write_head
from packages.core.tests.models.tiny import write_tiny
from tests.common_run import few

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="several ranks need sockets that a child inherits")

RANKS: dict[str, Any] = {
    "device": "cpu", "op_by_op": True, "tensor_parallel_size": 2, "max_num_batched_tokens": 64, "max_num_seqs": 8,
}  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
TEXTS = [list(b"a text that is longer than the room of a step" * 2), list(b"short")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("toy") / "toy", CONFIG)


@pytest.fixture(scope="module")
def right(folder: Path) -> Iterator[list[Any]]:
    with loaded(folder, None, **RANKS) as engine:
        yield texts(engine)


def texts(engine: InferenceEngine) -> list[Any]:
    """Answers of many kinds without their log-probabilities: torch sums rows of a step otherwise when they are more."""
    return [(tokens, text, *ends) for tokens, text, _, *ends in answers(engine, 3)]


@pytest.mark.every_case
def test_a_model_drafts(folder: Path, right: list[Any]) -> None:
    """It is whole on the first rank, and right as often as it is the same model."""
    drafts = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 4}
    with InferenceEngine(
        folder, threads=1, max_model_len=256, block_size=16, speculative_config=drafts, **RANKS
    ) as engine:
        assert engine._engine is not None
        drafter = engine._engine._drafter
        assert drafter is not None
        assert isinstance(drafter.model, DraftModel)
        drafter.model.times, drafter.times = FreeTimes(), same_times
        assert texts(engine) == right
        stats = engine.stats()
        assert stats.drafts > 50
        assert stats.accepted_draft_tokens > 0.3 * stats.draft_tokens


def test_a_head_drafts(folder: Path, right: list[Any], tmp_path: Path) -> None:
    """It has no embedding of its own, and the model's is divided: it says what its definition says."""
    config = eagle3_config(CONFIG)
    weights = eagle3_weights(config)
    method = {"method": "eagle3", "model": str(write_head(tmp_path / "head", config, weights))}
    wanted = eagle3_reference(folder, config, weights)
    with loaded(folder, method, **RANKS) as engine:
        assert texts(engine) == right
        for level in (0, 2):
            if level:
                engine.sleep(level)
                engine.wake_up()
            seen = watched(engine)
            engine.generate(TEXTS, GREEDY, use_tqdm=False)
            assert max(len(candidates) for _, candidates, _ in seen) == 3
            assert max(apart(row, wanted(*given)) for *given, row in random.Random(1).sample(seen, 6)) < 1e-4


@pytest.mark.every_case
@pytest.mark.parametrize("name", few(MODELS, "Qwen3"))
def test_a_layer_for_further_tokens_drafts(name: str, tmp_path: Path) -> None:
    """With embedding and head of its own, or those of the model."""
    model_type, layout, fields = MODELS[name]
    source = write_tiny(tmp_path / "source", model_type, **fields)
    layer = NextTokens(source, layout)
    written = layer.write(tmp_path / "model", source, **({} if layout == "mtp" else {"num_nextn_predict_layers": 1}))
    with loaded(written, {"method": "mtp"}, **RANKS) as engine:
        seen = watched(engine)
        found = engine.generate(TEXTS, GREEDY, use_tqdm=False)
    assert max(apart(row, layer.last(*given)) for *given, row in random.Random(1).sample(seen, 4)) < 1e-4
    with loaded(written, None, device="cpu", op_by_op=True) as engine:
        plain = engine.generate(TEXTS, GREEDY, use_tqdm=False)
    assert [each.outputs[0].token_ids for each in found] == [each.outputs[0].token_ids for each in plain]
