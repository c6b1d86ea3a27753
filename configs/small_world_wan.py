"""The subject adapter on the small world's Wan: as small_world_cogvideox.py, on another base.

Target: on held-out subjects the adapted model closes at least half of the identity gap between the base and the true
clips, and keeps at least 80% of the base's motion following.

    sdv train --config configs/small_world_wan.py --workdir runs/small_world_wan
"""

from configs import small_world_cogvideox


def get_config():
    config = small_world_cogvideox.get_config()
    config.model.path = "models/small-world-wan"
    return config
