# SPDX-License-Identifier: MIT
"""The library's own exceptions.

A message should have the given value, the allowed values, and what to do. `assert` is for internal invariants.
"""

from __future__ import annotations


def with_extra(name: str) -> str:
    """Return how to install an extra, as the end of a sentence that says what is missing."""
    clone = f"in a clone of the repository run `uv run --extra {name} candle-vllm` or `uv tool install '.[{name}]'`"
    return f"{clone}; with the wheels of a release run `uv pip install 'candle-vllm[{name}]'`"


class CandleVllmError(Exception):
    """Base of every error that the library raises on purpose."""


class ConfigError(CandleVllmError):
    """A setting that cannot work: the message names a value that works.

    `setting` is the name of the setting that is to blame, or None if no single one is.
    """

    def __init__(self, message: str, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


def refuse_settings(*checks: tuple[str | None, object, str]) -> None:
    """Raise ConfigError for the first of these settings that is refused; a check is (setting, is it refused, why)."""
    for setting, refused, why in checks:
        if refused:
            raise ConfigError(why, setting)


class NoMemoryError(ConfigError):
    """The model, its cache or its steps need more memory than is available."""


class NotReadyError(ConfigError):
    """An address, a server, other nodes or resources of Ray are not available: try again later."""


class ModelNotFoundError(CandleVllmError):
    """There is no such Hugging Face id, folder or file."""


class HubUnreachableError(ModelNotFoundError):
    """The model is not in the cache, and the hub or server did not answer or ended the download: try again later."""


class ModelLoadError(CandleVllmError):
    """The model's files were found but cannot be used."""


class InvalidFileError(ModelLoadError):
    """A model file is damaged, or a value is missing or impossible; the message names the file if it is known."""


class UnsupportedModelError(ModelLoadError):
    """The files need an architecture, tensor type or tokenizer that is not implemented."""


class WeightsError(ModelLoadError):
    """Tensors are missing, unexpected, or of the wrong shape."""


class AdapterError(ModelLoadError):
    """An adapter cannot be used: the message names the file, the key or tensor, what it has and what is allowed."""


class RequestError(CandleVllmError):
    """One request is wrong; other requests are not affected. `param` is the wrong field in the caller's spelling."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidParameterError(RequestError):
    """A request field is out of range, of the wrong type, or unknown."""


class UnsupportedParameterError(InvalidParameterError):
    """The request asks for a feature that this server does not implement, or that its operator does not allow."""


class PromptTooLongError(RequestError):
    """The prompt, or the prompt and `max_tokens` together, exceeds the context or the cache.

    Agents and LiteLLM recognise this error by "this model's maximum context length is", the words of OpenAI and vLLM.
    """


class ChatTemplateError(RequestError):
    """The model's chat template refused the conversation, failed, or took too long."""


class RequestAbortedError(CandleVllmError):
    """The request was aborted: by its caller, by shutdown, or because it took too long or its outputs were not read."""


class EngineOverloadedError(CandleVllmError):
    """The engine has no capacity for the request now: try again later."""


class EngineSleepingError(CandleVllmError):
    """The engine sleeps: it accepts requests again after it is woken."""


class EngineDeadError(CandleVllmError):
    """The engine has stopped; only a new engine can serve requests."""
