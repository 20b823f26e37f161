# SPDX-License-Identifier: MIT
"""The four runs of a first hour on a GPU, each of which decides by its own results: see README.md beside this file.

    bash benchmarks/gpu/first_hour.sh A|B|C|D [--out FOLDER] [--before FOLDER ...] [--commit HASH]
        [--minutes 8.8] [--quick --device cpu]

A  is it right?   B  how fast, and where does the time go?   C  other tiles for what missed its bar.
D  what is published.

FOLDER gets `results.jsonl`, every result as a line; `report.txt`, the tables that are printed; `log.txt`, what the
parts said besides; and the compiler's cache in pieces, which the next run takes along from the folders it is given by
`--before`. The exit status is 1 where something failed, or was stopped; a row below its bar is no failure.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import bars
import luggage
import right
import trials
from hour import ENGINE_TESTS, KERNEL_TESTS, LEAST, ROOT, Hour, StopError, printed_too, pytest, run_logged
from run import PARTS, QUICK, run_all

KEPT = ROOT / ".first_hour"
"""Where the folders of runs are by default, and where those are put that came back from a machine."""

MINUTES = {"A": 8.8, "B": 8.8, "C": 8.8, "D": 9.7}
END = 20.0
"""Seconds at the end that the cache and the tables need."""

_8B, _06B = ("--model", "llama-3.1-8b"), ("--model", "qwen3-0.6b")
_NONE = ("--prompts", "--serve", "--mixed")


# ---- A: is it right? -------------------------------------------------------------------------------------------------


def run_a(hour: Hour) -> None:
    """No timing counts."""
    check_machine(hour)
    toys = [
        functools.partial(hour.part, f"toy{name}", 90, "engine.py", "--quick", *more)
        for name, more in (("", ()), (", GGUF", ("--gguf",)))
    ]
    for name, lines in zip(("plain", "GGUF"), hour.together(*toys)):
        if not any(line.get("what") == "mixed" for line in lines) or any("failed" in line for line in lines):
            ungraphed = hour.part(f"toy {name}, no graphs", 60, "engine.py", "--quick", "--no-cuda-graphs")
            if ungraphed and not any("failed" in line for line in ungraphed):
                hour.find("right op by op, wrong captured: look for host values that are read while recording")
            raise StopError(f"the {name} toy engine failed")
    groups = (["attention"], ["linear"], ["group"], ["moe"], ["small", "sampling"])
    kernels = [
        functools.partial(hour.part, f"right: {' '.join(names)}", 130, *_right("--only", *names)) for names in groups
    ]
    kernels += [
        functools.partial(hour.part, f"right: {kind}", 130, *_right("--only", "gguf", "--match", *kinds))
        for kind, kinds in (("Q4_K", ("Q4_K",)), ("Q6_K", ("Q6_K",)), ("other GGUF", ("Q8_0", "Q5", "Q3", "Q2", "IQ")))
    ]
    if hour.options.quick:
        kernels = [functools.partial(hour.part, "right: kernels", 130, *_right("--only", "small", "attention"))]
    hour.together(*kernels)
    again = _wrong_again(hour)
    tests = hour.together(
        functools.partial(pytest, hour, KERNEL_TESTS, 9, 260), functools.partial(pytest, hour, ENGINE_TESTS, 3, 260)
    )
    for name, more in (("bf16", ()), ("Q4_K", ("--gguf",))):  # so that its forms are compiled
        batches = ("--batches", "1", "16", "17", "64", "--steps", "4")
        hour.part(f"8B {name}", 60, "engine.py", *_8B, *more, *batches, "--prompts", "2048", "--serve", "--mixed")
    hour.find(*right.diagnosed(hour.lines, tests, again))


def _right(*arguments: str) -> tuple[str, ...]:
    return ("kernels.py", *arguments, "--case-seconds", "0")


def _wrong_again(hour: Hour) -> dict[str, list[float]]:
    """Errors of the first wrong cases in three runs: of a race, they differ. Under compute-sanitizer where there was an
    illegal access."""
    found: dict[str, list[float]] = {}
    wrong = [line for line in hour.lines if line.get("ok") is False]
    for line in wrong[:4]:
        name = f"{line['kernel']} {line['shape']}"
        found[name] = [line["error"]]
        for number in (2, 3):
            lines = hour.part(f"again {number}: {name}", 30, *_right("--match", f"{name}$"))
            found[name] += [each["error"] for each in lines if "error" in each]
    access = next((line for line in hour.lines if "llegal" in str(line.get("failed")) and "kernel" in line), None)
    if access is not None and shutil.which("compute-sanitizer"):
        command = ["compute-sanitizer", sys.executable, str(ROOT / "benchmarks/gpu/kernels.py"), "--case-seconds", "0"]
        run_logged(hour, [*command, "--match", f"{access['kernel']} {access['shape']}$"], 60)
    return found


def check_machine(hour: Hour) -> None:
    """Versions, imports, the GPU and the compiler.

    Raises:
        StopError: where the engine cannot be imported, or the GPU cannot be used, with the reason.
    """
    names = ("torch", "triton", "numpy", "gguf", "msgspec", "safetensors", "tokenizers", "candle_vllm.core")
    code = f"import importlib\nfor name in {names!r}:\n    found = importlib.import_module(name)\n"
    code += "    print(name, getattr(found, '__version__', ''))\n"
    output, status = run_logged(hour, [sys.executable, "-c", code], 60)
    hour.say(f"python {sys.version.split()[0]}", *output.splitlines()[-len(names) :])
    if status:
        hour.find("import error: bring the wheel (benchmarks/gpu/wheels.txt)")
        raise StopError(output.strip().splitlines()[-1] if output.strip() else "nothing can be imported")
    if hour.options.device == "cuda":
        code = "from candle_vllm.core.devices import gpu_obstacle\nraise SystemExit(gpu_obstacle(0))"
        output, status = run_logged(hour, [sys.executable, "-c", code], 60)
        if status:
            raise StopError(output.strip().splitlines()[-1] if output.strip() else "the GPU does not answer")


# ---- B: how fast, and where does the time go? ------------------------------------------------------------------------


def run_b(hour: Hour) -> None:
    """Every row of the bars; the profiles; what there is to be looked at where a row is below; the switches."""
    heed_a(hour)
    hour.part("8B bf16", 75, "engine.py", *_8B)
    hour.part("8B Q4_K", 60, "engine.py", *_8B, "--gguf", "--batches", "1", "16", "17", "64", *_NONE)
    hour.part("0.6B bf16", 45, "engine.py", *_06B, "--batches", "1", "64", "256", *_NONE)
    attention = ("kernels.py", "--only", "attention") + (("--case-seconds", "0") if hour.options.quick else ())
    hour.part("attention", 50, *attention)
    hour.part("start of the 8B", 50, "start.py", *_8B, "--starts", "1")
    hour.part("profile of 8B bf16", 45, "step_profile.py", *_8B, "--batches", "1", "64", "--prompts", "2048")
    hour.part("profile of 8B Q4_K", 45, "step_profile.py", *_8B, "--gguf", "--batches", "1")
    hour.part("profile of 0.6B", 35, "step_profile.py", *_06B, "--batches", "1")
    for judged in bars.below(judge(hour)):
        for step in judged.row.look(hour.lines):
            hour.find(f"{judged.row.name}: {step.text}")
            if step.switch:
                try_switch(hour, step.switch)
    for name in list(trials.SWITCHES)[: 2 if hour.options.quick else None]:
        try_switch(hour, name)
    rest = (
        ("--only", "small") if hour.options.quick else ("--only", "linear", "gguf", "--match", "linear", "Q4_K", "Q6_K")
    )
    hour.part("matrices", 90, "kernels.py", *rest, "--case-seconds", "0" if hour.options.quick else "0.05")


def heed_a(hour: Hour) -> None:
    """What run A found wrong is said again, since its times mean nothing.

    Raises:
        StopError: where A was stopped.
    """
    for line in hour.before:
        if line.get("benchmark") == "gpu/first_hour" and line.get("run") == "A" and line.get("stopped"):
            raise StopError(f"run A was stopped: {line['stopped']}")
    if wrong := right.wrong_kernels(hour.before):
        hour.find(f"wrong in an earlier run, so their times mean nothing: {', '.join(wrong)}")


def try_switch(hour: Hour, name: str) -> None:
    """The engine with a switch on, beside what it did without; once in a run."""
    switch = trials.SWITCHES[name]
    if any(line.get("config", {}).get("set") == list(switch.settings) for line in hour.lines):
        return
    lines = hour.part(f"switch: {name}", 50, "engine.py", *switch.arguments, "--set", *switch.settings)
    if any("absent" in line for line in lines):
        hour.find(f"{name}: absent ({' '.join(switch.settings)})")
    for what, without, now in trials.gains(hour.lines, switch.settings):
        hour.find(f"{name}: {what}: {without:.4g} -> {now:.4g} tok/s ({now / without - 1:+.1%})")


# ---- C: sweeps -------------------------------------------------------------------------------------------------------


def run_c(hour: Hour) -> None:
    """Other tiles for what B's results say is below its bar, the most valuable first; then the winners in an engine."""
    heed_a(hour)
    found = bars.judged(bars.ROWS, hour.before, everywhere=hour.options.quick)
    names = trials.sweeps_for(found, hour.before)
    if hour.options.quick:
        names = names[:1] or ["decode attention"]
    if not names:
        hour.find("nothing that B measured is below its bar for want of other tiles: nothing to sweep")
    for place, name in enumerate(names):
        sweep = trials.SWEEPS[name]
        share = max(LEAST, (hour.left - 60) / (len(names) - place))
        match = () if hour.options.quick else ("--match", *sweep.match)
        tries = sweep.tries[:1] if hour.options.quick else sweep.tries
        seconds = ("--case-seconds", "0" if hour.options.quick else "0.1")
        lines = hour.part(f"sweep: {name}", share, "sweep.py", "--only", sweep.only, *match, *seconds, "--try", *tries)
        hour.find(*(f"{name}: absent: {line['path']}" for line in lines if "absent" in line))
        winners = next((line["winners"] for line in lines if "winners" in line), {})
        hour.find(f"{name}: {' '.join(_settings(winners)) or 'what it has is best'}")
        if winners:
            try_winners(hour, name, sweep, winners)
    if "own linear" in names and not hour.options.quick:
        match = ("--match", *trials.SWEEPS["own linear"].match)
        lines = hour.part("own linear against torch", 60, "kernels.py", "--only", "linear", *match)
        hour.find(f"own linear: no slower than torch's up to OWN_ROWS={trials.own_rows(lines)}")


