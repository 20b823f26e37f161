# SPDX-License-Identifier: MIT
"""Keys and values in 8 and 4 bits: an answer has the bits that it has alone, however its request is served."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from tests.common_run import few

pytest.importorskip("numba")

from candle_vllm.core import CandleVllmError, ConfigError, InferenceEngine, LoRARequest, SamplingParams
from candle_vllm.core.config import CACHE_TYPES, KvCacheDType
from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model
from candle_vllm.core.text.tokenizer import Tokenizer
from packages.core.tests.toy_adapter import write_adapter

TYPES = {
    "q8_0": {"kv_cache_dtype": "q8_0"},
    "q4_0": {"kv_cache_dtype": "q4_0"},
    "iq4_nl": {"kv_cache_dtype": "iq4_nl"},
    "q6_0": {"kv_cache_dtype": "q6_0"},
    "q5_1": {"kv_cache_dtype": "q5_1"},
    "q8_0,q4_0": {"key_cache_dtype": "q8_0", "value_cache_dtype": "q4_0"},
    "q8_0,q5_1": {"key_cache_dtype": "q8_0", "value_cache_dtype": "q5_1"},
}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2)
SEEDED = SamplingParams(temperature=0.9, seed=7, max_tokens=24, ignore_eos=True)
_RNG = random.Random(3)
SHARED = _RNG.randbytes(64)
PROMPTS = [list(SHARED + _RNG.randbytes(length)) for length in (90, 7, 33)]
PROJECTIONS = {
    f"model.layers.{n}.self_attn.{name}_proj": (256 if name == "q" else 128, 64) for n in (0, 1) for name in "qk"
}


def test_every_type_has_a_row_and_what_stores_it() -> None:
    assert tuple(CACHE_TYPES) == get_args(KvCacheDType)
    for name, kind in CACHE_TYPES.items():
        form = "iq{}_nl" if kind.levels else "q{}_{:d}"
        assert (kind.bits, kind.minima) == (16, False) or name == form.format(kind.bits, kind.minima)
        assert not kind.element or getattr(torch, kind.element).itemsize == 1, name
    others = [other for kind in CACHE_TYPES.values() for other in kind.names]
    assert len({*others, *CACHE_TYPES}) == len(others) + len(CACHE_TYPES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with heads of two blocks, whose queries and keys are large enough to tell positions apart."""
    return write_toy_model(tmp_path_factory.mktemp("toy") / "toy", toy_config(head_dim=64))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> LoRARequest:
    return LoRARequest("a", 1, str(write_adapter(tmp_path_factory.mktemp("a") / "a", PROJECTIONS, size=0.5)))


def opened(folder: Path, **settings: Any) -> InferenceEngine:
    given = {"threads": 2, "max_model_len": 256, "block_size": 16, "max_num_seqs": 4, "enable_prefix_caching": False}
    return InferenceEngine(folder, **given | settings)


def answers(engine: InferenceEngine, prompts: list[list[int]], **how: Any) -> list[Any]:
    """Tokens and log-probabilities of greedy and of seeded answers to all prompts, in one call."""
    asked = [(list(prompt), params) for prompt in prompts for params in (GREEDY, SEEDED)]
    given = [{"prompt_token_ids": prompt} for prompt, _ in asked]
    found = engine.generate(given, [params for _, params in asked], use_tqdm=False, **how)
    return [(output.token_ids, output.outputs[0].logprobs) for output in found]


@pytest.fixture(scope="module", params=few(TYPES, "q8_0", "q5_1"))
def types(request: pytest.FixtureRequest) -> dict[str, str]:
    return TYPES[request.param]


@pytest.fixture(scope="module")
def alone(folder: Path, adapter: LoRARequest, types: dict[str, str]) -> Iterator[dict[str, Any]]:
    """What requests of each kind give one after the other, on one thread, without guesses, their prompts uncut."""
    none = {"method": "none"}
    with opened(
        folder, **types, threads=1, max_num_seqs=1, speculative_config=none, enable_lora=True
    ) as engine:  # fmt: skip
        yield {
            "plain": [each for prompt in PROMPTS for each in answers(engine, [prompt])],
            "adapted": [each for prompt in PROMPTS for each in answers(engine, [prompt], lora_request=adapter)],
            "vectors": [engine.embed({"prompt_token_ids": prompt}, use_tqdm=False)[0].embedding for prompt in PROMPTS],
        }


def test_batched_cut_and_with_adapters(
    folder: Path, adapter: LoRARequest, types: dict[str, str], alone: dict[str, Any]
) -> None:
    """In one step with others, prompts in chunks of 7 tokens, guesses and adapters beside."""
    with opened(folder, **types, max_num_batched_tokens=8, enable_lora=True) as engine:
        assert answers(engine, PROMPTS) == alone["plain"]
        assert answers(engine, PROMPTS, lora_request=adapter) == alone["adapted"]
        assert alone["adapted"] != alone["plain"]
        vectors = engine.embed([{"prompt_token_ids": prompt} for prompt in PROMPTS], use_tqdm=False)
        assert all(np.array_equal(each.embedding, wanted) for each, wanted in zip(vectors, alone["vectors"]))


