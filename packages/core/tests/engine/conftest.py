"""The helpers of the tests of engines, kernels and models can be imported by name."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("kernels", "models", "engine"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))
