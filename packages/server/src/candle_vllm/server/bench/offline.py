# SPDX-License-Identifier: MIT
"""`candle-vllm bench throughput`, `latency` and `speculation`: benchmarks of the engine in this process, without HTTP.

They call the engine at step 3 of a request's life. `throughput` and `latency` do the same as vLLM's commands: they
submit a set of requests at once, or run one batch repeatedly. `speculation` answers each prompt alternately with and
without draft tokens.
"""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from candle_vllm.core import CandleVllmError, EngineConfig, InferenceEngine, SamplingParams
from candle_vllm.core.engine.outputs import GenerationOutput
from candle_vllm.server.bench.datasets import DataOptions, make_samples
from candle_vllm.server.settings.derived import load_engine
from candle_vllm.server.settings.options import UsageError
from candle_vllm.server.settings.table import ModelOptions

PERCENTILES = (10, 25, 50, 75, 90, 99)


class EngineWords:
    """An engine's tokenizer (`Words`)."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine

    def draw(self, count: int, chance: random.Random) -> list[int]:
        """Sample random tokens, without end-of-sequence tokens."""
        info = self._engine.model_info
        ends, most = set(info.eos_token_ids), info.vocab_size
        drawn = (chance.randrange(most) for _ in range(count + count))
        made = [token for token in drawn if token not in ends][:count]
        return made if len(made) == count else self.draw(count, chance)

    def encode(self, text: str) -> list[int]:
        return self._engine.tokenize(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens."""
        return self._engine.detokenize(ids)


def bench_throughput(settings: ModelOptions, n: int = 1, output_json: Path | None = None, **data: Any) -> int:
    """Answer a data set (`data`: `DataOptions`) as fast as possible, and print requests and tokens per second."""
    options = DataOptions(**data)
    with load_engine(settings, max_queued_requests=_queue(options.num_prompts * n)) as engine:
        words = EngineWords(engine)
        samples = make_samples(options, lambda: words)
        params = [_params(sample.output_len or 128, n) for sample in samples]
        began = time.perf_counter()
        outputs = engine.generate([sample.prompt for sample in samples], params, use_tqdm=sys.stderr.isatty())
        elapsed = time.perf_counter() - began
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    made = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
    result = {
        "elapsed_time": elapsed,
        "num_requests": len(outputs),
        "total_num_tokens": prompt + made,
        "requests_per_second": len(outputs) / elapsed,
        "tokens_per_second": (prompt + made) / elapsed,
    }
    sys.stdout.write(
        f"Throughput: {len(outputs) / elapsed:.2f} requests/s, {(prompt + made) / elapsed:.2f} total tokens/s, "
        f"{made / elapsed:.2f} output tokens/s\nTotal num prompt tokens:  {prompt}\nTotal num output tokens:  {made}\n"
    )
    _save(output_json, result)
    return 0


def bench_latency(
    settings: ModelOptions,
    input_len: int = 32,
    output_len: int = 128,
    batch_size: int = 8,
    n: int = 1,
    num_iters_warmup: int = 10,
    num_iters: int = 30,
    seed: int = 0,
    output_json: Path | None = None,
) -> int:
    """Answer one batch repeatedly, and print its latency."""
    size = max(batch_size * n, settings.max_num_seqs or 64)
    # The same prompts are repeated, so a prefix cache would falsify the result.
    with load_engine(
        settings, enable_prefix_caching=False, max_num_seqs=size, max_queued_requests=_queue(batch_size * n)
    ) as engine:
        chance = random.Random(seed)  # noqa: S311 - the same prompts in every run
        words = EngineWords(engine)
        prompts = [words.draw(input_len, chance) for _ in range(batch_size)]
        params = _params(output_len, n)
        for _ in range(num_iters_warmup):
            engine.generate(prompts, params, use_tqdm=False)
        latencies = []
        for _ in range(num_iters):
            began = time.perf_counter()
            outputs = engine.generate(prompts, params, use_tqdm=False)
            latencies.append(time.perf_counter() - began)
            lengths = {len(answer.token_ids) for output in outputs for answer in output.outputs}
            if lengths != {output_len}:
                raise CandleVllmError(
                    f"the engine stopped after {min(lengths)} of {output_len} tokens: nothing to compare"
                )
    percentiles = {str(each): float(np.percentile(latencies, each)) for each in PERCENTILES}
    average = float(np.mean(latencies))
    sys.stdout.write(f"Avg latency: {average} seconds\n")
    for each, seconds in percentiles.items():
        sys.stdout.write(f"{each}% percentile latency: {seconds} seconds\n")
    _save(output_json, {"avg_latency": average, "latencies": latencies, "percentiles": percentiles})
    return 0


