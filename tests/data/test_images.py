"""What users hand over as a reference picture, and what becomes of it."""

import errno
import io
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from sdv_jax.data import images
from sdv_jax.data.images import fit_image, read_image, silence_pillow
from sdv_jax.errors import UserError

RED = (255, 0, 0)


@pytest.fixture
def gradient():
    rows, columns = np.mgrid[0:20, 0:30]
    return np.stack([rows * 12, columns * 8, rows + columns], -1).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_lossless_files_come_back_exactly(tmp_path, gradient, suffix):
    Image.fromarray(gradient).save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{suffix}"), gradient)


def test_pillow_and_arrays_are_the_same_picture(gradient):
    expected = gradient
    np.testing.assert_array_equal(read_image(Image.fromarray(gradient)), expected)
    np.testing.assert_array_equal(read_image(gradient), expected)
    np.testing.assert_array_equal(read_image(gradient.astype(np.float32) / 255), expected)


def test_alpha_is_composited_on_white():
    rgba = np.zeros((10, 12, 4), np.uint8)
    rgba[:, 6:] = (*RED, 255)
    rgba[0, 0] = (0, 0, 0, 128)
    for source in (rgba, Image.fromarray(rgba)):
        pixels = read_image(source)
        assert (
            tuple(pixels[5, 0]) == (255, 255, 255) and tuple(pixels[5, 11]) == RED and tuple(pixels[0, 0]) == (127,) * 3
        )


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (10, 10), 0)
    image.putpalette([*RED, 0, 255, 0])
    image.putpixel((5, 5), 1)
    image.save(tmp_path / "a.gif", transparency=0)
    pixels = read_image(tmp_path / "a.gif")
    assert tuple(pixels[0, 0]) == (255, 255, 255) and tuple(pixels[5, 5]) == (0, 255, 0)


def test_grey_becomes_three_equal_channels(gradient):
    grey = gradient[..., 0]
    for source in (grey, grey[..., None], Image.fromarray(grey)):
        np.testing.assert_array_equal(read_image(source), np.repeat(grey[..., None], 3, -1))


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    wide = np.linspace(0, 65535, 100).reshape(10, 10).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", wide):
        np.testing.assert_array_equal(read_image(source)[..., 1], np.round(wide / 257).astype(np.uint8))


def test_exif_rotation_is_applied(tmp_path, gradient):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to see it upright
    Image.fromarray(gradient).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(gradient, -1))


def test_an_animation_gives_its_first_frame(tmp_path):
    first, second = (Image.new("RGB", (16, 16), colour) for colour in (RED, (0, 0, 255)))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert tuple(read_image(tmp_path / "a.gif")[3, 3]) == RED


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((10, 10, 3), 1.5), "floats from 1.5 to 1.5; expected [0, 1]"),
        (np.full((10, 10, 3), np.nan), "NaN"),
        (np.zeros((10, 10, 2), np.uint8), "shape (10, 10, 2)"),
        (np.zeros((10, 10, 3), np.int32), "int32"),
        (np.zeros((0, 10, 3), np.uint8), "empty"),
        (np.zeros((7, 10, 3), np.uint8), "10x7 pixels"),
        ("nowhere.png", "nowhere.png does not exist"),
        (7, "is of type int"),
    ],
)
def test_what_is_refused(array, message):
    with pytest.raises(UserError) as caught:
        read_image(array)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_truncated_files_are_refused_in_one_line(tmp_path, gradient, keep):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    for suffix in ("png", "jpg", "webp", "tiff", "gif"):
        whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
        Image.fromarray(noise).save(whole)
        cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * keep)])
        with pytest.raises(UserError, match="cut") as caught:
            read_image(cut)
        assert "\n" not in str(caught.value)


def encoded(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_a_thread_that_reads_a_picture_leaves_the_filters_of_warnings_alone(gradient, monkeypatch):
    """The first of two threads begins first and ends first, while the second still reads."""
    first, second = Image.fromarray(gradient), Image.fromarray(gradient[:, :20])
    begun, ended = {30: threading.Event(), 20: threading.Event()}, threading.Event()

    def slowly(image):
        begun[image.width].set()
        assert begun[20].wait(20) and (image.width == 30 or ended.wait(20))
        return np.asarray(image)

    monkeypatch.setattr(images, "_to_rgb", slowly)
    before = list(warnings.filters)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(read_image, encoded(first))
        assert begun[30].wait(20)
        other = pool.submit(read_image, encoded(second))
        one.result(20)
        ended.set()
        other.result(20)
    assert warnings.filters == before


def test_what_pillow_says_of_damaged_tags_is_not_shown(gradient, recwarn):
    tags = b"Exif\0\0II*\0\x08\0\0\0\x05\0" + b"\x12\x01\x03\0\x01\0\0\0\x01\0\0\0" + b"cut"
    source = encoded(Image.fromarray(gradient), "JPEG", exif=tags)
    shown = read_image(source)
    assert any("Corrupt EXIF data" in str(warning.message) for warning in recwarn)
    recwarn.clear()
    silence_pillow()
    np.testing.assert_array_equal(read_image(source), shown)
    with pytest.raises(UserError, match="more than 89478485 pixels"):
        read_image(encoded(Image.new("1", (9500, 9500))))
    assert not list(recwarn)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EIO])
def test_what_is_wrong_with_the_machine_is_not_told_of_the_picture(gradient, number, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, "the machine")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(OSError, match="the machine"):
        read_image(encoded(Image.fromarray(gradient)))


def test_fit_keeps_proportions():
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[10:30, 30:50] = 255  # a square in the middle
    for fit, side in (("crop", 16), ("pad", 8)):
        out = fit_image(picture, height=32, width=32, fit=fit)
        assert out.shape == (32, 32, 3) and out.dtype == np.float32 and out.min() >= -1 and out.max() <= 1
        middle = out[16, :, 0] > 0, out[:, 16, 0] > 0
        if fit == "crop":
            assert [m.sum() for m in middle] == [side, side]
        else:
            assert middle[0].sum() == side and middle[1].sum() == side + 16  # above and below: white
            np.testing.assert_array_equal(out[[0, 31]], 1)


def test_fit_of_the_right_size_changes_nothing(gradient):
    out = fit_image(gradient, height=20, width=30)
    np.testing.assert_allclose((out + 1) * 127.5, gradient, atol=1e-4)


def test_unknown_fit():
    with pytest.raises(UserError, match="unknown reference fit 'stretch'; choose one of: crop, pad"):
        fit_image(np.zeros((8, 8, 3), np.uint8), height=8, width=8, fit="stretch")
