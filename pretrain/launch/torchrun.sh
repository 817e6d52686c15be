#!/usr/bin/env bash
# One node of a training run: the health check, then torchrun's agent. The agent starts this node's processes. When a
# process fails, all nodes restart theirs, and training resumes from the newest checkpoint. Same command on every node:
#
#   NODES=4 HEAD=node1:29500 pretrain/launch/torchrun.sh configs/moonlight_16b_a3b/pretrain.yaml runs_folder=/shared/runs
#
# slurm.sh and kubernetes.yaml start this script on their nodes.
set -euo pipefail

[ $# -gt 0 ] || {
    echo "usage: NODES=4 HEAD=node1:29500 $0 RECIPE [section.key=value ...], the same command on every node" >&2
    exit 2
}

NODES=${NODES:-1}
PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-gpu}  # gpu: one for each GPU; or a number
HEAD=${HEAD:-localhost:29500}                  # one of the nodes and a free port of it; the next port must also be free
RUN_ID=${RUN_ID:-moonlight}                    # equal on all nodes of a run, different for other runs
MAX_RESTARTS=${MAX_RESTARTS:-3}                # restarts of the processes by the agents
JOIN_SECONDS=${JOIN_SECONDS:-600}              # how long a node waits for the others
SHUTDOWN_SECONDS=${SHUTDOWN_SECONDS:-300}      # between SIGTERM and SIGKILL, for a last checkpoint
INTERFACE=${INTERFACE:-}                       # network interface of gloo and NCCL; empty: automatic
HEALTH=${HEALTH:-yes}                          # no: skip the health check
HEALTH_OPTIONS=${HEALTH_OPTIONS:-}             # see python -m pretrain.health --help
LOG_FOLDER=${LOG_FOLDER:-runs/logs/$(hostname)} # output of every process of this node, by restart and rank
PYTHON=${PYTHON:-python}

[[ $HEAD =~ :[0-9]+$ ]] || {
    echo "HEAD is $HEAD: give a host and a port, such as node1:29500" >&2
    exit 2
}

trap '' USR1 # until the run can save
if [ -n "$INTERFACE" ]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi

agent=(
    "$PYTHON" -m pretrain.agent $((JOIN_SECONDS + 90)) --nnodes "$NODES" --nproc-per-node "$PROCESSES_PER_NODE"
    --rdzv-backend c10d --rdzv-conf "join_timeout=$JOIN_SECONDS" --shutdown-timeout "$SHUTDOWN_SECONDS"
)

if [ "$HEALTH" = yes ]; then
    read -ra options <<< "$HEALTH_OPTIONS"
    # A separate port: a node that starts training must not join the health check of a slower node.
    "${agent[@]}" --rdzv-endpoint "${HEAD%:*}:$((${HEAD##*:} + 1))" --rdzv-id "$RUN_ID-health" --max-restarts 0 \
        -m pretrain.health "$@" "${options[@]}" &
    check=$!
    trap 'kill -TERM "$check"; wait "$check"; exit 1' TERM INT
    wait "$check" || {
        echo "$(hostname): the health check failed (see the lines that begin with wrong:, or the error above)," \
            "training does not start; set HEALTH=no to skip the check" >&2
        exit 1
    }
    trap - TERM INT
fi

recipe=$1
shift
mkdir -p "$LOG_FOLDER"
# exec: signals reach the agent itself, which forwards them to its processes.
exec "${agent[@]}" --rdzv-endpoint "$HEAD" --rdzv-id "$RUN_ID" --max-restarts "$MAX_RESTARTS" \
    --log-dir "$LOG_FOLDER" --tee 3 -m pretrain "$recipe" "train.grace_seconds=$((SHUTDOWN_SECONDS - 5))" "$@"
