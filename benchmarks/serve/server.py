# SPDX-License-Identifier: MIT
"""The server process of the benchmarks: `candle-vllm`'s own `serve` around a paced engine or a model.

    python benchmarks/serve/server.py paced --rate 20
    python benchmarks/serve/server.py model [--m MODEL] [--engine process]

It says where it listens as `candle-vllm` does. Lines of JSON on its standard input make its engine answer prompts
without HTTP, `{"prompts": [...], "max_tokens": 64}`; the answer is a line of JSON with the seconds. So library and
server are compared on one engine in one process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import functools
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from paced import MAX_STREAMS, PacedEngine

from candle_vllm.core.sampling.params import SamplingParams
from candle_vllm.server import serve as serving
from candle_vllm.server.models.loader import ModelLoader, local_engine, remote_engine
from candle_vllm.server.settings import Settings
from candle_vllm.server.settings.catalogue import Catalogue, ModelEntry
from candle_vllm.server.settings.configuration import Configuration
from candle_vllm.server.settings.derived import demo_model


class Library:
    """Answers prompts with the engine itself, in a thread."""

    def __init__(self) -> None:
        self.engine: Any = None

    def run(self) -> None:
        """Until standard input ends."""
        for line in sys.stdin:
            todo = json.loads(line)
            work = self._generate if todo["how"] == "generate" else self._stream
            cpu, start = time.process_time(), time.perf_counter()
            tokens = work(todo["prompts"], todo["max_tokens"])
            end = {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu, "tokens": tokens}
            sys.stdout.write(json.dumps(end) + "\n")
            sys.stdout.flush()

    def _ids(self, text: str) -> list[int]:
        """As the server makes them of a message."""
        chat = self.engine.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        return self.engine.tokenize(chat, add_special_tokens=False)

    def _generate(self, prompts: list[str], max_tokens: int) -> int:
        outputs = self.engine.generate([self._ids(text) for text in prompts], _params(max_tokens), use_tqdm=False)
        return sum(len(output.token_ids) for output in outputs)

    def _stream(self, prompts: list[str], max_tokens: int) -> int:
        async def one(text: str) -> int:
            stream = self.engine.stream(self._ids(text), _params(max_tokens))
            return sum([len(piece.token_ids) async for piece in stream])

        async def every() -> int:
            return sum(await asyncio.gather(*map(one, prompts)))

        return asyncio.run(every())


def _params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("paced", "model"))
    parser.add_argument("--rate", type=float, default=20.0, help="tokens per second of a paced stream")
    parser.add_argument("--m", default=None, help="the model; default: the demo model")
    parser.add_argument("--engine", choices=("thread", "process"), default="thread")
    parser.add_argument("--formats", action="store_true", help="look for thoughts and tool calls in paced answers")
    parser.add_argument("--profile", type=Path, help="where to write what cProfile sees of the event loop")
    args = parser.parse_args()
    model = args.m or str(demo_model() or "no-model.gguf")
    formats: dict[str, Any] = {"tool_parser": "hermes", "reasoning_parser": "deepseek_r1"} if args.formats else {}
    settings = Settings(
        model=model,
        port=0,
        engine_process=args.engine == "process",
        enable_prefix_caching=False,  # every round shall do the same work
        max_queued_requests=MAX_STREAMS,
        shutdown_timeout=1,
        **formats,
    )
    library = Library()
    threading.Thread(target=library.run, daemon=True).start()

    def start(config: Any) -> Any:
        make = remote_engine if args.engine == "process" else local_engine
        library.engine = PacedEngine(args.rate) if args.what == "paced" else make(config)
        return library.engine

    serving.ModelLoader = functools.partial(ModelLoader, start_engine=start)  # pyrefly: ignore[bad-assignment]
    configuration = Configuration(settings, settings, Catalogue([ModelEntry("bench", settings)]), ())
    profile = cProfile.Profile() if args.profile else contextlib.nullcontext()
    with profile:
        status = serving.serve(configuration)
    if isinstance(profile, cProfile.Profile):
        profile.dump_stats(args.profile)
    return status


if __name__ == "__main__":
    sys.exit(main())
