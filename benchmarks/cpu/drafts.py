# SPDX-License-Identifier: MIT
"""What guessing tokens gains: answers with guesses and without, in turns, and the bound of it.

    python benchmarks/cpu/drafts.py MODEL.gguf [--pairs 10] [--method ngram] [--draft SMALL.gguf]
        [--tasks code facts agent chat batch describe] [--json] [--threads 2] [--cpu-time]
    python benchmarks/cpu/drafts.py packages/core/tests/models/speaking/qwen3.5 --method mtp --tasks line two lines many

Each task is asked of one engine in turns, with guesses and without; the texts are written for this. A line has tokens
a second of both, the median of the pairs' ratios, how many of the guesses that were tried were right, and the bound:
the ratio that the same steps would have had if each took no longer than a step of as many rows takes by itself. That
is measured beside every pair, for a machine is not always as fast, and behind a text of the same length; a step of one
row takes what the pair's plain steps take. `of the bound` is the median of the pairs' shares. Answers must be equal;
where they are not, this ends with an error. `step` is the table of the steps' times by their rows, of one stream. With
a model of drafts its own steps count in the bound, each as long as the median of those with as many rows, and `ms a
draft` is that of one row.

`line`, `two`, `lines` and `many` are beginnings of docstrings, 1, 2, 8 and 32 streams, for the small trained model that
has a layer for further tokens. On a machine with other work `--cpu-time` counts the time of this process's processors
alone; it is for one thread.
"""

from __future__ import annotations

import argparse
import json
import operator
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from candle_vllm.core import InferenceEngine, SamplingParams, StructuredOutputsParams
from candle_vllm.core.engine.step.engine import Engine

CODE = """\
import json
from pathlib import Path


class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance
        self.history = []

    def deposit(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        self.history.append(("deposit", amount))

    def withdraw(self, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance -= amount
        self.history.append(("withdraw", amount))

    def save(self, folder):
        path = Path(folder) / f"{self.owner}.json"
        path.write_text(json.dumps({"owner": self.owner, "balance": self.balance}))
"""
FACTS = """\
Order 48213 was placed by Maren Oldekamp on 3 March 2026. She ordered 4 garden chairs "Sonnenhof" for 89.50 euros each
and one table "Lindenblick" for 240.00 euros. The chairs are to be sent to Harbour Street 17, 26382 Wilhelmshaven; the
table to Mill Lane 4, 26316 Varel. Delivery by the carrier Nordfracht, tracking number NF-7731-88120-DE, is expected on
12 March 2026. The order was paid by bank transfer with the reference RG-2026-48213."""
_ITEM = {
    "type": "object",
    "properties": {
        "name_of_the_article": {"type": "string", "maxLength": 40},
        "number_of_pieces": {"type": "integer"},
        "price_in_euros": {"type": "number"},
        "address_of_delivery": {"type": "string", "maxLength": 80},
    },
    "required": ["name_of_the_article", "number_of_pieces", "price_in_euros", "address_of_delivery"],
    "additionalProperties": False,
}
FORM = {
    "type": "object",
    "properties": {
        "order_number": {"type": "integer"},
        "name_of_the_customer": {"type": "string", "maxLength": 60},
        "date_of_the_order": {"type": "string", "maxLength": 30},
        "articles_that_were_ordered": {"type": "array", "items": _ITEM, "minItems": 2, "maxItems": 2},
        "carrier": {"type": "string", "maxLength": 40},
        "tracking_number": {"type": "string", "maxLength": 40},
        "expected_date_of_delivery": {"type": "string", "maxLength": 30},
        "payment_reference": {"type": "string", "maxLength": 40},
    },
    "required": [
        "order_number", "name_of_the_customer", "date_of_the_order", "articles_that_were_ordered", "carrier",
        "tracking_number", "expected_date_of_delivery", "payment_reference",
    ],
    "additionalProperties": False,
}  # fmt: skip
TOOL = """\
$ list_tickets --open
#1041  high    Login page shows a blank screen after the update of 2 May        assigned: Tomasz
#1043  low     Typo in the German invoice template ("Rechnugn")                 assigned: nobody
#1047  high    Export of large reports runs into a timeout after 30 seconds     assigned: Ines
#1052  medium  Dark mode: links in the help pages cannot be read                assigned: nobody
#1058  medium  Search ignores umlauts when the query is in capital letters      assigned: Tomasz"""


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


LINES = [
    "Return the number of items that are equal to the given value.",
    "Raise ValueError if the name is not a valid identifier.",
    "Open the file and read all of its lines into a list.",
    "This class represents a connection to the server.",
    "Convert the string to an integer, or return the default.",
    "Create a new thread that calls the function when the time is over.",
    "Write the data to the stream and flush the buffer.",
    "Parse the arguments of the command line.",
]

