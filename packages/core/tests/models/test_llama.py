# SPDX-License-Identifier: MIT
"""The Llama wiring and its flags against transformers, on small random checkpoints."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from candle_vllm.core import EngineConfig, InvalidFileError, UnsupportedModelError, WeightsError
from candle_vllm.core.assembly.model import load_model
from candle_vllm.core.engine.requests import GenerationRequest
from candle_vllm.core.engine.runners.eager_runner import EagerRunner
from candle_vllm.core.engine.step.batch import BatchBuilder
from candle_vllm.core.engine.step.sequence import Run, Sequence
from candle_vllm.core.fields import read_json
from candle_vllm.core.loading.safetensors import open_safetensors
from candle_vllm.core.models.registry import family_from_hf
from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.core.testing.toy_model import toy_config, write_toy_model

CPU = torch.device("cpu")
LENGTH, BLOCK = 150, 8


def our_logits(folder: Path, tokens: list[int], chunk: int, **settings: Any) -> torch.Tensor:
    """Logits [T, V] of every position, the prompt run in chunks over a paged cache."""
    loaded = load_model(EngineConfig(model=str(folder), op_by_op=True, **settings), CPU, lambda *_: None)
    blocks = -(-len(tokens) // BLOCK)
    runner = EagerRunner(loaded.decoder, blocks, BLOCK, CPU, torch.float32)
    sequence = Sequence(GenerationRequest(request_id="r", prompt_token_ids=tokens, params=SamplingParams()), 0, 0)
    sequence.block_table = array("i", reversed(range(blocks)))
    rows = []
    for start in range(0, len(tokens), chunk):
        sequence.num_uncomputed_tokens = len(tokens) - start
        item = Run.next(sequence, min(chunk, len(tokens) - start))
        runner.run(BatchBuilder(BLOCK).build([item]))
        rows += [runner.score(np.arange(first, min(first + 64, item.count))) for first in range(0, item.count, 64)]
    return torch.cat(rows)


def their_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def some_tokens(count: int = LENGTH) -> list[int]:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(5)).tolist()


VARIANTS: dict[str, dict[str, Any]] = {
    "llama": toy_config(),
    "tied": toy_config(tie_word_embeddings=True),
    "all heads": toy_config(num_key_value_heads=4),
    "wide heads": toy_config(head_dim=32),
    "biases": toy_config(attention_bias=True),
    "linear rope": toy_config(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama 3 rope": toy_config(
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "yarn": toy_config(
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ),
    "rope parameters": toy_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}),
    "rope scaling added to rope parameters": toy_config(
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rope_scaling={"type": "linear", "factor": 4.0}
    ),
    "mistral": toy_config("mistral", sliding_window=None),
    "mistral window": toy_config("mistral", sliding_window=16),
    "qwen2": toy_config("qwen2"),
    "qwen2 window": toy_config("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "qwen3": toy_config("qwen3", head_dim=24),
}


@pytest.mark.one_of_each(7)
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    folder, tokens = write_toy_model(tmp_path, VARIANTS[name]), some_tokens()
    theirs = their_logits(folder, tokens)
    for chunk in (LENGTH, 7):
        ours = our_logits(folder, tokens, chunk)
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4, (name, chunk)


@pytest.mark.parametrize("more", [{}, {"original_max_position_embeddings": 32}], ids=["plain", "original"])
def test_dynamic_rope_is_taken_at_the_longest_context(more: dict[str, Any], tmp_path: Path) -> None:
    """transformers stretches as a text grows, from the model's own context; at the full length both agree."""
    scaling = {"rope_type": "dynamic", "factor": 2.0, **more}
    folder = write_toy_model(tmp_path, toy_config(max_position_embeddings=64, rope_scaling=scaling))
    tokens = some_tokens(128)
    ours, theirs = our_logits(folder, tokens, 128), their_logits(folder, tokens)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


def test_saved_buffers_and_the_copy_of_a_tied_head_are_ignored(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path, toy_config(tie_word_embeddings=True))
    before = our_logits(folder, some_tokens(), LENGTH)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, folder / "model.safetensors")
    assert torch.equal(before, our_logits(folder, some_tokens(), LENGTH))


