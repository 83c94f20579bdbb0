#!/usr/bin/env bash
# SLURM and munge for tests/slurm, where they are missing and may be installed (root, apt).
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
for program in slurmctld slurmd sbatch munged; do
  command -v "$program" >/dev/null && continue
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
    exit 0
  fi
  echo "NOT TESTED: tests/slurm need $program, and this user cannot install it: apt-get install slurm-wlm munge" >&2
  exit 0
done
