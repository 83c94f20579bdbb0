#!/usr/bin/env bash
#SBATCH --job-name=llm2vec-encode
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
set -euo pipefail
me=encode

usage() {
  cat <<'TEXT'
Encodes a corpus as a job array, one GPU and one shard a task.

  sbatch --array=0-63 [SBATCH-OPTION …] slurm/encode.sh MODEL INPUT OUTPUT [ENCODE-OPTION …]
  sbatch --array=0-63%16 slurm/encode.sh runs/mistral_7b_instruct/supervised/encoder corpus.jsonl vectors --normalize

The array gives the number of shards N as 0-(N-1). %M runs at most M of them at once. The same command again encodes
what is missing. Finished shards are kept.
TEXT
}

main() {
  case ${1:-} in -h | --help) usage && exit 0 ;; esac
  [ $# -ge 3 ] || exit_code=2 fail "MODEL, INPUT and OUTPUT are needed (see --help)"
  refuse_option "$1" "$2" "$3"
  local model=$1 input=$2 output=$3 index n code=0
  shift 3
  need_job
  [ -n "${SLURM_ARRAY_TASK_ID:-}" ] || exit_code=2 fail "this is not a job array: submit with --array=0-7 for 8 shards"
  index=$SLURM_ARRAY_TASK_ID n=$SLURM_ARRAY_TASK_COUNT
  # shellcheck disable=SC2153 # SLURM's name, not a misspelling
  # A part of an array (--array=3,5) would count as a whole one and cut the corpus differently.
  if [ "$SLURM_ARRAY_TASK_MIN" != 0 ] || [ "$SLURM_ARRAY_TASK_MAX" != $((n - 1)) ]; then
    exit_code=2 fail "--array must be 0-(N-1) for N shards: give the whole array again, finished shards are kept"
  fi
  step_options
  export_defaults
  say "shard $index of $n of $input on $SLURM_JOB_NODELIST, attempt ${SLURM_RESTART_COUNT:-0}"
  mark_log
  on_first_node "$python" -m llm2vec_ds encode --model "$model" --input "$input" --output "$output" \
    --shard "$index/$n" "$@" || code=$?
  [ "$code" = 0 ] || exit_code=$code fail "shard $index of $n failed (code $code), submit the same array again once it is fixed: $(last_error || true)"
  say "shard $index of $n is in $output"
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
