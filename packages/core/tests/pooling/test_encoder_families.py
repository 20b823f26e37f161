# SPDX-License-Identifier: MIT
"""Every family of encoders against transformers: vectors, scores and classes of small random models."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFWriter
from safetensors.torch import save_file
from torch.nn import functional

from candle_vllm.core import InferenceEngine, UnsupportedModelError
from candle_vllm.core.errors import InvalidFileError
from candle_vllm.core.fields import read_json
from candle_vllm.core.layers.attention import alibi_slopes
from candle_vllm.core.loading.rope import inverse_frequencies
from candle_vllm.core.loading.safetensors import open_safetensors
from candle_vllm.core.loading.weights import expand
from candle_vllm.core.models.deberta import rows_of_distances
from candle_vllm.core.models.registry import encoder_from_hf
from candle_vllm.core.models.trunks import prefixed
from candle_vllm.core.pooling import PoolingKind, PoolingParams
from candle_vllm.core.text.tokenizer import Tokenizer
from packages.core.tests.pooling.test_encoders import add_words, write_out
from packages.core.tests.toy_encoder import TOY_ENCODER_VOCAB_SIZE, write_toy_encoder

TEXTS = ["hello", "a", "the quick brown fox", "jumps over the lazy dog, twice!", "x" * 90, "w " * 70]
SIZES = {"vocab_size": TOY_ENCODER_VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 130, "pad_token_id": 0}


@dataclasses.dataclass(frozen=True)
class Row:
    """A model class of transformers, and what its config says beside the sizes.

    Attributes:
        folders: published: as `save_pretrained` writes it, with the names of the repositories; plain: with those of the
            class. Of most families these are the same.
    """

    name: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    head: str = ""
    architecture: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        return {self.renamed.get(key, key): value for key, value in SIZES.items()} | self.config


DISTIL = {"hidden_size": "dim", "intermediate_size": "hidden_dim", "num_hidden_layers": "n_layers"}
DISTIL |= {"num_attention_heads": "n_heads"}
IDS = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
BIASES = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), True)
GEMMA = {"num_hidden_layers": 6, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}
GEMMA |= {"use_bidirectional_attention": True, "sliding_window": 12, "sliding_window_pattern": 3}
DEBERTA = {"relative_attention": True, "share_att_key": True, "position_biased_input": False, "type_vocab_size": 0}
DEBERTA |= {"pos_att_type": ["c2p", "p2c"], "norm_rel_ebd": "layer_norm", "position_buckets": 16}
ROWS = [
    Row("NomicBertModel", head="NomicBertForSequenceClassification"),
    Row("GteModel", head="GteForSequenceClassification"),
    Row("GteModel", {"type_vocab_size": 0, "hidden_act": "gelu_new"}, architecture="NewModel"),
    Row("JinaEmbeddingsV3Model", {"pad_token_id": 1}),
    Row("MPNetModel", head="MPNetForSequenceClassification"),
    Row("DistilBertModel", renamed=DISTIL, head="DistilBertForSequenceClassification"),
    Row("DistilBertModel", {"activation": "relu"}, renamed=DISTIL),
    Row("ModernBertModel", {"local_attention": 16, **IDS}, head="ModernBertForSequenceClassification"),
    Row("Gemma3TextModel", GEMMA),
    Row("ModernBertModel", {"local_attention": 10, **BIASES, **IDS}, head="ModernBertForSequenceClassification"),
]
ROWS += [
    Row("DebertaV2Model", DEBERTA, head="DebertaV2ForSequenceClassification"),
    Row("DebertaV2Model", {**DEBERTA, "position_buckets": -1, "max_relative_positions": 20}),
]
NAMES = [f"{row.name}-{number}" for number, row in enumerate(ROWS)]


def write(folder: Path, row: Row, name: str, *, plain: bool = False, **more: Any) -> tuple[Path, Any]:
    """A random model of a class in transformers, as a folder, and the model."""
    torch.manual_seed(0)
    kind: Any = getattr(transformers, name)
    model = kind(kind.config_class(**row.settings | more)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            spread = 1.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            centre = 1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape))
    write_toy_encoder(folder)
    model.save_pretrained(folder)
    if plain:
        weights = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
    if row.architecture:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": [row.architecture]}))
    return folder, model


def states(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).last_hidden_state[0].double().numpy()


POOLED: dict[PoolingKind, Callable[[np.ndarray], np.ndarray]] = {
    "mean": lambda found: found.mean(0),
    "cls": lambda found: found[0],
    "last": lambda found: found[-1],
}


def cosines(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return (found * wanted).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1)


def vectors(engine: InferenceEngine, params: PoolingParams | None = None) -> np.ndarray:
    return np.array([output.embedding for output in engine.embed(TEXTS, params, use_tqdm=False)], np.float64)


@pytest.mark.one_of_each(5)
@pytest.mark.parametrize("row", ROWS, ids=NAMES)
@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "op by op"])
def test_vectors_equal_transformers(row: Row, eager: bool, tmp_path: Path) -> None:
    folder, model = write(tmp_path, row, row.name, plain=eager and not row.architecture)
    ids = [Tokenizer.from_folder(folder).encode(text) for text in TEXTS]
    with InferenceEngine(str(folder), op_by_op=eager, dtype="fp32") as engine:
        for kind, pool in POOLED.items():
            wanted = np.stack([pool(states(model, text)) for text in ids])
            found = vectors(engine, PoolingParams(pooling=kind, normalize=False))
            assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
            assert cosines(found, wanted).min() > 0.99999
        together = vectors(engine)
        alone = np.array([engine.embed([text], use_tqdm=False)[0].embedding for text in TEXTS], np.float64)
        in_torch = eager or "Deberta" in row.name
        assert np.abs(together - alone).max() <= (1e-6 if in_torch else 0)
    if not eager:
        with InferenceEngine(str(folder)) as engine:
            assert cosines(vectors(engine), together).min() > 0.99999


KEYS: dict[str, dict[str, Any]] = {
    "bert": {},
    "nomic-bert": {"rope.freq_base": 1000.0},
    "jina-bert-v3": {"rope.freq_base": 20000.0},
    "modern-bert": {"rope.freq_base": 160000.0, "rope.freq_base_swa": 10000.0, "attention.sliding_window": 16},
    "gemma-embedding": {
        "rope.freq_base": 1e6, "rope.freq_base_swa": 10000.0, "attention.sliding_window": 12,
        "attention.head_count_kv": 2, "attention.key_length": 16, "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": 1e-6, "attention.sliding_window_pattern": 3,
    },
    "jina-bert-v2": {},
}  # fmt: skip
ARCHITECTURES = {
    "bert": ROWS[5],
    "nomic-bert": ROWS[0],
    "jina-bert-v3": ROWS[3],
    "modern-bert": ROWS[7],
    "gemma-embedding": ROWS[8],
}


@pytest.mark.parametrize("name", KEYS)
def test_gguf_files_give_the_same(name: str, tmp_path: Path) -> None:
    """Files with the names, fused matrices and keys of llama.cpp's converter."""
    if name == "jina-bert-v2":
        folder, layers = write_jina_v2(tmp_path / "m")[0], 3
    else:
        folder, model = write(tmp_path / "m", ARCHITECTURES[name], ARCHITECTURES[name].name)
        layers = model.config.num_hidden_layers
    described = encoder_from_hf(read_json(folder / "config.json"), folder / "config.json")
    assert described is not None
    family, config = described
    writer = GGUFWriter(tmp_path / "m.gguf", name)
    numbers: dict[str, Any] = {"context_length": config.max_position, "embedding_length": 32, "feed_forward_length": 48}
    numbers |= {"block_count": layers, "attention.head_count": 4, "pooling_type": 1}
    for key, value in (numbers | {"attention.layer_norm_epsilon": config.norm_eps} | KEYS[name]).items():
        add: Any = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{name}.{key}", value)
    add_words(writer, folder)
    with open_safetensors(folder) as checkpoint:
        table, found = family.weights(config, checkpoint.tensors), dict[str, list[np.ndarray]]()
        if name == "gemma-embedding":
            checkpoint = prefixed(checkpoint)
        for ours, theirs in zip(expand(table, config), expand(table, config, "gguf"), strict=True):
            stored = ours.find(checkpoint.tensors)
            if stored is not None and theirs.names:
                parts = found.setdefault(theirs.spelled[-1], [])
                parts.append(np.array(ours.look(checkpoint.tensors[stored], stored, config).load("F32")))
        for key, parts in found.items():
            writer.add_tensor(key, np.concatenate(parts))
    write_out(writer)
    with InferenceEngine(str(folder)) as engine, InferenceEngine(str(tmp_path / "m.gguf")) as made:
        assert made.model_info.num_parameters == sum(each.size for parts in found.values() for each in parts)
        assert np.abs(vectors(made) - vectors(engine)).max() < 1e-5


