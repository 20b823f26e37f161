# SPDX-License-Identifier: MIT
"""The models that the GPU benchmarks measure: their sizes, and files that need no download.

    python benchmarks/gpu/models.py MODEL.gguf --shape llama-1.1b --mixture IQ2_XXS     writes one, for other benchmarks

A folder gets a config.json and a tokenizer, and its weights come from `load_format="dummy"`. A GGUF file is written
whole, in a mixture of types (`MIXTURES`): 8 million random weights, repeated, with scales that make them as large as a
model's, since arithmetic on zeros would run faster than on a model. The tokenizer has one token for each byte and
made-up words for all other ids, but no merges, so reading it is a little faster than reading a real one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder, and the keys of its config.json that are not sizes."""

    model_type: str
    architecture: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    tied: bool
    more: Mapping[str, Any]

    @property
    def layer_matrices(self) -> dict[str, tuple[int, int]]:
        """GGUF name -> [out, in] of one layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "attn_q": (query, self.hidden),
            "attn_k": (key, self.hidden),
            "attn_v": (key, self.hidden),
            "attn_output": (self.hidden, query),
            "ffn_gate": (self.inner, self.hidden),
            "ffn_up": (self.inner, self.hidden),
            "ffn_down": (self.hidden, self.inner),
        }

    @property
    def multiplied(self) -> int:
        """Weights that a token is multiplied with: all matrices of the layers, and the head."""
        return self.layers * sum(a * b for a, b in self.layer_matrices.values()) + self.vocabulary * self.hidden

    def kv_bytes(self, number: int = 2) -> int:
        """Cache of one token, with `number` bytes each."""
        return 2 * self.layers * self.kv_heads * self.head_dim * number


_LLAMA_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA_MORE = {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "rope_scaling": _LLAMA_ROPE}
_QWEN_MORE = {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6}
_TOY_MORE = {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}

SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "llama-3.1-8b": Shape(
            "llama", "LlamaForCausalLM", 32, 4096, 14336, 32, 8, 128, 128256, 131072, False, _LLAMA_MORE
        ),
        "qwen3-0.6b": Shape("qwen3", "Qwen3ForCausalLM", 28, 1024, 3072, 16, 8, 128, 151936, 40960, True, _QWEN_MORE),
        "llama-1.1b": Shape("llama", "LlamaForCausalLM", 22, 2048, 5632, 32, 4, 64, 32000, 2048, False, _TOY_MORE),
        "toy": Shape("llama", "LlamaForCausalLM", 2, 256, 512, 4, 2, 64, 512, 2048, False, _TOY_MORE),
    }
)
"""The last is for checking the benchmarks themselves."""


# ---- a folder --------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, shape: Shape) -> Path:
    """config.json and the tokenizer's files of a model in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [shape.architecture],
        "model_type": shape.model_type,
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "bfloat16",
        **shape.more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder, shape.vocabulary)
    return folder


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {word: index for index, word in enumerate(vocabulary_words(vocabulary))}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def vocabulary_words(count: int) -> list[str]:
    """Two special tokens, the 256 bytes in GPT-2's alphabet, one pair, and made-up words of letters."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(value) for value in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    words = ["<|begin|>", "<|end|>", *letters, "aa"]
    for number in range(count - len(words)):
        digits = f"{number:05d}"
        words.append("".join(chr(ord("a") + int(digit)) for digit in digits))
    return words


# ---- a GGUF file -----------------------------------------------------------------------------------------------------


class Mixture(NamedTuple):
    """The types of a file's matrices; `better` is of those that llama.cpp gives more bits in its Q4_K_M."""

    table: str
    usual: str
    better: str
    head: str


MIXTURES: Mapping[str, Mixture] = MappingProxyType(
    {"Q4_K_M": Mixture("Q4_K", "Q4_K", "Q6_K", "Q6_K"), "IQ2_XXS": Mixture("Q2_K", "IQ2_XXS", "IQ2_XXS", "Q5_K")}
)

