# SPDX-License-Identifier: MIT
"""Architectures by transformers' own layers, over this engine's pages and products, against plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from candle_vllm.core import (
    ConfigError,
    EngineConfig,
    InferenceEngine,
    LoRARequest,
    SamplingParams,
    UnsupportedModelError,
)
from candle_vllm.core.assembly.model import LoadedModel
from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.kernels.packed_linear.layout import PackedMatrix
from candle_vllm.core.kernels.plain_linear.layout import PlainMatrix
from candle_vllm.core.layers.linear import Linear
from candle_vllm.core.models import registry
from candle_vllm.core.models.any_architecture.attention import Pass, under_way
from candle_vllm.core.models.any_architecture.gguf import config_values
from candle_vllm.core.models.any_architecture.modules import OwnLinear
from packages.core.tests.models.any_configs import ALONE, IN_BATCHES, REFUSED, tiny_config
from packages.core.tests.models.families import FORMATS
from packages.core.tests.models.families import ROWS as FAMILIES
from packages.core.tests.models.family_formats import write_format
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.peft_adapters import trained
from packages.core.tests.models.tiny import (
    config_of,
    eager_logits,
    eager_runner,
    error,
    load,
    some_tokens,
    spread,
    step_logits,
    their_logits,
    typical_spread,
    write_tiny,
)

_MORE = pytest.mark.every_case
GGUF = {
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Qwen3-MoE": "qwen3moe",
    "Gemma-2": "gemma2",
    "GPT-2": "gpt2",
    "BLOOM": "bloom",
    "StarCoder2": "starcoder2",
    "MiniMax-M2": "minimax-m2",
    "LFM2": "lfm2",
}
"""Rows of `families.py` whose architecture transformers' tables for GGUF have, beside Llama."""


def _settings(**more: Any) -> dict[str, Any]:
    return {"device": "cpu", "threads": 1, "block_size": 16, "kv_cache_memory": 1 << 24, "max_images": 0, **more}


def _cases(names: list[str], *common: str) -> list[Any]:
    return [name if name in common else pytest.param(name, marks=_MORE) for name in names]


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize(
    "name", _cases(IN_BATCHES, "arcee", "gpt_neox", "gemma2", "mixtral", "cwm", "nemotron")
)  # fused q, k and v; windows, soft caps, a tied head; experts that are stored one by one
def test_logits_and_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    folder, tokens = write_tiny(tmp_path, name, **tiny_config(name)), some_tokens()
    theirs = _theirs(folder, tokens)
    for chunks in ([70], [17, 33, 1, 1, 18]):
        assert spread(_logits(load(folder, model_impl="transformers"), chunks), theirs) < 1e-5, chunks
    prompts = [tokens[:length] for length in (7, 40, 18, 29)]
    with InferenceEngine(str(folder), **_settings(model_impl="transformers", enable_prefix_caching=False)) as engine:
        assert engine.model_info.implementation == "transformers"
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        together = [list(each.outputs[0].token_ids) for each in engine.generate(prompts, params, use_tqdm=False)]
        alone = [list(engine.generate([each], params, use_tqdm=False)[0].outputs[0].token_ids) for each in prompts]
    assert together == alone
    assert [each[0] for each in together] == [int(theirs[len(prompt) - 1].argmax()) for prompt in prompts]


