"""OpenS2V-5M: the order of crops and boxes, masks, choice of subjects, pairs across clips, and damaged records."""

import json
import math

import numpy as np
import pytest

from sdv_jax.data.decode import Size, read_clip, read_picture
from sdv_jax.data.importers import Clip, Frame, open_source
from sdv_jax.data.importers.json_records import JsonRecords
from sdv_jax.errors import UserError
from tests.data.clips import numbered, write
from tests.data.importers.sets import refused, rejected, video
from tests.data.test_decode_pictures import compressed, runs_of

CROP = (4, 44, 2, 30)  # x0, x1, y0, y1: 40 wide, 28 high, within 48x32


def region(left, top, right, bottom):
    mask = np.zeros((28, 40), bool)
    mask[top:bottom, left:right] = True
    return mask


def record(name, *, subjects=None, **metadata):
    """`subjects`: class name -> mask, of the cropped frame."""
    subjects = subjects or {"cup": region(10, 6, 26, 24), "table": region(0, 20, 40, 28)}
    places = [np.nonzero(mask) for mask in subjects.values()]
    bounds = [(c.min() - 0.4, r.min() - 0.4, c.max() + 0.4, r.max() + 0.4) for r, c in places]
    return {
        "metadata": {
            "path": f"{name}.mp4", "face_cut": [1, 5], "crop": list(CROP), "fps": 24.0, "num_frames": 4,
            "face_cap_qwen": f"A cup in {name}.", "aesthetic": 5.1,
        } | metadata,
        "word_tags": {"background": ["table"], "subject": [], "object": ["cup"], "pre_define": []},
        "annotation": {
            "ann_frame_data": {
                "ann_frame_idx": 3,
                "annotations": [{"class_name": n, "bbox": list(map(float, b)), "gme_score": 0.3}
                                for n, b in zip(subjects, bounds, strict=True)],
                "img_width": 40, "img_height": 28,
            },
            "mask_map": {str(i + 1): {"class_name": n} for i, n in enumerate(subjects)},
            "mask_annotation": {"3": {
                str(i + 1): {"size": [28, 40], "counts": compressed(runs_of(mask)), "score": [0.9]}
                for i, mask in enumerate(subjects.values())
            }},
        },
    }  # fmt: skip


def write_part(path, names, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({f"id_{name}": record(name, **changes) for name in names}, indent=2))
    return path


@pytest.fixture
def folder(tmp_path):
    write_part(tmp_path / "part1.json", ["one", "two"])
    frames = numbered(8)
    frames[:, 2 + 6 : 2 + 24, 4 + 10 : 4 + 26] = 250  # the cup of the mask above
    for name in ("one", "two"):
        (tmp_path / "videos/part1").mkdir(parents=True, exist_ok=True)
        write(tmp_path / f"videos/part1/{name}.mp4", frames, options={"crf": "4"}, pix_fmt="yuv444p")
    return tmp_path


def change(folder, **changes):
    """The set with another record in front; `changes` are applied to it as paths, a__b=value."""
    others = json.loads((folder / "part1.json").read_text())
    content = {"id_odd": None} | others | {"id_odd": record("one")}
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = content["id_odd"]
        for name in parents:
            place = place[name]
        if value is KeyError:
            del place[last]
        else:
            place[last] = value
    (folder / "part1.json").write_text(json.dumps(content))
    return open_source("opens2v", folder)


def test_a_record(folder):
    importer = open_source("opens2v", folder)
    item = importer[0]
    assert len(importer) == 2 and item.key == "part1/id_one" and item.caption == "A cup in one."
    assert item.target == Clip(folder / "videos/part1/one.mp4", 1, 5, (4, 2, 44, 30))
    assert read_clip(item.target, Size(4, 28, 40), fps=None).shape == (4, 28, 40, 3)
    (cup,) = item.references  # the table is tagged as background
    assert (cup.index, cup.box) == (3, (14, 8, 30, 26))
    pixels = read_picture(cup, height=36, width=36)
    assert (pixels[2:-2, 4:-4] > 240).all()  # the cup and, beside it, white: nothing of the grey around it
    (grey,) = open_source("opens2v", folder, masked=False)[0].references
    assert grey.box == (13, 7, 30, 26) and grey.mask is None
    assert read_picture(grey, height=36, width=36).min() < 100


