# SPDX-License-Identifier: MIT
"""`deploy/release.py` as a module, for tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("release", Path(__file__).parents[1] / "deploy" / "release.py")
assert _spec is not None
assert _spec.loader is not None
release = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(release)
