"""metadata.csv, .json and .jsonl, as the peers write them and as people do."""

import json

import pytest

from sdv_jax.data.importers import Clip, Picture, open_source
from tests.data.importers.sets import picture, refused, rejected, video


@pytest.fixture
def folder(tmp_path):
    video(tmp_path / "v/0.mp4")
    video(tmp_path / "v/1.mp4")
    for name in ("i/a.png", "i/b.png"):
        picture(tmp_path / name)
    return tmp_path


def write_csv(folder, *lines):
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_json(folder, rows, *, lines=False):
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    (folder / ("metadata.jsonl" if lines else "metadata.json")).write_text(text)
    return folder


def test_diffsynth(folder):
    write_csv(folder, "video,prompt", '"v/0.mp4","A cat, with ""quotes""', 'and a second line."', "v/1.mp4,A dog.")
    importer = open_source("metadata", folder)
    assert importer[0].caption == 'A cat, with "quotes"\nand a second line.' and importer[1].key == "v/1.mp4"
    assert importer[0].target == Clip(folder / "v/0.mp4")
    write_csv(folder, "video,vace_reference_image,prompt", "v/0.mp4,i/a.png,A cat.")
    assert open_source("metadata", folder / "metadata.csv")[0].references == (Picture(folder / "i/a.png"),)


def test_videox_fun(folder):
    (folder / "clip").write_bytes((folder / "v/0.mp4").read_bytes())
    rows = [
        {"file_path": "v/0.mp4", "text": "A cat.", "type": "video", "width": 48, "height": 32},
        {"file_path": "i/a.png", "text": "A dog.", "type": "image"},
        {"file_path": "clip", "text": "No suffix.", "type": "video"},
        {"file_path": "clip", "text": "No suffix."},
    ]
    importer = open_source("metadata", write_json(folder, rows))
    assert [importer[i].target for i in range(3)] == [
        Clip(folder / "v/0.mp4"), Picture(folder / "i/a.png"), Clip(folder / "clip"),
    ]  # fmt: skip
    rejected(importer, 3, "unknown file type", "clip is neither")


@pytest.mark.parametrize(
    ("target", "caption"), [("file_name", "caption"), ("video_path", "text"), ("path", "description")]
)
def test_other_columns(folder, target, caption):
    importer = open_source("metadata", write_json(folder, [{target: "v/0.mp4", caption: "A cat."}], lines=True))
    assert importer[0].caption == "A cat." and importer.about["target column"] == target


def test_columns_by_name(folder):
    rows = [{"clip": "v/0.mp4", "words": "A cat.", "prompt": "other", "subject": ["i/a.png", "i/b.png"]}]
    importer = open_source("metadata", write_json(folder, rows), target="clip", caption="words", reference="subject")
    assert importer[0].caption == "A cat." and len(importer[0].references) == 2
    refused("has no column of files, option target: expected video or file_path or", "metadata", folder)
    refused("has no column of captions, option caption: expected wrds, found clip, words, prompt, subject", "metadata",
            folder, target="clip", caption="wrds")  # fmt: skip
    refused("has no column of references, option reference: expected", "metadata", folder, target="clip",
            require_reference=True)  # fmt: skip


def test_pairs_of_pictures(folder):
    write_csv(folder, "image,reference,prompt", "i/a.png,i/b.png,A cat.", "i/b.png,i/a.png,A cat.",
              'i/a.png,"[""i/a.png"", ""i/b.png""]",A cat.', "i/b.png,,A cat.")  # fmt: skip
    importer = open_source("metadata", folder)
    assert [importer.key(i) for i in range(4)] == [
        "i/a.png + i/b.png", "i/b.png + i/a.png", "i/a.png + i/a.png + i/b.png", "i/b.png",
    ]  # fmt: skip
    assert importer[0].target == Picture(folder / "i/a.png") and importer[3].references == ()
    assert [len(importer[i].references) for i in range(3)] == [1, 1, 2]
    rejected(open_source("metadata", folder, require_reference=True), 3, "no reference", "row 4: column reference is")


