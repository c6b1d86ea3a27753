"""Opening a set: formats, options, and what all importers have in common."""

import errno
import os
import pickle

import numpy as np
import pytest

from sdv_jax.data.importers import FORMATS, Rejected, open_source
from sdv_jax.data.importers.reading import path_key, read_lines
from sdv_jax.errors import UserError
from tests.data.importers.sets import parquet, refused, rejected, subject_row, video
from tests.data.importers.test_opens2v import write_part


def test_formats_and_options(tmp_path):
    refused("unknown data format 'metdata' (did you mean metadata?); choose one of: subjects200k, pexels, folder, "
            "text_lists, metadata, opens2v", "metdata", tmp_path)  # fmt: skip
    refused("data format folder has no option 'kinds' (did you mean kind?); it has: kind, subjects, references",
            "folder", tmp_path, kinds=1)  # fmt: skip
    refused("option kind is 3; expected a text, as 'all'", "folder", tmp_path, kind=3)
    refused("option subjects is 1; expected True or False, as False", "folder", tmp_path, subjects=1)
    refused("option minimum_score is 4.5; expected a whole number, as 5", "subjects200k", tmp_path, minimum_score=4.5)
    refused("option minimum_duration is '4'; expected a number, as 0.0", "pexels", tmp_path, minimum_duration="4")
    refused("option collections is 'collection_2'; expected a list of texts", "subjects200k", tmp_path,
            collections="collection_2")  # fmt: skip


@pytest.fixture
def sets(tmp_path):
    """A usable set of every format: its path."""
    parquet(tmp_path / "subjects/data/train-0.parquet", [subject_row(), subject_row()])
    address = "https://videos.pexels.com/video-files/{0}/{0}-hd.mp4"
    parquet(
        tmp_path / "pexels/pexels.parquet",
        [{"title": "Sea", "video": address.format(n), "duration": 9, "view_count": 1} for n in (1, 2)],
    )
    for n in (1, 2):
        for name in (f"pexels/videos/{n}.mp4", f"folder/{n}.mp4", f"lists/{n}.mp4", f"metadata/{n}.mp4"):
            video(tmp_path / name)
        (tmp_path / f"folder/{n}.txt").write_text("Sea")
    (tmp_path / "lists/prompts.txt").write_text("Sea\nSea\n")
    (tmp_path / "lists/videos.txt").write_text("1.mp4\n2.mp4\n")
    (tmp_path / "metadata/metadata.csv").write_text("video,prompt\n1.mp4,Sea\n2.mp4,Sea\n")
    write_part(tmp_path / "opens2v/part1.json", ["one", "two"])
    video(tmp_path / "opens2v/videos/part1/one.mp4")
    video(tmp_path / "opens2v/videos/part1/two.mp4")
    names = dict(zip(FORMATS, ("subjects", "pexels", "folder", "lists", "metadata", "opens2v"), strict=True))
    return {format: tmp_path / name for format, name in names.items()}


@pytest.mark.parametrize("format", FORMATS)
def test_what_every_importer_does(sets, format):
    importer = open_source(format, sets[format])
    items = [importer[index] for index in range(len(importer))]
    assert len({item.key for item in items}) == len(items) >= 2
    assert [importer.key(index) for index in range(len(importer))] == [item.key for item in items]
    assert all(item.caption and item.provenance for item in items)
    with pytest.raises(IndexError):
        importer[len(importer)]
    again = pickle.loads(pickle.dumps(importer))  # worker processes get copies
    assert [again[index] for index in range(len(again))] == items
    assert [again[index].references for index in range(len(again))] == [item.references for item in items]
    assert open_source(format, str(sets[format]))[1] == items[1]
    assert importer.about and all(isinstance(value, (str, int, float)) for value in importer.about.values())


@pytest.mark.parametrize(("format", "options"), [("folder", {}), ("pexels", {}), ("pexels", {"present_only": True})])
def test_a_folder_within_that_cannot_be_read(sets, monkeypatch, format, options):
    video(sets[format] / "videos/closed/3.mp4")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused("videos/closed cannot be read (Permission denied): its files", format, sets[format], **options)


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_that_is_not_there(tmp_path, format):
    with pytest.raises(UserError) as caught:
        open_source(format, tmp_path / "nowhere")
    assert "nowhere" in str(caught.value) and "\n" not in str(caught.value)


def test_an_item_whose_references_are_broken_is_one_without_them(sets):
    (sets["text_lists"] / "images.txt").write_text("gone.png\n\n")
    (sets["metadata"] / "metadata.csv").write_text("video,prompt,reference\n1.mp4,Sea,gone.png\n2.mp4,Sea,1.mp4\n")
    write_part(sets["opens2v"] / "part1.json", ["one", "two"], subjects={"cup": np.zeros((28, 40), bool) | True})
    part = sets["opens2v"] / "part1.json"
    part.write_text(part.read_text().replace('"annotation"', '"annotations"'))
    for format in ("text_lists", "metadata", "opens2v"):
        importer = open_source(format, sets[format])
        for index in range(2):
            assert importer[index].caption and importer[index].target.path.is_file()
            with pytest.raises(Rejected):
                importer[index].references  # noqa: B018


def test_names_with_spaces_around_them(tmp_path):
    video(tmp_path / " a " / " b.mp4")
    (tmp_path / " a " / " b.txt").write_text("Sea")
    assert open_source("folder", tmp_path)[0].target.path == tmp_path / " a " / " b.mp4"
    video(tmp_path / "c.mp4")
    (tmp_path / "metadata.csv").write_text("video,prompt\n c.mp4 ,Sea\n")
    assert open_source("metadata", tmp_path)[0].key == "c.mp4"


def test_file_names_that_are_not_text(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    video(tmp_path / "a.mp4").rename(tmp_path / f"{name}.mp4")
    (tmp_path / f"{name}.txt").write_text("Sea")
    importer = open_source("folder", tmp_path)
    assert importer[0].key == importer[0].provenance["file"] == "caf\\udce9.mp4"
    assert importer[0].target.path.is_file()
    (tmp_path / f"{name}.txt").unlink()
    rejected(importer, 0, "no caption", "caf\\udce9.txt does not exist")


def test_a_detail_is_one_line_that_can_be_written():
    rejected = Rejected("no caption", "a name\nwith lines \ud800 " + "x" * 9999)
    assert rejected.detail.encode().startswith(b"a name with lines \\ud800 x") and len(rejected.detail) == 500
    assert str(pickle.loads(pickle.dumps(rejected))) == str(rejected) == f"no caption: {rejected.detail}"


def test_only_newlines_end_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\x0b\u2028more\r\n\r\nthree\n \n\n".encode())
    assert read_lines(tmp_path / "a.txt", what="list") == ["one\x0b\u2028more", "", "three", " ", ""]


@pytest.mark.parametrize("root", ["set", "/a/set", "../set", "a/../set"])
def test_keys_of_paths_are_what_relpath_gives(root):
    for name in ("a.mp4", "./a//b.mp4", "x/../a.mp4", "x/../../set/a.mp4", "../a.mp4", "..a.mp4", "/a/set/b.mp4", ".",
                 " a.mp4", "a/..", os.path.abspath("set/c.mp4"), "//a.mp4"):  # fmt: skip
        assert path_key(root, name) == os.path.relpath(os.path.join(root, name), root)
