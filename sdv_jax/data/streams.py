"""Video files as rows of frames: opened with care, counted, entered in the middle, each frame with its time.

Nothing here holds more than one frame. What PyAV raises on a bad file becomes `Rejected`.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from jaxtyping import UInt8
from PIL import Image

from sdv_jax.data.importers.item import Rejected
from sdv_jax.errors import of_the_machine, one_line

# A file is what its content says, and some contents name other files or addresses (playlists, ffconcat): only
# containers that hold their own pictures are opened, and nothing but local files.
_OPENING = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,nut,mxf,ivf",
    "protocol_whitelist": "file",
}
_PERCEPTUAL_QUANTIZER = 16  # SMPTE ST 2084, the code of HDR10's transfer function in ISO/IEC 23091-2


@dataclass(frozen=True)
class Orientation:
    """How a stored picture becomes upright: swap rows and columns first, then mirror."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, pixels: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "a b c"]:
        if self.transpose:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]


@dataclass(frozen=True)
class Shown:
    """A decoded frame as it is stored, and how it is shown.

    Attributes:
      time, duration: seconds.
      orientation: what makes it upright.
      aspect: width over height of one pixel, when upright.
    """

    frame: av.VideoFrame
    time: Fraction
    duration: Fraction
    orientation: Orientation
    aspect: float


@contextmanager
def opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its first stream of moving pictures.

    Raises:
      Rejected: no file, no permission, nothing in it, not a video, sound only, or frames of absurd size; whatever
        FFmpeg reports inside the block.
      OSError: too many open files.
    """
    if not path.is_file():
        raise Rejected("file missing", f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    if not os.access(path, os.R_OK):
        raise Rejected("no permission", f"{path} cannot be read")
    if path.stat().st_size == 0:
        raise Rejected("empty file", f"{path} has no content")
    try:
        container = av.open(str(path.absolute()), options=_OPENING, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        if of_the_machine(error) and error.errno != errno.EIO:  # which is also what FFmpeg calls damage
            raise
        raise Rejected("unreadable video", f"{path} is damaged or not a video ({_words(error)})") from error
    with container:
        covers = Disposition.attached_pic
        streams = [stream for stream in container.streams.video if not stream.disposition & covers]
        if not streams:
            raise Rejected("no picture stream", f"{path} holds no moving pictures")
        if streams[0].codec_context is None:
            raise Rejected("unknown codec", f"{path} is of a codec that FFmpeg does not know")
        if streams[0].width * streams[0].height > Image.MAX_IMAGE_PIXELS:
            size = f"{streams[0].width}x{streams[0].height}"
            raise Rejected("frames too large", f"{path} has {size} pixels, more than {Image.MAX_IMAGE_PIXELS}")
        with decoding(path):
            yield container, streams[0]


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Raises Rejected for what FFmpeg reports inside the block."""
    try:
        yield
    except (av.FFmpegError, UnicodeDecodeError) as error:
        raise Rejected("damaged video", f"{path} cannot be decoded ({_words(error)})") from error


def frame_times(path: Path) -> tuple[list[Fraction], Shown]:
    """When each frame of a file is shown, in seconds and in order; and its first decoded frame.

    Packets are read and, but for the first frame, not decoded, which takes as long as reading the file. Where packets
    do not say when they are shown (AVI) all frames are decoded, one after the other.

    Raises:
      Rejected: no frame at all, or a file that cannot be read.
    """
    stamps, first = [], None
    with opened(path) as (container, stream):
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                stamps.append(packet.pts)
            if first is None:
                first = next(iter(packet.decode()), None)
        if first is None:
            raise Rejected("no frames", f"{path} holds no frame")
        shown = _shown(first, stream, stamp=_stamp(container, first), after=None)
        if None not in stamps and not _in_decoding_order(container):
            return [stamp * stream.time_base for stamp in sorted(stamps)], shown
    with closing(frames(path)) as decoded:
        return [each.time for each in decoded], shown


def frames(path: Path, *, start: int = 0, end: int | None = None) -> Iterator[Shown]:
    """The frames `start` to `end`, exclusive, of a file in the order in which they are shown.

    A part that begins late is reached through the key frame before it.

    Raises:
      Rejected: a file that cannot be read or has no frame, a part that begins behind the last, damage when it is
        reached.
    """
    begin = None
    if start:
        times, _ = frame_times(path)
        if start >= len(times):
            raise Rejected("too short", f"{path} has {len(times)} frames; frame {start} was asked for")
        begin = times[start]
    for attempt in ("seek", "read on"):
        with opened(path) as (container, stream):
            seeking = attempt == "seek" and begin is not None and not _in_decoding_order(container)
            if seeking:
                container.seek(round(begin / stream.time_base), stream=stream)
            decoded = _decoded(container, stream, path)
            head = next(decoded, None)
            if seeking and (head is None or head.time > begin):
                continue  # some containers land behind the wanted place: then from the beginning
            if head is None:
                raise Rejected("no frames", f"{path} holds no frame")
            rest = (each for each in chain([head], decoded) if begin is None or each.time >= begin)
            yield from islice(rest, None if end is None else end - start)
            return


def _decoded(container, stream, path: Path) -> Iterator[Shown]:
    """All frames from where the container stands; raises Rejected at the first that is not whole."""
    last = None
    for frame in container.decode(stream):
        before, last = last, _shown(frame, stream, stamp=_stamp(container, frame), after=last)
        if frame.is_corrupt:
            raise Rejected("damaged video", f"{path} is damaged at {float(last.time):.2f} s")
        if before is not None and last.time < before.time:
            raise Rejected("damaged video", f"{path}: time runs backwards after {float(before.time):.2f} s")
        if frame.color_trc == _PERCEPTUAL_QUANTIZER:
            raise Rejected("high dynamic range", f"{path} is HDR (PQ); convert it to BT.709")
        yield last


def _in_decoding_order(container: av.container.InputContainer) -> bool:
    """AVI numbers its frames as they are decoded; what FFmpeg gives as time of showing is out of order."""
    return container.format.name == "avi"


def _stamp(container: av.container.InputContainer, frame: av.VideoFrame) -> int | None:
    return frame.dts if _in_decoding_order(container) else frame.pts


def _shown(frame: av.VideoFrame, stream: av.VideoStream, *, stamp: int | None, after: Shown | None) -> Shown:
    rate = stream.average_rate or stream.guessed_rate
    duration = frame.duration * stream.time_base if frame.duration else 1 / rate if rate else Fraction(1, 25)
    follows = after.time + after.duration if after else Fraction(0)
    time = follows if stamp is None else stamp * stream.time_base
    turned, aspect = _orientation(frame), stream.sample_aspect_ratio or 1
    return Shown(frame, time, duration, turned, float(1 / aspect if turned.transpose else aspect))


def _orientation(frame: av.VideoFrame) -> Orientation:
    """From the display matrix of the container (FFmpeg, libavutil/display.h), rounded to quarter turns.

    (x, y) of the stored picture is shown at (a x + c y, b x + d y).
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return Orientation()
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(flip_rows=d < 0, flip_columns=a < 0)
    return Orientation(transpose=True, flip_rows=b < 0, flip_columns=c < 0)


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or one_line(error)
