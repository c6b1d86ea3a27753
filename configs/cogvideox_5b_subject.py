"""The subject adapter on CogVideoX-5B with paper A's settings (arXiv 2504.17816): LoRA of rank 128, 4,000 steps.

Target: the paper's CogVideoX row (CLIP-I 77.1, DINO-I 62.9 and dynamic degree 69.6 on its own benchmark). The paper
reports 288 A100-hours in all. This configuration has not been run at full size, and its memory is not measured. Data:
pairs and clips prepared at 480 × 720, clips of 49 frames at 8 per second.

    sdv convert CogVideoX-5b models/cogvideox-5b --dtype bfloat16
    sdv prepare --config configs/prepare_subjects200k.py --config.source.path=Subjects200K \\
        --config.model.path=models/cogvideox-5b --config.output.path=data/pairs
    sdv prepare --config configs/prepare_pexels.py --config.source.path=pexels \\
        --config.model.path=models/cogvideox-5b --config.output.path=data/clips
    sdv train --config configs/cogvideox_5b_subject.py --workdir runs/subject

Batches are the paper's, over all devices: 256 pairs or 32 clips, computed in parts so that a device holds one clip or
eight pairs at a time. devices × train.accumulate must divide 32: 8 devices and 4 parts as below, 32 devices and 1, or
one device and 32 (with mesh.fsdp = 1). More hosts: launch/slurm, launch/gke, launch/tpu.
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.path = "models/cogvideox-5b"
    config.model.dtype = "bfloat16"
    config.data.identity = "data/pairs"
    config.data.motion = "data/clips"
    config.train.dtype = "bfloat16"
    config.train.accumulate = 4
    config.mesh.fsdp = 8
    config.identity.batch_size = 256
    config.motion.batch_size = 32
    config.validation.rows = 256
    config.validation.every = 500
    return config
