#!/usr/bin/env bash
# Train on nodes with A100s under SLURM: one task a node, which drives all its GPUs.
# Environment and arguments only; bash launch/a100_slurm.sh --help
#
# Options of sbatch on the command line win over these.
#SBATCH --job-name=mgpt4
#SBATCH --output=mgpt4-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
# Five minutes before the time limit every task gets SIGTERM, saves and stops; the job is then queued again, below.
#SBATCH --signal=TERM@300
set -euo pipefail

usage() {
    cat <<'END'
usage: sbatch [options of sbatch] launch/a100_slurm.sh [--dry-run] --config FILE [options of mgpt4 train]

One task on each node drives all its GPUs; the tasks find each other by what SLURM tells them. What stands from
--config on is handed to `mgpt4 train`. Before the time limit the run is saved and queued again, and goes on where it
was; after a node failure or preemption too. To end it for good: scancel JOB.

  --dry-run   print the command that the job would run, and stop (run without sbatch it needs no SLURM)
  --help      print this, and stop
  MGPT4       in the environment: the program, where `mgpt4` is not on PATH; it must be there on every node
  NCCL_SOCKET_IFNAME, NCCL_IB_HCA and the like are handed on: your cluster's pages say what they must be, if anything

example:
  sbatch --nodes 4 --time 24:00:00 launch/a100_slurm.sh --config configs/minigpt4_stage1_13b.yaml --mesh data=4,fsdp=8
END
}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

dry_run=false
training=()
for word in "$@"; do
    case $word in
    --dry-run) dry_run=true ;;
    -h | --help)
        if ((${#training[@]} == 0)); then
            usage
            exit 0
        fi
        training+=("$word")
        ;;
    *) training+=("$word") ;;
    esac
done
case ${training[0]-} in
'') fail 'nothing to train: give --config FILE (launch/a100_slurm.sh --help shows an example)' ;;
--config | --config=*) ;;
*) fail "unknown option ${training[0]}: options of mgpt4 train come after --config (launch/a100_slurm.sh --help)" ;;
esac

# XLA moves the exchange between GPUs (fsdp gathers weights, data sums gradients) behind the computing of other layers.
xla_flags="--xla_gpu_enable_latency_hiding_scheduler=true${XLA_FLAGS:+ $XLA_FLAGS}"
# jax takes 75% of the memory by itself; 13B needs more, and CUDA, cuBLAS and NCCL get along with the rest. Where the
# older name is set too, jax refuses both.
fraction=${XLA_CLIENT_MEM_FRACTION:-${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}}
# NCCL says what is wrong with a link instead of failing with a number.
nccl_debug=${NCCL_DEBUG:-WARN}

program=${MGPT4:-mgpt4}
command=(
    srun --ntasks-per-node=1
    # srun no longer takes it from sbatch; without it a task that asks for some would get one core.
    ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"}
    # The threads that read pictures may use every core of the task.
    --cpu-bind=none
    # One that has saved and stopped must not cut off another; jax itself ends the others when one has died.
    --kill-on-bad-exit=0
    env -u XLA_PYTHON_CLIENT_MEM_FRACTION
    "XLA_FLAGS=$xla_flags" "XLA_CLIENT_MEM_FRACTION=$fraction" "NCCL_DEBUG=$nccl_debug"
    "$program" train "${training[@]}"
)
if $dry_run; then
    printf -v line '%q ' "${command[@]}"
    printf '%s\n' "${line% }"
    exit 0
fi
[[ -n ${SLURM_JOB_ID-} ]] || fail 'not in a SLURM job: sbatch launch/a100_slurm.sh ... (or --dry-run)'
command -v -- "$program" >/dev/null || fail "$program: not found; activate its environment, or set MGPT4 to its path"

status=0
"${command[@]}" || status=$?
if ((status == 143)); then # 128 + SIGTERM: saved
    printf 'saved on SIGTERM; queueing job %s again\n' "$SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
