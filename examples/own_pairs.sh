#!/usr/bin/env bash
# Pairs from our own run: sample, rate with a rule, pair the best with the worst, train on the cached reference.
# Run: examples/own_pairs.sh       (ENGINE=vllm by default). Flags go on to `prefpipe train`.
set -euo pipefail
MODEL=${MODEL:-embedded:smollm2-135m-instruct}
OUT=${OUT:-runs/examples}
ENGINE=${ENGINE:-vllm}
LIMIT=${LIMIT:-80}
CHECK=${CHECK:-32} # rows that the other engine scores again, for parity.json; 0 for none
TRUNCATED_CHOSEN=${TRUNCATED_CHOSEN:-drop} # or keep: pairs whose chosen answer was cut at --max-tokens

prefpipe generate --model "$MODEL" --prompts data/prompts.jsonl --limit "$LIMIT" --engine "$ENGINE" \
  --rewards short_sentence --max-tokens 64 --check "$CHECK" --out "$OUT/completions"
prefpipe build-pairs --completions "$OUT/completions" --reward short_sentence --truncated-chosen "$TRUNCATED_CHOSEN" --out "$OUT/pairs"
prefpipe train --model "$MODEL" --pairs "$OUT/pairs" --out "$OUT/own_pairs" "$@"
