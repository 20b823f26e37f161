# SPDX-License-Identifier: MIT
"""Train the two small models that tests and benchmarks let speak; both keep states.

    python benchmarks/train_small.py lfm2 qwen3.5 [--folder packages/core/tests/models/speaking] [--steps 700]

`lfm2` has short convolutions, `qwen3.5` gated delta nets and a layer that predicts further tokens (MTP); each has less
than 1 M parameters and bytes for tokens. They are trained on the docstrings of Python's standard library, those of
`HELD_OUT` left out, on one thread of the CPU and with a fixed seed. What is written is a folder as transformers saves
it, in bfloat16. Another processor, PyTorch or Python rounds or reads otherwise and gives other weights of the same
quality.

transformers has no MTP layer for these models, so the one here is a block of transformers with the published names:
at position p it reads the embedding of token p + 1 and the last norm's result of p, and predicts token p + 2. It is
trained together with the model, and on its own result as well, from which further tokens are drafted.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from candle_vllm.core.testing.toy_model import SPECIAL_TOKENS, TOY_VOCAB_SIZE, write_toy_tokenizer

FOLDER = Path(__file__).parents[1] / "packages/core/tests/models/speaking"
HELD_OUT = ("calendar", "heapq", "random", "statistics", "textwrap")
"""Modules whose docstrings no model has seen."""
END = 256 + SPECIAL_TOKENS.index("<|endoftext|>")  # behind each docstring
SEED, LENGTH, BATCH = 48, 256, 8

COMMON: dict[str, Any] = {
    "vocab_size": TOY_VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "pad_token_id": END,
    "bos_token_id": END,
    "eos_token_id": END + 2,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": (
        "lfm2",
        {
            "num_hidden_layers": 6,
            "layer_types": ["conv", "conv", "full_attention", "conv", "full_attention", "conv"],
            "conv_L_cache": 3,
            "block_auto_adjust_ff_dim": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "qwen3.5": (
        "qwen3_5_text",
        {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
}


# ---- text ------------------------------------------------------------------------------------------------------------


def docstrings(*modules: str) -> Iterator[str]:
    """The docstrings of modules of the standard library, of those whose source is there; of a package, of all files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for module in modules:
        package = sorted((root / module).rglob("*.py"))
        for path in [root / f"{module}.py", *(each for each in package if "test" not in str(each.relative_to(root)))]:
            if not path.is_file():
                continue
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    found = ast.get_docstring(node)
                    if found and len(found) > 40:
                        yield found


def tokens_of(*modules: str) -> torch.Tensor:
    """Bytes, each docstring followed by the token of its end."""
    return torch.tensor([token for text in docstrings(*modules) for token in (*text.encode(), END)])


# ---- the layer for further tokens ------------------------------------------------------------------------------------


class NextTokens(torch.nn.Module):
    """One block of the model's kind behind norms and a matrix, named as published checkpoints name it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        config, self.model = model.config, [model]  # in a list, so that its parameters are not this layer's
        norm, block = type(model.model.norm), type(model.model.layers[-1])
        self.fc = torch.nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = (
            norm(config.hidden_size, config.rms_norm_eps) for _ in range(3)
        )
        self.layers = torch.nn.ModuleList([block(config, config.layer_types.index("full_attention"))])

    def forward(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states [B, T, E] and the tokens behind them [B, T] -> this layer's hidden states [B, T, E]."""
        inner, count = self.model[0].model, tokens.shape[1]
        embedded = self.pre_fc_norm_embedding(inner.embed_tokens(tokens))
        x = self.fc(torch.cat([embedded, self.pre_fc_norm_hidden(states)], -1))
        places = torch.arange(count)[None]
        mask = torch.full((count, count), -torch.inf).triu(1)[None, None]
        rotary = inner.rotary_emb(x, places)
        out = self.layers[0](x, attention_mask=mask, position_ids=places, position_embeddings=rotary)
        return self.norm(out[0] if isinstance(out, tuple) else out)


# ---- training --------------------------------------------------------------------------------------------------------


