# SPDX-License-Identifier: MIT
"""Embeddings of texts by a compiled encoder, beside torch, sentence-transformers and ONNX Runtime, in turns.

    python -m benchmarks.cpu.encoders [--rounds 5] [--threads 2] [--models minilm base]
    python -m benchmarks.cpu.encoders --peers PYTHON [--rounds 5] [--threads 2] [--models minilm mpnet]
        [--texts 512] [--tokens 128] [--dtype auto]

The first form compares forward passes of token ids, in tokens per second: the sizes of all-MiniLM-L6-v2 and of
BERT-base with random weights, fp32, transformers' `BertModel` with its fastest attention. Needs transformers and torch.

With `--peers`, a Python that has sentence-transformers, onnx and onnxruntime, whole calls are compared, from texts to
normalised vectors: the published weights of all-MiniLM-L6-v2 and all-mpnet-base-v2, sentence-transformers' `encode` in
torch, and ONNX Runtime on the graph that its own optimizer fuses. Each peer computes in fp32 with the batch size that
is fastest for it, and stays loaded in a process of its own. A round runs all three in changing order; there is a line
for each, and last the medians of seconds and of the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from candle_vllm.core import InferenceEngine
from packages.core.tests.toy_encoder import TOY_ENCODER_VOCAB_SIZE, toy_encoder_config, write_toy_encoder
from tests.real_models import all_minilm, all_mpnet

SIZES: dict[str, dict[str, Any]] = {
    "minilm": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12},
    "base": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
}
PUBLISHED: dict[str, Callable[[], Path]] = {"minilm": all_minilm, "mpnet": all_mpnet}
SHAPES = ((1, 16), (1, 128), (1, 512), (32, 16), (32, 128))  # texts, tokens of each

PEERS = """
import json, os, sys, tempfile, time
os.environ["TOKENIZERS_PARALLELISM"] = "true"
folder, threads, texts = sys.argv[1], int(sys.argv[2]), json.loads(sys.stdin.readline())
import numpy as np, onnxruntime, torch, transformers
from onnxruntime.transformers import optimizer
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer

torch.set_num_threads(threads)
whole = SentenceTransformer(folder, device="cpu")
model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
names = ["input_ids", "attention_mask", "token_type_ids"][: 3 if model.config.model_type == "bert" else 2]

