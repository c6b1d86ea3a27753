"""Small data sets of every layout, written into a folder."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sdv_jax.data.importers import Rejected, open_source
from sdv_jax.errors import UserError
from tests.data.clips import numbered, write


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def grey(level, height=32, width=48):
    return np.full((height, width, 3), level, np.uint8)


def video(path, *, frames=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, numbered(frames))


def picture(path, level=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(grey(level)))
    return path


def views(left=50, right=200, side=64, margin=1):
    """Two views in one picture, black around them."""
    pixels = np.zeros((side + 2 * margin, 2 * side + 3 * margin, 3), np.uint8)
    pixels[margin : margin + side, margin : margin + side] = left
    pixels[margin : margin + side, side + 2 * margin : 2 * side + 2 * margin] = right
    return pixels


def subject_row(*, scores=(5, 5, 5), image=None, collection="collection_2", **description):
    names = ("compositeStructure", "objectConsistency", "imageQuality")
    return {
        "image": {"bytes": png(views()) if image is None else image, "path": None},
        "collection": collection,
        "quality_assessment": None if scores is None else dict(zip(names, scores, strict=True)),
        "description": {
            "item": "Cup", "description_0": "A cup on the left.", "description_1": "A cup on the right.",
            "category": "Kitchen", "description_valid": True,
        } | description,
    }  # fmt: skip


def parquet(path, rows, *, row_group_size=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def rejected(importer, index, reason, words):
    with pytest.raises(Rejected) as caught:
        importer[index].references  # noqa: B018  what is wrong with them is told where they are wanted
    assert caught.value.reason == reason and words in caught.value.detail, str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(importer.key(index), str)


def refused(message, format, path, **options):
    with pytest.raises(UserError) as caught:
        open_source(format, path, **options)
    assert message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
