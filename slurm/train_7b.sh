#!/usr/bin/env bash
#SBATCH --job-name=llm2vec-train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
set -euo pipefail
me=train_7b asked='' interrupted='' training='' output_dir='' node_failure_told='' too_early='asked to stop before training began'

usage() {
  cat <<'TEXT'
Runs one training stage as a SLURM job, one task for each GPU. After a preemption, the time limit or a lost
node, it resumes by itself.

  source slurm/site.env                     # partition, account, caches: once in a shell
  sbatch slurm/train_7b.sh                  # Mistral-7B, MNTP, 4 nodes of 8 GPUs
  sbatch [SBATCH-OPTION …] slurm/train_7b.sh [RECIPE] [KEY=VALUE …]
  sbatch --nodes=1 --ntasks-per-node=4 --gpus-per-node=4 slurm/train_7b.sh recipes/qwen3_0.6b/mntp.yaml max_steps=500

Submit it from the folder that holds slurm/. A node runs one task per GPU, so
`--ntasks-per-node` and `--gpus-per-node` are equal. A cluster without GPUs takes 0 GPUs (slurm/site.env).
  to stop it for good   touch OUTPUT_DIR/STOP   (saves and ends; remove STOP and submit again to resume)
  to move it now        scancel --batch --signal=USR1 JOB   (saves and goes back into the queue)
Settings (slurm/site.env): LLM2VEC_DS_MAX_REQUEUES, LLM2VEC_DS_PREFLIGHT, LLM2VEC_DS_CONTAINER_IMAGE, …
TEXT
}

read_arguments() { # [RECIPE] [KEY=VALUE …]
  refuse_option "$@"
  recipe=recipes/mistral_7b_instruct/mntp.yaml
  case ${1:-} in
    '' | *=*) ;;
    *) recipe=$1 && shift ;;
  esac
  overrides=("$@")
  [ -f "$recipe" ] || exit_code=2 fail "recipe $recipe not found in $PWD: give a path from the folder that you submit from"
}

begin() {
  local ranks="$SLURM_NTASKS ranks"
  [ "$SLURM_NTASKS" != 1 ] || ranks='1 rank'
  say "attempt ${SLURM_RESTART_COUNT:-0} begins $(date +%FT%T%:z): $recipe ${overrides[*]} on $SLURM_JOB_NODELIST, $ranks"
  began=1
}

