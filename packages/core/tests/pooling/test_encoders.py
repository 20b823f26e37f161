# SPDX-License-Identifier: MIT
"""Encoders and cross-encoders against transformers, and an engine that reads texts whole."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from candle_vllm.core import (
    CandleVllmError,
    ConfigError,
    EngineDeadError,
    EngineOverloadedError,
    InferenceEngine,
    InvalidFileError,
    InvalidParameterError,
    PromptTooLongError,
    RequestAbortedError,
    SamplingParams,
    UnsupportedModelError,
    WeightsError,
)
from candle_vllm.core.engine.runners.model_runner import EncoderRunner
from candle_vllm.core.engine.step.batch import Batch
from candle_vllm.core.pooling import PoolingKind, PoolingParams
from candle_vllm.core.text.tokenizer import Tokenizer
from packages.core.tests.toy_encoder import toy_encoder_config, write_toy_encoder
from tests.real_models import all_minilm, all_mpnet
from tests.waiting import PATIENCE, until

ENCODERS = ("BertModel", "RobertaModel", "XLMRobertaModel")
SAVED_WITH_A_HEAD = ("RobertaForMaskedLM", "XLMRobertaForMaskedLM")  # all-distilroberta-v1, all-roberta-large-v1
CROSS_ENCODERS = tuple(f"{name.removesuffix('Model')}ForSequenceClassification" for name in ENCODERS)
WORDS = [
    "hello",
    "a",
    "the quick brown fox",
    "jumps over the lazy dog, twice!",
    "x" * 90,
    "one two three four five six",
]
PAIRS = [("what is it", "a fox"), ("fox", "the quick brown fox jumps"), ("a", "b"), ("what is it", "z" * 60)]


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """RMS(error) / RMS(wanted)."""
    return float(np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean()))


def their_vectors(folder: Path, texts: list[list[int]], kind: PoolingKind) -> np.ndarray:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    found = []
    for text in texts:
        with torch.no_grad():
            states = model(torch.tensor([text])).last_hidden_state[0].numpy()
        vector = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[kind]
        found.append(vector / np.linalg.norm(vector))
    return np.stack(found)


def vectors(engine: InferenceEngine, texts: Any, params: PoolingParams | None = None) -> np.ndarray:
    return np.stack([np.asarray(output.embedding) for output in engine.embed(texts, params, use_tqdm=False)])


def scores(engine: InferenceEngine, pairs: list[tuple[str, str]]) -> np.ndarray:
    return np.array([output.score for output in engine.score(pairs, use_tqdm=False)])


@pytest.mark.one_of_each(5)
@pytest.mark.parametrize("architecture", [*ENCODERS, *SAVED_WITH_A_HEAD])
@pytest.mark.parametrize("change", [{}, {"hidden_act": "gelu_new"}, {"hidden_act": "relu", "layer_norm_eps": 1e-5}])
@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "op by op"])
def test_vectors_equal_transformers(architecture: str, change: dict[str, Any], eager: bool, tmp_path: Path) -> None:
    folder = write_toy_encoder(tmp_path, toy_encoder_config(architecture, **change))
    tokenizer = Tokenizer.from_folder(folder)
    ids = [tokenizer.encode(word) for word in WORDS]
    with InferenceEngine(str(folder), op_by_op=eager, dtype="fp32") as engine:
        assert engine.model_info.tasks == ("embed", "score")
        assert engine.model_info.max_model_len == (130 if architecture == "BertModel" else 128)
        for kind in ("mean", "cls", "last"):
            found = vectors(engine, WORDS, PoolingParams(pooling=kind))
            assert error(found, their_vectors(folder, ids, kind)) < 1e-5
    for dtype, least, kind in (("auto", 0.999999, "mean"), ("bf16", 0.999, "cls")):
        chosen = None if kind == "mean" else kind
        with InferenceEngine(str(folder), dtype=dtype, op_by_op=eager, pooling=chosen) as engine:
            assert ((vectors(engine, WORDS) * their_vectors(folder, ids, kind)).sum(-1) > least).all()


@pytest.mark.parametrize("architecture", CROSS_ENCODERS)
@pytest.mark.parametrize(
    ("change", "sigmoid"),
    [
        ({}, True),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, False),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, True),
    ],
)
@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "op by op"])
def test_scores_equal_transformers(
    architecture: str, change: dict[str, Any], sigmoid: bool, eager: bool, tmp_path: Path
) -> None:
    folder = write_toy_encoder(tmp_path, toy_encoder_config(architecture, **change), pooling=None)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    backend = Tokenizer.from_folder(folder).backend
    wanted = []
    for pair in PAIRS:
        encoding = backend.encode(*pair)
        types = encoding.type_ids if architecture.startswith("Bert") else [0] * len(encoding.ids)
        assert 1 in encoding.type_ids
        with torch.no_grad():
            logit = model(torch.tensor([encoding.ids]), token_type_ids=torch.tensor([types])).logits[0, 0]
        wanted.append(float(logit.sigmoid() if sigmoid else logit))
    with InferenceEngine(str(folder), op_by_op=eager) as engine:
        texts = 2 * len(backend.encode("one text", add_special_tokens=False))
        assert engine.model_info.pair_marks == len(backend.encode("one text", "one text")) - texts > 0
        assert engine.model_info.tasks == ("score", "classify")
        assert engine.model_info.embedding_size == 0
        assert error(scores(engine, PAIRS), np.array(wanted)) < 1e-5
        with pytest.raises(
            InvalidParameterError, match=r"is a cross-encoder and gives no vectors: request scores of pairs"
        ):
            engine.embed("hello", use_tqdm=False)


@pytest.mark.parametrize("names", [None, ["input_ids", "token_type_ids"], ["input_ids", "attention_mask"]])
def test_pairs_have_token_types_where_the_tokenizer_gives_them(names: list[str] | None, tmp_path: Path) -> None:
    """`model_input_names` of tokenizer_config.json may leave them out: then all of a pair's tokens have type 0."""
    folder = write_toy_encoder(tmp_path, toy_encoder_config("BertForSequenceClassification"), pooling=None)
    said = {"tokenizer_class": "BertTokenizer"} | ({} if names is None else {"model_input_names": names})
    said |= {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    theirs = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    given = [theirs(*pair, return_tensors="pt") for pair in PAIRS]
    assert {"token_type_ids" in each for each in given} == {names is None or "token_type_ids" in names}
    with torch.no_grad():
        wanted = np.array([float(model(**each).logits[0, 0].sigmoid()) for each in given])
    with InferenceEngine(str(folder)) as engine:
        assert error(scores(engine, PAIRS), wanted) < 1e-5


def test_camembert_is_a_roberta(tmp_path: Path) -> None:
    """Against transformers' own classes, vectors and scores."""
    config = toy_encoder_config("CamembertModel", model_type="camembert")
    folder = write_toy_encoder(tmp_path / "vectors", config)
    ids = [Tokenizer.from_folder(folder).encode(word) for word in WORDS]
    with InferenceEngine(str(folder), dtype="fp32") as engine:
        assert error(vectors(engine, WORDS), their_vectors(folder, ids, "mean")) < 1e-5
    config = toy_encoder_config("CamembertForSequenceClassification", model_type="camembert")
    folder = write_toy_encoder(tmp_path / "scores", config, pooling=None)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == "CamembertForSequenceClassification"
    pair = Tokenizer.from_folder(folder).backend.encode(*PAIRS[0])
    with torch.no_grad():
        wanted = float(model(torch.tensor([pair.ids])).logits[0, 0].sigmoid())
    with InferenceEngine(str(folder)) as engine:
        assert scores(engine, PAIRS[:1])[0] == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[InferenceEngine]:
    with InferenceEngine(str(folder)) as made:
        yield made


@pytest.mark.one_of_each(3)
@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "op by op"])
@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_a_batch_gives_what_its_texts_give_alone(folder: Path, eager: bool, dtype: Any) -> None:
    """Compiled, to the bit, for any number of threads."""
    texts = [WORDS[n % len(WORDS)] + " a" * (n % 7) for n in range(60)]
    most = 0.0 if not eager else 1e-6 if dtype == "auto" else 2e-2
    with InferenceEngine(str(folder), op_by_op=eager, dtype=dtype, threads=1) as engine:
        together = vectors(engine, texts)
        alone = np.concatenate([vectors(engine, [text]) for text in texts])
        assert np.abs(together - alone).max() <= most
    small: Any = {"max_num_batched_tokens": 16, "max_num_seqs": 3, "threads": 2}
    with InferenceEngine(str(folder), op_by_op=eager, dtype=dtype, **small) as engine:
        assert np.abs(vectors(engine, texts) - alone).max() <= most, "a text longer than the step runs by itself"


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "op by op"])
def test_a_pair_has_the_score_that_it_has_alone(eager: bool, tmp_path: Path) -> None:
    made = write_toy_encoder(tmp_path, toy_encoder_config("BertForSequenceClassification"), pooling=None)
    pairs = [PAIRS[n % len(PAIRS)] for n in range(9)]
    with InferenceEngine(str(made), op_by_op=eager) as engine:
        alone = np.concatenate([scores(engine, [pair]) for pair in pairs])
        assert np.abs(scores(engine, pairs) - alone).max() <= (1e-6 if eager else 0)


