"""The second part of the small world's Wan base: half of the clips are given their first frame, as Wan2.2-TI2V's are.

From given frames the base learns to carry a subject on: clips that keep theirs went from 45% to 70%, and an adapter
finds more to build on (docs/small_world.md). Three quarters of an hour on two CPU cores, after small_world_wan_base.py
in the same workdir.

    python -m sdv_jax.small_world.base --config configs/small_world_wan_base_frames.py --workdir runs/wan_base \\
        --out models/small-world-wan
"""

from configs import small_world_wan_base


def get_config():
    config = small_world_wan_base.get_config()
    config.model.path = "runs/wan_base/first"
    config.train.steps = 3000
    config.text_to_video.first_frame = 0.5
    config.noise.shift = 1.0  # textures of so small latents are decided at less noise than the sampler's shift favours
    config.optimizer.learning_rate = 1e-3
    return config
