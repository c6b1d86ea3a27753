"""The named backgrounds: each a muted colour with a smooth, low-contrast pattern of its own, still during a clip."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

_TURN = 2 * np.pi


@dataclasses.dataclass(frozen=True)
class Background:
    """A law: `colour` is the mean, `tint` the direction in which the pattern moves it, `pattern` its shape.

    `pattern(x, y, phases)` maps pixel coordinates in units of the frame and phases [b, 3] in [0, 1) to about [-1, 1].
    """

    colour: tuple[float, float, float]
    tint: tuple[float, float, float]
    pattern: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _wave(x, y, phase, across: float, down: float) -> np.ndarray:
    """A sine with `across` and `down` periods per frame; phase [b] -> [b, h, w]."""
    return np.sin(_TURN * (across * x + down * y + phase[:, None, None]))


def _sand(x, y, p) -> np.ndarray:
    bend = 0.12 * _wave(x, y, p[:, 1], 1.0, 0.0)
    return np.sin(_TURN * (1.0 * x + 3.5 * y + bend + p[:, 0, None, None]))


def _grass(x, y, p) -> np.ndarray:
    return 0.7 * _wave(x, y, p[:, 0], 4.0, 0.6) + 0.3 * _wave(x, y, p[:, 1], 2.0, -1.0)


def _water(x, y, p) -> np.ndarray:
    swell = 0.10 * _wave(x, y, p[:, 1], 2.0, 0.5)
    return np.sin(_TURN * (4.0 * y + swell + p[:, 0, None, None]))


def _night(x, y, p) -> np.ndarray:
    across, down = (0.15 + 0.7 * p[:, i, None, None] for i in (0, 1))
    glow = np.exp(-((x - across) ** 2 + (y - 0.6 * down) ** 2) / 0.08)
    return 0.9 * glow + 0.8 * (y - 0.5) - 0.17


def _snow(x, y, p) -> np.ndarray:
    return 0.5 * _wave(x, y, p[:, 0], 1.0, 1.0) + 0.5 * _wave(x, y, p[:, 1], -1.0, 2.0)


def _brick(x, y, p) -> np.ndarray:
    course = 4.0 * y + p[:, 0, None, None]
    shift = 0.5 * (np.floor(course) % 2)
    joints = np.maximum(np.cos(_TURN * course), np.cos(_TURN * (2.0 * x + shift + p[:, 1, None, None])))
    return 1.4 * np.clip(joints, 0.3, 1.0) - 0.86


BACKGROUNDS: dict[str, Background] = {
    "sand": Background((0.80, 0.69, 0.48), (0.04, 0.04, 0.04), _sand),
    "grass": Background((0.34, 0.50, 0.26), (0.05, 0.08, 0.04), _grass),
    "water": Background((0.27, 0.46, 0.62), (0.06, 0.07, 0.07), _water),
    "night": Background((0.10, 0.10, 0.19), (0.07, 0.07, 0.11), _night),
    "snow": Background((0.90, 0.92, 0.95), (0.05, 0.04, 0.03), _snow),
    "brick": Background((0.56, 0.32, 0.27), (0.07, 0.08, 0.08), _brick),
}


def paint_backgrounds(
    names: Sequence[str], variations: Float[np.ndarray, "b 3"], size: int
) -> Float[np.ndarray, "b h w 3"]:
    """Backgrounds in [0, 1]; `variations` holds every picture's two phases and its brightness, each in [0, 1)."""
    grid = (np.arange(size) + 0.5) / size
    x, y = grid[None, None, :], grid[None, :, None]
    out = np.empty((len(names), size, size, 3))
    for name in set(names):
        law, chosen = BACKGROUNDS[name], [i for i, other in enumerate(names) if other == name]
        detail = law.pattern(x, y, variations[chosen]) + 0.5 * (variations[chosen, 2] - 0.5)[:, None, None]
        out[chosen] = np.array(law.colour) + detail[..., None] * np.array(law.tint)
    return np.clip(out, 0, 1)
