"""Videos and contact sheets: what is written can be read back, and is never half there."""

import av
import numpy as np
import pytest
from PIL import Image

from sdv_jax.data import video as video_module
from sdv_jax.data.video import read_video, to_uint8, write_contact_sheet, write_video
from sdv_jax.errors import NotWritten, UserError


def smooth(frames=5, height=48, width=64):
    t, y, x = np.mgrid[0:frames, 0:height, 0:width]
    return np.stack([x * 4 % 256, y * 5 % 256, t * 40], -1).astype(np.uint8)


@pytest.mark.parametrize(("frames", "height", "width"), [(5, 48, 64), (1, 32, 32), (3, 47, 33)])
def test_what_is_written_is_read_back(tmp_path, frames, height, width):
    pixels = np.zeros((frames, height, width, 3), np.uint8) + np.array([200, 60, 20], np.uint8)
    write_video(tmp_path / "a.mp4", pixels, fps=8)
    found, fps = read_video(tmp_path / "a.mp4")
    assert fps == 8 and found.shape == (frames, height + height % 2, width + width % 2, 3)
    assert np.abs(found[:, :height, :width].astype(int) - pixels).max() <= 3


def test_frames_keep_their_order_and_content(tmp_path):
    pixels = smooth()
    write_video(tmp_path / "a.mp4", pixels, fps=23.976)
    found, fps = read_video(tmp_path / "a.mp4")
    assert fps == pytest.approx(23.976, abs=1e-4)
    assert np.abs(found.astype(int) - pixels).mean() < 4
    assert read_video(tmp_path / "a.mp4", max_frames=2)[0].shape[0] == 2


def test_players_will_accept_it(tmp_path):
    write_video(tmp_path / "a.mp4", smooth(), fps=8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", smooth(), fps=8)
    before = (tmp_path / "a.mp4").read_bytes()

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video_module.np, "ascontiguousarray", broken)
    with pytest.raises(NotWritten, match="cannot be written: No space left on device"):
        write_video(tmp_path / "a.mp4", smooth(), fps=8)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and (tmp_path / "a.mp4").read_bytes() == before


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e9])
def test_impossible_frame_rates(tmp_path, fps):
    with pytest.raises(UserError, match="fps is"):
        write_video(tmp_path / "a.mp4", smooth(), fps=fps)


def test_reading_what_is_no_video(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    with pytest.raises(UserError, match="damaged or not a video"):
        read_video(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="does not exist"):
        read_video(tmp_path / "b.mp4")


def test_contact_sheet(tmp_path):
    rows = [[np.full((10, 20, 3), 10 * (3 * r + c), np.uint8) for c in range(3 - r)] for r in range(2)]
    write_contact_sheet(tmp_path / "a.png", rows, gap=2)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (2 + 2 * 12, 2 + 3 * 22, 3)
    assert [int(sheet[2, 2 + 22 * c, 0]) for c in range(3)] == [0, 10, 20]
    assert [int(sheet[14, 2 + 22 * c, 0]) for c in range(3)] == [30, 40, 255]  # a short row ends in white


def test_contact_sheet_with_titles_and_narrow_columns(tmp_path):
    row = [np.full((30, width, 3), value, np.uint8) for width, value in ((100, 10), (1, 20), (40, 30))]
    write_contact_sheet(tmp_path / "a.png", [row, row], gap=2, titles=["one", "", "three"])
    sheet = np.asarray(Image.open(tmp_path / "a.png"))[..., 0]
    head = sheet.shape[0] - (2 + 2 * 32)
    assert head > 0 and sheet.shape[1] == 2 + 102 + 3 + 42
    assert [int(sheet[head + 2 + 32 * r, left]) for r in range(2) for left in (2, 104, 107)] == [10, 20, 30] * 2
    assert (sheet[:head, :104] < 128).any() and (sheet[:head, 107:] < 128).any()  # both titles are written
    assert (sheet[:head, 60:106] == 255).all()


def test_to_uint8_rounds_and_clips():
    np.testing.assert_array_equal(to_uint8(np.array([-0.1, 0, 0.499 / 255, 0.5, 1, 1.1])), [0, 0, 0, 128, 255, 255])
