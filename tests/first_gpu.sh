#!/usr/bin/env bash
# What to run first on a machine with a GPU: bash tests/first_gpu.sh, from the root of the repository.
#
# It takes nine minutes at most. The order is that in which a fault costs least, and every item has a time limit of its
# own. An item that fails does not stop the next; one for which no time is left is not run. The table at the end has a line for each: passed or not, seconds, and a
# figure. All output is in the folder $OUT. Needed: torch, transformers and what comes with it, matplotlib, pytest, and
# for the compiled kernels a C compiler and Python's headers.
set -u
export PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}
OUT=$(mkdir -p "${OUT:-gpu-out}" && cd "${OUT:-gpu-out}" && pwd)
ROOT=$PWD
TOTAL=540  # seconds
TABLE=""
STATUS=0

# item NAME SECONDS FIGURE COMMAND...: FIGURE is a pattern (grep -oE), of whose last match the table tells.
item() {
    local name=$1 limit=$2 pattern=$3 log="$OUT/${1// /_}.txt" started=$SECONDS is_passed=yes
    shift 3
    if [ $((TOTAL - SECONDS)) -lt "$limit" ]; then limit=$((TOTAL - SECONDS)); fi
    if [ "$limit" -lt 10 ]; then
        TABLE+=$(printf '%-28s  %-9s' "$name" "not run")$'\n'
        STATUS=1
        return
    fi
    echo "=== $name (at most $limit s)"
    timeout -k 5 "$limit" "$@" >"$log" 2>&1
    local code=$?
    if [ $code -ne 0 ]; then is_passed="no ($code)"; STATUS=1; fi
    if [ $code -eq 124 ]; then is_passed="too slow"; fi
    grep -v Warning "$log" | tail -15
    TABLE+=$(printf '%-28s  %-9s %5d s   %s' "$name" "$is_passed" $((SECONDS - started)) \
        "$(grep -oE "$pattern" "$log" | tail -1 | cut -c1-110)")$'\n'
}

laws() { "$PYTHON" -m pytest -q -x -p no:cacheprovider "$ROOT/tests/test_gpu.py" -k "$1"; }
machine() {
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    "$PYTHON" - <<'PY'
import os, sys, sysconfig
import torch
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, python {sys.version.split()[0]}, "
      f"{'' if os.path.exists(header) else 'NO '}Python.h")
assert torch.cuda.is_available(), "torch sees no GPU"
PY
}
# The tiny model in bfloat16 under FSDP2: a group of one process, NCCL, and what a run prints of gap and memory.
train() {
    (cd "$OUT" && "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=1 "$ROOT/tracerl.py" --device cuda \
        --dtype bfloat16 --prompts 8 --group_size 8 --eval_limit 50 --eval_every 0 --eval_strategies dynamic --debug "$@")
}
export -f laws machine train
rm -rf "$OUT/runs/first" "$OUT/runs/value"  # of an earlier call
export PYTHON OUT ROOT

count='[0-9]+ (passed|failed).*'
rate='engine +[0-9]+ +[0-9.]+ tokens/s.*'
item "machine"               30 'torch .*'          bash -c machine
item "small kernels"         60 "$count"            bash -c 'laws "fused or flex_attention_sees"'
item "graphs and memory"     90 "$count"            bash -c 'laws "recorded_steps or memory_back"'
item "gradient"              60 "$count"            bash -c 'laws "gradient_of_the_cpu"'
item "replay law"           100 "$count"            bash -c 'laws "replay_law"'
item "run in bfloat16"      130 'self-check.*'      bash -c 'train --steps 2 --name first'
item "resumed"               60 'gap [^ ]+  gap_max [^ ]+' bash -c 'train --steps 3 --name first --resume'
item "value model and LoRA"  60 'gap [^ ]+  gap_max [^ ]+' bash -c \
    'train --steps 2 --name value --advantage value --value_warmup 1 --lora_rank 4'
item "0.6B decoding"        110 "$rate"             "$PYTHON" tests/bench_rollout.py --preset 0.6B --quick \
    --max_new_tokens 32
item "0.6B update"           70 '[{].*[}]'          "$PYTHON" tests/bench_update.py --preset 0.6B --layout packed \
    --measures update --responses 64 --repeats 2
item "4B decoding"          100 "$rate"             "$PYTHON" tests/bench_rollout.py --preset 4B --quick --batches 64 \
    --max_new_tokens 32

printf '\n%-28s  %-9s %7s   %s\n%s' item passed time figure "$TABLE" | tee "$OUT/table.txt"
exit $STATUS
