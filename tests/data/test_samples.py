import dataclasses
import errno
import io
import pickle
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdv_jax.data import decode, samples
from sdv_jax.data.decode import Size, read_clip, read_picture
from sdv_jax.data.importers.item import Clip, Item, Picture, Rejected
from sdv_jax.errors import UserError
from tests.data import clips, sets

RECIPE = samples.Recipe(
    buckets=(Size(9, 32, 48), Size(5, 32, 48), Size(13, 32, 32), Size(1, 32, 48), Size(1, 48, 32)),
    fps=8.0, references="target", frames=3, crops=4, jitter=0.1, seed=0, window="first",
)  # fmt: skip


class Items(list):
    """The simplest importer."""

    def key(self, index):
        return self[index].key


def recipe(**changes):
    return dataclasses.replace(RECIPE, **changes)


def clip_item(path, frames, *, fps=8, key="a", **size):
    return Item(key, "a ball", Clip(clips.write(path, sets.moving(0, frames, **size), fps=fps)))


def picture_item(path, key="a", height=40, width=64, references=(), **save):
    Image.fromarray(sets.moving(1, 1, height=height, width=width)[0]).save(path, **save)
    return Item(key, "a ball", Picture(path), views=partial(tuple, references))


def read(item, recipe=RECIPE):
    return samples.read(Items([item]), 0, recipe)


@pytest.mark.parametrize(
    ("frames", "fps", "size", "expected"),
    [
        (9, 8, (32, 48), Size(9, 32, 48)),
        (8, 8, (32, 48), Size(5, 32, 48)),
        (13, 8, (32, 32), Size(13, 32, 32)),
        (12, 8, (32, 32), Size(9, 32, 48)),
        (14, 8, (64, 96), Size(9, 32, 48)),
        (26, 24, (32, 48), Size(9, 32, 48)),
        (24, 24, (32, 48), Size(5, 32, 48)),
    ],
)
def test_a_clip_goes_where_proportions_and_frames_fit(tmp_path, frames, fps, size, expected):
    found = read(clip_item(tmp_path / "a.mp4", frames, fps=fps, height=size[0], width=size[1]))
    assert found.size == expected and found.target.shape == dataclasses.astuple(expected) + (3,)
    assert found.seconds == pytest.approx(frames / fps) and found.used == expected.frames / 8


def test_the_nearest_proportions_come_before_more_frames_and_size():
    buckets = [Size(9, 32, 48), Size(49, 32, 32), Size(5, 64, 96), Size(9, 64, 96), Size(9, 16, 24), Size(1, 32, 48)]
    order = samples.choose(buckets, frames=20, height=40, width=60)
    assert order == [Size(9, 32, 48), Size(9, 16, 24), Size(9, 64, 96), Size(5, 64, 96)]
    assert samples.choose(buckets, frames=60, height=40, width=40)[0] == Size(49, 32, 32)
    assert samples.choose(buckets, frames=None, height=40, width=40) == [Size(1, 32, 48)]


def test_too_short_and_the_wrong_kind_say_what_is_needed(tmp_path):
    with pytest.raises(Rejected, match="too short: .*a.mp4 has 4 frames at 8 fps; the shortest bucket needs 5"):
        read(clip_item(tmp_path / "a.mp4", 4))
    with pytest.raises(Rejected, match="no bucket for clips"):
        read(clip_item(tmp_path / "a.mp4", 9), recipe(buckets=(Size(1, 32, 48),)))
    with pytest.raises(Rejected, match="no bucket for pictures"):
        read(picture_item(tmp_path / "a.png"), recipe(buckets=(Size(9, 32, 48),)))


def test_a_clip_whose_end_is_damaged_goes_to_a_shorter_bucket(tmp_path, monkeypatch):
    item = clip_item(tmp_path / "a.mp4", 13)

    def cut(clip, size, *, fps):
        if size.frames > 5:
            raise Rejected("too short", "found only now")
        return read_clip(clip, size, fps=fps)

    monkeypatch.setattr(samples, "read_clip", cut)
    assert read(item).size == Size(5, 32, 48)
    with pytest.raises(Rejected, match="found only now"):
        read(item, recipe(buckets=(Size(9, 32, 48),)))


