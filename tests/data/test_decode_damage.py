"""Videos that are damaged, odd or none: each is rejected with its reason, or gives what is whole."""

import os
import resource

import av
import numpy as np
import pytest
from PIL import Image

from sdv_jax.data.decode import Size, probe, read_clip, read_picture
from sdv_jax.data.importers.item import Clip, Frame, Rejected
from tests.data.clips import numbered, numbers, write, write_sound
from tests.data.test_decode import rejected


def test_files_that_are_no_videos(tmp_path):
    rejected("file missing", "does not exist", clip=tmp_path / "none.mp4")
    rejected("file missing", "is not a file", clip=tmp_path)
    (tmp_path / "empty.mp4").touch()
    rejected("empty file", "has no content", clip=tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    rejected("unreadable video", "text.mp4 is damaged or not a video", clip=tmp_path / "text.mp4")
    rejected("no picture stream", "sound.mp4 holds no moving", clip=write_sound(tmp_path / "sound.mp4"))
    cover = write_sound(tmp_path / "cover.m4a", cover=numbered(1)[0])
    rejected("no picture stream", "cover.m4a holds no moving", clip=cover, size=Size(1, 32, 48))
    Image.fromarray(numbered(1)[0]).save(tmp_path / "picture.jpg")
    (tmp_path / "picture.jpg").rename(tmp_path / "picture.mp4")
    rejected("unreadable video", "picture.mp4 is damaged or not", clip=tmp_path / "picture.mp4", size=Size(1, 32, 48))
    write(tmp_path / "a.mp4", numbered(4))
    (tmp_path / "a.mp4").chmod(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)  # root may read everything
        rejected("no permission", "cannot be read", clip=tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "content", ["#EXTM3U\n#EXTINF:1,\n{0}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile a.mp4\n"]
)
def test_files_that_only_name_other_files(tmp_path, content):
    """A playlist could lead out of the folder, or to an address."""
    write(tmp_path / "a.mp4", numbered(4))
    (tmp_path / "list.mp4").write_text(content.format(tmp_path / "a.mp4"))
    rejected("unreadable video", "list.mp4", clip=tmp_path / "list.mp4")
    with pytest.raises(Rejected, match="unreadable video"):
        probe(Clip(tmp_path / "list.mp4"))


def test_a_wrong_extension_does_not_matter(tmp_path):
    write(tmp_path / "a.mkv", numbered(6))
    (tmp_path / "a.mkv").rename(tmp_path / "a.mp4")
    assert numbers(read_clip(Clip(tmp_path / "a.mp4"), Size(4, 32, 48), fps=None)) == [0, 1, 2, 3]


def test_one_frame_and_none(tmp_path):
    write(tmp_path / "one.mp4", numbered(1))
    assert numbers(read_clip(Clip(tmp_path / "one.mp4"), Size(1, 32, 48), fps=8)) == [0]
    assert probe(Clip(tmp_path / "one.mp4")).frames == 1
    rejected("too short", "gives 1 frames; 4 are needed", clip=tmp_path / "one.mp4")
    (tmp_path / "none.gif").write_bytes(b"GIF89a" + bytes([16, 0, 16, 0, 0, 0, 0]) + b";")
    rejected("no frames", "none.gif holds no frame", clip=tmp_path / "none.gif")
    rejected("no frames", "none.gif holds no frame", picture=Frame(tmp_path / "none.gif", 0))
    with pytest.raises(Rejected, match="no frames: .* holds no frame"):
        probe(Clip(tmp_path / "none.gif"))
    write(tmp_path / "none.mp4", numbered(0))
    rejected("no picture stream", "none.mp4 holds no moving pictures", clip=tmp_path / "none.mp4")
    rejected("too short", "has 1 frames; frame 3 was asked for", picture=Frame(tmp_path / "one.mp4", 3))


def noisy(count=24):
    return np.random.default_rng(0).integers(0, 255, (count, 64, 96, 3), np.uint8)


def test_a_truncated_file_gives_what_it_has(tmp_path):
    write(tmp_path / "a.mp4", noisy(), flags={"movflags": "faststart"}, options={"bf": "0"})
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    found = read_clip(Clip(tmp_path / "cut.mp4"), Size(8, 32, 48), fps=None)
    np.testing.assert_array_equal(found, read_clip(Clip(tmp_path / "a.mp4"), Size(8, 32, 48), fps=None))
    rejected("damaged video", "cut.mp4", clip=tmp_path / "cut.mp4", size=Size(20, 32, 48))
    rejected("damaged video", "cut.mp4", clip=tmp_path / "cut.mp4", size=Size(7, 32, 48), fps=8)


def test_a_truncated_file_whose_index_is_lost(tmp_path):
    write(tmp_path / "a.mp4", noisy())
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    rejected("unreadable video", "cut.mp4 is damaged or not a video", clip=tmp_path / "cut.mp4")


def test_damage_in_the_middle_is_not_shown(tmp_path):
    write(tmp_path / "a.mp4", noisy(), flags={"movflags": "faststart"}, options={"bf": "0"}, gop=4)
    whole = bytearray((tmp_path / "a.mp4").read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 2000] = bytes(2000)
    (tmp_path / "bad.mp4").write_bytes(whole)
    good = read_clip(Clip(tmp_path / "a.mp4"), Size(8, 32, 48), fps=None)
    np.testing.assert_array_equal(read_clip(Clip(tmp_path / "bad.mp4"), Size(8, 32, 48), fps=None), good)
    rejected("damaged video", "bad.mp4", clip=tmp_path / "bad.mp4", size=Size(24, 32, 48))


def test_concealed_damage_is_not_shown(tmp_path):
    """One wrong byte within a frame: the decoder paints something over it, says so, and raises nothing."""
    write(tmp_path / "a.mp4", noisy(), flags={"movflags": "faststart"}, options={"bf": "0"})
    whole, concealed = (tmp_path / "a.mp4").read_bytes(), 0
    for place in range(len(whole) // 3, len(whole) - 100, len(whole) // 30):
        content = bytearray(whole)
        content[place] ^= 0x55
        (tmp_path / "bad.mp4").write_bytes(content)
        with av.open(str(tmp_path / "bad.mp4")) as file:
            marks = [frame.is_corrupt for frame in file.decode(video=0)]
        if any(marks):
            concealed += 1
            rejected("damaged video", "bad.mp4 is damaged at", clip=tmp_path / "bad.mp4", size=Size(24, 32, 48))
            if marks[0]:
                continue
            assert len(read_clip(Clip(tmp_path / "bad.mp4"), Size(marks.index(True), 32, 48), fps=None))
    assert concealed > 3


def test_time_that_runs_backwards(tmp_path):
    write(tmp_path / "a.ts", numbered(12))
    (tmp_path / "b.ts").write_bytes((tmp_path / "a.ts").read_bytes() * 2)
    assert len(read_clip(Clip(tmp_path / "b.ts"), Size(10, 32, 48), fps=None)) == 10
    rejected("damaged video", "b.ts: time runs backwards after", clip=tmp_path / "b.ts", size=Size(20, 32, 48))


def test_a_time_stamp_of_another_century(tmp_path):
    path = write(tmp_path / "a.mkv", numbered(4), times=[0, 100, 200, 10**12])
    with pytest.raises(Rejected, match="damaged video: .*a.mkv says that it lasts 10000000.. s"):
        probe(Clip(path))
    assert probe(Clip(path, end=2)).duration == 0.2


def test_random_damage_never_escapes(tmp_path):
    """Whatever bytes are wrong: frames of the right shape, or Rejected in one line."""
    write(tmp_path / "a.mp4", noisy(6), flags={"movflags": "faststart"})
    write(tmp_path / "a.webm", noisy(6), codec="libvpx-vp9", options={"cpu-used": "8"})
    rng = np.random.default_rng(0)
    outcomes = set()
    for trial in range(80):
        name = ("a.mp4", "a.webm")[trial % 2]
        content = bytearray((tmp_path / name).read_bytes())
        for place in rng.integers(0, len(content) if trial % 3 else 1200, 1 + trial % 5):
            content[place] = rng.integers(256)
        (tmp_path / f"b{name}").write_bytes(content)
        for read in (
            lambda clip: read_clip(clip, Size(3, 16, 24), fps=None).shape,
            lambda clip: read_clip(clip, Size(3, 16, 24), fps=24).shape,
            probe,
            lambda clip: read_picture(Frame(clip.path, 2), height=16, width=24).shape,
        ):
            try:
                found = read(Clip(tmp_path / f"b{name}"))
                assert not isinstance(found, tuple) or found[-1] == 3
            except Rejected as error:
                assert "\n" not in str(error)
                outcomes.add(error.reason)
    assert {"unreadable video", "damaged video"} <= outcomes


def test_high_dynamic_range_is_refused(tmp_path):
    write(tmp_path / "a.mp4", numbered(4), pix_fmt="yuv420p10le", color_trc=16)
    rejected("high dynamic range", "a.mp4 is HDR (PQ); convert it to BT.709", clip=tmp_path / "a.mp4")


def test_a_slide_show_is_no_clip(tmp_path):
    write(tmp_path / "a.mp4", numbered(10), fps=2)
    rejected("frame rate too low", "16 frames at 16 fps show 3 different ones", clip=tmp_path / "a.mp4",
             size=Size(16, 32, 48), fps=16)  # fmt: skip


def test_proportions_that_crop_most_away(tmp_path):
    write(tmp_path / "a.mp4", numbered(4, height=16, width=400))
    rejected("proportions too odd", "400x16; cropping to 48x32", clip=tmp_path / "a.mp4")


def test_frames_of_absurd_size(tmp_path, monkeypatch):
    write(tmp_path / "a.mp4", numbered(2))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    rejected("frames too large", "48x32 pixels, more than 1000", clip=tmp_path / "a.mp4")


def test_too_many_open_files_are_not_told_of_the_video(tmp_path):
    write(tmp_path / "a.mp4", numbered(2))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            probe(Clip(tmp_path / "a.mp4"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(free)
