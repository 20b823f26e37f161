"""The model of drafts: loaded behind the one that it drafts for, and refused where their words differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from candle_vllm.core.assembly.model import Described, LoadedModel, describe_model, load_model
from candle_vllm.core.assembly.opening import model_files, open_model
from candle_vllm.core.config import EngineConfig, draft_settings
from candle_vllm.core.devices import Device
from candle_vllm.core.errors import ConfigError, ModelLoadError, ModelNotFoundError
from candle_vllm.core.text.tokenizer import Tokenizer

MOST_UNSHARED = 128
"""Tokens that only one of the two may have: vocabularies of one family end in different added or empty ones."""


def draft_config(config: EngineConfig) -> EngineConfig | None:
    """The settings that the model of drafts is loaded with; None where there is to be none."""
    drafts = draft_settings(config.speculative_config)
    if drafts is None or drafts.model is None:
        return None
    return dataclasses.replace(
        config,
        model=drafts.model,
        revision=drafts.revision,
        weight_file=drafts.weight_file,
        tokenizer=None,
        chat_template=None,
        isq=None,
        yarn_scaling_factor=None,
        max_model_len=None,
        speculative_config=None,
    )


def find_draft(config: EngineConfig) -> None:
    """Finds, and where need be downloads, the files of the model of drafts, before the large model is read.

    Raises:
        ConfigError, ModelNotFoundError: it cannot be had.
    """
    if (drafts := draft_config(config)) is not None:
        with _as_setting(drafts):
            model_files(drafts)


def describe_draft(config: EngineConfig, device: Device) -> Described | None:
    """All of the model of drafts but its weights; None where there is to be none. Errors as `load_draft`."""
    drafts = draft_config(config)
    if drafts is None:
        return None
    with _as_setting(drafts):
        opened = open_model(model_files(drafts), device)
        with opened.checkpoint:
            return describe_model(drafts, device, opened)


def load_draft(
    config: EngineConfig, target: LoadedModel, device: Device, progress: Callable[[int, int], object]
) -> LoadedModel | None:
    """The model of drafts for `target`; None where there is to be none, and on a GPU, where no model drafts.

    Raises:
        ConfigError, ModelNotFoundError, ModelLoadError: it cannot be loaded, or has another vocabulary.
    """
    drafts = draft_config(config)
    if drafts is None or device.type == "cuda":
        return None
    with _as_setting(drafts):
        draft = load_model(drafts, device, progress, open_model(model_files(drafts), device))
    difference = vocabulary_difference(target.tokenizer, draft.tokenizer)
    if difference is not None:
        raise ConfigError(
            f"speculative_config: {draft.name} cannot draft for {target.name}, for they have different vocabularies "
            f"({difference}): take a smaller model of the same family",
            "speculative_config",
        )
    return draft


def vocabulary_difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """How two vocabularies differ, for people; None where each token that both have is the same text in both.

    Rows without a token do not count, and up to `MOST_UNSHARED` tokens may be missing from one of them.
    """
    first, second = (
        {index: text for text, index in words.backend.get_vocab(with_added_tokens=True).items()}
        for words in (one, other)
    )
    for index in sorted(first.keys() & second.keys()):
        if first[index] != second[index]:
            return f"token {index} is {first[index]!r:.40} in one and {second[index]!r:.40} in the other"
    unshared = len(first.keys() ^ second.keys())
    if unshared > MOST_UNSHARED:
        return f"{unshared} tokens are in one alone, of {len(first)} and {len(second)}"
    return None


@contextmanager
def _as_setting(drafts: EngineConfig) -> Iterator[None]:
    """Says of errors that the model of drafts is meant."""
    said = f"speculative_config: the model of drafts, {drafts.model!r:.200}"
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{said}: {error}", "speculative_config") from error
    except (ModelNotFoundError, ModelLoadError) as error:
        raise type(error)(f"{said}: {error}") from error
