#!/usr/bin/env bash
set -euo pipefail
me=pipeline_7b

usage() {
  cat <<'TEXT'
Submits prepare, MNTP, SimCSE, supervised training and evaluation as jobs. Each starts after the one before has
succeeded. Run this on a login node:

  source slurm/site.env
  slurm/pipeline_7b.sh                                   # recipes/mistral_7b_instruct/, 4 nodes of 8 GPUs
  slurm/pipeline_7b.sh [SBATCH-OPTION …] [RECIPES] [KEY=VALUE …] [-- EVALUATE-OPTION …]
  slurm/pipeline_7b.sh --nodes=1 recipes/llama3_8b_instruct/ checkpoint.every_steps=50 -- --task sts:stsb_test.csv

RECIPES is the part before mntp.yaml, simcse.yaml and supervised.yaml: a folder with /, or recipes/smoke_.
SBATCH-OPTION (written --name=value) goes to the three trainings. KEY=VALUE goes to them and to prepare.
EVALUATE-OPTION is for `llm2vec-ds evaluate mteb` on the last encoder (default --subset paper15). Results go beside it.
A stage that fails cancels those after it. The same command again resumes: finished stages end at once.
TEXT
}

read_arguments() {
  recipes=recipes/mistral_7b_instruct/ options=() overrides=() evaluation=(--subset paper15)
  local stage
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --) shift && evaluation=("$@") && break ;;
      --*=* | --exclusive) options+=("$1") ;;
      -*) exit_code=2 fail "option $1: write options of sbatch as --name=value (see --help)" ;;
      model.path=* | output_dir=*) exit_code=2 fail "$1 would apply to all three stages: change it in their recipes" ;;
      *=*) overrides+=("$1") ;;
      *) recipes=$1 ;;
    esac
    shift
  done
  recipe_files=()
  for stage in "${stages[@]}"; do
    recipe_files+=("$recipes$stage.yaml")
    [ -f "$recipes$stage.yaml" ] || exit_code=2 fail "no $recipes$stage.yaml: RECIPES is the part before $stage.yaml, e.g. recipes/mistral_7b_instruct/"
  done
}

submit() { # NAME SBATCH-OPTION … SCRIPT ARGUMENT …: runs after the job `before`, and becomes `before` itself
  local name=$1
  shift
  before=$(sbatch --parsable --job-name="llm2vec-$name" --kill-on-invalid-dep=yes \
    ${before:+--dependency="afterok:$before"} "$@") || fail "sbatch did not accept $name, see above: fix it and run this again"
  before=${before%%;*} # a cluster's name may follow
  say "$name: job $before"
}

output_dir_of() { # a recipe; without Python, which the login node may lack
  sed -n "s/^output_dir: *//p" "$1" | sed -E "s/^\"([^\"]*)\".*/\1/; t; s/^'([^']*)'.*/\1/; t; s/ +#.*//; s/ +$//"
}

main() {
  local stage before='' output_dir
  stages=(mntp simcse supervised)
  read_arguments "$@"
  command -v sbatch >/dev/null || exit_code=2 fail "no sbatch here: run this on a login node of the cluster"
  output_dir=$(output_dir_of "${recipes}supervised.yaml")
  [ -n "$output_dir" ] || exit_code=2 fail "${recipes}supervised.yaml has no line 'output_dir: FOLDER': add it"
  submit prepare slurm/prepare.sh "${recipe_files[@]}" "${overrides[@]}"
  for stage in "${stages[@]}"; do
    submit "$stage" "${options[@]}" slurm/train_7b.sh "$recipes$stage.yaml" "${overrides[@]}"
  done
  submit evaluate slurm/evaluate.sh "$output_dir/encoder" "$output_dir/evaluation" "${evaluation[@]}"
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
