# SPDX-License-Identifier: MIT
"""Experts: other names and types of theirs, a mixture of copies, gpt-oss in MXFP4, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, quants
from safetensors.torch import load_file, save_file

from candle_vllm.core import InferenceEngine, InvalidFileError, SamplingParams, UnsupportedModelError, WeightsError
from candle_vllm.core.quantization.ggml_types import GGMLQuantizationType
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.tiny import (
    config_of,
    cuts,
    eager_logits,
    error,
    recorded_logits,
    some_tokens,
    spread,
    typical_spread,
    write_tiny,
)

TOKENS = some_tokens(24)
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A row's tiny model, written when first asked for."""
    folders: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in folders:
            folders[name] = write_tiny(tmp_path_factory.mktemp("family"), ROWS[name].model_type, **ROWS[name].config)
        return folders[name]

    return make


def rewritten(source: Path, folder: Path, change: Callable[[Weights], Weights], **config: Any) -> Path:
    """A copy with other tensors, and other keys of its config."""
    folder.mkdir(parents=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = {name: tensor.contiguous() for name, tensor in change(load_file(source / "model.safetensors")).items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(source) | config))
    return folder


def joined(weights: Weights, names: tuple[str, str, str], start: str) -> Weights:
    """Experts' matrices as `gate_up_proj` and `down_proj` of all of them; `names` of gate, up and down."""
    made: Weights = {}
    found: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name, tensor in weights.items():
        layer, is_expert, rest = name.partition(".experts.")
        if is_expert:
            expert, part, _ = rest.split(".")
            found.setdefault(layer.rpartition(".")[0], {}).setdefault(part, {})[int(expert)] = tensor
        else:
            made[name] = tensor
    for layer, parts in found.items():
        gate, up, down = (torch.stack([parts[name][e] for e in range(len(parts[name]))]) for name in names)
        made[f"{layer}.{start}gate_up_proj"] = torch.cat([gate, up], 1)
        made[f"{layer}.{start}down_proj"] = down
    return made


