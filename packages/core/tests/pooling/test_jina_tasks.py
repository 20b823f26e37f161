# SPDX-License-Identifier: MIT
"""The adapters in the checkpoint of jina-embeddings-v3, beside transformers' model with each of them merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import JinaEmbeddingsV3Model

from candle_vllm.core import AdapterError, InferenceEngine, LoRARequest
from candle_vllm.core.loading.adapters import AdapterLimits
from candle_vllm.core.models.jina_tasks import task_adapter
from candle_vllm.core.text.tokenizer import Tokenizer
from packages.core.tests.pooling.test_encoder_families import SIZES, Row, cosines, states, write

TASKS = ["retrieval.query", "retrieval.passage", "text-matching"]
WORDS = ["hello", "a", "the quick brown fox", "x" * 90]
RANK, ALPHA = 4, 2.0
NAMES = {
    "attn.out_proj": "mixer.out_proj", "self_attn.o_proj": "mixer.out_proj", "post_attention_layernorm": "norm1",
    "post_mlp_layernorm": "norm2", "embeddings.LayerNorm": "emb_ln",
}  # fmt: skip


def published(model: Any) -> dict[str, torch.Tensor]:
    """The weights of a model by the names of the repository, without its adapters."""
    named: dict[str, torch.Tensor] = {}
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if ".self_attn.k_proj." in name or ".self_attn.v_proj." in name or "position_ids" in name:
            continue
        if ".self_attn.q_proj." in name:
            tensor = torch.cat([weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            name = name.replace("self_attn.q_proj", "mixer.Wqkv")
        for theirs, own in NAMES.items():
            name = name.replace(theirs, own)
        named[f"roberta.{name.replace('layers.', 'encoder.layers.')}"] = tensor
    return named


def merge(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Puts weights by the names of the repository into a model."""
    plain = {name: tensor for name, tensor in model.state_dict().items() if "position_ids" not in name}
    with torch.no_grad():
        for name in plain:
            part = next((part for part in "qkv" if f".self_attn.{part}_proj." in name), None)
            wanted = name if part is None else name.replace(f"self_attn.{part}_proj", "mixer.Wqkv")
            for theirs, own in NAMES.items():
                wanted = wanted.replace(theirs, own)
            found = weights[f"roberta.{wanted.replace('layers.', 'encoder.layers.')}"]
            plain[name].copy_(found if part is None else found.chunk(3)["qkv".index(part)])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A folder in the repository's layout, and transformers' models: with no adapter, then with that of each task."""
    folder, model = write(tmp_path_factory.mktemp("jina"), Row("JinaEmbeddingsV3Model", {"pad_token_id": 1}),
                          "JinaEmbeddingsV3Model")  # fmt: skip
    chance, stored, weights = torch.Generator().manual_seed(0), {}, published(model)
    merged = [dict(weights) for _ in TASKS]
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if weight.dim() != 2:
            stored[name] = weight
            continue
        rows, columns = weight.shape
        is_table = stem.endswith("_embeddings")
        shapes = ((rows, RANK), (RANK, columns)) if is_table else ((RANK, columns), (rows, RANK))
        a, b = (0.5 * torch.randn(len(TASKS), *shape, generator=chance) for shape in shapes)
        for number, each in enumerate(merged):
            product = a[number] @ b[number] if is_table else b[number] @ a[number]
            each[name] = weight + ALPHA / RANK * product
        stored |= {f"{stem}.parametrizations.weight.original": weight}
        stored |= {f"{stem}.parametrizations.weight.0.lora_{part}": each for part, each in (("A", a), ("B", b))}
    size = SIZES["hidden_size"]
    stored["roberta.pooler.dense.parametrizations.weight.0.lora_A"] = torch.zeros(len(TASKS), RANK, size)
    stored["roberta.pooler.dense.parametrizations.weight.0.lora_B"] = torch.zeros(len(TASKS), size, RANK)
    stored["roberta.pooler.dense.parametrizations.weight.original"] = torch.zeros(size, size)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta", "position_embedding_type": "rotary"}
    config |= {"lora_adaptations": TASKS, "lora_alpha": ALPHA, "lora_rank": RANK, "rotary_emb_base": 20000.0}
    (folder / "config.json").write_text(json.dumps(config))
    models = [model]
    for each in merged:
        models.append(JinaEmbeddingsV3Model(model.config).eval())
        merge(models[-1], each)
    return folder, models


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "op by op"])
def test_vectors_of_each_task_equal_transformers(written: tuple[Path, list[Any]], eager: bool) -> None:
    folder, models = written
    ids = [Tokenizer.from_folder(folder).encode(word) for word in WORDS]
    wanted = np.stack([[states(model, text).mean(0) for text in ids] for model in models])
    assert cosines(wanted[1], wanted[0]).max() < 0.99
    tasks = [None, *(LoRARequest(task.replace(".", "_"), lora_path=str(folder / task)) for task in TASKS)]
    with InferenceEngine(str(folder), enable_lora=True, op_by_op=eager) as engine:
        for task, each in zip(tasks, wanted, strict=True):
            made = engine.embed(WORDS, lora_request=task, use_tqdm=False)
            assert cosines(np.array([output.embedding for output in made]), each).min() > 0.99999
        mixed = engine.embed(WORDS, lora_request=[tasks[1], None, tasks[3], tasks[2]], use_tqdm=False)
        expected = np.stack([wanted[task, row] for row, task in enumerate((1, 0, 3, 2))])
        assert cosines(np.array([output.embedding for output in mixed]), expected).min() > 0.99999


def test_adapters_that_are_damaged_are_refused(written: tuple[Path, list[Any]], tmp_path: Path) -> None:
    folder = written[0]
    assert task_adapter(folder / "clustering", AdapterLimits()) is None
    with pytest.raises(AdapterError, match="raise lora_memory"):
        task_adapter(folder / TASKS[0], AdapterLimits(max_bytes=10))
    config = {"lora_adaptations": TASKS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = "roberta.embeddings.word_embeddings.parametrizations.weight.0.lora_A"
    for tensors, said in ({name: torch.zeros(2, 4, 4)}, "3 tasks"), ({"other": torch.zeros(1)}, "no adapters"):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(AdapterError, match=said):
            task_adapter(tmp_path / TASKS[1], AdapterLimits())
