"""What a store refuses: what it does not have, what is too large for it, and that it cannot be reached.

CandleVllmError
├── RequestError
│   ├── NotStoredError          there is no such thing of this caller
│   ├── StoreLimitError         it is more than the store may hold
│   └── ConversationBusyError   another response is being added to the conversation
└── StoreUnavailableError       the database does not answer, or too much waits for it
"""

from __future__ import annotations

from candle_vllm.core.errors import CandleVllmError, RequestError


class NotStoredError(RequestError):
    """The caller has no such response, conversation or item, whether or not somebody else has one."""

    def __init__(self, what: str, name: str, param: str) -> None:
        super().__init__(f"{what} with id {name!r:.80} was not found.", param)


class StoreLimitError(RequestError):
    """What is to be kept is more than the store may hold."""


class ConversationBusyError(RequestError):
    """Too many responses wait for their turn in one conversation."""


class StoreUnavailableError(CandleVllmError):
    """A store does not answer in time, or too many calls wait for it; the cause has the details.

    Attributes:
        setting: the setting that says where the store is.
    """

    def __init__(self, message: str, setting: str | None = None) -> None:
        super().__init__(message)
        self.setting = setting
