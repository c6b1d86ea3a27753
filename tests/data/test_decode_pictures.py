"""Pictures for the identity task: files and bytes, boxes, masks, crop jitter, and what is no picture."""

import io

import numpy as np
import pytest
from PIL import Image

from sdv_jax.data.decode import read_crops, read_picture
from sdv_jax.data.importers.item import Frame, Picture, Rejected
from sdv_jax.data.importers.masks import Mask
from tests.data.clips import write
from tests.data.pictures import png_claiming
from tests.data.test_decode import disc, extent, marked

NOISE = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)


def encoded(pixels, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def rejected(reason, words, picture, **options):
    with pytest.raises(Rejected) as caught:
        read_picture(picture, **{"height": 32, "width": 32} | options)
    assert caught.value.reason == reason and words in caught.value.detail
    assert "\n" not in str(caught.value)


def test_a_file_and_its_bytes_are_the_same(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(NOISE))
    for source in (tmp_path / "a.png", encoded(NOISE)):
        np.testing.assert_array_equal(read_picture(Picture(source), height=40, width=60), NOISE)
        assert read_picture(Picture(source), height=32, width=32).shape == (32, 32, 3)


@pytest.mark.parametrize(
    "kind", ["sixteen bits", "cmyk", "animation", "exif", "palette", "alpha", "wrong extension", "grey"]
)
def test_odd_pictures_that_are_accepted(tmp_path, kind):
    path, picture = tmp_path / "a.png", Image.fromarray(marked())
    if kind == "sixteen bits":
        Image.fromarray((marked()[..., 0].astype(np.uint16)) * 257).save(path)
    elif kind == "cmyk":
        path = tmp_path / "a.jpg"
        picture.convert("CMYK").save(path, quality=95)
    elif kind == "animation":
        path = tmp_path / "a.gif"
        picture.save(path, save_all=True, append_images=[Image.new("RGB", picture.size)])
    elif kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(np.rot90(marked(), 1)).save(path, exif=exif)
    elif kind == "palette":
        picture.quantize(16).save(path)
    elif kind == "alpha":
        picture.putalpha(255)
        picture.save(path)
    elif kind == "wrong extension":
        picture.save(path, "JPEG", quality=95)
    else:
        picture.convert("L").save(path)
    found = read_picture(Picture(path), height=48, width=64)
    assert np.abs(found.astype(int) - marked()).mean() < 3


def test_what_is_no_picture(tmp_path):
    rejected("file missing", "none.png does not exist", Picture(tmp_path / "none.png"))
    rejected("unreadable picture", "is a folder", Picture(tmp_path))
    (tmp_path / "empty.png").touch()
    rejected("unreadable picture", "empty.png is an empty file", Picture(tmp_path / "empty.png"))
    for source in (b"not a picture", b""):
        rejected("unreadable picture", "is not an image that can be read", Picture(source))
    (tmp_path / "cut.png").write_bytes(encoded(NOISE)[:500])
    rejected("unreadable picture", "cut.png is damaged", Picture(tmp_path / "cut.png"))
    rejected("unreadable picture", "picture is damaged", Picture(encoded(NOISE)[:500]))
    (tmp_path / "bomb.png").write_bytes(png_claiming(60000, 60000))
    rejected("unreadable picture", "bomb.png has more than 89478485 pixels", Picture(tmp_path / "bomb.png"))
    rejected("unreadable picture", "more than 89478485 pixels", Picture(png_claiming(60000, 60000)))
    rejected("unreadable picture", "more than 89478485 pixels", Picture(png_claiming(10000, 10000)))
    rejected("unreadable picture", "has 4x40 pixels", Picture(encoded(NOISE[:, :4])))
    write(tmp_path / "a.mp4", np.stack([NOISE] * 2))
    rejected("unreadable picture", "is not an image", Picture(tmp_path / "a.mp4"))


def test_a_box(tmp_path):
    picture = Picture(encoded(marked()), box=(34, 2, 62, 22))
    np.testing.assert_array_equal(read_picture(picture, height=20, width=28), 170)
    over = Picture(encoded(marked()), box=(40, -3, 70, 20))  # overhangs: cut at the edge
    np.testing.assert_array_equal(read_picture(over, height=20, width=20), 170)
    rejected("box outside the picture", "has 64x48 pixels; the box is (70, 0, 90, 20)",
             Picture(encoded(marked()), box=(70, 0, 90, 20)))  # fmt: skip
    rejected("box outside the picture", "", Picture(encoded(marked()), box=(20, 30, 10, 40)))
    rejected("picture too small", "3x4 pixels are left", Picture(encoded(marked()), box=(10, 10, 13, 14)))


# Jitter


def test_jitter_needs_a_generator_and_a_share():
    for jitter, rng in ((0.1, None), (1.0, np.random.default_rng(0)), (-0.1, np.random.default_rng(0))):
        with pytest.raises(ValueError, match="jitter is"):
            read_picture(Picture(encoded(NOISE)), height=32, width=32, jitter=jitter, rng=rng)


def test_jitter_moves_and_scales_without_distortion():
    picture, seen = Picture(encoded(disc(240, 300, radius=50))), []
    rng = np.random.default_rng(0)
    for _ in range(60):
        tall, wide, top, left = extent(read_picture(picture, height=120, width=120, jitter=0.3, rng=rng))
        assert abs(tall - wide) <= 1
        seen.append((wide, top, left))
    sizes, tops, lefts = np.array(seen).T
    assert sizes.min() >= 49 and sizes.max() <= 50 / 0.7 + 2  # never enlarged by more than 1 / (1 - jitter)
    assert sizes.max() - sizes.min() > 14
    for centres in (tops, lefts):  # at most the share 0.3 of a side is cut away, on either side
        assert centres.min() >= 60 - 0.3 * 120 / 0.7 and centres.max() <= 60 + 0.3 * 120 / 0.7
        assert np.ptp(centres) > 15


def test_jitter_is_a_function_of_the_generator():
    draws = [
        read_picture(Picture(encoded(NOISE)), height=32, width=32, jitter=0.4, rng=np.random.default_rng(seed))
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).any()


# Masks


def compressed(runs):
    """COCO's packing of run lengths, as pycocotools' rleToString does it."""
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != -1 if bits & 16 else value != 0
            text += chr((bits | 32 if more else bits) + 48)
    return text


def runs_of(region):
    flat = region.T.reshape(-1).astype(int)
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, len(flat)]).tolist()
    return [0, *runs] if flat[0] else runs


