# SPDX-License-Identifier: MIT
"""The LayerNorm decoders (GPT-2 and its kin) beyond the table of families: contexts, names, heads, configs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from candle_vllm.core import ConfigError, EngineConfig, InvalidFileError, UnsupportedModelError, WeightsError
from candle_vllm.core.assembly.model import describe_model
from candle_vllm.core.assembly.opening import open_model
from candle_vllm.core.devices import CPU
from candle_vllm.core.loading.source import model_files
from candle_vllm.core.models.registry import family_from_hf
from packages.core.tests.models.dense_models import edited
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.tiny import (
    config_of,
    eager_logits,
    error,
    load,
    recorded_logits,
    some_tokens,
    spread,
    their_logits,
    write_tiny,
)

TOKENS = some_tokens(24)


def written(name: str, folder: Path, **changes: Any) -> Path:
    return write_tiny(folder, ROWS[name].model_type, **(dict(ROWS[name].config) | changes))


def stored_as(source: Path, target: Path, rename: Callable[[str], str], **more: torch.Tensor) -> Path:
    """The same checkpoint with other names, and with more tensors."""
    edited(source, target)
    weights = load_file(source / "model.safetensors")
    (target / "model.safetensors").unlink()
    own = {name: data.clone() for name, data in more.items()}
    save_file({rename(name): data for name, data in weights.items()} | own, target / "model.safetensors")
    return target


# ---- context ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GPT-2", "OPT-350m"])
def test_a_table_of_positions_ends_the_context(name: str, tmp_path: Path) -> None:
    """Its last row is used, by a chunk of one token too, and nothing is behind it."""
    source, tokens = written(name, tmp_path, max_position_embeddings=24), TOKENS
    theirs = their_logits(source, tokens)
    for chunks in ([24], [20, 3, 1]):
        assert error(eager_logits(source, tokens, chunks), theirs) < 1e-4
        assert spread(recorded_logits(source, tokens, chunks), theirs) < 1e-2
    short = eager_logits(source, tokens[:8], [8], max_model_len=8)
    assert error(short, theirs[:8]) < 1e-4, "a shorter context has the same table"
    with pytest.raises(ConfigError, match="24"):
        load(source, max_model_len=25)
    with pytest.raises(ConfigError, match=r"has a table of 24 positions, and YaRN stretches only rotary ones"):
        load(source, yarn_scaling_factor=2.0)


def test_a_table_of_another_size_is_named(tmp_path: Path) -> None:
    source = written("GPT-2", tmp_path / "model")
    (tmp_path / "edited").mkdir()
    with pytest.raises(WeightsError, match=r"wpe\.weight has shape \[512, 128\]; .* asks for \[1024, 128\]"):
        load(edited(source, tmp_path / "edited", n_positions=1024))


def test_a_table_of_positions_stays_plain(tmp_path: Path) -> None:
    """Its rows are added to hidden states; what is multiplied is quantised."""
    config = EngineConfig(model=str(written("GPT-2", tmp_path)), isq="q8_0", max_images=0)
    opened = open_model(model_files(config), CPU)
    with opened.checkpoint:
        stored = describe_model(config, CPU, opened).stored.tensors
        found = {name: stored[name].type_name for name in ("positions:weight", "layers.0.mlp.up:weight")}
    assert found == {"positions:weight": "F32", "layers.0.mlp.up:weight": "Q8_0"}


# ---- names -----------------------------------------------------------------------------------------------------------


def test_old_names_and_masks(tmp_path: Path) -> None:
    """Checkpoints that were saved without their head, as GPT-2 was; masks that old versions saved."""
    mask = torch.ones(1, 1, 4, 4)
    cases = {
        "GPT-2": ("transformer.", {"h.0.attn.bias": mask, "h.1.attn.masked_bias": mask}),
        "GPT-Neo": ("transformer.", {"h.0.attn.attention.bias": mask, "h.0.attn.attention.masked_bias": mask}),
        "OPT-350m": ("model.", {}),
    }
    for name, (prefix, masks) in cases.items():
        source, target = written(name, tmp_path / name), tmp_path / f"{name} old"
        target.mkdir()
        old = stored_as(source, target, lambda name, prefix=prefix: name.removeprefix(prefix), **masks)
        assert error(eager_logits(old, TOKENS, [24]), eager_logits(source, TOKENS, [24])) == 0
    source, target = written("GPT-NeoX", tmp_path / "neox"), tmp_path / "neox old"
    target.mkdir()
    buffers = {"gpt_neox.layers.0.attention.bias": mask, "gpt_neox.layers.0.attention.rotary_emb.inv_freq": mask}
    old = stored_as(source, target, lambda name: name.replace("lm_head", "embed_out"), **buffers)
    assert error(eager_logits(old, TOKENS, [24]), eager_logits(source, TOKENS, [24])) == 0


@pytest.mark.parametrize("name", ["GPT-2", "GPT-J", "OPT-350m", "GPT-NeoX", "Falcon", "StarCoder2"])
def test_tied_and_untied_heads(name: str, tmp_path: Path) -> None:
    """The other way round than in the table of families; GPT-J's logits have a bias either way."""
    tied = not config_of(written(name, tmp_path / "usual"))["tie_word_embeddings"]
    source = written(name, tmp_path / "other", tie_word_embeddings=tied)
    theirs = their_logits(source, TOKENS)
    assert error(eager_logits(source, TOKENS, [24]), theirs) < 1e-4
    assert spread(recorded_logits(source, TOKENS, [24]), theirs) < 1e-2


