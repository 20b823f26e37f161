# SPDX-License-Identifier: MIT
"""The four runs of a first hour on a GPU, dry on the CPU, and what they decide by results that are made up."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "benchmarks" / "gpu"
WHEELS = SCRIPTS / "wheels.txt"
Line = dict[str, Any]
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Imports a script, with those that it imports."""
    monkeypatch.syspath_prepend(SCRIPTS)
    known = set(sys.modules)
    yield __import__
    for name in {path.stem for path in SCRIPTS.glob("*.py")} - known:
        sys.modules.pop(name, None)


# ---- dry runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs keep what they find, for each other."""
    return tmp_path_factory.mktemp("first_hour")


def dry(folder: Path, run: str, *, status: int = 0) -> tuple[str, list[Line]]:
    """What a run printed, and its lines; it knows the runs before it, as far as they ran."""
    before = [str(folder / name) for name in "ABCD" if name < run]
    script = ["bash", str(SCRIPTS / "first_hour.sh"), run, "--quick", "--device", "cpu", "--out", str(folder / run)]
    command = [*script, "--scratch", str(folder / "scratch"), "--wheels", str(folder / "none"), "--before", *before]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == status, done.stdout + done.stderr + (folder / run / "log.txt").read_text()
    found = [json.loads(text) for text in (folder / run / "results.jsonl").read_text().splitlines()]
    assert len(list((folder / run).iterdir())) <= 8  # as many as come back from some machines
    assert (folder / run / "report.txt").read_text() in done.stdout
    return done.stdout, found


@pytest.mark.every_case
@pytest.mark.timeout(620)
def test_a_finds_out_whether_it_is_right(folder: Path) -> None:
    shown, lines = dry(folder, "A")
    summary = lines[-1]
    assert (summary["run"], summary["stopped"], summary["faults"]) == ("A", "", [])
    assert {"machine", "versions", "date", "copy_gbps", "matmul_tflops", "kernels"} <= summary.keys()
    assert {line["part"] for line in lines if line.get("what") == "mixed"} == {"toy", "toy, GGUF"}
    assert any(line.get("ok") for line in lines)
    assert "test_gpu_engine.py: 0 passed, 0 failed" in shown


@pytest.mark.every_case
@pytest.mark.timeout(620)
def test_b_judges_every_row_and_tries_switches(folder: Path) -> None:
    shown, lines = dry(folder, "B")
    summary = lines[-1]
    measured = {row["row"]: row["measured"] for row in summary["rows"]}
    for row in ("8B bf16, one stream", "8B Q4_K, one stream", "0.6B step, one stream", "cold start of the 8B"):
        assert measured[row] > 0
        assert re.search(rf"{row} .*{measured[row]:.4g}", shown)
    assert any("own linear kernel: llama-3.1-8b decode 1" in text for text in summary["findings"])
    assert any(line.get("what") == "step" and line["kernels"] > 0 for line in lines)


@pytest.mark.every_case
@pytest.mark.timeout(620)
def test_c_sweeps(folder: Path) -> None:
    _, lines = dry(folder, "C")
    assert any(line.get("what") == "trial" and "score" in line for line in lines)
    assert "winners" in next(line for line in lines if line.get("what") == "winners")


@pytest.mark.every_case
@pytest.mark.timeout(620)
def test_d_measures_all(folder: Path) -> None:
    shown, lines = dry(folder, "D")
    measured = [line for line in lines[:-1] if line["benchmark"] != "gpu/tests"]
    assert all({"machine", "commit", "versions", "date"} <= line.keys() for line in measured)
    assert {"gpu/kernels", "gpu/engine", "gpu/start"} == {line["benchmark"] for line in measured}
    cases = [line for line in measured if "kernel" in line]
    assert all(line["ok"] and line["us"] > 0 for line in cases)
    kernels = {"decode attention", "prefill attention", "gguf_linear", "linear", "add_rms_norm", "kv_write", "edit"}
    assert kernels <= {line["kernel"] for line in cases}
    (start,) = [line for line in measured if line["benchmark"] == "gpu/start"]
    stages = ("python", "import_torch", "import_engine", "device", "load", "weights", "build", "first_token")
    spent = [start[f"{stage}_s"] for stage in stages]
    assert all(seconds >= 0 for seconds in spent)
    assert sum(spent) <= start["total_s"] * 1.001
    tested = (folder / "A" / "results.jsonl").exists()
    assert ("the kernels are those that A tested" in shown) == tested


