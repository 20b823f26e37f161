# SPDX-License-Identifier: MIT
"""Adapters in steps: logits as of merged weights, answers as each has them alone, whatever else runs."""

from __future__ import annotations

import dataclasses
import random
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from candle_vllm.core import EngineConfig, SamplingParams
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.devices import CPU
from candle_vllm.core.engine.adapters.adapter_loading import adapter_packer
from candle_vllm.core.engine.build import build_engine
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.step.batch import BatchBuilder
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.sequence import Run, RunState
from candle_vllm.core.engine.step.sequence import Sequence as Tokens
from candle_vllm.core.kernels.lora import Delta, FittedAdapter, PackedAdapter
from candle_vllm.core.kernels.lora.reference import decoded, quantised
from candle_vllm.core.kernels.plain_linear import pack
from candle_vllm.core.layers.adapters import linears_in, number_places
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.layers.parameters import SHAPES
from candle_vllm.core.loading.cache_specs import states
from candle_vllm.core.loading.weights import layer_at
from candle_vllm.core.quantization.plain import read_plain
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from packages.core.tests.kernels.lora_field import fitted, low_rank, stored
from packages.core.tests.kernels.plain_reference import unpack
from packages.core.tests.toy_gguf import write_toy_gguf

BLOCK = 16
Adapters = tuple[tuple[PackedAdapter, float], ...]


class Served:
    """A model with adapters, its engine, and logits of texts in one step; some adapters may be in its weights."""

    def __init__(self, path: Path, within: Sequence[tuple[FittedAdapter, float]] = (), **settings: Any) -> None:
        given = {"threads": 2, "max_num_seqs": 32, "max_num_batched_tokens": 256, "max_model_len": 128}
        given |= {"max_lora_rank": 16, **settings}
        config = EngineConfig(model=str(path), enable_lora=True, block_size=BLOCK, **given)
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
            if states(self.loaded.config.cache_specs):
                places = [RunState(slot, slot if first else -1) for slot in range(len(runs))]
                runs = [msgspec.structs.replace(run, state=place) for run, place in zip(runs, places)]
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
    settings: dict[str, Any] = {"op_by_op": True, "dtype": "f32"} if eager else {}
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


def in_8_bits(adapter: FittedAdapter) -> FittedAdapter:
    """The numbers that whole ones of 8 bits stand for."""
    deltas: dict[str, dict[str, Delta]] = {}
    for path, of in adapter.deltas.items():
        for name, delta in of.items():
            a, b = delta.a.load("F32"), delta.b.load("F32")
            if path == "embed":
                bits = read_plain(b.view(np.uint8), "F32", b.shape, "BF16")
                a, b = decoded(*quantised(a.T, 1)).T, read_plain(bits.view(np.uint8), "BF16", b.shape, "F32")
            else:
                a, b = decoded(*quantised(a, 4)), decoded(*quantised(b, 1))
            deltas.setdefault(path, {})[name] = dataclasses.replace(delta, a=stored(a), b=stored(b))
    return fitted(deltas)


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize("eager", [False, True], ids=["recorded", "op by op"])
def test_logits_in_8_bits_are_those_of_merged_whole_numbers(folder: Path, tmp_path: Path, eager: bool) -> None:
    """Of products, tables and experts; and they are within two hundredths of those of the file's numbers."""
    from packages.core.tests.models.tiny import write_tiny

    settings: dict[str, Any] = {"op_by_op": True, "dtype": "f32"} if eager else {}
    near = 1e-4 if eager else 2e-3  # a cache in bfloat16 rounds what is near otherwise
    made = write_tiny(tmp_path / "moe", "qwen2_moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=40,
                      shared_expert_intermediate_size=48, decoder_sparse_step=1)  # fmt: skip
    for model in (folder, made):
        with Served(model, lora_dtype="int8", **settings) as ours:
            adapters = [random_adapter(ours, seed, rank, tables=model is folder) for seed, rank in ((1, 8), (2, 5))]
            packed = [ours.pack(one) for one in adapters]
            found = ours.logits(TEXTS, [((packed[0], 1.0),), (), ((packed[0], 0.5), (packed[1], 1.5))])
            assert eager or (found[1] == ours.logits(TEXTS, [()] * 3)[1]).all()
        for text, of, logits in zip(TEXTS, ([(0, 1.0)], [], [(0, 0.5), (1, 1.5)]), found):
            with Served(model, [(in_8_bits(adapters[at]), scale) for at, scale in of], **settings) as whole:
                assert apart(logits, whole.logits([text], [()])[0]) < near
            if len(of) < 2:
                continue
            with Served(model, [(adapters[at], scale) for at, scale in of], **settings) as whole:
                assert apart(logits, whole.logits([text], [()])[0]) < 2e-2


