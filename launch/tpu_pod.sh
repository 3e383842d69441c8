#!/usr/bin/env bash
# A run on all hosts of a Cloud TPU slice, one process a host:
#     launch/tpu_pod.sh [OPTIONS] TPU ZONE setup          copies this repository to every host and installs it
#     launch/tpu_pod.sh [OPTIONS] TPU ZONE run COMMAND    starts COMMAND --distributed on every host
#     launch/tpu_pod.sh [OPTIONS] TPU ZONE logs           follows the log of host 0 (Ctrl-C stops only the following)
#     launch/tpu_pod.sh [OPTIONS] TPU ZONE status         says whether it runs, and the last line of each host's log
#     launch/tpu_pod.sh [OPTIONS] TPU ZONE stop           SIGTERM: the run saves and ends; run COMMAND continues it
# For example, with a disk that all hosts mount at /mnt/shared:
#     launch/tpu_pod.sh my-v5e-16 us-west4-a run \
#         python -m imagereward_jax.train --config configs/refl_sdxl_lora.py --workdir /mnt/shared/runs/lora
# Runs go on when this machine goes away. After a preemption: make the TPU again, then setup and run as before.
# OPTIONS: --project P; --dry-run prints the gcloud commands. JAX_COMPILATION_CACHE_DIR is passed on where it is set: in
# a folder that all hosts share, a restart compiles nothing on any of them.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}
usage() {
    sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

dry_run="" project=()
while [[ ${1:-} == --* ]]; do
    case $1 in
    --dry-run) dry_run=1 ;;
    --project)
        [ -n "${2:-}" ] || fail "--project needs a name"
        project=(--project="$2")
        shift
        ;;
    --project=?*) project=("$1") ;;
    *) fail "unknown option $1; options are --project P and --dry-run, and come before the TPU's name" ;;
    esac
    shift
done
[ $# -ge 3 ] || usage
tpu=$1 zone=$2 action=$3
shift 3
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "ZONE $zone: expected one such as us-west4-a"
case $action in
run) [ $# -gt 0 ] || fail "run needs a command, such as python -m imagereward_jax.train --config ... --workdir ..." ;;
setup | logs | status | stop) [ $# -eq 0 ] || fail "$action takes no arguments: $*" ;;
*) fail "unknown action $action: expected setup, run, logs, status or stop" ;;
esac
[ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud is not installed (the Google Cloud CLI)"

call() {
    if [ -n "$dry_run" ]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}
# on WORKER COMMAND: runs COMMAND in a shell there; WORKER is a number or all.
on() {
    call gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" "${project[@]}" --worker="$1" --command="$2"
}

folder=imagereward-jax # in the home directory of each host, with run.pid and run.log beside the code
alive="[ -f $folder/run.pid ] && kill -0 \$(cat $folder/run.pid) 2>/dev/null"
case $action in
setup)
    archive=$(mktemp -d)/$folder.tar.gz
    trap 'rm -r "$(dirname "$archive")"' EXIT
    git -C "$(dirname "$0")" rev-parse --is-inside-work-tree >/dev/null || fail "setup sends what git holds: clone it"
    git -C "$(dirname "$0")/.." archive --format=tar.gz --output="$archive" HEAD
    call gcloud compute tpus tpu-vm scp "$archive" "$tpu:" --zone="$zone" "${project[@]}" --worker=all
    # uv brings a Python that is new enough, which the hosts' own may not be.
    on all "set -e; mkdir -p $folder; tar xzf $folder.tar.gz -C $folder; cd $folder
python3 -m pip install --user -q uv || python3 -m pip install --user -q --break-system-packages uv
export PATH=\$HOME/.local/bin:\$PATH
[ -d .venv ] || uv venv -q --python 3.12 .venv
uv pip install -q -p .venv/bin/python -e '.[train,tpu]'"
    ;;
run)
    cache=()
    [ -z "${JAX_COMPILATION_CACHE_DIR:-}" ] || cache=(env "JAX_COMPILATION_CACHE_DIR=$JAX_COMPILATION_CACHE_DIR")
    command=$(printf '%q ' "${cache[@]}" "$@" --distributed)
    # All hosts are asked before any starts: the others would wait for the one that cannot.
    on all "[ -d $folder/.venv ] || { echo \"\$(hostname): not installed: run setup first\" >&2; exit 1; }
if $alive; then echo \"\$(hostname): a run is going on: stop it first\" >&2; exit 1; fi"
    on all "cd $folder && export PATH=\$PWD/.venv/bin:\$PATH && { nohup $command>>run.log 2>&1 </dev/null & } && echo \$! >run.pid"
    [ -n "$dry_run" ] || echo "started; launch/tpu_pod.sh $tpu $zone logs shows how it goes" >&2
    ;;
logs) on 0 "tail -n 100 -F $folder/run.log" ;;
status) on all "if $alive; then echo \"\$(hostname): running\"; else echo \"\$(hostname): not running\"; fi
[ ! -f $folder/run.log ] || tail -n 1 $folder/run.log" ;;
stop) on all "if $alive; then kill -TERM \$(cat $folder/run.pid); else echo \"\$(hostname): not running\"; fi" ;;
esac
