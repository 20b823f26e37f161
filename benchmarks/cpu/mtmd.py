# SPDX-License-Identifier: MIT
"""Models that see beside llama.cpp's libmtmd: the same files, image and prompt; random weights.

    python benchmarks/cpu/mtmd.py equal|speed|request smolvlm|qwen2vl --peer-python PATH
        [--size 448x336] [--type F32|F16|Q8_0] [--tokens 32] [--pairs 3] [--threads 1]

PATH is a Python with llama-cpp-python, which brings libmtmd. `equal` writes a small model and its tower, lets both
answer greedily, and says how many tokens are the same, how far apart the logits of the first two tokens are where they
part, and how far the embeddings of both lie from those of exact products. `speed` writes a tower of SmolVLM-256M's or
Qwen2-VL-2B's shape, and measures processor time of encoding one image, in turns, and the time that passes. `request`
has both answer one token to a prompt with that image and to the same again, each in a process of its own, and says how
long that takes and the largest memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForImageTextToText

from candle_vllm.core import EngineConfig, GenerationOutput, InferenceEngine, SamplingParams
from candle_vllm.core.assembly.model import load_model
from candle_vllm.core.conversion import write_gguf
from candle_vllm.core.devices import choose_device
from candle_vllm.core.engine.runners.eager_runner import EagerTower
from candle_vllm.core.engine.runners.images import tiles_of
from candle_vllm.core.engine.runners.recorded_tower import RecordedTower
from candle_vllm.core.kernels.cpu_runtime.team import ThreadTeam
from candle_vllm.core.text.pretokenizers import PRE_TOKENIZERS

MARKS = (
    "<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<fake_token_around_image>", "<image>", "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)  # fmt: skip
VOCABULARY = 320
BEFORE, BEHIND = "<|im_start|>user\nWhat is this? ", " Describe the other.<|im_end|>\n<|im_start|>assistant\n"
SEED = 5

PEER = """
import ctypes, json, sys, time
import numpy as np, llama_cpp
from llama_cpp import mtmd_cpp as m
said = json.loads(sys.argv[1])
llama_cpp.llama_backend_init()
model = llama_cpp.llama_model_load_from_file(said["model"].encode(), llama_cpp.llama_model_default_params())
params = m.mtmd_context_params_default()
params.use_gpu, params.n_threads, params.print_timings, params.warmup = False, said["threads"], False, False
sight = m.mtmd_init_from_file(said["mmproj"].encode(), model, params)
assert sight
pixels = np.load(said["pixels"])
height, width, _ = pixels.shape
bitmap = m.mtmd_bitmap_init(width, height, pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
text = (said["before"] + m.mtmd_default_marker().decode() + said["behind"]).encode()
asked = m.mtmd_input_text()
asked.text, asked.text_len, asked.add_special, asked.parse_special = text, len(text), False, True
chunks = m.mtmd_input_chunks_init()
assert m.mtmd_tokenize(sight, chunks, ctypes.byref(asked), (m.mtmd_bitmap_p_ctypes * 1)(bitmap), 1) == 0
found = [m.mtmd_input_chunks_get(chunks, i) for i in range(m.mtmd_input_chunks_size(chunks))]
images = [each for each in found if m.mtmd_input_chunk_get_type(each) == 1]
counts = [m.mtmd_input_chunk_get_n_tokens(each) for each in images]
wide = llama_cpp.llama_model_n_embd(model)

def encoded():
    made, used, passed = [], 0.0, 0.0
    for image, count in zip(images, counts):
        began, then = time.process_time(), time.perf_counter()
        assert m.mtmd_encode_chunk(sight, image) == 0
        used, passed = used + time.process_time() - began, passed + time.perf_counter() - then
        made.append(np.ctypeslib.as_array(m.mtmd_get_output_embd(sight), (count, wide)).copy())
    return np.concatenate(made), used, passed

own = llama_cpp.llama_context_default_params()
own.n_ctx, own.n_batch, own.n_ubatch = 4096, 2048, 2048
own.n_threads = own.n_threads_batch = said["threads"]
if said["mode"] == "speed":
    print("ready", sum(counts), flush=True)
    for _ in sys.stdin:
        print(*encoded()[1:], flush=True)
elif said["mode"] == "request":
    context = llama_cpp.llama_init_from_model(model, own)
    for _ in range(2):
        began, past = time.perf_counter(), llama_cpp.llama_pos(0)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        assert m.mtmd_helper_eval_chunks(sight, context, chunks, 0, 0, 2048, True, ctypes.byref(past)) == 0
        print(f"theirs: {m.mtmd_helper_get_n_tokens(chunks)} tokens, {time.perf_counter() - began:.3f} s", flush=True)
    print("theirs:", *(line for line in open("/proc/self/status") if line.startswith("VmHWM")), end="")
else:
    own.type_k = own.type_v = 0  # F32
    context = llama_cpp.llama_init_from_model(model, own)
    np.save(said["embeddings"], encoded()[0])
    past = llama_cpp.llama_pos(0)
    assert m.mtmd_helper_eval_chunks(sight, context, chunks, 0, 0, 2048, True, ctypes.byref(past)) == 0
    ids, margins, place = [], [], past.value
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    for _ in range(said["tokens"]):
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocabulary,))
        second, first = np.sort(logits)[-2:]
        ids.append(int(logits.argmax()))
        margins.append(float(first - second))
        batch = llama_cpp.llama_batch_init(1, 0, 1)
        batch.n_tokens, batch.token[0], batch.pos[0], batch.n_seq_id[0], batch.seq_id[0][0] = 1, ids[-1], place, 1, 0
        batch.logits[0], place = 1, place + 1
        assert llama_cpp.llama_decode(context, batch) == 0
    print(json.dumps({"ids": ids, "margins": margins, "prompt": m.mtmd_helper_get_n_tokens(chunks)}))
