# SPDX-License-Identifier: MIT
"""Adapters of models that give vectors, scores and classes: what PEFT computes with them, beside others or alone."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModel, AutoModelForSequenceClassification

from candle_vllm.core import EngineConfig, InferenceEngine, LoRARequest, RequestError
from candle_vllm.core.engine import build
from candle_vllm.core.text.tokenizer import Tokenizer
from packages.core.tests.models.peft_adapters import randomise, trained
from packages.core.tests.toy_encoder import toy_encoder_config, write_toy_encoder
from tests.waiting import PATIENCE, wait_for

WORDS = ["hello", "a", "the quick brown fox", "jumps over the lazy dog, twice!", "x" * 90]
LABELS = {"id2label": {"0": "sad", "1": "glad", "2": "mad"}, "label2id": {"sad": 0, "glad": 1, "mad": 2}}
DENSE = ["query", "value", "dense"]


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """RMS(error) / RMS(wanted)."""
    return float(np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean()))


def fitted(folder: Path, model: Any, name: str, seed: int, **config: Any) -> Any:
    """PEFT's model with an adapter of random numbers, which is saved beside the base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice
        given: dict[str, Any] = {"r": 4, "lora_alpha": 8, **config}
        made = get_peft_model(model, LoraConfig(**given))
        randomise(made, seed)
        made.save_pretrained(str(folder / name))
    return made.eval()


def vector(model: Any, text: list[int], kind: str = "mean") -> np.ndarray:
    with torch.no_grad():
        states = model(input_ids=torch.tensor([text])).last_hidden_state[0].numpy()
    pooled = {"mean": states.mean(0), "last": states[-1]}[kind]
    return pooled / np.linalg.norm(pooled)


VECTORS: list[Any] = [
    ("BertModel", {"target_modules": [*DENSE, "word_embeddings"]}),
    ("RobertaModel", {"target_modules": DENSE, "use_dora": True, "bias": "lora_only"}),
    pytest.param(
        "XLMRobertaModel",
        {"target_modules": "all-linear", "rank_pattern": {"query": 8}, "use_rslora": True},
        marks=pytest.mark.every_case,
    ),
    pytest.param(
        "BertModel", {"target_modules": [*DENSE, "position_embeddings", "token_type_embeddings"]},
        marks=pytest.mark.every_case,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "config"), VECTORS)
def test_vectors_of_a_batch_are_those_of_pefts_models(
    architecture: str, config: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_toy_encoder(tmp_path / "base", toy_encoder_config(architecture))
    ids = [Tokenizer.from_folder(folder).encode(word) for word in WORDS]
    wanted = [[vector(AutoModel.from_pretrained(folder, dtype=torch.float32), text) for text in ids]]
    for seed, name in enumerate(("one", "other"), 1):
        base = AutoModel.from_pretrained(folder, dtype=torch.float32)
        made = fitted(tmp_path, base, name, seed, task_type=TaskType.FEATURE_EXTRACTION, **config)
        wanted.append([vector(made, text) for text in ids])
    choices = [None, *(LoRARequest(name, lora_path=str(tmp_path / name)) for name in ("one", "other"))]
    assert error(np.stack(wanted[1]), np.stack(wanted[0])) > 0.1
    for eager in (False, True):
        with InferenceEngine(str(folder), enable_lora=True, op_by_op=eager, threads=1, dtype="fp32") as engine:
            each = [(word, choice) for word in WORDS for choice in choices]
            together = engine.embed(
                [word for word, _ in each], use_tqdm=False, lora_request=[choice for _, choice in each]
            )
            found = np.stack([np.asarray(output.embedding) for output in together])
            assert error(found, np.stack([of[n] for n in range(len(WORDS)) for of in wanted])) < 1e-5
            alone = engine.embed(WORDS[3], use_tqdm=False, lora_request=choices[1])[0].embedding
            if not eager:
                assert alone == together[10].embedding, "to the bit"
            assert any("tensors for pooler.dense have no effect" in note for note in engine.list_loras()[0].notes)
            plain = engine.embed(WORDS, use_tqdm=False)
            assert [output.embedding for output in plain] == [output.embedding for output in together[::3]]


SCORES: list[Any] = [
    ("BertForSequenceClassification", {}, {"target_modules": DENSE}),
    ("RobertaForSequenceClassification", LABELS, {"target_modules": ["query", "value"]}),
    pytest.param(
        "BertForSequenceClassification", LABELS, {"target_modules": "all-linear", "use_dora": True},
        marks=pytest.mark.every_case,
    ),
    pytest.param(
        "XLMRobertaForSequenceClassification", {}, {"target_modules": ["query", "dense"]}, marks=pytest.mark.every_case
    ),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "labels", "config"), SCORES)
