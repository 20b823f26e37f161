# SPDX-License-Identifier: MIT
"""What is changed of llama.cpp's tests: models are not loaded before the first test, a port of its own, and texts of
other models than theirs are not compared."""

from __future__ import annotations

import os
import socket

import pytest
import utils  # pyright: ignore[reportMissingImports]

utils.match_regex = lambda regex, text: True  # noqa: ARG005
utils.ServerPreset.load_all = staticmethod(lambda: None)
with socket.socket() as _free:
    _free.bind(("127.0.0.1", 0))
    os.environ["PORT"] = str(_free.getsockname()[1])


@pytest.fixture(autouse=True)
def _own_match(request: pytest.FixtureRequest) -> None:
    """Test modules have `match_regex` by `from utils import *`."""
    if hasattr(request.module, "match_regex"):
        request.module.match_regex = utils.match_regex