def write_jina_v2(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A random model with the names of jina's repositories."""
    random, wide = torch.Generator().manual_seed(0), TOY_ENCODER_VOCAB_SIZE
    shapes: dict[str, tuple[int, ...]] = {"word_embeddings.weight": (wide, 32), "token_type_embeddings.weight": (2, 32)}
    shapes |= {"LayerNorm.weight": (32,), "LayerNorm.bias": (32,)}
    shapes = {f"embeddings.{key}": shape for key, shape in shapes.items()}
    names = {f"attention.self.{part}": (32, 32) for part in ("query", "key", "value")}
    names |= {"attention.output.dense": (32, 32), "attention.output.LayerNorm": (32,), "mlp.layernorm": (32,)}
    for layer in range(3):
        at = f"encoder.layer.{layer}."
        for key, shape in (names | {"mlp.wo": (32, 48)}).items():
            shapes |= {f"{at}{key}.weight": shape, f"{at}{key}.bias": shape[:1]}
        shapes[f"{at}mlp.gated_layers.weight"] = (96, 32)
    weights = {key: torch.randn(shape, generator=random) * 1.5 * shape[-1] ** -0.5 for key, shape in shapes.items()}
    for key in weights:
        weights[key] += float("norm" in key.lower() and key.endswith("weight"))
    config = {**SIZES, "architectures": ["JinaBertForMaskedLM"], "model_type": "bert", "type_vocab_size": 2}
    config |= {"position_embedding_type": "alibi", "feed_forward_type": "geglu", "layer_norm_eps": 1e-12}
    write_toy_encoder(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder, weights


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "op by op"])
def test_jina_v2_written_out(eager: bool, tmp_path: Path) -> None:
    """transformers has no class of it: the model layer by layer in float64."""
    folder, stored = write_jina_v2(tmp_path)
    weights = {key: value.double() for key, value in stored.items()}

    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, (32,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    def encoded(ids: list[int]) -> np.ndarray:
        x = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.token_type_embeddings.weight"][0]
        x, places = norm(x, "embeddings.LayerNorm"), torch.arange(len(ids))
        bias = -torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256])[:, None, None] * (places - places[:, None]).abs()
        for layer in range(3):
            at = f"encoder.layer.{layer}."
            q, k, v = (product(x, f"{at}attention.self.{part}").unflatten(1, (4, 8)).transpose(0, 1)
                       for part in ("query", "key", "value"))  # fmt: skip
            mixed = ((q @ k.mT / 8**0.5 + bias).softmax(-1) @ v).transpose(0, 1).flatten(1)
            x = norm(x + product(mixed, f"{at}attention.output.dense"), f"{at}attention.output.LayerNorm")
            gate, up = product(x, f"{at}mlp.gated_layers").chunk(2, -1)
            x = norm(x + product(functional.gelu(gate) * up, f"{at}mlp.wo"), f"{at}mlp.layernorm")
        return x.mean(0).numpy()

    wanted = np.stack([encoded(Tokenizer.from_folder(folder).encode(text)) for text in TEXTS])
    with InferenceEngine(str(folder), op_by_op=eager, dtype="fp32") as engine:
        found = vectors(engine, PoolingParams(normalize=False))
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_slopes_of_heads_that_are_no_power_of_two() -> None:
    assert alibi_slopes(12)[:8] == pytest.approx([2.0**-n for n in range(1, 9)])
    assert alibi_slopes(12)[8:] == pytest.approx([2 ** -(n + 0.5) for n in range(4)])


