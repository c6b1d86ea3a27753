"""Videos for tests, written frame by frame: any codec, any time stamps, rotation marks, and damage."""

from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition

STEP = 4  # grey levels from a frame to the next, so that a number survives a lossy codec


def numbered(count, *, height=32, width=48):
    """Frames whose grey level says which they are."""
    return np.array([np.full((height, width, 3), 16 + STEP * i % 224, np.uint8) for i in range(count)]).reshape(
        count, height, width, 3
    )


def numbers(frames):
    """Which frames of `numbered` these are."""
    return [round((float(frame.mean()) - 16) / STEP) for frame in frames]


def write(
    path, frames, *, fps=24, times=None, codec="libx264", pix_fmt="yuv420p", rotation=None, matrix=None, aspect=None,
    gop=12, options=None, container=None, flags=None, **tags,
):  # fmt: skip
    """`times` are milliseconds, `rotation` degrees, `matrix` a display matrix, `tags` of the codec (color_trc)."""
    with av.open(str(path), "w", format=container, options=flags or {}) as file:
        stream = file.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.gop_size = gop
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if matrix is not None:
            stream.set_display_matrix(matrix)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        file.start_encoding()
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24" if pixels.shape[-1] == 3 else "rgba")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def write_sound(path, *, cover=None):
    """Silence, with a picture as its cover if there is one."""
    with av.open(str(path), "w", format="mp4") as file:
        sound = file.add_stream("aac", rate=16000)
        if cover is not None:
            picture = file.add_stream("mjpeg", rate=1)
            picture.height, picture.width, picture.pix_fmt = *cover.shape[:2], "yuvj420p"
            picture.disposition = Disposition.attached_pic
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        file.mux(sound.encode(frame))
        if cover is not None:
            file.mux(picture.encode(av.VideoFrame.from_ndarray(cover, format="rgb24")))
            file.mux(picture.encode(None))
        file.mux(sound.encode(None))
    return path
