# SPDX-License-Identifier: MIT
"""Wire types of `/v1/files` and `/v1/batches`: OpenAI's file and batch objects. Times are seconds since 1970."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec
from pydantic import Field

from candle_vllm.openai.protocol.fields import WireModel
from candle_vllm.responses.protocol.fields import Metadata

BATCH, BATCH_OUTPUT = "batch", "batch_output"  # purposes of files
SEEN = ("vision", "user_data", "assistants")  # purposes of images that requests may give to a model
UPLOADED = (BATCH, *SEEN)
LEAST_LIFE, LONGEST_LIFE = 3600, 30 * 86400  # seconds
COMPLETION_SECONDS = 86400
WORKING = frozenset({"validating", "in_progress", "finalizing", "cancelling"})

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """A stored file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output", "vision", "user_data", "assistants"]
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of files, newest first."""

    object: Literal["list"] = "list"
    data: Sequence[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """A deleted file."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class ExpiresAfter(WireModel):
    """How long a file is stored."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=LEAST_LIFE, le=LONGEST_LIFE)]


class BatchRequest(WireModel):
    """The body of `POST /v1/batches`."""

    input_file_id: Annotated[str, Field(min_length=1, max_length=256)]
    endpoint: Literal[
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/score", "/score",
        "/v1/rerank", "/rerank", "/v2/rerank",
    ]  # fmt: skip
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a batch could not begin, or could not go on."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(msgspec.Struct, frozen=True, kw_only=True):
    """The first errors of a batch."""

    object: Literal["list"] = "list"
    data: Sequence[BatchError]


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    """How many lines a batch has, and how many of them have completed or failed."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: BatchStatus = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = RequestCounts()
    metadata: Mapping[str, str] | None = None


class BatchList(msgspec.Struct, frozen=True, kw_only=True):
    """One page of batches, newest first."""

    object: Literal["list"] = "list"
    data: Sequence[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A batch as it is stored.

    Attributes:
        batch: the batch as clients see it, but without a cancellation that no server has noticed yet.
        output_id: id of the file with the successful results.
        error_id: id of the file with the other results.
        result_seconds: seconds for which these files are stored.
    """

    batch: Batch
    output_id: str
    error_id: str
    result_seconds: int