def test_a_run_that_was_stopped_stops_the_next(folder: Path) -> None:
    earlier = folder / "stopped" / "A"
    earlier.mkdir(parents=True)
    line = {"benchmark": "gpu/first_hour", "run": "A", "stopped": "the plain toy engine failed"}
    (earlier / "results.jsonl").write_text(json.dumps(line) + '\n{"cut of')
    (folder / "stopped" / "B").mkdir()
    (folder / "stopped" / "B" / "log.txt").touch()
    shown, _ = dry_without_log(folder / "stopped", "B")
    assert "STOPPED: run A was stopped: the plain toy engine failed" in shown


def dry_without_log(folder: Path, run: str) -> tuple[str, int]:
    """What a run that is stopped prints, and its exit status."""
    script = [sys.executable, str(SCRIPTS / "first_hour.py"), run, "--quick", "--device", "cpu"]
    command = [*script, "--out", str(folder / run), "--scratch", str(folder / "s"), "--before", str(folder / "A")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    return done.stdout, done.returncode


@pytest.mark.every_case
@pytest.mark.timeout(300)
def test_several_gpus_are_measured_in_every_way() -> None:
    command = [sys.executable, str(SCRIPTS / "several.py"), "--quick", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(text) for text in done.stdout.splitlines()]
    assert {line["way"] for line in lines} == {"one", "tp", "pp", "pp-1", "dp", "moe-tp", "moe-ep"}
    assert [line["what"] for line in lines] == ["load", "decode", "prefill"] * 7
    assert all(line["tok_s"] > 0 for line in lines if line["what"] != "load")


# ---- decisions -------------------------------------------------------------------------------------------------------

GPU = {"machine": "NVIDIA H200"}
ENGINE = GPU | {"benchmark": "gpu/engine", "config": {"gguf": False}}
PROFILE = GPU | {"benchmark": "gpu/step_profile", "config": {"gguf": False}}


def bf16(rate: float, **more: Any) -> Line:
    return ENGINE | {"model": "llama-3.1-8b", "what": "decode", "batch": 1, "tok_s": rate} | more


def steps(bars: ModuleType, row: str, lines: list[Line]) -> list[Any]:
    (found,) = [each for each in bars.judged(bars.ROWS, lines) if each.row.name == row]
    assert found.verdict == "below"
    return found.row.look(lines)


def test_verdicts(load: Load) -> None:
    bars = load("bars")

    def verdict(row: str, *lines: Line) -> str:
        return {each.row.name: each.verdict for each in bars.judged(bars.ROWS, lines)}[row]

    one, idle = "8B bf16, one stream", "idle at batch 64"
    assert verdict(one) == "not measured"
    assert verdict(one, bf16(229.0)) == "below"
    assert verdict(one, bf16(230.0)) == "reached"
    assert verdict(one, bf16(100.0, machine="NVIDIA A100")) == "no bar on this machine"
    assert verdict(one, bf16(300.0, config={"gguf": False, "set": ["linear.OWN_ROWS=16"]})) == "not measured"
    assert verdict(one, bf16(300.0, model="qwen3-0.6b")) == "not measured"
    assert verdict(idle, bf16(1.0, batch=64, idle_share=0.03)) == "below"
    assert verdict(idle, bf16(1.0, batch=64, idle_share=0.02)) == "reached"
    kernel = GPU | {"benchmark": "gpu/kernels", "kernel": "decode attention"}
    fast, slow = (kernel | {"shape": f"8B R={r} context=8192", "copy_share": s} for r, s in ((8, 0.9), (64, 0.8)))
    assert verdict("decode attention, 8 rows or more of 8k, share of copy", fast, slow) == "below"


def test_what_is_far_below_and_matters_comes_first(load: Load) -> None:
    bars = load("bars")
    lines = [bf16(220.0, roofline_share=0.9), bf16(1.0, batch=64, what="mixed", decoding_share=0.5)]
    names = [each.row.name for each in bars.below(bars.judged(bars.ROWS, lines))]
    assert names == ["64 streams of 64 + 64 tokens, share of decoding alone", "8B bf16, one stream"]


def test_a_slow_8b_is_looked_at_by_its_profile(load: Load) -> None:
    bars, trials = load("bars"), load("trials")
    about = PROFILE | {"model": "llama-3.1-8b", "batch": 1}
    slow = about | {"what": "kind", "kind": "products", "copy_share": 0.7, "gbps": 3000.0}
    gaps = about | {"what": "step", "gaps_ms": 0.5, "kernels": 330}
    (own,) = steps(bars, "8B bf16, one stream", [bf16(200.0), slow, gaps | {"gaps_ms": 0.1}])
    assert own.switch in trials.SWITCHES
    assert trials.SWITCHES[own.switch].settings == ("linear.OWN_ROWS=16",)
    (late,) = steps(bars, "8B bf16, one stream", [bf16(200.0), slow | {"copy_share": 0.9}, gaps])
    assert "programmatic dependent launch" in late.text


def test_a_slow_q4_k_leads_to_a_sweep_or_to_the_merges(load: Load) -> None:
    bars, trials = load("bars"), load("trials")
    packed = {"config": {"gguf": True}}
    about = PROFILE | packed | {"model": "llama-3.1-8b", "what": "kind", "batch": 1}
    products, merges = about | {"kind": "products", "gbps": 2000.0}, about | {"kind": "merges", "us": 400.0}
    found = steps(bars, "8B Q4_K, one stream", [bf16(300.0, **packed), products, merges])
    assert found[0].sweep in trials.SWEEPS
    assert "last-arriving" in found[1].text
    (other,) = steps(bars, "8B Q4_K, one stream", [bf16(300.0, **packed), products | {"gbps": 2700.0}])
    assert not other.sweep


def test_the_other_rows_lead_to_what_the_plan_names(load: Load) -> None:
    bars = load("bars")
    kernel = GPU | {"benchmark": "gpu/kernels"}
    rows = {
        "decode attention, one row of 8k, share of copy": (
            kernel | {"kernel": "decode attention", "shape": "8B R=1 context=8192", "copy_share": 0.5},
            "splits and chunks",
        ),
        "prefill attention, share of FlashAttention 2": (
            kernel
            | {"kernel": "prefill attention", "shape": "8B T=8192 context=8192", "us": 100.0, "peers": {"flash": 50.0}},
            "stages 2, 3 or 5",
        ),
        "64 streams of 64 + 64 tokens, share of decoding alone": (
            bf16(1.0, what="mixed", batch=64, decoding_share=0.6),
            "captured",
        ),
        "idle at batch 64": (bf16(1.0, batch=64, idle_share=0.1), "rows in use"),
        "cold start of the 8B": (
            GPU
            | {"benchmark": "gpu/start", "model": "llama-3.1-8b", "gguf": False, "cache": "empty", "total_s": 24.0}
            | {"compile_s": 17.0},
            "in parallel: the compiler took 17.0 s",
        ),
    }
    for row, (line, text) in rows.items():
        assert any(text in step.text for step in steps(bars, row, [line])), row
    small = PROFILE | {"model": "qwen3-0.6b", "batch": 1, "what": "step", "kernels": 300}
    (step,) = steps(bars, "0.6B step, one stream", [bf16(1.0, model="qwen3-0.6b", ms_step=1.2), small])
    assert "300 kernels x 2.3 us are 0.69 ms" in step.text
    chunk = PROFILE | {"model": "llama-3.1-8b", "tokens": 2048, "what": "kernel"}
    kernels = [
        chunk | {"name": name, "kind": kind, "us": us}
        for name, kind, us in (("nvjet", "products", 9.0), ("prefill_kernel", "attention", 5.0), ("x", "copies", 1.0))
    ]
    found = steps(bars, "8B prompts, share of matmul peak", [bf16(1.0, what="prefill", matmul_share=0.4), *kernels])
    assert "prefill_kernel" in found[0].text


def test_sweeps_are_those_of_what_missed(load: Load) -> None:
    bars, trials = load("bars"), load("trials")
    slow = GPU | {"benchmark": "gpu/kernels", "kernel": "decode attention", "shape": "8B R=1 context=8192"}
    found = bars.judged(bars.ROWS, [slow | {"copy_share": 0.5}])
    assert trials.sweeps_for(found, []) == ["decode attention"]
    assert trials.sweeps_for(bars.judged(bars.ROWS, [slow | {"copy_share": 0.8}]), []) == []
    assert trials.sweeps_for(bars.judged(bars.ROWS, []), []) == list(trials.SWEEPS)


def test_rows_of_our_own_linear_kernel(load: Load) -> None:
    trials = load("trials")

    def line(name: str, rows: int, ours: float) -> Line:
        case = {"benchmark": "gpu/kernels", "kernel": "linear, own", "shape": f"{name} T={rows}", "ok": True}
        return case | {"us": ours, "peers": {"torch": 10.0}}

    names = ("8B qkv", "8B o", "8B gate, up", "8B down", "8B head")
    few = [line(name, rows, 9.0) for name in names for rows in (1, 8)]
    assert trials.own_rows([*few, *(line(name, 16, 11.0) for name in names)]) == 8
    assert trials.own_rows([*few, *(line(name, 16, 9.0) for name in names[1:])]) == 8
    assert trials.own_rows([line(name, 1, 11.0) for name in names]) == 0


def test_a_switch_is_compared_with_the_same_without_it(load: Load) -> None:
    trials = load("trials")
    changed = bf16(250.0, config={"gguf": False, "set": ["linear.OWN_ROWS=16"]})
    other = bf16(900.0, batch=8, config=changed["config"])
    found = trials.gains([bf16(200.0), changed, other], ["linear.OWN_ROWS=16"])
    assert found == [("llama-3.1-8b decode 1", 200.0, 250.0)]


def test_a_sweep_ends_where_neighbours_are_alike(load: Load) -> None:
    sweep = load("sweep")
    asked: list[int] = []

    def trial(scores: Mapping[int, float]) -> Callable[[int], float]:
        asked.clear()
        return lambda number: (asked.append(number), scores[number])[1]

    assert sweep.swept([1, 2, 4, 8], 1.0, 0.02, trial({1: 1.0, 2: 0.8, 4: 0.79, 8: 0.5})) == (4, 0.79)
    assert asked == [1, 2, 4]
    assert sweep.swept([1, 2], 1.0, 0.02, trial({1: 0.99, 2: 1.2})) is None
    assert sweep.swept([1, 2, 4], 1.0, 0.02, trial({1: sweep.WRONG, 2: sweep.WRONG, 4: 0.9})) == (4, 0.9)


def test_what_run_a_shows(load: Load) -> None:
    right = load("right")

    def shown(*lines: Line, tests: Any = None, again: Mapping[str, list[float]] | None = None) -> str:
        return " | ".join(right.diagnosed(lines, [tests] if tests else [], again or {}))

    case = {"kernel": "gguf_linear", "shape": "Q4_K toy T=1"}
    assert shown(case | {"ok": True}) == ""
    assert "not to be trusted in B and C: gguf_linear" in shown(case | {"ok": False})
    assert "compute-sanitizer" in shown(case | {"failed": "RuntimeError: an illegal memory access was encountered"})
    assert "bring the wheel" in shown(case | {"failed": "ModuleNotFoundError: No module named 'msgspec'"})
    assert "set CC" in shown(case | {"failed": "RuntimeError: Failed to find C compiler, or it does not work"})
    assert "a race" in shown(again={"gguf_linear Q4_K": [0.1, 0.2, 0.1]})
    assert "a race" not in shown(again={"gguf_linear Q4_K": [0.1, 0.1, 0.1]})
    alone = case | {"row_alone_same_bits": False}
    assert "--deterministic" in shown(alone | {"kernel": "linear, invariant"})
    assert "--deterministic" not in shown(alone)
    assert "256 codes" in shown(tests=right.Tests(9, 0, ("test_x[fp8-1]",)))
    assert "256 codes" not in shown(tests=right.Tests(9, 0, ("test_x[fp8-1]", "test_y")))
    assert "go on with B" in shown(tests=right.Tests(95, 0, ("a",) * 5))
    assert "mend that" in shown(tests=right.Tests(94, 0, ("a",) * 6))


def test_tests_are_read_from_what_pytest_prints(load: Load) -> None:
    right = load("right")
    alone = "a.py::test_x PASSED [ 50%]\na.py::test_y[1 2] FAILED    [100%]\na.py::test_z SKIPPED (no GPU) [100%]\n"
    assert right.read_tests(alone, 1) == right.Tests(1, 1, ("a.py::test_y[1 2]",))
    many = "[gw0] [  1%] PASSED a.py::test_x \n[gw11] [ 99%] FAILED a.py::test_y[1 2] \n"
    cut = right.read_tests(many, 124)
    assert (cut.passed, cut.failed, cut.died) == (1, ("a.py::test_y[1 2]",), "pytest ended with status 124")
    broken = right.read_tests("ERROR a.py - ImportError: x\n", 2)
    assert broken.failed == ("a.py",)


# ---- settings --------------------------------------------------------------------------------------------------------


def test_every_kind_of_setting(load: Load) -> None:
    settings = load("settings")
    from candle_vllm.core.kernels import linear
    from candle_vllm.core.kernels.attention import triton_decode
    from candle_vllm.core.kernels.gguf_linear import triton as quantised
    from candle_vllm.core.kernels.moe import triton_experts
    from candle_vllm.core.kernels.rotary_write import triton as rotary
    from candle_vllm.core.kernels.sampling import triton_draw, triton_rows

    sizes = {"padded_dim": 128, "bytes_per_number": 2, "kv_heads": 8, "capability": 90}
    asked = {name: sizes[name] for name in inspect.signature(triton_decode.splits).parameters}
    before = triton_decode.splits(**asked)
    changes = {
        "linear.OWN_ROWS": 16,
        "attention.triton_decode.splits.programs": 7,
        "gguf_linear.triton.TILES.32.0.warps": 2,
        "moe.triton_experts.PLAIN.few.0.warps": 4,
        "sampling.triton_rows.BLOCK": 512,
        "rotary_write.triton.rotary_write_kernel.num_warps": 8,
    }
    kernel: Any = rotary.rotary_write_kernel
    launched: list[dict[str, Any]] = []
    kernel.run = lambda *_, **kwargs: launched.append(kwargs)
    try:
        with settings.tried(changes):
            assert linear.OWN_ROWS == 16
            after = triton_decode.splits(**asked)
            assert (after.programs, after.keys) == (7, before.keys)
            assert quantised.TILES[32][0].warps == 2
            assert triton_experts.PLAIN.few[0].warps == 4
            assert triton_rows.BLOCK.value == triton_draw.BLOCK.value == 512
            kernel[(1,)](1, num_warps=4)
            assert launched[0]["num_warps"] == 8
    finally:
        del kernel.run
    assert linear.OWN_ROWS == 0
    assert triton_decode.splits(**asked) == before
    assert quantised.TILES[32][0].warps == 1
    assert triton_rows.BLOCK.value == triton_draw.BLOCK.value == 1024


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("nothing.triton.X", "attention.triton_decode"),
        ("attention.triton_decode.NOTHING", "splits.programs"),
        ("attention.triton_decode.splits.nothing", "programs"),
        ("attention.nothing", "attention.triton_prefill"),
        ("gguf_linear.triton.TILES.31.0.warps", "16, 32"),
        ("gguf_linear.triton.TILES.32.0.nothing", "tokens, rows, warps, stages"),
        ("rotary_write.triton.rotary_write_kernel.nothing", "num_warps and num_stages"),
    ],
)
def test_a_setting_that_does_not_exist_names_what_does(load: Load, path: str, named: str) -> None:
    settings = load("settings")
    with pytest.raises(settings.NoSuchSettingError, match=re.escape(named)):
        settings.apply({path: 1})


