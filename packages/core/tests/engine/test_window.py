# SPDX-License-Identifier: MIT
"""How much of one call the engine holds at a time: two steps' worth of tokens, and one text at least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from candle_vllm.core.engine.outputs import FinishReason, TokenOutput
from candle_vllm.core.engine.requests import PoolingRequest
from candle_vllm.core.engine.step.stream import MAX_UNDER_WAY, Entry, Window
from candle_vllm.core.engine.step.thread import EngineThread, Sink


class Held:
    """A thread that ends the oldest text whenever it has as many as it is given before the caller waits."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.most: list[tuple[int, int]] = []  # texts and tokens that were under way at once
        self.waiting: list[tuple[str, int, Sink]] = []

    def submit(self, prepared: Sequence[Any], sink: Sink) -> None:
        (request,) = prepared
        self.waiting.append((request.request_id, len(request.prompt_token_ids), sink))
        self.most.append((len(self.waiting), sum(length for _, length, _ in self.waiting)))

    def abort(self, request_id: str, sink: Sink) -> None:
        raise AssertionError("nothing is left to abort")

    def end_one(self) -> None:
        request_id, _, sink = self.waiting.pop(0)
        sink.put(TokenOutput(request_id=request_id, finish_reason=FinishReason.STOP))


@pytest.mark.parametrize(
    ("lengths", "texts", "tokens"),
    [
        ([300] * 20, 3, 900),  # 2 * 512
        ([1024] * 5, 1, 1024),
        ([5000, 1, 1, 5000, 1], 2, 5000),
        ([1] * 600, MAX_UNDER_WAY, MAX_UNDER_WAY),
        ([1024, 1, 1023, 1], 2, 1024),
    ],
)
def test_two_steps_worth_of_tokens(
    lengths: list[int], texts: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [PoolingRequest(request_id=f"r{n}", prompt_token_ids=[1] * size) for n, size in enumerate(lengths)]
    thread = Held()
    window = Window(cast(EngineThread, thread), [Entry(request, [request]) for request in requests], 512)
    submit = window._submit

    def then_end_one(*args: Any, **named: Any) -> bool:
        going = submit(*args, **named)
        if thread.waiting:
            thread.end_one()
        return going

    monkeypatch.setattr(window, "_submit", then_end_one)
    pieces = window.run(use_tqdm=False)
    assert [piece.request_id for piece in pieces] == [request.request_id for request in requests]
    assert max(count for count, _ in thread.most) == texts
    assert max(total for _, total in thread.most) == tokens