@pytest.mark.parametrize("name", ["GPT-2", "GPT-NeoX", "Falcon"])
def test_heads_that_contradict_the_config(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A trained head beside a config that says that the embedding table is the head, and the reverse."""
    apart, tied = (written(name, tmp_path / str(tied), tie_word_embeddings=tied) for tied in (False, True))
    for source, claim, said in ((apart, True, "differs from the embedding table"), (tied, False, "is not true")):
        (tmp_path / said).mkdir()
        found = eager_logits(edited(source, tmp_path / said, tie_word_embeddings=claim), TOKENS, [24])
        assert error(found, eager_logits(source, TOKENS, [24])) == 0
        assert said in caplog.text


# ---- configs ---------------------------------------------------------------------------------------------------------


def _gpt2(**values: Any) -> dict[str, Any]:
    sizes = {"n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257}
    usual = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "bos_token_id": 50256, "model_type": "gpt2"}
    return {"architectures": ["GPT2LMHeadModel"], "eos_token_id": 50256} | sizes | usual | values


def _opt(hidden: int, **values: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_attention_heads": hidden // 64, "num_hidden_layers": 12, "ffn_dim": 4 * hidden}
    usual = {"activation_function": "relu", "max_position_embeddings": 2048, "vocab_size": 50272, "eos_token_id": 2}
    return {"architectures": ["OPTForCausalLM"], "do_layer_norm_before": True} | sizes | usual | values


def _falcon(**values: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32, "vocab_size": 65024}
    usual = {"alibi": False, "bias": False, "multi_query": True, "new_decoder_architecture": False}
    return (
        {"architectures": ["FalconForCausalLM"], "parallel_attn": True, "layer_norm_epsilon": 1e-5}
        | sizes
        | usual
        | values
    )


PYTHIA = {
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_act": "gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
FALCON_40B = {"hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True}

PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # and what is read of them
    "gpt2": (_gpt2(), {"intermediate_size": 3072, "positions": 1024, "tie_embeddings": True, "scales": ()}),
    "pythia-70m": (PYTHIA, {"parallel": True, "activation": "gelu", "num_kv_heads": 8, "tie_embeddings": False}),
    "opt-125m": (_opt(768), {"positions": 2048, "norm_eps": 1e-5, "activation": "relu", "embed_size": 768}),
    "opt-350m": (
        _opt(1024, word_embed_proj_dim=512, do_layer_norm_before=False),
        {"embed_size": 512, "norms_behind": True},
    ),
    "falcon-7b": (
        _falcon(),
        {"num_kv_heads": 1, "shared_norm": True, "max_position": 2048, "intermediate_size": 18176},
    ),
    "falcon-40b": (_falcon(**FALCON_40B), {"num_kv_heads": 8, "shared_norm": False, "parallel": True}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    config, expected = PUBLISHED[name]
    found = family_from_hf(config, Path("config.json"))[1]
    assert {key: getattr(found, key) for key in expected} == expected


def test_rotary_settings_by_their_old_names() -> None:
    rope = family_from_hf(PYTHIA | {"rotary_pct": 0.5, "rotary_emb_base": 500}, Path("config.json"))[1].rope
    assert (rope.dim, rope.theta) == (32, 500.0)


BLOOM = {  # as bigscience/bloom-560m has it
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "n_embed": None,
    "hidden_size": 1024,
    "n_head": 16,
    "n_layer": 24,
    "vocab_size": 250880,
    "layer_norm_epsilon": 1e-5,
    "seq_length": 2048,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_gpt2(add_cross_attention=True), "add_cross_attention is true"),
        (_gpt2(activation_function="mish"), "activation_function is 'mish'"),
        (_opt(768, layer_norm_elementwise_affine=False), "layer_norm_elementwise_affine is false"),
        (_opt(768, _remove_final_layer_norm=True), "_remove_final_layer_norm is true"),
        (_gpt2(architectures=["MptForCausalLM"]), "'MptForCausalLM' is not implemented"),
        (BLOOM | {"n_head": 1 << 20, "hidden_size": 1 << 21}, "ALiBi of 1048576 heads"),
        (BLOOM | {"apply_residual_connection_post_layernorm": True}, "post_layernorm is true"),
    ],
)
def test_what_is_not_implemented_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        family_from_hf(json.loads(json.dumps(config)), Path("config.json"))


def test_slopes_are_alibis_and_those_of_falcon_are_scaled() -> None:
    """Of a number of heads that is no power of two, the further ones have every other slope of twice the power."""
    path = Path("config.json")
    bloom = family_from_hf({**BLOOM, "n_head": 6, "hidden_size": 96}, path)[1]
    assert bloom.slopes == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    assert (bloom.max_position, bloom.intermediate_size) == (2048, 384)
    falcon = family_from_hf(_falcon(alibi=True, num_attention_heads=4, hidden_size=64), path)[1]
    assert falcon.slopes == pytest.approx([2.0**-power / 4 for power in (2, 4, 6, 8)])


def test_a_missing_key_is_named_as_the_family_names_it() -> None:
    config = _gpt2()
    del config["n_head"]
    with pytest.raises(InvalidFileError, match=r"config\.json: n_head is missing"):
        family_from_hf(config, Path("config.json"))
