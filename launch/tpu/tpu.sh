#!/bin/bash
# Trains on a Cloud TPU slice through a queued resource. See README.md beside it.
#
#   tpu.sh create | install | start     the three steps; create waits until the TPU is there
#   tpu.sh watch                        does them, and does them again after a preemption, until the run is done
#   tpu.sh status | log                 of the hosts; the end of the first host's log
#   tpu.sh run COMMAND                  on the first host, in the checkout: tpu.sh run 'sdv --help'
#   tpu.sh stop | delete                ends the run after a checkpoint; gives the TPU back
set -u
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=settings.sh
. "$here/settings.sh"
PLACE=(--project="$PROJECT" --zone="$ZONE")

queue() { gcloud compute tpus queued-resources "$@" "${PLACE[@]}"; }
on() { gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker="$1" --command="$2"; }
state() { queue describe "$NAME" --format='value(state.state)' 2>/dev/null || echo NONE; }

create() {
    local now
    now=$(state)
    if [[ $now == NONE ]]; then
        # shellcheck disable=SC2086
        queue create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" \
            --network="$NETWORK" $CAPACITY || return
    fi
    while now=$(state); [[ $now != ACTIVE ]]; do
        echo "$(date +%T) $NAME: $now"
        [[ $now == FAILED || $now == SUSPENDED || $now == NONE ]] && return 1
        sleep "$POLL"
    done
}

install() {
    local packed
    packed=$(mktemp -d)/sdv_jax.tar.gz
    # What lies at the top, and not tar's --exclude, which would leave out sdv_jax/data too.
    (cd "$here/../.." && GLOBIGNORE='.*:data:runs' && tar -czf "$packed" --exclude=__pycache__ -- *) || return
    gcloud compute tpus tpu-vm scp "$packed" "$NAME:/tmp/sdv_jax.tar.gz" "${PLACE[@]}" --worker=all || return
    on all "mkdir -p ~/sdv_jax && tar -xzf /tmp/sdv_jax.tar.gz -C ~/sdv_jax && bash ~/sdv_jax/launch/tpu/host.sh install"
}

again() {
    if [[ $(state) != NONE ]]; then queue delete "$NAME" --force --quiet || return; fi
    create && install && on all "$START"
}

watch() {
    local told
    while true; do
        if [[ $(state) != ACTIVE ]]; then
            echo "$(date +%T) $NAME: $(state); asking for a TPU"
            again || sleep "$POLL"
            continue
        fi
        told=$(on all "$STATUS" 2>/dev/null)
        echo "$(date +%T) ${told//$'\n'/, }"
        case $told in
        *stop*) return 1 ;;
        *missing*) install && on all "$START" ;;
        *idle*) on all "$START" ;;
        *running* | '') ;;
        *done*) return 0 ;;
        esac
        sleep "$POLL"
    done
}

HOST='bash ~/sdv_jax/launch/tpu/host.sh'
START="$HOST start"
STATUS="if [ -e ~/sdv_jax/.venv/bin/sdv ]; then $HOST status; else echo \$(hostname): missing; fi"
case ${1-} in
create | install | watch) "$1" ;;
start) on all "$START" ;;
status) queue describe "$NAME" --format='value(state.state)' && on all "$STATUS" ;;
log) on 0 "tail -n 30 $WORKDIR/logs/\$(hostname).log" ;;
run) on 0 "cd ~/sdv_jax && PATH=\$PWD/.venv/bin:\$PATH && ${2:?tpu.sh run COMMAND}" ;;
stop) on all "$HOST stop" ;;
delete) queue delete "$NAME" --force ;;
*) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