def test_a_saved_pooler_and_a_prefix_do_not_matter(folder: Path, engine: InferenceEngine, tmp_path: Path) -> None:
    other = write_toy_encoder(tmp_path)
    weights = {f"bert.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["bert.pooler.dense.weight"] = torch.zeros(32, 32)
    weights["bert.embeddings.position_ids"] = torch.arange(130)[None]
    weights["cls.predictions.bias"] = torch.zeros(4)
    save_file(weights, other / "model.safetensors")
    with InferenceEngine(str(other)) as made:
        assert np.array_equal(vectors(made, WORDS), vectors(engine, WORDS))


def test_a_gguf_file_gives_the_same(folder: Path, engine: InferenceEngine, tmp_path: Path) -> None:
    path = write_gguf(folder, tmp_path / "toy.gguf")
    with InferenceEngine(str(path)) as made:
        assert made.tokenize("Hello, you") == engine.tokenize("Hello, you")
        assert np.abs(vectors(made, WORDS) - vectors(engine, WORDS, PoolingParams(pooling="cls"))).max() < 1e-5


def write_gguf(folder: Path, path: Path) -> Path:
    """The toy as llama.cpp's converter writes BERT; with the first position's vectors."""
    from candle_vllm.core.loading.weights import expand
    from candle_vllm.core.models.registry import encoder_from_hf

    found = encoder_from_hf(toy_encoder_config(), folder / "config.json")
    assert found is not None
    family, config = found
    table = family.weights(config, ())
    names = {
        hf.first: gguf.first
        for hf, gguf in zip(expand(table, config), expand(table, config, "gguf"), strict=True)
        if hf.names and gguf.names
    }
    writer = GGUFWriter(path, "bert")
    writer.add_context_length(130)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-12)
    writer.add_uint32("bert.pooling_type", 2)
    add_words(writer, folder)
    for name, tensor in load_file(folder / "model.safetensors").items():
        writer.add_tensor(names[name], tensor.numpy())
    write_out(writer)
    return path


