#!/usr/bin/env bash
# Trains under torchrun, without a scheduler, on one node or several; starts all ranks again when one died:
#
#   scripts/torchrun.sh --config mine.yaml --config configs/fsdp.yaml
#   NNODES=2 NODE_RANK=0 HEAD=node0:29400 scripts/torchrun.sh --config mine.yaml ...     on node0
#   NNODES=2 NODE_RANK=1 HEAD=node0:29400 scripts/torchrun.sh --config mine.yaml ...     on the other
#
# What follows the script's name goes to `fit`. COMMAND=doctor looks at all nodes instead. Exit status: that of `fit`,
# which torchrun itself would not tell: 0, 2 bad input, 75 saved and to be started again, 130, else 1 (docs/cluster.md).
set -euo pipefail

# What to change, here or in the environment.
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}         # 0 on the node that HEAD names
HEAD=${HEAD:-localhost:0}         # host:port where the nodes meet; port 0: any free one, for a single node
RUN_ID=${RUN_ID:-mmprefix}        # the same on all nodes
PROCESSES=${PROCESSES:-}          # of each node; by default one for each GPU
MAX_RESTARTS=${MAX_RESTARTS:-3}   # after which a rank that dies ends the run
GRACE_SECONDS=${GRACE_SECONDS:-300} # to save in, after TERM or USR1
LOCAL_ADDR=${LOCAL_ADDR:-}        # this node's address, where its own name does not lead to it
PYTHON=${PYTHON:-python}
COMMAND=${COMMAND:-fit}

if [ -z "$PROCESSES" ]; then
    PROCESSES=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
    PROCESSES=$((PROCESSES > 0 ? PROCESSES : 1))
fi
arguments=("$@")
if [ "$COMMAND" = fit ]; then
    arguments+=(--trainer.num_nodes "$NNODES" --trainer.devices "$PROCESSES" --ckpt_path last)
else
    MAX_RESTARTS=0
fi

# Restarted ranks would meet at the address of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Leaves each rank's exit status behind, of the last start. Bad input stays bad: no second try of that. A signal that is
# trapped here is the rank's to handle (an ignored one would be ignored by it, too).
codes=$(mktemp -d)
trap 'rm -rf "$codes"' EXIT
export MMPREFIX_EXIT_CODES=$codes
# shellcheck disable=SC2016
rank='
file=$MMPREFIX_EXIT_CODES/$LOCAL_RANK
if [ "$(cat "$file" 2>/dev/null)" = 2 ]; then exit 2; fi
rm -f "$file"
trap : TERM INT HUP USR1
code=0
"$@" || code=$?
echo "$code" >"$file"
exit "$code"'

"$PYTHON" -m torch.distributed.run \
    --nnodes "$NNODES" --nproc-per-node "$PROCESSES" --max-restarts "$MAX_RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "$RUN_ID" \
    --rdzv-conf "is_host=$((NODE_RANK == 0))" ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
    --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "$GRACE_SECONDS" \
    --no-python bash -c "$rank" rank "$PYTHON" -m mmprefix "$COMMAND" "${arguments[@]}" &
launcher=$!
for name in TERM INT HUP USR1; do
    # shellcheck disable=SC2064
    trap "kill -$name $launcher 2>/dev/null || true" "$name"
done
status=0
wait "$launcher" || status=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait`, not what it waits for
    status=0
    wait "$launcher" || status=$?
done
if [ "$status" != 0 ]; then
    for code in 2 75 130; do
        if grep -qx "$code" "$codes"/* 2>/dev/null; then exit "$code"; fi
    done
    exit 1
fi
