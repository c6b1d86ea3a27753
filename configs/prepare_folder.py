"""A folder of clips, each with its caption in a .txt of the same name: the usual case. CogVideoX-5B's sizes.

For Wan2.2-TI2V-5B add --config.samples.buckets="('81x704x1280','81x1280x704')" --config.samples.fps=16.
"""

from ml_collections import ConfigDict

from configs import prepare


def get_config() -> ConfigDict:
    config = prepare.get_config()
    config.source.format = "folder"
    config.source.options.kind = "video"
    config.samples.buckets = ("49x480x720", "25x480x720", "49x720x480")
    config.samples.fps = 8.0
    config.work.unit = 64
    return config