def test_scores_and_classes_are_those_of_pefts_models_with_their_heads(
    architecture: str, labels: dict[str, Any], config: dict[str, Any], tmp_path: Path
) -> None:
    """A head is trained whole (`modules_to_save`), its bias too."""
    folder = write_toy_encoder(tmp_path / "base", toy_encoder_config(architecture, **labels), pooling=None)
    base = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    made = fitted(tmp_path, base, "tone", 3, task_type=TaskType.SEQ_CLS, **config)
    assert any("classifier" in name for name, weight in made.named_parameters() if weight.requires_grad)
    tone = LoRARequest("tone", lora_path=str(tmp_path / "tone"))
    backend, wanted = Tokenizer.from_folder(folder).backend, []
    pairs = [("what is it", "a fox"), ("fox", "the quick brown fox jumps"), ("a", "b")]
    for text in pairs:
        encoding = backend.encode(*text) if not labels else backend.encode(text[1])
        types = encoding.type_ids if architecture.startswith("Bert") else [0] * len(encoding.ids)
        with torch.no_grad():
            logits = made(input_ids=torch.tensor([encoding.ids]), token_type_ids=torch.tensor([types])).logits[0]
        wanted.append((logits.softmax(0) if labels else logits.sigmoid()).numpy())
    for eager in (False, True):
        with InferenceEngine(str(folder), enable_lora=True, op_by_op=eager, threads=1) as engine:

            def ask(engine: InferenceEngine, choice: LoRARequest | None) -> np.ndarray:
                # torch's sums op by op depend on the rows of a step, and three texts may be in one step or in two
                groups = [[pair] for pair in pairs] if choice is None else [pairs]
                found: list[Any] = []
                for group in groups:
                    if labels:
                        texts = [text for _, text in group]
                        made = engine.classify(texts, use_tqdm=False, lora_request=choice)
                        found += [each.probs for each in made]
                    else:
                        scored = engine.score(group, use_tqdm=False, lora_request=choice)
                        found += [[each.score] for each in scored]
                return np.array(found)

            before = ask(engine, None)
            assert error(ask(engine, tone), np.stack(wanted)) < 1e-5
            assert error(before, np.stack(wanted)) > 1e-2
            assert np.array_equal(ask(engine, None), before)


def test_vectors_of_a_decoder_go_through_an_adapter_too(tmp_path: Path) -> None:
    made = trained(tmp_path, "Llama", target_modules="all-linear")
    texts = [[256, *b"hello"], [256, *b"the quick brown fox"]]
    model: Any = made.peft.get_base_model()
    wanted = np.stack([vector(model.model, text, "last") for text in texts])
    with InferenceEngine(EngineConfig(model=str(made.model), enable_lora=True, max_model_len=64, threads=1)) as engine:
        tone = LoRARequest("tone", lora_path=str(made.adapter))
        found = engine.embed([{"prompt_token_ids": text} for text in texts], use_tqdm=False, lora_request=tone)
        plain = engine.embed([{"prompt_token_ids": text} for text in texts], use_tqdm=False)
    vectors, others = (np.stack([np.asarray(each.embedding) for each in outputs]) for outputs in (found, plain))
    assert error(vectors, wanted) < 1e-2
    assert error(others, wanted) > 5e-2


def test_what_does_not_fit_an_encoder_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_toy_encoder(tmp_path / "base", toy_encoder_config("BertForSequenceClassification"), pooling=None)
    wider = write_toy_encoder(
        tmp_path / "wider", toy_encoder_config("BertForSequenceClassification", **LABELS), pooling=None
    )
    model = AutoModelForSequenceClassification.from_pretrained(wider, dtype=torch.float32)
    fitted(tmp_path, model, "labels", 1, task_type=TaskType.SEQ_CLS, target_modules=["query"])
    base = AutoModel.from_pretrained(folder, dtype=torch.float32)
    fitted(tmp_path, base, "norm", 1, target_modules=["query"], modules_to_save=["LayerNorm"])
    with InferenceEngine(str(folder), enable_lora=True, threads=1) as engine:
        head = r"shape is \[3, 32\], and the base's head has \[1, 32\]: merge it into the model with PEFT's"
        for name, said in (("labels", head), ("norm", "changes a norm.*served: merge it into the model with PEFT's")):
            with pytest.raises(RequestError, match=said):
                engine.score(
                    [("a", "b")], use_tqdm=False, lora_request=LoRARequest(name, lora_path=str(tmp_path / name))
                )
        assert engine.score([("a", "b")], use_tqdm=False)[0].score > 0


def test_a_load_holds_up_no_other_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_toy_encoder(tmp_path / "base")
    base = AutoModel.from_pretrained(folder, dtype=torch.float32)
    fitted(tmp_path, base, "tone", 1, target_modules=DENSE)
    gate, begun, made = threading.Event(), threading.Event(), build.adapter_loader

    def held_up(*given: Any) -> Any:
        load = made(*given)

        def wait(path: Path) -> Any:
            begun.set()
            assert gate.wait(PATIENCE)
            return load(path)

        return wait

    monkeypatch.setattr(build, "adapter_loader", held_up)
    with InferenceEngine(str(folder), enable_lora=True, threads=1, max_loras=1) as engine:
        tone = LoRARequest("tone", lora_path=str(tmp_path / "tone"))
        found = list[Any]()
        asked = [
            threading.Thread(target=lambda: found.append(engine.embed("hello", use_tqdm=False, lora_request=tone)))
            for _ in range(3)
        ]
        for thread in asked:
            thread.start()
        assert begun.wait(PATIENCE)
        assert len(engine.embed(WORDS, use_tqdm=False)) == len(WORDS)
        wait_for(lambda: engine.stats().waiting_adapters == {"tone": 3})
        gate.set()
        for thread in asked:
            thread.join()
        assert len(found) == 3
        assert len({tuple(each[0].embedding) for each in found}) == 1
        stats = engine.stats()
        assert (stats.running_adapters, stats.waiting_adapters, stats.adapter_loads) == ({}, {}, 1)
        assert engine.remove_lora("tone")
        assert engine.stats().adapters_in_memory == 0, "nothing holds it"
