import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from sdv_jax.data import page
from sdv_jax.data.decode import Size
from sdv_jax.data.manifest import Shard
from sdv_jax.data.samples import Sample
from sdv_jax.data.settings import Page
from sdv_jax.data.units import RejectedItem, Unit

SETTINGS = Page(thumbnails=9, frames=4, height=16)
NASTY = "<script>alert('x')</script> & \"quotes\" ü 🎈"


class Reader(HTMLParser):
    """Text, tags and pictures of a page; fails where tags do not close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.pictures, self.tags, self.links = [], [], [], set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("href", "src", "srcset", "action", "data")]
        if tag == "img":
            self.pictures.append(dict(attrs)["src"])
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def sample(frames, views, *, key="k", caption="a ball", seconds=2.5):
    """Frames whose grey level, 20 apart, says which they are."""
    target = np.repeat(np.arange(frames, dtype=np.uint8)[:, None, None, None] * 20, 32 * 48 * 3).reshape(-1, 32, 48, 3)
    references = np.full((views, 32, 48, 3), 255, np.uint8)
    return Sample(key, caption, {}, Size(frames, 32, 48), target, references, seconds, seconds / 2)


def made(folder, *samples, rejected=(), left_out=(), durations=(2.5,), views=False):
    (folder / page.THUMBNAILS).mkdir(exist_ok=True)
    shown = [page.write_thumbnail(folder, i, s, SETTINGS, views=views) for i, s in enumerate(samples)]
    counts = {"9x32x48": len(samples), "1x32x48": 0}
    unit = Unit(
        0, "", len(samples) + len(rejected), {}, {"9x32x48": Shard(0, 1, 1, "")}, tuple(rejected), tuple(shown),
        tuple(durations), sum(durations) / 2, "", 1, 2.0, tuple(left_out),
    )  # fmt: skip
    about = {
        "settings": {"source.format": NASTY, "source.path": NASTY, "model.path": NASTY, "x": NASTY}, "source": {},
        "items": len(samples) + len(rejected), "records_per_bucket": counts,
        "rejected": {r.reason: 1 for r in rejected},
        "references_left_out": {r.reason: 1 for r in left_out}, "seconds_of_video": sum(durations) / 2,
        "captions_cut": 1, "seconds_of_work": 2.0,
    }  # fmt: skip
    page.write(folder, about, [unit])
    text = (folder / "index.html").read_text("utf-8")
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    return text, reader


def picture(source):
    head, data = source.split(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_everything_is_escaped_and_nothing_comes_from_elsewhere(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    rejected = [RejectedItem(NASTY, NASTY, NASTY)]
    text, reader = made(folder, sample(9, 2, key=NASTY, caption=NASTY), rejected=rejected)
    assert "script" not in reader.tags and "iframe" not in reader.tags and "link" not in reader.tags
    assert len(reader.links) == 1 and reader.links[0].startswith("data:image/jpeg;base64,")
    assert not re.search(r"url\(|@import", text)
    assert sum(told.count(NASTY) for told in reader.texts) >= 6


def test_a_clip_shows_frames_spread_over_it(tmp_path):
    _, reader = made(tmp_path, sample(9, 2))
    (source,) = reader.pictures
    strip = picture(source)
    assert strip.size == (4 * 24 + 3 * 3, 16)
    grey = [np.asarray(strip.crop((27 * i + 4, 4, 27 * i + 20, 12)), float).mean() / 20 for i in range(4)]
    assert [round(level) for level in grey] == [0, 3, 5, 8]


def test_a_pair_shows_references_beside_the_target(tmp_path):
    text, reader = made(tmp_path, sample(1, 5, seconds=0.0), views=True, durations=())
    assert [picture(source).size for source in reader.pictures] == [(3 * 24 + 2 * 3, 16), (24, 16)]
    assert text.index("references") < text.index("target") and "Length of the source clips" not in text


def test_counts_lengths_and_reasons_are_there(tmp_path):
    rejected = [RejectedItem(f"key{i}", "too short", f"detail {i}") for i in range(9)]
    text, reader = made(tmp_path, sample(9, 2), rejected=rejected, durations=(1.2, 1.4, 7.1))
    told = " ".join(reader.texts)
    assert "Set aside: 9 of 10" in told and "Samples: 1 of 1" in told and "0.50" in told
    assert "1 to 2 s" in told and "7 to 8 s" in told and "0 to 1 s" not in told
    assert "detail 4" in told and "detail 5" not in told, "a few examples for every reason"
    told = made(tmp_path, sample(9, 2))[0]
    assert "Nothing: every item could be used." in told and "References left out" not in told
    told = made(tmp_path, sample(9, 2), left_out=[RejectedItem("key", "unreadable picture", "views/bad.png")])[0]
    assert "References left out" in told and "views/bad.png" in told and "Nothing: every item" in told


def test_a_missing_thumbnail_is_said(tmp_path):
    (tmp_path / page.THUMBNAILS).mkdir()
    thumbnail = page.write_thumbnail(tmp_path, 0, sample(9, 2), SETTINGS, views=False)
    (tmp_path / page.THUMBNAILS / thumbnail.file).unlink()
    assert "thumbnail missing" in page._figure(tmp_path, thumbnail.file, "")


@pytest.mark.parametrize(("items", "most"), [(1, 1), (10, 3), (100, 7), (1000, 120), (5, 10), (7, 0)])
def test_thumbnails_are_capped_and_spread(items, most):
    shown = [i for i in range(items) if page.is_shown(i, items, most)]
    assert len(shown) <= most and (len(shown) >= min(items, most) / 2 or not most)
    assert len(set(np.diff(shown))) <= 1


@pytest.mark.parametrize(
    ("durations", "expected"),
    [
        ([], {}),
        ([0.0], {"0 to 0.001 s": 1}),
        ([3.0, 3.4, 14.0], {"2 to 4 s": 2, "4 to 6 s": 0, "6 to 8 s": 0, "8 to 10 s": 0, "10 to 12 s": 0,
                            "12 to 14 s": 0, "14 to 16 s": 1}),
        ([1.5, 1e9], {"0 to 1e+08 s": 1} | {f"{i}e+08 to {i + 1}e+08 s": 0 for i in range(1, 9)}
                     | {"9e+08 to 1e+09 s": 0, "1e+09 to 1.1e+09 s": 1}),
        ([1e300], {"1e+300 to 1.1e+300 s": 1}),
    ],
)  # fmt: skip
def test_histogram(durations, expected):
    assert page._histogram(durations) == expected
