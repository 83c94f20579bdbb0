#!/usr/bin/env bash
#SBATCH --job-name=llm2vec-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
me=evaluate

usage() {
  cat <<'TEXT'
Measures an encoder. Results that OUTPUT holds already are not measured again.

  sbatch [SBATCH-OPTION …] slurm/evaluate.sh MODEL OUTPUT EVALUATE-OPTION …
  sbatch slurm/evaluate.sh runs/mistral_7b_instruct/supervised/encoder results --task sts:stsb_test.csv
  sbatch --ntasks-per-node=8 --gpus-per-node=8 slurm/evaluate.sh MODEL OUTPUT --subset paper15

The options are those of `llm2vec-ds evaluate mteb`. Several ranks (one task for each GPU) share the texts.
TEXT
}

main() {
  case ${1:-} in -h | --help) usage && exit 0 ;; esac
  [ $# -ge 3 ] || exit_code=2 fail "MODEL, OUTPUT and what to measure are needed (see --help)"
  refuse_option "$1" "$2"
  local model=$1 output=$2 code=0 address
  shift 2
  need_job
  step_options
  export_defaults
  mark_log
  address=$(address_of_first_node)
  export_rendezvous "$address"
  srun "${all_ranks[@]}" "${common_options[@]}" "$python" -m llm2vec_ds evaluate mteb --model "$model" --output "$output" "$@" || code=$?
  [ "$code" = 0 ] || exit_code=$code fail "evaluation of $model failed (code $code): $(last_error || true)"
  say "results in $output"
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
