"""From an item of an importer to pixels: which bucket it belongs to, its clip or image there, its reference images."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy

import numpy as np
from jaxtyping import UInt8

from sdv_jax.data.decode import Size, frames_in, picture_size, probe, read_clip, read_crops, read_picture, window
from sdv_jax.data.importers.item import Clip, Importer, Item, Picture, Rejected
from sdv_jax.errors import UserError, of_the_machine, one_line

REFERENCES = ("target", "views")
WINDOWS = ("first", "random")
_SHORT = ("too short", "damaged video")  # for which a bucket of fewer frames may do


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How samples are made.

    Attributes:
      buckets: the sizes that records may have; one frame is for pictures, more are for clips.
      fps: of clips; None takes every frame of the file.
      references: "target": frames of the clip itself (of a picture, crops of it); "views": the item's other views.
      frames: reference frames per clip, drawn without replacement; 0 = all.
      crops: reference images per item where they are crops: of its views in turn, or of the picture itself.
      jitter: the share of each side that a crop of a picture may cut away.
      seed: of what is drawn for an item, with its key.
      window: which part of a clip that is longer than its bucket: "first", or one that begins at a "random" frame.
    """

    buckets: tuple[Size, ...]
    fps: float | None
    references: str
    frames: int
    crops: int
    jitter: float
    seed: int
    window: str

    def count(self, size: Size) -> int:
        """Reference images of every record of a bucket."""
        if self.references == "views" or size.frames == 1:
            return self.crops
        return min(self.frames or size.frames, size.frames)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One item decoded: a clip or an image (one frame), its references.

    Attributes:
      seconds: of the source, 0 for a picture.
      used: seconds of it that the clip shows.
      left_out: (reason, detail) of each other view that cannot be read, while there are some that can.
    """

    key: str
    caption: str
    provenance: Mapping[str, str | int | float]
    size: Size
    target: UInt8[np.ndarray, "t h w 3"]
    references: UInt8[np.ndarray, "k h w 3"]
    seconds: float
    used: float
    left_out: tuple[tuple[str, str], ...] = ()


def bucket_name(size: Size) -> str:
    """"49x480x720": frames, height, width."""
    return f"{size.frames}x{size.height}x{size.width}"


def read(importer: Importer, index: int, recipe: Recipe) -> Sample:
    """Decodes one item. The same item gives the same sample in every run.

    Raises:
      Rejected: it cannot be used. An exception that nothing here foresees is one too, so that one item does not end
        the work on a set: it is a defect of the program, counted under a reason of its own.
      UserError: it is the machine that fails and not the item.
    """
    try:
        item = importer[index]
        size, target, seconds, used, rng = _target(item, recipe)
        references, left_out = _references(item, recipe, size, target, rng)
    except (Rejected, UserError):
        raise
    except MemoryError as error:
        raise UserError(f"no memory left to read item {importer.key(index)}; set work.workers to fewer") from error
    except Exception as error:
        if of_the_machine(error):
            told = f"item {importer.key(index)} cannot be read: {error.strerror}"
            raise UserError(f"{told}; mend that, and the same command goes on") from error
        raise Rejected("unforeseen error", one_line(error, typed=True)) from error
    return Sample(item.key, item.caption, item.provenance, size, target, references, seconds, used, left_out)


def choose(
    buckets: Sequence[Size], *, frames: int | None, height: int, width: int
) -> list[Size]:
    """The buckets that take an item of this size, the best first; `frames` is None for a picture.

    Best is the nearest proportions, then the most frames, then the largest that the item fills without being enlarged.
    """
    able = [size for size in buckets if (size.frames == 1 if frames is None else 1 < size.frames <= frames)]

    def rank(size: Size) -> tuple:
        stretch = abs(math.log(height / width * size.width / size.height))
        enlarged = max(1.0, size.height / height, size.width / width)
        return round(stretch, 6), -size.frames, round(enlarged, 6), -size.height * size.width

    return sorted(able, key=rank)


def _target(
    item: Item, recipe: Recipe
) -> tuple[Size, UInt8[np.ndarray, "t h w 3"], float, float, np.random.Generator]:
    """(bucket, pixels, seconds of the source, seconds used, what goes on drawing for this item)."""
    rng = _generator(item.key, recipe.seed)
    if isinstance(item.target, Picture):
        size = _picture_bucket(item.target, recipe.buckets)
        pixels = read_picture(item.target, height=size.height, width=size.width, jitter=recipe.jitter, rng=rng)
        return size, pixels[None], 0.0, 0.0, rng
    found = probe(item.target)
    frames = frames_in(found.duration, recipe.fps) if recipe.fps else found.frames
    able = choose(recipe.buckets, frames=frames, height=found.height, width=found.width)
    if not able:
        raise _fits_none(item.target, frames, recipe)
    share = rng.random() if recipe.window == "random" else 0.0
    for size in able:
        clip = window(item.target, size.frames, fps=recipe.fps, share=share) if share else item.target
        used = size.frames / (recipe.fps or found.fps)
        try:
            return size, read_clip(clip, size, fps=recipe.fps), found.duration, used, rng
        except Rejected as rejected:  # a damaged end shows only now; a bucket of fewer frames may do without it
            if rejected.reason not in _SHORT or size is able[-1]:
                raise
    raise AssertionError("unreachable: the loop returns or raises")


def _references(
    item: Item, recipe: Recipe, size: Size, target: UInt8[np.ndarray, "t h w 3"], rng: np.random.Generator
) -> tuple[UInt8[np.ndarray, "k h w 3"], tuple[tuple[str, str], ...]]:
    """(reference images, `Sample.left_out`)."""
    count = recipe.count(size)
    if recipe.references == "target" and isinstance(item.target, Clip):
        return target[np.sort(rng.choice(size.frames, count, replace=False))], ()
    views = list(item.references if recipe.references == "views" else (item.target,))
    if not views:
        raise Rejected("no other view", "the item has no references; samples.references='target' takes its own frames")
    left_out = []
    while True:
        used, how = views[:count], dict(height=size.height, width=size.width, jitter=recipe.jitter, rng=deepcopy(rng))
        crops = []
        try:
            for i, view in enumerate(used):
                crops.append(read_crops(view, len(range(i, count, len(used))), **how))
            return np.stack([crops[i % len(used)][i // len(used)] for i in range(count)]), tuple(left_out)
        except Rejected as rejected:
            if len(views) == 1:
                raise
            left_out.append((rejected.reason, rejected.detail))
            del views[len(crops)]  # and once more, as if it had never been there


def _fits_none(clip: Clip, frames: int, recipe: Recipe) -> Rejected:
    wanted = [size.frames for size in recipe.buckets if size.frames > 1]
    if not wanted:
        return Rejected("no bucket for clips", f"{clip.path} is a clip; every bucket has one frame")
    rate = f" at {recipe.fps:g} fps" if recipe.fps else ""
    return Rejected("too short", f"{clip.path} has {frames} frames{rate}; the shortest bucket needs {min(wanted)}")


def _picture_bucket(picture: Picture, buckets: Sequence[Size]) -> Size:
    able = [size for size in buckets if size.frames == 1]
    if not able:
        raise Rejected("no bucket for pictures", "the item is a picture; no bucket has one frame")
    if len(able) == 1:
        return able[0]
    height, width = picture_size(picture)
    return choose(able, frames=None, height=height, width=width)[0]


def _generator(key: str, seed: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))
