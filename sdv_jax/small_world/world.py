"""The small world: subjects drawn from continuous laws, moving over named backgrounds, and their renderer.

A subject is a closed outline (a superellipse with lobes) filled with two-colour stripes; a scene puts it on a
background and moves it along a straight line. Nothing turns or deforms while it moves, so a picture of a subject is
decided by (subject, place, scale) alone: searching over those three finds a subject exactly. Edges are one pixel soft
by law, which makes rendering at any sub-pixel place both anti-aliased and one evaluation per pixel. Coordinates are
pixels from the top left corner; the centre of pixel i lies at i + 0.5.
"""

import colorsys
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from sdv_jax.errors import UserError
from sdv_jax.small_world.backgrounds import BACKGROUNDS, paint_backgrounds

MOTIONS: dict[str, tuple[float, float]] = {  # name -> direction (x to the right, y down)
    "resting": (0.0, 0.0),
    "drifting left": (-1.0, 0.0),
    "drifting right": (1.0, 0.0),
    "rising": (0.0, -1.0),
    "sinking": (0.0, 1.0),
}
SPLITS = {"train": 0, "heldout": 1}  # the first word of every seed: the splits never share a random stream
_ANGLES = 256  # resolution of the outline table; at 8 px radius neighbours are 0.2 px apart


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """Sizes of the world. All lengths in pixels, speeds in pixels per frame."""

    size: int = 32  # height = width of a frame
    frames: int = 9  # frames of a clip: 1 + 4k, what a VAE with fourfold compression in time can make
    seed: int = 0  # another world of the same laws
    radius: float = 6.4  # root mean square radius of a subject at scale 1
    reach: float = 7.2  # no point of a subject is farther from its centre than this at scale 1
    scales: tuple[float, float] = (0.85, 1.15)  # range of a scene's scale
    speed: float = 1.2  # of every motion but resting
    speed_spread: float = 0.1  # relative half-width of the speed's range
    margin: float = 0.75  # free pixels between a subject and the frame's border, over the whole clip


@dataclasses.dataclass(frozen=True)
class Subject:
    """Everything that decides how a subject looks; `Subject.sample` states the laws."""

    exponent: float  # superellipse |x/a|^n + |y/b|^n = 1: 1.4 nearly a diamond, 2 ellipse, 5 nearly a box
    aspect: float  # a / b
    angle: float  # of the superellipse, radians
    lobes: int  # number of lobes, 0 for none
    lobe_depth: float  # relative amplitude of the lobes
    lobe_angle: float
    size: float  # factor on the world's radius
    colours: tuple[tuple[float, float, float], tuple[float, float, float]]  # RGB in [0, 1]
    stripe_angle: float
    stripe_width: float  # pixels at scale 1
    stripe_phase: float

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Subject":
        """One subject from the continuous laws (the lobe count is the only discrete part)."""
        lobes = int(rng.choice([0, 3, 4, 5]))
        return cls(
            exponent=float(np.exp(rng.uniform(np.log(1.4), np.log(5.0)))),
            aspect=float(np.exp(rng.uniform(-0.25, 0.25))),
            angle=float(rng.uniform(0.0, np.pi)),
            lobes=lobes,
            lobe_depth=float(rng.uniform(0.06, 0.18)) if lobes else 0.0,
            lobe_angle=float(rng.uniform(0.0, 2 * np.pi)),
            size=float(rng.uniform(0.93, 1.07)),
            colours=_sample_colours(rng),
            stripe_angle=float(rng.uniform(0.0, np.pi)),
            stripe_width=float(rng.uniform(4.0, 8.0)),
            stripe_phase=float(rng.uniform(0.0, 2 * np.pi)),
        )


def _sample_colours(rng: np.random.Generator) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Two saturated colours at least 0.75 apart in RGB and at least 0.3 from the colour of every background."""
    chosen: list[np.ndarray] = []
    grounds = np.array([law.colour for law in BACKGROUNDS.values()])
    while len(chosen) < 2:
        hue, saturation, value = rng.uniform([0.0, 0.75, 0.7], [1.0, 1.0, 1.0])
        colour = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
        clear = np.linalg.norm(grounds - colour, axis=1).min() >= 0.3
        if clear and all(np.linalg.norm(colour - other) >= 0.75 for other in chosen):
            chosen.append(colour)
    return tuple(tuple(float(x) for x in colour) for colour in chosen)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A subject on a background, at `start` in frame 0, moving by `velocity` pixels per frame.

    `motion` is None for a still picture: one frame, whose caption names no motion.
    """

    subject: Subject
    background: str
    motion: str | None
    start: tuple[float, float]  # (x, y) of the subject's centre in frame 0
    velocity: tuple[float, float]
    scale: float
    variation: tuple[float, float, float]  # this background's own phases, each in [0, 1)

    def track(self, frames: int) -> Float[np.ndarray, "t 2"]:
        """The centre (x, y) in every frame."""
        return np.array(self.start) + np.arange(frames)[:, None] * np.array(self.velocity)