def test_rows_of_distances_are_those_of_transformers() -> None:
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    settings = {**SIZES, **DEBERTA, "position_buckets": 256, "max_position_embeddings": 512}
    found = encoder_from_hf({"architectures": ["DebertaV2Model"], **settings}, Path("config.json"))
    assert found is not None
    wanted = make_log_bucket_position(torch.arange(-511, 512), 256, 512).long() + 256
    assert rows_of_distances(found[1]).tolist() == wanted.clamp(0, 511).tolist()  # type: ignore[arg-type]


def test_published_configs_are_read(tmp_path: Path) -> None:
    """nomic's own names of sizes, and GTE's stretched rotary positions, whose frequencies stand here as formulas."""
    nomic = {"n_embd": 32, "n_inner": 48, "n_layer": 3, "n_head": 4, "n_positions": 130, "rotary_emb_base": 1000}
    nomic |= {"layer_norm_epsilon": 1e-12, "activation_function": "swiglu", "vocab_size": 40, "type_vocab_size": 2}
    plain = {**SIZES, "vocab_size": 40, "type_vocab_size": 2, "hidden_act": "silu"}
    published, known = (
        encoder_from_hf({"architectures": ["NomicBertModel"]} | each, tmp_path) for each in (nomic, plain)
    )
    assert published is not None
    assert known is not None
    assert published[1] == known[1]
    for key, value in {"num_experts": 8, "activation_function": "gelu", "qkv_proj_bias": True}.items():
        with pytest.raises(UnsupportedModelError, match=f"{key} is"):
            encoder_from_hf({"architectures": ["NomicBertModel"], **nomic, key: value}, tmp_path)
    gte = {"architectures": ["NewModel"], **SIZES, "rope_theta": 500.0, "rope_scaling": {"type": "ntk", "factor": 2.0}}
    stretched = encoder_from_hf(gte, tmp_path)
    assert stretched is not None
    settings: Any = stretched[1]
    found = inverse_frequencies(settings.rope, 130)
    assert found == pytest.approx([1 / (1000 ** (n / 8)) / 2 ** (2 / 8) for n in range(0, 8, 2)])
    modern = {"architectures": ["ModernBertModel"], **SIZES, "rope_scaling": {"type": "linear", "factor": 2.0}}
    stretched = encoder_from_hf(modern, tmp_path)
    assert stretched is not None
    settings = stretched[1]
    assert [(rope.kind, rope.factor, rope.theta) for rope in (settings.rope, settings.local_rope)] == [
        ("linear", 2.0, 160000.0),
        ("linear", 2.0, 10000.0),
    ]


