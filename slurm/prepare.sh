#!/usr/bin/env bash
#SBATCH --job-name=llm2vec-prepare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
me=prepare

usage() {
  cat <<'TEXT'
Tokenises the texts of recipes once, on one node without GPU. After a kill, it resumes where it stopped.

  sbatch [SBATCH-OPTION …] slurm/prepare.sh RECIPE [RECIPE …] [KEY=VALUE …]

All recipes use the tokenizer of the first one's model. A later stage starts from an encoder that does not exist yet
and has the same tokenizer.
TEXT
}

read_model='import sys; from llm2vec_ds.recipe.files import load_recipe; print(load_recipe(sys.argv[1], sys.argv[2:]).model.path)'

main() {
  local argument recipe model recipes=() overrides=()
  for argument in "$@"; do
    case $argument in
      -h | --help) usage && exit 0 ;;
      *=*) overrides+=("$argument") ;;
      *) recipes+=("$argument") ;;
    esac
  done
  [ "${#recipes[@]}" -gt 0 ] || exit_code=2 fail "no recipe (see --help)"
  need_job
  step_options
  export_defaults
  model=$(on_first_node "$python" -c "$read_model" "${recipes[0]}" "${overrides[@]}" | tail -n 1) ||
    exit_code=2 fail "${recipes[0]} cannot be read, see above"
  for recipe in "${recipes[@]}"; do
    say "$recipe with the tokenizer of $model"
    on_first_node "$python" -m llm2vec_ds prepare "$recipe" "${overrides[@]}" model.path="$model" ||
      exit_code=2 fail "$recipe could not be prepared, see above"
  done
}

common=${LLM2VEC_DS_ROOT:-$PWD}/slurm/common.sh
[ -f "$common" ] || { echo "$me: error: no $common: submit from the folder that holds slurm/, or set LLM2VEC_DS_ROOT" >&2 && exit 2; }
# shellcheck source=slurm/common.sh
source "$common"
main "$@"