def _settings(winners: dict[str, int]) -> list[str]:
    return [f"{path}={number}" for path, number in winners.items()]


def try_winners(hour: Hour, name: str, sweep: trials.Sweep, winners: dict[str, int]) -> None:
    """An engine without and with the winners of a sweep."""
    arguments = (*sweep.model, "--batches", "1", "8", *_NONE)
    hour.part(f"engine as it is: {name}", 40, "engine.py", *arguments)
    hour.part(f"engine with the winners: {name}", 40, "engine.py", *arguments, "--set", *_settings(winners))
    for what, without, now in trials.gains(hour.lines, _settings(winners)):
        hour.find(f"{name}: {what}: {without:.4g} -> {now:.4g} tok/s ({now / without - 1:+.1%})")


# ---- D: what is published --------------------------------------------------------------------------------------------


def run_d(hour: Hour) -> None:
    """The tests where the kernels are not those that A tested, then all that `run.py` measures."""
    tested = [line for line in hour.before if line.get("benchmark") == "gpu/first_hour" and line.get("run") == "A"]
    here = {"kernels": kernels_hash(), "device": hour.options.device, "quick": hour.options.quick}
    if any(bars.matches(line, here) and not line.get("faults") for line in tested):
        hour.find("the kernels are those that A tested")
    else:
        hour.find("the kernels are not those that A found right: the tests run again")
        each = [
            functools.partial(pytest, hour, path, count, 150) for path, count in ((KERNEL_TESTS, 9), (ENGINE_TESTS, 3))
        ]
        hour.together(*each)
    parts = QUICK if hour.options.quick else PARTS
    if hour.options.quick:
        parts = tuple(part for part in parts if part.group != "peer")
    with printed_too(hour.text):
        lines, faults = run_all(parts, hour.until, hour.options)
    hour.lines += lines
    hour.faults += faults
    if importlib.util.find_spec("vllm") is None:
        hour.find("no vllm on this machine: nothing beside it")


