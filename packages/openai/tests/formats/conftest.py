# SPDX-License-Identifier: MIT
"""Samples that the tests of this folder share."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # for samples and messages; --import-mode=importlib does not