def test_dora_whole_matrices_and_rows_of_tables(served: Served, folder: Path) -> None:
    generator = np.random.default_rng(3)
    deltas = {path: dict(of) for path, of in random_adapter(served, 3, 6).deltas.items()}
    for of in deltas.values():
        for name, delta in of.items():
            rows = delta.b.shape[0]
            scale, bias = generator.uniform(0.7, 1.3, rows), generator.standard_normal(rows) / 8
            if not name.startswith(("gate", "up")) and "down" not in name:
                of[name] = dataclasses.replace(
                    delta,
                    column_scale=scale.astype(np.float32),
                    bias=bias.astype(np.float32) if rows in (64, 32) else None,
                )
    vocabulary, size = served.loaded.config.vocab_size, 64
    whole = generator.standard_normal((vocabulary, size)) * 3 / 8
    ids = np.array([44, 41, 101, 8])
    for path in list(deltas):
        if path.endswith(("gate_up", "down")):
            deltas[path] = {n: dataclasses.replace(d, column_scale=None, bias=None) for n, d in deltas[path].items()}
    deltas["head"] = {"": Delta(full=stored(whole))}
    deltas["embed"] = {"": Delta(rows=(ids, generator.standard_normal((4, size)).astype(np.float32)))}
    adapter, plain = fitted(deltas), random_adapter(served, 4, 8)
    ours = [served.pack(adapter), served.pack(plain)]
    assert ours[0].apart
    assert not ours[1].apart
    found = served.logits(TEXTS, [((ours[0], 1.0),), ((ours[1], 1.0),), ((ours[0], 0.5), (ours[1], 1.0))])
    for text, of, logits in zip(TEXTS, ([(adapter, 1.0)], [(plain, 1.0)], [(adapter, 0.5), (plain, 1.0)]), found):
        with Served(folder, of) as merged:
            (wanted,) = merged.logits([text], [()])
        assert apart(logits, wanted) < 1e-4
    trained = fitted({"head": {"": Delta(rows=(ids, generator.standard_normal((4, size)).astype(np.float32)))}})
    (found,) = served.logits(TEXTS[:1], [((served.pack(trained), 1.0),)])
    with Served(folder, [(trained, 1.0)]) as merged:
        assert apart(found, merged.logits(TEXTS[:1], [()])[0]) < 1e-4


PARAMS: tuple[Mapping[str, Any], ...] = (
    {},
    {"temperature": 0.9, "seed": 5},
    {"logprobs": 2},
    {"repetition_penalty": 1.2},
)


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_each_of_32_sequences_over_16_adapters_answers_as_alone(served: Served, folder: Path, dtype: str) -> None:
    with nullcontext(served) if dtype == "auto" else Served(folder, lora_dtype=dtype) as ours:
        check_that_each_answers_as_alone(ours)


