# shellcheck shell=bash disable=SC2034
# Settings of the YAML files beside this; submit.sh puts them in. Edit.
NAME=subject                              # of the run; at most 30 letters, digits and -
NAMESPACE=default
IMAGE=us-docker.pkg.dev/MY_PROJECT/sdv/sdv_jax:gpu
CLAIM=sdv-data                            # the volume that all nodes share, mounted at /data (storage.yaml)
STORAGE_SIZE=2560Gi

CONFIG=configs/cogvideox_5b_subject.py
MODEL=/data/models/cogvideox-5b
PAIRS=/data/pairs
CLIPS=/data/clips
WORKDIR=/data/runs/subject
IDENTITY_BATCH=256                        # over all devices; a multiple of devices x ACCUMULATE
MOTION_BATCH=32
ACCUMULATE=2
SAVE_EVERY=100                            # what a node that dies without a warning costs
HEARTBEAT=300                             # silence, and waiting for a node that still pulls the image
GRACE=300                                 # seconds for three more steps and a checkpoint; a Spot node gives 15 (README)
RESTARTS=50

# train_gpu.yaml
NODES=2
GPU=nvidia-tesla-a100                     # nvidia-a100-80gb, nvidia-h100-80gb: as `cloud.google.com/gke-accelerator` says
GPUS_PER_NODE=8
PORT=55527

# train_tpu.yaml, with an image of ACCELERATOR=tpu
TPU=tpu-v6e-slice                         # tpu-v5-lite-podslice, tpu-v5p-slice
TOPOLOGY=4x4
HOSTS=4                                   # of the slice: chips of TOPOLOGY / CHIPS_PER_HOST
CHIPS_PER_HOST=4

# prepare.yaml, with an image of ACCELERATOR=gpu
PREPARE_CONFIG=configs/prepare_pexels.py
PREPARE_SOURCE=/data/raw/pexels
PREPARE_OUTPUT=/data/clips
PREPARE_PROCESSES=16                      # one GPU each