def test_settings_of_the_engine(load: Load) -> None:
    settings = load("settings")
    assert settings.engine_fields(settings.parsed(["EngineConfig.max_num_seqs=8"])) == {"max_num_seqs": 8}
    with pytest.raises(settings.NoSuchSettingError, match="block_size"):
        settings.engine_fields({"EngineConfig.nothing": 1})
    with pytest.raises(settings.NoSuchSettingError):
        settings.parsed(["linear.OWN_ROWS=many"])


def test_what_the_sweeps_set_exists(load: Load) -> None:
    settings, trials = load("settings"), load("trials")
    for sweep in trials.SWEEPS.values():
        for each in sweep.tries:
            path, _, numbers = each.partition("=")
            with settings.tried({path: int(numbers.split(",")[0])}):
                pass
    modules = {settings._short(module): settings.known(module) for module in settings.tunable_modules()}
    for name, paths in modules.items():
        for path in paths:
            with settings.tried({f"{name}.{path}": 1}):
                pass
    kernels = [value for module in settings.tunable_modules() for value in vars(module).values()]
    assert not [kernel for kernel in kernels if settings._is_kernel(kernel) and "run" in vars(kernel)]
    launched = {name for name, paths in modules.items() if any("_kernel.num_warps" in path for path in paths)}
    assert {"attention.triton_decode", "linear.triton", "sampling.triton_edit", "moe.triton_sort"} <= launched


