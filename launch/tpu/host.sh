#!/bin/bash
# What tpu.sh has every host of the TPU do: host.sh install | start | status | stop; `loop` is what start leaves running.
set -u
code=$(cd "$(dirname "$0")/../.." && pwd)
# shellcheck source=settings.sh
. "$code/launch/tpu/settings.sh"
# shellcheck source=../restart.sh
. "$code/launch/restart.sh"
RESULT=$code/.result
NOTE=$code/.starts

install() {
    set -e
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y nfs-common
    sudo mkdir -p "$MOUNT"
    attach
    sudo chown "$USER" "$MOUNT"
    curl -LsSf https://astral.sh/uv/install.sh | sh
    "$HOME/.local/bin/uv" venv --quiet --allow-existing --python "$PYTHON" "$code/.venv"
    "$HOME/.local/bin/uv" pip install --quiet --python "$code/.venv/bin/python" -e "${code}[tpu]"
}

# Also at every start: a host that was restarted has lost it.
attach() { mountpoint -q "$MOUNT" || sudo mount -t nfs -o nconnect=8 "$SHARE" "$MOUNT"; }

# systemd keeps the run when the connection ends, and ends it by SIGTERM when the host is shut down.
start() {
    systemctl is-active --quiet sdv && return
    rm -f "$RESULT" "$NOTE"
    attach || return
    mkdir -p "$WORKDIR/logs" || return
    sudo systemd-run --quiet --collect --unit=sdv --uid="$USER" -p KillMode=mixed -p TimeoutStopSec="$GRACE" \
        -p StandardOutput="append:$WORKDIR/logs/$(hostname).log" \
        -p StandardError="append:$WORKDIR/logs/$(hostname).log" \
        bash "$code/launch/tpu/host.sh" loop
}

status() {
    local told=idle
    if systemctl is-active --quiet sdv; then
        told=running
    elif [[ -e $RESULT ]]; then
        told=$(<"$RESULT")
    fi
    echo "$(hostname): $told"
}

# The mark comes first: while the checkpoint is written systemd calls the unit neither active nor gone.
stop() {
    [[ -e $RESULT ]] || echo stop >"$RESULT"
    sudo systemctl stop sdv
}

# Every host starts its own process again; they find each other anew, all or none. SIGTERM ends the loop and leaves no
# result: it may come of a host that is shut down, which has to be found idle later.
loop() {
    local ending=false child='' code_of decision=again
    cd "$code" || exit 2
    trap 'ending=true; [[ -z $child ]] || kill -TERM "$child"' TERM
    while [[ $decision == again ]]; do
        .venv/bin/sdv train --config "$CONFIG" --workdir "$WORKDIR" --coordinator auto "${TRAIN[@]}" &
        child=$!
        wait "$child"
        code_of=$?
        while kill -0 "$child" 2>/dev/null; do  # a signal ends `wait` before the process ends
            wait "$child"
            code_of=$?
        done
        if $ending; then
            echo "sdv: exit status $code_of, checkpoint $(newest_checkpoint "$WORKDIR"): ended by SIGTERM"
            return
        fi
        decision=$(decide "$code_of" "$WORKDIR" "$STARTS" "$NOTE")
        echo "sdv: exit status $code_of, checkpoint $(newest_checkpoint "$WORKDIR"): $decision"
    done
    echo "$decision" >"$RESULT"
}

case ${1-} in
install | start | status | stop | loop) "$1" ;;
*) echo "host.sh install | start | status | stop | loop" >&2; exit 2 ;;
esac