def check_that_each_answers_as_alone(served: Served) -> None:
    generator = random.Random(1)
    adapters = [served.pack(random_adapter(served, seed, seed, tables=seed % 4 == 0)) for seed in range(1, 17)]
    asked = []
    for number in range(32):
        prompt = [generator.randrange(256) for _ in range(generator.randrange(1, 60))]
        of = tuple((adapter, generator.choice((1.0, 0.5))) for adapter in generator.sample(adapters, number % 3))
        asked.append((prompt, of, PARAMS[number % 4]))
    together = served.answers(asked)
    served.engine.reset_prefix_cache()
    assert together == [served.answers([one])[0] for one in asked]
    bare = served.answers([(prompt, (), params) for prompt, _, params in asked])
    assert sum(answer != plain for answer, plain in zip(together, bare)) > 15
    assert [a for a, one in zip(together, asked) if not one[1]] == [a for a, one in zip(bare, asked) if not one[1]]


def test_an_adapter_that_adds_nothing_leaves_the_answers(served: Served) -> None:
    adapter = random_adapter(served, 9, 8, tables=True)
    nothing = fitted(
        {
            path: {name: dataclasses.replace(d, b=stored(np.zeros(d.b.shape))) for name, d in of.items()}
            for path, of in adapter.deltas.items()
        }
    )
    found = served.logits(TEXTS, [((served.pack(nothing), 1.0),)] * 3)
    for ours, base in zip(found, served.logits(TEXTS, [()] * 3)):
        assert (ours == base).all()


def test_halves_of_an_adapter_make_the_whole(served: Served) -> None:
    whole = random_adapter(served, 6, 12)
    halves = [
        fitted(
            {
                path: {
                    name: dataclasses.replace(d, a=stored(d.a.load()[part]), b=stored(d.b.load()[:, part]))
                    for name, d in of.items()
                }
                for path, of in whole.deltas.items()
            }
        )
        for part in (slice(0, 5), slice(5, 12))
    ]
    (found,) = served.logits(TEXTS[:1], [tuple((served.pack(half), 1.0) for half in halves)])
    (wanted,) = served.logits(TEXTS[:1], [((served.pack(whole), 1.0),)])
    # Sums in another order differ in their last bits, and a key or a value may then be rounded to the other bfloat16.
    assert apart(found, wanted) < 1e-4
    (half,) = served.logits(TEXTS[:1], [((served.pack(halves[0]), 1.0),)])
    assert apart(half, wanted) > 1e-2


def test_cached_blocks_belong_to_their_adapters(served: Served) -> None:
    """An answer does not begin with what another adapter made of the same prompt; the same one's blocks are found."""
    first, second = (served.pack(random_adapter(served, seed, 8)) for seed in (11, 12))
    prompt = list(range(60, 110))
    served.engine.reset_prefix_cache()
    cold = served.answers([(prompt, ((second, 1.0),), {})])
    served.engine.reset_prefix_cache()
    hits = served.engine.stats().cached_prompt_tokens
    served.answers([(prompt, ((first, 1.0),), {})])
    served.answers([(prompt, (), {})])
    assert served.answers([(prompt, ((second, 1.0),), {})]) == cold
    served.answers([(prompt, ((second, 0.5),), {})])
    assert served.engine.stats().cached_prompt_tokens == hits
    assert served.answers([(prompt, ((second, 1.0),), {})]) == cold
    assert served.engine.stats().cached_prompt_tokens == hits + 48


def test_an_activated_adapter_acts_from_its_words_on(served: Served) -> None:
    """Rows before the last invocation are the model's own, and so are their cached blocks."""
    fit = random_adapter(served, 13, 8)
    activated = served.pack(dataclasses.replace(fit, alora=(5, 6)))
    text = [*range(60, 80), 5, 6, *range(80, 95), 5, 6, 7, 8, 9]
    (found,) = served.logits([text], [((activated, 1.0),)])
    (base,) = served.logits([text], [()])
    (whole,) = served.logits([text], [((served.pack(fit), 1.0),)])
    assert (found[:37] == base[:37]).all()
    assert (found[37:] != base[37:]).any()
    assert (found[37:] != whole[37:]).any()
    (later,) = served.logits([text], [((activated, 1.0),)], start=30)
    assert (later == found[30:]).all()
    served.engine.reset_prefix_cache()
    cold = served.answers([(text, ((activated, 1.0),), {})])
    served.engine.reset_prefix_cache()
    hits = served.engine.stats().cached_prompt_tokens
    served.answers([(text, (), {})])
    assert served.answers([(text, ((activated, 1.0),), {})]) == cold
    assert served.engine.stats().cached_prompt_tokens == hits + 32
    (never,) = served.logits([[1, 2, 3]], [((activated, 1.0),)])
    assert (never == served.logits([[1, 2, 3]], [()])[0]).all()


