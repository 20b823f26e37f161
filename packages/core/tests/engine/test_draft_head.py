# SPDX-License-Identifier: MIT
"""Heads that read hidden states: they compute what they are defined to be, and answers stay what they are."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from candle_vllm.core import ConfigError, EngineConfig, InferenceEngine, ModelLoadError, SamplingParams
from candle_vllm.core.assembly.draft import load_draft
from candle_vllm.core.assembly.encoder import load_any_model
from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.config import SpeculativeConfig, draft_settings
from candle_vllm.core.devices import CPU, Device
from candle_vllm.core.engine.adapters.adapter_loading import adapter_packer
from candle_vllm.core.engine.build import build_engine
from candle_vllm.core.engine.cache.block_manager import BlockManager
from candle_vllm.core.engine.drafts.draft_head import DraftingHead
from candle_vllm.core.engine.drafts.drafting import Drafter
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.step.batch import Batch, Ints
from candle_vllm.core.engine.step.engine import Engine
from candle_vllm.core.engine.step.preparation import DecoderPreparation
from candle_vllm.core.engine.step.scheduler import Scheduler
from candle_vllm.core.layers.adapters import number_places
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from candle_vllm.core.text.tokenizer import Tokenizer
from packages.core.tests.engine.drafted import FreeTimes, SlotModel, answers, driven, requests, same_times
from packages.core.tests.engine.toy_heads import (
    NextTokens,
    Weights,
    eagle3_config,
    eagle3_fused,
    eagle3_rows,
    eagle3_weights,
    model_states,
    write_gguf_head,
    write_head,
)
from packages.core.tests.kernels.lora_field import fitted, low_rank
from packages.core.tests.models.families import (
    DEEPSEEK,
    DEEPSEEK_INDEX,
    GLM_INDEX,
    GLM_MOE,
    HY3,
    NEMOTRON_H,
    QWEN3_NEXT,
    QWEN35,
    QWEN_MOE,
    STEP,
)
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.tiny import write_tiny
from packages.core.tests.toy_gguf import write_toy_gguf

Seen = list[tuple[tuple[int, ...], tuple[int, ...], np.ndarray]]
"""Of each guess: the tokens of its text, the guesses before it, and the head's logits."""
CONFIG = toy_config()


def loaded(folder: Path, method: dict[str, Any] | None, **given: Any) -> InferenceEngine:
    """An engine that guesses all it can."""
    speculative = None if method is None else {"num_speculative_tokens": 4} | method
    chosen: dict[str, Any] = {"threads": 1, "max_model_len": 256, "block_size": 16, "speculative_config": speculative}
    engine = InferenceEngine(folder, **chosen | given)
    if method is not None:
        model = head_of(engine)
        model.times = FreeTimes()
        assert engine._engine is not None
        assert engine._engine._drafter is not None
        engine._engine._drafter.times = same_times
    return engine


def head_of(engine: InferenceEngine) -> DraftingHead:
    assert engine._engine is not None
    assert engine._engine._drafter is not None
    model = engine._engine._drafter.model
    assert isinstance(model, DraftingHead)
    return model


def watched(engine: InferenceEngine) -> Seen:
    """Where what the head says of each guess is put."""
    model, seen = head_of(engine), []
    inner = model._logits

    def logits(batch: Any, ready: Any) -> Any:
        found = inner(batch, ready)
        for each, row in zip(ready, found):
            numbers = torch.as_tensor(row).float().numpy().copy()
            seen.append((tuple(each.live.sequence.tokens), tuple(each.candidates), numbers))
        return found

    model._logits = logits  # type: ignore[method-assign]
    return seen


def apart(found: np.ndarray, wanted: torch.Tensor) -> float:
    """RMS of the difference, of that of what is wanted."""
    other = wanted.numpy()
    return float(np.sqrt(np.square(found - other).mean() / np.square(other).mean()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("toy") / "toy", CONFIG)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    words = Tokenizer.from_folder(folder)
    words.cover(272)
    return words


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[InferenceEngine]:
    with loaded(folder, None) as engine:
        yield engine


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = eagle3_config(CONFIG)
    return write_head(tmp_path_factory.mktemp("head") / "head", config, eagle3_weights(config))


# ---- what they compute -----------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "3.1": {"fc_norm": True, "norm_output": True, "norm_before_residual": True},
    "norm before fc": {"eagle_config": {"norm_before_fc": True}, "norm_before_fc": True},
}