def build(name: str) -> tuple[Any, NextTokens | None]:
    """A model with random weights, and its layer for further tokens."""
    model_type, fields = SHAPES[name]
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(model_type, **COMMON | fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    layer = NextTokens(model) if name == "qwen3.5" else None
    if layer is not None:
        layer.apply(model._init_weights)
    return model, layer


def losses(model: Any, layer: NextTokens | None, batch: torch.Tensor) -> list[torch.Tensor]:
    """Mean cross entropy in nats of the next token, and of the layer's first and second token; batch [B, T + 3]."""
    count = batch.shape[1] - 3
    states = model.model(batch[:, :count]).last_hidden_state
    found = [_cross_entropy(model, states, batch[:, 1 : count + 1])]
    if layer is None:
        return found
    for ahead in (1, 2):
        states = layer(states, batch[:, ahead : count + ahead])
        found.append(_cross_entropy(model, states, batch[:, ahead + 1 : count + ahead + 1]))
    return found


def _cross_entropy(model: Any, states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model.lm_head(states).flatten(0, 1), wanted.flatten())


def train(name: str, folder: Path, steps: int) -> None:
    """Train a model and write its folder."""
    seen = sorted(sys.stdlib_module_names - {*HELD_OUT, "idlelib", "lib2to3", "test", "turtledemo"})
    text, held_out = tokens_of(*seen), tokens_of(*HELD_OUT)
    model, layer = build(name)
    own = [*model.named_parameters(), *(layer.named_parameters() if layer is not None else ())]
    matrices = [each for key, each in own if each.dim() == 2 and "embed" not in key]
    others = [each for key, each in own if each.dim() != 2 or "embed" in key]
    optimisers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.97), weight_decay=0.0),
    ]
    rates = [torch.optim.lr_scheduler.LambdaLR(each, functools.partial(_rate, steps=steps)) for each in optimisers]
    print(f"{name}: {sum(each.numel() for _, each in own)} parameters, {len(text)} tokens", flush=True)
    random, began = torch.Generator().manual_seed(SEED), time.perf_counter()
    for step in range(steps):
        starts = torch.randint(0, len(text) - LENGTH - 3, (BATCH,), generator=random)
        batch = torch.stack([text[start : start + LENGTH + 3] for start in starts.tolist()])
        found = losses(model, layer, batch)
        (found[0] + 0.2 * sum(found[1:])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser, rate in zip(optimisers, rates, strict=True):
            optimiser.step()
            rate.step()
            optimiser.zero_grad()
        if step % 20 == 19 or step + 1 == steps:
            shown = ", ".join(f"{each.item():.3f}" for each in found)
            print(f"step {step + 1}: {shown} nats, {time.perf_counter() - began:.0f} s", flush=True)
    digest = write(model, layer, folder)
    with torch.no_grad():
        whole = losses(model, layer, held_out[: len(held_out) // 1024 * 1024].view(-1, 1024)[:8])
    shown = ", ".join(f"{math.exp(each.item()):.3f}" for each in whole)
    print(f"{folder}: sha256 {digest}; perplexity of what was held out, by byte: {shown}", flush=True)


def _rate(step: int, *, steps: int) -> float:
    """Rises for 20 steps, stays, and falls to 0 over the last half."""
    return min((step + 1) / 20, 1.0, 2 * (steps - step) / steps)


def write(model: Any, layer: NextTokens | None, folder: Path) -> str:
    """Write config, tokenizer and weights, in bfloat16, which the model has afterwards; returns their sha256."""
    for part in (model, layer):
        for each in part.parameters() if part is not None else ():
            each.data = each.data.bfloat16().float()
    weights = {key: each for key, each in model.state_dict().items() if key != "lm_head.weight"}
    if layer is not None:
        weights |= {f"mtp.{key}": each for key, each in layer.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    kept = {key: each.bfloat16().contiguous() for key, each in sorted(weights.items())}
    save_file(kept, path, {"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    if layer is not None:
        config["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    write_toy_tokenizer(folder)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=SHAPES)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="each model has one of its name in it")
    parser.add_argument("--steps", type=int, default=700)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.names:
        train(name, given.folder / name, given.steps)


if __name__ == "__main__":
    main()
