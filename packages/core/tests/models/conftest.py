# SPDX-License-Identifier: MIT
"""The helpers of this folder, and the writers of formats, can be imported by name."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("quantization", "models"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))
