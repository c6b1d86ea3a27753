"""The small world: procedural subjects, motions, backgrounds and captions, rendered and scored knowing the truth."""

from sdv_jax.small_world.backgrounds import BACKGROUNDS
from sdv_jax.small_world.captions import MARKER, Words, all_captions, caption, parse
from sdv_jax.small_world.pool import ClipPool, PairPool, Trials, clip_pool, load_pool, pair_pool, save_pool, trials
from sdv_jax.small_world.score import Scores, compare, gap_closed, identity_errors, score_clips, summary, table
from sdv_jax.small_world.tokenizer import build_tokenizer
from sdv_jax.small_world.world import MOTIONS, Scene, Subject, World, WorldConfig

__all__ = [
    "BACKGROUNDS", "MARKER", "MOTIONS", "ClipPool", "PairPool", "Scene", "Scores", "Subject", "Trials", "Words",
    "World", "WorldConfig", "all_captions", "build_tokenizer", "caption", "clip_pool", "compare", "gap_closed",
    "identity_errors", "load_pool", "pair_pool", "parse", "save_pool", "score_clips", "summary", "table", "trials",
]
