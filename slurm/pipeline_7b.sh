#!/usr/bin/env bash
set -euo pipefail
me=pipeline_7b

usage() {
  cat <<'TEXT'
Submits prepare, MNTP, SimCSE, supervised training and evaluation as jobs, each waiting for the one before.

  source slurm/site.env
  slurm/pipeline_7b.sh                                   # recipes/mistral_7b_instruct/, 4 nodes of 8 GPUs
  slurm/pipeline_7b.sh [SBATCH-OPTION …] [RECIPES] [KEY=VALUE …]
  slurm/pipeline_7b.sh --nodes=1 --ntasks-per-node=8 recipes/llama3_8b_instruct/ checkpoint.every_steps=50

RECIPES is what stands before mntp.yaml, simcse.yaml and supervised.yaml: a folder, or recipes/smoke_.
SBATCH-OPTION (written --name=value) and KEY=VALUE go to the three trainings. Run again after a failure, it
goes on: finished stages end at once. A stage that fails cancels those that wait for it.
  EVALUATION   tasks of `llm2vec-ds evaluate mteb`, e.g. "--task sts:stsb_test.csv"; empty: no evaluation
  EVALUATION_OPTIONS, PREPARE_OPTIONS   for sbatch (default: one GPU; none)
TEXT
}

submit() { # SBATCH-OPTION … -- SCRIPT [ARGUMENT …]; prints the job's number
  local options=()
  while [ "$1" != -- ]; do options+=("$1") && shift; done
  shift
  sbatch --parsable --kill-on-invalid-dep=yes "${options[@]}" "$@" | cut -d ';' -f 1
}

one_task() { # NAME DEPENDENCY OPTIONS COMMAND …: a job of one process
  local name=$1 dependency=$2 options=()
  read -ra options <<<"$3"
  shift 3
  submit --job-name="llm2vec-$name" --nodes=1 --ntasks=1 --output=%x-%j.out --open-mode=append --requeue \
    ${dependency:+--dependency="afterok:$dependency"} "${options[@]}" -- slurm/one_task.sh "$@"
}

read_arguments() {
  recipes=recipes/mistral_7b_instruct/ options=() overrides=()
  local argument
  for argument in "$@"; do
    case $argument in
      -h | --help) usage && exit 0 ;;
      --*=* | --exclusive | --no-requeue) options+=("$argument") ;;
      -*) exit_code=2 fail "option $argument: write options of sbatch as --name=value (--help: how)" ;;
      *=*) overrides+=("$argument") ;;
      *) recipes=$argument ;;
    esac
  done
  for stage in "${stages[@]}"; do
    [ -f "$recipes$stage.yaml" ] || exit_code=2 fail "no $recipes$stage.yaml: RECIPES is what stands before mntp.yaml, e.g. recipes/mistral_7b_instruct/"
  done
}

main() {
  stages=(mntp simcse supervised)
  read_arguments "$@"
  command -v sbatch >/dev/null || exit_code=2 fail "no sbatch here: run this on a login node of the cluster"
  local before stage task
  # The later stages' texts too: their tokenizer is that of the first, whose encoder is not there yet.
  before=$(one_task prepare '' "${PREPARE_OPTIONS:-}" prepare "${stages[@]/#/$recipes}" "${overrides[@]}")
  say "prepare: job $before"
  for stage in "${stages[@]}"; do
    before=$(submit --job-name="llm2vec-$stage" --dependency="afterok:$before" "${options[@]}" -- \
      slurm/train_7b.sh "$recipes$stage.yaml" "${overrides[@]}")
    say "$stage: job $before"
  done
}
