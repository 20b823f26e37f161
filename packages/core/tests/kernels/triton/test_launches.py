# SPDX-License-Identifier: MIT
"""Every launch of whole engines compiles for a GPU that need not be there, and none for the first time in service."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from typing import Any

import pytest
import torch

from candle_vllm.core.kernels.triton_build import compile_together
from tests.common_run import few

KERNELS = {
    "launches.py": {"decode_kernel", "prefill_kernel", "rotary_write_kernel", "linear_kernel"},
    "launches_of_an_index.py": {"latent_decode_kernel", "latent_prefill_kernel", "latent_write_kernel"},
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("file", "kernels"), few(KERNELS.items(), ("launches.py", KERNELS["launches.py"])))
def test_what_an_engine_launches_is_compiled_when_it_starts(
    file: str, kernels: set[str], background: Any, request: pytest.FixtureRequest
) -> None:
    every_case = request.node.get_closest_marker("every_case") is not None
    done = background.files[file, every_case].result()
    assert done.returncode == 0, done.stderr[-4000:]
    forms = [json.loads(line) for line in done.stdout.splitlines()]
    assert kernels <= {form["kernel"] for form in forms}
    assert [form for form in forms if form["fault"]] == []
    assert {form["phase"] for form in forms} == {"together"}, "a start, or a request, would wait for a compiler"
    assert max(form["others"] for form in forms) > 0 or os.cpu_count() == 1, "forms are compiled one after another"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_triton_built_in_another_way_compiles_at_each_launch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from triton.runtime import jit

    monkeypatch.delattr(jit.JITFunction, "_do_compile")
    usual, called = jit.JITFunction.run, []
    with caplog.at_level(logging.DEBUG):
        assert compile_together(lambda: called.append("work"), torch.device("cpu")) == 0
    assert called == []
    assert jit.JITFunction.run is usual
    assert "_do_compile" in caplog.text
