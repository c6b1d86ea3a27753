"""Pools: many clips or pairs rendered once, kept as arrays; rendering every batch anew would cost as much as training.

A pool is decided by (world config, split, seed, n); without synonyms a smaller pool is the head of a larger one of its
seed.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sdv_jax.errors import UserError
from sdv_jax.small_world.backgrounds import BACKGROUNDS
from sdv_jax.small_world.captions import caption
from sdv_jax.small_world.world import MOTIONS, Scene, Subject, World

_CLIPS, _PAIRS, _TRIALS = range(3)  # part of the seed, so that pools of one seed show different subjects


@dataclasses.dataclass(frozen=True)
class ClipPool:
    """Captioned clips; every clip shows another subject."""

    video: UInt8[np.ndarray, "n t h w 3"]
    captions: list[str]
    scenes: list[Scene]


@dataclasses.dataclass(frozen=True)
class PairPool:
    """Subject-image pairs: the same subject at two places, scales and backgrounds; the caption is the target's."""

    reference: UInt8[np.ndarray, "n h w 3"]
    target: UInt8[np.ndarray, "n h w 3"]
    captions: list[str]
    reference_scenes: list[Scene]
    scenes: list[Scene]


@dataclasses.dataclass(frozen=True)
class Trials:
    """What a model is tested on: a reference picture, a prompt with a motion and another background, the true clip."""

    reference: UInt8[np.ndarray, "n h w 3"]
    video: UInt8[np.ndarray, "n t h w 3"]
    captions: list[str]
    reference_scenes: list[Scene]
    scenes: list[Scene]


def clip_pool(
    world: World, seed: int, n: int, *, split: str = "train", marked: bool = False, synonyms: bool = False
) -> ClipPool:
    """n clips of n subjects, each with its own motion and background; `marked` captions carry the `<cls>` marker."""
    rng = world.rng(split, _CLIPS, seed)
    scenes = [world.sample_scene(rng, world.sample_subject(rng)) for _ in range(n)]
    wording = rng if synonyms else None
    return ClipPool(world.render(scenes), [caption(scene, marked=marked, rng=wording) for scene in scenes], scenes)


def pair_pool(world: World, seed: int, n: int, *, split: str = "train", marked: bool = True) -> PairPool:
    """n pairs of n subjects; reference and target never share a background, so only the subject can be carried over."""
    rng = world.rng(split, _PAIRS, seed)
    references, targets = [], []
    for _ in range(n):
        subject = world.sample_subject(rng)
        first, second = rng.choice(list(BACKGROUNDS), size=2, replace=False)
        references.append(world.sample_scene(rng, subject, background=str(first), still=True))
        targets.append(world.sample_scene(rng, subject, background=str(second), still=True))
    images = [world.render(scenes, frames=1)[:, 0] for scenes in (references, targets)]
    return PairPool(*images, [caption(scene, marked=marked) for scene in targets], references, targets)


def trials(world: World, seed: int, n: int, *, split: str = "heldout", marked: bool = True) -> Trials:
    """n tests of n subjects; motions and backgrounds go round in turn, so every combination appears equally often."""
    rng = world.rng(split, _TRIALS, seed)
    motions, grounds = list(MOTIONS), list(BACKGROUNDS)
    references, targets = [], []
    for i in range(n):
        subject = world.sample_subject(rng)
        motion, ground = motions[i % len(motions)], grounds[(i // len(motions)) % len(grounds)]
        other = str(rng.choice([name for name in grounds if name != ground]))
        references.append(world.sample_scene(rng, subject, background=other, still=True))
        targets.append(world.sample_scene(rng, subject, background=ground, motion=motion))
    pictures = world.render(references, frames=1)[:, 0]
    sentences = [caption(scene, marked=marked) for scene in targets]
    return Trials(pictures, world.render(targets), sentences, references, targets)


def save_pool(pool: ClipPool | PairPool | Trials, path: str | Path) -> None:
    """Writes a pool as one .npz: its arrays as they are, captions and scenes as JSON."""
    fields = {field.name: getattr(pool, field.name) for field in dataclasses.fields(pool)}
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    lists = {name: value for name, value in fields.items() if name not in arrays}
    arrays["json"] = np.array(json.dumps({"pool": type(pool).__name__} | lists, default=dataclasses.asdict))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def load_pool(path: str | Path) -> ClipPool | PairPool | Trials:
    """Reads what `save_pool` wrote, exactly; raises UserError when the file is not a pool."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        lists = json.loads(arrays.pop("json").item())
        kind = {pool.__name__: pool for pool in (ClipPool, PairPool, Trials)}[lists.pop("pool")]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"small world: {path} is not a pool ({error}); write one with save_pool") from error
    for name in lists.keys() & {"scenes", "reference_scenes"}:
        lists[name] = [_scene(record) for record in lists[name]]
    return kind(**arrays, **lists)


def _scene(record: dict) -> Scene:
    """The inverse of dataclasses.asdict after JSON, which knows no tuples."""
    subject = record["subject"] | {"colours": tuple(map(tuple, record["subject"]["colours"]))}
    tuples = {name: tuple(record[name]) for name in ("start", "velocity", "variation")}
    return Scene(**record | tuples | {"subject": Subject(**subject)})
