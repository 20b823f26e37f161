# SPDX-License-Identifier: MIT
"""Questions of the Berkeley Function Calling Leaderboard, answered by `candle-vllm serve` with and without grammars:
`python benchmarks/suites/bfcl.py [--questions 200] [--model FILE] [--small] [--out FILE.jsonl]`.

Questions, expected answers and the checker come with the package bfcl-eval. Each question is asked in every mode of
`MODES`; a table says how many answers of each category are right. Nothing here is expected of a model: the exit status
is 1 only where the server refused a question.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import sys
import tempfile
import types
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

import openai
from suite import CACHE

from tests.live_server import ServerProcess, openai_client
from tests.real_models import qwen_coder, qwen_coder_larger
from tests.registry_packages import pypi_file, unpacked

_WHEEL = "bfcl_eval-2026.3.23-py3-none-any.whl"
_SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"
CATEGORIES = (
    "simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance", "live_simple", "live_multiple",
    "live_irrelevance",
)  # fmt: skip
"""Of one turn and about Python: what calls of Java and JavaScript mean stands in texts of their own."""
MODES = {  # name -> strict, tool_choice
    "free": (False, "auto"),  # no grammar
    "strict": (True, "auto"),  # a grammar from the first token of a call on
    "required": (True, "required"),  # a grammar from the first token on
}
_TOKENS = 400  # of an answer
_AT_ONCE = 4


class Question(NamedTuple):
    """One question, with all answers that are right; none of them means that no call is."""

    name: str
    category: str
    messages: Sequence[Any]
    functions: Sequence[Any]
    answers: Sequence[Any]


class Checker:
    """The package's checker of calls, which is imported from its unpacked files without what it depends on."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(folder))
        models: Any = types.ModuleType("bfcl_eval.constants.model_config")
        named = types.SimpleNamespace(underscore_to_dot=True)  # "." is no character of a name in OpenAI's API
        models.MODEL_CONFIG_MAPPING = defaultdict(lambda: named)
        sys.modules[models.__name__] = models
        self._check = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker").ast_checker
        self._python = importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON
        self._types = importlib.import_module("bfcl_eval.constants.type_mappings").GORILLA_TO_OPENAPI

    def right(self, question: Question, calls: Sequence[dict[str, Any]]) -> bool:
        """Whether the calls, name -> arguments, are what the question wants."""
        if not question.answers:
            return not calls
        functions, answers = list(question.functions), list(question.answers)
        try:
            found = self._check(functions, list(calls), answers, self._python, question.category, "model")
        except (AttributeError, KeyError, TypeError):  # of values whose type the checker does not expect
            return False
        return bool(found["valid"])

    def tool(self, function: dict[str, Any], strict: bool) -> dict[str, Any]:
        """A function of the questions as a tool of OpenAI's API."""
        name = function["name"].replace(".", "_")
        described = {"name": name, "description": function["description"], "strict": strict}
        return {"type": "function", "function": {**described, "parameters": self._schema(function["parameters"])}}

    def _schema(self, given: dict[str, Any]) -> dict[str, Any]:
        """JSON Schema of a description of parameters, which names types as Python does."""
        schema = {**given, "type": self._types.get(given.get("type", "any"), "string")}
        if "properties" in schema:
            schema["properties"] = {name: self._schema(one) for name, one in schema["properties"].items()}
        if isinstance(schema.get("items"), dict):
            schema["items"] = self._schema(schema["items"])
        return schema


def questions(folder: Path, count: int) -> Iterator[Question]:
    """A sample of the questions, always the same: one of each category, then the next of each."""
    for each in zip(*(_sample(folder, category, count // len(CATEGORIES)) for category in CATEGORIES), strict=True):
        yield from each


def _sample(folder: Path, category: str, count: int) -> Iterator[Question]:
    rows = _rows(folder / f"bfcl_eval/data/BFCL_v4_{category}.json")
    right = folder / f"bfcl_eval/data/possible_answer/BFCL_v4_{category}.json"
    answers = {row["id"]: row["ground_truth"] for row in _rows(right)} if right.exists() else {}
    for row in random.Random(0).sample(rows, count):  # noqa: S311
        yield Question(row["id"], category, row["question"][0], row["function"], answers.get(row["id"], ()))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answer(client: openai.OpenAI, checker: Checker, question: Question, mode: str) -> dict[str, Any]:
    """Asks one question; gives a row of the results."""
    row = {"id": question.name, "category": question.category, "mode": mode}
    strict, tool_choice = MODES[mode]
    tools: Any = [checker.tool(function, strict) for function in question.functions]
    choice: Any = tool_choice
    messages: Any = question.messages
    try:
        made = client.chat.completions.create(
            model="model", messages=messages, tools=tools, tool_choice=choice, max_tokens=_TOKENS, temperature=0
        )
    except openai.APIStatusError as error:
        return {**row, "right": False, "refused": str(error)}
    said = made.choices[0]
    calls: list[dict[str, Any]] = []
    for call in said.message.tool_calls or ():
        assert call.type == "function"
        try:
            calls.append({call.function.name: json.loads(call.function.arguments)})
        except ValueError:
            calls.append({call.function.name: {}})
    row |= {"right": checker.right(question, calls), "calls": calls, "finish_reason": said.finish_reason}
    return row if calls else {**row, "text": said.message.content}


def main() -> int:
    """Asks the questions; returns 0 where the server refused none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200, help="in each mode, over all categories (200)")
    parser.add_argument("--model", type=Path, help="instead of Qwen2.5-Coder-1.5B-Instruct")
    parser.add_argument("--small", action="store_true", help="with Qwen2.5-Coder-0.5B-Instruct")
    parser.add_argument("--out", type=Path, help="where each answer becomes a line of JSON")
    given = parser.parse_args()
    wheel = pypi_file("bfcl-eval==2026.3.23", _WHEEL, _SHA256)
    folder = unpacked(wheel, "", lambda name: name.startswith("bfcl_eval/"), CACHE / "bfcl")
    checker, asked = Checker(folder), list(questions(folder, given.questions))
    model = given.model or (qwen_coder() if given.small else qwen_coder_larger())
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = ServerProcess(temporary, "--m", str(model), "--served-model-name", "model", "--max-model-len", "16384")
        stack.callback(server.stop)
        client = stack.enter_context(openai_client(server.url)).with_options(timeout=1200)
        out = stack.enter_context(given.out.open("w", encoding="utf-8")) if given.out else None
        pool = stack.enter_context(ThreadPoolExecutor(_AT_ONCE))
        jobs = [(question, mode) for question in asked for mode in MODES]
        for row in pool.map(lambda job: answer(client, checker, *job), jobs):
            rows.append(row)
            if out is not None:
                print(json.dumps(row), file=out, flush=True)
    print(f"{model.name}: right answers of {len(asked) // len(CATEGORIES)} in each category")
    print(f"{'':20}", *(f"{mode:>9}" for mode in MODES))
    for category in (*CATEGORIES, ""):
        counts = [
            sum(r["right"] for r in rows if r["mode"] == mode and category in ("", r["category"])) for mode in MODES
        ]
        print(f"{category or f'of {len(asked)}':20}", *(f"{count:9}" for count in counts))
    refused = [row for row in rows if "refused" in row]
    for row in refused:
        print(row["id"], row["mode"], row["refused"])
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
