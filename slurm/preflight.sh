#!/usr/bin/env bash
#SBATCH --job-name=llm2vec-preflight
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=00:15:00
#SBATCH --output=%x-%j.out
#SBATCH --no-requeue
set -euo pipefail
me=preflight

usage() {
  cat <<'TEXT'
Checks every node before a long run. Does it answer? Has each rank its GPU? Can it write to the run's folder, cache
and TMPDIR? Is that folder shared? Does an all-reduce over all ranks give the right sum? Do the clocks agree?
It names the bad nodes. Exit code 1 means that there is one. For nodes without a GPU, give --cpu or set
LLM2VEC_DS_PREFLIGHT=cpu.

  sbatch [SBATCH-OPTION …] slurm/preflight.sh [--cpu] [OUTPUT_DIR]
  LLM2VEC_DS_PREFLIGHT=1 sbatch slurm/train_7b.sh …     # checks the nodes that the job gets
TEXT
}

main() {
  local kind=() folder=runs bad report address why
  [ "${LLM2VEC_DS_PREFLIGHT:-}" != cpu ] || kind=(--cpu)
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --cpu) kind=(--cpu) ;;
      -*) refuse_option "$1" ;;
      *) folder=$1 ;;
    esac
    shift
  done
  need_job
  step_options
  export_defaults
  bad=$(silent_nodes | sort | tr '\n' ' ')
  [ -z "$bad" ] || fail "no command starts on ${bad% }: submit with --exclude=$(echo "${bad% }" | tr ' ' ','), and tell the operators"
  mark_log
  address=$(address_of_first_node)
  export_rendezvous "$address"
  MASTER_PORT=$((MASTER_PORT - 1)) # a training that follows in the same job needs the other port
  PREFLIGHT_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
  export PREFLIGHT_NODES
  report=$(srun --wait=120 "${common_options[@]}" "$python" slurm/preflight.py "${kind[@]}" --folder "$folder") || true
  grep -v '^preflight: unfit: ' <<<"$report" || true
  if ! grep -q '^preflight: fit$' <<<"$report"; then
    why=$(sed -n 's/^preflight: unfit: //p' <<<"$report")
    fail "${why:-the check did not finish: $(last_error || true)}"
  fi
  say "every node is fit: $SLURM_JOB_NODELIST"
}

# SLURM runs a copy of this script, so each script finds the shared functions by itself.
common=${LLM2VEC_DS_ROOT:-$PWD}/slurm/common.sh
if [ ! -f "$common" ]; then
  folder=$({ scontrol show job "${SLURM_JOB_ID:-}" | sed -n 's/^ *WorkDir=//p'; } 2>/dev/null) || folder=''
  why="no $common: submit from the folder that holds slurm/, or set LLM2VEC_DS_ROOT"
  [ "${folder:-.}" -ef . ] || why="the job's folder $folder is not on node ${SLURMD_NODENAME:-$HOSTNAME}: submit from a folder that all nodes share"
  [ -z "${LLM2VEC_DS_ROOT:-}" ] || why="no $common on node ${SLURMD_NODENAME:-$HOSTNAME}: LLM2VEC_DS_ROOT must name the folder that holds slurm/, on a disk that all nodes share"
  echo "$me: error: $why" >&2 && exit 2
fi
# shellcheck source=slurm/common.sh
source "$common"
main "$@"
