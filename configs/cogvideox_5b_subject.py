"""The subject adapter on CogVideoX-5B with paper A's settings (arXiv 2504.17816): LoRA of rank 128, 4,000 steps.

Target: the paper's CogVideoX row (CLIP-I 77.1, DINO-I 62.9 and dynamic degree 69.6 on its own benchmark). The paper
reports 288 A100-hours in all. This configuration has not been run at full size; that one 80 GB card holds the model
with batches of 1 is an estimate, not measured. Data: pairs and clips prepared at 480 × 720, clips of 49 frames at 8 per
second.

    sdv convert CogVideoX-5b models/cogvideox-5b --dtype bfloat16
    sdv train --config configs/cogvideox_5b_subject.py --workdir runs/subject \\
        --config.data.identity=data/pairs --config.data.motion=data/clips
"""

from configs import base


def get_config():
    config = base.get_config()
    config.model.path = "models/cogvideox-5b"
    config.model.dtype = "bfloat16"
    config.data.identity = "data/pairs"
    config.data.motion = "data/clips"
    config.train.dtype = "bfloat16"
    config.train.sample_every = 0  # sheets load text encoder and VAE beside the training state: memory not measured
    config.identity.batch_size = 1  # paper A: 256 over all devices; more needs more than one card
    config.motion.batch_size = 1  # paper A: 32 over all devices
    return config