@pytest.mark.parametrize("said", [True, False, None])
@pytest.mark.parametrize("stored", ["own", "copy", "none"])
def test_the_stored_head_wins_over_the_config(
    said: bool | None, stored: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of three keys with each of three files, against the same model whose two say the same."""
    folder = write_toy_model(tmp_path / "model", toy_config(tie_word_embeddings=stored != "own"))
    wanted = our_logits(folder, some_tokens(), LENGTH)
    if stored == "copy":
        embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        _edited(folder, **{"lm_head.weight": embedding.clone()})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": said}
    (folder / "config.json").write_text(json.dumps(config))
    caplog.clear()
    assert torch.equal(our_logits(folder, some_tokens(), LENGTH), wanted)
    about = [record.getMessage() for record in caplog.records if "tie_word_embeddings" in record.getMessage()]
    wrong = {"none": "is not true, and no lm_head.weight is stored", "own": "is true, and lm_head.weight differs from"}
    if (stored, said is True) in (("none", False), ("own", True)):
        assert about[0].startswith(f"{folder / 'config.json'}: tie_word_embeddings {wrong[stored]}")
    assert len(about) == ((stored, said is True) in (("none", False), ("own", True)))


def test_a_head_that_differs_in_its_last_number_is_another(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path, toy_config(tie_word_embeddings=True))
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
    for kind, tied in ((torch.float32, True), (torch.float64, True), (torch.float64, False), (torch.float32, False)):
        if not tied:
            head[-1, -1] += 1
        _edited(folder, **{"lm_head.weight": head.to(kind)})
        with open_safetensors(folder) as checkpoint:
            _, config = family_from_hf(read_json(folder / "config.json"), folder / "config.json", checkpoint.tensors)
        assert config.tie_embeddings == tied


def test_a_tensor_without_elements_is_not_missed(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path)
    before = our_logits(folder, some_tokens(), LENGTH)
    _edited(folder, **{"model.extra": torch.ones(0, 4)})
    assert torch.equal(before, our_logits(folder, some_tokens(), LENGTH))
    _edited(folder, **{"model.norm.weight": torch.ones(0)})
    with pytest.raises(WeightsError, match=r"tensor model\.norm\.weight has shape \[0\]"):
        our_logits(folder, some_tokens(), LENGTH)


def _edited(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    save_file(weights, folder / "model.safetensors")


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path)
    _edited(folder, **{"model.layers.1.self_attn.k_proj.weight": None, "model.extra": torch.ones(1)})
    with pytest.raises(
        WeightsError,
        match=r"missing tensors \(1\): model\.layers\.1\.self_attn\.k_proj.*unexpected tensors \(1\): model",
    ):
        our_logits(folder, [1], 1)


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path)
    _edited(folder, **{"model.norm.weight": torch.ones(63)})
    with pytest.raises(WeightsError, match=r"model\.norm\.weight has shape \[63\].*\[64\]"):
        our_logits(folder, [1], 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLN"]}, "the nearest is LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "rope_type is 'spiral'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        our_logits(write_toy_model(tmp_path, toy_config() | change), [1], 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64', not a int"),
        ({"num_key_value_heads": 3}, "4 heads are not a multiple of 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"vocab_size": 10**30}, "vocab_size is 1000"),
        ({"rms_norm_eps": -1}, "epsilon of the model's norms is -1.0; it must be between 0 and 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, not a finite number"),
        ({"head_dim": 15}, "15 rotary dimensions"),
        ({"architectures": ["A", "B"]}, "architectures must name one"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000.*not a finite number"),
        ({"rope_theta": 10**400}, "rope_theta is 1000.*not a finite number"),
        ({"rope_theta": 1.0}, r"rotary base \(rope_theta\) is 1.0"),
        ({"partial_rotary_factor": 10**400}, "partial_rotary_factor is 1000.*not a finite number"),
        ({"partial_rotary_factor": float("nan")}, "partial_rotary_factor is nan, not a finite number"),
        ({"partial_rotary_factor": float("inf")}, "partial_rotary_factor is inf, not a finite number"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; it must be above 0 and at most 1"),
        ({"num_hidden_layers": 4097}, "num_hidden_layers is 4097; it must be 1 to 4096"),
        ({"eos_token_id": 10**30}, "eos_token_id is 1000.*not a token id"),
        ({"eos_token_id": [-5]}, r"eos_token_id is \[-5\], not a token id"),
    ],
)
def test_a_wrong_config_names_file_and_key(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path)
    (folder / "config.json").write_text(json.dumps(toy_config() | change))
    with pytest.raises(InvalidFileError, match=message) as caught:
        our_logits(folder, [1], 1)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize("window", [0, -1, 10**30])
def test_an_impossible_window_is_refused(window: int, tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path, toy_config("mistral", sliding_window=window))
    with pytest.raises(InvalidFileError, match=rf"config\.json: .*sliding window is {window} tokens; it must be 1 to"):
        our_logits(folder, [1], 1)


def test_layer_types_may_be_anything_in_a_damaged_file(tmp_path: Path) -> None:
    config = toy_config("mistral", sliding_window=4, layer_types=[[1], {}])
    with pytest.raises(UnsupportedModelError, match="layer_types must name"):
        our_logits(write_toy_model(tmp_path, config), [1], 1)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"])
def test_a_size_beyond_what_is_stored_takes_no_memory(key: str, tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path)
    (folder / "config.json").write_text(json.dumps(toy_config() | {key: 1 << 24}))
    with pytest.raises(WeightsError, match=r"has shape .*; the model's config asks for .*16777216|268435456"):
        our_logits(folder, [1], 1)


def test_more_layers_than_tensors_are_refused(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path)
    (folder / "config.json").write_text(json.dumps(toy_config(num_hidden_layers=4096)))
    with pytest.raises(WeightsError, match="asks for 4096 layers and there are only 21 tensors"):
        our_logits(folder, [1], 1)