"""


class Shape(NamedTuple):
    """A tower's, and the width of its text model."""

    width: int
    inner: int
    layers: int
    heads: int
    image: int
    patch: int
    cell: int
    text: int


SMALL = {
    "smolvlm": Shape(48 * 4, 320, 3, 3, 64, 8, 4, 128),
    "qwen2vl": Shape(160, 640, 3, 2, 560, 14, 2, 128),
}
PUBLISHED = {
    "smolvlm": Shape(768, 3072, 12, 12, 512, 16, 4, 576),
    "qwen2vl": Shape(1280, 5120, 32, 16, 560, 14, 2, 1536),
}
KINDS = {"smolvlm": "idefics3", "qwen2vl": "qwen2vl_merger"}


def write_text(family: str, folder: Path, size: int) -> Path:
    """A text model of two layers as one GGUF file, by our own converter; the folder has its tokenizer."""
    torch.manual_seed(SEED)
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": size, "intermediate_size": 2 * size, "num_hidden_layers": 2,
        "num_attention_heads": size // 64, "num_key_value_heads": size // 64, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "eos_token_id": 258, "bos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if family == "smolvlm":
        config = AutoConfig.for_model("llama", **text)
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
        tower = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": size, "patch_size": 14}
        config = AutoConfig.for_model(
            "qwen2_vl", text_config={**text, "rope_parameters": rope}, vision_config=tower, image_token_id=262,
            video_token_id=263, vision_start_token_id=260, vision_end_token_id=261,
        )  # fmt: skip
        made = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=1.0 if "embed" in name else 2.0 * weight.shape[1] ** -0.5)
    made.save_pretrained(folder)
    write_tokenizer(folder)
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2,
                 "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    write_gguf(EngineConfig(model=str(folder), dtype="f32"), folder / "model.gguf")
    return folder / "model.gguf"