def test_plain_run_lengths(folder):
    mask = region(10, 6, 26, 24)
    packed = {"1": {"size": [28, 40], "counts": runs_of(mask)}}
    importer = change(folder, annotation__mask_annotation={"3": packed})
    np.testing.assert_array_equal(importer[0].references[0].mask.decode(), mask)


def test_which_subjects(tmp_path):
    cup = region(10, 6, 26, 24)
    subjects = {"cup": cup, "mug": region(10, 6, 26, 23), "spoon": region(0, 0, 2, 10), "plate": region(28, 0, 40, 12),
                "table": region(0, 26, 40, 28)}  # fmt: skip
    write_part(tmp_path / "p.json", ["one"], subjects=subjects)
    video(tmp_path / "one.mp4")

    def chosen(**options):
        return [frame.box[:2] for frame in open_source("opens2v", tmp_path / "p.json", **options)[0].references]

    corners = {name: (np.nonzero(m)[1].min() + 4, np.nonzero(m)[0].min() + 2) for name, m in subjects.items()}
    assert chosen() == [corners["cup"], corners["plate"]]  # the mug is the cup again, the spoon is small
    assert chosen(maximum_overlap=1.0) == [corners["cup"], corners["mug"], corners["plate"]]
    assert chosen(minimum_area=0.0) == [corners["cup"], corners["spoon"], corners["plate"]]
    assert chosen(classes=["plate", "table"]) == [corners["plate"], corners["table"]]
    assert chosen(most=1) == [corners["cup"]]
    rejected(open_source("opens2v", tmp_path, classes=["dog"]), 0, "no subject", "p/id_one has none of the wanted")


def pair(one, other, numbers=("1", "1")):
    return {"cur_id": one, "aft_id": other, "cur_class_id": numbers[0], "aft_class_id": numbers[1],
            "cur_class_name": "cup", "aft_class_name": "cup", "cur_frame_idx": 3, "aft_frame_idx": 3}  # fmt: skip


@pytest.mark.parametrize("grouped", [True, False])
def test_pairs_across_clips(folder, grouped):
    write_part(folder / "part2.json", ["three", "four"])
    for name in ("three", "four"):
        video(folder / f"videos/part2/{name}.mp4", frames=8)
    pairs = [pair("part1/id_one", "part2/id_three"), pair("part1/id_two", "part9/id_gone")]
    (folder / "pairs.json").write_text(json.dumps({"group": pairs} if grouped else pairs))
    importer = open_source("opens2v", folder, pairs=str(folder / "pairs.json"))
    assert [importer.key(i) for i in range(len(importer))] == ["part1/id_one", "part1/id_two", "part2/id_three"]
    assert [frame.path.name for frame in importer[0].references] == ["three.mp4"]
    assert [frame.path.name for frame in importer[2].references] == ["one.mp4"]  # pairs hold in both directions
    rejected(importer, 1, "no subject", "the paired clip part9/id_gone is in none of the parts")
    assert importer.about == {"records": 4, "chosen": 3, "parts": 2}
    (folder / "pairs.json").write_text(json.dumps([{"cur_id": "x"}]))
    refused("a pair has no cur_class_id and cur_class_name; expected cur_id, aft_id, and of both", "opens2v", folder,
            pairs=str(folder / "pairs.json"))  # fmt: skip
    for content, message in (([{"cur_id": "x", "cur_class_name": "cup"}], "a pair has no aft_id"),
                             ([{"cur_id": []}], "a pair has no cur_id"), (["x"], "a pair has no cur_id"),
                             ({"a": {}}, "is no list of pairs and no object"), (5, "is no list of pairs and no object"),
                             ([pair("x/1", "x/2")], "none of its clips is in")):  # fmt: skip
        (folder / "pairs.json").write_text(json.dumps(content))
        refused(message, "opens2v", folder, pairs=str(folder / "pairs.json"))
    refused("pairs nowhere.json does not exist; check the option pairs", "opens2v", folder, pairs="nowhere.json")