def eagle3_reference(folder: Path, config: dict[str, Any], weights: Weights) -> Callable[[Any, Any], torch.Tensor]:
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    ids = weights["d2t"] + torch.arange(len(weights["d2t"]))

    def last(tokens: tuple[int, ...], candidates: tuple[int, ...]) -> torch.Tensor:
        states, _ = model_states(folder, list(tokens[:-1]))
        fused = eagle3_fused(config, weights, [states[layer] for layer in config["eagle_aux_hidden_state_layer_ids"]])
        given = list(tokens[1:])
        logits, back = eagle3_rows(config, weights, table, fused, given)
        for continuation in candidates:
            assert continuation in ids
            fused, given = torch.cat([fused, back[-1:]]), [*given, continuation]
            logits, back = eagle3_rows(config, weights, table, fused, given)
        return logits[-1]

    return last


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "op by op"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_eagle3_says_what_its_definition_says(folder: Path, tmp_path: Path, variant: str, eager: bool) -> None:
    config = eagle3_config(CONFIG, **VARIANTS[variant])
    weights = eagle3_weights(config)
    written = write_head(tmp_path / "head", config, weights)
    wanted = eagle3_reference(folder, config, weights)
    drafts = {"method": "eagle3", "model": str(written)}
    with loaded(folder, drafts, op_by_op=eager, max_num_batched_tokens=24, max_num_seqs=4) as engine:
        seen = watched(engine)
        asked = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
        engine.generate([list(b"a text that is longer than the room of a step"), list(b"short")], asked, use_tqdm=False)
    chosen = [seen[0], *random.Random(1).sample(seen, 5), max(seen, key=lambda each: len(each[1]))]
    assert len(chosen[-1][1]) == 3
    for tokens, candidates, row in chosen:
        assert apart(row, wanted(tokens, candidates)) < (1e-4 if eager else 2e-2)


def test_other_forms_of_a_head_are_the_same_head(folder: Path, head: Path, tmp_path: Path) -> None:
    """Speculators' form, another prefix, an embedding of its own that is the model's, and a GGUF file."""
    config, weights = json.loads((head / "config.json").read_text()), load_file(head / "model.safetensors")
    taps = config.pop("eagle_aux_hidden_state_layer_ids")
    top = ("draft_vocab_size",)
    inner = {key: value for key, value in config.items() if key not in (*top, "architectures")}
    forms = {
        "speculators": (
            {"architectures": ["Eagle3Speculator"], "transformer_layer_config": inner | {"vocab_size": 200}}
            | {"draft_vocab_size": 200}
            | {"eagle_aux_hidden_state_layer_ids": taps, "norm_before_residual": False},
            {name.replace("midlayer.", "layers.0."): tensor for name, tensor in weights.items()},
        ),
        "own embedding": (
            config | {"architectures": ["Eagle3LlamaForCausalLM"], "eagle_aux_hidden_state_layer_ids": taps},
            weights | {"embed_tokens.weight": load_file(folder / "model.safetensors")["model.embed_tokens.weight"]},
        ),
    }
    paths = [head, *(write_head(tmp_path / name, *form) for name, form in forms.items())]
    paths.append(write_gguf_head(tmp_path / "head.gguf", config, weights, taps))
    rows = []
    for path in paths:
        with loaded(folder, {"method": "eagle3", "model": str(path)}, op_by_op=True) as engine:
            seen = watched(engine)
            engine.generate([list(b"one of two")], SamplingParams(temperature=0.0, max_tokens=6), use_tqdm=False)
        rows.append([(candidates, row) for _, candidates, row in seen])
    for others in rows[1:]:
        assert [candidates for candidates, _ in others] == [candidates for candidates, _ in rows[0]]
        for (_, row), (_, first) in zip(others, rows[0]):
            np.testing.assert_allclose(row, first, rtol=1e-4, atol=1e-5)


MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Qwen3": ("qwen3", "mtp", {"head_dim": 32}),
    "Qwen3-MoE": (
        "qwen3_moe",
        "mtp",
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "GLM-4.5": ("glm4_moe", "behind", {"head_dim": 32} | GLM_MOE),
    "Hy3": ("hy_v3", "hy3", HY3),
    "DeepSeek-V3": ("deepseek_v3", "behind", DEEPSEEK),
    "DeepSeek-V3.2": ("deepseek_v32", "behind", DEEPSEEK_INDEX),
    "GLM-5": ("glm_moe_dsa", "behind", GLM_INDEX),
    "Qwen3.5": ("qwen3_5_text", "mtp", QWEN35),
    "Qwen3.5-MoE": ("qwen3_5_moe_text", "mtp", QWEN35 | QWEN_MOE),
    "Qwen3-Next": ("qwen3_next", "mtp", QWEN3_NEXT | QWEN_MOE),
}


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "op by op"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_for_further_tokens_say_what_their_definition_says(tmp_path: Path, name: str, eager: bool) -> None:
    model_type, layout, fields = MODELS[name]
    if not eager and "index_topk" in fields:  # all positions: bf16 keys change a choice among scores that are alike
        fields = fields | {"index_topk": 128}
    source = write_tiny(tmp_path / "source", model_type, **fields)
    layer = NextTokens(source, layout)
    written = layer.write(tmp_path / "model", source, **({} if layout == "mtp" else {"num_nextn_predict_layers": 1}))
    with loaded(written, {"method": "mtp"}, op_by_op=eager, max_num_batched_tokens=24, max_num_seqs=4) as engine:
        seen = watched(engine)
        asked = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
        engine.generate([list(b"a text that is longer than the room of a step"), list(b"short")], asked, use_tqdm=False)
    chosen = [seen[0], *random.Random(1).sample(seen, 3), max(seen, key=lambda each: len(each[1]))]
    assert len(chosen[-1][1]) == 3
    errors = [apart(row, layer.last(tokens, candidates)) for tokens, candidates, row in chosen]
    assert (
        max(errors) < 1e-4 if eager else np.median(errors) < 3e-2
    )  # between experts that are alike, others are chosen


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(
    ("name", "architecture"),
    [("GLM-4.5", "glm4moe"), ("Qwen3.5", "qwen35"), ("Qwen3.5-MoE", "qwen35moe"), ("Qwen3-Next", "qwen3next")],
)
def test_a_gguf_file_has_the_same_layer(tmp_path: Path, name: str, architecture: str) -> None:
    """Its embedding and head, copies of the model's, are left out where they are stored alike."""
    model_type, layout, fields = MODELS[name]
    source = write_tiny(tmp_path / "source", model_type, **fields)
    layer = NextTokens(source, layout)
    written = layer.write(tmp_path / "model", source, **({} if layout == "mtp" else {"num_nextn_predict_layers": 1}))
    gguf = export_gguf(written, tmp_path / "model.gguf", architecture)
    bytes_of = []
    for path in (written, gguf):
        with loaded(path, {"method": "mtp"}, op_by_op=True) as engine:
            seen = watched(engine)
            engine.generate([list(b"one of two")], SamplingParams(temperature=0.0, max_tokens=5), use_tqdm=False)
            assert max(apart(row, layer.last(tokens, candidates)) for tokens, candidates, row in seen) < 1e-4
            bytes_of.append(engine.model_info.weight_bytes)
        with loaded(path, None, op_by_op=True) as engine:
            bytes_of[-1] -= engine.model_info.weight_bytes
    copied = ("embed_tokens.weight", "shared_head.head.weight")
    own = sum(4 * tensor.numel() for name, tensor in layer.tensors.items() if not name.endswith(copied))
    assert bytes_of == [own, own]