TASKS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "code": ([[_user(f"Rename the class Account to Wallet, and change nothing else.\n\n```python\n{CODE}```")]],
             {"max_tokens": 320}),
    "facts": ([[_user(f"{FACTS}\n\nGive all facts of this text as JSON.")]],
              {"max_tokens": 320, "structured_outputs": StructuredOutputsParams(json=FORM)}),
    "agent": ([[_user("Please run the command `list_tickets --open` and show me all of what it says."),
                {"role": "assistant", "content": f"I have run it. It says:\n```\n{TOOL}\n```"},
                _user("Show me its output once more, and then tell me for each ticket what it is about and who has "
                      "it.")]],
              {"max_tokens": 280}),
    "chat": ([[_user("Tell me how a lighthouse keeper spent a day two hundred years ago.")]],
             {"max_tokens": 240, "temperature": 0.7, "seed": 1}),
    "describe": ([[_user("Write a Python class Inventory that keeps items with name, price and count, can add, remove "
                         "and find them, computes the total value, and saves itself to a JSON file and loads itself "
                         "from one. Give the code alone.")]],
                 {"max_tokens": 240, "ignore_eos": True}),
    "batch": ([[_user(f"Write a short story about a {animal} and a {thing}.")]
               for animal in ("fox", "crow", "whale", "hedgehog", "goat", "moth", "heron", "cat")
               for thing in ("bell", "boat", "mirror", "storm")],
              {"max_tokens": 64, "temperature": 0.7, "seed": 1}),
    "line": (LINES[:1], {"max_tokens": 400, "ignore_eos": True}),
    "two": (LINES[:2], {"max_tokens": 200, "ignore_eos": True}),
    "lines": (LINES, {"max_tokens": 200, "ignore_eos": True}),
    "many": (LINES * 4, {"max_tokens": 200, "ignore_eos": True}),
}  # fmt: skip
SMALL = ("line", "two", "lines", "many")
CLOCK = [time.perf_counter]


@contextmanager
def rows_of_steps(engine: InferenceEngine, *, learns: bool = True) -> Iterator[list[tuple[int, float]]]:
    """Notes rows and seconds of each step that has no prompt; the engine learns from them too, or it does not."""
    assert engine._engine is not None
    drafter = engine._engine._drafter
    assert drafter is not None
    stepped, rests, seen = drafter.stepped, drafter.rests, list[tuple[int, float]]()

    def noted(lives: int, drafts: int, seconds: float) -> None:
        if lives:
            seen.append((lives + drafts, seconds))
        if learns:
            stepped(lives, drafts, seconds)

    def rested(lives: int) -> bool:
        if found := rests(lives):
            seen.append((lives, 0.0))  # nobody times such a step
        return found

    drafter.stepped, drafter.rests = noted, rested  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        drafter.stepped, drafter.rests = stepped, rests  # type: ignore[method-assign]


@contextmanager
def _noted(times: Any) -> Iterator[list[tuple[int, float]]]:
    """What is noted of a small model's steps: rows and seconds."""
    seen: list[tuple[int, float]] = []
    note = times.note

    def noted(rows: int, seconds: float) -> None:
        seen.append((rows, seconds))
        note(rows, seconds)

    times.note = noted
    try:
        yield seen
    finally:
        times.note = note


def step_times(engine: InferenceEngine, most: int, rounds: int = 14, length: int = 120) -> dict[int, float]:
    """Median seconds of steps of one sequence with so many rows, wrong guesses included; in turns.

    Args:
        engine: takes the steps, and learns nothing of them.
        most: rows.
        rounds: times that each number of rows is tried.
        length: tokens of the prompt before them.
    """
    assert engine._engine is not None
    drafter = engine._engine._drafter
    assert drafter is not None
    times: dict[int, list[float]] = {rows: [] for rows in range(1, most + 1)}
    params = SamplingParams(temperature=0, max_tokens=most * rounds, ignore_eos=True)
    propose, rests, wanted = drafter.propose, drafter.rests, 1

    def wrong(lives: Any, *_: Any) -> bool:
        for live in lives:
            live.sequence.drafts = (1,) * (wanted - 1)
        return wanted > 1

    drafter.propose = wrong  # type: ignore[method-assign, assignment]
    drafter.rests = lambda _: False  # type: ignore[method-assign]
    with rows_of_steps(engine, learns=False) as seen:
        request = engine.add_request([5 + place % 3 for place in range(length)], params)
        while any(piece.request_id == request and not piece.finished for piece in engine.step()) or not seen:
            if seen:
                times.setdefault(seen[-1][0], []).append(seen[-1][1])
                wanted = wanted % most + 1
    drafter.propose, drafter.rests = propose, rests  # type: ignore[method-assign]
    return {rows: statistics.median(found[2:]) for rows, found in times.items() if len(found) > 2}


def prompt_of(engine: InferenceEngine, chat: Any) -> Any:
    """A chat's prompt; a text as it is."""
    return chat if isinstance(chat, str) else engine.apply_chat_template(chat)


