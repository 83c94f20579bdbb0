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
It names the bad nodes. Exit code 1 means that there is one.

  sbatch [SBATCH-OPTION …] slurm/preflight.sh [--cpu] [OUTPUT_DIR]
  LLM2VEC_DS_PREFLIGHT=1 sbatch slurm/train_7b.sh …     # checks the nodes that the job gets
TEXT
}

main() {
  local kind=() folder=runs bad report
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --cpu) kind=(--cpu) ;;
      -*) exit_code=2 fail "unknown option $1 (see --help)" ;;
      *) folder=$1 ;;
    esac
    shift
  done
  need_job
  step_options
  export_defaults
  bad=$(silent_nodes | sort | tr '\n' ' ')
  [ -z "$bad" ] || fail "no command starts on ${bad% }: submit with --exclude=$(echo "${bad% }" | tr ' ' ','), and tell the operators"
  export_rendezvous "$(on_first_node "$python" -m llm2vec_ds.network)"
  MASTER_PORT=$((MASTER_PORT - 1)) # a training that follows in the same job needs the other port
  PREFLIGHT_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
  export PREFLIGHT_NODES
  report=$(srun --wait=120 "${common_options[@]}" "$python" slurm/preflight.py "${kind[@]}" --folder "$folder") || true
  echo "$report"
  grep -q '^preflight: fit$' <<<"$report" ||
    fail "the nodes named above are not fit: submit with --exclude=NODE,…, and tell the operators"
  say "all of $SLURM_JOB_NODELIST is fit"
}

common=${LLM2VEC_DS_ROOT:-$PWD}/slurm/common.sh
[ -f "$common" ] || { echo "$me: error: no $common: submit from the folder that holds slurm/, or set LLM2VEC_DS_ROOT" >&2 && exit 2; }
# shellcheck source=slurm/common.sh
source "$common"
main "$@"
