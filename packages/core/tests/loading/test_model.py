# SPDX-License-Identifier: MIT
"""What load_model makes of the small files beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from candle_vllm.core import EngineConfig, InvalidFileError, UnsupportedModelError, WeightsError
from candle_vllm.core.assembly.model import LoadedModel, load_model
from candle_vllm.core.conversion.gguf_file import write_file
from candle_vllm.core.loading.gguf import open_gguf
from candle_vllm.core.models.registry import family_from_gguf
from candle_vllm.core.testing.toy_model import TOY_VOCAB_SIZE, toy_config, write_toy_model
from packages.core.tests.toy_gguf import write_toy_gguf

NAN = float("nan")


def load(model: Path, **settings: Any) -> LoadedModel:
    return load_model(EngineConfig(model=str(model), **settings), torch.device("cpu"), lambda *_: None)


def with_generation_config(folder: Path, values: dict[str, Any]) -> Path:
    write_toy_model(folder)
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


# ---- generation config -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -5),
        ("temperature", 10**400),
        ("temperature", NAN),
        ("temperature", True),
        ("top_p", -0.5),
        ("top_p", 5.0),
        ("top_k", -5),
        ("top_k", 5.5),
        ("top_k", 10**30),
        ("top_k", [1]),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", {}),
        ("do_sample", "no"),
        ("eos_token_id", "x"),
        ("eos_token_id", -2),
        ("eos_token_id", [258, True]),
        ("eos_token_id", 258.5),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_a_wrong_default_names_file_and_key(key: str, value: Any, tmp_path: Path) -> None:
    folder = with_generation_config(tmp_path, {key: value})
    with pytest.raises(InvalidFileError, match=key) as caught:
        load(folder)
    assert str(folder / "generation_config.json") in str(caught.value)


def test_defaults_take_their_own_types(tmp_path: Path) -> None:
    folder = with_generation_config(tmp_path, {"top_k": 5.0, "temperature": 1, "top_p": None, "eos_token_id": 256})
    loaded = load(folder)
    assert {key: (value, type(value)) for key, value in loaded.default_sampling.items()} == {
        "top_k": (5, int),
        "temperature": (1.0, float),
    }
    assert loaded.eos_token_ids[:2] == (256, 258)


def test_the_likeliest_token_alone_is_greedy_decoding(tmp_path: Path) -> None:
    loaded = load(with_generation_config(tmp_path, {"top_p": 0, "temperature": 0.7, "do_sample": True}))
    assert loaded.default_sampling == {"temperature": 0.0}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [-1, TOY_VOCAB_SIZE, [100, -1, TOY_VOCAB_SIZE + 5], 100.0])
def test_an_end_token_that_cannot_be_sampled_is_ignored_by_name(
    file: str, value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_toy_model(tmp_path, toy_config(eos_token_id=258))
    path = tmp_path / file
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(said | {"eos_token_id": value}))
    loaded = load(tmp_path)
    listed = value if isinstance(value, list) else [value]
    assert set(loaded.eos_token_ids) == {256, 258, *(index for index in listed if 0 <= index < TOY_VOCAB_SIZE)}
    for index in listed:
        said = f"{path}: eos_token_id {index} is ignored"
        assert (said in caplog.text) == (not 0 <= index < TOY_VOCAB_SIZE)


def test_a_count_may_be_written_with_a_point(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 64.0, "num_hidden_layers": 2.0})
    )
    loaded = load(folder)
    assert (loaded.config.max_position, loaded.layers) == (64, range(2))
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64.5}))
    with pytest.raises(InvalidFileError, match=r"max_position_embeddings is 64\.5, not a int"):
        load(folder)


# ---- GGUF: numbers for each layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "feed_forward_length"])
@pytest.mark.parametrize("make", [list, np.array])
def test_equal_numbers_for_each_layer_are_the_number(key: str, make: Any, tmp_path: Path) -> None:
    with open_gguf(write_toy_gguf(tmp_path / "m.gguf")) as checkpoint:
        plain, key = dict(checkpoint.metadata), f"llama.{key}"
        number = plain[key]
        _, wanted = family_from_gguf(plain, checkpoint)
        _, found = family_from_gguf(plain | {key: make([number, number])}, checkpoint)
        assert found == wanted
        assert all(type(value) is type(getattr(wanted, name)) for name, value in vars(found).items())
        with pytest.raises(UnsupportedModelError, match=rf"{key} is .*: layers of different sizes are not implemented"):
            family_from_gguf(plain | {key: make([number, 2 * number])}, checkpoint)
        for wrong in ([], [number], [number] * 3):
            with pytest.raises(InvalidFileError, match=f"{key} is .*, not a int"):
                family_from_gguf(plain | {key: make(wrong)}, checkpoint)


# ---- files that are not models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"general.architecture": "imatrix"}, "this is an importance matrix: use --imatrix"),
        ({"general.type": "imatrix"}, "this is an importance matrix: use --imatrix"),
        (
            {"general.type": "adapter"},
            r"this is an adapter: use --lora-modules \(with quantize: --lora\) and name the model",
        ),
        ({"general.type": "mmproj"}, "the vision tower of a model: use --mmproj"),
        ({"general.architecture": "clip"}, "the vision tower of a model: use --mmproj"),
    ],
)
def test_another_kind_of_file_is_refused_with_its_flag(metadata: dict[str, str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "Tiny-Llama-Q4_K_M.gguf"
    write_file(path, [], {"general.architecture": "llama", **metadata})
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("impl", ["auto", "native", "transformers"])
@pytest.mark.parametrize("said", [{"is_causal": False}, {"text_config": {"is_causal": False}}, None], ids=str)
def test_a_decoder_whose_tokens_see_later_ones_is_refused(said: Any, impl: str, tmp_path: Path) -> None:
    """Models for embeddings are published with such a config, and causal attention would give other vectors."""
    if said is None:
        model = path = tmp_path / "m.gguf"
        write_file(path, [], {"general.architecture": "llama", "llama.attention.causal": False})
    else:
        model = write_toy_model(tmp_path)
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | said))
    with pytest.raises(UnsupportedModelError, match=r"(is_|attention\.)causal is false, and attention") as caught:
        load(model, model_impl=impl)
    assert str(path) in str(caught.value)


# ---- messages --------------------------------------------------------------------------------------------------------


def test_errors_in_gguf_metadata_name_the_file(tmp_path: Path) -> None:
    path = write_toy_gguf(tmp_path / "model.gguf", toy_config(rope_theta=1.0))
    with pytest.raises(InvalidFileError, match="rope_theta") as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_broken_template_names_its_file_or_the_setting(tmp_path: Path) -> None:
    folder = write_toy_model(tmp_path)
    with pytest.raises(UnsupportedModelError, match="chat_template setting: "):
        load(folder, chat_template="{{")
    (folder / "chat_template.jinja").write_text("{{")
    with pytest.raises(UnsupportedModelError, match="line 1") as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_the_folder_of_another_tokenizer_is_the_one_named(tmp_path: Path) -> None:
    folder, other = write_toy_model(tmp_path / "model"), write_toy_model(tmp_path / "words")
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidFileError) as caught:
        load(folder, tokenizer=other)
    assert str(other) in str(caught.value)
    assert str(folder) not in str(caught.value)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_a_gguf_that_claims_a_huge_layer_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from candle_vllm.core.loading import gguf

    path = write_toy_gguf(tmp_path / "model.gguf")
    opened = gguf.open_gguf

    def lying(path: Path) -> Any:
        checkpoint = opened(path)
        checkpoint.metadata = {**checkpoint.metadata, "llama.feed_forward_length": 1 << 24}
        return checkpoint

    monkeypatch.setattr("candle_vllm.core.assembly.opening.open_gguf", lying)
    with pytest.raises(WeightsError, match="16777216") as caught:
        load(path)
    assert str(path) in str(caught.value)
