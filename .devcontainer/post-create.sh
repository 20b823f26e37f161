#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# After a dev container is made: the environment, and what is asked before a commit.
set -euo pipefail
cd "$(dirname "$0")/.."
sudo chown "$(id -u):$(id -g)" "$XDG_CACHE_HOME"
uv sync --group dev
uv run --group dev pre-commit install --hook-type pre-commit --hook-type pre-push
if [ "${1:-}" = cuda ]; then
  uv run --group dev python -c "import torch; print('GPU:', torch.cuda.get_device_name())"
fi
echo "just lists what there is to run"