def bench_speculation(
    settings: ModelOptions,
    pairs: int = 5,
    skip_chat_template: bool = False,
    output_json: Path | None = None,
    **data: Any,
) -> int:
    """Answer each distinct prompt, one by one, alternately with and without draft tokens, and print the speedup.

    `data` are `DataOptions`, by default 10 prompts of a custom file. Returns 1 if any answers differ, else 0.
    """
    drafts = settings.speculative_config or {"method": "suffix"}
    if drafts.get("method") == "none":
        raise UsageError(
            '--speculative-config {"method": "none"} proposes no draft tokens: there is nothing to measure'
        )
    with load_engine(settings, speculative_config=drafts) as engine:
        words = EngineWords(engine)
        usual: dict[str, Any] = {"dataset_name": "custom", "num_prompts": 10}
        samples = make_samples(DataOptions(**usual | data), lambda: words)
        asked = [
            (_in_template(engine, sample.prompt, raw=skip_chat_template), sample.output_len or 256)
            for sample in dict.fromkeys(samples)
        ]
        result = _paired(engine, asked, pairs)
    sys.stdout.write(
        f"Prompts: {len(asked)}, pairs: {pairs}, tokens after the first: {result['output_tokens']}\n"
        f"Plain: {result['plain_tokens_per_second']:.2f} tokens/s\n"
        f"With drafts: {result['tokens_per_second']:.2f} tokens/s\n"
        f"Ratio, median of the pairs: {result['ratio']:.3f}\n"
        f"Draft tokens: {result['draft_tokens']}, accepted: {result['accepted_draft_tokens']} "
        f"({result['acceptance_rate']:.1%}); tokens a step: {result['tokens_per_step']:.2f}\n"
        f"Upper bound from step times: {result['bound']:.3f}\n"
        f"Answers that differ: {result['different_answers']}\n"
    )
    _save(output_json, result)
    return 1 if result["different_answers"] else 0


def _in_template(engine: InferenceEngine, prompt: str, *, raw: bool) -> str:
    if raw or not engine.model_info.has_chat_template:
        return prompt
    return engine.apply_chat_template([{"role": "user", "content": prompt}])


@dataclasses.dataclass
class _Total:
    """Sums over answers: tokens after the first, their seconds, and proposed and accepted draft tokens."""

    tokens: int = 0
    seconds: float = 0.0
    tried: int = 0
    right: int = 0

    def add(self, output: GenerationOutput) -> tuple[int, ...]:
        times = output.metrics
        assert times is not None
        if times.first_token_time is not None and times.finished_time is not None:
            self.tokens += len(output.token_ids) - 1
            self.seconds += times.finished_time - times.first_token_time
        self.tried += times.draft_tokens
        self.right += times.accepted_draft_tokens
        return output.token_ids


def _paired(engine: InferenceEngine, asked: Sequence[tuple[str, int]], pairs: int) -> dict[str, Any]:
    """Answer each prompt with and without drafts in alternating order, and compute the result; round 0 is a warmup."""
    whole = _Total(), _Total()
    ratios, different = list[float](), 0
    for pair in range(pairs + 1):
        round_of = _Total(), _Total()
        for place, (prompt, length) in enumerate(asked):
            found: dict[int, tuple[int, ...]] = {}
            for drafts in (0, 1) if (pair + place) % 2 else (1, 0):
                # With the salt, the first answer cannot become the draft of the second.
                params = SamplingParams(temperature=0.0, max_tokens=length, cache_salt="bench")
                params.num_speculative_tokens *= drafts
                (output,) = engine.generate([prompt], params, add_special_tokens=False, use_tqdm=False)
                found[drafts] = round_of[drafts].add(output)
                if pair:
                    whole[drafts].add(output)
            different += found[0] != found[1]
        if min(each.tokens for each in round_of) <= 0:
            raise CandleVllmError("the answers have one token each: nothing to compare")
        if pair:
            rates = [each.tokens / max(each.seconds, 1e-9) for each in round_of]
            ratios.append(rates[1] / rates[0])
    plain, drafted = whole
    steps = drafted.tokens - drafted.right
    return {
        "num_prompts": len(asked),
        "pairs": pairs,
        "output_tokens": drafted.tokens,
        "plain_tokens_per_second": plain.tokens / max(plain.seconds, 1e-9),
        "tokens_per_second": drafted.tokens / max(drafted.seconds, 1e-9),
        "ratio": statistics.median(ratios),
        "draft_tokens": drafted.tried,
        "accepted_draft_tokens": drafted.right,
        "acceptance_rate": drafted.right / max(1, drafted.tried),
        "tokens_per_step": drafted.tokens / steps,
        "bound": bound_of(drafted.tokens / steps, 1 + drafted.tried / steps, engine.stats().step_seconds),
        "different_answers": different,
        "step_seconds": engine.stats().step_seconds,
    }


def bound_of(tokens: float, rows: float, seconds: Sequence[float]) -> float:
    """Return an upper bound of the speedup: the rate of steps with drafts, relative to the rate of plain steps.

    A step with drafts yields `tokens` tokens in the time of a step with `rows` rows, a plain step yields one in the
    time of a step with one row; `seconds[i]` is the time of a step with i + 1 rows.
    """
    return tokens * seconds[0] / float(np.interp(rows, range(1, len(seconds) + 1), seconds))


def _params(output_len: int, n: int) -> SamplingParams:
    return SamplingParams(n=n, temperature=1.0, top_p=1.0, max_tokens=output_len, ignore_eos=True)


def _queue(sequences: int) -> int:
    """Return a queue limit that admits all sequences at once."""
    return max(sequences, EngineConfig.max_queued_requests)


def _save(path: Path | None, result: Mapping[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=4) + "\n", "utf-8")