def named(one, other, names=("cup", "cup")):
    """A pair as the set's code wrote it first: bare ids, and no numbers."""
    return {"cur_id": one, "aft_id": other, "cur_class_name": names[0], "aft_class_name": names[1],
            "text_similarity": 1.0, "image_similarity": 0.99, "cur_frame_idx": 3, "aft_frame_idx": 3}  # fmt: skip


def test_pairs_of_bare_ids_and_names(folder, tmp_path_factory):
    write_part(folder / "part2.json", ["three"])
    video(folder / "videos/part2/three.mp4", frames=8)
    pairs = [named("id_one", "id_three", ("cup", "table")), named("id_one", "id_three"), named("id_two", "id_gone")]
    files = tmp_path_factory.mktemp("pairs")
    (files / "1.json").write_text(json.dumps(pairs[:1]))
    (files / "2.json").write_text(json.dumps(pairs[1:]))
    importer = open_source("opens2v", folder, pairs=str(files))
    assert [importer.key(i) for i in range(len(importer))] == ["part1/id_one", "part1/id_two", "part2/id_three"]
    assert [(frame.path.name, frame.box) for frame in importer[0].references] == [("three.mp4", (14, 8, 30, 26))]
    assert [frame.path.name for frame in importer[2].references] == ["one.mp4"]
    rejected(importer, 1, "no subject", "the paired clip id_gone is in none of the parts")
    write_part(folder / "part3.json", ["three"])
    refused("id_three is in several parts (part2/id_three, part3/id_three); give the one json",
            "opens2v", folder, pairs=str(files))
    assert len(open_source("opens2v", folder / "part2.json", pairs=str(files))) == 1


def test_two_subjects_of_one_name(folder):
    """A name says which of them is meant as little as it says that it is the same: numbers do."""
    left, right = region(0, 0, 12, 20), region(20, 0, 36, 20)
    content = {"id_one": record("one"), "id_two": record("two", subjects={"cup": left, "mug": right})}
    content["id_two"]["annotation"]["mask_map"]["2"]["class_name"] = "cup"
    (folder / "part1.json").write_text(json.dumps(content))
    file = folder / "pairs" / "p.json"
    file.parent.mkdir()
    file.write_text(json.dumps([named("id_one", "id_two")]))
    importer = open_source("opens2v", folder, pairs=str(file))
    rejected(importer, 0, "no subject", "the paired clip part1/id_two has not one subject each of the name cup")
    assert len(importer[1].references) == 1
    file.write_text(json.dumps([pair("part1/id_one", "part1/id_two", ("1", 2))]))
    (cup,) = open_source("opens2v", folder, pairs=str(file))[0].references
    assert cup.box == (24, 2, 40, 22)


def test_one_subject_under_two_names_in_a_paired_clip(folder):
    cup = region(10, 6, 26, 24)
    content = {"id_one": record("one"), "id_two": record("two", subjects={"cup": cup, "mug": cup})}
    (folder / "part1.json").write_text(json.dumps(content))
    (folder / "p.json").write_text(json.dumps([named("id_one", "id_two"), named("id_one", "id_two", ("cup", "mug"))]))
    assert len(open_source("opens2v", folder, pairs=str(folder / "p.json"))[0].references) == 1


def test_a_paired_clip_that_cannot_be_used(folder):
    """The others are used; without any, what is wrong with the first is told."""
    names = ["three", "four", "five"]
    write_part(folder / "part2.json", names)
    content = json.loads((folder / "part2.json").read_text())
    del content["id_four"]["annotation"]["mask_annotation"]
    (folder / "part2.json").write_text(json.dumps(content))
    video(folder / "videos/part2/five.mp4", frames=8)
    (folder / "p.json").write_text(json.dumps([pair("part1/id_one", f"part2/id_{name}") for name in names]))
    importer = open_source("opens2v", folder, pairs=str(folder / "p.json"))
    assert [frame.path.name for frame in importer[0].references] == ["five.mp4"]
    (folder / "videos/part2/five.mp4").rename(folder / "videos/part2/four.mp4")
    rejected(importer, 0, "file missing", "part2/id_three: three.mp4 does not exist in")
    (folder / "p.json").write_text(json.dumps([pair("part1/id_one", "part2/id_four")]))
    importer = open_source("opens2v", folder, pairs=str(folder / "p.json"))
    rejected(importer, 0, "damaged record", "part2/id_four: it has no 'mask_annotation'")


