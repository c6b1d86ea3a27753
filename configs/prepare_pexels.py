"""Pexels-400k: captioned clips, for training motion. 4,000 of them (paper A), 49 frames of 480x720 at 8 fps as
CogVideoX-5B wants.

For Wan2.2-TI2V-5B add --config.samples.buckets="('81x704x1280',)" --config.samples.fps=16.
"""

from ml_collections import ConfigDict

from configs import prepare


def get_config() -> ConfigDict:
    config = prepare.get_config()
    config.source.format = "pexels"
    config.source.options.count = 4000  # drawn among the videos that are there
    config.source.options.present_only = True
    config.source.options.minimum_duration = 6.5  # seconds: 49 frames at 8 fps are 6.1
    config.samples.buckets = ("49x480x720",)
    config.samples.fps = 8.0
    config.work.unit = 64
    return config
