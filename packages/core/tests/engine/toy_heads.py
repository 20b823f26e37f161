# SPDX-License-Identifier: MIT
"""Random heads that draft for toy models, and what they compute, in plain torch and by their definitions alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from packages.core.tests.toy_gguf import add_toy_vocabulary

Weights = dict[str, torch.Tensor]


def eagle3_config(target: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A head's `config.json` for a toy model."""
    kept = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        **{key: target[key] for key in kept},
        "hidden_act": "silu",
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "draft_vocab_size": 200,
        "eagle_aux_hidden_state_layer_ids": [0, 1, target["num_hidden_layers"]],
    } | more


def eagle3_weights(config: Mapping[str, Any], seed: int = 0) -> Weights:
    """Random tensors, as SpecForge names them."""
    torch.manual_seed(seed)
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    target = config.get("target_hidden_size", hidden)
    streams, words = len(config["eagle_aux_hidden_state_layer_ids"]), config["draft_vocab_size"]
    shapes = {
        "fc.weight": (hidden, streams * target),
        "midlayer.self_attn.q_proj.weight": (heads, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (kv_heads, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (kv_heads, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, heads),
        "midlayer.mlp.gate_proj.weight": (inner, hidden),
        "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
        "lm_head.weight": (words, hidden),
    }
    made = {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    norms = {
        f"midlayer.{name}.weight": hidden for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    }
    norms["norm.weight"] = hidden
    if config.get("norm_before_fc"):
        norms["input_norm.weight"] = streams * target
    if config.get("fc_norm"):
        norms |= {f"fc_norm.{stream}.weight": target for stream in range(streams)}
    made |= {name: 1 + 0.2 * torch.randn(size) for name, size in norms.items()}
    chosen = torch.randperm(config["vocab_size"])[:words].sort().values
    made["d2t"] = chosen - torch.arange(words)
    made["t2d"] = torch.zeros(config["vocab_size"], dtype=torch.bool).index_fill(0, chosen, True)
    return made


def write_head(folder: Path, config: Mapping[str, Any], weights: Weights) -> Path:
    """Writes a head's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def write_gguf_head(path: Path, config: Mapping[str, Any], weights: Weights, taps: list[int]) -> Path:
    """The same head as llama.cpp's converter writes it: q and k by pairs of neighbours, `d2t` as tokens."""
    writer = GGUFWriter(path, "eagle3")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(1)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_array("eagle3.extract_layers", taps)
    writer.add_uint32("eagle3.target_hidden_size", config["hidden_size"])
    writer.add_bool("eagle3.norm_before_residual", False)
    add_toy_vocabulary(writer)
    names = {
        "fc.weight": "fc.weight",
        "norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
        "midlayer.hidden_norm.weight": "blk.0.attn_norm_2.weight",
        "midlayer.input_layernorm.weight": "blk.0.attn_norm.weight",
        "midlayer.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
        "midlayer.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    }
    names |= {f"midlayer.self_attn.{part}_proj.weight": f"blk.0.attn_{part}.weight" for part in "qkv"}
    names |= {f"midlayer.mlp.{part}_proj.weight": f"blk.0.ffn_{part}.weight" for part in ("gate", "up", "down")}
    for name, gguf in names.items():
        tensor = weights[name]
        if "q_proj" in name or "k_proj" in name:
            heads = tensor.unflatten(0, (-1, 2, config["head_dim"] // 2))
            tensor = heads.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(gguf, tensor.contiguous().numpy())
    writer.add_tensor("d2t", (weights["d2t"] + torch.arange(len(weights["d2t"]))).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- what they compute -----------------------------------------------------------------------------------------------


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _turned(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Heads [T, H, D] at positions 0, 1, ..., turned by halves."""
    half = x.shape[-1] // 2
    angles = torch.arange(len(x)).double()[:, None] * theta ** (-torch.arange(half).double() / half)
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def attended(config: Mapping[str, Any], x: torch.Tensor, weights: Weights, start: str) -> torch.Tensor:
    """Causal attention over all rows, with the weights whose names begin with `start`."""
    dim, count = config["head_dim"], len(x)
    q, k, v = (
        (x @ weights[f"{start}{part}_proj.weight"].T).unflatten(-1, (-1, dim)) for part in "qkv"
    )  # [T, H, D], [T, K, D] twice
    if f"{start}q_norm.weight" in weights:
        q = _normed(q, weights[f"{start}q_norm.weight"], config["rms_norm_eps"])
        k = _normed(k, weights[f"{start}k_norm.weight"], config["rms_norm_eps"])
    q, k = _turned(q, config["rope_theta"]), _turned(k, config["rope_theta"])
    each = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
    scores = torch.einsum("thd,shd->hts", q, k) * dim**-0.5
    scores = scores.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf)
    mixed = torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1)
    return mixed @ weights[f"{start}o_proj.weight"].T


def gated(x: torch.Tensor, weights: Weights, start: str) -> torch.Tensor:
    """The feed-forward layer."""
    gate, up = (x @ weights[f"{start}{part}_proj.weight"].T for part in ("gate", "up"))
    return (torch.nn.functional.silu(gate) * up) @ weights[f"{start}down_proj.weight"].T


def eagle3_rows(
    config: Mapping[str, Any], weights: Weights, table: torch.Tensor, fused: torch.Tensor, tokens: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and what is given back [T, ...], of a whole text's fused states [T, E] and the tokens behind them."""
    eps, names = config["rms_norm_eps"], "midlayer."
    embedded = _normed(
        weights.get("embed_tokens.weight", table)[tokens], weights[names + "input_layernorm.weight"], eps
    )
    normed = _normed(fused, weights[names + "hidden_norm.weight"], eps)
    residual = normed if config.get("norm_before_residual") else fused
    x = residual + attended(config, torch.cat([embedded, normed], -1), weights, names + "self_attn.")
    after = _normed(x, weights[names + "post_attention_layernorm.weight"], eps)
    x = x + gated(after, weights, names + "mlp.")
    out = _normed(x, weights["norm.weight"], eps)
    return out @ weights["lm_head.weight"].T, out if config.get("norm_output") else x


def eagle3_fused(config: Mapping[str, Any], weights: Weights, states: list[torch.Tensor]) -> torch.Tensor:
    """[T, E] of what goes into the layers that the head reads, [T, F] each."""
    eps = config["rms_norm_eps"]
    if config.get("fc_norm"):
        states = [_normed(each, weights[f"fc_norm.{n}.weight"], eps) for n, each in enumerate(states)]
    joined = torch.cat(states, -1)
    if config.get("norm_before_fc"):
        joined = _normed(joined, weights["input_norm.weight"], eps)
    return joined @ weights["fc.weight"].T


class NextTokens:
    """A model with a random layer for further tokens, whose block is of transformers' own making.

    Args:
        folder: the model, as transformers saves it.
        layout: "behind" the last layer, or "mtp"; "hy3" has other names behind the last layer, and gives back its norm.
    """

    def __init__(self, folder: Path, layout: str) -> None:
        from transformers import AutoModelForCausalLM

        from packages.core.tests.models.tiny import randomise

        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        self.model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        self.config, self.apart, hy3 = self.model.config, layout == "mtp", layout == "hy3"
        self.gives_norm = layout != "behind"
        torch.manual_seed(3)
        self.layer = type(self.model.model.layers[-1])(self.config, self.config.num_hidden_layers - 1).eval()
        randomise(self.layer)
        size = self.config.hidden_size
        self.project = torch.randn(size, 2 * size) * (2 * size) ** -0.5
        near_one = hasattr(self.config, "linear_num_value_heads")  # norms are stored as the distance from it
        distances = {name: 0.2 * torch.randn(size) for name in ("embedding", "hidden", "last")}
        self.norms = {name: 1 + distance for name, distance in distances.items()}
        layers = self.config.num_hidden_layers
        block, start = ("mtp.layers.0.", "mtp.") if self.apart else (f"model.layers.{layers}.",) * 2
        names = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm", "fc")
        last = "final_layernorm" if hy3 else "shared_head.norm"
        names = names if self.apart else ("enorm", "hnorm", last, "eh_proj")
        parts = (*(distances if near_one else self.norms).values(), self.project)
        self.tensors = {block + name: tensor for name, tensor in _apart(self.layer.state_dict()).items()}
        self.tensors |= {f"{start}{name}.weight": tensor for name, tensor in zip(names, parts, strict=True)}
        if hy3:
            parts = {"e_score_correction_bias": "expert_bias", "gate.weight": "router.gate.weight"}
            for old, new in parts.items():
                self.tensors[f"{block}mlp.{new}"] = self.tensors.pop(f"{block}mlp.{old}")
            self.tensors[f"{start}shared_head.weight"] = torch.randn(4, size)  # never used
        elif not self.apart:  # as they are published: copies of the model's own
            self.tensors[f"{start}embed_tokens.weight"] = self.model.model.embed_tokens.weight.detach().clone()
            self.tensors[f"{start}shared_head.head.weight"] = self.model.lm_head.weight.detach().clone()

    def write(self, folder: Path, source: Path, **fields: Any) -> Path:
        """Writes the model with its layer."""
        shutil.copytree(source, folder)
        config = json.loads((source / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))
        whole = load_file(source / "model.safetensors") | self.tensors
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, folder / "model.safetensors")
        return folder

    @torch.no_grad()
    def rows(self, states: torch.Tensor, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and what is given back [T, ...] of hidden states [T, E] and the tokens behind them."""
        eps, count = self.config.rms_norm_eps, len(tokens)
        embedded = _normed(self.model.model.embed_tokens.weight[tokens], self.norms["embedding"], eps)
        x = torch.cat([embedded, _normed(states, self.norms["hidden"], eps)], -1) @ self.project.T
        places = torch.arange(count)[None]
        turns = self.model.model.rotary_emb(x[None], places)
        mask = torch.full((count, count), -torch.inf).triu(1)[None, None]
        out = self.layer(x[None], attention_mask=mask, position_ids=places, position_embeddings=turns)
        x = (out[0] if isinstance(out, tuple) else out)[0]
        normed = _normed(x, self.norms["last"], eps)
        return normed @ self.model.lm_head.weight.T, normed if self.gives_norm else x

    @torch.no_grad()
    def last(self, tokens: tuple[int, ...], guesses: tuple[int, ...]) -> torch.Tensor:
        """Logits [V] of the guess behind a text and other guesses."""
        states = self.model.model(torch.tensor([tokens[:-1]])).last_hidden_state[0]
        given = list(tokens[1:])
        logits, back = self.rows(states, given)
        for guess in guesses:
            states, given = torch.cat([states, back[-1:]]), [*given, guess]
            logits, back = self.rows(states, given)
        return logits[-1]


def _apart(tensors: Weights) -> Weights:
    """A layer's tensors with those of each expert apart, as checkpoints have them."""
    made = dict(tensors)
    joined = made.pop("mlp.experts.gate_up_proj", None)
    if joined is not None:
        for expert, (both, down) in enumerate(zip(joined, made.pop("mlp.experts.down_proj"), strict=True)):
            parts = zip(("gate", "up", "down"), (*both.chunk(2), down), strict=True)
            made |= {f"mlp.experts.{expert}.{part}_proj.weight": tensor for part, tensor in parts}
    return made


@cache
def _model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def model_states(folder: Path, tokens: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What goes into each layer of a model and what comes of the last, [T, F] each, and its last norm's result."""
    model, kept = _model(folder), []
    hook = model.model.norm.register_forward_pre_hook(lambda module, given: kept.append(given[0][0]))
    with torch.no_grad():
        out = model.model(torch.tensor([tokens]), output_hidden_states=True)
    hook.remove()
    return [*(each[0] for each in out.hidden_states[:-1]), kept[0]], out.last_hidden_state[0]
