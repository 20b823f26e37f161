# SPDX-License-Identifier: MIT
"""The helpers of this folder, and those of the models' tests, can be imported by name."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("models", "quantization"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))
