# SPDX-License-Identifier: MIT
"""What the tests of every package share. Helpers are imported by their full names, which begin at this folder."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from pathlib import Path

import pytest
from _pytest.unraisableexception import gc_collect_iterations_key

sys.path.insert(0, str(Path(__file__).parent))
pytest_plugins = ["tests.common_run", "tests.slowest_tests", "tests.restless", "tests.workers"]
with contextlib.suppress(ImportError):  # tests on a GPU machine run without it
    from hypothesis import HealthCheck, settings

    # How long an example takes is the machine's affair.
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")
# A job of a script ignores Ctrl+C, and so would the servers that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Read when torch is imported, here and in what tests start. Toys are too small for two threads, and threads that spin
# while they wait for each other took up to ten times the work's time from what runs beside them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Tests give what they start a home of its own; kernels would be compiled there anew, ten seconds each time.
os.environ.setdefault("XDG_CACHE_HOME", str(Path.home() / ".cache"))
gc.disable()  # what collecting tests leaves behind stays: a quarter of its time would be spent on looking for garbage


# What a test starts with uv finds this environment as it is.
os.environ.setdefault("UV_NO_SYNC", "1")
FROZEN = pytest.StashKey[int]()


def pytest_collection_finish() -> None:
    """Garbage of tests is looked for, but never among what was there before them."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)  # the usual 700 take a tenth of the time of tests
    gc.enable()


def pytest_unconfigure(config: pytest.Config) -> None:
    """What was frozen is garbage at the end: else nanobind reports every type of Triton as leaked.

    The interpreter collects garbage when it ends. Pytest would do so twice before, which takes seconds.
    """
    gc.unfreeze()
    config.stash[gc_collect_iterations_key] = 0


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_is_no_garbage(request: pytest.FixtureRequest) -> None:
    """Nor among what tests of files before this one imported: each engine that is closed looks for garbage."""
    freeze_imports(request.config)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Nor among what the test has imported by itself, such as the model classes of transformers."""
    freeze_imports(item.config)


def freeze_imports(config: pytest.Config) -> None:
    """Freeze what is there, garbage aside, if some twenty modules were imported since the last time."""
    if len(sys.modules) > config.stash.get(FROZEN, 0) + 20:
        gc.collect()
        gc.freeze()
        config.stash[FROZEN] = len(sys.modules)


@pytest.fixture(scope="session")
def llama_cpp_models() -> Path:
    """llama.cpp's `models` folder: ggml-vocab-*.gguf with .inp and .out, and templates/*.jinja."""
    from tests.registry_packages import CACHE, pypi_file, unpacked

    name = "llama_cpp_python-0.3.36"
    sha256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
    archive = pypi_file("llama-cpp-python==0.3.36", f"{name}.tar.gz", sha256, sdist=True)
    wanted = ("ggml-vocab-", "templates/")
    return unpacked(
        archive, f"{name}/vendor/llama.cpp/models/", lambda path: path.startswith(wanted), CACHE / name / "models"
    )


@pytest.fixture(autouse=True)
def _random_numbers_do_not_depend_on_earlier_tests() -> None:
    """A worker runs the files that it gets: what failed once with their numbers would not fail again."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)
