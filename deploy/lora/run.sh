#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Serve a model with adapters by name, without a container. Settings come from the environment, then from .env beside
# this script, then from the defaults below; the arguments are flags of candle-vllm.
set -euo pipefail
cd "$(dirname "$0")"

if [ -f .env ]; then
  while IFS='=' read -r name value || [ -n "$name" ]; do
    case $name in '' | '#'*) continue ;; esac
    # An empty value in the file is ignored, and the environment takes precedence.
    if [ -n "$value" ] && [ -z "${!name:-}" ]; then export "$name=$value"; fi
  done <.env
fi

export MODEL_ID=${MODEL_ID:-demo} MAX_LORAS=${MAX_LORAS:-10} MAX_LORA_RANK=${MAX_LORA_RANK:-16}
export MAX_CPU_LORAS=${MAX_CPU_LORAS:-50} PORT=${PORT:-8000} HOST=${HOST:-127.0.0.1} CACHE_DIR=${CACHE_DIR:-./models}
for name in API_KEY HF_TOKEN; do
  if [ -z "${!name:-}" ]; then unset "$name"; fi
done
mkdir -p "$CACHE_DIR"
command -v candle-vllm >/dev/null || {
  echo "run.sh: candle-vllm is not on the PATH: install the wheels of a release, or use uv run in the clone" >&2
  exit 1
}
exec candle-vllm "$@"
