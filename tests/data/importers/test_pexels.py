"""Pexels-400k: addresses to files, the draw of a subset, and rows without a file."""

import pytest

from sdv_jax.data.importers import Clip, open_source
from tests.data.importers.sets import parquet, refused, rejected, video

NEW = "https://videos.pexels.com/video-files/{0}/{0}-hd_1920_1080_30fps.mp4"
OLD = "https://player.vimeo.com/external/{0}.hd.mp4?s=4f7a&profile_id=119"


def row(number, *, title="Waves", duration=12, address=NEW):
    return {
        "thumbnail": f"https://images.pexels.com/videos/{number}/a.jpeg", "title": title, "duration": duration,
        "video": address and address.format(number), "view_count": 7,
    }  # fmt: skip


def test_files_are_found_by_name_or_number(tmp_path):
    parquet(tmp_path / "pexels-400k.parquet", [row(11), row(12), row(13, address=OLD), row(14, address=OLD)])
    names = ("11-hd_1920_1080_30fps.mp4", "00/12.mp4", "13.hd.mp4", "14.mov")
    for name in names:
        video(tmp_path / "videos" / name)
    importer = open_source("pexels", tmp_path)
    items = [importer[i] for i in range(4)]
    assert [item.target for item in items] == [Clip(tmp_path / "videos" / name) for name in names]
    assert [item.key for item in items] == ["11", "12", "13", "14"]
    assert items[0].caption == "Waves" and items[0].references == ()
    assert items[2].provenance["url"] == OLD.format(13) and items[2].provenance["row"] == 2
    for name in names:
        (tmp_path / "elsewhere" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "videos").rename(tmp_path / "elsewhere/v")
    elsewhere = open_source("pexels", tmp_path / "pexels-400k.parquet", videos=str(tmp_path / "elsewhere"))
    assert elsewhere[1].target == Clip(tmp_path / "elsewhere/v/00/12.mp4")


def test_rows_that_cannot_be_used(tmp_path):
    rows = [row(1), row(2), row(3, title=None), row(4, title=" "), row(5, address=None), row(1)]
    importer = open_source("pexels", parquet(tmp_path / "p.parquet", rows))
    for number in (1, 3, 4):
        video(tmp_path / f"{number}.mp4")
    importer = open_source("pexels", tmp_path / "p.parquet")
    assert importer[0].key == "1"
    rejected(importer, 1, "file missing", "p.parquet row 1: 2-hd_1920_1080_30fps.mp4 is not in")
    rejected(importer, 2, "no caption", "row 2 title has none")
    rejected(importer, 3, "no caption", "row 3 title has none")
    rejected(importer, 4, "no file", "row 4: the address is null")
    assert importer[5].key == importer.key(5) == "1"  # which of the two counts is the preparation's business


def test_an_address_cannot_lead_out_of_the_folder(tmp_path):
    video(tmp_path / "outside.mp4")
    (tmp_path / "set").mkdir()
    rows = [row(1, address="https://x/..%2Foutside.mp4"), row(2, address="/etc/passwd"), row(3, address="..")]
    importer = open_source("pexels", parquet(tmp_path / "set/p.parquet", rows))
    for index in range(3):
        rejected(importer, index, "file missing", "is not in")


def test_the_draw_depends_on_seed_and_addresses_only(tmp_path):
    rows = [row(100 + n) for n in range(60)]
    parquet(tmp_path / "a.parquet", rows)
    parquet(tmp_path / "b.parquet", rows[::-1])

    def drawn(name, **options):
        importer = open_source("pexels", tmp_path / name, count=20, **options)
        assert len(importer) == 20 and importer.about["chosen"] == 20 and importer.about["rows"] == 60
        return importer.urls()

    assert drawn("a.parquet") == drawn("a.parquet") and set(drawn("a.parquet")) == set(drawn("b.parquet"))
    assert drawn("a.parquet") == sorted(drawn("a.parquet"))  # in the order of the file
    assert len(set(drawn("a.parquet")) & set(drawn("a.parquet", seed=1))) < 15
    part, whole = (set(open_source("pexels", tmp_path / "a.parquet", count=n).urls()) for n in (10, 30))
    assert part < whole  # a larger draw keeps the smaller one: nothing is fetched in vain


