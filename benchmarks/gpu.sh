#!/usr/bin/env bash
# All GPU cases on one GPU of 141 GB, inside 8 minutes; text and JSON rows go into a folder.
#
#     benchmarks/gpu.sh OUTPUT_FOLDER
#     benchmarks/gpu.sh --smoke OUTPUT_FOLDER    tiny models, also without a GPU: checks that all of it works
#
# Needs what a PyTorch image with transformers, timm and lightning has; nothing is installed or downloaded. Where
# liger-kernel is importable, train_step.py compares with it, too. A script that fails or runs out of its time leaves
# the rows it had, the others still run, and the exit status is 1. Another interpreter: PYTHON=python3.12.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
smoke=()
if [ "${1:-}" = --smoke ]; then
    smoke=(--smoke)
    shift
fi
if [ $# -ne 1 ]; then
    echo "usage: $0 [--smoke] OUTPUT_FOLDER" >&2
    exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
export PYTHONPATH="$here/../src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Peers and ours take turns with batches of different shapes; fixed segments would fragment.
export PYTORCH_ALLOC_CONF=expandable_segments:True
failed=0
cd "$here/.."

# Seconds at most, name of the files, script, its options. The limits add up to less than 8 minutes.
measure() {
    local limit=$1 name=$2 script=$3
    shift 3
    # The limits are a GPU's; where one only looks whether all works, a busy CPU may take longer.
    [ ${#smoke[@]} -eq 0 ] || limit=$((4 * limit))
    echo "== $name (limit ${limit}s, ${SECONDS}s gone)"
    timeout --signal=INT --kill-after=5 "$limit" "${PYTHON:-python3}" "benchmarks/$script.py" \
        --json "$out/$name.json" "$@" "${smoke[@]+"${smoke[@]}"}" 2>&1 | tee "$out/$name.txt"
    local status=${PIPESTATUS[0]}
    if [ "$status" -ne 0 ]; then
        echo "$name: exit status $status" | tee -a "$out/$name.txt"
        failed=1
    fi
}

full=(--sizes 3b --dtypes bfloat16)
# Cases with several targets take longest: transformers computes 80 rows of them in each step.
measure 225 train_step train_step "${full[@]}" --vocabs 257152 --cases questions single captions --repeats 3 --compile --recompute elementwise
measure 60 decode decode "${full[@]}" --vocabs 257152 --repeats 3
# FlexAttention is compiled for each shape and rule, which takes most of the time.
measure 30 attention attention --lengths 256 2048 --repeats 5 --no-flex
measure 50 attention_flex attention --lengths 16384 --shapes 8/1/256 --repeats 3
measure 75 utilization utilization "${full[@]}" --vocabs 257152 --images 16 32 --cases captions single --repeats 3 --compile
measure 35 scaling scaling "${full[@]}" --vocabs 32768 257152 --cases tokens targets --repeats 3
echo "== done (${SECONDS}s)"
exit $failed
