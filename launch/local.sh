#!/usr/bin/env bash
# N processes on this machine with D virtual CPU devices each, as one run:
#     launch/local.sh N D python -m imagereward_jax.train --config configs/refl_tiny.py --workdir runs/two
# Flags that tell the processes of each other are added to the command. PORT=... chooses the port (default 12421).
# Ends when all have ended, or when one fails, with its status; logs of process I are prefixed with "[I]".
set -u
if [ $# -lt 3 ]; then
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
processes=$1 devices=$2 port=${PORT:-12421}
shift 2
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM
for ((i = 0; i < processes; i++)); do
    JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices" \
        "$@" --coordinator="127.0.0.1:$port" --num-processes="$processes" --process-id="$i" \
        > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
    pids+=($!)
    echo "process $i is $!" >&2
done
status=0
left=$processes
while [ "$left" -gt 0 ]; do
    wait -n -p ended "${pids[@]}"
    code=$?
    if [ -z "${ended:-}" ]; then continue; fi # a signal to this script, which has passed it on
    left=$((left - 1))
    for i in "${!pids[@]}"; do
        if [ "${pids[$i]}" = "$ended" ]; then
            name=$i
            unset "pids[$i]"
        fi
    done
    if [ "$code" -ne 0 ] && [ "$status" -eq 0 ]; then
        status=$code
        # The others would wait for it. Signals that ask for an orderly end (130, 143) reach all of them.
        if [ "$left" -gt 0 ] && [ "$code" -ne 130 ] && [ "$code" -ne 143 ]; then
            echo "process $name ended with status $code: the others cannot go on without it and are stopped;" \
                "the same command continues the run from its latest checkpoint" >&2
            kill -KILL "${pids[@]}" 2>/dev/null
        fi
    fi
done
exit "$status"
