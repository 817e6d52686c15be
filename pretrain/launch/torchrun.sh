#!/usr/bin/env bash
# One node of a training run: the health check, then torchrun's agent. The agent starts this node's processes, and all
# nodes start theirs again when one ends badly; training goes on from the newest checkpoint. The same line on every node:
#
#   NODES=4 HEAD=node1:29500 pretrain/launch/torchrun.sh configs/moonlight_16b_a3b/pretrain.yaml runs_folder=/shared/runs
#
# slurm.sh and kubernetes.yaml start this script on their nodes.
set -euo pipefail

[ $# -gt 0 ] || {
    echo "usage: NODES=4 HEAD=node1:29500 $0 RECIPE [section.key=value ...], the same line on every node" >&2
    exit 2
}

NODES=${NODES:-1}
PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-gpu}  # gpu is one for each GPU, else a number
HEAD=${HEAD:-localhost:29500}                  # one of the nodes, and a free port of it; the next port must be free too
RUN_ID=${RUN_ID:-moonlight}                    # the same on all nodes of a run, another for another run
MAX_RESTARTS=${MAX_RESTARTS:-3}                # of the processes, by the agents
JOIN_SECONDS=${JOIN_SECONDS:-600}              # how long a node waits for the others
SHUTDOWN_SECONDS=${SHUTDOWN_SECONDS:-300}      # between SIGTERM and SIGKILL, for a last checkpoint
INTERFACE=${INTERFACE:-}                       # network interface of gloo and NCCL; empty lets them choose
HEALTH=${HEALTH:-yes}                          # no leaves the health check out
HEALTH_OPTIONS=${HEALTH_OPTIONS:-}             # see python -m pretrain.health --help
LOG_FOLDER=${LOG_FOLDER:-runs/logs/$(hostname)} # output of every process of this node, by restart and rank
PYTHON=${PYTHON:-python}

[[ $HEAD =~ :[0-9]+$ ]] || {
    echo "HEAD is $HEAD: a host and a port are expected, such as node1:29500" >&2
    exit 2
}

trap '' USR1 # until there is a run that can save
if [ -n "$INTERFACE" ]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi

agent=(
    "$PYTHON" -m pretrain.agent $((JOIN_SECONDS + 90)) --nnodes "$NODES" --nproc-per-node "$PROCESSES_PER_NODE"
    --rdzv-backend c10d --rdzv-conf "join_timeout=$JOIN_SECONDS" --shutdown-timeout "$SHUTDOWN_SECONDS"
)

if [ "$HEALTH" = yes ]; then
    read -ra options <<< "$HEALTH_OPTIONS"
    # A port of its own: a node that is done already must not meet the health check of one that is not.
    "${agent[@]}" --rdzv-endpoint "${HEAD%:*}:$((${HEAD##*:} + 1))" --rdzv-id "$RUN_ID-health" --max-restarts 0 \
        -m pretrain.health "$@" "${options[@]}" &
    check=$!
    trap 'kill -TERM "$check"; wait "$check"; exit 1' TERM INT
    wait "$check" || {
        echo "$(hostname): the health check did not pass (see the lines that begin with wrong:, or the error above)," \
            "so training does not start; HEALTH=no leaves it out" >&2
        exit 1
    }
    trap - TERM INT
fi

recipe=$1
shift
mkdir -p "$LOG_FOLDER"
# exec: signals reach the agent itself, which passes them on to its processes.
exec "${agent[@]}" --rdzv-endpoint "$HEAD" --rdzv-id "$RUN_ID" --max-restarts "$MAX_RESTARTS" \
    --log-dir "$LOG_FOLDER" --tee 3 -m pretrain "$recipe" "train.grace_seconds=$((SHUTDOWN_SECONDS - 5))" "$@"