def test_other_names_of_a_layer_are_the_same_layer(tmp_path: Path) -> None:
    """As models that see have it, beside the text tower; and within the model."""
    model_type, layout, fields = MODELS["Qwen3.5"]
    source = write_tiny(tmp_path / "source", model_type, **fields)
    written = NextTokens(source, layout).write(tmp_path / "model", source)
    text = json.loads((written / "config.json").read_text())
    seeing = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": {key: value for key, value in text.items() if key != "architectures"},
    }
    forms = {
        "tower": (seeing, lambda name: re.sub(r"^model\.", "model.language_model.", name)),
        "within": (text, lambda name: re.sub(r"^mtp\.", "model.mtp.", name)),
    }
    tensors, paths = load_file(written / "model.safetensors"), [written]
    for form, (config, named) in forms.items():
        paths.append(shutil.copytree(written, tmp_path / form))
        (paths[-1] / "config.json").write_text(json.dumps(config))
        save_file({named(name): tensor for name, tensor in tensors.items()}, paths[-1] / "model.safetensors")
    rows = []
    for path in paths:
        with loaded(path, {"method": "mtp"}, op_by_op=True, max_images=0) as engine:
            seen = watched(engine)
            engine.generate([list(b"one of two")], SamplingParams(temperature=0.0, max_tokens=6), use_tqdm=False)
        rows.append(seen)
    for others in rows[1:]:
        assert [each[:2] for each in others] == [each[:2] for each in rows[0]] != []
        for (*_, row), (*_, first) in zip(others, rows[0], strict=True):
            np.testing.assert_array_equal(row, first)


# ---- its cache -------------------------------------------------------------------------------------------------------


class StatesModel(SlotModel):
    """A target whose hidden states tell their position and the text up to it."""

    def run(self, batch: Batch) -> NDArray[np.float32]:
        found = super().run(batch)
        texts = [
            ([*run.sequence.tokens, *run.drafts][: run.start + place + 1])
            for run in batch.runs
            for place in range(run.count)
        ]
        self.states = np.stack([state_of(text) for text in texts])
        return found

    def hidden_rows(self, rows: Ints) -> NDArray[np.float32]:
        return self.states[rows]


def state_of(text: list[int]) -> NDArray[np.float32]:
    return np.array([len(text) - 1, zlib.crc32(np.array(text).tobytes()) % 65521], np.float32)


