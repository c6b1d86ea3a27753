"""Subjects200K: pairs of pictures of one subject, for training its identity. 480x720 pictures, as CogVideoX-5B wants.

For Wan2.2-TI2V-5B add --config.samples.buckets="('1x704x1280',)". The set's views are 512x512: what a wide bucket cuts
away, a square one keeps, such as '1x480x480' (a multiple of 16 for CogVideoX-5B, of 32 for Wan2.2-TI2V-5B).
"""

from ml_collections import ConfigDict

from configs import prepare


def get_config() -> ConfigDict:
    config = prepare.get_config()
    config.source.format = "subjects200k"
    config.source.options.minimum_score = 5  # of all three quality scores
    config.samples.buckets = ("1x480x720",)
    config.samples.references = "views"
    config.samples.crops = 4
    config.work.unit = 1024
    return config
