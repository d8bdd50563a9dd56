#!/usr/bin/env bash
# Every weight trained, and the result loaded with plain transformers: OUT/full_finetuning/model is a model like any
# other, also for `prefpipe generate --model`, vLLM and the next round.
# Run: examples/full_finetuning.sh     Flags go on to `prefpipe train`.
set -euo pipefail
MODEL=${MODEL:-embedded:smollm2-135m-instruct}
OUT=${OUT:-runs/examples}
PAIRS=${PAIRS:-data/pairs.jsonl}

prefpipe train --model "$MODEL" --pairs "$PAIRS" --tuning full --learning-rate 1e-6 --out "$OUT/full_finetuning" "$@"

python - "$OUT/full_finetuning/model" <<'PYTHON'
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "Name a colour."}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
print("answer:", tokenizer.decode(answer, skip_special_tokens=True))
PYTHON
