"""Decoding: which frames come out, in which size, and what a damaged or odd file becomes."""

import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace
from PIL import Image

from sdv_jax.data import streams
from sdv_jax.data.decode import Size, probe, read_clip, read_picture
from sdv_jax.data.importers.item import Clip, Frame, Rejected
from tests.data.clips import numbered, numbers, write


def nearest(times, fps, count):
    """What the resampler should choose, written the slow way."""
    due = [times[0] + k / fps for k in range(count)]
    return [min(range(len(times)), key=lambda i: (round(abs(times[i] - t), 9), i)) for t in due]


@pytest.mark.parametrize(
    ("source", "wanted", "expected"),
    [
        (24, 8, [0, 3, 6, 9, 12, 15, 18, 21]),
        (30, 16, [0, 2, 4, 6, 7, 9, 11, 13]),
        (24000 / 1001, 8, [0, 3, 6, 9, 12, 15, 18, 21]),
        (24000 / 1001, 24, [0, 1, 2, 3, 4, 5, 6, 7]),
        (25, 24, [0, 1, 2, 3, 4, 5, 6, 7]),
        (60, 24, [0, 2, 5, 7, 10, 12, 15, 17]),
        (16, 24, [0, 1, 1, 2, 3, 3, 4, 5]),
        (24, None, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_constant_rates(tmp_path, source, wanted, expected):
    write(tmp_path / "a.mp4", numbered(30), fps=source)
    frames = read_clip(Clip(tmp_path / "a.mp4"), Size(8, 32, 48), fps=wanted)
    assert numbers(frames) == expected
    if wanted:
        assert expected == nearest([i / source for i in range(30)], wanted, 8)


def test_any_rate_against_the_slow_way(tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path / "a.mp4", numbered(50), fps=30)
    for fps in rng.uniform(5, 40, 12):
        frames = read_clip(Clip(tmp_path / "a.mp4"), Size(7, 32, 48), fps=float(fps))
        assert numbers(frames) == nearest([i / 30 for i in range(50)], fps, 7), fps


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_rate_goes_by_time(tmp_path, suffix):
    times = [0, 40, 80, 200, 240, 400, 420, 430, 600, 640, 700, 900, 1000]  # ms
    write(tmp_path / f"a.{suffix}", numbered(13), times=times, fps=25)
    frames = read_clip(Clip(tmp_path / f"a.{suffix}"), Size(9, 32, 48), fps=10)
    assert numbers(frames) == [0, 2, 3, 4, 5, 7, 8, 10, 10]
    assert numbers(frames) == nearest([t / 1000 for t in times], 10, 9)
    assert probe(Clip(tmp_path / f"a.{suffix}")).fps == pytest.approx(13 / 1.04, rel=0.03)


@pytest.mark.parametrize(
    ("suffix", "codec", "pix_fmt"),
    [
        ("mp4", "libx264", "yuv420p"),
        ("mov", "libx264", "yuv444p"),
        ("mkv", "libx264", "yuv420p"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("avi", "libx264", "yuv420p"),  # no times of showing in the file
        ("ts", "libx264", "yuv420p"),  # seeks to about the right place only
        ("flv", "flv1", "yuv420p"),
        ("mpg", "mpeg2video", "yuv420p"),
        ("gif", "gif", "rgb8"),
    ],
)
def test_a_part_is_entered_at_its_first_frame(tmp_path, suffix, codec, pix_fmt):
    frames = numbered(50, height=64, width=96)
    write(tmp_path / f"a.{suffix}", frames, fps=25, codec=codec, pix_fmt=pix_fmt)
    clip = Clip(tmp_path / f"a.{suffix}", start=17, end=30)
    assert numbers(read_clip(clip, Size(13, 32, 48), fps=None)) == list(range(17, 30))
    assert numbers(read_clip(clip, Size(4, 32, 48), fps=25 / 3)) == [17, 20, 23, 26]
    assert numbers([read_picture(Frame(clip.path, 33), height=32, width=48)]) == [33]
    found = probe(clip)
    assert (found.frames, found.height, found.width) == (13, 64, 96)
    assert (found.fps, found.duration) == (pytest.approx(25), pytest.approx(13 / 25))


def test_entering_late_does_not_decode_from_the_beginning(tmp_path, monkeypatch):
    write(tmp_path / "a.mp4", numbered(50), gop=10)
    decoded, original = [], streams._shown
    monkeypatch.setattr(streams, "_shown", lambda *a, **k: decoded.append(0) or original(*a, **k))
    read_clip(Clip(tmp_path / "a.mp4", start=42), Size(3, 32, 48), fps=None)
    assert len(decoded) <= 1 + 10


def test_a_long_file_is_not_held_in_memory(tmp_path, monkeypatch):
    """Frames are let go of as they pass: at any time only a handful are alive."""
    write(tmp_path / "a.mp4", numbered(120), fps=24)
    alive, most, original = weakref.WeakSet(), [0], streams._shown

    def counted(*args, **kwargs):
        shown = original(*args, **kwargs)
        alive.add(shown)
        most[0] = max(most[0], len(alive))
        return shown

    monkeypatch.setattr(streams, "_shown", counted)
    read_clip(Clip(tmp_path / "a.mp4"), Size(30, 32, 48), fps=8)
    assert most[0] <= 6


def test_the_end_of_a_clip(tmp_path):
    write(tmp_path / "a.mp4", numbered(24), fps=24)
    assert numbers(read_clip(Clip(tmp_path / "a.mp4"), Size(8, 32, 48), fps=8)) == list(range(0, 24, 3))
    assert len(read_clip(Clip(tmp_path / "a.mp4"), Size(24, 32, 48), fps=None)) == 24
    rejected("too short", "gives 8 frames at 8 fps; 9 are needed", clip=tmp_path / "a.mp4", size=Size(9, 32, 48), fps=8)
    rejected("too short", "gives 24 frames; 25 are needed", clip=tmp_path / "a.mp4", size=Size(25, 32, 48), fps=None)
    rejected("too short", "has 24 frames; frame 24 was", clip=Clip(tmp_path / "a.mp4", start=24), size=Size(1, 32, 48))
    rejected("too short", "gives 5 frames", clip=Clip(tmp_path / "a.mp4", start=9, end=14), size=Size(6, 32, 48))


def rejected(reason, words, *, clip=None, size=None, fps=None, picture=None):
    with pytest.raises(Rejected) as caught:
        if picture is not None:
            read_picture(picture, height=32, width=32)
        else:
            clip = clip if isinstance(clip, Clip) else Clip(clip)
            read_clip(clip, size or Size(4, 32, 48), fps=fps)
    assert caught.value.reason == reason and words in caught.value.detail
    assert "\n" not in str(caught.value)
    return caught.value


# Geometry


def disc(height, width, *, radius=None, centre=None):
    """A white disc on black."""
    radius = radius or min(height, width) // 4
    y, x = np.mgrid[0:height, 0:width]
    top, left = centre or (height / 2, width / 2)
    inside = (y + 0.5 - top) ** 2 + (x + 0.5 - left) ** 2 < radius**2
    return np.where(inside[..., None], 255, 0).astype(np.uint8).repeat(3, -1)


def extent(pixels):
    """Height, width and centre of what is white."""
    rows, columns = np.nonzero((pixels[..., 0] > 127).any(1))[0], np.nonzero((pixels[..., 0] > 127).any(0))[0]
    return (
        rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1,
        (rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2,
    )  # fmt: skip


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 128), (96, 64), (50, 90), (200, 200)])
@pytest.mark.parametrize("odd", [0, 1])
def test_a_circle_stays_a_circle(tmp_path, height, width, odd):
    pixels = disc(120 - odd, 160 - odd, radius=30)
    fmt = "yuv444p" if odd else "yuv420p"
    write(tmp_path / "a.mp4", np.stack([pixels] * 3), pix_fmt=fmt, options={"crf": "4"})
    frame = read_clip(Clip(tmp_path / "a.mp4"), Size(3, height, width), fps=None)[1]
    picture = read_picture(Frame(tmp_path / "a.mp4", 1), height=height, width=width)
    scale = max(height / (120 - odd), width / (160 - odd))
    for found in (frame, picture):
        tall, wide, top, left = extent(found)
        assert abs(tall - wide) <= 1 and abs(wide - 60 * scale) <= 2
        assert abs(top - height / 2) <= 1 and abs(left - width / 2) <= 1
    assert np.abs(frame.astype(int) - picture).mean() < 3  # the two ways of resizing agree


def marked(height=48, width=64):
    """Four corners that differ, so that every turn and mirroring is told apart."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = 250
    pixels[: height // 2, width // 2 :] = 170
    pixels[height // 2 :, : width // 2] = 90
    return pixels


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_rotation_marks(tmp_path, degrees):
    upright = marked()
    stored = np.ascontiguousarray(np.rot90(upright, -degrees // 90))
    write(tmp_path / "a.mp4", np.stack([stored] * 3), rotation=degrees, options={"crf": "4"}, pix_fmt="yuv444p")
    write(tmp_path / "b.mp4", np.stack([upright] * 3), options={"crf": "4"}, pix_fmt="yuv444p")
    a, b = (read_clip(Clip(tmp_path / name), Size(3, 32, 40), fps=None) for name in ("a.mp4", "b.mp4"))
    assert np.abs(a.astype(int) - b).mean() < 2
    a, b = (probe(Clip(tmp_path / name)) for name in ("a.mp4", "b.mp4"))
    assert a == b and (a.height, a.width) == (48, 64)
    a, b = (read_picture(Frame(tmp_path / name, 1), height=32, width=40) for name in ("a.mp4", "b.mp4"))
    assert np.abs(a.astype(int) - b).mean() < 2


@pytest.mark.parametrize("turn", range(8))
def test_display_matrices(tmp_path, turn):
    """All turns and mirrorings: where the matrix sends the stored corners is where they are shown."""
    matrices = [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
                (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0)]  # fmt: skip
    a, b, c, d = matrices[turn]
    stored = marked()
    rows, columns = np.mgrid[0:48, 0:64]
    x, y = a * columns + c * rows, b * columns + d * rows
    x, y = x - x.min(), y - y.min()
    upright = np.zeros((y.max() + 1, x.max() + 1, 3), np.uint8)
    upright[y, x] = stored
    one = 1 << 16
    matrix = (a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    write(tmp_path / "a.mp4", np.stack([stored] * 3), matrix=matrix, options={"crf": "4"}, pix_fmt="yuv444p")
    height, width = upright.shape[:2]
    found = read_clip(Clip(tmp_path / "a.mp4"), Size(3, height, width), fps=None)[0]
    assert np.abs(found.astype(int) - upright).mean() < 2
    assert (probe(Clip(tmp_path / "a.mp4")).height, probe(Clip(tmp_path / "a.mp4")).width) == (height, width)


def test_a_box_counts_in_the_upright_picture(tmp_path):
    upright = marked()
    write(tmp_path / "a.mp4", np.stack([np.rot90(upright, -1)] * 3), rotation=90, options={"crf": "4"})
    box = (34, 2, 62, 22)  # within the upper right corner
    clip = read_clip(Clip(tmp_path / "a.mp4", box=box), Size(3, 20, 28), fps=None)
    picture = read_picture(Frame(tmp_path / "a.mp4", 0, box=box), height=20, width=28)
    assert np.abs(clip.astype(int) - 170).max() < 12 and np.abs(picture.astype(int) - 170).max() < 12
    assert (probe(Clip(tmp_path / "a.mp4", box=box)).height, probe(Clip(tmp_path / "a.mp4", box=box)).width) == (20, 28)
    far = (80, 0, 90, 10)
    rejected("box outside the picture", "64x48 pixels; the box is (80,", clip=Clip(tmp_path / "a.mp4", box=far))
    rejected("box outside the picture", "64x48 pixels", picture=Frame(tmp_path / "a.mp4", 0, box=far))


@pytest.mark.parametrize("aspect", ["4/3", "1/2"])
def test_pixels_that_are_not_square(tmp_path, aspect):
    ratio = Fraction(aspect)
    shown = disc(96, round(96 * ratio), radius=24)
    stored = np.asarray(Image.fromarray(shown).resize((96, 96)))
    write(tmp_path / "a.mp4", np.stack([stored] * 3), aspect=ratio, options={"crf": "4"})
    found = probe(Clip(tmp_path / "a.mp4"))
    assert (found.height, found.width) == (96, round(96 * ratio))
    for pixels in (
        read_clip(Clip(tmp_path / "a.mp4"), Size(3, 96, round(96 * ratio)), fps=None)[0],
        read_picture(Frame(tmp_path / "a.mp4", 0), height=96, width=round(96 * ratio)),
    ):
        tall, wide, _, _ = extent(pixels)
        assert abs(tall - wide) <= 2 and abs(tall - 48) <= 2
    turned = np.stack([np.rot90(stored)] * 3)
    write(tmp_path / "b.mp4", turned, aspect=1 / ratio, rotation=-90, options={"crf": "4"})
    assert probe(Clip(tmp_path / "b.mp4")) == found
    tall, wide, _, _ = extent(read_clip(Clip(tmp_path / "b.mp4"), Size(3, 96, found.width), fps=None)[0])
    assert abs(tall - wide) <= 2 and abs(tall - 48) <= 2


def test_ten_bits_and_many_colours(tmp_path):
    """Reference pixels come out of every storage: bits, subsampling, tagged and untagged colour matrices."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, :48], pixels[:, 48:] = (200, 60, 30), (30, 90, 220)
    for name, codec, pix_fmt, options in (
        ("a.mp4", "libx264", "yuv420p10le", {}),
        ("b.mp4", "libx264", "yuv422p10le", {}),
        ("c.mp4", "libx264", "yuv444p10le", {}),
        ("d.mkv", "libx264rgb", "rgb24", {}),
        ("e.mov", "prores_ks", "yuv422p10le", {}),
        ("f.mkv", "ffv1", "gray", {}),
    ):
        write(tmp_path / name, np.stack([pixels] * 4), codec=codec, pix_fmt=pix_fmt, options=options)
        found = read_clip(Clip(tmp_path / name), Size(2, 64, 96), fps=None)[0]
        if pix_fmt == "gray":
            assert (found[..., 0] == found[..., 2]).all()
        else:
            assert np.abs(found[20, 10].astype(int) - (200, 60, 30)).max() < 6, name
            assert np.abs(found[20, 80].astype(int) - (30, 90, 220)).max() < 6, name


@pytest.mark.parametrize(("height", "matrix"), [(720, Colorspace.ITU709), (480, Colorspace.ITU601)])
def test_colours_of_untagged_video(tmp_path, height, matrix):
    pixels = np.full((height, 64, 3), (200, 60, 30), np.uint8)
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = height, 64, "yuv420p"
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        file.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=1)))
        file.mux(stream.encode(None))
    found = read_clip(Clip(tmp_path / "a.mp4"), Size(1, height, 64), fps=None)[0]
    assert np.abs(found[height // 2, 32].astype(int) - (200, 60, 30)).max() <= 3
    picture = read_picture(Frame(tmp_path / "a.mp4", 0), height=height, width=64)
    assert np.abs(picture[height // 2, 32].astype(int) - (200, 60, 30)).max() <= 3


def test_transparency_is_put_on_white(tmp_path):
    rgba = np.zeros((32, 48, 4), np.uint8)
    rgba[:, 24:] = (200, 60, 30, 255)
    write(tmp_path / "a.mov", np.stack([rgba] * 2), codec="qtrle", pix_fmt="argb")
    for pixels in (
        read_clip(Clip(tmp_path / "a.mov"), Size(2, 32, 48), fps=None)[0],
        read_picture(Frame(tmp_path / "a.mov", 0), height=32, width=48),
    ):
        assert tuple(pixels[5, 5]) == (255, 255, 255) and tuple(pixels[5, 40]) == (200, 60, 30)


def test_a_tiny_video_with_transparency_is_read_like_one_without(tmp_path):
    for pix_fmt, channels in (("argb", 4), ("rgb24", 3)):
        path = write(tmp_path / f"{pix_fmt}.mov", np.full((2, 4, 4, channels), 255, np.uint8), codec="qtrle",
                     pix_fmt=pix_fmt)  # fmt: skip
        assert (read_clip(Clip(path), Size(2, 32, 32), fps=None) == 255).all()


def test_decoding_twice_gives_the_same_bytes(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (9, 60, 80, 3), np.uint8)
    write(tmp_path / "a.mp4", frames)
    once, again = (read_clip(Clip(tmp_path / "a.mp4"), Size(4, 32, 48), fps=10) for _ in range(2))
    np.testing.assert_array_equal(once, again)
