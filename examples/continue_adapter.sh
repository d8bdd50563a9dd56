#!/usr/bin/env bash
# Continue from an adapter, as rounds do: the second run starts from the policy of the first. Its reference is that
# policy, for the pairs bring no values of their own. --merge writes a model without adapter beside it.
# Run: examples/continue_adapter.sh    Flags go on to both `prefpipe train`.
set -euo pipefail
MODEL=${MODEL:-embedded:smollm2-135m-instruct}
OUT=${OUT:-runs/examples}
PAIRS=${PAIRS:-data/pairs.jsonl}

prefpipe train --model "$MODEL" --pairs "$PAIRS" --out "$OUT/first" "$@"
prefpipe train --model "$MODEL" --adapter "$OUT/first/adapter" --pairs "$PAIRS" --merge --out "$OUT/second" "$@"
