# SPDX-License-Identifier: MIT
"""Reading answers: microseconds of one core per token, one JSON line per result.

    python -m benchmarks.cpu.answers [--formats hermes mistral ...] [--tokens 25000 50000 100000] [--rounds 2]
        [--only parser reader join] [--commit NAME]

`parser`: each format of tool calls reads long answers of five kinds: content; reasoning; one call with a huge string;
one call with huge nested JSON; many small calls. A token is a text of one to seven characters, four on average.
`growth` is the cost per token of the longest answer over that of the shortest: 1 where the time is linear. `longest_ms`
is the slowest token. `reader`: the same from the engine's pieces to the bytes of chunks, beside `plain_us`, what that
costs where nothing is looked for. `join`: a whole answer of its chunks. The last line counts what is over the bars, and
the exit status is 1 where something is. Every figure is the best of `--rounds`, in processor time.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import random
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from candle_vllm.core.engine.outputs import FinishReason, TokenOutput
from candle_vllm.openai.answers import AnswerPlan, AnswerReader
from candle_vllm.openai.chat_answers import ChatWriter, join_chat
from candle_vllm.openai.events import Head
from candle_vllm.openai.formats.events import CallArguments, TextPiece
from candle_vllm.openai.formats.gemma import Gemma
from candle_vllm.openai.formats.layout import BoundLayout, Layout, ToolFormat
from candle_vllm.openai.formats.nested import Nested
from candle_vllm.openai.formats.parser import OutputParser
from candle_vllm.openai.formats.reasoning_table import REASONING_FORMATS
from candle_vllm.openai.formats.table import TOOL_FORMATS, by_name
from candle_vllm.openai.json_body import to_json_bytes
from candle_vllm.openai.protocol.chat import ChatCompletionChunk, ChatCompletionRequest
from candle_vllm.openai.task import Paths, Task

SAMPLES = Path(__file__).parents[2] / "packages/openai/tests/formats/samples.py"
MOST_US = 20.0
MOST_GROWTH = 1.5
WORDS = "The answer, a < b, is `code` and *more*: {1, 2} [3]; see (4).\n"
SCHEMAS: dict[str, dict[str, Any]] = {"f2": {"type": "object", "properties": {"city": {"type": "string"}}}}
ANY = {"f2": {"type": "object", "properties": {"city": {}}}}


class Answer(NamedTuple):
    """A long text, what of it the parser must find, and the tools it may call."""

    text: str
    content: int = 0  # at least so many characters
    thoughts: int = 0
    arguments: int = 0
    calls: int = 0
    tools: dict[str, dict[str, Any]] = SCHEMAS


# ---- texts -----------------------------------------------------------------------------------------------------------


@functools.cache
def short_texts() -> dict[str, str]:
    """Format -> a short text in it: `Ok`, but for formats of calls alone, and the call f2(city="x")."""
    return {sample.tools: sample.text for sample in runpy.run_path(str(SAMPLES))["SHORT"]}


def words(size: int) -> str:
    return (WORDS * (size // len(WORDS) + 1))[:size]


def around_value(form: ToolFormat, *, quotes: bool) -> tuple[str, str]:
    """The short text before and behind the argument's value; `quotes` around it are left in."""
    text = short_texts()[form.name]
    at = text.index("x", text.index("city"))
    before, after = text[:at], text[at + 1 :]
    body = form.bodies[0] if form.bodies else None
    mark = body.quote if isinstance(body, Gemma) else before[-1]
    if not quotes and (len(mark) > 1 or mark in "\"'"):
        before, after = before.removesuffix(mark), after.removeprefix(mark)
    return before, after


