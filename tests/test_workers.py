# SPDX-License-Identifier: MIT
"""Runs that are divided among workers: what they report, and what is run once more."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tests import restless, workers
from tests.waiting import wait_for

ROOT = Path(__file__).parents[1]
INI = """
[pytest]
addopts = -ra --import-mode=importlib -m 'not every_case'
markers =
    every_case: left out
    one_of_each: some cases
    restless: all of them
"""
CONFTEST = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
pytest_plugins = ["tests.common_run", "tests.slowest_tests", "tests.restless", "tests.workers"]
from tests import workers
from pathlib import Path
workers.FLAKY = Path(__file__).parent / "flaky.txt"
workers.FEW = 0
workers.APART = Path(__file__).parent / "web"
workers.ROOT = Path(__file__).parent
"""


def run(folder: Path, *options: str, **files: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with the plugin on test files of these texts."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text(INI)
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text("import os, pytest, time\nfrom pathlib import Path\n" + text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(folder)]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("CANDLE_VLLM_TEST_WORKER", None)
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_every_kind_of_report_arrives_and_failures_make_the_run_red(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        test_a="def test_right(): pass\ndef test_wrong(): assert 1 == 2\n",
        test_b="@pytest.mark.skip(reason='not here')\ndef test_skipped(): pass\n"
        "@pytest.mark.every_case\ndef test_left_out(): pass\n"
        "@pytest.fixture\ndef broken(): raise OSError('no disk')\ndef test_error(broken): pass\n"
        "@pytest.mark.xfail(strict=True)\ndef test_known(): assert False\n",
        test_c="import not_there\n",
    )
    assert done.returncode == 1
    assert "assert 1 == 2" in done.stdout
    assert "FAILED test_a.py::test_wrong" in done.stdout
    assert "ERROR test_b.py::test_error - OSError: no disk" in done.stdout
    assert "SKIPPED [1] test_b.py:3: not here" in done.stdout
    assert "No module named 'not_there'" in done.stdout
    for count in ("1 failed", "1 passed", "1 skipped", "1 deselected", "1 xfailed", "2 errors"):
        assert count in done.stdout.splitlines()[-1], done.stdout
    assert not (tmp_path / "flaky.txt").exists()


ONCE = """
def once(name):
    path = Path(__file__).with_name(name)
    was = path.exists()
    path.touch()
    return not was
"""


def test_lost_time_connections_and_processes_run_once_more_and_are_listed(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        test_a=ONCE + "def test_late():\n    print('so slow')\n    if once('a'): raise TimeoutError('waited in vain')\n"
        "def test_cut():\n    try:\n        if once('b'): raise ConnectionResetError('gone')\n"
        "    except ConnectionResetError as error:\n        raise ValueError('no answer') from error\n",
        test_b=ONCE + "def test_first(): pass\ndef test_dies():\n    if once('c'): os.kill(os.getpid(), 11)\n"
        "def test_behind(): pass\n",
        test_c="def test_other(): pass\n",
    )
    assert done.returncode == 0, done.stdout
    assert "so slow" in done.stdout.partition("= FLAKY =")[2]
    assert "6 passed" in done.stdout.splitlines()[-1], done.stdout
    told = (tmp_path / "flaky.txt").read_text().splitlines()
    assert len(told) == 3
    assert any("test_b.py::test_dies  the worker process was ended by signal 11" in line for line in told)
    assert any(
        re.search(r"test_a.py::test_late  TimeoutError: waited in vain  \S*test_a.py:\d+$", line) for line in told
    )
    assert any("test_a.py::test_cut  ConnectionResetError: gone" in line for line in told)


def test_what_fails_twice_is_red_and_wrong_values_have_no_second_run(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        test_a="def test_late(): raise TimeoutError('waited in vain')\n",
        test_b=ONCE + "def test_value(): assert not once('a')\n",
        kernels__test_c=ONCE + "def test_kernel():\n    if once('b'): raise TimeoutError('late')\n",
        security__test_d=ONCE + "def test_attack():\n    if once('c'): os._exit(0)\n",
        test_e="def test_dies_always(): os.kill(os.getpid(), 9)\n",
    )
    assert done.returncode == 1
    for test in (
        "test_a.py::test_late",
        "test_b.py::test_value",
        "kernels/test_c.py::test_kernel",
        "security/test_d.py::test_attack",
        "test_e.py::test_dies_always",
    ):
        assert f"FAILED {test}" in done.stdout, done.stdout
    assert "the worker process ended with status 0 while it ran this test" in done.stdout
    assert "the worker process was ended by signal 9 while it ran this test" in done.stdout
    assert "5 failed" in done.stdout.splitlines()[-1], done.stdout
    assert not (tmp_path / "flaky.txt").exists()


def test_fixtures_of_a_folder_that_the_run_names_are_there_for_its_later_files(tmp_path: Path) -> None:
    """pytest reads the conftest.py of such a folder before anything is collected."""
    files = {}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        text = f"import pytest\n@pytest.fixture\ndef own(): return {name!r}\n"
        (tmp_path / name / "conftest.py").write_text(text)
        files |= {f"{name}__test_{n}": f"def test_it(own): assert own == {name!r}\n" for n in "ab"}
    done = run(tmp_path, "--workers", "1", str(tmp_path / "first"), **files)
    assert done.returncode == 0, done.stdout
    done = run(tmp_path, "--workers", "1", str(tmp_path / "second"), str(tmp_path / "first"), **files)
    assert done.returncode == 0, done.stdout


def test_a_worker_that_runs_the_page_s_tests_runs_nothing_else(tmp_path: Path) -> None:
    text = "def test_pid():\n    Path(__file__).with_suffix('.pid').write_text(str(os.getpid()))\n"
    files = {"web__test_a": text, "test_b": text, "web__test_c": text, "test_d": text}
    done = run(tmp_path, "--workers", "1", **files)
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout.splitlines()[-1]
    page, others = ({path.read_text() for path in folder.glob("*.pid")} for folder in (tmp_path / "web", tmp_path))
    assert page.isdisjoint(others)
    assert len(page) == len(others) == 1


def test_fixtures_of_a_session_and_of_a_folder_serve_all_files(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "conftest.py").write_text(
        "import os, pytest\nfrom pathlib import Path\n"
        "@pytest.fixture(scope='session')\ndef shared():\n"
        "    with Path(__file__).with_name('made').open('a') as file: print('made', file=file)\n"
        "    yield 1\n"
        "    with Path(__file__).with_name('made').open('a') as file: print('ended', file=file)\n"
    )
    files = {f"folder__test_{name}": "def test_uses(shared): assert shared == 1\n" for name in "abcdef"}
    done = run(tmp_path, "--workers", "1", **files)
    assert done.returncode == 0, done.stdout
    assert "6 passed" in done.stdout.splitlines()[-1]
    assert (folder / "made").read_text().splitlines() == ["made", "ended"]


def test_a_file_without_a_time_begins_before_the_short_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("test_long", "test_new", "test_short"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.setattr(workers, "ROOT", tmp_path)
    monkeypatch.setattr(workers, "TIMES", times := tmp_path / "times.json")
    times.write_text(json.dumps({"test_short.py": 2, "test_long.py": 90}))
    config: Any = SimpleNamespace(args=[str(tmp_path)], invocation_params=SimpleNamespace(dir=tmp_path))
    names = [Path(unit).stem for unit in workers.find_units(config)]
    assert names == ["test_long", "test_new", "test_short"]
    (tmp_path / "web").mkdir()
    for name in ("test_page", "test_chat"):
        (tmp_path / "web" / f"{name}.py").write_text("")
    monkeypatch.setattr(workers, "APART", tmp_path / "web")
    times.write_text(json.dumps({"test_short.py": 2, "test_long.py": 90, "web/test_page.py": 8, "web/test_chat.py": 9}))
    names = [Path(unit).stem for unit in workers.find_units(config)]
    assert names == ["test_chat", "test_long", "test_new", "test_page", "test_short"]


def test_a_restless_run_has_the_common_tests_and_the_switch_interval(tmp_path: Path) -> None:
    text = "import subprocess, sys\ndef test_interval():\n    assert sys.getswitchinterval() == 0.125\n"
    text += "    code = 'import sys; print(sys.getswitchinterval())'\n"
    text += "    assert float(subprocess.check_output([sys.executable, '-c', code])) == 0.125\n"
    text += "@pytest.mark.every_case\ndef test_left_out(): assert False\n"
    done = run(tmp_path, "-m", "restless", "--switch-interval", "0.125", test_a=text, test_b="def test_other(): pass\n")
    assert done.returncode == 0, done.stdout
    assert "2 passed, 1 deselected" in done.stdout.splitlines()[-1]


def test_the_common_run_has_some_cases_of_each_list(tmp_path: Path) -> None:
    text = "A = pytest.mark.parametrize('a', range(6))\nB = pytest.mark.parametrize('b', 'xyz')\n"
    text += "@pytest.fixture(params='pqrs')\ndef f(request): return request.param\n"
    text += "@pytest.mark.one_of_each\n@A\n@B\ndef test_each(a, b): pass\n"
    text += "@pytest.mark.one_of_each(2)\n@A\n@B\ndef test_two(a, b): pass\n"
    text += "@pytest.mark.one_of_each(9)\n@B\ndef test_few(b): pass\n"
    text += "@pytest.mark.one_of_each(1)\ndef test_fixture(f): pass\n"
    done = run(tmp_path, "--workers", "0", "-v", test_a=text)
    ran = [line.split()[0].partition("::")[2] for line in done.stdout.splitlines() if " PASSED" in line]
    for name, cases in {"each": 6, "two": 2, "few": 3, "fixture": 1}.items():
        assert sum(each.startswith(f"test_{name}[") for each in ran) == cases, ran
    values = [each.partition("[")[2].rstrip("]").split("-") for each in ran if each.startswith("test_each")]
    assert {letter for pair in values for letter in pair} == {*"012345xyz"}


def test_a_worker_that_a_thread_keeps_is_ended_and_named(tmp_path: Path) -> None:
    text = "import threading\nfrom tests import workers\nworkers.end_at_last.__defaults__ = (0.5,)\n"
    text += "def left_alone(): time.sleep(60)\ndef test_leaves(): threading.Thread(target=left_alone).start()\n"
    done = run(tmp_path, "--workers", "1", test_a=text)
    assert done.returncode == 1, done.stdout
    assert "behind the last test" in done.stdout
    assert "ended with status 70" in done.stdout
    assert "in left_alone" in done.stdout


def test_a_stopped_process_is_woken_before_anybody_waits_for_it() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        pauses, found = restless.Pauses(seed=0), psutil.Process(process.pid)
        pauses.next([process.pid])
        wait_for(lambda: found.status() == psutil.STATUS_STOPPED)
        pauses.wake(process.pid)
        wait_for(lambda: found.status() != psutil.STATUS_STOPPED)
        process.communicate(b"\n")


@pytest.mark.parametrize("options", [("--workers", "0"), ("-s",)])
def test_a_run_can_stay_in_one_process(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run(tmp_path, *options, test_a="def test_parent():\n    assert os.getppid() == " + str(os.getpid()) + "\n")
    assert done.returncode == 0, done.stdout


_IMPORT = re.compile(r"^\s*(?:from|import) (\w+)|sys\.path.*Path\(__file__\)\.parents?\b(?:\[(\d)\])?", re.MULTILINE)


def test_helpers_are_imported_by_full_names_alone() -> None:
    """No folder of tests is on the import path, so that no two modules of the tree can shadow each other."""
    paths = [path for folder in [*ROOT.glob("packages/*/tests"), ROOT / "tests"] for path in folder.rglob("*.py")]
    modules = {path.stem for path in paths}
    modules |= {name for name in {path.parent.name for path in paths} if find_spec(name) is None}
    modules -= {"kernels", "triton"}  # of benchmarks; a package, after which files of kernels' forms are named
    assert {"server_fakes", "waiting", "adapter_fakes", "chaos"} < modules
    offenders = [
        f"{path.relative_to(ROOT)}: {found[0]}"
        for path in [*paths, ROOT / "conftest.py"]
        for found in _IMPORT.finditer(path.read_text())
        if (found[1] in modules if found[1] else path.parents[int(found[2] or 0)] != ROOT)
    ]
    assert offenders == []
