# `just` lists the recipes.
default:
    @just --list

# install everything, the demo model included
sync:
    uv sync

# what CI runs
ci:
    bash .ci/run

# lint, format, types and import contracts
check:
    uv run ruff check --fix .
    uv run ruff format .
    uv run pyright
    uv run lint-imports

# tests; arguments go to pytest
test *ARGS:
    uv run pytest {{ARGS}}

# serve the demo model
serve *ARGS:
    uv run candle-vllm {{ARGS}}

# measure the demo model on this machine
bench *ARGS:
    uv run candle-vllm bench {{ARGS}}
