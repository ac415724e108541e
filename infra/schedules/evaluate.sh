#!/usr/bin/env bash
# One tick of the scheduled evaluation: cron, the systemd service and the Kubernetes CronJob all start this file.
#
#   infra/schedules/evaluate.sh [flags of jobs/evaluate.py]
#
# It measures the last checkpoint of each run that lacks its result. A tick that finds another one running, or that is
# started twice, does nothing. With RAY_API_SERVER_ADDRESS the work is submitted to that cluster and waited for;
# without, it runs here.
#   DDPM_ENV_FILE   lines NAME=value to read first (/etc/ddpm/ddpm.env where it exists)
#   DDPM_TICK       name of the tick on the cluster; ddpm-evaluate-MINUTES when left out
#   DDPM_LOCK       file that ticks on one machine wait for
#   DDPM_PRINT=1    print the command and do nothing
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
env_file=${DDPM_ENV_FILE:-/etc/ddpm/ddpm.env}
if [ -e "$env_file" ]; then
  set -a
  # shellcheck source=/dev/null
  . "$env_file"
  set +a
elif [ -n "${DDPM_ENV_FILE:-}" ]; then
  echo "error: DDPM_ENV_FILE=$env_file does not exist" >&2
  exit 2
fi

# The environment of a clone, unless another one was chosen.
if [ -z "${DDPM_PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then
  DDPM_PYTHON=$root/.venv/bin/python
fi
evaluate=(jobs/evaluate.py --pending --last --max-checkpoints 8 "$@")
cd "$root"

if [ -z "${RAY_API_SERVER_ADDRESS:-}" ]; then
  command=("${DDPM_PYTHON:-python}" "${evaluate[@]}")
else
  # The command runs on the cluster, with the python of its image.
  tick=${DDPM_TICK:-ddpm-evaluate-$(($(date +%s) / 60))}
  ray=$(dirname "$(command -v "${DDPM_PYTHON:-python}")")/ray
  command=("$ray" job submit --submission-id "$tick" -- "${DDPM_CLUSTER_PYTHON:-python}" "${evaluate[@]}")
fi
if [ -n "${DDPM_PRINT:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi

exec 9>"${DDPM_LOCK:-${XDG_RUNTIME_DIR:-/run/lock}/ddpm-evaluate.lock}"
if ! flock --nonblock 9; then
  echo "another tick is running; this one has nothing to do"
  exit
fi
if [ -n "${RAY_API_SERVER_ADDRESS:-}" ] && "$ray" job status "$tick" >/dev/null 2>&1; then
  echo "tick $tick was submitted before; this one has nothing to do"
  exit
fi
exec "${command[@]}"
