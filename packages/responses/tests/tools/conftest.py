# SPDX-License-Identifier: MIT
"""Puts the helpers of these tests where they can be imported; --import-mode=importlib does not."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
