# SPDX-License-Identifier: MIT
"""As `launches.py`, with a model whose index chooses positions: of contexts that are longer than any small prompt."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from packages.core.tests.kernels.triton.launches import begin, load, serve
from packages.core.tests.models.families import ROWS
from packages.core.tests.models.tiny import write_tiny


def main() -> None:
    """Prompts of 3 to 276 tokens, and a choice of 140."""
    watch, row = begin(), ROWS["GLM-5"]
    folder = write_tiny(Path(tempfile.mkdtemp()), row.model_type, **(dict(row.config) | {"index_topk": 140}))
    serve(load(folder, torch.device("cpu"), {}), watch, 0, graphs=False, grows=30)


if __name__ == "__main__":
    sys.exit(main())
