#!/bin/bash
# submit.sh FILE.yaml: kubectl apply of FILE with the settings put in; submit.sh --show FILE.yaml prints it instead.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
set -a
# shellcheck source=settings.sh
. "$here/settings.sh"
# Device numbers of a node, 0,1,...: JAX takes all of them for the one process of a node.
# shellcheck disable=SC2034
GPU_IDS=$(seq -s, 0 $((GPUS_PER_NODE - 1)))
set +a
show=false
if [[ ${1-} == --show ]]; then
    show=true
    shift
fi
file=${1:?submit.sh [--show] FILE.yaml}
# shellcheck disable=SC2016
for name in $(grep -o '\${[A-Z_]*}' "$file" | sort -u | tr -d '${}'); do
    [[ -n ${!name-} ]] || { echo "submit.sh: $name is not set in settings.sh" >&2; exit 2; }
done
if $show; then envsubst <"$file"; else envsubst <"$file" | kubectl apply -f -; fi