def add_words(writer: GGUFWriter, folder: Path) -> None:
    """The toy's vocabulary, as llama.cpp's converter writes BERT's."""
    vocabulary = Tokenizer.from_folder(folder).backend.get_vocab()
    texts = sorted(vocabulary, key=vocabulary.__getitem__)
    bare = [
        t if t.startswith("[") and len(t) > 1 else t[2:] if t.startswith("##") and len(t) > 2 else f"\u2581{t}"
        for t in texts
    ]
    writer.add_tokenizer_model("bert")
    writer.add_token_list(bare)
    writer.add_token_types([3] * 5 + [1] * (len(texts) - 5))
    for name, index in (
        ("unknown", 1),
        ("cls", 2),
        ("seperator", 3),
        ("padding", 0),
        ("mask", 4),
        ("bos", 2),
        ("eos", 3),
    ):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)


def write_out(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_folder_may_ask_for_lower_case(tmp_path: Path) -> None:
    """`do_lower_case` of a sentence-transformers folder, beside a tokenizer that keeps capitals."""
    folder, found = write_toy_encoder(tmp_path), []
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for lowers in (False, True):
        (folder / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": lowers}))
        with InferenceEngine(str(folder)) as engine:
            found.append(engine.tokenize("A b") == engine.tokenize("a b"))
    assert found == [False, True]


# ---- what it does not do ---------------------------------------------------------------------------------------------


GENERATING = {
    "generate": lambda engine: engine.generate("hello", use_tqdm=False),
    "chat": lambda engine: engine.chat([{"role": "user", "content": "hello"}]),
    "stream": lambda engine: engine.stream("hello", SamplingParams()),
    "agenerate": lambda engine: asyncio.run(engine.agenerate("hello")),
    "apply_chat_template": lambda engine: engine.apply_chat_template([{"role": "user", "content": "hello"}]),
}


@pytest.mark.parametrize("name", GENERATING)
def test_what_an_encoder_does_not_do_is_refused_by_name(engine: InferenceEngine, name: str) -> None:
    with pytest.raises(InvalidParameterError, match=r"is an embedding model and generates no text: .*/v1/embeddings"):
        GENERATING[name](engine)


def test_an_encoder_reads_conversations_by_a_template_that_is_given(folder: Path) -> None:
    template = "{% for message in messages %}{{ message.role }} {{ message.content }}{% endfor %}"
    with InferenceEngine(str(folder), chat_template=template) as engine:
        assert GENERATING["apply_chat_template"](engine) == "user hello"
        for name in ("chat", "generate"):
            with pytest.raises(InvalidParameterError, match="generates no text"):
                GENERATING[name](engine)


def test_a_custom_loop_is_refused_too(folder: Path) -> None:
    with (
        InferenceEngine(str(folder)) as engine,
        pytest.raises(InvalidParameterError, match="is an embedding model and generates no text"),
    ):
        engine.add_request("hello")


def test_words_are_texts_again(engine: InferenceEngine) -> None:
    assert engine.detokenize(engine.tokenize("hello world")) == "hello world"


def test_params_of_another_task_are_refused_or_mean_the_same(engine: InferenceEngine, tmp_path: Path) -> None:
    """`use_activation` of a vector is vLLM's name of `normalize`; classes have no length and no other pooling."""
    plain, named = (vectors(engine, "a", params) for params in (
        PoolingParams(normalize=False), PoolingParams(use_activation=False)
    ))  # fmt: skip
    assert np.array_equal(plain, named)
    assert np.linalg.norm(named) > 1.1
    made = write_toy_encoder(tmp_path, toy_encoder_config(CROSS_ENCODERS[0], **LABELS), pooling=None)
    wrong: list[dict[str, Any]] = [{"normalize": True}, {"dimensions": 2}, {"pooling": "mean"}]
    with InferenceEngine(str(made)) as classifier:
        for given in wrong:
            with pytest.raises(InvalidParameterError, match="has no effect on classes: leave it out") as caught:
                classifier.classify("a", PoolingParams(**given), use_tqdm=False)
            assert caught.value.param == next(iter(given))


def test_texts_are_never_cut(engine: InferenceEngine) -> None:
    assert len(engine.embed("a " * 128, use_tqdm=False)[0].prompt_token_ids) == 130
    with pytest.raises(PromptTooLongError, match="input 2: the text has 131 tokens and the model takes at most 130"):
        engine.embed(["a", "b", "a " * 129], use_tqdm=False)
    with pytest.raises(PromptTooLongError, match="the text has 5000000 characters"):
        engine.embed("a" * 5_000_000, use_tqdm=False)
    assert len(engine.embed(" " * 100_000 + "a", use_tqdm=False)[0].prompt_token_ids) == 3, "spaces are no tokens"


def test_too_long_pairs_are_named(tmp_path: Path) -> None:
    made = write_toy_encoder(tmp_path, toy_encoder_config("BertForSequenceClassification"), pooling=None)
    with (
        InferenceEngine(str(made)) as engine,
        pytest.raises(PromptTooLongError, match="input 1: the text has 131 tokens"),
    ):
        engine.score([("a", "b"), ("a " * 64, "b " * 64)], use_tqdm=False)


def test_the_tuned_length_holds_until_another_is_set(tmp_path: Path) -> None:
    folder = write_toy_encoder(tmp_path)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 40}')
    (folder / "sentence_bert_config.json").write_text('{"transformer_task": "feature-extraction"}')
    with InferenceEngine(str(folder)) as engine:  # sentence-transformers 5.4 and later
        assert engine.model_info.max_model_len == 40
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 32}')
    with InferenceEngine(str(folder)) as engine:
        assert engine.model_info.max_model_len == 32
    with InferenceEngine(str(folder), max_model_len=130) as engine:
        assert engine.model_info.max_model_len == 130
    with pytest.raises(ConfigError, match="max_model_len 131 is beyond the model's 130 positions"):
        InferenceEngine(str(folder), max_model_len=131)


