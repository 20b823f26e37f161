# SPDX-License-Identifier: MIT
"""Tables of names: layers, experts, alternatives, and everything wrong named at once."""

from __future__ import annotations

from contextvars import Context
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from candle_vllm.core import threads
from candle_vllm.core.errors import WeightsError
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import Placement, TensorParameter
from candle_vllm.core.loading.safetensors import open_safetensors
from candle_vllm.core.loading.views import row_part
from candle_vllm.core.loading.weights import Seen, WeightName, load_weights
from candle_vllm.core.quantization.tensors import StoredTensor
from candle_vllm.core.threads import loading_threads, physical_cores

CPU = Placement(torch.device("cpu"), "F32")


@dataclass(frozen=True)
class Counts:
    num_layers: int = 2
    num_experts: int = 3


class Layer:
    def __init__(self) -> None:
        self.experts = [Linear(4, {"gate": 2, "up": 2}, CPU) for _ in range(3)]


class Model:
    def __init__(self) -> None:
        self.layers = [Layer(), Layer()]
        self.head: Linear | None = None


TABLE = [
    WeightName(
        f"layers.{{i}}.experts.{{e}}:{part}.weight",
        (f"l.{{i}}.{{e}}.{part}", Seen("l.{i}.fused", row_part(index, 2))),
        None,
    )
    for index, part in enumerate(("gate", "up"))
]
TABLE.append(WeightName("head:weight", "head", None))


def loaded(folder: Path, tensors: dict[str, torch.Tensor]) -> Model:
    save_file(tensors, folder / "model.safetensors")
    model = Model()
    with open_safetensors(folder) as checkpoint:
        load_weights(model, TABLE, checkpoint, Counts(), ignored=["buffer.*"])
    return model


def test_how_many_threads_there_are_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's files say it, and a model has hundreds of tensors."""
    asked = []
    monkeypatch.setattr(threads, "cpu_quota", lambda: asked.append(1))

    class Asks(TensorParameter):
        def fill(self, stored: StoredTensor) -> str | None:
            assert loading_threads() == physical_cores()
            return super().fill(stored)

    class Plain:
        def __init__(self) -> None:
            self.places = {str(number): Asks(torch.empty(2, 2)) for number in range(8)}

        def parameters(self) -> dict[str, Asks]:
            return self.places

    save_file({str(number): torch.ones(2, 2) for number in range(8)}, tmp_path / "model.safetensors")
    model = SimpleNamespace(all=Plain())
    table = [WeightName(f"all:{number}", str(number), None) for number in range(8)]
    with open_safetensors(tmp_path) as checkpoint:
        Context().run(load_weights, model, table, checkpoint, Counts())
    assert len(asked) == 1


def apart() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"l.{i}.{e}.{part}": torch.randn(2, 4, generator=generator)
        for i in range(2) for e in range(3) for part in ("gate", "up")
    }  # fmt: skip


def test_experts_apart_and_fused_are_the_same(tmp_path: Path) -> None:
    single = apart()
    fused = {
        f"l.{i}.fused": torch.stack([torch.cat([single[f"l.{i}.{e}.gate"], single[f"l.{i}.{e}.up"]]) for e in range(3)])
        for i in range(2)
    }
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, two = loaded(tmp_path / "a", single), loaded(tmp_path / "b", fused | {"buffer.x": torch.ones(1)})
    for i in range(2):
        for e in range(3):
            (matrix,), (other,) = one.layers[i].experts[e].matrices, two.layers[i].experts[e].matrices
            assert torch.equal(matrix.data, torch.cat([single[f"l.{i}.{e}.gate"], single[f"l.{i}.{e}.up"]]))
            assert torch.equal(matrix.data, other.data)


def test_everything_wrong_is_named_at_once(tmp_path: Path) -> None:
    tensors = apart()
    del tensors["l.0.1.up"], tensors["l.1.2.gate"]
    tensors["l.1.0.up"] = torch.ones(3, 4)
    tensors["l.0.0.gate"] = torch.ones(2, 5)
    tensors["l.2.0.gate"], tensors["extra"] = torch.ones(1), torch.ones(1)
    with pytest.raises(WeightsError) as caught:
        loaded(tmp_path, tensors)
    for part in (
        "missing tensors (2): l.1.2.gate, l.0.1.up",
        "unexpected tensors (2): extra, l.2.0.gate",
        "tensor l.0.0.gate has shape [2, 5]; the model's config asks for [2, 4]",
        "tensor l.1.0.up has shape [3, 4]; the model's config asks for [2, 4]",
    ):
        assert part in str(caught.value)


def test_a_fused_tensor_of_fewer_experts_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"l\.0\.fused has shape \[2, 4, 4\]; rows 2 to 2 are needed"):
        loaded(tmp_path, {f"l.{i}.fused": torch.ones(2, 4, 4) for i in range(2)})