class World:
    """The laws at one size: draws subjects and scenes, and renders them.

    >>> world = World(WorldConfig())
    >>> rng = world.rng("train", 7)
    >>> clip = world.render([world.sample_scene(rng, world.sample_subject(rng))])   # uint8 [1, 9, 32, 32, 3]
    """

    def __init__(self, config: WorldConfig = WorldConfig()):
        travel = config.speed * (1 + config.speed_spread) * (config.frames - 1)
        room = config.size - 2 * (config.margin + config.reach * config.scales[1])
        if travel > room:
            raise UserError(
                f"WorldConfig: a subject travels up to {travel:.1f} pixels but has only {room:.1f}; "
                "make size larger, or frames, speed, reach or scales smaller"
            )
        self.config = config

    def rng(self, split: str, *seed: int) -> np.random.Generator:
        """The random stream of a split ("train" or "heldout"); other splits or seeds (of one length) differ."""
        if split not in SPLITS:
            raise UserError(f"small world: unknown split {split!r}; use one of {', '.join(SPLITS)}")
        return np.random.default_rng((SPLITS[split], self.config.seed, *seed))

    def sample_subject(self, rng: np.random.Generator) -> Subject:
        """A new subject; see `Subject.sample`."""
        return Subject.sample(rng)

    def sample_scene(
        self, rng: np.random.Generator, subject: Subject, *, background: str | None = None, motion: str | None = None,
        still: bool = False,
    ) -> Scene:
        """A scene of this subject; background and motion drawn unless given, `still` makes a picture without motion.

        The start is uniform over all places from which the subject stays inside the frame for the whole clip.
        """
        config = self.config
        for what, name, known in (("background", background, BACKGROUNDS), ("motion", motion, MOTIONS)):
            if name is not None and name not in known:
                raise UserError(f"small world: unknown {what} {name!r}; use one of {', '.join(known)}")
        if still and motion is not None:
            raise UserError(f"small world: a still scene has no motion, found {motion!r}; leave one of the two away")
        background = background or str(rng.choice(list(BACKGROUNDS)))
        if not still:
            motion = motion or str(rng.choice(list(MOTIONS)))
        direction = np.array(MOTIONS[motion] if motion else (0.0, 0.0))
        velocity = direction * config.speed * rng.uniform(1 - config.speed_spread, 1 + config.speed_spread)
        scale = rng.uniform(*config.scales)
        low, high = self.inside(subject, scale)
        travel = velocity * (config.frames - 1)
        start = rng.uniform(low + np.maximum(-travel, 0), high - np.maximum(travel, 0))
        variation = tuple(float(x) for x in rng.uniform(size=3))
        return Scene(subject, background, motion, _pair(start), _pair(velocity), float(scale), variation)

    def inside(self, subject: Subject, scale: float) -> tuple[Float[np.ndarray, "2"], Float[np.ndarray, "2"]]:
        """Lowest and highest (x, y) of the centre at which the subject keeps the margin to every border."""
        outline = _outlines([subject], self.config)[0] * scale
        angles = np.arange(_ANGLES) * (2 * np.pi / _ANGLES)
        points = outline[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        margin = self.config.margin
        return margin - points.min(axis=0), self.config.size - margin - points.max(axis=0)

    def render(self, scenes: Sequence[Scene], *, frames: int | None = None) -> UInt8[np.ndarray, "b t h w 3"]:
        """Frames of every scene; `frames` defaults to a clip's length, 1 gives frame 0 alone."""
        frames = frames or self.config.frames
        parts = [self._render_some(scenes[i : i + 64], frames) for i in range(0, len(scenes), 64)]  # 64: stays in cache
        return np.concatenate(parts)

    def _render_some(self, scenes: Sequence[Scene], frames: int) -> UInt8[np.ndarray, "b t h w 3"]:
        size, count = self.config.size, len(scenes)
        ground = paint_backgrounds([s.background for s in scenes], np.array([s.variation for s in scenes]), size)
        video = np.repeat((255 * ground).astype(np.float32)[:, None], frames, axis=1)
        centres = np.stack([scene.track(frames) for scene in scenes]).astype(np.float32)  # [b, t, 2]
        half = int(np.ceil(self.config.reach * self.config.scales[1])) + 1
        corner = np.clip(np.floor(centres).astype(int) - half, 0, size - 2 * half)  # [b, t, 2] of a window around it
        columns, rows = (corner[..., axis, None] + np.arange(2 * half) for axis in (0, 1))  # [b, t, window]
        dx = columns + np.float32(0.5) - centres[..., 0, None]
        dy = rows + np.float32(0.5) - centres[..., 1, None]
        scales = np.array([scene.scale for scene in scenes], np.float32)[:, None]
        colour, alpha = self._paint([scene.subject for scene in scenes], dx, dy, scales)
        clips, times = np.arange(count)[:, None, None, None], np.arange(frames)[:, None, None]
        place = (clips, times, rows[..., None], columns[..., None, :])
        window = video[place]
        window += alpha[..., None] * (255 * colour - window)
        video[place] = window
        return np.rint(video).astype(np.uint8)

    def render_subject(
        self, subject: Subject, *, centres: Float[np.ndarray, "k 2"], scales: Float[np.ndarray, "k"],
        size: int | None = None,
    ) -> tuple[Float[np.ndarray, "k h w 3"], Float[np.ndarray, "k h w"]]:
        """The subject alone, k times: its colours in [0, 1], defined everywhere, and its coverage of every pixel."""
        grid = np.arange(size or self.config.size) + 0.5
        offsets = (grid - np.asarray(centres)[..., None]).astype(np.float32)  # [k, 2, size]
        scales = np.asarray(scales, np.float32)
        colour, alpha = self._paint([subject], offsets[None, :, 0], offsets[None, :, 1], scales[None])
        return colour[0], alpha[0]

    def _paint(
        self, subjects: Sequence[Subject], dx: Float[np.ndarray, "b t w"], dy: Float[np.ndarray, "b t h"],
        scales: Float[np.ndarray, "b #t"],
    ) -> tuple[Float[np.ndarray, "b t h w 3"], Float[np.ndarray, "b t h w"]]:
        """Colour and coverage on the grids of offsets (dx, dy) from the centre."""

        def column(values) -> np.ndarray:
            return np.array(values, np.float32)[:, None, None, None]

        dx, dy, scales = dx[:, :, None, :], dy[:, :, :, None], scales[:, :, None, None]
        position = np.arctan2(dy, dx).astype(np.float32) * np.float32(_ANGLES / (2 * np.pi))
        left = np.floor(position)
        fraction = position - left
        index = left.astype(np.int32)
        rows = np.arange(len(subjects))[:, None, None, None] * _ANGLES
        outlines = _outlines(subjects, self.config).ravel()
        at_left, at_right = outlines[rows + index % _ANGLES], outlines[rows + (index + 1) % _ANGLES]
        outline = scales * (at_left + fraction * (at_right - at_left))
        alpha = np.clip(outline - np.sqrt(dx * dx + dy * dy) + np.float32(0.5), 0, 1)

        width = column([s.stripe_width for s in subjects]) * scales
        angle = np.array([s.stripe_angle for s in subjects])
        across = dx * column(np.cos(angle)) + dy * column(np.sin(angle))
        wave = np.sin(across * (np.float32(np.pi) / width) + column([s.stripe_phase for s in subjects]))
        share = np.clip(wave * width * np.float32(1 / np.pi) + np.float32(0.5), 0, 1)[..., None]  # slope 1 at an edge
        first, second = np.moveaxis(np.array([s.colours for s in subjects], np.float32), 1, 0)[:, :, None, None, None]
        return second + share * (first - second), alpha


def _outlines(subjects: Sequence[Subject], config: WorldConfig) -> Float[np.ndarray, "b angles"]:
    """Radius of every outline at equally spaced angles, at scale 1: first the size is set, then the reach is kept."""

    def column(name: str) -> np.ndarray:
        return np.array([getattr(subject, name) for subject in subjects], np.float32)[:, None]

    theta = np.arange(_ANGLES, dtype=np.float32) * np.float32(2 * np.pi / _ANGLES)
    turned, exponent, stretch = theta - column("angle"), column("exponent"), np.sqrt(column("aspect"))
    across, down = np.abs(np.cos(turned) / stretch), np.abs(np.sin(turned) * stretch)
    radius = (across**exponent + down**exponent) ** (-1 / exponent)
    radius *= 1 + column("lobe_depth") * np.cos(column("lobes") * (theta - column("lobe_angle")))
    radius *= config.radius * column("size") / np.sqrt((radius**2).mean(axis=1, keepdims=True))
    return radius * np.minimum(1, config.reach / radius.max(axis=1, keepdims=True))


def _pair(values: np.ndarray) -> tuple[float, float]:
    return float(values[0]), float(values[1])
