# SPDX-License-Identifier: MIT
"""Models whose layers are divided among stages, here threads of one process, against the whole ones."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from candle_vllm.core import EngineConfig
from candle_vllm.core.assembly import model as loading
from candle_vllm.core.assembly.model import load_model
from candle_vllm.core.assembly.stages import divide
from candle_vllm.core.devices import CPU
from candle_vllm.core.engine.runners.eager_runner import StageRunner
from candle_vllm.core.errors import ConfigError
from candle_vllm.core.loading.gguf import open_gguf
from packages.core.tests.models.families import FORMATS, ROWS
from packages.core.tests.models.family_formats import write_format
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.tiny import (
    BLOCK,
    LENGTH,
    eager_logits,
    error,
    room_of,
    some_tokens,
    step_logits,
    write_tiny,
)
from packages.core.tests.thread_ranks import ThreadRanks, in_threads
from tests.common_run import few


class Steps(StageRunner):
    """Whose steps are over when they were launched; a stage behind the first has nothing to score."""

    def forward(self, batch: Any, states: Any) -> None:
        super().forward(batch, states)
        self.collect()

    def score(self, rows: Any) -> torch.Tensor:
        found = super().score(rows)
        return found if self._stage.is_first else torch.zeros(len(rows), 1)


def logits_of(source: Path, size: int, stages: int, chunks: list[int], **settings: Any) -> list[torch.Tensor]:
    """Logits of the ranks of the first stage."""

    def work(ranks: ThreadRanks) -> torch.Tensor:
        config = EngineConfig(model=str(source), op_by_op=True, **{"block_size": BLOCK} | settings)
        loaded: Any = load_model(config, CPU, lambda *_: None, ranks=ranks)
        memory = 32, BLOCK, CPU, loaded.placement.torch_dtype
        runner = Steps(loaded.decoder, *memory, None, None, None, room_of(loaded.decoder))
        return step_logits(runner, some_tokens(), chunks)

    return in_threads(size, work, stages)[:size]


COMMON = ["Llama", "Phi", "Gemma 2", "gpt-oss", "DeepSeek-V3"]
# Layers read keys, or chosen positions, of other layers, get embeddings of their own, or have several streams.
REFUSED = ("Gemma-4 shared keys", "Gemma-3n", "GLM-5", "DeepSeek-V4", "Qwen4")
WHOLE_NORMS = ("OLMo", "MiniMax-M2")  # of all heads, which are not divided
CASES = [
    (name, size)
    for name in ROWS
    for size in (1, 2)
    if not name.startswith(REFUSED) and (size == 1 or not name.startswith(WHOLE_NORMS))
]


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(*case, marks=() if case[0] in COMMON else pytest.mark.every_case) for case in CASES],
)
def test_stages_give_the_logits_of_all_layers(name: str, size: int, tmp_path: Path) -> None:
    row = ROWS[name]
    write_tiny(tmp_path, row.model_type, **row.config)
    whole = eager_logits(tmp_path, some_tokens(), [LENGTH])
    parts = logits_of(tmp_path, size, 2, [30, 1, LENGTH - 31])
    assert len(parts) == size
    for logits in parts:
        assert error(logits, whole) < 1e-5


def test_layers_with_several_streams_are_not_divided(tmp_path: Path) -> None:
    row = ROWS["DeepSeek-V4"]
    write_tiny(tmp_path, row.model_type, **row.config)
    with pytest.raises(ConfigError, match="several residual streams: leave pipeline_parallel_size out"):
        logits_of(tmp_path, 1, 2, [LENGTH])


@pytest.mark.parametrize("name", few(["DeepSeek-V3", "Qwen3-MoE"], "DeepSeek-V3"))
def test_tokens_are_sent_within_each_stage(name: str, tmp_path: Path) -> None:
    """To the ranks of their experts; over a border goes one summand, and nothing."""
    row = ROWS[name]
    write_tiny(tmp_path, row.model_type, **row.config)
    whole = eager_logits(tmp_path, some_tokens(), [LENGTH])
    settings: dict[str, Any] = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "enable_expert_parallel": True}
    for logits in logits_of(tmp_path, 2, 2, [30, 1, LENGTH - 31], all2all_backend="all_to_all", **settings):
        assert error(logits, whole) < 1e-5


def test_stages_alone_give_the_bits_of_all_layers(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama", num_hidden_layers=5)
    chunks = [30, 1, LENGTH - 31]
    (logits,) = logits_of(tmp_path, 1, 3, chunks)
    assert torch.equal(logits, eager_logits(tmp_path, some_tokens(), chunks))


def test_a_stage_reads_its_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GGUF file with one table for words and head: two stages share out the bytes, each tensor is read once."""
    folder = write_tiny(tmp_path / "model", "llama", tie_word_embeddings=True, num_hidden_layers=4)
    path = export_gguf(folder, tmp_path / "model.gguf", "llama", quantization="Q8_0")
    whole = eager_logits(path, some_tokens(), [LENGTH])
    read: list[list[str]] = []
    loaded = loading.load_weights

    def load(model: Any, table: Any, checkpoint: Any, *rest: Any, **more: Any) -> None:
        read.append([*checkpoint.tensors])
        loaded(model, table, checkpoint, *rest, **more)

    monkeypatch.setattr(loading, "load_weights", load)
    (logits,) = logits_of(path, 1, 2, [LENGTH])
    assert error(logits, whole) < 1e-5
    first, last = sorted(read, key=lambda names: "token_embd.weight" not in names)
    assert not {*first} & {*last}
    assert "output_norm.weight" in last
    with open_gguf(path) as checkpoint:
        assert {*first} | {*last} == {*checkpoint.tensors}


@pytest.mark.one_of_each(4)
@pytest.mark.parametrize("format", FORMATS)
def test_quantised_files(format: str, tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", "llama", hidden_size=128, intermediate_size=384, head_dim=64)
    stored, plain = write_format(tmp_path / "model", format, tmp_path)
    (logits,) = logits_of(stored, 1, 2, [30, LENGTH - 30])
    assert error(logits, eager_logits(plain, some_tokens(), [LENGTH])) < 1e-5


def test_layers_are_divided_by_their_bytes() -> None:
    assert divide([1, 1, 1, 1], 0, 2) == [range(2), range(2, 4)]
    assert divide([1, 1, 1, 1], 2, 2) == [range(1), range(1, 4)]
    assert divide([1] * 8, 0, 3) == [range(2), range(2, 5), range(5, 8)]
    assert divide([9, 1, 1, 1], 0, 3) == [range(1), range(1, 2), range(2, 4)]
    assert divide([1, 1], 100, 2) == [range(1), range(1, 2)]
    for sizes in itertools.product((1, 3, 7), repeat=5):
        found = [sum(sizes[number] for number in part) for part in divide(sizes, 4, 3)]
        least = min(
            max(4 + sum(sizes[:one]), sum(sizes[one:two]), sum(sizes[two:]))
            for one, two in itertools.combinations(range(1, 5), 2)
        )
        assert max(4 + found[0], *found[1:]) == least


def test_more_stages_than_layers(tmp_path: Path) -> None:
    write_tiny(tmp_path, "llama")
    with pytest.raises(ConfigError, match="set pipeline_parallel_size to 2 or less") as raised:
        logits_of(tmp_path, 1, 3, [LENGTH])
    assert raised.value.setting == "pipeline_parallel_size"
