"""The subject adapter on Wan2.2-TI2V-5B, the paper's second base (arXiv 2504.17816): as cogvideox_5b_subject.py.

The family's own: flow matching with the checkpoint's shift, clean references at t = 0 after the clip and one grid width
aside, LoRA on both attentions and the feed-forward layers. Data: pairs and clips prepared at 704 × 1280, clips of up to
81 frames at 16 per second. Not run at full size.

    sdv convert Wan2.2-TI2V-5B models/wan2.2-ti2v-5b --dtype bfloat16
    sdv train --config configs/wan22_5b_subject.py --workdir runs/subject
"""

from configs import cogvideox_5b_subject


def get_config():
    config = cogvideox_5b_subject.get_config()
    config.model.path = "models/wan2.2-ti2v-5b"
    return config
