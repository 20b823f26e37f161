# SPDX-License-Identifier: MIT
"""What the GPU path is to reach, what was predicted, and what to look at where it does not: the table of run B.

Everything here works on result lines, the dictionaries that `measure.report` writes, and needs neither torch nor a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Line = Mapping[str, Any]


# ---- the bars --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One figure that is judged.

    Attributes:
        name: for tables.
        bar: what it has to reach.
        unit: of the bar and the figure.
        predicted: by reading and counting, before anything ran; a text.
        where: of the lines that have it: keys ("config.gguf" is one within another) and values, or sets of values.
        figure: the key of the number, or what computes it from a line.
        lower: whether less is better. Of several lines the worst counts.
        machine: a part of the name of the machine that the bar is for; empty where it is for all.
        worth: by which rows below their bars are ordered, times how far below they are.
        look: what to do where it is below, by all lines.
    """

    name: str
    bar: float
    unit: str
    predicted: str
    where: Mapping[str, Any]
    figure: str | Callable[[Line], float | None]
    look: Callable[[Sequence[Line]], list[Step]]
    lower: bool = False
    machine: str = ""
    worth: float = 1.0


@dataclass(frozen=True)
class Step:
    """Something to look at: a text, a switch and a sweep of `trials.py` that may mend it."""

    text: str
    switch: str = ""
    sweep: str = ""


@dataclass(frozen=True)
class Judged:
    """A row, its figure, and what that means: "reached", "below", "not measured", or "no bar on this machine"."""

    row: Row
    measured: float | None
    verdict: str

    @property
    def share(self) -> float:
        """Of the bar; 1 is reached."""
        assert self.measured is not None
        best, worst = (self.row.bar, self.measured) if self.row.lower else (self.measured, self.row.bar)
        return best / worst if worst else 1.0

    @property
    def value(self) -> float:
        """What mending it is worth."""
        return self.row.worth * (1.0 - self.share)


def matches(line: Line, where: Mapping[str, Any]) -> bool:
    """Whether a line has these values."""
    for key, wanted in where.items():
        found: Any = line
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found not in wanted if isinstance(wanted, (set, frozenset)) else found != wanted:
            return False
    return True


def plain(line: Line) -> bool:
    """Whether nothing was set otherwise for it."""
    return not line.get("config", {}).get("set")


def figure_of(row: Row, lines: Iterable[Line]) -> float | None:
    """The row's figure in these lines, the worst of several; None where there is none."""
    found = []
    for line in lines:
        if matches(line, row.where):
            number = row.figure(line) if callable(row.figure) else line.get(row.figure)
            if isinstance(number, (int, float)):
                found.append(float(number))
    return (max if row.lower else min)(found) if found else None


def judged(rows: Iterable[Row], lines: Sequence[Line], everywhere: bool = False) -> list[Judged]:
    """Every row against its bar; `everywhere` judges those of another machine too."""
    ours = [line for line in lines if plain(line)]
    machine = next((line["machine"] for line in ours if "machine" in line), "")
    found = []
    for row in rows:
        number = figure_of(row, ours)
        if number is None:
            verdict = "not measured"
        elif not everywhere and row.machine not in machine:
            verdict = "no bar on this machine"
        else:
            verdict = "reached" if (number <= row.bar if row.lower else number >= row.bar) else "below"
        found.append(Judged(row, number, verdict))
    return found


def below(found: Iterable[Judged]) -> list[Judged]:
    """Those below their bars, the most valuable first."""
    return sorted((each for each in found if each.verdict == "below"), key=lambda each: -each.value)


# ---- what to look at -------------------------------------------------------------------------------------------------


def _profile(lines: Iterable[Line], model: str, gguf: bool, what: str, **more: Any) -> list[Line]:
    where = {"benchmark": "gpu/step_profile", "model": model, "config.gguf": gguf, "what": what, **more}
    return [line for line in lines if plain(line) and matches(line, where)]


def _one(lines: Sequence[Line], key: str) -> float | None:
    return lines[0].get(key) if lines else None


_UNKNOWN = "there is no profile: run step_profile.py"


def _look_8b(lines: Sequence[Line]) -> list[Step]:
    share = _one(_profile(lines, "llama-3.1-8b", False, "kind", kind="products", batch=1), "copy_share")
    gaps = _one(_profile(lines, "llama-3.1-8b", False, "step", batch=1), "gaps_ms")
    if share is None or gaps is None:
        return [Step(_UNKNOWN), Step("our own kernel for few rows", switch="own linear kernel")]
    found = []
    if share < 0.85:
        text = f"products read {share:.0%} of what a copy does: our own kernel for few rows"
        found.append(Step(text, switch="own linear kernel", sweep="own linear"))
    if gaps > 0.35:
        found.append(Step(f"gaps of {gaps:.2f} ms a step: programmatic dependent launch, then fused merges"))
    return found or [Step("products and gaps are as they should be: what else takes long, by the profile")]


def _look_q4(lines: Sequence[Line]) -> list[Step]:
    rate = _one(_profile(lines, "llama-3.1-8b", True, "kind", kind="products", batch=1), "gbps")
    merges = _one(_profile(lines, "llama-3.1-8b", True, "kind", kind="merges", batch=1), "us")
    found = []
    if rate is None or rate < 2600:
        seen = "unknown" if rate is None else f"{rate / 1e3:.2f} TB/s, less than 2.6"
        found.append(Step(f"the exact kernel's rate is {seen}: other tiles", sweep="exact kernel"))
    if merges is not None and merges > 300:
        text = f"merges take {merges / 1e3:.2f} ms a step: sum in the last-arriving program, in fixed order"
        found.append(Step(text))
    return found or [
        Step("the exact kernel and the merges are as they should be: what else takes long, by the profile")
    ]