def test_records_that_are_not_whole(folder):
    rejected(change(folder, metadata=KeyError), 0, "damaged record", "part1/id_odd: it has no 'metadata'")
    rejected(change(folder, metadata="x"), 0, "damaged record", "part1/id_odd: a field is of another kind")
    rejected(change(folder, metadata__crop=[1, 2, 3]), 0, "damaged record", "crop is [1, 2, 3], expected 4 numbers")
    for frame in (-3, "3", 3.5, None):
        importer = change(folder, annotation__ann_frame_data__ann_frame_idx=frame)
        rejected(importer, 0, "damaged record", f"part1/id_odd: {frame!r} is no number of a frame")
    for size in ([1, 2, 3], [28, "x"], 5):
        packed = {"3": {"1": {"size": size, "counts": "x"}}}
        importer = change(folder, annotation__mask_annotation=packed)
        rejected(importer, 0, "damaged record", f"the size of a mask is {size!r}, expected 2 numbers")
    for cut in ([0, "5"], [0, 4.5], [-3, -1], [5, 1], [5, 5], [math.inf, 5], [0, math.inf], [math.nan, 5], [1], "ab",
                [True, 5], [0, None]):  # fmt: skip
        rejected(change(folder, metadata__face_cut=cut), 0, "damaged record", "part1/id_odd: ")
    for crop in ([math.inf, 44, 2, 30], [math.nan] * 4):
        rejected(change(folder, metadata__crop=crop), 0, "damaged record", "part1/id_odd: ")
    for mask, words in (({"size": [28, 40], "counts": [10**30]}, "a run of a mask is longer than any picture"),
                        ({"size": [0, 0], "counts": []}, "a mask of 0x0"),
                        ({"size": [10**6, 10**6], "counts": [10**12]}, "a mask of 1000000x1000000")):  # fmt: skip
        rejected(change(folder, annotation__mask_annotation={"3": {"1": mask}}), 0, "damaged mask", words)
    rejected(change(folder, metadata__path="gone.mp4"), 0, "file missing", "gone.mp4 does not exist")
    rejected(change(folder, metadata__path="../../part1.json"), 0, "path outside the set", "../../part1.json is not in")
    rejected(change(folder, metadata__face_cap_qwen=""), 0, "no caption", "part1/id_odd has none")
    rejected(change(folder, annotation__mask_annotation={}), 0, "damaged record", "it has no '3'")
    broken = {"3": {"1": {"size": [28, 40], "counts": "o"}}}
    rejected(change(folder, annotation__mask_annotation=broken), 0, "damaged mask", "part1/id_odd, subject 1: a packed")
    importer = change(folder)
    assert importer[1].key == "part1/id_one"  # and the set goes on
    content = (folder / "part1.json").read_text()
    (folder / "part1.json").write_text(content.replace("[4, 44", "[1e400, 44", 1))
    rejected(open_source("opens2v", folder), 0, "damaged record", "crop is [inf, 44, 2, 30], expected 4 numbers")
    (folder / "part1.json").write_text(content.replace("[4, 44", f"[{'1' * 5000}, 44", 1))
    rejected(open_source("opens2v", folder), 0, "damaged record", "id_odd: not JSON")


def test_the_caption_and_the_cut_have_two_names(folder):
    importer = change(folder, metadata__face_cap_qwen=KeyError, metadata__cap="A mug.", metadata__face_cut=KeyError,
                      metadata__cut=[2, 4], metadata__crop=None)  # fmt: skip
    assert importer[0].caption == "A mug." and importer[0].target == Clip(folder / "videos/part1/one.mp4", 2, 4)


