#!/usr/bin/env bash
# Pairs from our own run: sample, rate with a rule, pair the best with the worst, train on the cached reference.
# Run: examples/own_pairs.sh       (ENGINE=vllm by default). Flags go on to `prefpipe train`.
set -euo pipefail
MODEL=${MODEL:-embedded:smollm2-135m-instruct}
OUT=${OUT:-runs/examples}
ENGINE=${ENGINE:-vllm}
LIMIT=${LIMIT:-80}

prefpipe generate --model "$MODEL" --prompts data/prompts.jsonl --limit "$LIMIT" --engine "$ENGINE" \
  --rewards short_sentence --max-tokens 64 --out "$OUT/completions"
prefpipe build-pairs --completions "$OUT/completions" --out "$OUT/pairs"
prefpipe train --model "$MODEL" --pairs "$OUT/pairs" --out "$OUT/own_pairs" "$@"
