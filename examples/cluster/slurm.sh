#!/usr/bin/env bash
# Slurm without Ray: an array of PARTS jobs with one GPU each, then a job that joins them. A part that was stopped goes
# on when its job is requeued; the same script submitted again does only what is missing.
# Run: RECIPE=mine.toml PARTS=16 examples/cluster/slurm.sh --partition gpu --time 8:00:00    Flags go on to sbatch.
set -euo pipefail
RECIPE=${RECIPE:-stages/generate/short-sentence.toml}
COMMAND=${COMMAND:-generate} # or score
PARTS=${PARTS:-8}
OUT=${OUT:-runs/slurm}

part="prefpipe $COMMAND $RECIPE --part \$SLURM_ARRAY_TASK_ID/$PARTS --out $OUT/part-\$SLURM_ARRAY_TASK_ID"
array=$(sbatch --parsable --array "1-$PARTS" --gpus 1 --cpus-per-task 8 --requeue "$@" --wrap "$part")

parts=$(seq --format "$OUT/part-%.0f" --separator " " "$PARTS")
# The parity check of the whole run loads the model once more: hence a GPU.
sbatch --dependency "afterok:$array" --gpus 1 --cpus-per-task 8 "$@" --wrap "prefpipe gather $parts --out $OUT/whole"
