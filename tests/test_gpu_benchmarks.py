# SPDX-License-Identifier: MIT
"""The GPU benchmarks run from end to end on the CPU, at toy sizes, and what they compute from times is right.

`test_first_hour.py` runs the kernels and the start, within the runs that they are parts of.
"""

from __future__ import annotations

import importlib.util
import json
import math
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "gpu"
LinesOf = Callable[..., list[dict[str, Any]]]


def load(name: str) -> ModuleType:
    """A script that imports none of the others."""
    spec = importlib.util.spec_from_file_location(f"gpu_benchmarks_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lines_of(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[LinesOf]:
    """Runs a script in this process, where torch is imported already, and gives its lines."""

    def run(script: str, *arguments: str) -> list[dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / script), "--quick", "--device", "cpu", *arguments])
        monkeypatch.syspath_prepend(SCRIPTS)
        capfd.readouterr()
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
        lines = [json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
        assert not [line for line in lines if "failed" in line or "skipped" in line]
        assert all({"machine", "commit", "versions", "date"} <= line.keys() for line in lines)
        return lines

    known, threads = set(sys.modules), torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other are slow on a busy machine
    yield run
    torch.set_num_threads(threads)
    for name in {path.stem for path in SCRIPTS.glob("*.py")} - known:
        sys.modules.pop(name, None)


# ---- the scripts -----------------------------------------------------------------------------------------------------


def test_engine(lines_of: LinesOf) -> None:
    lines = lines_of("engine.py", "--eager", "--gguf")
    assert [line["what"] for line in lines] == ["ceilings", "load", "decode", "decode", "prefill", "serve", "mixed"]
    assert [line["batch"] for line in lines if line["what"] == "decode"] == [1, 3]
    assert all(line["tok_s"] > 0 for line in lines[2:])
    assert lines[-1]["decoding_share"] == pytest.approx(lines[-1]["tok_s"] / lines[-1]["decoding_tok_s"], rel=1e-3)


def test_settings_of_the_engine(lines_of: LinesOf) -> None:
    lines = lines_of("engine.py", "--eager", "--set", "linear.OWN_ROWS=0", "EngineConfig.max_num_seqs=3")
    assert lines[2]["config"]["set"] == ["linear.OWN_ROWS=0", "EngineConfig.max_num_seqs=3"]
    (_, absent) = lines_of("engine.py", "--eager", "--set", "linear.NOTHING=1")
    assert "OWN_ROWS" in absent["absent"]


def test_step_profile(lines_of: LinesOf) -> None:
    lines = lines_of("step_profile.py", "--eager", "--prompts", "40", "--most", "3")[2:]
    steps = [line for line in lines if line["what"] == "step"]
    assert [(line.get("batch"), line.get("tokens")) for line in steps] == [(1, None), (3, None), (None, 40)]
    for step in steps:
        assert 0 < step["busy_ms"] + step["gaps_ms"] <= step["ms_step"]
        key = "batch" if "batch" in step else "tokens"
        kinds = [line for line in lines if line["what"] == "kind" and line.get(key) == step[key]]
        assert sum(line["launches"] for line in kinds) == pytest.approx(step["kernels"], rel=1e-3)
        assert sum(line["what"] == "kernel" and line.get(key) == step[key] for line in lines) == 3


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_transformers(lines_of: LinesOf) -> None:
    assert [line["what"] for line in lines_of("transformers_peer.py")] == ["decode", "serve"]


# ---- run.py ----------------------------------------------------------------------------------------------------------


def run_with(monkeypatch: pytest.MonkeyPatch, folder: Path, scripts: dict[str, str], seconds: float = 20.0) -> None:
    """run.py over scripts of this text instead of its own."""
    runner = load("run")
    for name, text in scripts.items():
        (folder / name).write_text(text)
    parts = tuple(runner.Part("kernels", name, (name,), seconds) for name in scripts)
    monkeypatch.setattr(runner, "HERE", folder)
    monkeypatch.setattr(runner, "PARTS", parts)
    monkeypatch.setattr(sys, "argv", ["run.py", "--minutes", "1", "--out", str(folder / "out"), "--device", "cpu"])
    runner.main()


def test_a_part_that_fails_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scripts = {
        "bad.py": 'print(\'{"kernel": "a", "shape": "b", "us": 1.5}\', flush=True)\nraise SystemExit("no driver")',
        "good.py": 'print("noise")\nprint(\'{"what": "load", "seconds": 2}\')',
        "wrong.py": 'print(\'{"kernel": "c", "shape": "d", "ok": false, "error": 1}\')',
    }
    run_with(monkeypatch, tmp_path, scripts)
    shown = capsys.readouterr().out
    assert "bad.py: exit status 1" in shown
    assert "wrong.py: c d is wrong: error 1" in shown
    assert "no driver" in (tmp_path / "out" / "log.txt").read_text()
    assert "noise" in (tmp_path / "out" / "log.txt").read_text()
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line.get("part") for line in lines] == ["bad.py", "good.py", "wrong.py", None]
    assert len(lines[-1]["faults"]) == 2


def test_a_part_that_hangs_is_ended_and_its_results_are_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = 'import time\nprint(\'{"what": "load", "seconds": 7}\', flush=True)\ntime.sleep(60)'
    run_with(monkeypatch, tmp_path, {"hangs.py": text}, seconds=1.0)
    assert "hangs.py: ended after 1 s" in capsys.readouterr().out
    assert '"seconds": 7' in (tmp_path / "out" / "results.jsonl").read_text()


# ---- arithmetic ------------------------------------------------------------------------------------------------------


def test_small_gaps_between_kernels_count_as_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setitem(sys.modules, "measure", load("measure"))
    joined = load("idle").joined
    assert joined([(0.0, 10.0), (12.0, 20.0)]) == 20.0
    assert joined([(30.0, 40.0), (0.0, 10.0)]) == 20.0
    assert joined([(0.0, 10.0), (2.0, 5.0), (8.0, 12.0)]) == 12.0


def test_errors() -> None:
    measure = load("measure")
    wanted = torch.tensor([3.0, 4.0, -math.inf, math.nan])
    assert measure.ratio(wanted, wanted) == 0
    assert measure.ratio(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])) == pytest.approx(0.75)
    for missing in (math.nan, math.inf):
        assert measure.ratio(torch.tensor([missing, 4.0]), torch.tensor([3.0, 4.0])) == math.inf
    assert measure.ratio(torch.tensor([0.0, 4.0]), torch.tensor([-math.inf, 4.0])) == math.inf
    with measure.poisoned():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_models_have_their_sizes() -> None:
    models = load("models")
    large, small = models.SHAPES["llama-3.1-8b"], models.SHAPES["qwen3-0.6b"]
    assert large.multiplied == pytest.approx(7.50e9, rel=0.01)  # 8.03 without the embedding table
    assert large.kv_bytes() == 131072
    assert small.multiplied == pytest.approx(0.596e9, rel=0.01)
    words = models.vocabulary_words(large.vocabulary)
    assert len(set(words)) == large.vocabulary
    assert models.gguf_read_bytes(large) == pytest.approx(4.62e9, rel=0.01)