def test_masks_in_both_writings():
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (5, 3), (48, 64), (300, 200)):
        for share in (0.02, 0.5, 0.98):
            region = rng.random((height, width)) < share
            region[:, width // 3 : width // 2] = True  # long runs as well
            runs = runs_of(region)
            np.testing.assert_array_equal(Mask(height, width, tuple(runs)).decode(), region)
            np.testing.assert_array_equal(Mask(height, width, compressed(runs)).decode(), region)


def test_a_packed_mask_that_pycocotools_wrote():
    """What `pycocotools.mask.encode` of version 2.0.11 gave for this region."""
    region = np.zeros((40, 50), bool)
    region[10:30, 5:45] = True
    region[15:18, 20:22] = False
    region[0, 0] = True
    packed = "01a6c0SJ" + "0" * 28 + "A_O7a0I_O7a08" + "0" * 44 + "n5"
    np.testing.assert_array_equal(Mask(40, 50, packed).decode(), region)
    assert compressed(runs_of(region)) == packed


def test_a_mask_whitens_and_nothing_of_it_is_cropped():
    region = np.zeros((48, 64), bool)
    region[4:44, 40:46] = True  # tall and narrow
    dark = encoded(np.full((48, 64, 3), 20, np.uint8))
    picture = Picture(dark, box=(40, 4, 46, 44), mask=Mask(48, 64, tuple(runs_of(region))))
    rejected("picture too small", "6x40 pixels", picture)
    region[4:44, 40:50] = True
    picture = Picture(dark, box=(38, 4, 52, 44), mask=Mask(48, 64, tuple(runs_of(region))))
    found = read_picture(picture, height=80, width=80)
    tall, wide, _, left = extent(255 - found)
    assert abs(tall - 80) <= 1 and abs(wide - 20) <= 1 and abs(left - 40) <= 1
    assert (found[:, :28] == 255).all()


def test_a_mask_of_a_part(tmp_path):
    """OpenS2V's masks are of the frame without its watermark's margin."""
    write(tmp_path / "a.mp4", np.full((2, 48, 64, 3), 30, np.uint8))
    region = np.ones((20, 30), bool)
    region[:, 15:] = False
    mask = Mask(20, 30, tuple(runs_of(region)), left=10, top=5)
    found = read_picture(Frame(tmp_path / "a.mp4", 0, mask=mask), height=48, width=64)
    assert (found[8:22, 13:22] < 60).all() and (found[:, 28:] > 250).all() and (found[:3] > 250).all()


@pytest.mark.parametrize(
    ("counts", "reason", "words"),
    [
        ((10, 10), "damaged mask", "the runs of a mask make 20 pixels, expected 48x64"),
        ((-5, 48 * 64 + 5), "damaged mask", "the runs of a mask"),
        ("~~", "damaged mask", "'~' is not a letter of a packed mask"),
        ("o", "damaged mask", "a packed mask breaks off"),
        ((48 * 64,), "empty mask", "the mask shows nothing"),
    ],
)
def test_damaged_masks(counts, reason, words):
    rejected(reason, words, Picture(encoded(marked()), mask=Mask(48, 64, counts)))


def test_a_mask_of_another_size():
    rejected("mask does not fit", "has 64x48 pixels, its mask 65x48",
             Picture(encoded(marked()), mask=Mask(48, 65, (0, 48 * 65))))  # fmt: skip


def test_crops_of_one_decoding_are_those_of_many(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 64, 3)).astype(np.uint8)).save(path)
    how = dict(height=16, width=24, jitter=0.3)
    one, other = np.random.default_rng(3), np.random.default_rng(3)
    together = read_crops(Picture(path), 4, **how, rng=one)
    np.testing.assert_array_equal(together, np.stack([read_picture(Picture(path), **how, rng=other) for _ in range(4)]))
