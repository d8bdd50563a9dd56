#!/usr/bin/env bash
# Two processes share the work of every step: DDP by default, `--distributed fsdp2` cuts the parameters over them. The
# global batches are those of one process.
# Run: examples/torchrun.sh        Flags go on to `prefpipe train`.
set -euo pipefail
MODEL=${MODEL:-embedded:smollm2-135m-instruct}
OUT=${OUT:-runs/examples}
PAIRS=${PAIRS:-data/pairs.jsonl}

torchrun --standalone --nproc_per_node 2 -m prefpipe train --model "$MODEL" --pairs "$PAIRS" --out "$OUT/torchrun" "$@"