@pytest.mark.parametrize(
    ("fps", "start", "end", "last"), [(8.0, 0, None, 31), (None, 0, None, 39), (8.0, 5, 31, 14)]
)
def test_a_random_window_begins_anywhere_in_the_clip(tmp_path, fps, start, end, last):
    path = clips.write(tmp_path / "a.mp4", clips.numbered(48), fps=16)
    step, begins = 2 if fps else 1, set()
    for n in range(40):
        item = Item(f"key{n}", "a", Clip(path, start, end))
        found, again = (read(item, recipe(buckets=(Size(9, 32, 48),), fps=fps, window="random")) for _ in range(2))
        np.testing.assert_array_equal(found.target, again.target)
        numbers = list(clips.numbers(found.target))
        assert numbers == list(range(numbers[0], numbers[0] + 9 * step, step))
        begins.add(numbers[0])
        first = read(item, recipe(buckets=(Size(9, 32, 48),), fps=fps))
        assert list(clips.numbers(first.target))[0] == start
    assert start <= min(begins) < start + 5 and last - 5 < max(begins) <= last


def test_reference_frames_are_drawn_over_the_clip_without_repetition(tmp_path):
    path, drawn = tmp_path / "a.mp4", []
    clip_item(path, 9)
    for n in range(60):
        found = read(Item(f"key{n}", "a", Clip(path)))
        places = [int(np.flatnonzero((found.target == r).all(axis=(1, 2, 3)))[0]) for r in found.references]
        assert len(set(places)) == 3 and places == sorted(places)
        drawn.append(tuple(places))
    assert len(set(drawn)) > 20
    counts = np.bincount(np.concatenate(drawn), minlength=9)
    assert counts.min() > 5 and counts.max() < 40, "every frame is as likely as another"
    whole = read(Item("a", "a", Clip(path)), recipe(frames=0))
    np.testing.assert_array_equal(whole.references, whole.target)
    assert recipe(frames=20).count(Size(9, 32, 48)) == 9


def test_an_item_is_the_same_in_every_run_and_another_with_another_seed(tmp_path):
    item = clip_item(tmp_path / "a.mp4", 9)
    picture = picture_item(tmp_path / "p.png")
    for one in (item, picture):
        first, again = read(one), samples.read(pickle.loads(pickle.dumps(Items([one]))), 0, RECIPE)
        np.testing.assert_array_equal(first.target, again.target)
        np.testing.assert_array_equal(first.references, again.references)
        others = [read(one, recipe(seed=seed)).references.tobytes() for seed in range(4)]
        assert len(set(others)) > 1


def test_views_are_cropped_in_turn(tmp_path):
    paths = []
    for i, level in enumerate((40, 120, 200)):
        paths.append(tmp_path / f"v{i}.png")
        Image.fromarray(np.full((40, 64, 3), level, np.uint8)).save(paths[-1])
    item = picture_item(tmp_path / "a.png", references=tuple(map(Picture, paths)))
    found = read(item, recipe(references="views", crops=4))
    assert [round(float(view.mean())) for view in found.references] == [40, 120, 200, 40]
    clip = dataclasses.replace(clip_item(tmp_path / "a.mp4", 9), views=item.views)
    found = read(clip, recipe(references="views", crops=2))
    assert found.target.shape[0] == 9 and [round(float(v.mean())) for v in found.references] == [40, 120]
    with pytest.raises(Rejected, match="no other view"):
        read(dataclasses.replace(item, views=tuple), recipe(references="views"))


@pytest.mark.parametrize("place", [0, 1, 2, 5])
def test_a_view_that_cannot_be_read_is_left_out_as_if_it_were_not_there(tmp_path, place):
    views = []
    for i in range(5):
        Image.fromarray(sets.moving(i, 1)[0]).save(tmp_path / f"v{i}.png")
        views.append(Picture(tmp_path / f"v{i}.png"))
    whole = picture_item(tmp_path / "a.png", references=tuple(views))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    bad = Picture(tmp_path / "bad.png")
    views.insert(place, bad)
    for crops in (1, 4, 7):
        expected = read(whole, recipe(references="views", crops=crops))
        found = read(dataclasses.replace(whole, views=lambda: tuple(views)), recipe(references="views", crops=crops))
        np.testing.assert_array_equal(found.references, expected.references)
        assert not expected.left_out and len(found.left_out) == (place < crops)
        for reason, detail in found.left_out:
            assert reason == "unreadable picture" and "bad.png is not an image" in detail
    with pytest.raises(Rejected, match="unreadable picture: .*bad.png is not an image"):
        read(dataclasses.replace(whole, views=lambda: (bad, bad, bad)), recipe(references="views"))


