#!/usr/bin/env bash
# Stop a run and go on: SIGTERM writes a checkpoint (exit 143), and the same command resumes from it. Weights and
# metrics are those of a run that nothing stopped, to the bit on CPU in float32.
# Run: examples/resume.sh          (AFTER: seconds until it is stopped). Flags go on to `prefpipe train`.
set -euo pipefail
MODEL=${MODEL:-embedded:smollm2-135m-instruct}
OUT=${OUT:-runs/examples}
PAIRS=${PAIRS:-data/pairs.jsonl}
AFTER=${AFTER:-60}

train() { timeout --signal=TERM "$1" prefpipe train --model "$MODEL" --pairs "$PAIRS" --out "$OUT/resume" "${@:2}"; }
train "$AFTER" "$@" || echo "stopped: go on with the same command"
train 0 "$@"