# ---- all -------------------------------------------------------------------------------------------------------------

RUNS = {"A": run_a, "B": run_b, "C": run_c, "D": run_d}


def kernels_hash() -> str:
    """Of the kernels' sources, by which D knows whether A tested them."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "packages/core/src/candle_vllm/core/kernels").rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def judge(hour: Hour) -> list[bars.Judged]:
    """The rows of the bars by what the run has measured so far."""
    return bars.judged(bars.ROWS, hour.lines, everywhere=hour.options.quick)


def bars_table(hour: Hour) -> list[dict[str, Any]]:
    """A line for each row: predicted, measured, bar."""
    return [
        {
            "what": "bar",
            "row": each.row.name,
            "predicted": each.row.predicted,
            "measured": each.measured,
            "bar": f"{'<=' if each.row.lower else '>='} {each.row.bar:g} {each.row.unit}".rstrip(),
            "verdict": each.verdict,
        }
        for each in judge(hour)
    ]


def main() -> None:
    """One run."""
    options = _options()
    start = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("results.jsonl", "log.txt", "report.txt"):
        (options.out / name).unlink(missing_ok=True)
    luggage.set_out(ROOT, options.scratch, options.wheels, options.device)
    before = luggage.lines_of(options.before)
    cache = Path(os.environ["TRITON_CACHE_DIR"])
    restored = luggage.restore_cache(options.before, cache)
    hour = Hour(options, start + 60 * options.minutes - END, before)
    hour.say(f"run {options.run} of {options.commit or 'an unnamed commit'}; {restored} files of a compiler's cache")
    stopped = ""
    try:
        RUNS[options.run](hour)
    except StopError as error:
        stopped = str(error)
        hour.say(f"STOPPED: {stopped}")
    ended(hour, stopped, time.monotonic() - start)
    luggage.shorten(options.out / "log.txt")
    pieces = luggage.pack_cache(cache, options.out)
    print(f"{len(pieces)} pieces of the compiler's cache, {time.monotonic() - start:.0f} s; all in {options.out}")
    if stopped or hour.faults:
        raise SystemExit(1)


def ended(hour: Hour, stopped: str, seconds: float) -> None:
    """Writes the tables, and what the next runs look up."""
    rows = bars_table(hour) if hour.options.run in "BD" else []
    reached = next((line for line in hour.lines if "copy_gbps" in line), {})
    if reached:
        hour.say("", f"copy {reached['copy_gbps']:.4g} GB/s, bf16 product {reached['matmul_tflops']:.4g} TFLOP/s")
    if rows:
        hour.show("bars", rows)
    hour.say("", "faults:" if hour.faults else "nothing failed, nothing was left out", *hour.faults)
    keys = ("machine", "capability", "commit", "versions", "date", "copy_gbps", "matmul_tflops")
    facts = {key: line[key] for line in reversed(hour.lines) for key in keys if key in line}
    summary = {
        "benchmark": "gpu/first_hour",
        "run": hour.options.run,
        "stopped": stopped,
        "kernels": kernels_hash(),
        "device": hour.options.device,
        "quick": hour.options.quick,
        "seconds": round(seconds),
        "findings": hour.findings,
        "faults": hour.faults,
        "rows": rows,
        **facts,
    }
    with (hour.options.out / "results.jsonl").open("a") as results:
        tests = [line for line in hour.lines if line.get("benchmark") == "gpu/tests"]
        results.writelines(json.dumps(line) + "\n" for line in [*tests, summary])
    (hour.options.out / "report.txt").write_text(hour.text.getvalue())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=RUNS)
    parser.add_argument("--out", type=Path, help="folder; else the environment's OUT, else .first_hour/RUN")
    parser.add_argument("--before", type=Path, nargs="*", help="folders of earlier runs, else those in .first_hour")
    parser.add_argument("--minutes", type=float, help="for all of it")
    parser.add_argument(
        "--wheels", type=Path, default=ROOT / ".wheels", help="folder of wheels that were brought along"
    )
    parser.add_argument("--scratch", type=Path, default=luggage.SCRATCH, help="for the wheels and the compiler's cache")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to check this script")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--commit", help="what is measured, where git cannot say")
    options = parser.parse_args()
    out = os.environ.get("OUT")
    options.out = (options.out or (Path(out) if out else KEPT / options.run)).resolve()
    options.minutes = options.minutes or MINUTES[options.run]
    earlier = [KEPT / name for name in RUNS if name < options.run]
    options.before = [path for path in (options.before if options.before is not None else earlier) if path.is_dir()]
    return options


if __name__ == "__main__":
    main()
