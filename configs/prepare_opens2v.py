"""OpenS2V-5M: captioned clips with pictures of what is in them, cut out by their masks. CogVideoX-5B's sizes.

For Wan2.2-TI2V-5B add --config.samples.buckets="('81x704x1280',)" --config.samples.fps=16.
With --config.samples.references=target the clip's own frames are the references, as in paper A's motion task.
"""

from ml_collections import ConfigDict

from configs import prepare


def get_config() -> ConfigDict:
    config = prepare.get_config()
    config.source.format = "opens2v"
    config.samples.buckets = ("49x480x720",)
    config.samples.fps = 8.0
    config.samples.references = "views"
    config.samples.crops = 3
    config.rejected.most = 0.3  # many records have no subject that is large enough
    config.work.unit = 64
    return config