@pytest.mark.parametrize("name", _cases(ALONE, "bloom", "mamba"))
def test_a_cache_of_its_own_runs_one_sequence_at_a_time(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Logits are those of the text up to a token, for the layers of some types see later tokens."""
    folder, tokens, ends = write_tiny(tmp_path, name, **tiny_config(name)), some_tokens(), (40, 41, 55, 70)
    theirs = torch.stack([_theirs(folder, tokens[:end])[-1] for end in ends])
    runner = eager_runner(load(folder, model_impl="transformers"), 5)
    ours = step_logits(runner, tokens, [40] + [1] * 30)
    assert spread(ours[[end - 1 for end in ends]], theirs) < 1e-5
    assert spread(step_logits(runner, tokens, [70])[-1], theirs[-1]) < 1e-5, "the next sequence begins anew"
    prompts = [tokens[:length] for length in (7, 40, 18)]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    with InferenceEngine(str(folder), **_settings(model_impl="transformers")) as engine:
        info = engine.model_info
        assert (info.implementation, info.max_num_seqs) == ("transformers, one sequence at a time", 1)
        together = [list(each.outputs[0].token_ids) for each in engine.generate(prompts, params, use_tqdm=False)]
        again = [list(engine.generate([each], params, use_tqdm=False)[0].outputs[0].token_ids) for each in prompts]
    assert together == again
    assert together[1][0] == int(theirs[0].argmax())
    assert "one sequence at a time" in caplog.text
    with pytest.raises(ConfigError, match="does not support speculative decoding"):
        InferenceEngine(str(folder), **_settings(model_impl="transformers", speculative_config={"method": "ngram"}))
    with pytest.raises(ConfigError, match="does not support LoRA adapters"):
        InferenceEngine(str(folder), **_settings(model_impl="transformers", enable_lora=True))


def test_every_causal_type_is_in_a_list() -> None:
    assert sorted([*IN_BATCHES, *ALONE, *REFUSED]) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@_MORE
def test_as_many_types_run_as_transformers_declares() -> None:
    listed = [*IN_BATCHES, *ALONE, *REFUSED]
    classes = {name: getattr(transformers, str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]), None) for name in listed}
    declared = {name for name, each in classes.items() if getattr(each, "_supports_attention_backend", False)}
    assert len(declared - REFUSED.keys()) >= 118
    assert len({*listed} - declared - REFUSED.keys()) >= 45


def _theirs(folder: Path, tokens: list[int]) -> torch.Tensor:
    """Logits [T, V] of the class that a config names; of a text model that is a part of a larger type, too."""
    named = getattr(transformers, config_of(folder)["architectures"][0])
    kind = "sdpa" if config_of(folder).get("alibi") else "eager"
    model = named.from_pretrained(folder, dtype=torch.float32, attn_implementation=kind).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


def _logits(loaded: LoadedModel, chunks: list[int] | None = None) -> torch.Tensor:
    """Logits of `some_tokens`, the layers op by op and products as the model was loaded."""
    return step_logits(eager_runner(loaded, 5), some_tokens(), chunks or [70])


def _matrices(loaded: LoadedModel) -> list[Any]:
    """The matrices of every product, as its backend has them."""
    decoder: Any = loaded.decoder
    layers = [getattr(each, "table", getattr(each, "router", each)) for each in decoder.parts]
    return [piece for layer in layers if isinstance(layer, Linear) for piece in layer.pieces.values()]


@pytest.mark.one_of_each(2)
@pytest.mark.parametrize("name", ["arcee", "mixtral", "gpt2", "gpt_oss"])
def test_compiled_kernels_multiply_what_is_quantised_in_situ(name: str, tmp_path: Path) -> None:
    """Experts and matrices that are stored transposed included; the plain model's logits are transformers'."""
    folder = write_tiny(tmp_path, name, **tiny_config(name))
    plain = load(folder, model_impl="transformers")
    assert plain.placement.weight_memory is not None
    assert {type(matrix) for matrix in _matrices(plain)} == {PlainMatrix}
    theirs = their_logits(folder, some_tokens())
    assert spread(_logits(plain, [17, 33, 1, 1, 18]), theirs) < 1e-5
    quantised = load(folder, model_impl="transformers", isq="q8_0")
    kinds = [type(matrix) for matrix in _matrices(quantised)]
    assert kinds.count(PackedMatrix) >= len(kinds) - 2 * quantised.config.num_layers, "routers stay plain"
    assert 1e-4 < typical_spread(_logits(quantised), theirs) < 0.05
    decoded = load(folder, model_impl="transformers", isq="q8_0", op_by_op=True)
    assert decoded.placement.weight_memory is None
    assert typical_spread(_logits(quantised), _logits(decoded)) < 0.02, "activations are rounded to 8 bits"


@pytest.mark.parametrize(
    "format", ["AWQ", *(pytest.param(each, marks=pytest.mark.every_case) for each in FORMATS if each != "AWQ")]
)
def test_quantised_checkpoints_mean_what_the_plain_ones_do(format: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", "arcee", hidden_size=128, intermediate_size=256)
    stored, plain = write_format(source, format, tmp_path)
    found = load(stored, model_impl="transformers")
    assert found.placement.weight_memory is not None
    assert spread(_logits(found), their_logits(plain, some_tokens())) < 0.03


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("Llama", "llama"), *(pytest.param(*each, marks=pytest.mark.every_case) for each in GGUF.items())],
)
def test_gguf_by_the_tables_of_transformers(name: str, architecture: str, tmp_path: Path) -> None:
    row, tokens = FAMILIES[name], some_tokens()
    usual = {"gpt2": {**row.config, "n_inner": 512, "max_position_embeddings": 1024}, "gemma2": {"head_dim": 32}}
    folder = write_tiny(tmp_path / "hf", row.model_type, **usual.get(architecture, row.config))  # tables leave keys out
    for kind, most in (("F32", 1e-5), ("Q8_0", 0.06)):
        path = export_gguf(folder, tmp_path / f"{kind}.gguf", architecture, quantization=kind)
        loaded = load(path, model_impl="transformers")
        assert loaded.config.implementation.startswith("transformers")
        assert typical_spread(_logits(loaded), their_logits(folder, tokens)) < most


@pytest.mark.parametrize("name", ["nemotron", pytest.param("mamba", marks=_MORE)])
def test_gguf_of_architectures_without_a_row_of_their_own(name: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "hf", name, **tiny_config(name))
    path = export_gguf(folder, tmp_path / f"{name}.gguf", name)
    assert spread(_logits(load(path, model_impl="transformers")), their_logits(folder, some_tokens())) < 1e-5


def test_gguf_without_a_table_is_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "hf", "olmo2")
    path = export_gguf(folder, tmp_path / "olmo2.gguf", "olmo2")
    with pytest.raises(UnsupportedModelError, match=r"no GGUF of architecture 'olmo2'; it reads .*llama"):
        load(path, model_impl="transformers")
    deci: Any = SimpleNamespace(path=path, metadata={}, tensors={})  # has a table, and no class that reads its values
    with pytest.raises(UnsupportedModelError, match=r"no GGUF of architecture 'deci'; it reads .*llama"):
        config_values("deci", deci)


@pytest.mark.parametrize(
    ("name", "key", "size"),
    [("llama", "vocab_size", "many"), ("llama", "num_attention_heads", 0), ("mixtral", "num_local_experts", 0)],
)
def test_impossible_sizes_are_errors_of_the_file(name: str, key: str, size: object, tmp_path: Path) -> None:
    path = write_tiny(tmp_path, name, **tiny_config(name)) / "config.json"
    with pytest.raises(InvalidFileError):
        registry.family_from_hf(json.loads(path.read_text()) | {key: size}, path, impl="transformers")


def test_an_unknown_function_of_a_router_is_refused() -> None:
    checkpoint = SimpleNamespace(path=Path("m.gguf"), metadata={"minimax-m2.expert_gating_func": 3}, tensors={})
    with pytest.raises(UnsupportedModelError, match="expert_gating_func 3 is not implemented"):
        config_values("minimax-m2", checkpoint)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Llama", {"use_dora": True}),
        pytest.param("GPT-2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, marks=_MORE),
        pytest.param("Llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, marks=_MORE),
    ],
)
def test_adapters_do_what_peft_merges(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    made, tokens = trained(tmp_path, name, **config), some_tokens(40)
    request, params = LoRARequest("it", 1, str(made.adapter)), SamplingParams(temperature=0.0, max_tokens=8)
    with InferenceEngine(str(made.model), **_settings(model_impl="transformers", enable_lora=True)) as engine:
        prompts = [{"prompt_token_ids": tokens}] * 2
        answers = engine.generate(prompts, params, lora_request=[request, None], use_tqdm=False)
        said = [list(each.outputs[0].token_ids) for each in answers]
    made.merged(tmp_path / "merged")
    for folder, tokens_said in zip((tmp_path / "merged", made.model), said, strict=True):
        theirs = their_logits(folder, [*tokens, *tokens_said])
        assert theirs[len(tokens) - 1 : -1].argmax(-1).tolist() == tokens_said
    assert said[0] != said[1]


def test_adapters_change_no_product_whose_rows_are_not_tokens(tmp_path: Path) -> None:
    """As a product for each head, where rows are heads of tokens: an adapter's rows would be those of other tokens."""
    made: Any = load(write_tiny(tmp_path, "llama"), model_impl="transformers")
    product: Any = next(each for each in made.decoder.model.modules() if isinstance(each, OwnLinear))
    step: Any = SimpleNamespace(positions=torch.arange(3))
    product.table.adapters = SimpleNamespace(groups=["an adapter"], add=lambda place, x, y, bias: y)
    with under_way(Pass({}, [], step)):
        assert product(torch.zeros(1, 3, product.shape[1])).shape == (1, 3, product.shape[0])
        with pytest.raises(UnsupportedModelError, match="rows are not tokens"):
            product(torch.zeros(1, 3, 2, product.shape[1]))


def test_layers_of_one_input_are_one_product(tmp_path: Path) -> None:
    """From the second step on: q, k and v, gate and up; no others."""
    made: Any = load(write_tiny(tmp_path, "llama"), model_impl="transformers")
    first, second = _logits(made, [35, 35]), _logits(made, [35, 35])
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    layers = {each: name for name, each in made.decoder.model.named_modules() if isinstance(each, OwnLinear)}
    groups = [[layers[each].split(".")[-1] for each in group] for group in next(iter(layers)).products._groups.values()]
    several = [group for group in groups if len(group) > 1]
    assert several == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * made.config.num_layers


def test_compiled_products_have_the_threads_and_torch_has_one(tmp_path: Path) -> None:
    """A second thread of torch would wait for its next operation on a core of the products' threads."""
    folder, before = write_tiny(tmp_path, "llama"), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        made: Any = load(folder, model_impl="transformers", threads=2)
        assert torch.get_num_threads() == 1
        layer = next(each for each in made.decoder.model.modules() if isinstance(each, OwnLinear))
        assert layer.products._team.threads == 2
        load(folder, model_impl="transformers", threads=2, op_by_op=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_native_layers_come_first(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "llama")
    assert load(folder, op_by_op=True).config.implementation == "native"
    assert load(folder, model_impl="transformers").config.implementation == "transformers"
    tokens = some_tokens()
    ours, other = (eager_logits(folder, tokens, [70], model_impl=each) for each in ("native", "transformers"))
    assert error(other, ours) < 1e-5


def test_unknown_architectures_name_the_way(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "helium", head_dim=16)
    with mock.patch.object(registry, "_has_transformers", return_value=False):
        with pytest.raises(UnsupportedModelError, match=r"HeliumForCausalLM.*uv run --extra transformers"):
            load(folder)
        with pytest.raises(ConfigError, match="uv run --extra transformers candle-vllm"):
            load(folder, model_impl="transformers")
    assert load(folder).config.implementation == "transformers"
    with pytest.raises(UnsupportedModelError, match="HeliumForCausalLM"):
        load(folder, model_impl="native")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "nobody", "auto_map": {"AutoModelForCausalLM": "x.Y"}}, "code beside the weights is never run"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers is"),
        ({"parts": [{"hidden_size": 1 << 40}]}, "hidden_size is"),
        ({"model_type": "t5"}, "is no decoder"),
        ({"model_type": "bert", "is_decoder": False}, "attends to tokens after its own"),
        ({"model_type": "rembert", "is_decoder": False}, "is_decoder false"),
    ],
)
def test_what_cannot_run_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "arcee")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(Exception, match=message):
        load(folder, model_impl="transformers")


