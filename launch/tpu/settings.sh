# shellcheck shell=bash disable=SC2034
# Settings of the scripts beside this, here and on the TPU hosts. Edit.
PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-east5-b}
NETWORK=${NETWORK:-default}               # the one that the Filestore instance is in
NAME=${NAME:-sdv}                         # of the queued resource and its TPU
ACCELERATOR=${ACCELERATOR:-v6e-16}        # 16 chips, 4 hosts; v5litepod-16, v5p-32
RUNTIME=${RUNTIME:-v2-alpha-tpuv6e}       # v2-alpha-tpuv5-lite, v2-alpha-tpuv5
CAPACITY=${CAPACITY:---spot}              # or --reserved, or empty for on demand
SHARE=${SHARE:-10.0.0.2:/sdv}             # ADDRESS:/NAME of the Filestore share
MOUNT=${MOUNT:-/mnt/sdv}                  # where every host mounts it
PYTHON=${PYTHON:-3.12}                    # the runtime's own is too old

CONFIG=${CONFIG:-configs/cogvideox_5b_subject.py}
WORKDIR=${WORKDIR:-$MOUNT/runs/subject}   # what the run leaves, on the share
STARTS=${STARTS:-10}                      # give up when so many starts in a row end at the same checkpoint; while a
                                          # host restarts, each of the others' ends after train.heartbeat
GRACE=${GRACE:-300}                       # seconds that `stop` gives for three more steps and a checkpoint
POLL=${POLL:-60}                          # seconds between the looks of `watch`
TRAIN=(
    --config.model.path="$MOUNT/models/cogvideox-5b"
    --config.data.identity="$MOUNT/data/pairs"
    --config.data.motion="$MOUNT/data/clips"
    --config.identity.batch_size=256      # over all chips; a multiple of chips x train.accumulate
    --config.motion.batch_size=32
    --config.train.accumulate=2
    --config.train.save_every=100         # what a preemption costs
    --config.train.heartbeat=120
    --config.mesh.fsdp=4                  # the chips of a host
)
