#!/usr/bin/env bash
# A TRL preference file (prompt, chosen, rejected) trained alone: the reference log-probs are made once, before step 0.
# Run: examples/trl_file.sh        (2 CPU cores; minutes with the default model). Flags go on to `prefpipe train`.
set -euo pipefail
MODEL=${MODEL:-embedded:smollm2-135m-instruct}
OUT=${OUT:-runs/examples}
PAIRS=${PAIRS:-data/pairs.jsonl}

prefpipe train --model "$MODEL" --pairs "$PAIRS" --eval-split 0.1 --out "$OUT/trl_file" "$@"
