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

main() {
  local argument recipe model recipes=() overrides=()
  for argument in "$@"; do
    case $argument in
      -h | --help) usage && exit 0 ;;
      -*) refuse_option "$argument" ;;
      *=*) overrides+=("$argument") ;;
      *) recipes+=("$argument") ;;
    esac
  done
  [ "${#recipes[@]}" -gt 0 ] || exit_code=2 fail "no recipe (see --help)"
  need_job
  step_options
  export_defaults
  mark_log
  model=$(on_first_node "$python" slurm/recipe_model.py "${recipes[0]}" "${overrides[@]}" | tail -n 1) ||
    exit_code=2 fail "${recipes[0]} cannot be read: $(last_error || true)"
  for recipe in "${recipes[@]}"; do
    say "$recipe with the tokenizer of $model"
    on_first_node "$python" -m llm2vec_ds prepare "$recipe" "${overrides[@]}" model.path="$model" ||
      exit_code=2 fail "$recipe could not be prepared: $(last_error || true)"
  done
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