@pytest.mark.one_of_each
@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("RobertaModel", {"type_vocab_size": 1, "pad_token_id": -5}, "pad_token_id is -5; it must be -1 or more"),
        ("DebertaV2Model", {"position_buckets": 1}, "1 buckets of -1 relative positions"),
        ("DebertaV2Model", {"max_relative_positions": 1 << 62}, "relative positions are not possible"),
        ("DebertaV2Model", {"pos_att_type": 5}, "pos_att_type is 5, not a list"),
    ],
)
def test_impossible_positions_are_refused(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidFileError, match=message):
        encoder_from_hf({"architectures": [name], **SIZES, **DEBERTA, **change}, tmp_path)


@pytest.mark.parametrize("row", [row for row in ROWS if row.head], ids=lambda row: row.head)
@pytest.mark.parametrize("labels", [1, 3])
def test_heads_equal_transformers(row: Row, labels: int, tmp_path: Path) -> None:
    more: dict[str, Any] = {"classifier_pooling": "mean" if labels == 3 else "cls"} if "ModernBert" in row.head else {}
    folder, model = write(tmp_path, row, row.head, num_labels=labels, **more)
    tokenizer = Tokenizer.from_folder(folder)
    for eager in (False, True):
        with InferenceEngine(str(folder), op_by_op=eager, dtype="fp32") as engine:
            found = np.array([output.probs for output in engine.classify(TEXTS, use_tqdm=False)])
            for text, probabilities in zip(TEXTS, found, strict=True):
                with torch.no_grad():
                    logits = model(torch.tensor([tokenizer.encode(text)])).logits[0]
                wanted = logits.sigmoid() if labels == 1 else logits.softmax(-1)
                assert np.abs(probabilities - wanted.numpy()).max() < 1e-4
            if labels == 1:
                pair = "what is it", "a fox"
                ids, types = tokenizer.encode_pair(*pair)
                typed = (
                    {"token_type_ids": torch.tensor([types])} if getattr(model.config, "type_vocab_size", 1) > 1 else {}
                )
                with torch.no_grad():
                    wanted = model(torch.tensor([ids]), **typed).logits[0, 0].sigmoid()
                assert abs(engine.score([pair], use_tqdm=False)[0].score - float(wanted)) < 1e-4