@pytest.mark.parametrize(
    "setting", [{"kv_cache_memory": 1 << 20}, {"kv_cache_dtype": "q8_0"}, {"gpu_memory_utilization": 0.5}]
)
def test_settings_of_a_cache_are_for_decoders_beside_an_encoder(
    folder: Path, setting: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Flags of a server are for all models of models.yaml."""
    with InferenceEngine(str(folder), **setting) as engine:
        assert len(engine.embed(["hello"], use_tqdm=False)) == 1
    assert f"so {next(iter(setting))} has no effect" in caplog.text


@pytest.mark.parametrize(
    "setting",
    [
        {"kv_fraction": 0.3},
        {"state_cache_gb": 1.0},
        {"deterministic": True},
        {"speculative_config": {}},
    ],
)
def test_settings_that_set_nothing_are_refused(folder: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"so {next(iter(setting))} has no effect"):
        InferenceEngine(str(folder), **setting)
    with pytest.raises(ConfigError, match="supports decoders only"):
        InferenceEngine(str(folder), load_format="dummy")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"position_embedding_type": "relative_key"},
            UnsupportedModelError,
            "position_embedding_type is 'relative_key'",
        ),
        ({"is_decoder": True}, UnsupportedModelError, "is_decoder is true"),
        ({"hidden_act": "swish"}, UnsupportedModelError, "hidden_act is 'swish'"),
        ({"num_attention_heads": 5}, InvalidFileError, "hidden size 32 is not a multiple of the 5 heads"),
        ({"layer_norm_eps": 7}, InvalidFileError, "epsilon of the model's norms is 7"),
        ({"hidden_size": 1 << 20}, WeightsError, "has shape .*1048576"),
        ({"num_hidden_layers": 3}, WeightsError, r"missing tensors \(16\)"),
        ({"num_hidden_layers": 1}, WeightsError, r"unexpected tensors \(16\)"),
        ({"vocab_size": None}, InvalidFileError, "vocab_size is missing"),
        ({"architectures": ["BertForPreTraining"]}, UnsupportedModelError, "'BertForPreTraining' is not implemented"),
    ],
)
def test_what_a_config_may_not_say(change: dict[str, Any], error: Any, message: str, tmp_path: Path) -> None:
    folder = write_toy_encoder(tmp_path)
    (folder / "config.json").write_text(json.dumps(toy_encoder_config() | change))
    with pytest.raises(error, match=message) as caught:
        InferenceEngine(str(folder))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sbert_ce_default_activation_function": "os.system"}, "activation is 'os.system'"),
    ],
)
def test_what_a_cross_encoders_config_may_not_say(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = toy_encoder_config("BertForSequenceClassification")
    folder = write_toy_encoder(tmp_path, config, pooling=None)
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UnsupportedModelError, match=message):
        InferenceEngine(str(folder))


def test_numbers_that_are_not_finite_end_their_text_alone(tmp_path: Path) -> None:
    folder = write_toy_encoder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][5] = torch.nan  # "a"
    save_file(weights, folder / "model.safetensors")
    with InferenceEngine(str(folder)) as engine:
        with pytest.raises(CandleVllmError, match="not finite"):
            engine.embed("a", use_tqdm=False)
        results = asyncio.run(gathered(engine, ["b", "a", "c"]))
    assert [isinstance(result, CandleVllmError) for result in results] == [False, True, False]


async def gathered(engine: InferenceEngine, texts: list[str]) -> list[Any]:
    return await asyncio.gather(*(engine.aembed(text) for text in texts), return_exceptions=True)


# ---- queue and cancelling --------------------------------------------------------------------------------------------


class Gate:
    """Holds the encoder back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached, self.texts = threading.Event(), threading.Event(), 0
        run = EncoderRunner.run

        def held(runner: EncoderRunner, batch: Batch) -> None:
            self.texts += len(batch.runs)
            self.reached.set()
            assert self.opened.wait(PATIENCE)
            run(runner, batch)

        monkeypatch.setattr(EncoderRunner, "run", held)


async def test_cancelled_texts_are_not_run_and_a_full_queue_refuses(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with InferenceEngine(str(folder), max_num_seqs=1, max_queued_requests=3) as engine:
        first = asyncio.create_task(engine.aembed("first"))
        assert await asyncio.to_thread(gate.reached.wait, PATIENCE)
        second = asyncio.create_task(engine.aembed(["two", "three"]))
        await until(lambda: len(engine._thread._clients) == 3)  # type: ignore[union-attr]
        with pytest.raises(EngineOverloadedError, match="max_queued_requests"):
            await engine.aembed("fourth")
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.opened.set()
        assert len((await first)[0].embedding) == 32
        assert len((await engine.aembed("fifth"))[0].embedding) == 32
        assert gate.texts == 2
        assert engine.stats().finished == {"stop": 2, "abort": 2}


async def test_closing_ends_what_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    engine = InferenceEngine(str(folder), max_num_seqs=1)
    tasks = [asyncio.create_task(engine.aembed("one"))]
    assert await asyncio.to_thread(gate.reached.wait, PATIENCE)
    tasks.append(asyncio.create_task(engine.aembed("two")))  # texts become tokens in several threads
    thread = engine._thread
    assert thread is not None
    await until(lambda: len(thread._clients) == 2)
    closing = asyncio.create_task(asyncio.to_thread(engine.close))
    await until(lambda: thread._closing)
    gate.opened.set()
    await closing
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [list, RequestAbortedError]
    with pytest.raises(EngineDeadError):
        engine.embed("three", use_tqdm=False)


# ---- real weights ----------------------------------------------------------------------------------------------------

SENTENCES = [
    "A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby.", "a",
    "Ein Satz auf Deutsch, mit Umlauten: äöü.", "import numpy as np\n\nprint(np.zeros(3))", "日本語のテキスト",
    "The capital of France is Paris. " * 20,
]  # fmt: skip


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    return all_minilm()


@pytest.mark.peer
def test_minilm_equals_transformers(minilm: Path) -> None:
    ids = [Tokenizer.from_folder(minilm).encode(sentence) for sentence in SENTENCES]
    theirs = their_vectors(minilm, ids, "mean")
    with InferenceEngine(str(minilm), dtype="fp32") as engine:
        info = engine.model_info
        assert (info.embedding_size, info.max_model_len, info.quantization, info.dtype) == (384, 256, None, "f32")
        assert error(vectors(engine, SENTENCES), theirs) < 1e-5
        near, far = engine.score([tuple(SENTENCES[:2]), (SENTENCES[0], SENTENCES[2])], use_tqdm=False)
        assert near.score > 0.7 > 0.3 > far.score
        assert engine.embed(["hello"], use_tqdm=False)[0].prompt_token_ids == (101, 7592, 102)
    for dtype, least in (("auto", 0.999999), ("bf16", 0.9999)):
        with InferenceEngine(str(minilm), dtype=dtype) as engine:
            assert ((vectors(engine, SENTENCES) * theirs).sum(-1) > least).all()


@pytest.mark.every_case
def test_mpnet_with_its_real_weights_equals_transformers() -> None:
    folder = all_mpnet()
    ids = [Tokenizer.from_folder(folder).encode(sentence) for sentence in SENTENCES]
    theirs = their_vectors(folder, ids, "mean")
    with InferenceEngine(str(folder)) as engine:
        assert (engine.model_info.embedding_size, engine.model_info.max_model_len) == (768, 384)
        assert ((vectors(engine, SENTENCES) * theirs).sum(-1) > 0.99999).all()
        near, far = engine.score([tuple(SENTENCES[:2]), (SENTENCES[0], SENTENCES[2])], use_tqdm=False)
        wanted = [float(theirs[0] @ theirs[1]), float(theirs[0] @ theirs[2])]
        assert [near.score, far.score] == pytest.approx(wanted, abs=1e-4)
        assert near.score > 0.5 > 0.3 > far.score


LABELS = {"id2label": {"0": "sad", "1": "glad", "2": "mad"}, "label2id": {"sad": 0, "glad": 1, "mad": 2}}


@pytest.mark.parametrize(
    ("architecture", "kind", "eager"),
    [
        (CROSS_ENCODERS[0], None, False),
        (CROSS_ENCODERS[1], "single_label_classification", False),
        (CROSS_ENCODERS[2], None, True),
        *((CROSS_ENCODERS[0], kind, True) for kind in ("multi_label_classification", "regression")),
    ],
)
def test_classes_equal_transformers(architecture: str, kind: str | None, eager: bool, tmp_path: Path) -> None:
    folder = write_toy_encoder(tmp_path, toy_encoder_config(architecture, problem_type=kind, **LABELS), pooling=None)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_folder(folder)
    with torch.no_grad():
        rows = torch.cat([model(torch.tensor([tokenizer.encode(word)])).logits for word in WORDS])
    with_head = {"multi_label_classification": rows.sigmoid(), "regression": rows}.get(str(kind), rows.softmax(-1))
    with InferenceEngine(str(folder), op_by_op=eager) as engine:
        assert (engine.model_info.tasks, engine.model_info.labels) == (("classify",), ("sad", "glad", "mad"))
        outputs = engine.classify(WORDS, use_tqdm=False)
        assert error(np.array([list(each.probs) for each in outputs]), with_head.numpy()) < 1e-5
        assert [list(each.prompt_token_ids) for each in outputs] == [tokenizer.encode(word) for word in WORDS]
        again = asyncio.run(engine.aclassify(WORDS[1]))
        assert list(again[0].probs) == pytest.approx(list(outputs[1].probs), rel=1e-5)
        for call in (lambda: engine.embed("a"), lambda: engine.score([("a", "b")]), lambda: engine.generate("a")):
            with pytest.raises(InvalidParameterError, match=r"is a classifier and .*: request classes"):
                call()


IDENTITY, SIGMOID = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid"


@pytest.mark.parametrize(
    ("change", "beside", "raw"),
    [
        ({"problem_type": "regression"}, None, True),  # fineweb-edu-classifier, whose numbers are 0 to 5
        ({"problem_type": "regression", "sentence_transformers": {"activation_fn": SIGMOID}}, None, False),
        ({}, IDENTITY, True),  # sentence-transformers 5.4 and later
        ({"sentence_transformers": {"activation_fn": IDENTITY}}, SIGMOID, False),
    ],
)
def test_a_number_of_one_label_is_what_its_files_say(
    change: dict[str, Any], beside: str | None, raw: bool, tmp_path: Path
) -> None:
    folder = write_toy_encoder(tmp_path, toy_encoder_config(CROSS_ENCODERS[0], **change), pooling=None)
    if beside is not None:
        (folder / "config_sentence_transformers.json").write_text(json.dumps({"activation_fn": beside}))
    with InferenceEngine(str(folder)) as engine:
        (found,) = engine.classify("hello", use_tqdm=False)[0].probs
        (logit,) = engine.classify("hello", PoolingParams(use_activation=False), use_tqdm=False)[0].probs
    assert (found == logit) is raw
    assert found == pytest.approx(logit if raw else 1 / (1 + np.exp(-logit)), rel=1e-5)


@pytest.mark.parametrize("labels", [{}, LABELS])
def test_a_head_takes_no_other_pooling(labels: dict[str, Any], tmp_path: Path) -> None:
    folder = write_toy_encoder(tmp_path, toy_encoder_config(CROSS_ENCODERS[0], **labels), pooling=None)
    with pytest.raises(ConfigError, match="this model has its own head"):
        InferenceEngine(str(folder), pooling="mean")


def test_a_cross_encoder_gives_its_one_class_and_others_none(tmp_path: Path, engine: InferenceEngine) -> None:
    folder = write_toy_encoder(tmp_path, toy_encoder_config("BertForSequenceClassification"), pooling=None)
    with InferenceEngine(str(folder)) as cross:
        (output,) = cross.classify("what is it", use_tqdm=False)
        assert len(output.probs) == 1
        assert 0 < output.probs[0] < 1
    with pytest.raises(InvalidParameterError, match="is an embedding model and has no head for classes"):
        engine.classify("a")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id2label": {}}, "id2label names 0 labels"),
        ({"id2label": None}, r"classifier.weight has shape \[1, 32\]; the model's config asks for \[2, 32\]"),
        ({"id2label": {"0": 5, "1": "b"}}, "id2label must name every label by a text"),
        ({"num_labels": 1 << 30}, "num_labels"),
        ({"id2label": {"0": "a", "1": "b"}, "problem_type": "guessing"}, "problem_type"),
    ],
)
def test_heads_that_make_no_sense(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    config = toy_encoder_config("BertForSequenceClassification")
    write_toy_encoder(tmp_path, config, pooling=None)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises((InvalidFileError, UnsupportedModelError, WeightsError), match=said):
        InferenceEngine(str(tmp_path))