class SlotHead:
    """A head that keeps what each slot was given, and guesses what the target says.

    Each row has to find what its sequence has at all positions from where that begins: the model's hidden states, and
    the token behind. At the end of a block the token may be another, for the block may come of another sequence.
    """

    step_memory = None

    def __init__(self, target: SlotModel, wrong: int) -> None:
        size = len(target.slots)
        self.tokens, self.states, self.size = np.full(size, -1), np.zeros((size, 2), np.float32), target.size
        self.words, self.target, self.wrong, self.faults = target.words, target, wrong, list[str]()
        self.model: DraftingHead | None = None

    def run_on(self, batch: Batch, states: NDArray[np.float32], *, fused: bool) -> NDArray[np.float32]:
        assert self.model is not None
        self.tokens[batch.slots], self.states[batch.slots] = batch.token_ids, states
        owners = {id(tail): live for live, tail in self.model._tails.items()}
        rows: list[NDArray[np.float32]] = []
        for number, run in enumerate(batch.runs):
            tail: Any = run.sequence
            text, end = owners[id(tail)].sequence.tokens, run.start + run.count
            table = batch.block_tables[number]
            slots = [table[place // self.size] * self.size + place % self.size for place in range(end)]
            behind = self.tokens[slots].tolist()
            for place, slot in enumerate(slots):
                position = tail.begin + place
                if position > len(text) - 2:
                    continue
                if (self.states[slot] != state_of(text[: position + 1])).any():
                    self.faults.append(f"hidden states of {position} of {len(text)}")
                if behind[place] != text[position + 1] and (position + 1) % self.size:
                    self.faults.append(f"the token behind {position} of {len(text)}")
            if run.wanted:
                guessed = behind[len(text) - 1 - tail.begin :]
                rows.append(self.logits([*text, *guessed]))
                if fused != bool(guessed):
                    self.faults.append("a guess is made of hidden states of its own, the first of the model's")
        return np.stack(rows) if rows else np.empty((0, self.words), np.float32)

    def logits(self, text: list[int]) -> NDArray[np.float32]:
        self.target.wrong, before = self.wrong, self.target.wrong
        found = self.target.logits(text)
        self.target.wrong = before
        return found

    def given_back(self, rows: Ints) -> NDArray[np.float32]:
        return np.full((len(rows), 2), -1, np.float32)

    def draw_rows(self, logits: Any, controls: NDArray[np.float64]) -> Any:
        return self.target.draw_rows(logits, controls)

    def close(self) -> None:
        pass


def scripted(
    words: Tokenizer, blocks: int, size: int, budget: int, wrong: int, moods: random.Random | None
) -> tuple[Engine, Drafter, SlotHead]:
    scheduler = Scheduler(BlockManager(blocks, size), 4, budget, draft_rows=8)
    config = SpeculativeConfig(method="eagle3", model="head", num_speculative_tokens=5, prompt_lookup_min=24)
    target = StatesModel(blocks, size, words.vocab_size)
    head, both = SlotHead(target, wrong), (words.vocab_size, words.vocab_size)
    model = head.model = DraftingHead(head, target, None, config, scheduler, both, 80, budget, 0.1, both[1])
    model.times = FreeTimes(moods)
    drafter = Drafter(config, 8, model)
    drafter.times = same_times
    if moods is not None:  # what is not guessed for now and then is not read in such steps
        model.commit = lambda: _settled(model, hopeless=moods.random() < 0.2)  # type: ignore[method-assign]
    return (
        Engine(target, scheduler, DecoderPreparation(words, (258,), words.vocab_size, 80, seed=0), drafter),
        drafter,
        head,
    )


def _settled(model: DraftingHead, *, hopeless: bool) -> None:
    model.hopeless = hopeless
    DraftingHead.release(model)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from((21, 30, 90)), st.sampled_from((4, 8)), st.sampled_from((0, 3, 20)))
def test_its_cache_is_right_and_every_block_is_given_back(
    tokenizer: Tokenizer, seed: int, blocks: int, size: int, wrong: int
) -> None:
    rng = random.Random(seed)
    budget = rng.choice((12, 16, 40))
    asked = requests(rng, rng.randrange(1, 8))
    aborts = {rng.randrange(60): str(rng.randrange(8)) for _ in range(rng.choice((0, 0, 3)))}
    engine, drafter, head = scripted(tokenizer, blocks, size, budget, wrong, rng)
    found = driven(engine, asked, aborts)
    assert head.faults == []
    assert head.model is not None
    assert not head.model._owns
    assert not head.model._tails
    engine, _, _ = scripted(tokenizer, blocks, size, budget, 0, None)
    engine._drafter = None
    wanted = driven(engine, asked, {})
    for key, tokens in found.items():
        assert tokens == wanted[key][: len(tokens)]
        assert tokens == wanted[key] or key[0] in aborts.values()
    assert drafter.stats()["accepted_draft_tokens"] <= drafter.stats()["draft_tokens"]


def test_preempted_sequences_shared_beginnings_and_pauses_are_guessed_for_as_others(tokenizer: Tokenizer) -> None:
    """A head that says what the target says is never wrong, whatever became of the blocks meanwhile."""
    preempted = cached = 0
    for seed in range(4):
        rng = random.Random(seed)
        engine, drafter, head = scripted(tokenizer, 22, 4, 16, 0, random.Random(seed))
        asked = [
            GenerationRequest(
                request_id=str(number),
                prompt_token_ids=[97 + number % 2] * 9 + [98, 99, 97 + number],
                params=SamplingParams(temperature=0.0, max_tokens=rng.randrange(30, 50), ignore_eos=True),
            )
            for number in range(6)
        ]
        driven(engine, asked, {})
        assert head.faults == []
        assert drafter.stats()["draft_tokens"] == drafter.stats()["accepted_draft_tokens"] > 20
        preempted += engine.stats().preemptions
        cached += engine.stats().cached_prompt_tokens
    assert preempted > 0
    assert cached > 0


# ---- answers stay what they are --------------------------------------------------------------------------------------


def test_a_random_head_changes_no_answer(
    folder: Path, head: Path, plain: InferenceEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with loaded(folder, {"method": "eagle3", "model": str(head)}, max_num_batched_tokens=80, max_num_seqs=64) as engine:
        for seed in range(2):
            assert answers(engine, seed) == answers(plain, seed)
        stats = engine.stats()
        assert stats.draft_tokens > 3 * stats.accepted_draft_tokens > 0
        assert stats.num_free_blocks == stats.num_blocks
        model = head_of(engine)
        assert not model._owns
        assert not model._tails
        assert not model._unread
    assert "no drafts for a step" not in caplog.text


def adapted_answers(folder: Path, method: dict[str, Any] | None, *, eager: bool) -> tuple[list[list[int]], int]:
    """Answers to three prompts, of which the first and the last have an adapter of everything; and drafts that were
    tried."""
    given: dict[str, Any] = {"threads": 1, "max_model_len": 128, "block_size": 16, "op_by_op": eager}
    config = EngineConfig(model=str(folder), enable_lora=True, speculative_config=method or {"method": "none"}, **given)
    model = load_any_model(config, CPU, lambda *_: None)
    assert isinstance(model, LoadedModel)
    engine, generator = build_engine(config, model), np.random.default_rng(2)
    deltas = {
        path: {
            name: low_rank(generator, end - begin, place.columns, 4, scale=0.3)
            for place in places
            for name, (_, begin, end) in place.parts.items()
        }
        for path, places in number_places(model.decoder).items()
    }
    adapter, tokens = (
        adapter_packer(config, model, engine.runner)(fitted(deltas)),
        [list[int](), list[int](), list[int]()],
    )
    if engine._drafter is not None and engine._drafter.model is not None:
        engine._drafter.times, engine._drafter.model.times = same_times, FreeTimes()
    for number, prompt in enumerate((b"with", b"without, and longer", b"with")):
        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
        request = GenerationRequest(request_id=str(number), prompt_token_ids=list(prompt), params=params)
        prepared = engine.prepare(request)
        for live in prepared:
            live.sequence.adapters = () if number == 1 else ((adapter, 1.0),)
        engine.add(prepared)
    while engine.has_work:
        for piece in engine.step():
            tokens[int(piece.request_id)] += piece.token_ids
    tried = engine.stats().draft_tokens
    engine.close()
    return tokens, tried


@pytest.mark.parametrize(
    ("method", "eager"),
    [("eagle3", False), ("eagle3", True), ("draft_model", False)],
    ids=["compiled", "op by op", "draft model"],
)
def test_adapters_change_what_a_head_reads_and_nothing_in_it(
    folder: Path, head: Path, method: str, eager: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It has the model's embedding, which an adapter may change as it may the head and every layer."""
    plain, _ = adapted_answers(folder, None, eager=eager)
    model = head if method == "eagle3" else folder
    found, tried = adapted_answers(folder, {"method": method, "model": str(model)}, eager=eager)
    assert found == plain
    assert tried > 30
    assert found[0] == found[2] != found[1]
    assert "no drafts for a step" not in caplog.text


def write_counting(folder: Path, words: int = 48, **overrides: Any) -> Path:
    """A model that says after token t that t + 1 follows, below `words`: its layers add nothing to the embedding."""
    config = toy_config(**overrides)
    write_toy_model(folder, config)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight", "lm_head.weight")):
            tensor.zero_()
        elif tensor.dim() == 1:
            tensor.fill_(1.0)
    for token in range(words):
        weights["model.embed_tokens.weight"][token, token] = 1.0
        weights["lm_head.weight"][(token + 1) % words, token] = 1.0
    save_file(weights, folder / "model.safetensors")
    return folder


def counting_head(config: dict[str, Any], words: int = 48) -> Weights:
    """A head that is right about such a model: what it is given is the embedding of t, and it says t + 2.

    Its feed-forward layer makes the embedding of t + 1 of that of t, so that each further guess is right as well.
    """
    weights, size = eagle3_weights(config), config["hidden_size"]
    for tensor in weights.values():
        if tensor.dim() == 1 and tensor.is_floating_point():
            tensor.fill_(1.0)
        elif tensor.is_floating_point():
            tensor.zero_()
    # What goes into a layer is e_t; normed it is sqrt(E) e_t, of which silu(gate) * up makes about E * 4 sqrt(E).
    weights["fc.weight"][:, :size] = torch.eye(size)
    gate = 4.0 * size**0.5
    for token in range(words):
        weights["midlayer.mlp.gate_proj.weight"][token, token] = 4.0
        weights["midlayer.mlp.up_proj.weight"][token, token] = 1.0
        weights["midlayer.mlp.down_proj.weight"][(token + 1) % words, token] += 1.0 / (gate * size**0.5)
        weights["midlayer.mlp.down_proj.weight"][token, token] -= 1.0 / (gate * size**0.5)
        weights["lm_head.weight"][(token + 1) % words, token] = 1.0
    weights["d2t"].zero_()
    return weights


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "op by op"])
def test_a_head_that_knows_the_model_is_always_right(tmp_path: Path, eager: bool) -> None:
    folder = write_counting(tmp_path / "model")
    config = eagle3_config(CONFIG, rms_norm_eps=1e-12, draft_vocab_size=48)
    written = write_head(tmp_path / "head", config, counting_head(config))
    with loaded(folder, {"method": "eagle3", "model": str(written), "prompt_lookup_min": 24}, op_by_op=eager) as engine:
        asked = SamplingParams(temperature=0.0, max_tokens=41, ignore_eos=True)
        (answer,) = engine.generate([[5, 6, 7]], asked, use_tqdm=False)
        stats = engine.stats()
    assert answer.outputs[0].token_ids == tuple((8 + n) % 48 for n in range(41))
    assert stats.draft_tokens == stats.accepted_draft_tokens == 32  # four of five tokens behind the first
    assert stats.steps == 9  # the prompt, and eight with drafts


def test_a_heads_cache_is_planned_beside_the_models(folder: Path, head: Path, plain: InferenceEngine) -> None:
    with loaded(folder, {"method": "eagle3", "model": str(head)}) as engine:
        assert 2 * engine.model_info.kv_cache_bytes == 3 * plain.model_info.kv_cache_bytes  # three layers, not two


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "weights", "said"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, {}, "architecture .'LlamaForCausalLM'. is not an EAGLE-3 head"),
        ({"num_hidden_layers": 2}, {}, "a head of 2 layers is not implemented"),
        ({"target_hidden_size": 32}, {}, "it reads hidden states of 32 elements, and the model's have 64"),
        ({"vocab_size": 9000}, {"embed_tokens.weight": (9000, 64)}, "it knows 9000 tokens, and the model 272"),
        ({"draft_vocab_size": 150}, {}, r"d2t is I64 \[200\]; it must be 150 whole numbers|lm_head.weight has shape"),
        ({}, {"d2t": "I32"}, "d2t makes token 100000 of the head's 3, and the model has 272 tokens"),
        ({}, {"d2t": "F32"}, r"d2t is F32 \[200\]; it must be 200 whole numbers"),
        ({}, {"fc.weight": None}, "missing tensors .1.: fc.weight"),
        ({}, {"lm_head.weight": None}, "has 200 tokens and no head; the model's head has 272"),
        ({}, {"midlayer.hidden_norm.weight": (32,)}, r"hidden_norm.weight has shape \[32\]"),
        ({}, {"midlayer.extra.weight": (4,)}, "unexpected tensors .1.: midlayer.extra.weight"),
        (
            {"eagle_aux_hidden_state_layer_ids": [0, 1, 3]},
            {},
            r"is \[0, 1, 3\]; it must be 1 to 8 layers, each from 0 to 2",
        ),
        ({"eagle_aux_hidden_state_layer_ids": None}, {}, "a model of 2 layers has no usual ones"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, {}, "use_aux_hidden_state false is not implemented"),
        ({"fc_norm": True, "norm_before_fc": True}, {}, "cannot both be set"),
        ({"intermediate_size": 1 << 24}, {}, "has shape"),
    ],
)
def test_heads_of_other_models_and_broken_ones_are_refused_by_name(
    folder: Path, head: Path, tmp_path: Path, config: dict[str, Any], weights: dict[str, Any], said: str
) -> None:
    told = json.loads((head / "config.json").read_text()) | config
    stored = load_file(head / "model.safetensors")
    for name, form in weights.items():
        if form is None:
            del stored[name]
        elif isinstance(form, tuple):
            stored[name] = torch.ones(form)
        else:
            stored[name] = stored[name].to({"I32": torch.int32, "F32": torch.float32}[form])
            stored[name][3] = 100_000 - 3
    written = write_head(tmp_path / "head", told, stored)
    with pytest.raises((ConfigError, ModelLoadError), match=said) as caught:
        loaded(folder, {"method": "eagle3", "model": str(written)})
    assert "speculative_config" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "eagle3"}, "the method eagle3 needs a model: a head that was trained for the model"),
        ({"method": "medusa"}, "method must be one of none, ngram, suffix, draft_model, eagle3, mtp: heads of Medusa"),
        ({"method": ["mtp"]}, r"method must be one of .*, not \[.mtp.\]"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        EngineConfig(model="m", speculative_config=given)


@pytest.mark.parametrize("name", ["deepseek_mtp", "gemma4_mtp", "glm4_moe_mtp", "qwen3_next_mtp", "qwen3_5_mtp", "mtp"])
def test_other_names_of_the_method_are_taken(name: str) -> None:
    assert draft_settings({"method": name, "num_speculative_tokens": 1}) == SpeculativeConfig(
        method="mtp", num_speculative_tokens=1
    )


def test_models_without_such_a_layer_are_refused_by_name(folder: Path, head: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"speculative_config: .*has no multi-token prediction layer"):
        loaded(folder, {"method": "mtp"})
    gemma = write_tiny(tmp_path / "gemma", "gemma2", head_dim=32, query_pre_attn_scalar=16)
    with pytest.raises(ModelLoadError, match="multi-token prediction layers of gemma2 are not implemented"):
        loaded(gemma, {"method": "mtp"})
    kinds: dict[str, dict[str, Any]] = {"step3p5": STEP, "nemotron_h": NEMOTRON_H}
    for kind, keys in kinds.items():
        other = write_tiny(tmp_path / kind, kind, **keys)
        with pytest.raises(ModelLoadError, match=f"multi-token prediction layers of {kind} are not implemented"):
            loaded(other, {"method": "mtp"})
    with pytest.raises(ModelLoadError, match="architecture 'llama' is not an EAGLE-3 head"):
        loaded(folder, {"method": "eagle3", "model": str(write_toy_gguf(tmp_path / "toy.gguf"))})
    words = (folder / "tokenizer.json").read_text().replace("<|im_start|>", "<|turn|>")
    other = shutil.copytree(head, tmp_path / "other")
    (other / "tokenizer.json").write_text(words)
    with pytest.raises(ConfigError, match="other cannot draft for toy, because their vocabularies differ"):
        loaded(folder, {"method": "eagle3", "model": str(other)})
    with pytest.raises(ConfigError, match=r'is a head.*set "method": "eagle3"'):
        loaded(folder, {"model": str(head)})


@pytest.mark.parametrize("method", [{"method": "mtp"}, {"method": "eagle3", "model": "head"}, {"model": "small"}])
def test_nothing_with_weights_drafts_on_a_gpu(folder: Path, method: dict[str, Any]) -> None:
    loaded = load_any_model(EngineConfig(model=str(folder)), CPU, lambda *_: None)
    assert isinstance(loaded, LoadedModel)
    there = dataclasses.replace(loaded, placement=dataclasses.replace(loaded.placement, device=Device("cuda:0")))
    config = EngineConfig(model=str(folder), speculative_config=method)
    with pytest.raises(ConfigError, match="draft models and draft heads run on the CPU only") as caught:
        build_engine(config, there)
    assert caught.value.setting == "speculative_config"
    assert load_draft(config, loaded, Device("cuda:0"), lambda *_: None) is None
