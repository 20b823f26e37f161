# SPDX-License-Identifier: MIT
"""The drafter of Gemma 4, which reads the model's caches: its logits are transformers', and answers do not change."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma4TextConfig

from candle_vllm.core import ConfigError, ModelLoadError, SamplingParams
from packages.core.tests.engine.drafted import answers
from packages.core.tests.engine.test_draft_head import apart, head_of, loaded, watched
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.gguf_export import export_gguf
from packages.core.tests.models.tiny import randomise, write_tiny
from tests.common_run import few

TEXT = b"a text that is much longer than the window of the model, and also than the room of a step"
OWN: dict[str, Any] = {
    "vocab_size_per_layer_input": 0,
    "hidden_size_per_layer_input": 0,
    "use_double_wide_mlp": False,
    "enable_moe_block": False,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_kv_shared_layers": 3,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}


def modes(config: Any) -> list[str | None]:
    """Which layers of a model give their keys and values to a drafter ("store"), and which read given ones ("reuse").

    The property of transformers 5.23 fails for a drafter, all of whose layers read, and stores nothing in a model
    without readers.
    """
    count, kinds = config.num_hidden_layers, config.layer_types
    first = count - config.num_kv_shared_layers
    last = {kind: layer for layer, kind in enumerate(kinds[:first])}
    return ["reuse" if n >= first else "store" if n == last[kinds[n]] else None for n in range(count)]


@pytest.fixture(scope="module", autouse=True)
def stores() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gemma4TextConfig, "kv_sharing_modes", property(modes))
        yield


@cache
def target_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def write_assistant(folder: Path, target: Path, **changes: Any) -> Any:
    """Write a random drafter for `target`; return the model of transformers."""
    from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM

    text = json.loads((target / "config.json").read_text())
    text = {key: value for key, value in text.items() if key not in ("architectures", "model_type")} | OWN
    if "per_layer_config" in text:
        full = next(iter(text["per_layer_config"].values()))
        text["per_layer_config"] = {"2": full}
    config = Gemma4AssistantConfig(
        text_config={"model_type": "gemma4_text", **text}, backbone_hidden_size=target_model(target).config.hidden_size
    )
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(7)
    model = Gemma4AssistantForCausalLM(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def drafted(target: Any, assistant: Any, tokens: tuple[int, ...], candidates: tuple[int, ...]) -> torch.Tensor:
    """Logits [V] of the draft after a text and other drafts, as transformers' candidate generator computes them."""
    model = target.model
    out = model(torch.tensor([tokens[:-1]]), return_shared_kv_states=True, use_cache=False)
    window, shared = target.config.sliding_window - 1, out.shared_kv_states
    keys, values = shared["sliding_attention"]
    shared = {"full_attention": shared["full_attention"]}
    shared["sliding_attention"] = keys[:, :, -window:], values[:, :, -window:]
    state, place, logits = out.last_hidden_state[:, -1:], torch.tensor([[len(tokens) - 1]]), torch.empty(0)
    for token in (tokens[-1], *candidates):
        given = torch.cat([model.embed_tokens(torch.tensor([[token]])), state], -1)
        said = assistant(inputs_embeds=given, position_ids=place, shared_kv_states=shared)
        state, logits = said.last_hidden_state, said.logits[0, -1]
    return logits


@pytest.fixture(scope="module", params=["Gemma-4", "Gemma-4 shared keys"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    row = ROWS[request.param]
    return write_tiny(tmp_path_factory.mktemp("target") / "model", row.model_type, **row.config)


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "op by op"])
def test_drafts_are_those_of_transformers(target: Path, tmp_path: Path, eager: bool) -> None:
    assistant = write_assistant(tmp_path / "assistant", target)
    drafts = {"method": "mtp", "model": str(tmp_path / "assistant")}
    with loaded(target, drafts, op_by_op=eager, max_num_batched_tokens=24, max_num_seqs=4) as engine:
        seen = watched(engine)
        asked = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
        engine.generate([list(TEXT), list(b"short")], asked, use_tqdm=False)
    chosen = [seen[0], *random.Random(1).sample(seen, 5), max(seen, key=lambda each: len(each[1]))]
    assert len(chosen[-1][1]) == 3
    errors = [apart(row, drafted(target_model(target), assistant, *text)) for *text, row in chosen]
    assert max(errors) < (1e-5 if eager else 2e-2)