describe_run() { # writes facts beside the log; the lines that this script needs come first
  facts=${log%.out}.${SLURM_RESTART_COUNT:-0}.facts
  case $log in '' | /dev/*) facts=$SLURM_JOB_NAME-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}.facts ;; esac
  {
    on_first_node "$python" slurm/run_facts.py "$recipe" "${overrides[@]}" ||
      fail "the run cannot start: $(last_error || true)"
    printf '\n# code\ngit=%s\n' "$(git describe --always --dirty --abbrev=40 2>/dev/null || echo unknown)"
  } >"$facts"
  output_dir=$(sed -n '1s/^output_dir=//p' "$facts")
  export_rendezvous "$(sed -n '2s/^address=//p' "$facts")"
  say "rank 0 at $MASTER_ADDR:$MASTER_PORT, facts in $facts"
}

check_nodes() { # not if a signal has come: the job will end anyway
  [ -z "$asked" ] || return 0
  case ${LLM2VEC_DS_PREFLIGHT:-0} in
    0) ;;
    1) began=1 slurm/preflight.sh "$output_dir" || exit "$?" ;;
    cpu) began=1 slurm/preflight.sh --cpu "$output_dir" || exit "$?" ;;
    *) exit_code=2 fail "LLM2VEC_DS_PREFLIGHT=$LLM2VEC_DS_PREFLIGHT must be 1, 0 or cpu (nodes without GPU)" ;;
  esac
}

# A signal reaches this shell only (`B:`). The shell passes it to srun, and srun passes it to every rank. TERM is passed
# as USR1, because srun kills its tasks on TERM. The signal is repeated, because a rank that is still importing
# ignores it.
ask_to_stop() {
  interrupted=1
  [ -z "$asked" ] || return 0
  asked=1
  ! node_has_failed || return 0
  say "asked to stop: the ranks will save after the current step"
  [ -z "$training" ] || repeat_signal &
}
repeat_signal() {
  while kill -USR1 "$training" 2>/dev/null; do sleep 10; done
}

train() { # sets `code`; a trapped signal ends `wait`, so it is called until no signal interrupts it
  srun "${all_ranks[@]}" "${common_options[@]}" \
    "$python" slurm/rank.py train "$recipe" resume=true "${overrides[@]}" &
  training=$!
  [ -z "$asked" ] || repeat_signal &
  until
    interrupted='' code=0
    wait "$training" || code=$?
    [ -z "$interrupted" ]
  do :; done
}

requeue() { # why
  local limit=${LLM2VEC_DS_MAX_REQUEUES:-100} attempt=${SLURM_RESTART_COUNT:-0} state
  [ "$attempt" -lt "$limit" ] ||
    fail "$1, but $attempt restarts are the limit: submit it again, or raise LLM2VEC_DS_MAX_REQUEUES"
  state=$(job_state)
  [ "$state" = RUNNING ] || ! is_requeued || { say "$(ending)$1: SLURM puts the job back into the queue" && return; }
  [ "$state" = RUNNING ] || fail "$1, but SLURM is ending the job ($state): submit it again to resume"
  say "$(ending)$1: back into the queue"
  scontrol requeue "$SLURM_JOB_ID" ||
    fail "$1, but SLURM refuses to requeue: submit it again to resume (JobRequeue=1 without --no-requeue allows it)"
}

# grep reads to the end. With -q it would break the pipe, which counts as a failure.
said_by_srun() { marked_log | grep -a "^srun: .*\($1\)" >/dev/null; }

is_requeued() { # by SLURM itself, while this attempt still ends
  local restarts
  restarts=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p')
  [ "${restarts:-0}" -gt "${SLURM_RESTART_COUNT:-0}" ]
}

newest_checkpoint() { find "$output_dir/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null | sort | tail -n 1; }

# Does SLURM end the job because a node has failed? Then SLURM has sent the TERM, not a user. Nothing can be saved.
node_has_failed() {
  local nodes checkpoint after='submit it again'
  nodes=$(marked_log | sed -n 's/^srun: error: Node failure on //p' | tail -n 1)
  [ -n "$nodes" ] && [ "$(job_state)" != RUNNING ] || return 1
  [ -z "$node_failure_told" ] || return 0
  node_failure_told=1
  checkpoint=$(newest_checkpoint || true)
  ! is_requeued || after='SLURM puts the job back into the queue'
  say "$(ending)node $nodes has failed: $after, it goes on from ${checkpoint:-step 1 (there is no checkpoint yet)}"
}

is_preempted() { scontrol show job "$SLURM_JOB_ID" | grep 'PreemptTime=[0-9]' >/dev/null; }

# Was the step ended by a signal that came before its ranks ignored or handled signals? Either this shell passed it on
# (138 if srun itself had just started), or it is TERM, which SLURM sends to the ranks of a job that it preempts.
ended_by_signal() {
  if [ -n "$asked" ]; then
    [ "$code" = 138 ] || said_by_srun 'User defined signal 1\|pending job step with signal'
  else
    is_preempted && said_by_srun 'Terminated'
  fi
}

heed_stop_file() { # only after everything is saved, or before anything has begun
  [ -e "$output_dir/STOP" ] || return 0
  say "$(ending)stopped as asked by $output_dir/STOP, everything saved. To go on, remove that file and submit again"
  exit 75
}

judge() { # decides what the step's exit code means for the job
  local silent
  trap : USR1 USR2 TERM # nothing runs that could save, and a second ending would contradict the first
  if node_has_failed; then
    exit "$code"
  elif [ -e "$STOPPED_NOTE" ]; then
    rm -f "$STOPPED_NOTE"
    heed_stop_file
    requeue "stopped as asked, everything saved"
  elif [ "$code" = 0 ]; then
    say "$(ending)finished: $output_dir"
  elif ended_by_signal; then
    heed_stop_file
    requeue "$too_early"
  else
    if [ "$(job_state)" != RUNNING ]; then
      ! node_has_failed || exit "$code" # SLURM has found it in the meantime
      exit_code=$code fail "ended by SLURM before it could save (the job is $(job_state)): submit it again to resume"
    fi
    silent=$(silent_nodes | sort | tr '\n' ' ')
    ! node_has_failed || exit "$code" # or while the script asked the nodes
    [ -z "$silent" ] || { requeue "lost node ${silent% }" && return; }
    exit_code=$code fail "training failed (code $code): $(last_error || true)"
  fi
}

main() {
  case ${1:-} in -h | --help) usage && exit 0 ;; esac
  need_job
  read_arguments "$@"
  step_options
  export_defaults
  trap ask_to_stop USR1 USR2 TERM
  begin
  mark_log
  describe_run
  [ ! -e "$output_dir/STOP" ] || exit_code=75 fail "$output_dir/STOP keeps this run from starting: remove it first"
  check_nodes
  [ -z "$asked" ] || { requeue "$too_early" && return; }
  export STOPPED_NOTE=$output_dir/stopped.$SLURM_JOB_ID
  rm -f "$STOPPED_NOTE"
  mark_log
  train
  judge
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