def test_rows_that_cannot_be_used(folder):
    rows = [
        {"video": "v/0.mp4"}, {"video": "v/0.mp4", "prompt": ""}, {"video": "v/1.mp4", "prompt": 5},
        {"prompt": "No file."}, {"video": "../out.mp4", "prompt": "x"}, {"video": "/etc/hosts", "prompt": "x"},
        {"video": "v/9.mp4", "prompt": "x"}, ["v/0.mp4"], {"video": ["v/0.mp4"], "prompt": "x"},
        {"video": "v/0.mp4\u0000", "prompt": "x"}, {"video": "i/a.png", "prompt": "lone \ud800"},
        {"video": "i/b.png", "prompt": "x", "reference": "v/1.mp4"}, {"video": "w" * 5000, "prompt": "x"},
    ]  # fmt: skip
    importer = open_source("metadata", write_json(folder, rows))
    expected = [
        ("no caption", "metadata.json row 1 has none"), ("no caption", "metadata.json row 2 has none"),
        ("no caption", "row 3: expected text, found int"), ("no file", "row 4 names no file"),
        ("path outside the set", "row 5: ../out.mp4 is not in"), ("path outside the set", "row 6: /etc/hosts is not"),
        ("file missing", "row 7: v/9.mp4 does not exist"), ("damaged row", "row 8: not a table of names and values"),
        ("no file", "row 9 names no file"), ("file missing", "row 10: v/0.mp4"),
        ("caption is not UTF-8", "i/a.png: lone \\ud800"),
        ("unknown file type", "row 12: v/1.mp4 is given as a picture"), ("file missing", "row 13"),
    ]  # fmt: skip
    for index, (reason, words) in enumerate(expected):
        rejected(importer, index, reason, words)


def test_a_damaged_line(folder):
    write_json(folder, [{"video": "v/0.mp4", "prompt": "A cat."}] * 2, lines=True)
    path = folder / "metadata.jsonl"
    path.write_text(path.read_text()[:-5].replace("v/0", "v/1", 1))
    importer = open_source("metadata", path)
    assert importer[0].key == "v/1.mp4"
    rejected(importer, 1, "damaged row", "metadata.jsonl row 2: not JSON (column 32: Unterminated string")
    write_csv(folder, "video,prompt", "v/0.mp4,A cat, running.", "v/1.mp4,A dog.")
    importer = open_source("metadata", folder / "metadata.csv")
    rejected(importer, 0, "damaged row", "metadata.csv row 1: it has 3 fields, the head of the table 2")
    assert importer[1].caption == "A dog."


def test_numbers_that_are_too_long(folder):
    number = "1" * 5000
    (folder / "metadata.jsonl").write_text(
        f'{{"video": "v/0.mp4", "prompt": "A cat.", "n": {number}}}\n{{"video": "v/1.mp4", "prompt": "A dog."}}\n'
    )
    importer = open_source("metadata", folder)
    rejected(importer, 0, "damaged row", "metadata.jsonl row 1: not JSON (a number of thousands of digits)")
    assert importer[1].caption == "A dog."
    (folder / "metadata.jsonl").unlink()
    write_csv(folder, "video,prompt,reference", f"v/0.mp4,A cat.,[{number}]")
    rejected(open_source("metadata", folder), 0, "file missing", "row 1 reference: [111")


def test_quotation_marks_within_a_text(folder):
    write_csv(folder, "video,prompt", 'v/0.mp4,"A "big" dog"', 'v/1.mp4,"A cat, running."', 'i/a.png,"A dog', "",
              '"big" one,', 'i/b.png,"A cat', 'at night."')  # fmt: skip
    importer = open_source("metadata", folder)
    assert len(importer) == 4
    rejected(importer, 0, "damaged row", "metadata.csv row 1: badly quoted in line 2 (',' expected after '\"')")
    assert importer[1].caption == "A cat, running." and importer[3].caption == "A cat\nat night."
    rejected(importer, 2, "damaged row", "metadata.csv row 3: badly quoted in line 4 to 6")
    write_csv(folder, "video,prompt", *["v/0.mp4,A cat."] * 3, 'v/1.mp4,"A dog', *["v/0.mp4,A cat."] * 3)
    refused("metadata.csv: a quotation in the row of line 5 never ends", "metadata", folder)
    write_csv(folder, 'video,"pro"mpt', "v/0.mp4,A cat.")
    refused("metadata.csv has a damaged head: badly quoted in line 1", "metadata", folder)


def test_files_in_several_columns(folder):
    """DiffSynth: each row fills the column of its kind."""
    write_csv(folder, "video,image,prompt", "v/0.mp4,,A cat.", ",i/a.png,A dog.", "v/1.mp4,i/b.png,A cup.", ",,None.")
    importer = open_source("metadata", folder)
    assert [importer[i].target for i in range(3)] == [
        Clip(folder / "v/0.mp4"), Picture(folder / "i/a.png"), Clip(folder / "v/1.mp4"),
    ]  # fmt: skip
    assert importer.about["target column"] == "video, image"
    rejected(importer, 3, "no file", "row 4 names no file")
    (folder / "metadata.csv").unlink()
    write_json(folder, [{"video": "v/0.mp4", "prompt": "A cat."}, {"image": "i/a.png", "prompt": "A dog."}], lines=True)
    assert open_source("metadata", folder)[1].target == Picture(folder / "i/a.png")
    rejected(open_source("metadata", folder, target="video"), 1, "no file", "row 2 names no file")