def write_tokenizer(folder: Path) -> None:
    """Bytes, one token of two line breaks, which Idefics3 has, and the marks of both families."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: index for index, text in enumerate([*letters, "ĊĊ", "th"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ċ"), ("t", "h")]))
    cut = pre_tokenizers.Split(Regex(PRE_TOKENIZERS["qwen2"].patterns[0]), "isolated")
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, spelling])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(MARKS))
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"eos_token": "<|im_end|>", "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


def write_tower(family: str, made: Path, shape: Shape, kind: str) -> Path:
    """A tower of random numbers as llama.cpp's tools write it; matrices are of a GGML type, the rest is F32."""
    generator, size, cells = np.random.default_rng(SEED), shape.width, shape.width * shape.cell**2
    writer, type_ = GGUFWriter(made, "clip"), GGMLQuantizationType[kind]
    numbers = {
        "image_size": shape.image, "patch_size": shape.patch, "embedding_length": size, "block_count": shape.layers,
        "feed_forward_length": shape.inner, "attention.head_count": shape.heads, "projection_dim": shape.text,
    }  # fmt: skip
    if family == "smolvlm":
        numbers |= {"preproc_image_size": 2 * shape.image, "projector.scale_factor": shape.cell}
    for key, said in (("has_vision_encoder", True), ("use_gelu", family == "smolvlm")):
        writer.add_bool(f"clip.{key}", said)
    writer.add_string("clip.projector_type", KINDS[family])
    for key, number in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [0.5] * 3)

    def put(name: str, *sides: int, gain: float = 1.5) -> None:
        data = generator.standard_normal(sides, np.float32)
        if len(sides) == 1:
            writer.add_tensor(name, np.float32("ln" in name and name.endswith("weight")) + np.float32(0.1) * data)
        elif len(sides) == 4 or "position" in name:
            writer.add_tensor(name, data * np.float32(gain * np.prod(sides[1:]) ** -0.5))
        else:
            scaled = data * np.float32(gain * sides[1] ** -0.5)
            writer.add_tensor(name, quants.quantize(scaled, type_), raw_dtype=type_)

    def pair(name: str, *sides: int, gain: float = 1.5) -> None:
        put(f"{name}.weight", *sides, gain=gain)
        put(f"{name}.bias", sides[0])

    for frame in ("", ".1") if family == "qwen2vl" else ("",):
        put(f"v.patch_embd.weight{frame}", size, 3, shape.patch, shape.patch)
    if family == "smolvlm":
        put("v.patch_embd.bias", size)
        put("v.position_embd.weight", (shape.image // shape.patch) ** 2, size, gain=8.0)
    for layer in range(shape.layers):
        for name, *sides in (
            ("ln1", size), ("attn_q", size, size), ("attn_k", size, size), ("attn_v", size, size),
            ("attn_out", size, size), ("ln2", size), ("ffn_up", shape.inner, size), ("ffn_down", size, shape.inner),
        ):  # fmt: skip
            pair(f"v.blk.{layer}.{name}", *sides)
    pair("v.post_ln", size)
    if family == "smolvlm":
        put("mm.model.fc.weight", shape.text, cells, gain=1.0)
    else:
        pair("mm.0", cells, cells)
        pair("mm.2", shape.text, cells, gain=2.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def marked(family: str) -> str:
    """The prompt as our own models have it."""
    mark = "<image>" if family == "smolvlm" else "<|vision_start|><|image_pad|><|vision_end|>"
    return f"{BEFORE}{mark}{BEHIND}"


class Ours:
    """The tower of the same files; `exact` computes op by op in F32 what the files' numbers give."""

    def __init__(
        self, family: str, files: dict[str, Any], pixels: NDArray[np.uint8], *, exact: bool = False, threads: int = 1
    ) -> None:
        config = EngineConfig(**files, op_by_op=exact, dtype="f32" if exact else "auto")
        cpu = choose_device("cpu")
        loaded = load_model(config, cpu, lambda *_: None)
        assert loaded.tower is not None
        assert loaded.vision is not None
        ids = loaded.tokenizer.encode(marked(family), add_special_tokens=False)
        _, (image,) = loaded.vision.look(ids, [pixels])
        self.tiles = tiles_of(image)
        tower = loaded.tower.tower
        self._runner = EagerTower(tower, cpu) if exact else RecordedTower(tower, ThreadTeam(threads))

    def encode(self) -> tuple[NDArray[np.float32], float, float]:
        """The embeddings, a row each, the seconds of processor time that they took, and the seconds that passed."""
        encoding, began, then = self._runner.embeddings(self.tiles), time.process_time(), time.perf_counter()
        while True:
            try:
                next(encoding)
            except StopIteration as done:
                used, passed = time.process_time() - began, time.perf_counter() - then
                return done.value.reshape(-1, done.value.shape[-1]), used, passed


def equal(given: argparse.Namespace, folder: Path, files: dict[str, Any], pixels: NDArray[np.uint8]) -> None:
    """Answers of both; where ours sees one resized tile, theirs also of that, which it need not resize."""
    params = SamplingParams(max_tokens=given.tokens, temperature=0, logprobs=2, ignore_eos=True)
    with InferenceEngine(**files, threads=1) as engine:
        prompt: Any = {"prompt": marked(given.family), "multi_modal_data": {"image": pixels}}
        (made,) = engine.generate([prompt], params, use_tqdm=False)
    exact = Ours(given.family, files, pixels, exact=True)
    embeddings = exact.encode()[0]
    error = difference(Ours(given.family, files, pixels).encode()[0], embeddings)
    print(
        f"{len(made.prompt_token_ids)} tokens of prompt; our embeddings {embeddings.shape} differ from exact: {error}"
    )
    compare(given, folder, files, made, embeddings)
    if given.family == "qwen2vl" and exact.tiles[0].shape != pixels.shape:
        np.save(folder / "pixels.npy", tile := exact.tiles[0])
        print(f"the image resized before, as transformers does it, to {tile.shape[1]}x{tile.shape[0]}:")
        compare(given, folder, files, made, embeddings)


def compare(
    given: argparse.Namespace, folder: Path, files: dict[str, Any], made: GenerationOutput, exact: NDArray[np.float32]
) -> None:
    """Lets the other answer, and prints how it differs."""
    ours = list(made.outputs[0].token_ids)
    said = peer_settings(folder, files) | {"mode": "equal", "tokens": given.tokens, "threads": 1}
    command = [given.peer_python, "-c", PEER, json.dumps(said)]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=given.peer_log, text=True).stdout
    theirs = json.loads(told.splitlines()[-1])
    same = next((n for n, (a, b) in enumerate(zip(ours, theirs["ids"], strict=True)) if a != b), given.tokens)
    error = difference(np.load(said["embeddings"]), exact)
    print(f"  theirs: {theirs['prompt']} tokens of prompt; embeddings differ from exact: {error}")
    print(f"  {same} of {given.tokens} tokens are the same", end="")
    logprobs = made.outputs[0].logprobs
    assert logprobs is not None
    if same < given.tokens:
        first, second = (each.logprob for each in logprobs[same].top[:2])
        print(f"; there our first two are {first - second:.3f} apart, and theirs {theirs['margins'][same]:.3f}", end="")
    print(f"; theirs are {statistics.median(theirs['margins']):.3f} apart in the middle")


def difference(found: NDArray[np.float32], exact: NDArray[np.float32]) -> str:
    """Root of the mean of squares, to that of the exact ones."""
    if found.shape != exact.shape:
        return f"{found.shape}"
    return f"{np.sqrt(np.square(found - exact).mean() / np.square(exact).mean()):.1e}"


def speed(given: argparse.Namespace, folder: Path, files: dict[str, Any], pixels: NDArray[np.uint8]) -> None:
    """Seconds of processor time of both, in turns, and the seconds that passed."""
    said = peer_settings(folder, files) | {"mode": "speed", "threads": given.threads}
    command = [given.peer_python, "-c", PEER, json.dumps(said)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=given.peer_log, text=True
    ) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None
        while not (line := peer.stdout.readline()).startswith("ready"):
            assert line, "the other has ended"
        ours = Ours(given.family, files, pixels, threads=given.threads)
        ours.encode()  # which compiles
        ratios = list[list[float]]()
        for _ in range(given.pairs):
            mine = ours.encode()[1:]
            print("go", file=peer.stdin, flush=True)
            other = [float(each) for each in peer.stdout.readline().split()]
            ratios.append([their / own for their, own in zip(other, mine, strict=True)])
            for what, own, their, ratio in zip(("of a processor", "passed"), mine, other, ratios[-1], strict=True):
                print(
                    f"{line.split()[1]} embeddings, s {what}: ours {own:.2f}, theirs {their:.2f}, {ratio:.2f}",
                    flush=True,
                )
        used, passed = (statistics.median(each) for each in zip(*ratios, strict=True))
        print(f"{given.type}: {used:.2f} of processor time, {passed:.2f} of time (medians of {given.pairs})")


def request(given: argparse.Namespace, folder: Path, files: dict[str, Any], _: NDArray[np.uint8]) -> None:
    """A prompt with an image and the same again, in each program; ours is `images.py`."""
    said = peer_settings(folder, files) | {"mode": "request", "threads": given.threads}
    program = [sys.executable, Path(__file__).with_name("images.py"), files["model"], "--mmproj", files["mmproj"]]
    told = ["--tokenizer", files["tokenizer"], "--prompt", marked(given.family), "--size", given.size]
    for _pair in range(given.pairs):
        subprocess.run([*program, *told, "--rounds", "1", "--threads", str(given.threads)], check=True)
        subprocess.run([given.peer_python, "-c", PEER, json.dumps(said)], check=True, stderr=given.peer_log)


def peer_settings(folder: Path, files: dict[str, Any]) -> dict[str, Any]:
    """What the other is told."""
    paths = {"pixels": folder / "pixels.npy", "embeddings": folder / "theirs.npy", **files}
    return {name: str(path) for name, path in paths.items()} | {"before": BEFORE, "behind": BEHIND}


def main() -> None:
    """Writes the files and runs both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("mode", choices=("equal", "speed", "request"))
    parser.add_argument("family", choices=tuple(KINDS))
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--size", default="448x336")
    parser.add_argument("--type", default="F16", choices=("F32", "F16", "Q8_0"))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer-log", type=argparse.FileType("w"), default=subprocess.DEVNULL)
    given = parser.parse_args()
    width, height = map(int, given.size.split("x"))
    shape = (SMALL if given.mode == "equal" else PUBLISHED)[given.family]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pixels = np.random.default_rng(SEED).integers(0, 256, (height, width, 3), dtype=np.uint8)
        np.save(folder / "pixels.npy", pixels)
        text = write_text(given.family, folder, shape.text)
        tower = write_tower(given.family, folder / "mmproj.gguf", shape, given.type)
        files = {"model": str(text), "mmproj": tower, "tokenizer": folder}
        {"equal": equal, "speed": speed, "request": request}[given.mode](given, folder, files, pixels)


if __name__ == "__main__":
    sys.exit(main())