def test_in_blocks_that_are_longer_than_a_sequence_of_the_fit(
    folder: Path, types: dict[str, str], alone: dict[str, Any]
) -> None:
    with opened(folder, **types, block_size=256) as engine:
        assert answers(engine, PROMPTS) == alone["plain"]


def test_a_vocabulary_without_the_tokens_of_the_text(folder: Path) -> None:
    """Keys are not fitted, and the model is served."""
    failure = mock.patch.object(Tokenizer, "encode", side_effect=InvalidFileError("a token is missing"))
    with failure, opened(folder, kv_cache_dtype="q8_0") as engine:
        assert answers(engine, PROMPTS[:1])


def test_from_the_prefix_cache_and_after_preemption(
    folder: Path, types: dict[str, str], alone: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Blocks that others wrote, and a cache of so few blocks that somebody has to begin again."""
    sizes = {"q8_0": 64 + 4, "q6_0": 48 + 4, "q5_1": 40 + 8, "iq4_nl": 32 + 4, "q4_0": 32 + 4}
    keys, values = (
        sizes[types.get(name) or types["kv_cache_dtype"]] for name in ("key_cache_dtype", "value_cache_dtype")
    )
    memory = 16 * 16 * 2 * 2 * (keys + values)  # of 16 blocks of 16 tokens, in two layers of two heads
    with caplog.at_level(logging.INFO), opened(
        folder, **types, kv_cache_memory=memory, enable_prefix_caching=True
    ) as engine:  # fmt: skip
        for _ in range(2):
            assert answers(engine, PROMPTS) == alone["plain"]
        cached = engine.generate([{"prompt_token_ids": PROMPTS[0]}], GREEDY, use_tqdm=False)[0].num_cached_tokens
        assert cached is not None
        assert cached >= 64
        assert engine.stats().preemptions > 0
    assert f"2 x 2 layers x 2 heads x 64 x {(keys + values) / 128:g} B" in caplog.text


def test_it_is_read_as_it_was_rounded(folder: Path, alone: dict[str, Any], types: dict[str, str]) -> None:
    """A prompt's own tokens too see each other rounded: log-probabilities are near those of bfloat16, not they."""
    with opened(folder, threads=1) as engine:
        plain = answers(engine, PROMPTS)
    near = [
        abs(position.chosen.logprob - other.chosen.logprob)
        for (_, found), (_, wanted) in zip(alone["plain"][::2], plain[::2])
        for position, other in [(found[0], wanted[0])]
        if position.chosen.token_id == other.chosen.token_id
    ]
    assert near
    assert 0 < max(near) < (0.2 if types == TYPES["q8_0"] else 0.6)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ({"head_dim": 16}, {"kv_cache_dtype": "q8_0"}, "blocks of 32 elements, and the head size of this model, 16"),
        ({"head_dim": 48}, {"value_cache_dtype": "q5_1"}, "value_cache_dtype='q5_1' stores blocks of 32 elements"),
        ({"head_dim": 32}, {"key_cache_dtype": "fp8"}, "key_cache_dtype='fp8' needs a GPU: on the CPU set 'q8_0'"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    tmp_path: Path, model: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(write_toy_model(tmp_path / "toy", toy_config(**model)), **settings)


def test_a_bias_of_keys_costs_nothing(tmp_path: Path) -> None:
    """Qwen2's bias is up to a hundred times what tells keys apart, in dimensions that rotary hardly turns."""
    folder = write_toy_model(tmp_path / "toy", toy_config("qwen2", head_dim=64, rope_theta=1e6))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("k_proj.bias")]:
        tensors[name].reshape(2, 2, 32)[:, :, 28:] = 120
    save_file(tensors, folder / "model.safetensors")
    found = {}
    scored = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    for name, settings in {"exact": {"op_by_op": True}, "q8_0": {"kv_cache_dtype": "q8_0"}, "bf16": {}}.items():
        with opened(folder, threads=1, **settings) as engine:
            given = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
            outputs = engine.generate(given, scored, use_tqdm=False)
        found[name] = np.array(
            [each.chosen.logprob for output in outputs for each in output.prompt_logprobs or () if each is not None]
        )
    off = {name: np.abs(logprobs - found["exact"]).mean() for name, logprobs in found.items()}
    assert off["q8_0"] < off["bf16"], "which rounds a key of 120 to halves"


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_in_weights_of_attention_is_found(folder: Path, tmp_path: Path, types: dict[str, str], name: str) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors[f"model.layers.0.self_attn.{name}_proj.weight"][5, 7] = np.nan
    save_file(tensors, broken / "model.safetensors")
    with opened(broken, **types) as engine, pytest.raises(CandleVllmError, match="NaN"):
        answers(engine, PROMPTS[:1])
