#!/usr/bin/env bash
# One tick of the scheduled evaluation: cron, the systemd service and the Kubernetes CronJob all start this file.
#
#   infra/schedules/evaluate.sh [flags of jobs/evaluate.py]
#
# It measures the last checkpoint of each run that lacks its result. A tick that finds another one running, or that is
# started twice, does nothing. With RAY_API_SERVER_ADDRESS the work is submitted to that cluster and waited for, and a
# tick that is ended (SIGTERM, SIGINT) stops it; without, it runs here. Exit code 0 means that the job succeeded.
#   DDPM_ENV_FILE   lines NAME=value to read first (/etc/ddpm/ddpm.env where it exists)
#   DDPM_TICK       name of the tick on the cluster; ddpm-evaluate-MINUTES when left out
#   DDPM_LOCK       file that ticks of one machine share, whoever starts them (/run/lock/ddpm-evaluate.lock)
#   DDPM_PATIENCE   seconds for which the cluster may not answer (900)
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
  command=("$ray" job submit --no-wait --submission-id "$tick" -- "${DDPM_CLUSTER_PYTHON:-python}" "${evaluate[@]}")
fi
if [ -n "${DDPM_PRINT:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi

# Opened for reading: another user's file will do.
lock=${DDPM_LOCK:-/run/lock/ddpm-evaluate.lock}
if ! { [ -e "$lock" ] || : >"$lock"; } 2>/dev/null || [ ! -r "$lock" ]; then
  echo "error: cannot open the lock $lock: name one in a folder that $(id -un) may write to, DDPM_LOCK=FILE in $env_file" >&2
  exit 2
fi
exec 9<"$lock"
if ! flock --nonblock 9; then
  echo "another tick is running; this one has nothing to do"
  exit
fi
if [ -z "${RAY_API_SERVER_ADDRESS:-}" ]; then
  exec "${command[@]}"
fi
trap 'exit 130' TERM INT # process 1 of a container ignores what it does not name
if "$ray" job status "$tick" >/dev/null 2>&1; then
  echo "tick $tick was submitted before; this one has nothing to do"
  exit
fi

# The job outlives this process unless it is stopped: a pod that is evicted or past its deadline takes it along.
child=
submitting=
stop() {
  trap '' TERM INT
  echo "error: interrupted; the job $tick is stopped" >&2
  if [ -n "$submitting" ]; then
    wait "$child" || true # a submission under way arrives all the same
  elif [ -n "$child" ]; then
    kill "$child" 2>/dev/null || true
  fi
  timeout 45 "$ray" job stop "$tick" >&2 || echo "error: the job $tick could not be stopped" >&2
  exit 130
}
trap stop TERM INT

# In the background: a trap runs when a wait is interrupted, not before another command ends.
attend() {
  "$@" &
  child=$!
  wait "$child"
}

submitting=1
attend "${command[@]}"
submitting=
# The connection that carries the log may break while the job goes on: what counts is the job's status.
answered=$SECONDS
while true; do
  attend "$ray" job logs --follow "$tick" || true
  exec 8< <(exec timeout 60 "$ray" job status --log-color false "$tick" 2>&1)
  child=$!
  if wait "$child"; then answered=$SECONDS; fi
  said=$(cat <&8)
  case $said in
    *"Job '$tick' failed"*)
      printf '%s\n' "$said" >&2
      exit 1
      ;;
    *"Job '$tick' was stopped"*)
      echo "error: the job $tick was stopped" >&2
      exit 1
      ;;
    *"Job '$tick' succeeded"*) exit 0 ;;
    *"Job $tick does not exist"*)
      echo "error: the cluster no longer knows the job $tick: its head was replaced" >&2
      exit 1
      ;;
  esac
  if [ $((SECONDS - answered)) -ge "${DDPM_PATIENCE:-900}" ]; then
    echo "error: no answer of the cluster for $((SECONDS - answered)) s; the job $tick may still run" >&2
    exit 1
  fi
  echo "the log of $tick broke off; it is read again from its start"
  attend sleep 5
done