@pytest.mark.parametrize(
    ("row", "names", "start"),
    [
        ("Mixtral", ("w1", "w3", "w2"), "mlp.experts."),
        ("Mixtral", ("w1", "w3", "w2"), "block_sparse_moe.experts."),
        ("Qwen3-MoE", ("gate_proj", "up_proj", "down_proj"), "mlp.experts."),
        ("GLM-4-MoE", ("gate_proj", "up_proj", "down_proj"), "mlp.experts."),
    ],
)
def test_experts_in_one_tensor(
    row: str, names: tuple[str, str, str], start: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    source = made(row)
    one = rewritten(source, tmp_path / "one", lambda weights: joined(weights, names, start))
    assert torch.equal(eager_logits(one, TOKENS, [24]), eager_logits(source, TOKENS, [24]))


def other_gguf(path: Path, target: Path, change: Callable[[str, np.ndarray], dict[str, np.ndarray]]) -> Path:
    """A GGUF file with other tensors; those that `change` calls by a type's name in brackets are quantised."""
    reader = GGUFReader(path)
    writer = GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kinds = field.types
            writer.add_key_value(field.name, field.contents(), kinds[0], kinds[1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        data = np.asarray(tensor.data).reshape(tuple(reversed(tensor.shape.tolist())))
        for name, values in change(tensor.name, data).items():
            plain, _, kind = name.partition("[")
            if kind:
                type_ = GGMLQuantizationType[kind.rstrip("]")]
                writer.add_tensor(plain, quants.quantize(np.ascontiguousarray(values), type_), raw_dtype=type_)
            else:
                writer.add_tensor(plain, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def apart(name: str, data: np.ndarray) -> dict[str, np.ndarray]:
    """As llama.cpp's converter wrote Mixtral before April 2024."""
    if "_exps" not in name:
        return {name: data}
    return {name.replace("_exps", f".{e}"): matrix for e, matrix in enumerate(data)}


def mixed(name: str, data: np.ndarray) -> dict[str, np.ndarray]:
    """Experts of several types in one layer."""
    kinds = ("Q8_0", "Q5_1", "F16", "BF16")
    if "_exps" not in name:
        return {name: data}
    return {f"{name.replace('_exps', f'.{e}')}[{kinds[e % 4]}]": matrix for e, matrix in enumerate(data)}


def test_a_gguf_tensor_for_each_expert(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = export_gguf(made("Mixtral"), tmp_path / "all.gguf", "llama")
    wanted = eager_logits(path, TOKENS, [24])
    each = other_gguf(path, tmp_path / "each.gguf", apart)
    assert torch.equal(eager_logits(each, TOKENS, [24]), wanted)
    both: dict[str, np.ndarray] = {}

    def gate_and_up(name: str, data: np.ndarray) -> dict[str, np.ndarray]:
        if "ffn_gate_exps" not in name and "ffn_up_exps" not in name:
            return {name: data}
        both[name] = data
        start = name.partition(".ffn_")[0]
        halves = [both.get(f"{start}.ffn_{part}_exps.weight") for part in ("gate", "up")]
        if any(half is None for half in halves):
            return {}
        return {f"{start}.ffn_gate_up_exps.weight": np.concatenate(halves, 1)}  # type: ignore[arg-type]

    one = other_gguf(path, tmp_path / "one.gguf", gate_and_up)
    assert torch.equal(eager_logits(one, TOKENS, [24]), wanted)


def test_experts_of_several_types(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = export_gguf(made("Mixtral"), tmp_path / "all.gguf", "llama")
    several = other_gguf(path, tmp_path / "several.gguf", mixed)
    exact = eager_logits(several, TOKENS, [24])
    whole, cut = (recorded_logits(several, TOKENS, chunks) for chunks in cuts(24))
    assert spread(whole, exact) < 0.03
    assert torch.equal(whole, cut)


def test_nothing_around_a_request_changes_a_bit_of_it(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = export_gguf(made("Qwen3-MoE"), tmp_path / "model.gguf", "qwen3moe", quantization="Q8_0")
    prompts = [[(7 * i + n) % 256 for i in range(3 + 9 * n)] for n in range(7)]
    asked = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True, logprobs=1)

    def numbers(**settings: Any) -> list[Any]:
        with InferenceEngine(str(path), block_size=16, **settings) as engine:
            outputs = engine.generate(prompts, [asked] * len(prompts), use_tqdm=False)
        return [[(e.chosen.token_id, e.chosen.logprob) for e in output.outputs[0].logprobs or ()] for output in outputs]

    alone = numbers(threads=1, max_num_seqs=1, enable_prefix_caching=False)
    assert numbers(threads=2) == alone
    assert numbers(threads=3, max_num_batched_tokens=11, max_num_seqs=5) == alone


# ---- a mixture of copies is the layer itself -------------------------------------------------------------------------


@pytest.mark.parametrize("load", [eager_logits, recorded_logits], ids=["op by op", "compiled"])
def test_copies_of_a_dense_layer_are_the_layer(load: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    """Whichever two of the five are chosen: their shares sum to 1."""
    dense = write_tiny(tmp_path / "dense", "llama", head_dim=32)
    generator = torch.Generator().manual_seed(3)

    def copied(weights: Weights) -> Weights:
        made: Weights = {}
        for name, tensor in weights.items():
            layer, is_mlp, part = name.partition(".mlp.")
            if not is_mlp:
                made[name] = tensor
                continue
            made[f"{layer}.block_sparse_moe.gate.weight"] = torch.randn(5, 64, generator=generator)
            part = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[part.removesuffix(".weight")]
            made |= {f"{layer}.block_sparse_moe.experts.{e}.{part}.weight": tensor.clone() for e in range(5)}
        return made

    names = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
    mixture = rewritten(dense, tmp_path / "mixture", copied, num_local_experts=5, num_experts_per_tok=2, **names)
    assert error(load(mixture, TOKENS, [7, 17]), load(dense, TOKENS, [7, 17])) < 1e-5


# ---- gpt-oss in MXFP4 ------------------------------------------------------------------------------------------------

FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def as_mxfp4(weights: Weights) -> tuple[Weights, Weights]:
    """Random MXFP4 experts in the place of plain ones, and the plain checkpoint of the same numbers."""
    generator = torch.Generator().manual_seed(1)
    stored, plain = dict(weights), dict(weights)
    for name, tensor in weights.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, inputs, outputs = tensor.shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 124, (experts, outputs, inputs // 32), generator=generator, dtype=torch.uint8)
        codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)  # the low half of a byte comes first
        numbers = FP4[codes.long()] * torch.exp2(scales.float() - 127)[..., None]
        plain[name] = numbers.flatten(-2).transpose(1, 2)
        del stored[name]
        stored |= {name + "_blocks": blocks, name + "_scales": scales}
    return stored, plain


def test_gpt_oss_in_mxfp4(made: Callable[[str], Path], tmp_path: Path) -> None:
    source, found = made("gpt-oss"), as_mxfp4(load_file(made("gpt-oss") / "model.safetensors"))
    quantised = rewritten(source, tmp_path / "mx", lambda _: found[0], quantization_config={"quant_method": "mxfp4"})
    plain = rewritten(source, tmp_path / "plain", lambda _: found[1])
    exact = eager_logits(plain, TOKENS, [24])
    assert torch.equal(eager_logits(quantised, TOKENS, [24]), exact)
    whole, cut = (recorded_logits(quantised, TOKENS, chunks) for chunks in cuts(24))
    assert spread(whole, exact) < 0.05
    assert torch.equal(whole, cut)
    path = export_gguf(plain, tmp_path / "plain.gguf", "gpt-oss")
    assert error(eager_logits(path, TOKENS, [24]), exact) < 1e-5


def test_gpt_oss_as_it_is_published_in_gguf(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = export_gguf(made("gpt-oss"), tmp_path / "mx.gguf", "gpt-oss", quantization="MXFP4")
    exact = eager_logits(path, TOKENS, [24])
    whole, cut = (recorded_logits(path, TOKENS, chunks) for chunks in cuts(24))
    assert typical_spread(whole, exact) < 0.03
    assert torch.equal(whole, cut)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        ("Mixtral", {"num_local_experts": 0}, "num_local_experts is 0"),
        ("Mixtral", {"num_local_experts": 513}, "513 experts; it must have 1 to 512"),
        ("Mixtral", {"num_experts_per_tok": 7}, "cannot choose 7 experts of 6"),
        ("Mixtral", {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        ("Qwen3-MoE", {"moe_intermediate_size": 1 << 30}, "moe_intermediate_size is 1073741824"),
        ("Qwen2-MoE", {"mlp_only_layers": ["1"]}, r"mlp_only_layers is \['1'\], not a list of layers"),
        ("Qwen2-MoE", {"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size is -1"),
        ("Qwen2-MoE", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("GLM-4-MoE", {"n_group": 3}, "cannot choose 1 of 3 groups of 8 experts"),
        ("GLM-4-MoE", {"n_group": 8, "topk_group": 4}, "groups of two experts or more; 8 have one"),
        ("GLM-4-MoE", {"n_shared_experts": -1}, "inner size of -64"),
        ("GLM-4-MoE", {"routed_scaling_factor": float("nan")}, "routed_scaling_factor is nan"),
        ("gpt-oss", {"swiglu_limit": 9.0}, "swiglu_limit is 9.0; implemented: 7.0"),
    ],
)
def test_a_wrong_config_names_file_and_key(
    row: str, change: dict[str, Any], message: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = rewritten(made(row), tmp_path / "wrong", lambda weights: weights, **change)
    with pytest.raises((InvalidFileError, UnsupportedModelError), match=message) as caught:
        eager_logits(folder, TOKENS, [24])
    assert str(folder / "config.json") in str(caught.value)


def test_missing_and_misshapen_experts_are_named(made: Callable[[str], Path], tmp_path: Path) -> None:
    start = "model.layers.1.mlp.experts."

    def wrong(weights: Weights) -> Weights:
        del weights[start + "3.up_proj.weight"]
        return weights | {start + "4.down_proj.weight": torch.zeros(64, 63), start + "6.up_proj.weight": torch.ones(1)}

    with pytest.raises(WeightsError) as caught:
        eager_logits(rewritten(made("Qwen3-MoE"), tmp_path / "wrong", wrong), TOKENS, [24])
    text = str(caught.value)
    assert "missing tensors (1): " + start + "3.up_proj.weight" in text
    assert "unexpected tensors (1): " + start + "6.up_proj.weight" in text
    assert start + "4.down_proj.weight has shape [64, 63]; the model's config asks for [64, 64]" in text


def test_layers_that_predict_further_tokens_are_not_loaded(made: Callable[[str], Path], tmp_path: Path) -> None:
    source, more = made("GLM-4-MoE"), {"model.layers.2.eh_proj.weight": torch.ones(1)}
    behind = rewritten(source, tmp_path / "behind", lambda weights: weights | more, num_nextn_predict_layers=1)
    assert torch.equal(eager_logits(behind, TOKENS, [24]), eager_logits(source, TOKENS, [24]))
    far = rewritten(source, tmp_path / "far", lambda weights: weights | {"model.layers.20.x.weight": torch.ones(1)})
    with pytest.raises(WeightsError, match=r"unexpected tensors \(1\): model\.layers\.20"):
        eager_logits(far, TOKENS, [24])


def test_a_tensor_of_too_few_experts_is_named(made: Callable[[str], Path], tmp_path: Path) -> None:
    def few(weights: Weights) -> Weights:
        one = joined(weights, ("w1", "w3", "w2"), "mlp.experts.")
        return {name: tensor[:5] if "down_proj" in name else tensor for name, tensor in one.items()}

    with pytest.raises(WeightsError, match=r"mlp\.experts\.down_proj has shape \[5, 64, 96\]"):
        eager_logits(rewritten(made("Mixtral"), tmp_path / "few", few), TOKENS, [24])