def test_what_the_published_records_vary_in(folder):
    importer = change(folder, metadata__face_cap_qwen=KeyError, metadata__cap=["", "A mug.", "A cup."],
                      metadata__face_cut=[0, 5.0], word_tags=None)  # fmt: skip
    item = importer[0]
    assert item.caption == "A mug." and item.target == Clip(folder / "videos/part1/one.mp4", 0, 5, (4, 2, 44, 30))
    assert isinstance(item.target.end, int) and len(item.references) == 2  # nothing is tagged as background
    assert len(change(folder, word_tags={"background": None})[0].references) == 2
    assert change(folder, metadata__face_cap_qwen=" ", metadata__cap=["A mug."])[0].caption == "A mug."
    rejected(change(folder, metadata__face_cap_qwen=KeyError, metadata__cap=[]), 0, "no caption", "part1/id_odd has")


def test_a_key_that_is_there_twice(folder):
    text = (folder / "part1.json").read_text()
    (folder / "part1.json").write_text(text.replace("id_two", "id_one"))
    importer = open_source("opens2v", folder)
    assert importer[0].key == importer[1].key == "part1/id_one" and importer[1].caption == "A cup in two."


def test_sets_that_are_broken(tmp_path):
    refused("holds no .json file", "opens2v", tmp_path)
    for content, message in (("", "cannot mmap an empty file"), ("[]", "it is a list"), ("{}", "it has no records"),
                             ('{"fps": 24, "name": "x"}', "it has no records"),
                             ('{"a": {"b": 1}', "it breaks off")):  # fmt: skip
        (tmp_path / "p.json").write_text(content)
        refused(f"p.json is not a JSON object of records ({message})", "opens2v", tmp_path)
    write_part(tmp_path / "p.json", ["one"])
    refused("videos nowhere is not a folder", "opens2v", tmp_path, videos="nowhere")


def test_records_that_are_none_are_counted(folder):
    content = json.loads((folder / "part1.json").read_text())
    content = {"a": None, "b": "text {", **content, "c": 5.5, "d": [1], "e": "x"}
    (folder / "part1.json").write_text(json.dumps(content))
    importer = open_source("opens2v", folder)
    assert [importer.key(i) for i in range(len(importer))] == [f"part1/{key}" for key in content]
    for index, words in enumerate(("None", "'text {'", None, None, "5.5", "[1]", "'x'")):
        if words:
            rejected(importer, index, "damaged record", f"{words} is no record")
    assert importer[3].caption == "A cup in two."


# The scanner


def test_records_are_found_without_reading_all(tmp_path):
    values = {
        "plain": {"a": 1}, 'quote " and \\ and }': {"text": 'a "quoted" \\ brace } {', "list": [{"deep": [1, {}]}]},
        "ü": {"é": "\u2028"}, "empty": {}, "number": {"x": math.pi},
    }  # fmt: skip
    for indent, ascii_only in ((None, True), (2, False)):
        (tmp_path / "a.json").write_text(json.dumps(values, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
        records = JsonRecords(tmp_path / "a.json", what="part")
        assert {key: records[i] for i, key in enumerate(records.keys)} == values


def test_random_records(tmp_path):
    rng = np.random.default_rng(0)

    def value(depth):
        kind = rng.integers(5 if depth else 3)
        if kind == 3:
            return [value(depth - 1) for _ in range(rng.integers(4))]
        if kind == 4:
            return {text(): value(depth - 1) for _ in range(rng.integers(4))}
        return [None, float(rng.random()), text()][kind]

    def text():
        return "".join(rng.choice(list('ab"\\{}[],:é\n'), rng.integers(8)))

    for _ in range(30):
        content = {f"{i}{text()}": {text(): value(3)} for i in range(1 + rng.integers(6))}
        (tmp_path / "a.json").write_text(json.dumps(content))
        records = JsonRecords(tmp_path / "a.json", what="part")
        assert {key: records[i] for i, key in enumerate(records.keys)} == content


def test_frames_are_frames(folder):
    assert all(isinstance(frame, Frame) for frame in open_source("opens2v", folder)[1].references)
    with pytest.raises(UserError):
        JsonRecords(folder / "none.json", what="part")
