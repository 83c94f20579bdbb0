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
  local model=$1 output=$2 code=0
  shift 2
  need_job
  step_options
  export_defaults
  export_rendezvous "$(on_first_node "$python" -m llm2vec_ds.network)"
  srun "${all_ranks[@]}" "${common_options[@]}" "$python" -m llm2vec_ds evaluate mteb --model "$model" --output "$output" "$@" || code=$?
  [ "$code" = 0 ] || exit_code=$code fail "evaluation of $model failed (code $code), see above"
  say "results in $output"
}

common=${LLM2VEC_DS_ROOT:-$PWD}/slurm/common.sh
[ -f "$common" ] || { echo "$me: error: no $common: submit from the folder that holds slurm/, or set LLM2VEC_DS_ROOT" >&2 && exit 2; }
# shellcheck source=slurm/common.sh
source "$common"
main "$@"