def _look_decode(_: Sequence[Line]) -> list[Step]:
    return [
        Step("other splits and chunks", sweep="decode attention"),
        Step("merge in the last-arriving program"),
    ]


def _look_prefill_attention(_: Sequence[Line]) -> list[Step]:
    return [Step("keys 64 or 128, warps 4 or 8, stages 2, 3 or 5", sweep="prefill attention")]


def _look_prompt(lines: Sequence[Line]) -> list[Step]:
    found = _profile(lines, "llama-3.1-8b", False, "kernel", tokens=2048)
    others = [line for line in found if line["kind"] != "products"]
    if not others:
        return [Step(_UNKNOWN)]
    most = max(others, key=lambda line: line["us"])
    step = Step(f"largest kernel of a prompt that is no product: {most['name'][:60]}, {most['us'] / 1e3:.2f} ms")
    return [step, *([Step("other tiles", sweep="prefill attention")] if most["kind"] == "attention" else [])]


def _look_small(lines: Sequence[Line]) -> list[Step]:
    count = _one(_profile(lines, "qwen3-0.6b", False, "step", batch=1), "kernels")
    if count is None:
        return [Step(_UNKNOWN)]
    text = f"{count:.0f} kernels x 2.3 us are {2.3e-3 * count:.2f} ms of a step: programmatic dependent launch, fused"
    return [Step(f"{text} prologue and draw")]


def _look_mixed(_: Sequence[Line]) -> list[Step]:
    return [Step("whole steps with prompts captured", switch="captured steps with prompts")]


def _look_idle(_: Sequence[Line]) -> list[Step]:
    return [Step("send only the rows in use")]


def _look_start(lines: Sequence[Line]) -> list[Step]:
    seconds = _one([line for line in lines if line.get("benchmark") == "gpu/start"], "compile_s")
    return [Step(f"compile forms in parallel: the compiler took {seconds} s of it")]


def _of_flash(line: Line) -> float | None:
    """The time of FlashAttention over ours."""
    peer = line.get("peers", {}).get("flash")
    return peer / line["us"] if isinstance(peer, (int, float)) else None


_8B = {"benchmark": "gpu/engine", "model": "llama-3.1-8b", "config.gguf": False}
_ONE_STREAM = {"what": "decode", "batch": 1}
_ATTENTION = {"benchmark": "gpu/kernels", "kernel": "decode attention"}

ROWS = (
    Row("8B bf16, one stream", 230, "tok/s", "195-225", _8B | _ONE_STREAM, "tok_s", _look_8b, machine="H200", worth=3),
    Row("8B bf16, share of roofline", 0.80, "", "", _8B | _ONE_STREAM, "roofline_share", _look_8b, worth=3),
    Row(
        "8B Q4_K, one stream",
        400,
        "tok/s",
        "330-400",
        _8B | _ONE_STREAM | {"config.gguf": True},
        "tok_s",
        _look_q4,
        machine="H200",
        worth=3,
    ),
    Row(
        "decode attention, 8 rows or more of 8k, share of copy",
        0.85,
        "",
        "0.85-0.92",
        _ATTENTION | {"shape": {"8B R=8 context=8192", "8B R=64 context=8192"}},
        "copy_share",
        _look_decode,
        worth=2,
    ),
    Row(
        "decode attention, one row of 8k, share of copy",
        0.75,
        "",
        "0.55-0.70",
        _ATTENTION | {"shape": "8B R=1 context=8192"},
        "copy_share",
        _look_decode,
        worth=1.5,
    ),
    Row(
        "prefill attention, share of FlashAttention 2",
        0.60,
        "",
        "0.80-1.05",
        _ATTENTION | {"kernel": "prefill attention", "shape": "8B T=8192 context=8192"},
        _of_flash,
        _look_prefill_attention,
    ),
    Row(
        "8B prompts, share of matmul peak",
        0.60,
        "",
        "0.65-0.75",
        _8B | {"what": "prefill"},
        "matmul_share",
        _look_prompt,
        worth=2,
    ),
    Row(
        "0.6B step, one stream",
        1.0,
        "ms",
        "1.0-1.25",
        _8B | _ONE_STREAM | {"model": "qwen3-0.6b"},
        "ms_step",
        _look_small,
        lower=True,
        machine="H200",
        worth=1.5,
    ),
    Row(
        "64 streams of 64 + 64 tokens, share of decoding alone",
        0.90,
        "",
        "0.5-0.6",
        _8B | {"what": "mixed", "batch": 64},
        "decoding_share",
        _look_mixed,
        worth=3,
    ),
    Row(
        "idle at batch 64",
        0.02,
        "",
        "< 0.02",
        _8B | {"what": "decode", "batch": 64},
        "idle_share",
        _look_idle,
        lower=True,
    ),
    Row(
        "cold start of the 8B",
        15,
        "s",
        "20-27",
        {"benchmark": "gpu/start", "model": "llama-3.1-8b", "gguf": False, "cache": "empty"},
        "total_s",
        _look_start,
        lower=True,
    ),
)
