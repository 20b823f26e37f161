# SPDX-License-Identifier: MIT
"""Captured steps and sampling, replayed on their memory without Python, give the tokens of steps that are launched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from candle_vllm.core import EngineConfig, SamplingParams
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.engine.build import preparation_for
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.cache.states import StatePool
from candle_vllm.core.engine.cache.window_pages import WindowedBlocks
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.device_inputs import DeviceLimits
from candle_vllm.core.engine.runners.device_runner import DeviceRunner
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.loading.cache_specs import NO_STATES, StateRoom, WindowRoom, states, windows_of
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.tiny import write_tiny
from packages.core.tests.recording_stream import RecordingStream
from tests.common_run import few

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BLOCK, BLOCKS, SEQUENCES, TOKENS, PAGES = 16, 40, 2, 12, 20


def answers(loaded: LoadedModel, stream: RecordingStream, *, graphs: bool) -> dict[str, list[int]]:
    """The tokens of some requests; prompts are cut into chunks, and decode beside other sequences."""
    specs = loaded.decoder.config.cache_specs
    loaded.decoder.prepare(160)
    runner = DeviceRunner(
        loaded.decoder,
        DeviceLimits(TOKENS, SEQUENCES, 10, BLOCK),
        stream,
        torch.float32,
        captured_prompts=TOKENS if graphs else 0,
        graphs=graphs,
    )
    rooms = [WindowRoom(window, 2 * TOKENS, PAGES) for window in windows_of(specs)]
    runner.allocate(BLOCKS, StateRoom(SEQUENCES, 2, 0) if states(specs) else NO_STATES, rooms)
    blocks = BlockManager(BLOCKS, BLOCK)
    if rooms:
        blocks = WindowedBlocks(rooms, [pages.data for pages in runner.page_of], BLOCK)
    pool = StatePool(SEQUENCES, 2, BLOCK) if states(specs) else None
    engine = Engine(runner, Scheduler(blocks, SEQUENCES, TOKENS, states=pool), preparation_for(loaded, 160))
    for number, length in enumerate((3, 17, 6)):
        params = SamplingParams(max_tokens=3, ignore_eos=True, temperature=0.8 * (number % 2), seed=1, top_p=0.9)
        prompt = [5 + number, *range(40, 40 + length)]
        request = GenerationRequest(request_id=str(number), prompt_token_ids=prompt, params=params)
        engine.add(engine.prepare(request))
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for piece in engine.step():
            assert piece.error is None
            found.setdefault(piece.request_id, []).extend(piece.token_ids)
    engine.close()
    return found


@pytest.mark.parametrize("name", few(["Qwen3.5", "Gemma-3", "gpt-oss", "DeepSeek-V3", "Gemma-4 experts"], "Qwen3.5"))
def test_replays_are_launched_steps(name: str, device: torch.device, tmp_path: Path) -> None:
    if device.type != "cpu":
        pytest.skip("test_gpu_engine.py captures on a GPU")
    source = write_tiny(tmp_path / "model", ROWS[name].model_type, **ROWS[name].config)
    config = EngineConfig(model=str(source), op_by_op=True, dtype="f32", max_model_len=160)
    loaded, stream = load_model(config, device, lambda *_: None), RecordingStream()
    captured = answers(loaded, stream, graphs=True)
    assert stream.captured > 5
    assert stream.replayed > 5
    assert captured == answers(loaded, RecordingStream(), graphs=False)