def asked(engine: InferenceEngine, chats: Any, params: SamplingParams) -> tuple[float, list[tuple[int, ...]]]:
    """Seconds from the first token to the last, and the answers' tokens."""
    prompts = [prompt_of(engine, chat) for chat in chats]
    waiting = {engine.add_request(prompt, params): place for place, prompt in enumerate(prompts)}
    tokens: list[list[int]] = [[] for _ in prompts]
    began, first, left = 0.0, 0, len(prompts)
    while left:
        for piece in engine.step():
            tokens[waiting[piece.request_id]] += piece.token_ids
            left -= piece.finished
        if not began and all(tokens):
            began, first = CLOCK[0](), sum(map(len, tokens))
    return (CLOCK[0]() - began) / max(1, sum(map(len, tokens)) - first), [tuple(each) for each in tokens]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--method", default="ngram")
    parser.add_argument("--draft")
    parser.add_argument(
        "--tasks", nargs="*", choices=TASKS, default=list(TASKS)[: -len(SMALL)], help="none: steps alone"
    )
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.cpu_time:
        CLOCK[0] = time.process_time
    settings: dict[str, Any] = {"threads": options.threads, "enable_prefix_caching": False}
    guessing: dict[str, Any] = {"method": options.method}
    if options.draft:
        guessing = {"model": options.draft, "num_speculative_tokens": 8}
    if options.method in ("suffix", "mtp") or options.draft:
        guessing["suffix_decoding_max_cached_requests"] = 0  # else the pair before would say it all
    with InferenceEngine(options.model, **settings, speculative_config=guessing) as drafting:
        steps = step_times(drafting, 16)
        show({"step": {rows: round(1e3 * seconds, 2) for rows, seconds in steps.items()}}, options.json)
        for task in options.tasks:
            show(measured(task, drafting, options.pairs), options.json)


@contextmanager
def without_guesses(engine: Engine) -> Iterator[None]:
    """Another engine of the same model lies elsewhere in memory, which alone makes a tenth of a step's time."""
    drafter, engine._drafter = engine._drafter, None
    try:
        yield
    finally:
        engine._drafter = drafter


def measured(task: str, drafting: InferenceEngine, pairs: int) -> Any:
    chats, given = TASKS[task]
    params = SamplingParams(**dict[str, Any]({"temperature": 0, **given}))
    engine = drafting._engine
    assert engine is not None
    assert engine._drafter is not None
    asked(drafting, chats, params)  # not counted
    prompt = len(drafting.tokenize(prompt_of(drafting, chats[0])))
    model, tried, right = engine._drafter.model, 0, 0
    rates: list[tuple[float, float]] = []
    bounds: list[float] = []
    rows, alone = Counter[int](), list[float]()
    found: dict[bool, tuple[float, Any]] = {}
    for pair in range(pairs):
        noted, own, then = list[tuple[int, float]](), list[tuple[int, float]](), drafting.stats()
        for guesses in (False, True) if pair % 2 else (True, False):
            with (
                rows_of_steps(drafting) if len(chats) == 1 else nullcontext([]) as seen,  # noting takes time, too
                _noted(model.times) if model else nullcontext([]) as drafted,
                nullcontext() if guesses else without_guesses(engine),
            ):
                found[guesses] = asked(drafting, chats, params)
            noted, own = noted + seen, own + drafted
        if found[False][1] != found[True][1]:
            raise SystemExit(f"{task}: the answers differ")
        rates.append((1 / found[False][0], 1 / found[True][0]))
        now, sizes, tokens = drafting.stats(), Counter(count for count, _ in noted), sum(map(len, found[False][1]))
        made = tokens - (now.accepted_draft_tokens - then.accepted_draft_tokens)  # steps
        tried, right = tried + now.draft_tokens - then.draft_tokens, right + tokens - made
        rows.update(sizes)
        alone += [seconds for size, seconds in own if size == 1]
        if len(chats) == 1:
            length = prompt + tokens // 2
            steps = {**step_times(drafting, min(16, max(sizes)), 5, length), 1: found[False][0]}
            took = sum(count * steps[min(size, max(steps))] for size, count in sizes.items()) * made / sizes.total()
            bounds.append(tokens * steps[1] / (took + _undisturbed(own)))
    ratios = [other / one for one, other in rates]
    row = {
        "task": task,
        "tokens": sum(map(len, found[False][1])),
        "plain tok/s": round(statistics.median(one for one, _ in rates), 1),
        "guessing tok/s": round(statistics.median(other for _, other in rates), 1),
        "ratio": round(statistics.median(ratios), 3),
        "tried": round(tried / pairs),
        "right": round(right / max(1, tried), 3),
    }
    if bounds:
        row["bound"] = round(statistics.median(bounds), 3)
        row["of the bound"] = round(statistics.median(map(operator.truediv, ratios, bounds)), 3)
        row["rows a step"] = round(sum(size * count for size, count in rows.items()) / max(1, rows.total()), 2)
    if alone:
        row["ms a draft"], row["drafts"] = round(1e3 * statistics.median(alone), 2), round(len(alone) / pairs)
    return row


def _undisturbed(steps: list[tuple[int, float]]) -> float:
    """What these steps would have taken, each as long as the median of those with as many rows."""
    taken: dict[int, list[float]] = {}
    for size, seconds in steps:
        taken.setdefault(size, []).append(seconds)
    return sum(len(times) * statistics.median(times) for times in taken.values())


def show(row: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(row) if as_json else ", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
