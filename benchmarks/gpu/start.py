# SPDX-License-Identifier: MIT
"""Cold start: seconds from the start of a process to the first token, by stage; one JSON line per start.

    python benchmarks/gpu/start.py --model llama-3.1-8b [--gguf] [--starts 2] [--quick --device cpu --eager]

Every start is a fresh process with weights made at random on the device (or a GGUF file in the page cache), and all
starts share one cache of compiled kernels that is empty at first: `cache` is "empty", then "filled". Python's bytecode
and the system's page cache are as they are found, and so warm from the second start on.

`python`       the interpreter's own start             `load`     config, tokenizer, and what else loading is
`import_torch`, `import_engine`                        `weights`  filling the model
`device`       the CUDA context                        `build`    memory plan, cache, warm-up, without capture
`capture`      of CUDA graphs                          `first_token`  a prompt of 128 tokens to its first token
`total`        all of it                               `compile`  Triton's compiler, contained in the others;
                                                                  `compiled` kernels that were not in the cache
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from models import SHAPES, write_folder, write_gguf

PROMPT = 128


def main() -> None:
    """Starts the processes, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--gguf", action="store_true", help="as Q4_K_M")
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600.0, help="no start begins later than this")
    parser.add_argument("--eager", action="store_true", help="the layers one by one in torch")
    parser.add_argument("--quick", action="store_true", help="a toy model, to check this script")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    parser.add_argument("--started", type=json.loads, help=argparse.SUPPRESS)  # a child: when, and which model
    options = parser.parse_args()
    if options.quick:
        options.model = "toy"
    if options.started:
        start(options)
        return
    until = time.monotonic() + options.seconds
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.gguf" if options.gguf else Path(folder) / "model"
        (write_gguf if options.gguf else write_folder)(model, SHAPES[options.model])
        environment = dict(os.environ, TRITON_CACHE_DIR=str(Path(folder) / "triton"))
        for number in range(options.starts):
            if time.monotonic() > until:
                sys.stderr.write(f"{options.starts - number} starts were skipped: no time left\n")
                break
            told = json.dumps({"at": time.time(), "model": str(model), "cache": "filled" if number else "empty"})
            subprocess.run([sys.executable, *sys.argv, "--started", told], env=environment, check=True)


# ---- in a process of its own -----------------------------------------------------------------------------------------


class Stages:
    """Seconds by stage. A stage within another is taken off the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times what runs within."""
        begin = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - self._inner.pop()
            self._inner[-1] += spent

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return function(*args, **kwargs)

        return timed


def start(options: argparse.Namespace) -> None:
    """One start, from a process's first line to a token."""
    stages = Stages()
    stages.seconds["python"] = time.time() - options.started["at"]
    with stages.stage("import_torch"):
        import torch
    with stages.stage("import_engine"):
        from candle_vllm.core import EngineConfig, InferenceEngine, SamplingParams
        from candle_vllm.core import inference_engine as front
        from candle_vllm.core.assembly import model as loading
    with stages.stage("device"):
        torch.zeros(1, device=options.device)
    compiled: list[float] = []
    with ExitStack() as stack:
        for module, name, stage in (
            (front, "load_any_model", "load"),
            (loading, "load_weights", "weights"),
            (front, "build_engine", "build"),
        ):
            stack.enter_context(mock.patch.object(module, name, stages.around(stage, getattr(module, name))))
        if options.device == "cuda":
            _watch_gpu(stack, stages, compiled)
        config = EngineConfig(
            model=options.started["model"],
            load_format="auto" if options.gguf else "dummy",
            device=options.device,
            op_by_op=options.eager,
            max_model_len=min(4096, SHAPES[options.model].context),
        )
        engine = stack.enter_context(InferenceEngine(config))
        with stages.stage("first_token"):
            prompt = [2 + index % 250 for index in range(PROMPT)]
            engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
            while engine.has_unfinished_requests:
                engine.step()
        total = time.time() - options.started["at"]
    from measure import report

    found = {f"{name}_s": seconds for name, seconds in stages.seconds.items()}
    found |= {"total_s": total, "compile_s": sum(compiled), "compiled": len(compiled)}
    what = {"model": options.model, "gguf": options.gguf, "cache": options.started["cache"]}
    report("start", options.device, options.commit, **what, **found)


def _watch_gpu(stack: ExitStack, stages: Stages, compiled: list[float]) -> None:
    """Times graph capture, and notes the seconds of each kernel that Triton compiles."""
    import torch
    from triton import knobs

    entered: list[Any] = []
    begin, end = torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.capture_end

    def timed_begin(graph: Any, *args: Any, **kwargs: Any) -> None:
        entered.append(stages.stage("capture"))
        entered[-1].__enter__()
        begin(graph, *args, **kwargs)

    def timed_end(graph: Any) -> None:
        try:
            end(graph)
        finally:
            entered.pop().__exit__(None, None, None)

    def note(*, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            compiled.append(times.total / 1e6)

    stack.enter_context(mock.patch.object(torch.cuda.CUDAGraph, "capture_begin", timed_begin))
    stack.enter_context(mock.patch.object(torch.cuda.CUDAGraph, "capture_end", timed_end))
    stack.enter_context(mock.patch.object(knobs.compilation, "listener", note))


if __name__ == "__main__":
    main()
