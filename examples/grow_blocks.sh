#!/usr/bin/env bash
# examples/grow_blocks.sh - from blocks of 4 tokens to blocks of 8, in three steps.
#
#     bash examples/grow_blocks.sh
#     MODEL=runs/tracerl/checkpoints/step-45 K=16 bash examples/grow_blocks.sh
#
# A model of K = 4 has never seen more than four masks at once. It is bad at eight, and earns nothing there to
# learn from. So it first answers in its own blocks, and what was right is kept. Fine-tuning on these answers
# teaches it larger blocks. From there on reinforcement learning goes on as usual.
set -euo pipefail
MODEL=${MODEL:-assets/tiny-block}
DATA=${DATA:-arithmetic}
DEV=${DEV:-arithmetic-dev}
TEST=${TEST:-arithmetic-test}
K=${K:-8}
PROBLEMS=${PROBLEMS:-2000}
UPDATES=${UPDATES:-600}
STEPS=${STEPS:-45}

# 1. Answers in the model's own blocks, two to each problem.
python eval_math.py --model "$MODEL" --data "$DATA" --limit "$PROBLEMS" --n 2 --strategy dynamic --name grow-answers

# 2. The right ones, with the step at which each token was revealed, as data for sft.py.
python - <<'PY'
import json

with open("runs/grow-answers/responses.jsonl") as answers, open("runs/grow-answers/right.jsonl", "w") as right:
    for line in map(json.loads, answers):
        if line["correct"]:
            steps = line["step_map"][:line["length"] - 1]  # without eos, which sft.py adds
            row = dict(problem=line["text"], answer=line["gold"], solution=line["response"], step_map=steps)
            right.write(json.dumps(row) + "\n")
PY

# 3. Fine-tuning at the new size, on random masks. (--views trace would show states of the small blocks only.)
python sft.py --model "$MODEL" --data runs/grow-answers/right.jsonl --block_size "$K" --steps "$UPDATES" \
    --dev_data "$DEV" --name grow-start

# 4. TraceRL at the new size.
torchrun tracerl.py --model runs/grow-start/checkpoint --train_data "$DATA" --dev_data "$DEV" --eval_data "$TEST" \
    --block_size "$K" --steps "$STEPS" --name grow
