# shellcheck shell=bash disable=SC2034,SC2154
# Functions that the scripts of this folder share. Each script sets `me` (its name in messages) and sources this file.

say() { echo "$me: $*"; }

# The time and the number of the attempt that ends, once an attempt has begun (train_7b sets `began`).
ending() { [ -z "${began:-}" ] || echo "attempt ${SLURM_RESTART_COUNT:-0} ends $(date +%FT%T%:z): "; }

fail() { # one line with cause and fix, then the end of the script
  echo "$me: error: $(ending)$*" >&2
  exit "${exit_code:-1}"
}

refuse_option() { # ends the script if one of these arguments looks like an option of sbatch
  local argument
  for argument in "$@"; do
    case $argument in -*) exit_code=2 fail "unknown option $argument: put sbatch's options before the script's name (see --help)" ;; esac
  done
}

need_job() { # ends a script that SLURM does not run
  [ -n "${SLURM_JOB_ID:-}" ] || exit_code=2 fail "this is a batch script, submit it: sbatch slurm/$me.sh (see --help)"
  root=${LLM2VEC_DS_ROOT:-$PWD}
  cd "$root" || exit_code=2 fail "the folder $root is not on this node: it must be on a disk that all nodes share"
}

log_file() { # the file that this job writes to; the number of an array's last task would also name the others
  local job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  scontrol show job "${job:-$SLURM_JOB_ID}" | sed -n 's/^ *StdOut=//p'
}

# What the log gets from here on is searched for the cause, if a step fails.
mark_log() {
  log=$(log_file)
  log_lines_before=$(wc -l <"$log") || log='' # then last_error knows nothing
}
marked_log() { [ -z "${log:-}" ] || tail -n +"$((${log_lines_before:-0} + 1))" "$log"; }

# Of the failed step: the program's own line, not that of a rank that lost another. Else what keeps Python from running.
# Else srun's first line.
last_error() {
  local lines
  lines=$(marked_log | grep -a 'llm2vec-ds: error:\|^srun: error:.*task\|execve()\|ModuleNotFoundError:' || true)
  {
    grep 'llm2vec-ds: error:' <<<"$lines" | grep -v 'has lost another rank' || no_python <<<"$lines" ||
      grep '^srun: error:' <<<"$lines" || echo "see ${log:-above}"
  } | head -n 1
}

no_python() { # reads lines of the log; says what is wrong with Python, if that is the fault
  local what
  what=$(sed -n 's/.*execve(): \(.*\)/\1/p; s/.*ModuleNotFoundError: \(No module named [^ )]*\).*/\1/p' | head -n 1)
  [ -n "$what" ] && echo "$python cannot run llm2vec-ds ($what): activate its environment before sbatch, or set LLM2VEC_DS_PYTHON"
}

job_state() { squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || echo unknown; }

# Options of srun for every step. srun does not take the CPUs over from sbatch (since SLURM 22.05). If the site has a
# container (pyxis), the repository is mounted in it at its own path.
step_options() {
  common_options=(${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"})
  [ -z "${LLM2VEC_DS_CONTAINER_IMAGE:-}" ] || common_options+=(
    --container-image="$LLM2VEC_DS_CONTAINER_IMAGE"
    --container-mounts="$root:$root${LLM2VEC_DS_CONTAINER_MOUNTS:+,$LLM2VEC_DS_CONTAINER_MOUNTS}"
    --container-workdir="$root"
  )
}

# Options for a step of all tasks. A task that fails ends the others at once. When one has ended, the rest get a minute.
# Without these two, a single lost rank would hold all nodes until the job's time limit.
all_ranks=(--kill-on-bad-exit=1 --wait=60)

first_node() { scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1; }

on_first_node() { # one task where rank 0 will be
  srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$(first_node)" "${common_options[@]}" "$@"
}

silent_nodes() { # names of the job's nodes on which no command starts
  local node
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    timeout "${LLM2VEC_DS_NODE_TIMEOUT_S:-60}" srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 \
      --nodelist="$node" true >/dev/null 2>&1 || echo "$node" &
  done
  wait
}

address_of_first_node() {
  on_first_node "$python" -m llm2vec_ds.network || fail "rank 0 has no address: $(last_error || true)"
}

# Rank 0's address and port for all ranks. The address is a number, so no name has to resolve. The port depends on job
# and attempt. So a second job on a shared node, or a leftover process, does not block it.
export_rendezvous() { # address
  export MASTER_ADDR=$1 MASTER_PORT=$((20000 + (SLURM_JOB_ID * 31 + ${SLURM_RESTART_COUNT:-0}) % 12000))
  unset RANK WORLD_SIZE LOCAL_RANK # these come from the shell that submitted; SLURM's own variables count
}

export_defaults() {
  # These hold unless the site sets them.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
  export PYTHONUNBUFFERED=1
  # Minutes that a collective (NCCL or gloo) waits for the other ranks. DeepSpeed's own default is 10. It must be longer
  # than the recipe's `step_timeout_s`, whose message names rank and step. It must also be longer than rank 0 takes to
  # prepare texts while the others wait.
  export DEEPSPEED_TIMEOUT=${DEEPSPEED_TIMEOUT:-60}
  # NCCL: an error on one rank's connection ends the rank. Otherwise it would stay in a kernel for ever.
  export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
  if [ -n "${LLM2VEC_DS_INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$LLM2VEC_DS_INTERFACE}
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$LLM2VEC_DS_INTERFACE}
  fi
  # The checkout that the job was submitted from runs, even if another version is installed. A folder that
  # `llm2vec-ds init` wrote has no checkout.
  [ ! -d "$root/llm2vec_ds" ] || export PYTHONPATH=$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}
  python=${LLM2VEC_DS_PYTHON:-python}
}