def nested_value(form: ToolFormat, size: int) -> str:
    """Lists of numbers in lists."""
    if form.bodies and isinstance(form.bodies[0], Nested):
        tag = form.bodies[0].tag
        row = f"{tag}<item>{tag}<item>12{tag}</item>{tag}<item>-3.5{tag}</item>{tag}</item>"
        return row * (size // len(row))
    row = "[12, -3.5, [4, [5]], []]"
    return "[" + ", ".join([row] * (size // (len(row) + 2))) + "]"


def answers(form: ToolFormat, size: int) -> Iterator[tuple[str, Answer]]:
    """Answers of about `size` characters, by kind."""
    text, reasoning = short_texts()[form.name], reasoning_of(form)
    head, ok, call = text.rpartition("Ok") if "Ok" in text else ("", "", text)
    body = words(size)
    yield "content", Answer(head + body, content=size - 100)
    if form.name in ("openai", "muse") or not form.flow:
        opened = next(iter(reasoning.pairs), reasoning.open)
        yield "reasoning", Answer(opened + body, thoughts=size - 100)
    before, after = around_value(form, quotes=True)
    yield "string", Answer(before + body.replace("\n", " ") + after, arguments=size - 100, calls=1)
    before, after = around_value(form, quotes=False)
    value = nested_value(form, size)
    yield "nested", Answer(before + value + after, arguments=size // 15, calls=1, tools=ANY)
    count = size // 200
    yield "calls", Answer(head + ok + (call + "\n") * count, calls=count, arguments=count * 10)


def reasoning_of(form: ToolFormat) -> Any:
    names = by_name(REASONING_FORMATS)
    return names.get(form.name, names["think"])


def tokens_of(text: str) -> list[str]:
    rng, pieces, at = random.Random(0), list[str](), 0  # noqa: S311 - the same cuts in every run
    while at < len(text):
        step = rng.randint(1, 7)
        pieces.append(text[at : at + step])
        at += step
    return pieces


# ---- measurements ----------------------------------------------------------------------------------------------------


def best(work: Callable[[], object], rounds: int) -> float:
    """Seconds of processor time of the fastest round."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def parsed(parser: OutputParser, pieces: Sequence[str]) -> tuple[Answer, float]:
    """What is found, and the seconds of the slowest piece."""
    found = {"content": 0, "reasoning": 0, "arguments": 0}
    longest = 0.0
    for number in range(len(pieces) + 1):
        start = time.process_time()
        events = parser.feed(pieces[number]) if number < len(pieces) else parser.finish(True)
        longest = max(longest, time.process_time() - start)
        for event in events:
            if isinstance(event, TextPiece):
                found[event.kind] += len(event.text)
            elif isinstance(event, CallArguments):
                found["arguments"] += len(event.text)
    return Answer("", found["content"], found["reasoning"], found["arguments"], parser.num_calls), longest


def feed(parser: OutputParser, pieces: Sequence[str]) -> None:
    for piece in pieces:
        parser.feed(piece)
    parser.finish(True)


def measure_parser(form: ToolFormat, kind: str, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """One line of `parser`."""
    layout, costs, longest = Layout(reasoning_of(form), form), [], 0.0
    for size in sizes:
        answer = dict(answers(form, 4 * size))[kind]
        pieces = tokens_of(answer.text)
        found, longest = parsed(OutputParser(layout, tools=answer.tools), pieces)
        wanted = (answer.content, answer.thoughts, answer.arguments)
        if found.calls != answer.calls or any(has < want for has, want in zip(found[1:4], wanted)):
            return {"error": f"{found[1:5]} where {(*wanted, answer.calls)} was written"}
        seconds = best(lambda: feed(OutputParser(layout, tools=answer.tools), pieces), rounds)  # noqa: B023
        costs.append(1e6 * seconds / len(pieces))
    figures = {f"us_{size}": round(cost, 2) for size, cost in zip(sizes, costs)}
    return {**figures, "growth": round(costs[-1] / costs[0], 2), "longest_ms": round(1e3 * longest, 1)}


def chunks_of(plan: AnswerPlan, pieces: Sequence[str]) -> Iterator[ChatCompletionChunk]:
    """The chunks of an answer whose tokens have these texts."""
    body = {"model": "m", "messages": [{"role": "user", "content": "?"}], "stream": True}
    writer = ChatWriter(ChatCompletionRequest.model_validate(body), [1], calls=bool(plan.tools), whole=True)
    reader = AnswerReader(Head("chatcmpl-0", 1, "m", "fp"), plan, Task(paths=Paths({})))
    for number, piece in enumerate(pieces, 1):
        reason = FinishReason.STOP if number == len(pieces) else None
        output = TokenOutput(request_id="r", text=piece, token_ids=(number,), finish_reason=reason)
        yield from writer.write(reader.add(0, output))
    yield from writer.write(reader.end())


def plan_of(form: ToolFormat, tools: dict[str, dict[str, Any]]) -> AnswerPlan:
    return AnswerPlan(bound=BoundLayout(Layout(reasoning_of(form), form), {}, {}), tools=tools)


def measure_reader(form: ToolFormat, kind: str, size: int, rounds: int) -> dict[str, Any]:
    """One line of `reader`."""
    answer = dict(answers(form, 4 * size))[kind]
    pieces = tokens_of(answer.text)

    def send(plan: AnswerPlan) -> None:
        for chunk in chunks_of(plan, pieces):
            to_json_bytes(chunk)

    plain = best(lambda: send(AnswerPlan()), rounds)
    whole = best(lambda: send(plan_of(form, answer.tools)), rounds)
    us, plain_us = (round(1e6 * seconds / len(pieces), 2) for seconds in (whole, plain))
    return {"tokens": len(pieces), "us": us, "plain_us": plain_us, "parser_us": round(us - plain_us, 2)}


def measure_join(form: ToolFormat, kind: str, sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """One line of `join`."""
    costs = []
    for size in sizes:
        answer = dict(answers(form, 4 * size))[kind]
        chunks = list(chunks_of(plan_of(form, answer.tools), tokens_of(answer.text)))
        costs.append(1e6 * best(lambda: join_chat(chunks), rounds) / len(chunks))  # noqa: B023
    figures = {f"us_{size}": round(cost, 2) for size, cost in zip(sizes, costs)}
    return {**figures, "growth": round(costs[-1] / costs[0], 2)}


# ---- the program -----------------------------------------------------------------------------------------------------


def commit() -> str:
    """Of the files that are measured, with "+" where they differ from it; "unknown" without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def is_over(line: dict[str, Any]) -> bool:
    """Whether a line is over one of the bars."""
    costs = [value for name, value in line.items() if name.startswith("us_")] or [line.get("parser_us", 0.0)]
    return "error" in line or max(costs) > MOST_US or line.get("growth", 1.0) > MOST_GROWTH


def lines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    forms = [row for row in TOOL_FORMATS if not options.formats or row.name in options.formats]
    few = [row for row in forms if row.name in ("hermes", "qwen3_coder", "openai", *(options.formats or ()))]
    sizes, rounds = options.tokens, options.rounds
    for part, measured in (("parser", forms), ("reader", few), ("join", few)):
        for form in measured if part in options.only else ():
            for kind in [kind for kind, _ in answers(form, 1000)]:
                if part == "join" and kind == "nested":  # some formats give such a value in one piece
                    continue
                if part == "parser":
                    figures = measure_parser(form, kind, sizes, rounds)
                elif part == "reader":
                    figures = measure_reader(form, kind, sizes[-1], rounds)
                else:
                    figures = measure_join(form, kind, sizes, rounds)
                yield {"answers": part, "format": form.name, "kind": kind, **figures}


def main() -> None:
    """Prints the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", help="names of formats; all by default")
    parser.add_argument("--tokens", nargs="+", type=int, default=[25_000, 50_000, 100_000])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["parser", "reader", "join"])
    parser.add_argument("--commit", help="what to print as the commit")
    options = parser.parse_args()
    facts = {
        "machine": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "commit": options.commit or commit(),
    }
    over = 0
    for line in lines(options):
        over += is_over(line)
        print(json.dumps({**line, "over": is_over(line), **facts}), flush=True)
    print(json.dumps({"answers": "over", "count": over, "most_us": MOST_US, "most_growth": MOST_GROWTH, **facts}))
    sys.exit(over > 0)


if __name__ == "__main__":
    main()
