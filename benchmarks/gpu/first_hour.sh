#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# A run of the first hour on a GPU (A, B, C or D; see README.md); "wheels" collects what has to travel there, and "keep"
# puts what came back where the next run looks for it, with one compiler's cache among all, the last.
#
#   bash benchmarks/gpu/first_hour.sh wheels [FOLDER]
#   bash benchmarks/gpu/first_hour.sh A [--out FOLDER] [--commit HASH] [--quick --device cpu]
#   bash benchmarks/gpu/first_hour.sh keep A FOLDER
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)

# The Python that has torch: the one that is named, the checkout's own, or the machine's.
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then
  python=$root/.venv/bin/python
fi

if [ "${1:-}" = keep ]; then
  run=${2:?which run} from=${3:?the folder that came back}
  mkdir -p "$root/.first_hour/$run"
  if compgen -G "$from/triton-cache.tar.gz.*" >/dev/null; then
    rm -f "$root"/.first_hour/*/triton-cache.tar.gz.*
  fi
  cp "$from"/* "$root/.first_hour/$run/"
  exit
fi

if [ "${1:-}" != wheels ]; then
  exec "$python" "$here/first_hour.py" "$@"
fi

# For Python 3.12 on x86-64, whatever this machine has. pip matches the platforms' names exactly, so all are named.
folder=${2:-$root/.wheels}
platforms=(--platform manylinux1_x86_64 --platform manylinux2010_x86_64 --platform manylinux2014_x86_64)
for minor in 17 24 26 27 28 31 34 35 39; do
  platforms+=(--platform "manylinux_2_${minor}_x86_64")
done
mkdir -p "$folder"
rm -f "$folder"/*.whl
"${PIP_PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
  "${platforms[@]}" --dest "$folder" --requirement "$here/wheels.txt"
du -sh "$folder"
