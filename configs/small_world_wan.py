"""The subject adapter on the small world's Wan: as small_world_cogvideox.py, on another base.

Target: on held-out subjects the adapted model closes at least half of the identity gap between the base and the true
clips, and keeps at least 80% of the base's motion following. Reached: 53% and 100%. Duration: 45 minutes on two CPU
cores; `make demo FAMILY=wan` does the last 100 steps only.

    sdv train --config configs/small_world_wan.py --workdir runs/small_world_wan
"""

from configs import small_world_cogvideox


def get_config():
    config = small_world_cogvideox.get_config()
    config.model.path = "models/small-world-wan"
    # The place that a small base, which knows three latent frames, makes most of: docs/small_world.md compares them.
    config.reference.placement = "before"
    config.reference.shift = 0.0

    config.train.steps = 3600
    config.optimizer.cycles = 1
    return config
