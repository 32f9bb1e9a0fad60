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

# Seconds at most, script, its options. The limits add up to less than 8 minutes.
measure() {
    local limit=$1 script=$2
    shift 2
    echo "== $script (limit ${limit}s, ${SECONDS}s gone)"
    timeout --signal=INT --kill-after=5 "$limit" "${PYTHON:-python3}" "benchmarks/$script.py" \
        --json "$out/$script.json" "$@" "${smoke[@]+"${smoke[@]}"}" 2>&1 | tee "$out/$script.txt"
    local status=${PIPESTATUS[0]}
    if [ "$status" -ne 0 ]; then
        echo "$script: exit status $status" | tee -a "$out/$script.txt"
        failed=1
    fi
}

full=(--sizes 3b --dtypes bfloat16 --vocabs 257152)
measure 190 train_step "${full[@]}"
# FlexAttention is compiled for each shape and rule: half of the time. The longest come first.
measure 95 attention --lengths 16384 2048 256 --repeats 3 --cases long_targets questions long_prefixes
measure 100 decode "${full[@]}"
measure 90 scaling --sizes 3b --dtypes bfloat16 --vocabs 32768 257152
echo "== done (${SECONDS}s)"
exit $failed