class Hidden(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model
    def forward(self, *given):
        return self.model(**dict(zip(names, given))).last_hidden_state

path = os.path.join(tempfile.mkdtemp(), "model.onnx")
example = whole.tokenizer(texts[:2], return_tensors="pt", padding=True)
axes = {name: {0: "texts", 1: "tokens"} for name in [*names, "hidden"]}
torch.onnx.export(Hidden(), tuple(example[name] for name in names), path, input_names=names, output_names=["hidden"],
                  dynamic_axes=axes, opset_version=17, dynamo=False)
fused = optimizer.optimize_model(path, model_type="bert", num_heads=model.config.num_attention_heads,
                                 hidden_size=model.config.hidden_size, opt_level=0)
fused.save_model_to_file(path)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
cut = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
cut.enable_padding(pad_id=whole.tokenizer.pad_token_id)

def torch_side(texts, batch):
    return whole.encode(texts, batch_size=batch, normalize_embeddings=True)

def onnx_side(texts, batch):
    made = []
    for first in range(0, len(texts), batch):
        found = cut.encode_batch(texts[first : first + batch])
        ids, mask = (np.array([getattr(each, name) for each in found], np.int64) for name in ("ids", "attention_mask"))
        feed = dict(zip(names, (ids, mask, np.zeros_like(ids))))
        vectors = (session.run(None, feed)[0] * mask[:, :, None]).sum(1) / mask.sum(1, keepdims=True)
        made.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return np.concatenate(made)

def seconds(side, texts, batch):
    began = time.perf_counter()
    side(texts, batch)
    return time.perf_counter() - began

sides, batches = {"sentence-transformers": torch_side, "onnxruntime": onnx_side}, {}
for name, side in sides.items():
    few = texts[:64]
    side(few, 32)
    batches[name] = min((8, 32, 64), key=lambda batch: seconds(side, few, batch))
vectors = {name: side(texts[:8], 8).tolist() for name, side in sides.items()}
print(json.dumps({"batches": batches, "vectors": vectors}), flush=True)
for name in sys.stdin:
    print(seconds(sides[name.strip()], texts, batches[name.strip()]), flush=True)
"""


def seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def beside_torch(folder: Path, rounds: int, threads: int) -> None:
    """One JSON line per shape: medians in tokens per second, and the median of the rounds' ratios."""
    import torch
    from transformers.models.bert.modeling_bert import BertModel

    torch.set_num_threads(threads)
    peer = BertModel.from_pretrained(folder, attn_implementation="sdpa", add_pooling_layer=False).eval()
    numbers = np.random.default_rng(0)
    with InferenceEngine(str(folder), threads=threads) as engine:
        for texts, length in SHAPES:
            ids = numbers.integers(5, TOY_ENCODER_VOCAB_SIZE, (texts, length)).tolist()
            tensor = torch.tensor(ids)

            def ours(ids: list[list[int]] = ids) -> np.ndarray:
                return np.array([output.embedding for output in engine.embed(ids, use_tqdm=False)])

            @torch.inference_mode()
            def theirs(tensor: torch.Tensor = tensor) -> np.ndarray:
                return torch.nn.functional.normalize(peer(tensor).last_hidden_state.mean(1)).numpy()

            away = float(np.abs(ours() - theirs()).max())  # warms up as well
            sides: tuple[list[float], list[float]] = [], []
            for number in range(rounds):
                for side, call in ((0, ours), (1, theirs)) if number % 2 else ((1, theirs), (0, ours)):
                    sides[side].append(min(seconds(call) for _ in range(3)))
            rate, peers = (texts * length / statistics.median(side) for side in sides)
            line = {"model": folder.name, "texts": texts, "tokens": length, "tok_s": round(rate), "torch": round(peers)}
            ratio = statistics.median(b / a for a, b in zip(*sides))
            print(json.dumps(line | {"ratio": round(ratio, 2), "largest_difference": away}), flush=True)


class Peers:
    """sentence-transformers and ONNX Runtime with one model and some texts, in a process of their own.

    Attributes:
        batches: texts of a batch, of each.
        vectors: of the first 8 texts, of each.
    """

    def __init__(self, python: str, folder: Path, texts: list[str], threads: int) -> None:
        command = [python, "-c", PEERS, str(folder), str(threads)]
        process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        self._asked, self._told = process.stdin, process.stdout
        print(json.dumps(texts), file=self._asked, flush=True)
        found = next(line for line in self._told if line.startswith("{"))  # exporters print, too
        self.batches, self.vectors = json.loads(found).values()

    def seconds(self, name: str) -> float:
        """Of all texts."""
        print(name, file=self._asked, flush=True)
        return float(self._told.readline())

    def close(self) -> None:
        """Ends the process."""
        self._asked.close()
        self._told.read()


def texts_of(engine: InferenceEngine, folder: Path, count: int, tokens: int) -> list[str]:
    """Texts of words that are one token each, two tokens fewer than `tokens` for what every text has around it."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and word.islower())
    chance = np.random.default_rng(0)
    made: list[str] = [" ".join(chance.choice(words, tokens - 2)) for _ in range(count)]
    assert {len(engine.tokenize(text)) for text in made} == {tokens}
    return made


def beside_peers(name: str, options: argparse.Namespace) -> None:
    """One JSON line per round: seconds of each side; then medians, and the medians of the ratios to ours."""
    folder = PUBLISHED[name]()
    with InferenceEngine(str(folder), threads=options.threads, dtype=options.dtype) as engine:
        texts = texts_of(engine, folder, options.texts, options.tokens)
        peers = Peers(options.peers, folder, texts, options.threads)
        found = np.array([output.embedding for output in engine.embed(texts[:8], use_tqdm=False)])
        cosines = {peer: float((found * vectors).sum(1).min()) for peer, vectors in peers.vectors.items()}
        said = {"model": name, "dtype": engine.model_info.dtype, "texts": len(texts), "tokens": options.tokens}
        print(json.dumps(said | {"batches": peers.batches, "least_cosine": cosines}), flush=True)
        sides: dict[str, Callable[[], float]] = {"ours": lambda: seconds(lambda: engine.embed(texts, use_tqdm=False))}
        sides |= {peer: (lambda peer=peer: peers.seconds(peer)) for peer in peers.batches}
        rounds: list[dict[str, float]] = []
        for number in range(options.rounds):
            order = list(sides)
            order = order[number % 3 :] + order[: number % 3]
            rounds.append({side: round(sides[side](), 3) for side in order})
            print(json.dumps(rounds[-1]), flush=True)
        peers.close()
    medians = {side: round(statistics.median(each[side] for each in rounds), 3) for side in sides}
    ratios = {
        f"{peer}_ratio": round(statistics.median(each[peer] / each["ours"] for each in rounds), 2) for peer in cosines
    }
    rate = round(len(texts) * options.tokens / medians["ours"])
    print(json.dumps({"model": name, **medians, **ratios, "tok_s": rate}), flush=True)


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=(*SIZES, "mpnet"))
    parser.add_argument("--peers", help="a Python with sentence-transformers, onnx and onnxruntime")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128, help="of a text")
    parser.add_argument("--dtype", default="auto", help="of this engine")
    options = parser.parse_args()
    if options.peers:
        for name in options.models or PUBLISHED:
            beside_peers(name, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models or SIZES:
            config = toy_encoder_config(max_position_embeddings=512, **SIZES[name])
            beside_torch(write_toy_encoder(Path(folder) / name, config), options.rounds, options.threads)


if __name__ == "__main__":
    main()
