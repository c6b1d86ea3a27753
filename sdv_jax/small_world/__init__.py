"""The small world: procedural subjects, motions and backgrounds with captions, rendered and scored with the truth at hand."""

from sdv_jax.small_world.backgrounds import BACKGROUNDS
from sdv_jax.small_world.captions import MARKER, Words, all_captions, caption, parse
from sdv_jax.small_world.pool import ClipPool, PairPool, Trials, clip_pool, load_pool, pair_pool, save_pool, trials
from sdv_jax.small_world.world import MOTIONS, Scene, Subject, World, WorldConfig

__all__ = [
    "BACKGROUNDS", "MARKER", "MOTIONS", "ClipPool", "PairPool", "Scene", "Subject", "Trials", "Words", "World", "WorldConfig",
    "all_captions", "caption", "clip_pool", "load_pool", "pair_pool", "parse", "save_pool", "trials",
]
