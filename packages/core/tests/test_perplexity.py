# SPDX-License-Identifier: MIT
"""Perplexity beside transformers' logits, and the figures of a comparison beside numpy's from both engines' logits."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from candle_vllm.core import CandleVllmError, ConfigError, InferenceEngine, RequestError, SamplingParams, TokenOutput
from candle_vllm.core.errors import EngineSleepingError
from candle_vllm.core.perplexity import cut, perplexity
from candle_vllm.core.testing.toy_model import write_toy_model
from packages.core.tests.models.test_speaking import FOLDER, HELD_OUT, docstrings, their_logits

TEXT = "\n".join(docstrings(*HELD_OUT))[:1500]
WINDOW, TOKENS = 150, 700
SETTINGS: dict[str, Any] = {
    "max_model_len": WINDOW, "max_num_seqs": 2, "max_num_batched_tokens": 64, "enable_prefix_caching": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("toy"))


def measured(model: Path, settings: dict[str, Any] | None = None, **files: io.BytesIO) -> dict[str, Any]:
    with InferenceEngine(model, **SETTINGS, **settings or {}) as engine:
        return perplexity(engine, TEXT, window=WINDOW, tokens=TOKENS, **files)


@pytest.mark.parametrize("name", ["lfm2", "qwen3.5"])
def test_it_is_that_of_transformers_logits(name: str) -> None:
    """Several windows, each in several steps, of compiled kernels whose cache is bfloat16."""
    with InferenceEngine(FOLDER / name, **SETTINGS) as engine:
        before, windows = cut(engine, TEXT, WINDOW, TOKENS)
        found = perplexity(engine, TEXT, window=WINDOW, tokens=TOKENS)
    first, scores = max(1, len(before)), list[torch.Tensor]()
    for each in windows:
        ids = before + each
        rows = their_logits(name, ids).double().log_softmax(-1)[first - 1 : -1]
        scores.append(rows.gather(1, torch.tensor(ids[first:])[:, None])[:, 0])
    wanted = torch.cat(scores)
    assert len(windows) == math.ceil(TOKENS / (WINDOW - len(before))) == found["windows"]
    assert found["tokens"] == len(wanted) == TOKENS - len(windows) * (first - len(before))
    assert found["perplexity"] == pytest.approx(math.exp(-wanted.mean()), rel=1e-3)
    assert 3 < found["perplexity"] < 10
    sums = [(part - wanted.mean()).sum() ** 2 for part in scores]
    error = math.sqrt(sum(sums) * len(sums) / (len(sums) - 1)) / len(wanted)
    assert found["perplexity_error"] == pytest.approx(found["perplexity"] * error, rel=0.05)
    assert "kl" not in found


def logits_of(model: Path, settings: dict[str, Any]) -> NDArray[np.float64]:
    """Log-probabilities [T, V] of all scored positions."""
    found: list[NDArray[np.float64]] = []
    with InferenceEngine(model, **SETTINGS, **settings) as engine:
        before, windows = cut(engine, TEXT, WINDOW, TOKENS)
        assert not before
        for each in windows:
            rows = list[NDArray[np.float64]]()
            engine.read_logits(each, lambda logits, rows=rows: rows.append(logits.astype(np.float64)))
            logits = np.concatenate(rows)
            assert len(logits) == len(each)
            largest = logits.max(1, keepdims=True)
            found.append((logits - largest - np.log(np.exp(logits - largest).sum(1, keepdims=True)))[:-1])
    return np.concatenate(found)


def test_a_comparison_is_numpys_of_both_engines_logits(toy: Path) -> None:
    file, quantised = io.BytesIO(), {"isq": "q4_0"}
    measured(toy, save=file)
    file.seek(0)
    found = measured(toy, quantised, reference=file)
    plain, own = logits_of(toy, {}), logits_of(toy, quantised)
    with InferenceEngine(toy, **SETTINGS) as engine:
        _, windows = cut(engine, TEXT, WINDOW, TOKENS)
    ids = np.concatenate([each[1:] for each in windows])
    at = np.arange(len(ids)), ids
    kl, lost = (np.exp(plain) * (plain - own)).sum(1), plain[at] - own[at]
    assert found["kl"] == pytest.approx(kl.mean(), rel=1e-4)
    assert found["kl_max"] == pytest.approx(kl.max(), rel=1e-4)
    assert found["kl"] > 1e-3
    assert found["reference"] == pytest.approx(math.exp(-plain[at].mean()), rel=1e-6)
    assert found["ratio"] == pytest.approx(math.exp(lost.mean()), rel=1e-6)
    assert found["diff"] == pytest.approx(np.abs(lost).mean(), rel=1e-4)
    assert found["diff_max"] == pytest.approx(np.abs(lost).max(), rel=1e-4)
    assert found["same_top"] == (plain.argmax(1) == own.argmax(1)).mean() < 1
    for name, values in (("kl", kl), ("ratio", lost)):
        sums = [(part - values.mean()).sum() ** 2 for part in np.split(values, np.cumsum(list(map(len, windows)))[:-1] -
                                                                      np.arange(1, len(windows)))]  # fmt: skip
        error = math.sqrt(sum(sums) * len(sums) / (len(sums) - 1)) / len(values)
        assert found[f"{name}_error"] == pytest.approx(error * (found["ratio"] if name == "ratio" else 1), rel=1e-3)


def test_a_model_beside_itself(toy: Path) -> None:
    file = io.BytesIO()
    alone = measured(toy, save=file)
    file.seek(0)
    found = measured(toy, reference=file)
    assert {name: found[name] for name in alone} == alone
    assert (found["kl"], found["kl_max"], found["diff_max"], found["ratio"], found["same_top"]) == (0, 0, 0, 1, 1)


def test_one_window_has_no_error(toy: Path) -> None:
    with InferenceEngine(toy, **SETTINGS) as engine:
        found = perplexity(engine, "a text", window=WINDOW)
    assert (found["windows"], found["tokens"], found["perplexity_error"]) == (1, 5, None)


def test_other_requests_keep_their_outputs(toy: Path) -> None:
    with InferenceEngine(toy, **SETTINGS) as engine:
        other = engine.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        assert perplexity(engine, "a text", window=WINDOW)["tokens"] == 5
        outputs = list[TokenOutput]()
        while engine.has_unfinished_requests:
            outputs += engine.step()
        assert {output.request_id for output in outputs} == {other}
        assert sum(len(output.token_ids) for output in outputs) == 20


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere an engine on the CPU does not sleep")
def test_a_sleeping_engine_computes_nothing(toy: Path) -> None:
    with InferenceEngine(toy, **SETTINGS) as engine:
        right = perplexity(engine, "a text", window=WINDOW)
        engine.sleep(2)
        with pytest.raises(EngineSleepingError, match="wake it up"):
            perplexity(engine, "a text", window=WINDOW)
        engine.wake_up()
        assert perplexity(engine, "a text", window=WINDOW) == right


def test_what_is_refused(toy: Path) -> None:
    file = io.BytesIO()
    measured(toy, save=file)
    with InferenceEngine(toy, **SETTINGS) as engine:
        with pytest.raises(ConfigError, match="no token to score"):
            perplexity(engine, "a", window=WINDOW)
        for text, tokens in ((TEXT[::-1], TOKENS), (TEXT, None)):
            file.seek(0)
            with pytest.raises(ConfigError, match=r"another vocabulary: tokens \w+, vocabulary \d+; not tokens"):
                perplexity(engine, text, window=WINDOW, tokens=tokens, reference=file)
        with pytest.raises(CandleVllmError, match="fewer log-probabilities than tokens"):
            perplexity(engine, TEXT, window=WINDOW, tokens=TOKENS, reference=io.BytesIO(file.getvalue()[:-4]))
        with pytest.raises(CandleVllmError, match="no room"):
            engine.read_logits([1, 2, 3], lambda _: (_ for _ in ()).throw(ValueError("no room")))
        for ids, said in (([], "is empty"), ([1] * (WINDOW + 1), "at most 150"), ([1, 1 << 20], "out of vocabulary")):
            with pytest.raises(RequestError, match=said):
                engine.read_logits(ids, lambda _: None)
        assert perplexity(engine, TEXT, window=WINDOW)["windows"] > 1  # a text that failed leaves nothing behind
