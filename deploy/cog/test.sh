#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Start the predictor's server without a container, send predictions, and stop it. COG_WEIGHTS names the weights (by
# default the demo model); the environment of `python` must have candle-vllm and cog.
set -euo pipefail
cd "$(dirname "$0")"
port=${PORT:-5000}
url=http://127.0.0.1:$port
log=$(mktemp)
export no_proxy=127.0.0.1 PORT=$port COG_WEIGHTS=${COG_WEIGHTS:-demo} COG_MAX_CONCURRENCY=${COG_MAX_CONCURRENCY:-32}
export COG_PREDICT_TYPE_STUB=predict.py:Predictor

python -m cog.server.http --host 127.0.0.1 >"$log" 2>&1 &
server=$!
stop() {
  kill "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
}
trap stop EXIT

fail() {
  echo "$1" >&2
  tail -n 40 "$log" >&2
  exit 1
}

predict() { # INPUT [FLAGS OF CURL...]
  local input=$1
  shift
  curl -sS -X POST "$url/predictions" -H 'content-type: application/json' "$@" -d "{\"input\": $input}"
}

state=none
for ((second = 0; second < ${COG_TEST_SECONDS:-300}; second++)); do
  kill -0 "$server" 2>/dev/null || fail "the server ended"
  state=$(curl -s "$url/health-check" | sed -E 's/.*"status":"([A-Z_]+)".*/\1/; q' || true)
  case $state in READY) break ;; SETUP_FAILED | DEFUNCT | UNHEALTHY) fail "the model cannot be served: $state" ;; esac
  sleep 1
done
[ "$state" = READY ] || fail "not ready in time: $state"
echo "ready after $second s"

answer=$(predict '{"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}')
[[ $answer == *'"status":"succeeded"'* ]] || fail "no answer: $answer"
echo "answer: $answer"

events=$(predict '{"prompt": "Hi", "max_tokens": 4, "seed": 1}' -N -H 'accept: text/event-stream')
[[ $events == *'event: output'*'event: completed'* ]] || fail "no stream: $events"
echo "streamed: $(grep -c '^event: output' <<<"$events") pieces"

refused=$(predict '{"prompt": "Hi", "prompt_template": "no place for it"}')
[[ $refused == *E1003* ]] || fail "a template without a prompt was taken: $refused"
echo "refused: E1003"

kill "$server"
wait "$server" || fail "status $? after SIGTERM"
trap - EXIT
echo "stopped"
