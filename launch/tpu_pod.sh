#!/usr/bin/env bash
# Train on a TPU pod: the same command on all its workers, started from anywhere with gcloud.
# Environment and arguments only; bash launch/tpu_pod.sh --help
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/tpu_pod.sh --name POD --zone ZONE [--project ID] [--directory DIR] [--dry-run]
                         --config FILE [options of mgpt4 train]

Runs `mgpt4 train` on every worker of a pod of TPU VMs; the workers find each other by themselves. What stands from
--config on is handed to it. Paths are those of the workers: program, model and data must be there on each of them (a
mounted bucket, a disk), and the run directory must be shared by them.

  --name POD        the pod, as `gcloud compute tpus tpu-vm list` names it
  --zone ZONE       where it is
  --project ID      of the cloud; gcloud's own setting otherwise
  --directory DIR   where the workers start the program; their home directory otherwise
  --dry-run         print the command that would run, and stop
  --help            print this, and stop
  MGPT4             in the environment: the program on the workers, from DIR or /, where `mgpt4` is not on their PATH

The run ends with this terminal: start it where that stays open (tmux). ssh-add must know gcloud's key.

example:
  MGPT4=.venv/bin/mgpt4 launch/tpu_pod.sh --name v5e-64 --zone us-west4-a --directory mgpt4-jax \
      --config configs/minigpt4_stage1_13b.yaml --mesh data=8,fsdp=8
END
}

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

dry_run=false
name='' zone='' project='' directory=''
option='' # that waits for its value
training=()
for word in "$@"; do
    if [[ -n $option ]]; then
        [[ $word != -* ]] || fail "$option needs a value, got $word"
        printf -v "${option#--}" %s "$word"
        option=''
    elif [[ $word == --dry-run ]]; then
        dry_run=true
    elif ((${#training[@]} > 0)); then
        training+=("$word")
    else
        case $word in
        -h | --help)
            usage
            exit 0
            ;;
        --name | --zone | --project | --directory) option=$word ;;
        --name=*) name=${word#*=} ;;
        --zone=*) zone=${word#*=} ;;
        --project=*) project=${word#*=} ;;
        --directory=*) directory=${word#*=} ;;
        --config | --config=*) training+=("$word") ;;
        *) fail "unknown option $word: options of mgpt4 train come after --config (launch/tpu_pod.sh --help)" ;;
        esac
    fi
done
[[ -z $option ]] || fail "$option needs a value"
[[ -n $name ]] || fail '--name POD is missing (launch/tpu_pod.sh --help shows an example)'
[[ -n $zone ]] || fail '--zone ZONE is missing (launch/tpu_pod.sh --help shows an example)'
((${#training[@]} > 0)) || fail 'nothing to train: give --config FILE (launch/tpu_pod.sh --help shows an example)'

# For the shell of the workers: each word quoted as it is here.
printf -v remote '%q ' "${MGPT4:-mgpt4}" train "${training[@]}"
remote=${remote% }
if [[ -n $directory ]]; then
    printf -v remote 'cd %q && %s' "$directory" "$remote"
fi
command=(
    gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" ${project:+"--project=$project"}
    --worker=all "--command=$remote"
)
if $dry_run; then
    printf -v line '%q ' "${command[@]}"
    printf '%s\n' "${line% }"
    exit 0
fi
command -v gcloud >/dev/null || fail 'gcloud: not found; install the Google Cloud CLI and log in'
exec "${command[@]}"
