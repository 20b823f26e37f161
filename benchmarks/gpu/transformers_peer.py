# SPDX-License-Identifier: MIT
"""transformers' continuous batching, with the same model, prompts and machine as `engine.py`: one JSON line per result.

    python benchmarks/gpu/transformers_peer.py --model llama-3.1-8b [--batches 1 64] [--attention sdpa]
        [--quick] [--device cpu]

decode  `ms_step`: from when the last stream has its first token to when the first stream has its last, by the time
        stamps of `generate_batch`, over the steps between; `tok_s` of all streams. Making the manager and its CUDA
        graphs is not counted.
serve   output tokens per second from the first request's arrival to the last token, of the same run.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import logging
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import Deadline, report
from models import SHAPES, write_folder

sys.path.remove(str(Path(__file__).parent))  # transformers looks for a package named kernels

from transformers.generation import configuration_utils
from transformers.generation.configuration_utils import GenerationConfig
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--depth", type=int, default=512)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--attention", default="sdpa", help="as transformers names it")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--quick", action="store_true", help="a toy model, to check this script")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    options = parser.parse_args()
    if options.quick:
        options.model, options.batches, options.depth, options.output = "toy", [2], 16, 8
    logging.getLogger("transformers").setLevel(logging.ERROR)
    deadline, skipped = Deadline(options.seconds), []
    config = {"attention": options.attention}
    say = functools.partial(report, "transformers", options.device, options.commit, model=options.model, config=config)
    model = load(options.model, options.attention, options.device)
    for batch in options.batches:
        if deadline.over:
            skipped.append(f"batch {batch}")
            continue
        try:
            run(model, batch, options.depth, 4)
            for figures in figures_of(run(model, batch, options.depth, options.output), options.depth):
                say(batch=batch, **figures)
        except Exception as error:
            say(batch=batch, failed=f"{type(error).__name__}: {error}"[:500])
    if skipped:
        say(skipped=skipped)


def load(name: str, attention: str, device: str) -> Any:
    """The model with random weights in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(write_folder(Path(folder), SHAPES[name]))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    return model.eval()


def run(model: Any, batch: int, depth: int, output: int) -> list[Any]:
    """`output` tokens behind each of `batch` random prompts."""
    numbers = random.Random(0)  # noqa: S311 - the same prompts in every run
    prompts = [[numbers.randrange(2, model.config.vocab_size) for _ in range(depth)] for _ in range(batch)]
    settings = GenerationConfig(max_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0)
    wanted: dict[str, Any] = {"record_timestamps": True, "progress_bar": False}
    if hasattr(configuration_utils, "ContinuousBatchingConfig"):
        taken = inspect.signature(configuration_utils.ContinuousBatchingConfig).parameters
        limits: dict[str, Any] = {"auto_switch_to_flash": False, "max_memory_percent": 0.6}
        if model.device.type == "cpu":
            limits |= {"num_blocks": 16, "max_batch_tokens": 64}  # the default takes most of the memory
        limits = {name: value for name, value in limits.items() if name in taken}
        wanted["continuous_batching_config"] = configuration_utils.ContinuousBatchingConfig(**limits)
    results = list(model.generate_batch(inputs=prompts, generation_config=settings, **wanted).values())
    for result in results:
        if result.error or len(result.generated_tokens) != output:
            raise RuntimeError(f"{len(result.generated_tokens)} of {output} tokens came: {result.error}")
    if len(results) != batch:
        raise RuntimeError(f"{len(results)} of {batch} answers came")
    return results


def figures_of(results: list[Any], depth: int) -> list[dict[str, Any]]:
    """What the time stamps of a run say."""
    times, batch = [result.timestamps for result in results], len(results)
    output = len(times[0])
    begin, end = max(stamps[0] for stamps in times), min(stamps[-1] for stamps in times)
    steps = sum(begin < stamp <= end for stamps in times for stamp in stamps) / batch
    whole = max(stamps[-1] for stamps in times) - min(result.created_time for result in results)
    found: list[dict[str, Any]] = [
        {"what": "serve", "prompt": depth, "output": output, "tok_s": batch * output / whole}
    ]
    if steps >= 2:
        seconds = (end - begin) / steps
        found.insert(
            0, {"what": "decode", "context": depth + output // 2, "ms_step": 1e3 * seconds, "tok_s": batch / seconds}
        )
    return found


if __name__ == "__main__":
    main()
