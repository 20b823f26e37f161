# SPDX-License-Identifier: MIT
"""Stands for the package `vllm` in vLLM's tests of its server: a test that uses a class of vLLM itself is skipped.

A hub's name of a model means one of the local models (`local_model`), for transformers' tokenizers as well.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from types import ModuleType
from typing import Any

import pytest

from candle_vllm.core.config import demo_model

_CALLING = ("function_call", "anthropic")  # in names of test files


def local_model(name: str) -> str:
    """The local model that stands for one of the hub: Qwen's where tools are called, else the small one."""
    if "MiniLM" in name or name.startswith(("intfloat", "BAAI")):
        return os.environ["SUITE_EMBEDDING_MODEL"]
    calls = any(word in os.environ.get("PYTEST_CURRENT_TEST", "") for word in _CALLING)
    return os.environ["SUITE_QWEN"] if calls and name.startswith("Qwen/") else "demo"


def get_tokenizer(name: str, **_: object) -> Any:
    """transformers' tokenizer of the local model."""
    path = local_model(name)
    if path == "demo":
        path = str(demo_model())
    folder, file = os.path.split(path)
    return _load(folder, gguf_file=file) if file.endswith(".gguf") else _load(path)


class _Absent(type):
    def __call__(cls, *_: object, **__: object) -> Any:
        pytest.skip(f"it tests vLLM's own {cls.__name__}")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{cls.__name__}.{name}", BaseException)

    def __or__(cls, other: object) -> Any:
        return Any


def _absent(name: str, base: type = BaseException) -> Any:
    return _Absent(name, (base,), {"__class_getitem__": classmethod(lambda cls, _: cls)})


class _Platform:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: False


class _Module(ModuleType):
    __path__ = ()  # of a package without files

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        return {"get_tokenizer": get_tokenizer, "current_platform": _Platform(), "__version__": "0.33.0"}.get(
            name, _absent(name)
        )


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, *_: object) -> Any:
        wanted = name.partition(".")[0] == "vllm" or name in {"tests.conftest", "tests.models.utils"}
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


sys.meta_path.insert(0, _Finder())

from transformers import AutoTokenizer as _Tokenizer  # noqa: E402  # of its own modules, not vLLM's

_load = _Tokenizer.from_pretrained
_Tokenizer.from_pretrained = staticmethod(  # pyright: ignore[reportAttributeAccessIssue]
    lambda name, *given, **named: (
        get_tokenizer(name) if "/" in name and name[0] != "/" else _load(name, *given, **named)
    )
)