def test_two_views_in_one_picture_are_decoded_once(tmp_path, monkeypatch):
    file = io.BytesIO()
    Image.fromarray(sets.moving(0, 1, width=96)[0]).save(file, "PNG")
    boxes, decoded = ((0, 0, 48, 32), (48, 0, 96, 32)), []

    def item(content):
        left, right = (Picture(content(), box=box) for box in boxes)
        return Item("a", "a ball", left, views=lambda: (right,))

    apart = read(item(lambda: bytes(bytearray(file.getvalue()))), recipe(references="views"))
    whole, read_image = file.getvalue(), decode.read_image
    monkeypatch.setattr(decode, "read_image", lambda *a, **k: decoded.append(a) or read_image(*a, **k))
    found = read(item(lambda: whole), recipe(references="views"))
    np.testing.assert_array_equal(found.target, apart.target)
    np.testing.assert_array_equal(found.references, apart.references)
    assert len(decoded) == 1


def test_references_are_looked_for_only_where_they_are_wanted(tmp_path):
    def none():
        raise Rejected("file missing", "view.png")

    item = dataclasses.replace(clip_item(tmp_path / "a.mp4", 9), views=none)
    assert read(item).references.shape[0] == 3
    with pytest.raises(Rejected, match="view.png"):
        read(item, recipe(references="views"))


class Unforeseen(Items):
    """Raises `error` in place of an item."""

    def __init__(self, error):
        self.error = error

    def key(self, index):
        return "a"

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (StopIteration(), "unforeseen error: StopIteration:"),
        (KeyError("faces\nof"), r"unforeseen error: KeyError: 'faces\\nof'"),
        (OSError(errno.ESTALE, "Stale file handle"), r"unforeseen error: OSError: \[Errno 116\] Stale file handle"),
    ],
)
def test_an_error_that_nothing_foresees_is_one_item(error, told):
    with pytest.raises(Rejected, match=told) as caught:
        samples.read(Unforeseen(error), 0, RECIPE)
    assert "\n" not in str(caught.value) and caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (UserError("of the settings"), UserError, "of the settings"), (KeyboardInterrupt(), KeyboardInterrupt, None),
        (MemoryError(), UserError, "no memory left to read item a; set work.workers to fewer"),
    ] + [
        (OSError(number, "the machine"), UserError, "item a cannot be read: the machine; mend that")
        for number in (errno.ENOSPC, errno.EMFILE, errno.ENFILE, errno.EIO)
    ],
)  # fmt: skip
def test_what_is_not_of_one_item_is_not_told_of_it(error, kind, told):
    with pytest.raises(kind, match=told):
        samples.read(Unforeseen(error), 0, RECIPE)


def test_a_picture_without_views_is_its_own_reference(tmp_path):
    item = picture_item(tmp_path / "a.png")
    found = read(item, recipe(jitter=0.0, crops=2))
    expected = read_picture(item.target, height=32, width=48)
    np.testing.assert_array_equal(found.target, expected[None])
    np.testing.assert_array_equal(found.references, np.stack([expected, expected]))
    jittered = read(item, recipe(jitter=0.3, crops=2))
    assert len({view.tobytes() for view in (*jittered.references, jittered.target[0], expected)}) == 4


@pytest.mark.parametrize(
    ("height", "width", "options", "expected"),
    [
        (40, 64, {}, Size(1, 32, 48)),
        (64, 40, {}, Size(1, 48, 32)),
        (40, 64, {"exif": 6}, Size(1, 48, 32)),
    ],
)
def test_a_picture_goes_where_it_fits_upright(tmp_path, height, width, options, expected):
    exif = Image.Exif()
    exif[0x0112] = options.get("exif", 1)
    item = picture_item(tmp_path / "a.jpg", height=height, width=width, exif=exif)
    assert read(item).size == expected
    inside = Item("a", "a", Picture((tmp_path / "a.jpg").read_bytes(), box=(0, 0, 20, 30)))
    assert read(inside).size == Size(1, 48, 32)


@pytest.mark.parametrize("content", [b"", b"no picture", Path])
def test_what_is_no_picture_is_rejected(tmp_path, content):
    source = tmp_path / "none.png" if content is Path else content
    with pytest.raises(Rejected, match="unreadable picture|file missing"):
        read(Item("a", "a", Picture(source)))


@pytest.mark.parametrize("side", [9500, 14_000])
def test_a_picture_of_too_many_pixels_is_rejected_by_its_header(tmp_path, side):
    Image.new("1", (side, side)).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", (tmp_path / "a.png").read_bytes()):
        with warnings.catch_warnings(), pytest.raises(Rejected, match="unreadable picture: .*more than 89478485"):
            warnings.simplefilter("error")
            read(Item("a", "a", Picture(source)))


def test_pictures_in_memory(tmp_path):
    file = io.BytesIO()
    Image.fromarray(sets.moving(0, 1)[0]).save(file, "PNG")
    found = read(Item("a", "a", Picture(file.getvalue())), recipe(jitter=0.0))
    np.testing.assert_array_equal(found.target[0], sets.moving(0, 1)[0])
