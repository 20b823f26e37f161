# SPDX-License-Identifier: MIT
"""Statistics of an engine: what a field declares is all that sums over engines and other processes need."""

from __future__ import annotations

from threading import RLock
from types import SimpleNamespace
from typing import Annotated, Any

import msgspec
import pytest

from candle_vllm.core import EngineStats
from candle_vllm.core.engine.stats import STATS, Histogram, Stat, combined, ended, forms
from candle_vllm.core.remote.fleet import Fleet
from candle_vllm.core.remote.serving import Outbox
from candle_vllm.core.remote.wire import FromChild, MalformedMessageError, Pieces, Reader, encode

NUMBERS: dict[str, Any] = {
    "num_running": 1, "num_waiting": 2, "num_blocks": 10, "num_free_blocks": 4, "block_size": 16, "prompt_tokens": 100,
    "cached_prompt_tokens": 50, "generation_tokens": 7, "finished": {"stop": 2}, "preemptions": 1, "steps": 9,
    "adapters": 3, "accepted_per_position": (3, 1), "step_seconds": (0.5,), "running_adapters": {"a": 1},
    "max_adapters": 8, "adapter_load_seconds": 0.5,
}  # fmt: skip


class Measured(EngineStats):
    """One more field: a histogram."""

    waits: Annotated[Histogram, Stat("counter", "x:waits_seconds", "Waits, seconds.")] = msgspec.field(
        default_factory=lambda: Histogram((0.25, 1, 8))
    )


class MeasuredPieces(Pieces, array_like=True, tag="pieces"):
    """`Pieces` whose reader knows the further field."""

    stats: Measured | None = None


def measured(*values: float) -> Measured:
    waits = forms(Measured)["waits"].zero.copy()
    for value in values:
        waits.observe(value)
    return Measured.snapshot(NUMBERS, {"waits": waits})


def test_every_field_has_a_form() -> None:
    assert STATS.keys() == set(EngineStats.__struct_fields__)
    for name, stat in forms(Measured).items():
        counts = "histogram" if isinstance(stat.zero, Histogram) else "counter"
        assert stat.kind == (counts if stat.form == "counter" else "gauge"), name
        assert bool(stat.series) == bool(stat.help), name
        assert stat.when in ("", *STATS), name
    assert forms(Measured)["waits"].kind == "histogram"
    assert forms(Measured).keys() - STATS.keys() == {"waits"}


def test_numbers_of_several_engines_add_up() -> None:
    one = EngineStats(**NUMBERS)
    two = msgspec.structs.replace(
        one, finished={"stop": 1, "length": 4}, accepted_per_position=(1,), running_adapters={}, adapters=2
    )
    both = combined([one, two])
    assert (both.num_running, both.num_blocks, both.prompt_tokens, both.steps) == (2, 20, 200, 18)
    assert (both.block_size, both.adapters, both.max_adapters) == (16, 3, 8)
    assert both.finished == {"stop": 3, "length": 4}
    assert (both.accepted_per_position, both.step_seconds) == ((4, 1), (0.5,))
    assert (both.running_adapters, both.adapter_load_seconds) == ({"a": 1}, 1.0)
    over = ended(both)
    assert (over.num_running, over.num_free_blocks, over.adapters, over.running_adapters) == (0, 0, 0, {})
    assert (over.block_size, over.max_adapters, over.steps, over.finished) == (16, 8, 18, both.finished)
    nothing = combined([])
    assert {name: getattr(nothing, name) for name in STATS} == {name: stat.zero for name, stat in STATS.items()}


def test_histograms_of_two_replicas_add_up_and_survive_their_engines() -> None:
    one, two = measured(0.25, 0.5, 100), measured(8, 9)
    both = combined([one, two])
    assert both.waits == Histogram((0.25, 1, 8), [1, 1, 1, 2], 117.75)
    assert (one.waits.counts, two.waits.counts) == ([1, 1, 0, 1], [0, 0, 1, 1])
    assert ended(both).waits == both.waits
    assert combined([both, measured()]).waits == both.waits
    other = msgspec.structs.replace(one, waits=Histogram((1,)))
    with pytest.raises(ValueError, match="shorter"):
        combined([one, other])


