# SPDX-License-Identifier: MIT
"""Writes a GGUF file in the shape of a published model: random weights, its real vocabulary, quantised by `quantize`.

    python benchmarks/cpu/shapes.py OUT.gguf --shape qwen3.5-0.8b --vocabulary ggml-vocab-qwen35.gguf [--isq q4k]

The vocabulary is one of the files in the source package of llama-cpp-python (vendor/llama.cpp/models). transformers
makes the weights, so the file has the layers of the published model, and other engines load it as such. What random
weights answer is noise; what a step costs is the same.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_MOST_IN_MEMORY = 4_500_000_000  # parameters
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-1.1b": (
        "LlamaForCausalLM",
        {
            "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
            "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "vocab_size": 32000,
        },
    ),
    "qwen3.5-0.8b": (
        "Qwen3_5ForCausalLM",
        {
            "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8,
            "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 16,
            "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
            "vocab_size": 248320, "max_position_embeddings": 262144, "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25,
                "mrope_interleaved": True, "mrope_section": [11, 11, 10],
            },
        },
    ),
    "qwen3.5-4b": (
        "Qwen3_5ForCausalLM",
        {
            "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 16,
            "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
            "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
            "vocab_size": 248320, "max_position_embeddings": 262144, "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25,
                "mrope_interleaved": True, "mrope_section": [11, 11, 10],
            },
        },
    ),
    "granite-4-h-tiny-10": (  # the first 10 of 40 layers, one of them attention
        "GraniteMoeHybridForCausalLM",
        {
            "hidden_size": 1536, "intermediate_size": 512, "shared_intermediate_size": 1024, "num_hidden_layers": 10,
            "layer_types": ["linear_attention"] * 5 + ["full_attention"] + ["linear_attention"] * 4,
            "num_attention_heads": 12, "num_key_value_heads": 4, "num_local_experts": 64, "num_experts_per_tok": 6,
            "mamba_n_heads": 48, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_d_conv": 4,
            "mamba_expand": 2, "embedding_multiplier": 12, "attention_multiplier": 0.0078125, "logits_scaling": 6,
            "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
            "vocab_size": 128256, "tie_word_embeddings": True,
        },
    ),
    "nemotron-3-nano-4b": (
        "NemotronHForCausalLM",
        {
            "hidden_size": 3136, "intermediate_size": 12544, "num_attention_heads": 40, "num_key_value_heads": 8,
            "head_dim": 128, "mamba_num_heads": 96, "mamba_head_dim": 80, "n_groups": 8, "ssm_state_size": 128,
            "conv_kernel": 4, "max_position_embeddings": 262144, "vocab_size": 128256,
            "hybrid_override_pattern": "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
        },
    ),
    "qwen3-4b": (
        "Qwen3ForCausalLM",
        {
            "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
            "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
    ),
    "llama-3.1-8b": (
        "LlamaForCausalLM",
        {
            "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "vocab_size": 128256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        },
    ),
    "qwen3-30b-a3b-8": (  # the first 8 of 48 layers
        "Qwen3MoeForCausalLM",
        {
            "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 8,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 151936, "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
    ),
    "gemma-4-e2b": (
        "Gemma4ForCausalLM",
        {
            "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "num_attention_heads": 8,
            "num_key_value_heads": 1, "head_dim": 256, "global_head_dim": 512, "sliding_window": 512,
            "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7, "num_kv_shared_layers": 20,
            "use_double_wide_mlp": True, "hidden_size_per_layer_input": 256, "final_logit_softcapping": 30.0,
            "vocab_size": 262144, "vocab_size_per_layer_input": 262144, "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
"""Class in transformers, and its configuration, by name."""


def write_folder(folder: Path, shape: str, vocabulary: Path) -> None:
    """A Hugging Face folder with random weights in bfloat16 and the vocabulary's tokenizer."""
    import torch

    from candle_vllm.core.loading.gguf import GgufFile
    from candle_vllm.core.text.tokenizer import Tokenizer

    name, fields = SHAPES[shape]
    torch.manual_seed(0)
    family = getattr(importlib.import_module("transformers"), name)
    config = family.config_class(**fields)
    tokenizer = Tokenizer.from_gguf(GgufFile(vocabulary).metadata)
    end = next(
        name
        for name in ("<|im_end|>", "<|eot_id|>", "<turn|>", "</s>")
        if tokenizer.backend.token_to_id(name) is not None
    )
    config.eos_token_id = tokenizer.backend.token_to_id(end)
    with torch.device("meta"):
        model = family(config)
    if sum(weight.numel() for weight in model.parameters()) > _MOST_IN_MEMORY:
        _write_weights(folder, model)
    else:
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        model.tie_weights()
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        model.save_pretrained(folder)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))


def _write_weights(folder: Path, model: Any) -> None:
    """The same for a model too large for memory: tensors under their modules' names, whose numbers come in repeats."""
    import torch

    model.config.architectures, model.config.dtype = [type(model).__name__], "bfloat16"
    model.config.save_pretrained(folder)
    header, end = dict[str, Any](), 0
    for name, weight in model.named_parameters():
        begin, end = end, end + 2 * weight.numel()
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [begin, end]}
    for name, buffer in model.named_buffers():
        if name in model.state_dict():
            begin, end = end, end + 2 * buffer.numel()
            header[name] = {"dtype": "BF16", "shape": list(buffer.shape), "data_offsets": [begin, end]}
    numbers = (torch.randn(1 << 24) * 0.02).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done in range(0, end, len(numbers)):
            file.write(numbers[: end - done])


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--vocabulary", type=Path, metavar="VOCABULARY.gguf", required=True)
    parser.add_argument("--isq", default="q4k")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), given.shape, given.vocabulary)
        command = ("quantize", "--m", folder, "--out", str(given.out), "--isq", given.isq, "--force")
        subprocess.run([sys.executable, "-m", "candle_vllm.server.cli", *command], check=True)


if __name__ == "__main__":
    main()
