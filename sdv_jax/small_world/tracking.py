"""Seeing without knowing the subject: which background, where the foreground is, how it moves; the truth is not read.

The background fills most of a clip, so the median over all its pixels is the background's colour; what is far from that
colour is foreground. The same tracker therefore serves videos of known and of unknown subjects.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from sdv_jax.small_world.backgrounds import BACKGROUNDS
from sdv_jax.small_world.world import MOTIONS, World

# Colour distances in RGB: patterns stay within 0.12 of their median, subjects are 0.3 or more away from every
# background, backgrounds 0.28 or more from one another.
_FOREGROUND = 0.2
_SAME_GROUND = 0.14
_AREAS = (45.0, 230.0)  # pixels; the subjects of the world cover 64 to 193
_WHOLE = 0.85  # share of the foreground that one blob must hold to be "the" blob
_SEEN = 2 / 3  # share of the frames in which a blob must be found before a motion is read off


@dataclasses.dataclass(frozen=True)
class Sighting:
    """What one clip shows; `motion` and `background` are None where nothing named fits."""

    background: str | None
    ground_colour: Float[np.ndarray, "3"]
    blob: Bool[np.ndarray, "t h w"]  # the largest connected piece of foreground
    track: Float[np.ndarray, "t 2"]  # its centre (x, y); NaN where its size is not within twice that of a subject
    velocity: Float[np.ndarray, "2"]  # least squares over the track, pixels per frame
    motion: str | None
    whole: bool  # exactly one blob of a subject's size in every frame


def sight(world: World, video: Float[np.ndarray, "t h w 3"]) -> Sighting:
    """Finds background, foreground and motion of a clip with colours in [0, 1]."""
    colour = np.median(video.reshape(-1, 3), axis=0)
    far = np.linalg.norm(video - colour, axis=-1)
    blobs, tracks, whole = [], [], True
    for frame in far:
        blob, only = _largest(frame > _FOREGROUND)
        whole = whole and only and _AREAS[0] <= blob.sum() <= _AREAS[1]
        blobs.append(blob)
        tracks.append(_centre(blob, frame))
    track = np.array(tracks)
    velocity = _slope(track)
    return Sighting(
        background=_nearest_ground(colour), ground_colour=colour, blob=np.array(blobs), track=track, velocity=velocity,
        motion=_nearest_motion(world, velocity), whole=bool(whole),
    )


def _largest(foreground: Bool[np.ndarray, "h w"]) -> tuple[Bool[np.ndarray, "h w"], bool]:
    """The largest connected piece, and whether it holds nearly all of the foreground.

    Gaps of up to two pixels are closed first: where two blurred stripes meet, the mixture can resemble the background.
    """
    around = np.ones((3, 3), bool)
    foreground = ndimage.binary_erosion(ndimage.binary_dilation(foreground, around), around, border_value=1)
    labels, count = ndimage.label(foreground, around)
    if count == 0:
        return foreground, False
    sizes = np.bincount(labels.ravel())[1:]
    return labels == 1 + sizes.argmax(), bool(sizes.max() >= _WHOLE * sizes.sum())


def _centre(blob: Bool[np.ndarray, "h w"], far: Float[np.ndarray, "h w"]) -> tuple[float, float]:
    """Centre of the blob; its soft rim counts by its distance from the background, which keeps the centre sub-pixel."""
    if not _AREAS[0] / 2 <= blob.sum() <= 2 * _AREAS[1]:
        return np.nan, np.nan
    weight = np.minimum(far / _FOREGROUND, 1) * ndimage.binary_dilation(blob)
    rows, columns = np.indices(blob.shape) + 0.5
    return float((weight * columns).sum() / weight.sum()), float((weight * rows).sum() / weight.sum())


def _slope(track: Float[np.ndarray, "t 2"]) -> Float[np.ndarray, "2"]:
    """Pixels per frame of the straight line through the track; NaN where too few frames show a blob."""
    seen = ~np.isnan(track[:, 0])
    if seen.sum() < max(3, _SEEN * len(track)):
        return np.full(2, np.nan)
    return np.polyfit(np.flatnonzero(seen), track[seen], 1)[0]


def _nearest_motion(world: World, velocity: Float[np.ndarray, "2"]) -> str | None:
    """The named motion whose velocity is nearest; half the world's speed separates moving from resting."""
    if np.isnan(velocity).any():
        return None
    wanted = world.config.speed * np.array(list(MOTIONS.values()))
    return list(MOTIONS)[int(np.linalg.norm(wanted - velocity, axis=1).argmin())]


def _nearest_ground(colour: Float[np.ndarray, "3"]) -> str | None:
    distances = {name: float(np.linalg.norm(colour - law.colour)) for name, law in BACKGROUNDS.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= _SAME_GROUND else None