def test_a_fleet_has_the_histograms_of_its_replicas() -> None:
    """Also of a replica that has died."""
    fleet = object.__new__(Fleet)
    replicas = [SimpleNamespace(last_stats=lambda value=value: measured(value)) for value in (0.5, 9.0)]
    vars(fleet).update(_lock=RLock(), _replicas=replicas, _up=[True, True], _restarts=[0, 0], _past=None)
    assert fleet.stats() == msgspec.structs.replace(
        combined([measured(0.5), measured(9.0)]), replicas=fleet.stats().replicas
    )
    vars(fleet).update(_up=[True, False], _past=ended(measured(8.0, 9.0)))
    stats = fleet.stats()
    assert isinstance(stats, Measured)
    assert stats.waits == Histogram((0.25, 1, 8), [0, 1, 1, 1], 17.5)
    assert [each.alive for each in stats.replicas] == [True, False]


def test_a_snapshot_is_a_copy_of_what_the_parts_report() -> None:
    waits, finished = Histogram((0.25, 1, 8)), {"stop": 1}
    stats = Measured.snapshot(NUMBERS, {"finished": finished, "waits": waits, "accepted_per_position": [2, 1]})
    waits.observe(0.5)
    finished["stop"] = 5
    assert (stats.waits.counts, stats.waits.total, stats.finished) == ([0, 0, 0, 0], 0, {"stop": 1})
    assert stats.accepted_per_position == (2, 1)
    for wrong in ({"num_runing": 1}, {"steps": "many"}, {"waits": [[1, 2], [0]]}):
        with pytest.raises(msgspec.ValidationError):
            Measured.snapshot(NUMBERS, wrong)
    with pytest.raises(msgspec.ValidationError, match="missing"):
        EngineStats.snapshot({"steps": 1})


class FakeSocket:
    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, data: bytes) -> None:
        self.sent.append(Reader(MeasuredPieces).read(data))


class MeasuringEngine:
    """An engine that observes a value in each step."""

    has_work = False

    def __init__(self) -> None:
        self.waits = Histogram((0.25, 1, 8))

    def stats(self) -> Measured:
        return Measured.snapshot(NUMBERS, {"waits": self.waits})


def test_a_histogram_goes_to_another_process_whenever_it_has_changed() -> None:
    socket, engine = FakeSocket(), MeasuringEngine()
    outbox = Outbox(socket)  # type: ignore[arg-type]
    for value in (None, 0.5, None, 9.0):
        if value is not None:
            engine.waits.observe(value)
        assert outbox.flush(engine) == []  # type: ignore[arg-type]
    assert [each.stats.waits for each in socket.sent] == [
        Histogram((0.25, 1, 8)), Histogram((0.25, 1, 8), [0, 1, 0, 0], 0.5), Histogram((0.25, 1, 8), [0, 1, 0, 1], 9.5),
    ]  # fmt: skip
    assert combined([each.stats for each in socket.sent]).waits.counts == [0, 2, 0, 1]


def test_a_histogram_whose_counts_do_not_fit_its_bounds_is_refused() -> None:
    waits = Histogram((0.25, 1, 8))
    message = Pieces([], Measured.snapshot(NUMBERS, {"waits": waits}))
    assert Reader(MeasuredPieces).read(encode(message)).stats == message.stats
    assert isinstance(message.stats, Measured)
    message.stats.waits.counts.pop()
    with pytest.raises(MalformedMessageError, match="3 counts of a histogram with 3 bounds"):
        Reader(MeasuredPieces).read(encode(message))
    with pytest.raises(MalformedMessageError, match="waits"):  # a process of another version
        Reader(FromChild).read(encode(message))