def test_several_captions_and_subjects(folder):
    """VideoX-Fun: `text` may be a list, `type` in capitals, and subjects are in `object_file_path`."""
    (folder / "clip").write_bytes((folder / "v/0.mp4").read_bytes())
    rows = [
        {"file_path": "clip", "text": ["", None, " A cat. ", "A kitten."], "type": "Video",
         "object_file_path": ["i/a.png", "i/b.png"]},
        {"file_path": "v/1.mp4", "text": [], "object_file_path": "i/a.png"},
        {"file_path": "v/1.mp4", "text": "A dog.", "object_file_path": "i/a.png"},
    ]  # fmt: skip
    importer = open_source("metadata", write_json(folder, rows))
    assert importer[0].caption == "A cat." and importer[0].target == Clip(folder / "clip")
    assert importer[0].references == (Picture(folder / "i/a.png"), Picture(folder / "i/b.png"))
    rejected(importer, 1, "no caption", "row 2 has none")
    assert importer[2].key == importer.key(1) == "v/1.mp4 + i/a.png"


def test_one_file_in_several_spellings(folder):
    write_csv(folder, "video,prompt,reference", "v/0.mp4,A cat.,", "./v//0.mp4,A cat.,", f"{folder}/v/0.mp4,A cat.,",
              "v/../v/1.mp4,A dog.,./i/a.png", "v/1.mp4,A dog.,i/a.png", "v/1.mp4,A dog.,i/b.png")  # fmt: skip
    importer = open_source("metadata", folder)
    keys = ["v/0.mp4"] * 3 + ["v/1.mp4 + i/a.png"] * 2 + ["v/1.mp4 + i/b.png"]
    assert [importer.key(i) for i in range(6)] == [importer[i].key for i in range(6)] == keys
    assert importer[5].caption == "A dog." and importer[3].provenance["file"] == "v/../v/1.mp4"


def test_long_captions_and_marks(folder):
    text = "word " * 40000  # longer than a field may be by Python's own limit
    (folder / "metadata.csv").write_text(f"video,prompt\nv/0.mp4,{text}\n", encoding="utf-8-sig")
    assert open_source("metadata", folder)[0].caption == text.strip()


def test_links_are_followed_and_media_may_lie_elsewhere(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_csv(other, "video,prompt", "v/0.mp4,A cat.", f"{folder}/v/1.mp4,A dog.")
    importer = open_source("metadata", other, media=str(folder))
    assert importer[0].target == Clip(folder / "v/0.mp4") and importer[1].target == Clip(folder / "v/1.mp4")
    (other / "v").symlink_to(folder / "v")
    assert open_source("metadata", other)[0].target == Clip(other / "v/0.mp4")
    refused("option media", "metadata", other, media="nowhere")


def test_sets_that_are_broken(folder):
    refused("is not a table and has none of metadata.csv, metadata.jsonl, metadata.json in it", "metadata", folder)
    refused("v/0.mp4 is none of .csv, .jsonl, .json", "metadata", folder / "v/0.mp4")
    (folder / "metadata.csv").write_bytes("video,prompt\nv/0.mp4,Caf\u00e9\n".encode("latin-1"))
    refused("metadata.csv is not UTF-8: byte 24 is 0xe9; save it as UTF-8", "metadata", folder)
    write_csv(folder, 'video,prompt\nv/0.mp4,"never ends')
    refused("metadata.csv: a quotation in the row of line 2 never ends; repair the file", "metadata", folder)
    write_csv(folder, "video,video")
    refused("names a column twice: video, video", "metadata", folder)
    write_csv(folder, "video,prompt", "v/0.mp4", 'v/1.mp4,"A "big" dog"')
    refused("metadata.csv: none of its 2 rows can be read; the first: it has 1 fields, the", "metadata", folder)
    write_csv(folder, "Video,Prompt", "v/0.mp4,A cat.")
    refused("found Video, Prompt; write Video as video, or name it by the option", "metadata", folder)
    assert open_source("metadata", folder, target="Video", caption="Prompt")[0].caption == "A cat."
    write_csv(folder, "", "video,prompt", "v/0.mp4,A cat.")
    refused("metadata.csv: its first line, which names the columns, is empty; remove the line", "metadata", folder)
    write_csv(folder, "video,prompt")
    refused("metadata.csv has no rows", "metadata", folder)
    (folder / "metadata.csv").write_text("")
    refused("metadata.csv has no rows", "metadata", folder)
    (folder / "metadata.json").write_text("[]")
    refused("has metadata.csv and metadata.json; give one of the files", "metadata", folder)
    (folder / "metadata.csv").unlink()
    for text, message in (('[{"video": ', "metadata.json is not JSON (line 1, column 12: Expecting value)"),
                          ('{"video": 1}', "holds a dict; expected a list of rows"), ("[" * 100000, "too deep"),
                          ('{"video": "a"}\n{"video": "b"}\n', "holds a row in each line, which is JSON lines"),
                          (f'[{{"n": {"1" * 5000}}}]', "is not JSON (a number of thousands of digits); repair")):
        (folder / "metadata.json").write_text(text)
        refused(message, "metadata", folder)
