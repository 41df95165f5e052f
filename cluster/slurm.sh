#!/usr/bin/env bash
# A recipe on a Slurm allocation: one Ray node a machine, the driver on the first. From the repository root, on a file
# system that all nodes share, after `make setup`:
#     sbatch --nodes=2 --gpus-per-node=8 cluster/slurm.sh recipes/grpo_gsm8k_smollm2.yaml [key=value ...]
#SBATCH --job-name=rlflow
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --output=runs/slurm-%j.log
# --signal: ten minutes before the end the recipe is asked to stop. It writes a checkpoint; `--resume` goes on from it.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}"
[ $# -ge 1 ] || { echo "usage: sbatch cluster/slurm.sh RECIPE [key=value ...]" >&2; exit 2; }

export PATH="$PWD/.venv/bin:$PATH"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_USAGE_STATS_ENABLED=0

nodes=$SLURM_JOB_NUM_NODES
first=$SLURMD_NODENAME
address=$(hostname -I | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000)) # other jobs may share the node's address
free_ports=(--dashboard-agent-listen-port=0 --min-worker-port=0 --max-worker-port=0)
files=/tmp/ray-$SLURM_JOB_ID

on_nodes() { exec srun --overlap --export=ALL --ntasks-per-node=1 "$@"; }
driver=
run() { # in the background, so that a signal is passed on at once; its exit status is this script's
    "$@" &
    driver=$!
    wait "$driver" || true # ends early when TERM comes
    wait "$driver"
}
trap '[ -z "$driver" ] || kill -TERM "$driver"' TERM
trap 'jobs -p | xargs --no-run-if-empty kill 2>/dev/null || true' EXIT

on_nodes --nodes=1 --nodelist="$first" ray start --head --block --node-ip-address="$address" --port="$port" \
    --dashboard-host=127.0.0.1 --dashboard-port=$((port + 1)) --ray-client-server-port=$((port + 2)) \
    "${free_ports[@]}" --temp-dir="$files" &
if [ "$nodes" -gt 1 ]; then
    on_nodes --nodes=$((nodes - 1)) --exclude="$first" ray start --block --address="$address:$port" \
        "${free_ports[@]}" &
fi

export RAY_ADDRESS=$address:$port
run python cluster/wait_for_nodes.py "$nodes"
run rlflow run "$@"
