"""prompts.txt, videos.txt and images.txt, line by line."""

import pytest

from sdv_jax.data.importers import Clip, Picture, open_source
from tests.data.importers.sets import picture, refused, rejected, video


@pytest.fixture
def folder(tmp_path):
    for name in ("videos/0.mp4", "videos/1.mp4"):
        video(tmp_path / name)
    for name in ("images/0.png", "images/1.png"):
        picture(tmp_path / name)
    (tmp_path / "prompts.txt").write_text("A cat, running.\nA dog.\n")
    (tmp_path / "videos.txt").write_text("videos/0.mp4\nvideos/1.mp4\n")
    return tmp_path


def test_lines_belong_together(folder):
    importer = open_source("text_lists", folder)
    assert [(importer[i].key, importer[i].caption) for i in range(2)] == [
        ("videos/0.mp4", "A cat, running."), ("videos/1.mp4", "A dog."),
    ]  # fmt: skip
    assert importer[1].target == Clip(folder / "videos/1.mp4") and importer[1].references == ()


def test_images_are_references_or_targets(folder):
    (folder / "images.txt").write_bytes(b"\xef\xbb\xbfimages/0.png\r\nimages/1.png")
    assert open_source("text_lists", folder)[0].references == (Picture(folder / "images/0.png"),)
    (folder / "videos.txt").unlink()
    assert open_source("text_lists", folder)[1].target == Picture(folder / "images/1.png")


@pytest.mark.parametrize("name", ["prompt.txt", "captions.txt", "caption.txt", "mine.txt"])
def test_other_names(folder, name):
    (folder / "prompts.txt").rename(folder / name)
    options = {"prompts": name} if name == "mine.txt" else {}
    assert open_source("text_lists", folder, **options)[1].caption == "A dog."


def test_media_elsewhere(folder, tmp_path_factory):
    lists = tmp_path_factory.mktemp("lists")
    for name in ("prompts.txt", "videos.txt"):
        (folder / name).rename(lists / name)
    assert open_source("text_lists", lists, media=str(folder))[0].target == Clip(folder / "videos/0.mp4")
    rejected(open_source("text_lists", lists), 0, "file missing", "videos.txt line 1: videos/0.mp4 does not exist in")


def test_lines_that_cannot_be_used(folder):
    lines = ["videos/0.mp4", "", "../outside.mp4", "/etc/hosts", "videos/0.mp4", "videos/9.mp4", "notes.md"]
    (folder / "videos.txt").write_text("\n".join([*lines, "videos/1.mp4"]))
    (folder / "prompts.txt").write_text("\n".join(["A cat.", *[" "] * 6, "A cat."]))
    (folder / "notes.md").write_text("no clip")
    importer = open_source("text_lists", folder)
    rejected(importer, 1, "no file", "videos.txt line 2 is empty")
    rejected(importer, 2, "path outside the set", "videos.txt line 3: ../outside.mp4 is not in")
    rejected(importer, 3, "path outside the set", "videos.txt line 4: /etc/hosts is not in")
    rejected(importer, 4, "no caption", "videos.txt line 5 has none")
    rejected(importer, 5, "file missing", "videos.txt line 6: videos/9.mp4 does not exist")
    rejected(importer, 6, "no caption", "videos.txt line 7 has none")
    (folder / "prompts.txt").write_text("\n".join(["A cat."] * 8))
    rejected(open_source("text_lists", folder), 6, "unknown file type", "notes.md is neither a video nor a picture")
    assert importer[7].caption == "A cat."


@pytest.mark.parametrize("prompts", ["A cat.\n\n", "A cat.\r\n\r\n", "A cat.\n\n\n \n"])
def test_the_last_prompt_is_empty(folder, prompts):
    (folder / "prompts.txt").write_bytes(prompts.encode())
    importer = open_source("text_lists", folder)
    assert len(importer) == 2 and importer[0].caption == "A cat."
    rejected(importer, 1, "no caption", "videos.txt line 2 has none")
    (folder / "prompts.txt").write_text("A cat.\n")  # this newline ends the only line
    refused("prompts.txt has 1 lines and", "text_lists", folder)


def test_empty_lines_at_the_end(folder):
    (folder / "videos.txt").write_text("videos/0.mp4\nvideos/1.mp4\n\n\n")
    assert len(open_source("text_lists", folder)) == 2
    (folder / "images.txt").write_text("images/0.png\n\n")
    importer = open_source("text_lists", folder)
    assert len(importer[0].references) == 1
    rejected(importer, 1, "no file", "videos.txt line 2 image names no file")


def test_one_file_in_two_spellings(folder):
    (folder / "videos.txt").write_text(f"videos/0.mp4\n./videos//0.mp4\n{folder}/videos/1.mp4\nx/../videos/1.mp4")
    (folder / "prompts.txt").write_text("A cat.\n" * 4)
    importer = open_source("text_lists", folder)
    keys = ["videos/0.mp4"] * 2 + ["videos/1.mp4"] * 2
    assert [importer.key(i) for i in range(4)] == [importer[i].key for i in range(4)] == keys


def test_references_that_are_no_pictures(folder):
    (folder / "images.txt").write_text("videos/0.mp4\nimages/9.png")
    importer = open_source("text_lists", folder)
    rejected(importer, 0, "unknown file type", "is given as an image and is a video by its name")
    rejected(importer, 1, "file missing", "videos.txt line 2 image: images/9.png does not exist")


def test_sets_that_are_broken(folder):
    (folder / "prompts.txt").write_text("one\ntwo\nthree\n")
    refused("prompts.txt has 3 lines and", "text_lists", folder)
    (folder / "prompts.txt").write_bytes(b"caf\xe9\ntwo\n")
    refused("prompts.txt is not UTF-8: byte 3 is 0xe9; save it as UTF-8", "text_lists", folder)
    (folder / "prompts.txt").write_text("")
    (folder / "videos.txt").write_text("\n\n")
    refused("videos.txt is empty; add the paths", "text_lists", folder)
    (folder / "videos.txt").unlink()
    refused("has none of videos.txt, video.txt, images.txt, image.txt", "text_lists", folder)
    (folder / "prompts.txt").unlink()
    refused("has none of prompts.txt, prompt.txt, captions.txt, caption.txt", "text_lists", folder)
    refused("list", "text_lists", folder, prompts="none.txt")