# ---- what travels ----------------------------------------------------------------------------------------------------


def wheels() -> dict[str, str]:
    return dict(line.split("==") for line in WHEELS.read_text().splitlines() if "==" in line)


def test_the_wheels_are_the_versions_that_are_tested() -> None:
    constraints = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["constraint-dependencies"]
    tested = dict(pin.split("==") for pin in constraints)
    ours = wheels()
    assert {name: tested.get(name, version) for name, version in ours.items()} == ours
    assert ours.keys() - tested.keys() == {"execnet", "pytest-xdist"}  # only of use where there are cores


WITHOUT_OTHERS = """
import importlib.machinery, importlib.metadata, importlib.util, re, runpy, sys
allowed = set(sys.argv.pop(1).split(","))
kept = lambda name: re.sub("[-_.]+", "-", name).lower() in allowed or name.startswith(("nvidia", "cuda"))
tops = importlib.metadata.packages_distributions().items()
hidden = {top for top, names in tops if not any(map(kept, names))}

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if path is None and name in hidden else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
assert importlib.util.find_spec("numba") is None
sys.path.insert(0, sys.argv.pop(1))
import kernels, step_profile, sweep
runpy.run_path(sys.path[0] + "/engine.py", run_name="__main__")
import pytest
tests = ["packages/core/tests/test_gpu_engine.py", "packages/core/tests/kernels/triton/test_small_kernels.py"]
options = ["-c", "/dev/null", "--rootdir", ".", "--import-mode=importlib", "-p", "no:cacheprovider", "--collect-only"]
sys.exit(pytest.main([*options, *tests]))
"""


