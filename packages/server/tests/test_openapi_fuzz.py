# SPDX-License-Identifier: MIT
"""Requests that schemathesis makes of the document: none is a 5xx, and every answer is as described.

Examples and random requests, the same in every run; where all is asked also right requests at the edges of each field,
wrong ones that differ in one thing, and requests without the key.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packages.server.tests.server_fakes import PacedEngine

# The schemas do not have the rules between fields, so a request that follows them may be wrong all the same.
UNUSED = "positive_data_acceptance"
# Paths whose body is that of another one, or of two others; of the four that generate all but the one with most fields.
TWINS = (
    "^(/score|/rerank|/v2/rerank|/v1/messages/count_tokens|/v1/responses/input_tokens|/v1/chat/completions/input_tokens"
    "|/reranking|/v1/reranking|/apply-template|/infill"
    "|/v1/completions|/v1/messages|/v1/responses|/v1/conversations|/api/generate|/api/embed|/api/embeddings"
    r"|/tokenize|/v1/conversations/\{conversation_id\}/items)$"
)
ASLEEP = "^/sleep$"  # after which everything else is refused
# A body with too many parts in too many messages is too large as well.
CONFIGURATION = "[checks.negative_data_rejection]\nexpected-statuses = [400, 401, 404, 405, 409, 413, 415]\n"


@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    ("excluded", "phases", "most", "least"),
    [
        pytest.param(TWINS, "examples,fuzzing", 3, 200, id="some"),
        pytest.param(ASLEEP, "examples,coverage,fuzzing", 10, 10_000, id="all", marks=pytest.mark.every_case),
    ],
)
def test_the_server_keeps_to_its_document(
    start: Callable[..., Any], tmp_path: Path, excluded: str, phases: str, most: int, least: int
) -> None:
    running = start(PacedEngine(), api_key=("key",), trust_request_chat_template=True)
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/openapi.json",
        "--header", "Authorization: Bearer key",
        "--phases", phases, "--exclude-checks", UNUSED, "--max-examples", str(most),
        "--exclude-path-regex", f"{ASLEEP}|{excluded}", "--no-shrink", "--generation-deterministic",
        "--request-timeout", "60", "--no-color",
    ]  # fmt: skip
    made = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path, check=False)
    assert made.returncode == 0, made.stdout[-20_000:] + made.stderr[-2000:]
    cases = re.search(r"(\d+) generated", made.stdout)
    assert cases is not None
    assert int(cases[1]) > least
    with running.http() as client:
        assert client.get("/health").status_code == 200
