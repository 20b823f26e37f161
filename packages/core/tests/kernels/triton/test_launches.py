"""Every launch of whole engines compiles for a GPU that need not be there, and none for the first time in service."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", ["launches.py"])
def test_what_an_engine_launches_is_compiled_when_it_starts(file: str, background: Any) -> None:
    done = background.files[file].result()
    assert done.returncode == 0, done.stderr[-4000:]
    forms = [json.loads(line) for line in done.stdout.splitlines()]
    assert {"decode_kernel", "prefill_kernel", "rotary_write_kernel", "exact_kernel", "linear_kernel"} <= {
        form["kernel"] for form in forms
    }
    assert [form for form in forms if form["fault"]] == []
    assert [form["kernel"] for form in forms if form["phase"] == "serve"] == [], "a request would wait for a compiler"