def test_the_wheels_are_all_that_is_imported() -> None:
    """The toy engine from a GGUF file, the benchmarks and pytest, with nothing but torch, triton, numpy, and those."""
    torch_and_its_own = {"torch", "triton", "numpy", "filelock", "typing-extensions", "sympy", "networkx", "jinja2"}
    torch_and_its_own |= {"fsspec", "setuptools", "mpmath", "markupsafe", "candle-vllm-core"}
    allowed = ",".join(torch_and_its_own | wheels().keys())
    arguments = ["--quick", "--device", "cpu", "--eager", "--gguf", "--serve", "--mixed"]
    command = [sys.executable, "-c", WITHOUT_OTHERS, allowed, str(SCRIPTS), *arguments]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    environment["TRITON_INTERPRET"] = "1"  # else the tests of kernels are collected on a GPU alone
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_wheel_is_used_only_where_its_package_is_missing(load: Load, tmp_path: Path) -> None:
    import zipfile

    luggage = load("luggage")
    for name in ("pytest-1.0-py3-none-any", "not_here-1.0-py3-none-any", "other_python-1.0-cp39-cp39-any"):
        package = name.partition("-")[0]
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as wheel:
            wheel.writestr(f"{package}/__init__.py", "")
            wheel.writestr(f"{package}-1.0.dist-info/METADATA", "")
    assert luggage.unpack_missing(tmp_path, tmp_path / "site") == ["not_here"]
    assert (tmp_path / "site" / "not_here" / "__init__.py").exists()
    assert luggage.unpack_missing(tmp_path, tmp_path / "site") == []