# Bytes of 256 weights, where their floats are, and those that make the weights 0.02 large.
_BLOCKS: Mapping[str, tuple[int, int, tuple[float, ...]]] = MappingProxyType(
    {
        "Q2_K": (84, 80, (0.002, 0.002)),
        "Q4_K": (144, 0, (0.8e-4, 0.6e-3)),
        "Q5_K": (176, 0, (0.4e-4, 0.6e-3)),
        "Q6_K": (210, 208, (1.5e-5,)),
        "IQ2_XXS": (66, 0, (4e-4,)),
    }
)


def write_gguf(path: Path, shape: Shape, mixture: str = "Q4_K_M") -> Path:
    """A llama in a mixture of types."""
    from gguf import GGMLQuantizationType, GGUFWriter

    assert shape.model_type == "llama"
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.more["rms_norm_eps"])
    writer.add_rope_freq_base(shape.more["rope_theta"])
    words = vocabulary_words(shape.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges(["a a"])  # a file without merges has no byte-pair tokenizer
    writer.add_eos_token_id(1)
    tensors = list(gguf_tensors(shape, mixture))
    for name, kind, rows, columns in tensors:
        size = rows * columns * 4 if kind == "F32" else rows * row_bytes(kind, columns)
        numbers = (columns,) if kind == "F32" else (rows, columns)
        writer.add_tensor_info(name, numbers, np.dtype(np.float32), size, GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as stream:
        patterns = {kind: _blocks(kind, 1 << 15) for kind in set(MIXTURES[mixture])}
        for _, kind, rows, columns in tensors:
            stream.write(bytes(-stream.tell() % 32))
            if kind == "F32":
                stream.write(np.ones(columns, np.float32).tobytes())
            else:
                _write_repeated(stream, patterns[kind], rows * row_bytes(kind, columns))
        stream.write(bytes(-stream.tell() % 32))
    return path


def gguf_tensors(shape: Shape, mixture: str = "Q4_K_M") -> Iterator[tuple[str, str, int, int]]:
    """Name, type, rows and columns of every tensor; a norm is one row."""
    of = MIXTURES[mixture]
    yield "token_embd.weight", of.table, shape.vocabulary, shape.hidden
    for layer in range(shape.layers):
        yield f"blk.{layer}.attn_norm.weight", "F32", 1, shape.hidden
        yield f"blk.{layer}.ffn_norm.weight", "F32", 1, shape.hidden
        for name, (rows, columns) in shape.layer_matrices.items():
            better = name in ("attn_v", "ffn_down") and _more_bits(layer, shape.layers)
            yield f"blk.{layer}.{name}.weight", of.better if better else of.usual, rows, columns
    yield "output_norm.weight", "F32", 1, shape.hidden
    yield "output.weight", of.head, shape.vocabulary, shape.hidden


def gguf_read_bytes(shape: Shape) -> int:
    """Bytes of the matrices that every token is multiplied with."""
    return sum(
        rows * row_bytes(kind, columns)
        for name, kind, rows, columns in gguf_tensors(shape)
        if kind != "F32" and not name.startswith("token_embd")
    )


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of a quantised matrix, as the file has it."""
    assert columns % 256 == 0
    return columns // 256 * _BLOCKS[kind][0]


def _more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's rule for the layers whose v and down have 6 bits."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _blocks(kind: str, count: int) -> bytes:
    """Random blocks whose weights have a standard deviation of about 0.02."""
    size, at, floats = _BLOCKS[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (count, size), np.uint8)
    blocks[:, at : at + 2 * len(floats)] = np.array(floats, np.float16).view(np.uint8)
    return blocks.tobytes()


def _write_repeated(stream: Any, pattern: bytes, size: int) -> None:
    for start in range(0, size, len(pattern)):
        stream.write(pattern[: size - start])


def main() -> None:
    """Writes a GGUF file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    shapes = [name for name, shape in SHAPES.items() if shape.model_type == "llama"]
    parser.add_argument("--shape", choices=shapes, default="llama-1.1b")
    parser.add_argument("--mixture", choices=list(MIXTURES), default="Q4_K_M")
    options = parser.parse_args()
    write_gguf(options.model, SHAPES[options.shape], options.mixture)


if __name__ == "__main__":
    main()
