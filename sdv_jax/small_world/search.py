"""Finding a known picture in frames: the mean squared difference at every place, for many templates at once, by FFT.

The difference inside a mask m at an offset is  sum m (I - T)^2 = corr(m, I^2) - 2 corr(mT, I) + corr(mT^2, 1), divided
by the part of the mask that lies inside the frame. It is exact; no learned feature enters.
"""

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy import fft

from sdv_jax.small_world.world import Subject, World

_WINDOW = 20  # pixels of a template; holds the largest subject and a rim
_PHASES = 3  # sub-pixel places per pixel and axis
_SCALES = np.linspace(0.85, 1.15, 7)
_BORDER = 5  # a centre nearer than this to the frame's border is not looked at


@dataclasses.dataclass(frozen=True)
class Match:
    """Per frame: the lowest mean squared colour difference, and where (x, y) and at which scale it was found."""

    error: Float[np.ndarray, "t"]
    centre: Float[np.ndarray, "t 2"]
    scale: Float[np.ndarray, "t"]


def find_subject(
    world: World, video: Float[np.ndarray, "t h w 3"], subject: Subject, ground_colour: Float[np.ndarray, "3"]
) -> Match:
    """Best match of a subject in every frame, over all places (thirds of a pixel) and scales.

    Compared are the subject's pixels and one pixel of rim around it, in which the background's colour is expected: a
    wrong outline costs as much as a wrong texture.
    """
    scales = np.repeat(_SCALES, _PHASES**2)
    shifts = np.tile(_shifts(), (len(_SCALES), 1))
    colours, alphas = world.render_subject(subject, centres=_WINDOW / 2 + shifts, scales=scales, size=_WINDOW)
    templates = ground_colour + alphas[..., None] * (colours - ground_colour)
    return _search(video, templates, _grown(alphas), shifts, scales)


def find_patch(
    video: Float[np.ndarray, "t h w 3"], frame: Float[np.ndarray, "h w 3"], blob: Float[np.ndarray, "h w"],
    centre: tuple[float, float],
) -> Match:
    """Best match, in every frame of `video`, of what `frame` shows inside `blob` and one pixel around it."""
    shifts = _shifts()
    size = frame.shape[0]
    grid = np.arange(_WINDOW) + 0.5 - _WINDOW / 2
    patches, masks = [], []
    for dx, dy in shifts:
        rows, columns = grid[:, None] + centre[1] - dy - 0.5, grid[None, :] + centre[0] - dx - 0.5
        inside = (rows > -1) & (rows < size) & (columns > -1) & (columns < size)
        patches.append(_bilinear(frame, rows, columns))
        masks.append(_bilinear(_grown(blob[None].astype(float))[0], rows, columns) * inside)
    return _search(video, np.stack(patches), np.stack(masks), shifts, np.ones(len(shifts)))


def _shifts() -> Float[np.ndarray, "k 2"]:
    steps = np.arange(_PHASES) / _PHASES
    return np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)


def _grown(alpha: Float[np.ndarray, "k h w"]) -> Float[np.ndarray, "k h w"]:
    """The largest value among the eight neighbours and the pixel itself."""
    padded = np.pad(alpha, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return windows.max(axis=(-1, -2))


def _bilinear(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Values at fractional indices, the border continued."""
    last = image.shape[0] - 1
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = rows - top, columns - left
    corners = [
        (np.clip(top + i, 0, last), np.clip(left + j, 0, last), np.abs(1 - i - down) * np.abs(1 - j - right))
        for i in (0, 1) for j in (0, 1)
    ]
    return sum(image[r, c] * (w if image.ndim == 2 else w[..., None]) for r, c, w in corners)


def _search(
    video: Float[np.ndarray, "t h w 3"], templates: Float[np.ndarray, "k y x 3"], masks: Float[np.ndarray, "k y x"],
    shifts: Float[np.ndarray, "k 2"], scales: Float[np.ndarray, "k"],
) -> Match:
    """The best of all templates and places; a template's centre lies `shifts` away from its window's middle."""
    size = video.shape[1]
    first, last = _BORDER - _WINDOW // 2, size - _BORDER - _WINDOW // 2  # corners of the window that are looked at
    period = size - first  # long enough that the wrapped part of a window meets only zeros
    video = video.astype(np.float32)
    ones = np.ones((1, size, size, 1), np.float32)

    def spectrum(x: np.ndarray) -> np.ndarray:
        return fft.rfft2(x.astype(np.float32), (period, period), axes=(1, 2))

    def places(x: np.ndarray) -> np.ndarray:
        full = fft.irfft2(x, (period, period), axes=(-2, -1))
        corners = np.arange(first, last + 1) % period
        return full[..., corners[:, None], corners]

    weighted = masks[..., None] * templates
    mask_bar, weighted_bar = spectrum(masks[..., None]).conj(), spectrum(weighted).conj()
    squares_bar = spectrum((weighted * templates).sum(-1, keepdims=True)).conj()
    kernels = np.concatenate([mask_bar, -2 * weighted_bar], axis=-1)  # [k, y, x, 4]
    images = spectrum(np.concatenate([(video**2).sum(-1, keepdims=True), video], axis=-1))  # [t, y, x, 4]
    product = np.matmul(images.transpose(1, 2, 0, 3), kernels.transpose(1, 2, 3, 0))  # [y, x, t, k]
    inside = spectrum(ones)
    fixed, covered = (places((inside * bar)[..., 0]) for bar in (squares_bar, mask_bar))  # [k, places, places]
    errors = (places(product.transpose(2, 3, 0, 1)) + fixed) / (3 * covered)
    return _best(errors, shifts, scales, first)


def _best(errors: Float[np.ndarray, "t k y x"], shifts: np.ndarray, scales: np.ndarray, first: int) -> Match:
    flat = errors.reshape(len(errors), -1)
    k, y, x = np.unravel_index(flat.argmin(axis=1), errors.shape[1:])
    centre = np.stack([x, y], axis=1) + first + _WINDOW / 2 + shifts[k]
    return Match(np.maximum(flat.min(axis=1), 0), centre, scales[k])