def test_durations(tmp_path):
    parquet(tmp_path / "p.parquet", [row(1, duration=9), row(2, duration=10), row(3, duration=None)])
    assert open_source("pexels", tmp_path, minimum_duration=10).urls() == [NEW.format(2)]
    assert len(open_source("pexels", tmp_path)) == 3
    refused("0 of 3 rows are left, 1 are wanted", "pexels", tmp_path, minimum_duration=60.0)
    refused("3 of 3 rows are left, 4 are wanted", "pexels", tmp_path, count=4)
    refused("option count is -1", "pexels", tmp_path, count=-1)


def test_columns_of_another_kind(tmp_path):
    parquet(tmp_path / "a.parquet", [row(1)])
    parquet(tmp_path / "b.parquet", [row(2) | {"video": 5}])
    refused("b.parquet: column video is of type int64; expected texts", "pexels", tmp_path)
    parquet(tmp_path / "b.parquet", [row(2, title=5)])
    refused("b.parquet: column title is of type int64; expected texts", "pexels", tmp_path)
    parquet(tmp_path / "b.parquet", [row(2, duration="00:10")])
    refused("b.parquet: column duration is of type string; expected numbers", "pexels", tmp_path, minimum_duration=5)
    assert len(open_source("pexels", tmp_path)) == 2  # nothing asks for durations
    parquet(tmp_path / "b.parquet", [row(2, duration=9.5), row(3, duration=float("nan"))])
    assert open_source("pexels", tmp_path, minimum_duration=5).urls() == [NEW.format(1), NEW.format(2)]


def test_addresses_that_are_none(tmp_path):
    importer = open_source("pexels", parquet(tmp_path / "p.parquet", [row(1, address="http://[bad"), row(2)]))
    rejected(importer, 0, "no file", "p.parquet row 0: the address http://[bad names none")
    assert importer.key(1) == "2"
    refused("0 of 2 rows are left", "pexels", tmp_path, present_only=True)


def test_links_to_folders_are_followed(tmp_path, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    video(elsewhere / "1.mp4")
    video(tmp_path / "videos/2.mp4")
    (tmp_path / "videos/part").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(tmp_path / "videos")
    parquet(tmp_path / "p.parquet", [row(1), row(2)])
    importer = open_source("pexels", tmp_path)
    assert [importer[i].target.path for i in range(2)] == [tmp_path / "videos/part/1.mp4", tmp_path / "videos/2.mp4"]
    assert importer.about["files"] == 2


def test_a_caption_never_goes_to_another_clip(tmp_path):
    place = "https://videos.pexels.com/video-files/{0}/"
    addresses = {111: "4k-sunset.mp4", 222: "4k-dog.mp4", 4: "4-cats.mp4", 5: "clip.mp4", 6: "clip.mp4",
                 7: "8_hd.mp4", 8: "8-uhd.mp4", 9: "9.mp4"}  # fmt: skip
    rows = [row(n, title=f"{n}", address=place.format(n) + name) for n, name in addresses.items()]
    rows.append(row(12, title="vimeo", address=OLD))
    parquet(tmp_path / "p.parquet", rows)
    for name in ("4k-dog.mp4", "9.mp4", "6/clip.mp4", "8_hd.mp4", "4k.mp4", "111.mp4", "12-other.mp4"):
        video(tmp_path / "videos" / name)
    importer = open_source("pexels", tmp_path)
    assert [importer.key(i) for i in range(len(importer))] == [*map(str, addresses), "12"]
    found = [importer._file(importer._addresses[i]) for i in range(len(importer))]
    assert [file and file.relative_to(tmp_path / "videos").as_posix() for file in found] == [
        "111.mp4", "4k-dog.mp4", None, None, "6/clip.mp4", "8_hd.mp4", None, "9.mp4", "12-other.mp4",
    ]  # fmt: skip
    assert importer[1].caption == "222"
    rejected(importer, 2, "file missing", "4-cats.mp4 is not in")


def test_only_what_is_there(tmp_path):
    parquet(tmp_path / "p.parquet", [row(n) for n in range(1, 9)])
    for number in (2, 5):
        video(tmp_path / f"videos/{number}.mp4")
    importer = open_source("pexels", tmp_path, present_only=True)
    assert [importer[i].key for i in range(len(importer))] == ["2", "5"]
    refused("2 of 8 rows are left, 3 are wanted", "pexels", tmp_path, present_only=True, count=3)


@pytest.mark.parametrize("column", ["title", "video", "duration"])
def test_columns(tmp_path, column):
    content = row(1)
    del content[column]
    parquet(tmp_path / "p.parquet", [content])
    refused(f"p.parquet has no column {column}; it has: ", "pexels", tmp_path)
