#!/usr/bin/env bash
# examples/grow_blocks.sh - from blocks of 4 tokens to blocks of 8, in four steps.
#
#     bash examples/grow_blocks.sh
#     MODEL=runs/tracerl/checkpoints/step-45 K=16 NAME=grow16 bash examples/grow_blocks.sh
#     SEED=1 NAME=grow1 bash examples/grow_blocks.sh      # another seed, beside the first run
#
# A model of K = 4 has never seen more than four masks at once. With eight it is so bad that it earns no
# rewards from which it could learn. So it first answers in its own blocks, and the right answers are kept.
# Fine-tuning on these answers teaches it larger blocks. After that, reinforcement learning works as usual.
set -euo pipefail
MODEL=${MODEL:-assets/tiny-block}
DATA=${DATA:-arithmetic}
DEV=${DEV:-arithmetic-dev}
TEST=${TEST:-arithmetic-test}
K=${K:-8}
PROBLEMS=${PROBLEMS:-2000}
UPDATES=${UPDATES:-600}
STEPS=${STEPS:-45}
SEED=${SEED:-0}
NAME=${NAME:-grow}
export NAME  # the runs are $NAME-answers, $NAME-start and $NAME

# 1. The model answers in its own blocks, twice to each problem.
python eval_math.py --model "$MODEL" --data "$DATA" --limit "$PROBLEMS" --samples 2 --strategy dynamic \
    --seed "$SEED" --name "$NAME-answers"

# 2. The right answers become data for sft.py.
python - <<'PY'
import json
import os

folder = f"runs/{os.environ['NAME']}-answers"
with open(f"{folder}/responses.jsonl") as answers, open(f"{folder}/right.jsonl", "w") as right:
    for line in map(json.loads, answers):
        if line["correct"]:
            row = dict(problem=line["text"], answer=line["gold"], solution=line["response"])
            right.write(json.dumps(row) + "\n")
PY

# 3. Fine-tuning at the new size, on random masks.
python sft.py --model "$MODEL" --data "runs/$NAME-answers/right.jsonl" --block_size "$K" --steps "$UPDATES" \
    --dev_data "$DEV" --seed "$SEED" --name "$NAME-start"

# 4. TraceRL at the new size.
torchrun tracerl.py --model "runs/$NAME-start/checkpoint" --train_data "$DATA" --dev_data "$DEV" \
    --eval_data "$TEST" --block_size "$K" --steps "$STEPS" --seed "$SEED" \
    --name "$NAME"
