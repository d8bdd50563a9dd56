#!/usr/bin/env bash
# Two loss terms: DPO, and the NLL of the chosen completion at half its weight (TRL's loss_type and loss_weights).
# Run: examples/two_losses.sh      Flags go on to `prefpipe train`.
set -euo pipefail
MODEL=${MODEL:-embedded:smollm2-135m-instruct}
OUT=${OUT:-runs/examples}
PAIRS=${PAIRS:-data/pairs.jsonl}

prefpipe train --model "$MODEL" --pairs "$PAIRS" --loss-type sigmoid --loss-type nll \
  --loss-weights 1.0 --loss-weights 0.5 --out "$OUT/two_losses" "$@"
