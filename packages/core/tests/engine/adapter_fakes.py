# SPDX-License-Identifier: MIT
"""Adapters without files, and loads that a test holds up."""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import Counter
from pathlib import Path

from candle_vllm.core.engine.adapters.adapter_store import LoadedAdapter
from candle_vllm.core.errors import AdapterError
from candle_vllm.core.kernels.lora import PackedAdapter
from tests.waiting import PATIENCE

_serials = itertools.count()


def packed(name: str, nbytes: int = 100) -> PackedAdapter:
    digest = hashlib.sha256(name.encode()).digest()
    return PackedAdapter(
        digest=digest, alora=None, rank=8, norm=1.0, modules=2, nbytes=nbytes, serial=next(_serials), apart=False,
        layout=None,
    )  # fmt: skip


class Loads:
    """What a store loads with: adapters by the last part of their path. Those named "bad..." cannot be loaded.

    Attributes:
        gate: a load goes on when it is set.
        begun: paths whose load has begun, in order.
        version: what the digest of the next one is made of, beside the name.
    """

    def __init__(self, *, sizes: dict[str, int] | None = None) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.begun: list[str] = []
        self.counts: Counter[str] = Counter()
        self.sizes = sizes or {}
        self.version = ""
        self.beginning = threading.Condition()

    def __call__(self, path: Path) -> LoadedAdapter:
        with self.beginning:
            self.begun.append(path.name)
            self.counts[path.name] += 1
            self.beginning.notify_all()
        assert self.gate.wait(PATIENCE)
        if path.name.startswith("bad"):
            raise AdapterError(f"{path.name}: lora_B is missing")
        return LoadedAdapter(packed(path.name + self.version, self.sizes.get(path.name, 100)), "base", ("a note",))

    def until_begun(self, name: str) -> None:
        with self.beginning:
            assert self.beginning.wait_for(lambda: name in self.begun, PATIENCE)