def test_the_compilers_cache_travels_in_pieces(load: Load, tmp_path: Path) -> None:
    luggage = load("luggage")
    cache, folder, other = tmp_path / "cache", tmp_path / "out", tmp_path / "elsewhere"
    folder.mkdir()
    for number, entry in enumerate(("old", "new")):
        (cache / entry).mkdir(parents=True)
        (cache / entry / "k.cubin").write_bytes(os.urandom(40000))
        (cache / entry / "k.ttir").write_text("of no use for a hit")
        children = {name: str(cache / entry / name) for name in ("k.cubin", "k.ttir")}
        (cache / entry / "__grp__k.json").write_text(json.dumps({"child_paths": children}))
        os.utime(cache / entry, (number, number))
    pieces = luggage.pack_cache(cache, folder, piece=30000, most=9)
    assert [path.stat().st_size <= 30000 for path in pieces] == [True] * 3
    assert luggage.restore_cache([tmp_path, folder, tmp_path / "nothing"], other) == 4
    assert (other / "old" / "k.cubin").read_bytes() == (cache / "old" / "k.cubin").read_bytes()
    assert not (other / "old" / "k.ttir").exists()
    group = json.loads((other / "new" / "__grp__k.json").read_text())
    assert group == {"child_paths": {"k.cubin": str(other / "new" / "k.cubin")}}
    assert len(luggage.pack_cache(cache, folder, piece=30000, most=2)) == 2  # the newest alone
    assert luggage.restore_cache([folder], tmp_path / "new") == 2
    assert (tmp_path / "new" / "new").is_dir()