@pytest.mark.parametrize("name", ["arcee", "nemotron", "gpt_neox", "bert"])
@pytest.mark.parametrize("stored", [True, False])
def test_the_tensors_say_whether_the_head_is_the_table(
    name: str, stored: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not `tie_word_embeddings`; transformers reads a stored head, too, and misses one that is not stored."""
    folder = write_tiny(tmp_path, name, **tiny_config(name) | {"tie_word_embeddings": not stored})
    theirs, path = _theirs(folder, some_tokens()), folder / "config.json"
    path.write_text(json.dumps(config_of(folder) | {"tie_word_embeddings": stored}))
    assert spread(_logits(load(folder, model_impl="transformers"), [70]), theirs) < 1e-5
    assert f"{path}: tie_word_embeddings is {'true' if stored else 'not true'}, and" in caplog.text


@pytest.mark.parametrize(
    "changed",
    [
        {"rope_theta": 10**8},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10**8}},
        {"seed": 1 << 40, "num_params": 14 * 10**9, "model_max_length": 10**30, "initial_scale": 1 << 30},
    ],
    ids=str,
)
def test_whole_numbers_that_are_no_sizes_may_be_large(changed: dict[str, Any], tmp_path: Path) -> None:
    path = write_tiny(tmp_path, "hyperclovax", **tiny_config("hyperclovax")) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    assert load(tmp_path).config.implementation == "transformers"


def test_ranks_are_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "arcee")
    settings = EngineConfig(model=str(folder), model_impl="transformers", tensor_parallel_size=2, op_by_op=True)
    from candle_vllm.core.assembly.model import fit_settings

    with pytest.raises(ConfigError, match="cannot divide it among ranks"):
        fit_settings(settings, load(folder, model_impl="transformers").config)
