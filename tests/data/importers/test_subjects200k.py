"""Subjects200K: two views in one picture, scores, directions, and rows that are not whole."""

import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdv_jax.data.decode import read_picture
from sdv_jax.data.importers import open_source
from tests.data.importers.sets import parquet, png, refused, rejected, subject_row, views


def pixels(picture):
    return read_picture(picture, height=64, width=64)


def test_both_directions(tmp_path):
    parquet(tmp_path / "train-00000-of-00032.parquet", [subject_row()])
    importer = open_source("subjects200k", tmp_path)
    left, right = importer[0], importer[1]
    assert len(importer) == 2
    assert (left.key, right.key) == ("train-00000-of-00032/000000/left", "train-00000-of-00032/000000/right")
    assert (left.caption, right.caption) == ("A cup on the left.", "A cup on the right.")
    assert (pixels(left.target) == 50).all() and (pixels(left.references[0]) == 200).all()
    assert (pixels(right.target) == 200).all() and (pixels(right.references[0]) == 50).all()
    assert left.provenance["collection"] == "collection_2" and left.provenance["item"] == "Cup"
    assert len(open_source("subjects200k", tmp_path, both_directions=False)) == 1


def test_the_published_crops(tmp_path):
    """A picture of 1048x528: (8, 8, 520, 520) and (528, 8, 1040, 520)."""
    parquet(tmp_path / "a.parquet", [subject_row(image=png(views(side=512, margin=8)))])
    for options in ({}, {"image_size": 512, "padding": 8}):
        item = open_source("subjects200k", tmp_path / "a.parquet", **options)[0]
        assert item.target.box == (8, 8, 520, 520) and item.references[0].box == (528, 8, 1040, 520)


@pytest.mark.parametrize(("side", "margin"), [(1024, 16), (256, 0)])
def test_other_sizes(tmp_path, side, margin):
    parquet(tmp_path / "a.parquet", [subject_row(image=png(views(side=side, margin=margin)))])
    item = open_source("subjects200k", tmp_path)[1]
    assert (pixels(item.target) == 200).all() and (pixels(item.references[0]) == 50).all()


def test_a_picture_of_too_many_pixels_is_one_item_set_aside(tmp_path):
    too_large = views(side=6700, margin=8)[..., 0]
    parquet(tmp_path / "a.parquet", [subject_row(image=png(too_large)), subject_row()])
    importer = open_source("subjects200k", tmp_path, both_directions=False)
    with warnings.catch_warnings():
        for shown in ("error", "ignore"):
            warnings.simplefilter(shown)
            rejected(importer, 0, "unreadable picture", "row 0: the picture has more than 89478485 pixels")
    assert (pixels(importer[1].target) == 50).all()


def test_scores_and_collections(tmp_path):
    rows = [
        subject_row(scores=(5, 5, 5), collection="collection_1"), subject_row(scores=(5, 4, 5)),
        subject_row(scores=(3, 5, 5)), subject_row(), subject_row(scores=None), subject_row(scores=(5, None, 5)),
    ]  # fmt: skip
    parquet(tmp_path / "a.parquet", rows)
    importer = open_source("subjects200k", tmp_path, both_directions=False)
    assert [importer.key(i)[-11:-5] for i in range(len(importer))] == ["000000", "000003", "000004", "000005"]
    assert importer.about["rows"] == 6 and importer.about["chosen"] == 4
    rejected(importer, 2, "no scores", "a.parquet row 4: a score in quality_assessment is null")
    rejected(importer, 3, "no scores", "row 5")
    assert len(open_source("subjects200k", tmp_path, both_directions=False, minimum_score=4)) == 5
    assert len(open_source("subjects200k", tmp_path, collections=["collection_1"])) == 2
    refused("none of its 6 rows has all scores >= 5 in collection_9", "subjects200k", tmp_path,
            collections=["collection_9"])  # fmt: skip


