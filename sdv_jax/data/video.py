"""Videos in and out through PyAV, and contact sheets: uint8 RGB frames [t,h,w,3] on this side of the border."""

import math
import os
import pathlib
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from sdv_jax.data.files import replacing
from sdv_jax.errors import UserError

_TITLE_HEIGHT = 24  # pixels above a contact sheet's columns
_BT709 = 1  # the code of ITU-R BT.709 for primaries and transfer in ISO/IEC 23091-2, as the mp4 header stores it


def to_uint8(pixels: Float[np.ndarray, "*any"]) -> UInt8[np.ndarray, "*any"]:
    """Pixels in [0, 1] to bytes, rounded; values outside are clipped."""
    return np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def check_fps(fps: float | int) -> None:
    """Raises UserError unless `fps` is a frame rate that an mp4 can hold."""
    if not (math.isfinite(fps) and 0.01 <= fps <= 1000):
        raise UserError(f"fps is {fps}; expected a number from 0.01 to 1000")


def write_video(
    path: str | os.PathLike, frames: UInt8[np.ndarray, "t h w 3"], *, fps: float | int, quality: int = 17
) -> None:
    """An mp4 of H.264, yuv420p, BT.709: what browsers, phones and editors play.

    yuv420p halves the colour planes, so an odd height or width is made even by repeating the last row or column.
    The file appears at `path` complete or not at all.

    Args:
      quality: x264's constant rate factor; 17 is visually lossless, larger is smaller.

    Raises:
      UserError: a frame rate that is not positive, no frames, or a place that cannot be written.
    """
    check_fps(fps)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.shape[0] == 0 or frames.dtype != np.uint8:
        raise UserError(
            f"video to write is {frames.dtype} {frames.shape}; expected uint8 [t,h,w,3] with at least one frame"
        )
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with replacing(path, what="video") as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = {"crf": str(quality)}
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries = context.color_trc = _BT709
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read_video(path: str | os.PathLike, *, max_frames: int | None = None) -> tuple[UInt8[np.ndarray, "t h w 3"], float]:
    """The frames of a file's first video stream, and its frame rate.

    Raises:
      UserError: no such file, not a video, damaged, or without a single frame.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"video {path} does not exist; check the path")
    frames = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"video {path} has no picture stream; give a video file")
            stream = container.streams.video[0]
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            for frame in container.decode(stream):
                if max_frames is not None and len(frames) == max_frames:
                    break
                frames.append(frame.to_ndarray(format="rgb24"))
    except av.FFmpegError as error:
        raise UserError(f"video {path} is damaged or not a video ({error.strerror}); replace the file") from error
    if not frames:
        raise UserError(f"video {path} holds no frame; replace the file")
    return np.stack(frames), fps


def write_contact_sheet(
    path: str | os.PathLike, rows: Sequence[Sequence[UInt8[np.ndarray, "h _ 3"]]], *, gap: int = 2,
    titles: Sequence[str] = (),
) -> None:
    """A PNG with one row of pictures per entry of `rows`, white between them, and `titles` above the columns.

    All pictures have one height, and those of a column one width. Raises UserError when the place cannot be written.
    The file appears complete or not at all.
    """
    height, longest = rows[0][0].shape[0], max(rows, key=len)
    lefts = np.cumsum([gap, *(picture.shape[1] + gap for picture in longest)])
    head = _TITLE_HEIGHT if titles else 0
    sheet = np.full((head + len(rows) * (height + gap) + gap, lefts[-1], 3), 255, np.uint8)
    for r, row in enumerate(rows):
        top = head + gap + r * (height + gap)
        for left, picture in zip(lefts, row, strict=False):
            sheet[top : top + height, left : left + picture.shape[1]] = picture
    image = Image.fromarray(sheet)
    font = ImageFont.load_default(_TITLE_HEIGHT * 2 // 3)
    for left, title in zip(lefts, titles, strict=False):
        ImageDraw.Draw(image).text((int(left), gap), title, fill="black", font=font)
    with replacing(path, what="contact sheet") as temporary:
        image.save(temporary, format="PNG")