def test_adapters_of_experts(tmp_path: Path) -> None:
    from packages.core.tests.models.tiny import write_tiny

    made = write_tiny(tmp_path / "moe", "qwen2_moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=40,
                      shared_expert_intermediate_size=48, decoder_sparse_step=1)  # fmt: skip
    for settings in ({}, {"op_by_op": True, "dtype": "f32"}):
        with Served(made, **settings) as ours:
            adapters = [random_adapter(ours, seed, rank) for seed, rank in ((1, 4), (2, 10))]
            packed = [ours.pack(one) for one in adapters]
            found = ours.logits(TEXTS, [((packed[0], 1.0),), (), ((packed[0], 0.5), (packed[1], 1.5))])
        of_each = ([(adapters[0], 1.0)], [], [(adapters[0], 0.5), (adapters[1], 1.5)])
        for text, of, logits in zip(TEXTS, of_each, found):
            with Served(made, of, **settings) as whole:
                assert apart(logits, whole.logits([text], [()])[0]) < 1e-4


@pytest.mark.one_of_each(1)
@pytest.mark.parametrize("settings", [{}, {"lora_dtype": "bf16"}], ids=str)
def test_quantised_models_and_tables_with_a_scale(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The decoded model with the adapter in it, in fp32, is what they come near to."""
    path = write_toy_gguf(tmp_path / "toy.gguf", toy_config(), quantization="Q8_0")
    with Served(path, **settings) as ours:
        adapter = random_adapter(ours, 1, 8, tables=True)
        assert ours.pack(adapter).layout.dtype == ("BF16" if settings else "I8")
        found = ours.logits(TEXTS, [((ours.pack(adapter), 1.0),)] * 3)
        base = ours.logits(TEXTS, [()] * 3)
    with Served(path, [(adapter, 1.0)], op_by_op=True, dtype="f32") as whole:
        wanted = whole.logits(TEXTS, [()] * 3)
    with Served(path, op_by_op=True, dtype="f32") as bare:
        wanted_base = bare.logits(TEXTS, [()] * 3)
    for ours, theirs, plain, plain_theirs in zip(found, wanted, base, wanted_base):
        assert apart(ours, theirs) < max(2e-2, 2 * apart(plain, plain_theirs))
        assert apart(plain, theirs) > 0.1


def test_preempted_sequences_go_on_with_their_adapters(folder: Path) -> None:
    with Served(folder, max_num_seqs=8, kv_cache_memory=24 * BLOCK * 2 * 2 * 32 * 2) as ours:
        adapters = [ours.pack(random_adapter(ours, seed, 8)) for seed in range(3)]
        asked = [([*range(9 * n, 9 * n + 40)], ((adapters[n % 3], 1.0),), {"max_tokens": 40}) for n in range(6)]
        together = ours.answers(asked)
        assert ours.engine.stats().preemptions > 0
        assert together == [ours.answers([one])[0] for one in asked]


def test_layers_of_another_package_have_sites() -> None:
    class Block:
        def __init__(self, model: Model) -> None:
            self.model, self.up = model, Linear(4, 8, SHAPES)

        def __call__(self, x: Any) -> Any:
            return self.up(x)

    class Model:
        def __init__(self) -> None:
            self.layers = [Block(self)]

        def __call__(self, x: Any) -> Any:
            return self.layers[0](x)

    model = Model()
    assert list(number_places(model)) == ["layers.0.up"]
    assert list(linears_in(model.layers)) == [model.layers[0].up]