def test_rows_that_are_not_whole(tmp_path):
    rows = [
        subject_row(description_0=None), subject_row(description_1="  "), subject_row() | {"description": None},
        subject_row() | {"image": None}, subject_row(image=b"no picture"), subject_row(image=png(views()[:, :60])),
    ]  # fmt: skip
    importer = open_source("subjects200k", parquet(tmp_path / "a.parquet", rows))
    rejected(importer, 0, "no caption", "row 0 description_0 has none")
    assert importer[1].caption == "A cup on the right."  # the other direction is whole
    rejected(importer, 3, "no caption", "row 1 description_1 has none")
    rejected(importer, 4, "no caption", "row 2: description is null")
    rejected(importer, 6, "no picture", "row 3: image is null")
    rejected(importer, 8, "unreadable picture", "row 4: the picture is not an image")
    rejected(importer, 10, "not two views", "row 5: 60x66 is not two squares side by side")
    assert importer[1].references  # and the set goes on


def test_a_score_that_is_not_a_number(tmp_path):
    rows = [subject_row(scores=(5.0, float("nan"), 5.0)), subject_row(scores=(5.0, 4.0, float("nan")))]
    importer = open_source("subjects200k", parquet(tmp_path / "a.parquet", rows))
    assert importer.about["chosen"] == 1, "a low score is a reason to leave a row out whatever the others are"
    rejected(importer, 0, "no scores", "a.parquet row 0: a score in quality_assessment is null or NaN")


def test_several_files_and_row_groups(tmp_path):
    rows = [[subject_row(description_0=f"{file}.{row}") for row in range(5)] for file in range(3)]
    for file, content in enumerate(rows):
        parquet(tmp_path / f"data/train-{file}.parquet", content)
    importer = open_source("subjects200k", tmp_path)
    order = np.random.default_rng(0).permutation(15)
    assert [importer[2 * int(i)].caption for i in order] == [f"{i // 5}.{i % 5}" for i in order]
    assert importer[2 * 7].provenance["file"] == "train-1.parquet" and importer[2 * 7].provenance["row"] == 2


def test_a_row_group_is_read_once_in_order(tmp_path, monkeypatch):
    importer = open_source("subjects200k", parquet(tmp_path / "a.parquet", [subject_row()] * 6))
    groups, original = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group",
                        lambda self, i, **k: groups.append(i) or original(self, i, **k))  # fmt: skip
    for index in range(len(importer)):
        importer[index]
    assert groups == [0, 1, 2]


def test_sets_that_are_broken(tmp_path):
    refused("holds no .parquet file", "subjects200k", tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no PAR1")
    refused("a.parquet is damaged or not parquet", "subjects200k", tmp_path)
    parquet(tmp_path / "a.parquet", [{"image": 1, "collection": "x"}])
    refused("a.parquet has no column quality_assessment, description; it has: image, collection", "subjects200k",
            tmp_path)  # fmt: skip
    parquet(tmp_path / "a.parquet", [subject_row() | {"quality_assessment": {"imageQuality": 5}}])
    refused("a.parquet: column quality_assessment is of type struct<imageQuality: int64>; expected structs with "
            "compositeStructure (numbers), objectConsistency (numbers), imageQuality", "subjects200k", tmp_path)
    table = pq.read_table(parquet(tmp_path / "a.parquet", [subject_row()]))
    pq.write_table(table.slice(0, 0), tmp_path / "a.parquet")
    refused("has no rows", "subjects200k", tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("quality_assessment", {"compositeStructure": "5", "objectConsistency": 5, "imageQuality": 5},
         "column quality_assessment is of type struct<compositeStructure: string, objectConsistency: int64, "
         "imageQuality: int64>; expected structs with compositeStructure (numbers)"),
        ("quality_assessment", "good", "column quality_assessment is of type string; expected structs"),
        ("collection", 2, "column collection is of type int64; expected texts"),
        ("image", "picture.png", "column image is of type string; expected bytes, or structs with bytes"),
        ("image", {"path": "picture.png"}, "column image is of type struct<path: string>; expected bytes"),
        ("description", "A cup.", "column description is of type string; expected structs"),
    ],
)  # fmt: skip
def test_columns_of_another_kind(tmp_path, column, value, message):
    parquet(tmp_path / "a.parquet", [subject_row()])
    parquet(tmp_path / "b.parquet", [subject_row() | {column: value}])
    refused(f"b.parquet: {message}", "subjects200k", tmp_path, collections=["collection_2"])


