# SPDX-License-Identifier: MIT
"""Every failure that a user can cause, as one tree.

    CandleVllmError
    ├── ConfigError              a setting that cannot work: names the setting and a value that does
    │   └── NoMemoryError        what was asked for does not fit into the memory that there is
    ├── ModelNotFoundError       no such Hugging Face id, folder or file
    ├── ModelLoadError           the files are there and cannot be used
    │   ├── InvalidFileError     damaged or hostile: a size, offset, count or string beyond the file
    │   ├── UnsupportedModelError  an architecture, tensor type or tokenizer that is not implemented
    │   ├── WeightsError         missing, unexpected or misshapen tensors
    │   └── AdapterError         an adapter's files are damaged, hostile, or do not fit the model
    ├── RequestError             one request is wrong; its neighbours are not affected
    │   ├── InvalidParameterError  a field out of range or of the wrong type
    │   │   └── UnsupportedParameterError  it asks for what is not done here
    │   ├── PromptTooLongError   the prompt, or prompt + max_tokens, exceeds the context or the cache
    │   └── ChatTemplateError    the model's template refused, failed or ran out of time
    ├── RequestAbortedError      the request was aborted before it finished
    ├── EngineOverloadedError    the queue is full: try again later
    ├── EngineSleepingError      the engine has given its memory back and waits to be woken
    └── EngineDeadError          the engine has stopped and takes no more requests

A message says what was given, what is allowed, and what to do. `assert` is for our own invariants.
"""

from __future__ import annotations


def with_extra(name: str) -> str:
    """How an extra is brought, for the end of a sentence that says what is missing."""
    return f"in the clone `uv run --extra {name} candle-vllm`, with its wheels pip install 'candle-vllm[{name}]'"


class CandleVllmError(Exception):
    """Base of every error that the library raises on purpose."""


class ConfigError(CandleVllmError):
    """A setting that cannot work.

    Attributes:
        setting: name of the `EngineConfig` field, or None when several are at odds.
    """

    def __init__(self, message: str, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting


class NoMemoryError(ConfigError):
    """The model, its cache or its steps need more memory than there is."""


class ModelNotFoundError(CandleVllmError):
    """The model source names nothing that exists."""


class ModelLoadError(CandleVllmError):
    """The model's files were found and cannot be used."""


class InvalidFileError(ModelLoadError):
    """A model file is damaged, truncated or hostile; the message names the file and the place."""


class UnsupportedModelError(ModelLoadError):
    """The file is well formed and asks for something that is not implemented."""


class WeightsError(ModelLoadError):
    """Tensors are missing, unexpected, half of a merged set, or of the wrong shape."""


class AdapterError(ModelLoadError):
    """An adapter cannot be used: the message names the file, the key or tensor, what it has and what is allowed."""


class RequestError(CandleVllmError):
    """One request is wrong.

    Attributes:
        param: the field to blame, as the caller spelled it, or None.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidParameterError(RequestError):
    """A request field is out of range, of the wrong type, or unknown."""


class UnsupportedParameterError(InvalidParameterError):
    """The request asks for something that exists elsewhere and is not implemented here, or not allowed."""


class PromptTooLongError(RequestError):
    """The prompt, or the prompt and `max_tokens` together, cannot fit.

    Agents and LiteLLM know it by the words "maximum context length", which OpenAI and vLLM use.
    """


class ChatTemplateError(RequestError):
    """The model's chat template refused the conversation, failed, or took too long."""


class RequestAbortedError(CandleVllmError):
    """The request was aborted by its caller or by shutdown."""


class EngineOverloadedError(CandleVllmError):
    """The waiting queue is full."""


class EngineSleepingError(CandleVllmError):
    """The engine sleeps: it takes requests again once it is woken."""


class EngineDeadError(CandleVllmError):
    """The engine has stopped; only a new engine can serve requests."""