@pytest.mark.parametrize("kind", few(["auto", "q8_0"], "auto"))
def test_answers_do_not_change(target: Path, tmp_path: Path, kind: str) -> None:
    """Also where pages outside the window are freed, prefixes are shared and sequences are preempted."""
    write_assistant(tmp_path / "assistant", target)
    drafts = {"method": "mtp", "model": str(tmp_path / "assistant")}
    given: dict[str, Any] = {"max_num_batched_tokens": 80, "kv_cache_dtype": kind}
    with loaded(target, None, **given) as plain, loaded(target, drafts, **given) as engine:
        assert answers(engine, 1) == answers(plain, 1)
        stats = engine.stats()
        assert stats.draft_tokens > 3 * stats.accepted_draft_tokens
        assert stats.num_free_blocks == stats.num_blocks
        runner = head_of(engine)._head
        assert runner.caches is engine._engine.runner.caches  # type: ignore[attr-defined,union-attr]
        assert len(runner.page_of)  # type: ignore[attr-defined]


def test_a_gguf_file_and_clusters_of_tokens(target: Path, tmp_path: Path) -> None:
    """A GGUF file is the same drafter. Where transformers limits logits to clusters, these logits are the same."""
    clusters = {"use_ordered_embeddings": True, "num_centroids": 16, "centroid_intermediate_top_k": 4}
    folder = tmp_path / "assistant"
    assistant = write_assistant(folder, target, **clusters)
    text = tmp_path / "text"
    text.mkdir()
    (text / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())["text_config"]))
    shutil.copy(folder / "model.safetensors", text)
    rows = []
    for path in (folder, export_gguf(text, tmp_path / "assistant.gguf", "gemma4-assistant")):
        with loaded(target, {"method": "gemma4_mtp", "model": str(path)}, op_by_op=True) as engine:
            seen = watched(engine)
            asked = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
            engine.generate([list(TEXT)], asked, use_tqdm=False)
        rows.append(seen)
    for (*text_of, row), (*other_text, other) in zip(*rows, strict=True):
        assert text_of == other_text
        assert apart(other, torch.from_numpy(row)) < 1e-5
    *first, row = rows[0][0]
    limited = drafted(target_model(target), assistant, *first)
    chosen = limited > limited.min()
    assert 0 < int(chosen.sum()) <= 4 * 272 // 16
    assert apart(row[chosen.numpy()], limited[chosen]) < 1e-5


def test_a_drafter_of_another_model_is_refused(target: Path, tmp_path: Path) -> None:
    folder = tmp_path / "assistant"
    write_assistant(folder, target)
    drafts, config = {"method": "mtp", "model": str(folder)}, json.loads((folder / "config.json").read_text())
    other = write_tiny(tmp_path / "other", "qwen3", head_dim=32)
    for model, given, message in (
        (other, drafts, "it drafts for a Gemma 4 of 272 tokens"),
        (target, {"method": "mtp", "model": str(other)}, "does not draft from a model's caches"),
        (target, {"model": str(folder)}, r'is a head.*set "method": "mtp"'),
    ):
        with pytest.raises((ConfigError, ModelLoadError), match=message) as caught:
            loaded(model, given)
        assert "speculative_config" in str(caught.value)
    text, words = config["text_config"], {"vocab_size_per_layer_input": 272}
    for changes, message in (
        ({"backbone_hidden_size": 100}, "hidden states of 100 elements"),
        ({"text_config": text | {"head_dim": 16}}, "layer 0 of the drafter fits no cache"),
        ({"text_config": text | {"sliding_window": 8}}, "layer 0 of the drafter fits no cache"),
        ({"text_config": text | {"hidden_size_per_layer_input": 8} | words}, "per-layer embeddings of a drafter"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelLoadError, match=message):
            loaded(target, drafts)
