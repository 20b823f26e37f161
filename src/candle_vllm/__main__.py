# SPDX-License-Identifier: MIT
"""`python -m candle_vllm`: the `candle-vllm` command."""

import sys

from candle_vllm.server.cli import main

if __name__ == "__main__":
    sys.exit(main())
