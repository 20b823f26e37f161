"""Adapters in steps: logits as of merged weights, answers as each has them alone, whatever else runs."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from lora_field import fitted, low_rank

from candle_vllm.core import EngineConfig, SamplingParams
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.devices import CPU
from candle_vllm.core.engine.batch import BatchBuilder
from candle_vllm.core.engine.build import adapter_packer, build_engine
from candle_vllm.core.engine.engine import Engine
from candle_vllm.core.engine.request import GenerationRequest
from candle_vllm.core.engine.sequence import Run
from candle_vllm.core.engine.sequence import Sequence as Tokens
from candle_vllm.core.kernels.lora import Delta, FittedAdapter, PackedAdapter
from candle_vllm.core.kernels.plain_linear import pack, unpack
from candle_vllm.core.layers.adapters import number_places
from candle_vllm.core.loading.weights import layer_at
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model

BLOCK = 16
Adapters = tuple[tuple[PackedAdapter, float], ...]


class Served:
    """A model with adapters, its engine, and logits of texts in one step; some adapters may be in its weights."""

    def __init__(self, path: Path, within: Sequence[tuple[FittedAdapter, float]] = (), **settings: Any) -> None:
        given = {"threads": 2, "max_num_seqs": 32, "max_num_batched_tokens": 256, "max_model_len": 128}
        config = EngineConfig(model=str(path), enable_lora=True, block_size=BLOCK, **given | settings)
        self.loaded: LoadedModel = load_model(config, CPU, lambda done, whole: None)
        merge(self.loaded, within)
        self.engine: Engine = build_engine(config, self.loaded)
        self.pack = adapter_packer(config, self.loaded, self.engine.runner)
        self.places = number_places(self.loaded.decoder)
        self._asked = 0

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def logits(self, texts: Sequence[Sequence[int]], adapters: Sequence[Adapters], start: int = 0) -> list[np.ndarray]:
        """[len(text) - start, V] of each text; the tokens before `start` in a step of their own."""
        runner, sequences = self.engine.runner, []
        for number, (text, of) in enumerate(zip(texts, adapters)):
            made = Tokens(request(str(number), text), 0, number)
            made.block_table = array("i", range(8 * number, 8 * number + 8))
            made.adapters = of
            sequences.append(made)
        builder = BatchBuilder(BLOCK, runner.step_memory)
        for first, last in ((0, start), (start, None)) if start else ((0, None),):
            runs = [Run.next(made, (last or len(made.tokens)) - first) for made in sequences]
            batch = builder.build(runs)
            runner.forward(batch, ())
            for made, run in zip(sequences, runs):
                made.num_uncomputed_tokens -= run.count
        rows = np.arange(batch.query_start[-1])
        scores = [torch.as_tensor(runner.score(rows[at : at + 64])).numpy().copy() for at in range(0, len(rows), 64)]
        return np.split(np.concatenate(scores), batch.query_start[1:-1])

    def answers(self, asked: Sequence[tuple[Sequence[int], Adapters, Mapping[str, Any]]]) -> list[list[int]]:
        """What is generated for prompts with adapters, all at once."""
        names = []
        for prompt, adapters, params in asked:
            names.append(f"r{self._asked}")
            self._asked += 1
            prepared = self.engine.prepare(request(names[-1], prompt, **params))
            for live in prepared:
                live.sequence.adapters = adapters
            self.engine.add(prepared)
        found: dict[str, list[int]] = {name: [] for name in names}
        while self.engine.has_work:
            for piece in self.engine.step():
                assert piece.error is None
                found[piece.request_id] += piece.token_ids
        return list(found.values())


def request(name: str, prompt: Sequence[int], **params: Any) -> GenerationRequest:
    given = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **params}
    return GenerationRequest(request_id=name, prompt_token_ids=list(prompt), params=SamplingParams(**given))


def random_adapter(
    served: Served, seed: int, rank: int, *, tables: bool = False, only: str = "", size: float = 1.0, **given: Any
) -> FittedAdapter:
    """Of all matrices, but for tables unless they are asked for, or of those whose path has `only`."""
    generator, deltas = np.random.default_rng(seed), {}
    for path, places in served.places.items():
        if only not in path or (path in ("embed", "head") and not tables):
            continue
        for place in places:
            for name, (_, begin, end) in place.parts.items():
                made = low_rank(generator, end - begin, place.columns, rank, scale=0.3 * size, **given)
                deltas.setdefault(path, {})[name] = made
    return fitted(deltas)


def merge(loaded: LoadedModel, adapters: Sequence[tuple[FittedAdapter, float]]) -> None:
    """Puts adapters into the weights of a model, which are plain float32 numbers."""
    decoder = loaded.decoder
    places = number_places(decoder)
    for adapter, weight in adapters:
        for path, deltas in adapter.deltas.items():
            layer = layer_at(decoder, path) if path != "head" or decoder.head is not None else decoder.embed
            linears = [getattr(layer, "table", None) or getattr(layer, "scores", None) or layer]
            if not hasattr(linears[0], "pieces"):
                linears = [layer.gate_up, layer.down]
            for name, delta in deltas.items():
                linear, place = next((m, p) for m, p in zip(linears, places[path]) if name in p.parts)
                expert, begin, end = place.parts[name]
                if loaded.placement.recorded:
                    numbers = change(unpack(linear.pieces[name]), delta, weight)
                    linear.pieces[name] = pack(numbers.view(np.uint8).reshape(-1), "F32", *numbers.shape)
                    linear.__dict__.pop("matrices", None)
                else:
                    (matrix,) = linear.matrices
                    height = matrix.rows // max(1, place.experts)
                    target = matrix.data[expert * height + begin : expert * height + end]
                    target.copy_(torch.from_numpy(change(target.numpy(), delta, weight)))
                if delta.bias is not None:
                    bias = linear.bias[expert] if place.experts else linear.bias
                    bias[begin:end] += weight * delta.bias if loaded.placement.recorded else torch.tensor(delta.bias)


def change(own: np.ndarray, delta: Delta, weight: float) -> np.ndarray:
    """A matrix with what an adapter does to it."""
    new = own.astype(np.float64)
    if delta.a is not None and delta.b is not None:
        new += delta.scale * delta.b.load("F64") @ delta.a.load("F64")
    if delta.column_scale is not None:
        new *= delta.column_scale[:, None]
    if delta.full is not None:
        new = delta.full.load("F64")
    if delta.rows is not None:
        new[delta.rows[0]] = delta.rows[1]
    return (own + weight * (new - own)).astype(np.float32)


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """RMS of the difference, by the RMS of what is wanted."""
    return float(np.sqrt(np.mean((found - wanted) ** 2)) / np.sqrt(np.mean(wanted**2)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("toy") / "f32", toy_config(attention_bias=True))


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with Served(folder) as made:
        yield made


TEXTS = [list(range(40, 70)), list(range(100, 117)), [7, 8, 9]]


@pytest.mark.parametrize("eager", [False, True], ids=["recorded", "op by op"])
def test_logits_are_those_of_merged_weights(served: Served, folder: Path, eager: bool) -> None:
    settings: dict[str, Any] = {"enforce_eager": True, "dtype": "f32"} if eager else {}
    first, second = (random_adapter(served, seed, rank, tables=True) for seed, rank in ((1, 8), (2, 5)))
    with Served(folder, **settings) if eager else nullcontext(served) as ours:
        packed = [ours.pack(one) for one in (first, second)]
        found = ours.logits(TEXTS, [((packed[0], 1.0),), (), ((packed[0], 0.5), (packed[1], 1.5))])
        assert (found[1] == ours.logits(TEXTS, [()] * 3)[1]).all()
    of_each = ([(first, 1.0)], [], [(first, 0.5), (second, 1.5)])
    for text, of, logits in zip(TEXTS, of_each, found):
        with Served(folder, of, **settings) as whole:
            (wanted,) = whole.logits([text], [()])
        print(apart(logits, wanted))
        assert apart(logits, wanted) < 1e-4
