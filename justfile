# `just` lists the recipes.
default:
    @just --list

# install everything: what running needs, the demo model, and what tests and checks need
sync:
    uv sync --group dev

# give all five distributions, and what they require of each other, a new version
version NEW:
    sed -i -E 's/^version = ".*"/version = "{{NEW}}"/; s/(candle-vllm-[a-z]+(\[[a-z,-]+\])?==)[0-9][^"]*/\1{{NEW}}/g' \
        pyproject.toml packages/*/pyproject.toml

# wheels and sdists of a release in dist/, checked, and tried in empty environments of every Python at hand
release *ARGS:
    python3 deploy/release.py {{ARGS}}

# the documentation as a site, in .site/html; a warning or a dead link ends it
site:
    NO_MKDOCS_2_WARNING=1 uv run --only-group site mkdocs build --strict

# what CI runs
ci:
    bash .ci/run

# lint, format, types and import contracts
check:
    uv run --group dev ruff check --fix .
    uv run --group dev ruff format .
    uv run --group dev pyrefly check
    uv run --group dev lint-imports

# names that modules of Python lack on Windows and on macOS; pyrefly does not see that a function has returned there
types-elsewhere:
    for system in win32 darwin; do \
        uvx ty@0.0.108 check --python .venv --python-platform $system --ignore all --error missing-attribute \
            --output-format concise packages/*/src src | grep 'Module .* has no member'; \
    done; true

# the server's tests with the lowest versions of dependencies that the packages allow, without torch
lowest-bounds *ARGS:
    bash tests/lowest_bounds.sh {{ARGS}}

# tests; arguments go to pytest
test *ARGS:
    uv run --group dev pytest {{ARGS}}

# serve the demo model
serve *ARGS:
    uv run candle-vllm {{ARGS}}

# measure the demo model on this machine
bench *ARGS:
    uv run candle-vllm bench {{ARGS}}
