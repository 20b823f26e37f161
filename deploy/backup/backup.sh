#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Copy the server's stored data (responses, conversations, files, answers in the mailbox) to a folder, while it runs:
#   backup.sh FOLDER [STORE ...]
# A store is an SQLite file or postgresql://...; by default all files in ~/.candle-vllm. The seven newest copies are kept.
set -euo pipefail

[ $# -ge 1 ] || {
  echo "usage: backup.sh FOLDER [STORE ...]" >&2
  exit 2
}
folder=$1
shift
mkdir -p "$folder"
umask 077
if [ $# = 0 ]; then
  for file in "$HOME"/.candle-vllm/*.sqlite; do
    if [ -f "$file" ]; then set -- "$@" "$file"; fi
  done
fi
[ $# -ge 1 ] || {
  echo "backup.sh: there is no store in $HOME/.candle-vllm" >&2
  exit 1
}

now=$(date -u +%Y%m%dT%H%M%SZ)
for store in "$@"; do
  case $store in
  postgres*://*)
    name=$(sed -E 's#.*/([^/?]+).*#\1#' <<<"$store")
    pg_dump --format custom --file "$folder/.$name-$now" "${store/+psycopg:/:}" # pg_dump does not know SQLAlchemy's driver name
    target=$folder/$name-$now.dump
    ;;
  *)
    store=${store#sqlite:///}
    name=$(basename "$store")
    # SQLite's backup API copies a database that is being written; then check the copy.
    python3 - "$store" "$folder/.$name-$now" <<'PYTHON'
import sqlite3, sys
source, target = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True), sqlite3.connect(sys.argv[2])
source.backup(target)
found = target.execute("pragma integrity_check").fetchone()[0]
target.close()
sys.exit(0 if found == "ok" else f"backup.sh: the copy is damaged: {found}")
PYTHON
    target=$folder/$name-$now
    ;;
  esac
  mv "$folder/.$name-$now" "$target"
  echo "$target"
  find "$folder" -maxdepth 1 -name "$name-[0-9]*T[0-9]*Z*" | sort -r | tail -n +8 | while read -r old; do rm -f "$old"; done
done
