"""docs/data_formats.md names every format, option, column and reason, and no other reason."""

import ast
import dataclasses
import importlib
import pathlib
import re

import pytest

from sdv_jax.data.importers import FORMATS, metadata, reading

ROOT = pathlib.Path(__file__).parents[3]
PAGE = (ROOT / "docs/data_formats.md").read_text()
READING = ("decode.py", "prepare.py", "raw.py", "samples.py", "streams.py")


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]


@pytest.mark.parametrize("format", FORMATS)
def test_options(format):
    options = dataclasses.fields(importlib.import_module(f"sdv_jax.data.importers.{format}").Options)
    text = section(format)
    rows = " ".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))
    assert all(f"`{option.name}`" in rows for option in options)
    assert f"[`{format}`](#{format})" in PAGE


def test_columns_and_suffixes():
    text = section("metadata")
    assert all(f"`{name}`" in text for name in metadata.TARGETS + metadata.CAPTIONS + metadata.REFERENCES)
    assert " ".join(reading.VIDEO_SUFFIXES) in PAGE and " ".join(reading.PICTURE_SUFFIXES) in PAGE


def test_reasons():
    """Every reason that is written out in the code is in the table, and no other."""
    files = [ROOT / "sdv_jax/data" / name for name in READING]
    reasons = set()
    for file in [*files, *(ROOT / "sdv_jax/data/importers").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if name == "Rejected":
                reasons.add(node.args[0].value)
            elif name == "RejectedItem" and isinstance(node.args[1], ast.Constant):
                reasons.add(node.args[1].value)
    assert re.findall(r"^\| `(.*?)` \|", section("Why items are rejected"), re.MULTILINE) == sorted(reasons)