def test_files_that_differ_in_width_order_and_encoding(tmp_path):
    """Numbers of other widths, fields in another order, texts by number, pictures without a path, no value at all."""
    names = ("imageQuality", "objectConsistency", "compositeStructure")
    scores = [pa.struct([(name, kind) for name in order]) for kind, order in
              ((pa.int32(), names[::-1]), (pa.float64(), names), (pa.int8(), names))]  # fmt: skip
    tables = [pa.Table.from_pylist([subject_row(), subject_row(scores=(5, 5, 4))]) for _ in range(4)]
    for number, kind in enumerate(scores):
        column = tables[number]["quality_assessment"].to_pylist()
        tables[number] = tables[number].set_column(2, "quality_assessment", pa.array(column, kind))
    tables[1] = tables[1].set_column(1, "collection", tables[1]["collection"].dictionary_encode())
    tables[2] = tables[2].set_column(0, "image", pa.array([png(views())] * 2))
    tables[3] = tables[3].set_column(2, "quality_assessment", pa.nulls(2)).set_column(1, "collection", pa.nulls(2))
    for number, table in enumerate(tables):
        pq.write_table(table, tmp_path / f"{number}.parquet")
    importer = open_source("subjects200k", tmp_path)
    assert [importer.key(i)[:8] for i in range(len(importer))][::2] == ["0/000000", "1/000000", "2/000000", "3/000000",
                                                                       "3/000001"]  # fmt: skip
    assert all((pixels(importer[index].target) == (50, 200)[index % 2]).all() for index in range(6))
    rejected(importer, 6, "no scores", "3.parquet row 0: a score in quality_assessment is null")
    assert len(open_source("subjects200k", tmp_path, collections=["collection_2"])) == 6
    (tmp_path / "3.parquet").rename(tmp_path / "only.parquet")
    rejected(open_source("subjects200k", tmp_path / "only.parquet"), 0, "no scores", "row 0")


def test_texts_and_columns_that_are_damaged(tmp_path):
    table = pa.Table.from_pylist([subject_row(description_0="caf\0"), subject_row()])
    path = parquet(tmp_path / "a.parquet", [subject_row(description_0="cafX"), subject_row()])
    pq.write_table(table, path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"caf\0", b"caf\xe9"))
    importer = open_source("subjects200k", path)
    rejected(importer, 0, "damaged parquet", "a.parquet row 0: a text is not UTF-8")
    assert importer[2].caption == "A cup on the left."
    path.write_bytes(path.read_bytes().replace(b"collection_2", b"collection\xff2"))
    refused("a.parquet is damaged (In chunk 0: Invalid: Invalid UTF8", "subjects200k", path, collections=["x"])
    table = table.append_column("image", pa.nulls(2))
    pq.write_table(table, path)
    refused("a.parquet has column image more than once; rename the others", "subjects200k", path)


def test_damage_in_one_row_group(tmp_path):
    path = parquet(tmp_path / "a.parquet", [subject_row(description_0=f"{n}") for n in range(4)])
    importer = open_source("subjects200k", path)
    image = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = min(filter(None, (image.dictionary_page_offset, image.data_page_offset)))
    content[start : start + 40] = bytes(40)
    path.write_bytes(content)
    assert importer[0].caption == "0"
    rejected(importer, 4, "damaged parquet", "a.parquet, row group 1")
