#!/usr/bin/env bash
# Train on one host with A100s (or other NVIDIA GPUs): one process drives all that it sees.
# Environment and arguments only; bash launch/a100.sh --help
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/a100.sh [--dry-run] --config FILE [options of mgpt4 train]

One process on this host drives all its GPUs; CUDA_VISIBLE_DEVICES chooses among them. What stands from --config on
is handed to `mgpt4 train`, whose options come after `mgpt4 train --help`.

  --dry-run   print the command that would run, and stop
  --help      print this, and stop
  MGPT4       in the environment: the program, where `mgpt4` is not on PATH

example:
  launch/a100.sh --config configs/minigpt4_stage1_7b.yaml --mesh fsdp=8 --optim.peak_lr 3e-5

Two hosts without a scheduler: the same on both, and on the second with --process-id 1:
  launch/a100.sh --coordinator 10.0.0.1:1234 --num-processes 2 --process-id 0 --config configs/minigpt4_stage1_7b.yaml
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
first=${training[0]-}
case ${first%%=*} in
'') fail 'nothing to train: give --config FILE (launch/a100.sh --help shows an example)' ;;
--config | --coordinator | --num-processes | --process-id) ;;
*) fail "unknown option $first: options of mgpt4 train come after --config (launch/a100.sh --help)" ;;
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
    env -u XLA_PYTHON_CLIENT_MEM_FRACTION
    "XLA_FLAGS=$xla_flags" "XLA_CLIENT_MEM_FRACTION=$fraction" "NCCL_DEBUG=$nccl_debug"
    "$program" train "${training[@]}"
)
if $dry_run; then
    printf -v line '%q ' "${command[@]}"
    printf '%s\n' "${line% }"
    exit 0
fi
command -v -- "$program" >/dev/null || fail "$program: not found; activate its environment, or set MGPT4 to its path"
exec "${command[@]}"
