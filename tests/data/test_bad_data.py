"""docs/bad_data.md row by row: what it says of bad data is what happens, from the set to the prepared records."""

import json
import re
from pathlib import Path

import pytest

from sdv_jax.checkpoints import model_folder
from sdv_jax.data import prepare, records
from sdv_jax.data.decode import Size, read_clip, read_picture
from sdv_jax.data.encoding import Encoders
from sdv_jax.data.importers import Clip, Picture, Rejected, open_source
from sdv_jax.errors import UserError
from tests.data import bad_items, bad_sets, sets

PAGE = Path(__file__).parents[2] / "docs" / "bad_data.md"


def told(title: str) -> dict[str, str]:
    """{first cell: last cell} of the table below a title of the page."""
    text = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.DOTALL | re.MULTILINE)[1]
    table = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {cells[0].strip().strip("`"): cells[-1].strip().strip("`") for cells in table[2:]}


def outcomes(folder: Path, out: Path) -> list[str]:
    """Of each item of a prepared set, in order: "taken", or reason and detail."""
    taken = {b.describe(i)["key"] for b in records.load(out).buckets for i in range(len(b))}
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    source, found = open_source("metadata", folder), []
    for index in range(len(source)):
        key = source.key(index)
        if key in taken:
            taken.remove(key)
            found.append("taken")
        else:
            line = next(line for line in rejected if line["key"] == key)
            rejected.remove(line)
            found.append(_words(f"{line['reason']}: {line['detail']}", folder))
    assert not taken and not rejected
    return found


def of_set(format: str, folder: Path) -> str:
    """What opening a set and reading its first item says."""
    try:
        item = open_source(format, folder)[0]
        if isinstance(item.target, Clip):
            read_clip(item.target, Size(1, 32, 48), fps=None)
        for picture in (*item.references, *([item.target] if isinstance(item.target, Picture) else [])):
            read_picture(picture, height=32, width=32)
    except (Rejected, UserError) as error:
        return _words(str(error), folder)
    return "taken"


def test_items(tmp_path, tiny_pipeline_folder, monkeypatch):
    model, folder = tiny_pipeline_folder(), tmp_path / "set" / "of bad items"
    traits = model_folder.about(model).traits
    monkeypatch.setattr(Encoders, "load", lambda *_, **__: sets.fake_encoders(traits))
    names = bad_items.make(folder)
    config = sets.config(
        model, folder, tmp_path / "out", source__format="metadata", samples__buckets=("9x32x48", "1x32x48"),
        rejected__most=1.0, work__unit=16,
    )  # fmt: skip
    prepare.prepare(config, progress=False)
    assert dict(zip(names, outcomes(folder, tmp_path / "out"), strict=True)) == told("Clips, pictures and rows")
    assert "<script>alert" not in (tmp_path / "out" / "index.html").read_text()


@pytest.mark.parametrize("name", bad_sets.SETS)
def test_sets(tmp_path, name):
    format, make = bad_sets.SETS[name]
    make(tmp_path)
    assert of_set(format, tmp_path) == told("Sets")[name]
    assert told("Sets").keys() == bad_sets.SETS.keys()


def _words(text: str, folder: Path) -> str:
    """A line without the folder's place, without what only a version of FFmpeg says, and not endless."""
    assert "\n" not in text
    text = text.replace(f"{folder}/", "").replace(str(folder), "SET").replace("\0", "\\0")
    text = re.sub(r"w{99,}", "w...w", text)
    return re.sub(r"( is damaged or not a video| cannot be decoded) \(.*\)", r"\1", text).replace("|", "/")
