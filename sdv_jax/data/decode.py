"""Clips and pictures as pixels: the wanted number of frames at the wanted rate and size, without distortion.

Everything that is wrong with a file is `Rejected`. Memory holds the result and a frame or two of the source, however
long the file is. A clip is decoded by one thread: decode several at once to use several cores.
"""

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from jaxtyping import UInt8
from PIL import ExifTags, Image

from sdv_jax.data import streams
from sdv_jax.data.images import SMALLEST_SIDE, on_white, opened, read_image
from sdv_jax.data.importers.item import Box, Clip, Frame, Picture, Rejected
from sdv_jax.data.importers.masks import Mask
from sdv_jax.errors import UserError

_MOST_CUT = 8  # a clip of which more than 7/8 would be cut away has too odd proportions
_LONGEST = 10_000_000  # seconds, four months: a longer clip has a time stamp that is wrong
_TALLEST_SD = 576  # lines; a larger untagged video is taken for BT.709, as players do
_UNTAGGED = 2  # "unspecified" among the colour matrices of ISO/IEC 23091-2
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_SCALING = (
    Interpolation.BICUBIC
    | Interpolation.ACCURATE_RND
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.BITEXACT  # the same bytes whatever the processor
)


@dataclass(frozen=True)
class Size:
    """Of a bucket: frames, and height and width in pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Probe:
    """What a clip is before decoding: its frames, its average rate, its size as shown, its duration in seconds."""

    frames: int
    fps: float
    height: int
    width: int
    duration: float


def probe(clip: Clip) -> Probe:
    """Raises Rejected when the clip is not a video, or has not a single frame that can be decoded."""
    times, first = streams.frame_times(clip.path)
    part = times[clip.start : clip.end]
    if not part:
        raise Rejected("too short", f"{clip.path} has {len(times)} frames; frame {clip.start} was asked for")
    following = clip.start + len(part)
    stop = times[following] if following < len(times) else times[-1] + first.duration
    height, width = first.frame.height, first.frame.width
    if first.orientation.transpose:
        height, width = width, height
    if clip.box is not None:
        left, top, right, bottom = _inside(clip.box, height=height, width=width, where=clip.path)
        height, width = bottom - top, right - left
    duration = stop - part[0]
    if duration <= 0:
        raise Rejected("damaged video", f"{clip.path} has no duration")
    if duration > _LONGEST:
        raise Rejected("damaged video", f"{clip.path} says that it lasts {float(duration):.0f} s")
    return Probe(len(part), float(len(part) / duration), height, max(1, round(width * first.aspect)), float(duration))


def frames_in(seconds: float | Fraction, fps: float) -> int:
    """How many frames, `1 / fps` seconds apart, a clip of this length gives."""
    return math.ceil(seconds * fps - 1e-6)


def window(clip: Clip, frames: int, *, fps: float | None, share: float) -> Clip:
    """The part of a clip that begins `share`, in [0, 1), of the way to the last place that leaves `frames` frames."""
    times, first = streams.frame_times(clip.path)
    part, following = times[clip.start : clip.end], clip.start + len(times[clip.start : clip.end])
    stop = times[following] if following < len(times) else times[-1] + first.duration
    places = len(part) - frames + 1 if fps is None else sum(frames_in(stop - t, fps) >= frames for t in part)
    return replace(clip, start=clip.start + int(share * max(1, places)))


def read_clip(clip: Clip, size: Size, *, fps: float | None) -> UInt8[np.ndarray, "t h w 3"]:
    """The first `size.frames` frames of a clip, `1 / fps` seconds apart.

    Each is the source frame nearest in time to where it is due, the earlier of two equally near; time is that of the
    file's stamps, so that a variable frame rate needs no other treatment. A slower source repeats frames, up to twice
    each on average. The whole frame is scaled (bicubic) until it covers the size, and what overhangs is cut equally
    on both sides; rotation marks, non-square pixels and transparency (on white) are taken into account.

    Args:
      fps: None takes every source frame.

    Raises:
      Rejected: see docs/data_formats.md.
    """
    fitter = _Fitter(clip, size)
    result = np.empty((size.frames, size.height, size.width, 3), np.uint8)
    used, distinct, last = 0, 0, None
    with streams.decoding(clip.path), closing(streams.frames(clip.path, start=clip.start, end=clip.end)) as decoded:
        source = _UntilDamage(decoded)
        chosen = source if fps is None else _nearest(source, Fraction(fps).limit_denominator(1001), size.frames)
        for shown in islice(chosen, size.frames):
            result[used] = result[used - 1] if shown is last else fitter(shown)
            used, distinct, last = used + 1, distinct + (shown is not last), shown
    if used < size.frames:
        raise source.damage or _too_short(clip, size, fps, used)
    if 2 * distinct < size.frames:
        raise Rejected(
            "frame rate too low", f"{clip.path}: {size.frames} frames at {fps:g} fps show {distinct} different ones"
        )
    return result


def picture_size(picture: Picture) -> tuple[int, int]:
    """Height and width of a picture, upright; of a file no more than the header is read. Raises Rejected."""
    if picture.box is not None:
        left, top, right, bottom = picture.box
        return max(1, bottom - top), max(1, right - left)
    name = "picture" if isinstance(picture.source, bytes) else f"picture {picture.source}"
    with _readable(picture), opened(picture.source, name=name) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        return image.size if turned else image.size[::-1]


def read_picture(
    picture: Picture | Frame, *, height: int, width: int, jitter: float = 0.0, rng: np.random.Generator | None = None
) -> UInt8[np.ndarray, "h w 3"]:
    """A picture resized (bicubic) and cropped around its centre to height x width, without distortion.

    A picture with a mask is not cropped: what is outside the mask becomes white, and so does what is missing to the
    wanted proportions.

    Args:
      jitter: the share of each side that a random crop may cut away, in [0, 1): the window of the picture that would
        be shown shrinks to a share drawn from [1 - jitter, 1], and lies anywhere within it.
      rng: needed with jitter.

    Raises:
      Rejected: a file that cannot be read, a frame that the video does not have, an empty box or mask.
    """
    return read_crops(picture, 1, height=height, width=width, jitter=jitter, rng=rng)[0]


def read_crops(
    picture: Picture | Frame, count: int, *, height: int, width: int, jitter: float = 0.0,
    rng: np.random.Generator | None = None,
) -> UInt8[np.ndarray, "count h w 3"]:  # fmt: skip
    """What `count` calls of `read_picture` give, of a picture that is decoded once."""
    if not 0 <= jitter < 1 or (jitter and rng is None):
        raise ValueError(f"jitter is {jitter} with rng {rng}; expected a share in [0, 1), and a generator with it")
    pixels, aspect = _frame_pixels(picture) if isinstance(picture, Frame) else (_picture_pixels(picture), 1.0)
    where = picture.path if isinstance(picture, Frame) else _name(picture)
    if picture.mask is not None:
        pixels = _masked(pixels, picture.mask, where)
    if picture.box is not None:
        left, top, right, bottom = _inside(picture.box, height=pixels.shape[0], width=pixels.shape[1], where=where)
        pixels = pixels[top:bottom, left:right]
    if min(pixels.shape[:2]) < SMALLEST_SIDE:
        raise Rejected("picture too small", f"{where}: {pixels.shape[1]}x{pixels.shape[0]} pixels are left")
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if aspect != 1:
        image = image.resize((max(1, round(image.width * aspect)), image.height), Image.Resampling.BICUBIC)
    if picture.mask is not None:
        image = _padded(image, width / height)
    windows = [_window(image.size, width / height, jitter, rng) for _ in range(count)]
    return np.stack([image.resize((width, height), Image.Resampling.BICUBIC, box=window) for window in windows])


class _UntilDamage:
    """Frames up to the first that cannot be had; `damage` says why there are no more."""

    def __init__(self, decoded: Iterator[streams.Shown]):
        self._decoded, self.damage = decoded, None

    def __iter__(self) -> Iterator[streams.Shown]:
        try:
            yield from self._decoded
        except Rejected as damage:
            self.damage = damage


def _nearest(source: Iterable[streams.Shown], fps: Fraction, count: int) -> Iterator[streams.Shown]:
    """For each of `count` times, 1 / fps apart from the first frame's on, the frame nearest to it.

    Ends early where the source does: a frame counts as long as it is shown.
    """
    last, due, given = None, Fraction(0), 0
    for shown in source:
        if last is None:
            due = shown.time
        while last is not None and given < count and due - last.time <= shown.time - due:
            yield last
            due, given = due + 1 / fps, given + 1
        last = shown
    while last is not None and given < count and due < last.time + last.duration:
        yield last
        due, given = due + 1 / fps, given + 1


class _Fitter:
    """Frames of one clip to uint8 RGB of one size. Scaling and the change of colour space are one pass of swscale."""

    def __init__(self, clip: Clip, size: Size):
        self._clip, self._size, self._reformatter = clip, size, VideoReformatter()

    def __call__(self, shown: streams.Shown) -> UInt8[np.ndarray, "h w 3"]:
        frame, turned = shown.frame, shown.orientation
        if self._clip.box is not None or _has_alpha(frame):
            pixels = turned.apply(_rgb(frame))
            if self._clip.box is not None:
                box = _inside(self._clip.box, height=pixels.shape[0], width=pixels.shape[1], where=self._clip.path)
                pixels = pixels[box[1] : box[3], box[0] : box[2]]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            turned = streams.Orientation()
        upright = (frame.width, frame.height) if turned.transpose else (frame.height, frame.width)
        rows, columns = self._covering(upright[0], upright[1] * shown.aspect)
        height, width = (columns, rows) if turned.transpose else (rows, columns)
        scaled = self._reformatter.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=_SCALING, threads=1,
            src_colorspace=_colorspace(frame),
        )  # fmt: skip
        pixels = turned.apply(scaled.to_ndarray())
        top, left = (rows - self._size.height) // 2, (columns - self._size.width) // 2
        return pixels[top : top + self._size.height, left : left + self._size.width]

    def _covering(self, height: float, width: float) -> tuple[int, int]:
        """Rows and columns of the smallest picture of these proportions that covers the size."""
        size = self._size
        scale = max(size.height / height, size.width / width)
        rows, columns = max(size.height, round(height * scale)), max(size.width, round(width * scale))
        if rows * columns > _MOST_CUT * size.height * size.width:
            raise Rejected(
                "proportions too odd",
                f"{self._clip.path} is {width:.0f}x{height:.0f}; cropping to {size.width}x{size.height} would leave "
                f"less than 1/{_MOST_CUT} of it",
            )
        return rows, columns


class _Latest(threading.local):
    """The picture in memory that a thread decoded last: a target and its other view may be parts of one."""

    source, pixels = None, None


_latest = _Latest()


def _picture_pixels(picture: Picture) -> UInt8[np.ndarray, "h w 3"]:
    if isinstance(picture.source, bytes) and picture.source is _latest.source:
        return _latest.pixels
    with _readable(picture):
        pixels = read_image(picture.source, name="picture")
    if isinstance(picture.source, bytes):
        _latest.source, _latest.pixels = picture.source, pixels
    return pixels


@contextmanager
def _readable(picture: Picture) -> Iterator[None]:
    """Raises Rejected where there is no file, and for UserErrors of images.py inside the block."""
    if not isinstance(picture.source, bytes) and not picture.source.exists():
        raise Rejected("file missing", f"{picture.source} does not exist")
    try:
        yield
    except UserError as error:
        raise Rejected("unreadable picture", str(error)) from error


def _frame_pixels(picture: Frame) -> tuple[UInt8[np.ndarray, "h w 3"], float]:
    """One upright frame, and the width of its pixels over their height."""
    path = picture.path
    with streams.decoding(path), closing(streams.frames(path, start=picture.index, end=picture.index + 1)) as decoded:
        shown = next(decoded, None)
        if shown is None:
            raise Rejected("no frames", f"{path} holds no frame")
        return shown.orientation.apply(_rgb(shown.frame)), shown.aspect


def _rgb(frame: av.VideoFrame) -> UInt8[np.ndarray, "h w 3"]:
    """The stored picture; transparency on white."""
    if _has_alpha(frame):
        return on_white(frame.to_ndarray(format="rgba"))
    return frame.reformat(format="rgb24", interpolation=_SCALING, src_colorspace=_colorspace(frame)).to_ndarray()


def _has_alpha(frame: av.VideoFrame) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _colorspace(frame: av.VideoFrame) -> Colorspace | None:
    untagged = frame.colorspace == _UNTAGGED and not frame.format.is_rgb
    return Colorspace.ITU709 if untagged and frame.height > _TALLEST_SD else None


def _masked(pixels: UInt8[np.ndarray, "h w 3"], mask: Mask, where) -> UInt8[np.ndarray, "h w 3"]:
    try:
        region = mask.decode()
    except ValueError as error:
        raise Rejected("damaged mask", f"{where}: {error}") from error
    height, width = pixels.shape[:2]
    if mask.top < 0 or mask.left < 0 or mask.top + mask.height > height or mask.left + mask.width > width:
        raise Rejected(
            "mask does not fit", f"{where} has {width}x{height} pixels, its mask {mask.width}x{mask.height}"
        )
    if not region.any():
        raise Rejected("empty mask", f"{where}: the mask shows nothing")
    result = np.full_like(pixels, 255)
    rows, columns = slice(mask.top, mask.top + mask.height), slice(mask.left, mask.left + mask.width)
    result[rows, columns][region] = pixels[rows, columns][region]
    return result


def _inside(box: Box, *, height: int, width: int, where) -> Box:
    """`box` cut at the edges of a picture; detectors let theirs hang over by a pixel."""
    left, top, right, bottom = box
    left, top, right, bottom = max(0, left), max(0, top), min(width, right), min(height, bottom)
    if left >= right or top >= bottom:
        raise Rejected("box outside the picture", f"{where} has {width}x{height} pixels; the box is {box}")
    return left, top, right, bottom


def _padded(image: Image.Image, aspect: float) -> Image.Image:
    """`image` in the middle of the smallest white one of proportions `aspect` that holds it."""
    size = max(image.width, math.ceil(image.height * aspect)), max(image.height, math.ceil(image.width / aspect))
    canvas = Image.new("RGB", size, (255, 255, 255))
    canvas.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return canvas


def _window(
    size: tuple[int, int], aspect: float, jitter: float, rng: np.random.Generator | None
) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what is shown of a picture of `size` (width, height)."""
    width, height = min(size[0], size[1] * aspect), min(size[1], size[0] / aspect)
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    if jitter:
        share, right, down = rng.random(3)
        scale = 1 - jitter * share
        left, top = left + right * (1 - scale) * width, top + down * (1 - scale) * height
        width, height = width * scale, height * scale
    return left, top, min(left + width, size[0]), min(top + height, size[1])


def _name(picture: Picture) -> str:
    if isinstance(picture.source, bytes):
        return f"a picture of {len(picture.source)} bytes"
    return str(picture.source)


def _too_short(clip: Clip, size: Size, fps: float | None, found: int) -> Rejected:
    rate = "" if fps is None else f" at {fps:g} fps"
    return Rejected("too short", f"{clip.path} gives {found} frames{rate}; {size.frames} are needed")
