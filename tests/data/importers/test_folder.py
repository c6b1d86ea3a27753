"""A folder of clips or pictures with .txt files, one folder per subject, and references beside."""

import pytest

from sdv_jax.data.importers import Clip, Picture, open_source
from tests.data.importers.sets import picture, refused, rejected, video


@pytest.fixture
def folder(tmp_path):
    for name in ("b.mp4", "a/c.MOV", "a/d.mkv"):
        video(tmp_path / name.lower()).rename(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"Clip {name}.\n")
    picture(tmp_path / "e.png")
    (tmp_path / "e.txt").write_text("A picture.")
    return tmp_path


def test_items_in_order(folder):
    video(folder / ".hidden/x.mp4")
    video(folder / "._b.mp4")
    (folder / "notes.md").write_text("no item")
    importer = open_source("folder", folder)
    items = [importer[i] for i in range(len(importer))]
    assert [item.key for item in items] == ["a/c.MOV", "a/d.mkv", "b.mp4", "e.png"]
    assert [item.caption for item in items] == ["Clip a/c.MOV.", "Clip a/d.mkv.", "Clip b.mp4.", "A picture."]
    assert items[0].target == Clip(folder / "a/c.MOV") and items[3].target == Picture(folder / "e.png")
    assert len(open_source("folder", folder, kind="video")) == 3
    assert open_source("folder", folder, kind="image")[0].key == "e.png"


def test_captions(folder):
    importer = open_source("folder", folder)
    (folder / "b.txt").unlink()
    rejected(importer, 2, "no caption", "b.txt does not exist")
    (folder / "b.txt").write_text(" \n ")
    rejected(importer, 2, "no caption", "b.txt has none")
    (folder / "b.txt").write_bytes(b"caf\xe9")
    rejected(importer, 2, "caption is not UTF-8", "b.txt: byte 3")
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfWith a mark.\r\n")
    assert importer[2].caption == "With a mark."
    (folder / "b.txt").write_text("word " * 2000)
    assert importer[2].caption == ("word " * 2000).strip()  # the tokenizer cuts it
    (folder / "b.mp4").unlink()
    rejected(importer, 2, "file missing", "b.mp4 does not exist")


def test_subjects(tmp_path):
    for name in ("dog/1.png", "dog/2.jpg", "dog/3.png", "cat/1.png", "cat/2.png", "alone/1.png"):
        picture(tmp_path / name)
    for name in ("dog", "alone"):
        (tmp_path / name / "caption.txt").write_text("A dog.")
    (tmp_path / "dog/2.txt").write_text("The dog from behind.")
    importer = open_source("folder", tmp_path, subjects=True)
    rejected(importer, 0, "no other view", "alone/1.png is the only picture")
    rejected(importer, 1, "no caption", "cat/caption.txt does not exist")
    first, second = importer[3], importer[4]
    assert first.key == "dog/1.png" and first.caption == "A dog." and second.caption == "The dog from behind."
    assert second.target == Picture(tmp_path / "dog/2.jpg")
    assert second.references == (Picture(tmp_path / "dog/1.png"), Picture(tmp_path / "dog/3.png"))


def test_references_beside(folder):
    picture(folder / "refs/b.png")
    picture(folder / "refs/a/c/1.png")
    picture(folder / "refs/a/c/2.png")
    importer = open_source("folder", folder, references="refs", kind="video")
    assert [importer.key(i) for i in range(len(importer))] == ["a/c.MOV", "a/d.mkv", "b.mp4"]
    assert importer[0].references == (Picture(folder / "refs/a/c/1.png"), Picture(folder / "refs/a/c/2.png"))
    assert importer[2].references == (Picture(folder / "refs/b.png"),)
    rejected(importer, 1, "no reference", "a/d.mkv has no picture in refs")


def test_links_to_folders_are_followed(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    video(elsewhere / "deep/z.mp4")
    (folder / "0").symlink_to(elsewhere)
    (folder / "1").symlink_to("a")  # what it leads to has a path of its own
    (elsewhere / "back").symlink_to(folder)
    (elsewhere / "round").symlink_to(elsewhere)
    (folder / "itself").symlink_to("itself")
    importer = open_source("folder", folder, kind="video")
    assert [importer.key(i) for i in range(len(importer))] == ["0/deep/z.mp4", "a/c.MOV", "a/d.mkv", "b.mp4"]
    assert importer[1].caption == "Clip a/c.MOV."
    rejected(importer, 0, "no caption", "0/deep/z.txt does not exist")


def test_folders_that_are_broken(tmp_path):
    refused("holds no video or picture among its 0 files", "folder", tmp_path)
    (tmp_path / "a.txt").write_text("no clip")
    refused("holds no video among its 1 files", "folder", tmp_path, kind="video")
    refused("a.txt is a file; give the folder", "folder", tmp_path / "a.txt")
    refused("option kind is 'clip'; choose one of: all, video, image", "folder", tmp_path, kind="clip")
    refused("option subjects takes its references from", "folder", tmp_path, subjects=True, references="refs")
    refused("has no folder refs", "folder", tmp_path, references="refs")