def write_nomic_moe(folder: Path) -> dict[str, torch.Tensor]:
    """A random model with the names of nomic-embed-text-v2-moe."""
    random, experts = torch.Generator().manual_seed(0), 4
    shapes: dict[str, tuple[int, ...]] = {"embeddings.word_embeddings.weight": (TOY_ENCODER_VOCAB_SIZE, 32)}
    shapes |= {"embeddings.token_type_embeddings.weight": (1, 32)}
    sizes: dict[str, tuple[int, ...]] = {"emb_ln": (32,)}
    for layer in range(3):
        at = f"encoder.layers.{layer}."
        sizes |= {f"{at}attn.Wqkv": (96, 32), f"{at}attn.out_proj": (32, 32), f"{at}norm1": (32,), f"{at}norm2": (32,)}
        if layer % 2:
            shapes |= {f"{at}mlp.router.layer.weight": (experts, 32), f"{at}mlp.experts.bias": (32,)}
            shapes |= {f"{at}mlp.experts.mlp.{name}": (experts * 48, 32) for name in ("w1", "w2")}
        else:
            sizes |= {f"{at}mlp.fc1": (48, 32), f"{at}mlp.fc2": (32, 48)}
    for name, shape in sizes.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    weights = {key: torch.randn(shape, generator=random) * 1.5 * shape[-1] ** -0.5 for key, shape in shapes.items()}
    for key in weights:
        weights[key] += float(("norm" in key or "emb_ln" in key) and key.endswith("weight"))
    config = {"architectures": ["NomicBertModel"], "vocab_size": TOY_ENCODER_VOCAB_SIZE, "n_embd": 32, "n_inner": 48}
    config |= {"n_layer": 3, "n_head": 4, "n_positions": 130, "type_vocab_size": 1, "layer_norm_epsilon": 1e-5}
    config |= {"rotary_emb_base": 10000.0, "activation_function": "gelu", "qkv_proj_bias": True, "mlp_fc1_bias": True}
    config |= {"mlp_fc2_bias": True, "num_experts": experts, "moe_top_k": 2, "moe_every_n_layers": 2}
    write_toy_encoder(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return weights


def nomic_moe_states(stored: dict[str, torch.Tensor], ids: list[int], *, bias: bool) -> np.ndarray:
    """Hidden states, layer by layer in float64; of the experts' sum with its bias, which GGUF files lack."""
    weights = {key: value.double() for key, value in stored.items()}

    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, (32,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    x = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.token_type_embeddings.weight"][0]
    x, angles = norm(x, "emb_ln"), torch.arange(len(ids))[:, None] * 10000.0 ** -(torch.arange(4).double() / 4)
    turn = torch.polar(torch.ones_like(angles), angles)
    for layer in range(3):
        at = f"encoder.layers.{layer}."
        q, k, v = product(x, f"{at}attn.Wqkv").unflatten(1, (3, 4, 8)).permute(1, 2, 0, 3)
        q, k = (torch.complex(*each.chunk(2, -1)) * turn for each in (q, k))
        q, k = (torch.cat([each.real, each.imag], -1) for each in (q, k))
        mixed = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = norm(x + product(mixed, f"{at}attn.out_proj"), f"{at}norm1")
        if layer % 2 == 0:
            y = product(functional.gelu(product(x, f"{at}mlp.fc1")), f"{at}mlp.fc2")
        else:
            shares, chosen = (x @ weights[f"{at}mlp.router.layer.weight"].T).softmax(-1).topk(2)
            first, second = (weights[f"{at}mlp.experts.mlp.{name}"].unflatten(0, (4, 48)) for name in ("w1", "w2"))
            each = torch.stack([functional.gelu(x @ a.T) @ b for a, b in zip(first, second, strict=True)], 1)
            y = (each.gather(1, chosen[..., None].expand(-1, -1, 32)) * shares[..., None]).sum(1)
            y = y + weights[f"{at}mlp.experts.bias"] if bias else y
        x = norm(x + y, f"{at}norm2")
    return x.numpy()


@pytest.mark.parametrize("form", ["compiled", "op by op", "gguf"])
def test_nomic_v2_written_out(form: str, tmp_path: Path) -> None:
    stored, path = write_nomic_moe(tmp_path), tmp_path
    if form == "gguf":
        path = tmp_path / "m.gguf"
        writer = GGUFWriter(path, "nomic-bert-moe")
        numbers: dict[str, Any] = {"context_length": 130, "embedding_length": 32, "feed_forward_length": 48}
        numbers |= {"block_count": 3, "attention.head_count": 4, "pooling_type": 1, "rope.freq_base": 10000.0}
        numbers |= {"attention.layer_norm_epsilon": 1e-5, "expert_count": 4, "expert_used_count": 2}
        for key, value in (numbers | {"moe_every_n_layers": 2}).items():
            add: Any = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"nomic-bert-moe.{key}", value)
        add_words(writer, tmp_path)
        names = {"embeddings.word_embeddings": "token_embd", "embeddings.token_type_embeddings": "token_types"}
        names |= {"emb_ln": "token_embd_norm", "attn.Wqkv": "attn_qkv", "attn.out_proj": "attn_output"}
        names |= {"norm1": "attn_output_norm", "norm2": "layer_output_norm", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"}
        names |= {"mlp.router.layer": "ffn_gate_inp", "encoder.layers": "blk"}
        names |= {"mlp.experts.mlp.w1": "ffn_up_exps.weight", "mlp.experts.mlp.w2": "ffn_down_exps.weight"}
        for key, value in stored.items():
            array, name = value.numpy(), key
            for theirs, ours in names.items():
                name = name.replace(theirs, ours)
            if name.endswith("exps.weight"):
                array = array.reshape(4, 48, 32)
                array = array.swapaxes(1, 2) if "down" in name else array
            if "experts.bias" not in name:
                writer.add_tensor(name, np.ascontiguousarray(array))
        write_out(writer)
    ids = [Tokenizer.from_folder(tmp_path).encode(text) for text in TEXTS]
    wanted = np.stack([nomic_moe_states(stored, each, bias=form != "gguf").mean(0) for each in ids])
    with InferenceEngine(str(path), op_by_op=form == "op by op", dtype="fp32") as engine:
        found = vectors(engine, PoolingParams(normalize=False))
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
