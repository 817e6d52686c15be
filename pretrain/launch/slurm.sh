#!/usr/bin/env bash
# A training run under Slurm, submitted from the root of the repository, which all nodes must see at the same path:
#
#   sbatch pretrain/launch/slurm.sh configs/moonlight_16b_a3b/pretrain.yaml runs_folder=/shared/runs
#
# One task per node runs torchrun.sh, which reads its settings from the environment. Before the time limit, the
# processes save and the job is requeued. It is also requeued when a node fails. The job resumes from the newest
# checkpoint.
#SBATCH --job-name=moonlight
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=moonlight-%j.log
set -euo pipefail

PORT=${PORT:-29500}
SHORTEST_SECONDS=${SHORTEST_SECONDS:-900}  # a job that failed sooner is not requeued: it would fail again

read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export NODES=$SLURM_JOB_NUM_NODES HEAD=$first_node:$PORT RUN_ID=$SLURM_JOB_ID

time_is_up=no
# SIGTERM to all processes of all nodes, which save and stop. If srun got SIGTERM, it would kill them.
trap 'time_is_up=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
srun --kill-on-bad-exit=1 pretrain/launch/torchrun.sh "$@" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2> /dev/null; do # a trapped signal interrupts wait, not srun
    code=0
    wait "$step" || code=$?
done

if [ "$time_is_up" = yes ] || { [ "$code" != 0 ] && ((SECONDS >= SHORTEST_SECONDS)); }; then
    echo "the run exited with code $code after $SECONDS seconds; requeuing the job"
    scontrol requeue "$SLURM_JOB_ID"
else
    echo "the run exited with code $code after $SECONDS seconds"
    exit "$code"
fi
